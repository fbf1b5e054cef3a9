"""Data-parallel and sharded localization under torchrun find the masks of one process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers.data import ROWS, write_jsonl
from helpers.families import finetunes
from helpers.launch import launch
from helpers.models import load

from hf_locstitch import load_mask
from hf_locstitch.cli.main import main

RECIPE = """
base: ./base
finetuned: [./ft]
localizer: {method: %s, density: 0.1, %s}
data: [./a.jsonl]
"""


def masks(folder: Path) -> torch.Tensor:
    return torch.cat([mask.flatten() for _, mask in sorted(load_mask(folder, "ft").items())])


# Four have one idle, for there are 3 micro-batches; two that share parameters out get one each.
@pytest.mark.parametrize(
    ("method", "kind", "count", "how"),
    [("saliency", "llama", 4, "micro_batch: 2"), ("mask", "mixtral", 2, "micro_batch: 3, sharded: true")],
)
def test_masks_do_not_depend_on_the_number_of_processes(
    method: str, kind: str, count: int, how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float64, so that the order of a sum decides no element; exactly the same k, and all bytes of the merge."""
    finetunes(tmp_path, kind, torch.float64, count=1)
    write_jsonl(tmp_path / "a.jsonl", ROWS)
    (tmp_path / "one.yaml").write_text(RECIPE % (method, "micro_batch: 2"))
    (tmp_path / "several.yaml").write_text(RECIPE % (method, how))
    monkeypatch.chdir(tmp_path)
    assert main(["merge", "one.yaml", "--out", "one", "--quiet", "--no-figures"]) == 0
    done = launch(count, tmp_path, "several.yaml", "--out", "several", "--quiet")
    assert done.returncode == 0, done.stderr[-3000:]
    expected = masks(tmp_path / "one")
    k = json.loads((tmp_path / "one" / "locstitch.json").read_text())["k"]
    assert int(expected.sum()) == k > 0
    assert torch.equal(masks(tmp_path / "several"), expected)
    merged = load(tmp_path / "several")
    assert all(torch.equal(merged[name], tensor) for name, tensor in load(tmp_path / "one").items())
