"""A base that is not the finetunes' own, and a finetune given twice, are told by the angles between task vectors."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import finetune, random_state, save

from hf_locstitch import merge_from_hub

SHAPES = {f"model.layers.{i}.w": (60, 40) for i in range(4)}


@pytest.fixture
def models(tmp_path: Path) -> dict[str, Path]:
    base = random_state(0, torch.bfloat16, SHAPES)
    states = {"base": base, **{name: finetune(base, seed) for seed, name in enumerate("abc", start=1)}}
    return {name: save(tmp_path / name, state) for name, state in states.items()}


def warnings(models: dict[str, Path], base: str, finetuned: list[str], out: Path, **options: Any) -> list[str]:
    names = [f"{name}{number}" for number, name in enumerate(finetuned)]
    done = merge_from_hub(models[base], [models[name] for name in finetuned], names=names, out=out, **options)
    return [warning for warning in done.manifest.warnings if "task vectors" in warning]


@pytest.mark.parametrize("names", [["base", "b"], ["base", "b", "c"], ["b", "c"]])
def test_a_base_that_is_a_finetune(models: dict[str, Path], tmp_path: Path, names: list[str]) -> None:
    (warning,) = warnings(models, "a", names, tmp_path / "out")
    assert "may be swapped with a finetune" in warning and "cosines of 0." in warning


@pytest.mark.parametrize("method", ["locstitch", "ties"])
def test_finetunes_of_their_own_base(models: dict[str, Path], tmp_path: Path, method: str) -> None:
    assert warnings(models, "base", ["a", "b", "c"], tmp_path / "out", method=method, figures=False) == []


def test_a_finetune_in_two_folders(models: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(models["a"], tmp_path / "copy")
    (warning,) = warnings({**models, "copy": tmp_path / "copy"}, "base", ["a", "copy", "b"], tmp_path / "out")
    assert "a0 and copy1" in warning and "outvotes" in warning


def test_a_finetune_that_is_the_base_has_no_direction(models: dict[str, Path], tmp_path: Path) -> None:
    assert warnings(models, "base", ["base", "a"], tmp_path / "out") == []
