"""Layers for multi-token prediction that finetuning dropped stay the base's; other missing layers are an error."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from helpers.models import State, load, random_state, same_bits, save
from helpers.runs import quick_localize, quick_merge, quick_stitch

from hf_locstitch import plan_merge, verify
from hf_locstitch.errors import MismatchError

SHAPES = {"model.layers.0.w": (6, 4), "model.layers.1.w": (6, 4), "model.norm.weight": (4,)}
CONFIG = json.dumps({"model_type": "toy", "num_hidden_layers": 2, "num_nextn_predict_layers": 1})
LEFT = {
    "mtp": {"mtp.layers.0.w": (6, 4), "mtp.fc.weight": (4, 4)},
    "by number": {"model.layers.2.w": (6, 4), "model.layers.2.eh_proj.weight": (4, 8)},
}


def models(extra: dict[str, tuple[int, ...]], tmp_path: Path) -> tuple[Path, list[Path], State]:
    state = random_state(0, torch.float32, {**SHAPES, **extra})
    save(tmp_path / "base", state, CONFIG)
    tuned = [save(tmp_path / f"ft{seed}", random_state(seed, torch.float32, SHAPES), CONFIG) for seed in (1, 2)]
    return tmp_path / "base", tuned, state


@pytest.mark.parametrize("kind", LEFT)
def test_they_stay_the_bases(kind: str, tmp_path: Path) -> None:
    base, tuned, state = models(LEFT[kind], tmp_path)
    result = quick_merge(base, tuned, out=tmp_path / "out", localizer={"density": 0.5})
    merged = load(tmp_path / "out")
    assert merged.keys() == state.keys()
    assert all(torch.equal(merged[name], state[name]) for name in LEFT[kind])
    (note,) = [warning for warning in result.manifest.warnings if "multi-token" in warning]
    glob = "mtp.*" if kind == "mtp" else "model.layers.2.*"
    assert note == (f"ft1, ft2 lack the base's layers for multi-token prediction ({glob}): they stay the base's.")
    assert yaml.safe_load((tmp_path / "out" / "locstitch.yaml").read_text())["exclude"] == [glob]
    assert verify(tmp_path / "out", base=base, finetuned=tuned, tensors="all").ok
    for folder in tuned:
        quick_localize(base, folder, out=tmp_path / f"l-{folder.name}", localizer={"density": 0.5})
    quick_stitch(base, [tmp_path / "l-ft1", tmp_path / "l-ft2"], out=tmp_path / "stitched")
    assert same_bits(load(tmp_path / "stitched"), merged)


def test_a_finetune_that_has_them_is_merged_there(tmp_path: Path) -> None:
    base, _, state = models(LEFT["mtp"], tmp_path)
    whole = save(tmp_path / "whole", random_state(3, torch.float32, {**SHAPES, **LEFT["mtp"]}), CONFIG)
    quick_merge(base, [whole], out=tmp_path / "out", localizer={"density": 1})
    assert not torch.equal(load(tmp_path / "out")["mtp.layers.0.w"], state["mtp.layers.0.w"])


def test_a_layer_of_the_model_itself_is_missed(tmp_path: Path) -> None:
    base, _, _ = models(LEFT["mtp"], tmp_path)
    less = save(tmp_path / "less", random_state(3, torch.float32, {"model.layers.0.w": (6, 4)}), CONFIG)
    with pytest.raises(MismatchError, match=r"lacks model\.layers\.1\.w"):
        plan_merge({"base": str(base), "finetuned": [str(less)]})
