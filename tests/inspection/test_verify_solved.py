"""`verify` solves for a few values of a refit without data once more, and notices others."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.families import build, family
from helpers.models import load
from helpers.runs import quick_merge
from safetensors.torch import save_file

from hf_locstitch import load_mask, verify

HIT = "model.layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("localizer", [{"method": "joint"}, {"method": "joint", "density": 1}, {"density": 0.1}])
def test_solved_values_are_checked(dtype: torch.dtype, localizer: dict[str, object], tmp_path: Path) -> None:
    folders = family(build("llama", dtype), tmp_path)
    quick_merge(folders[0], folders[1:], out=tmp_path / "out", localizer=localizer, stitch="refit", scale=0.8)
    report = verify(tmp_path / "out", base=folders[0], finetuned=folders[1:], tensors="all")
    assert report.ok, report.describe()
    state, mask = load(tmp_path / "out"), load_mask(str(tmp_path / "out"), "ft0")[HIT]
    start, tuned = load(folders[0])[HIT], load(folders[1])[HIT]
    state[HIT] = torch.where(mask, start + 0.4 * (tuned - start), state[HIT])
    save_file(state, tmp_path / "out" / "model.safetensors", metadata={"format": "pt"})
    found = verify(tmp_path / "out", base=folders[0], finetuned=folders[1:], tensors="all").findings
    assert any("a refitted value" in finding.what and finding.where == HIT for finding in found)


def test_what_was_fitted_to_data_is_not(tmp_path: Path) -> None:
    from helpers.data import write_texts

    folders = family(build("llama", torch.float32), tmp_path)
    data = [str(write_texts(tmp_path / f"{seed}.jsonl", 8, seed=seed)) for seed in range(2)]
    stitch = {"inputs": 8, "held_out": 0, "lambdas": [0.1]}
    quick_merge(folders[0], folders[1:], out=tmp_path / "out", stitch=stitch, data=data)
    report = verify(tmp_path / "out", base=folders[0], finetuned=folders[1:])
    assert report.ok and "repeated not" not in report.describe() and "the fit is not repeated" in report.describe()
