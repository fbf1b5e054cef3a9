"""Whether models are finetunes of a base: model types as all versions of transformers write them, missing layers."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import State, finetune, random_state, save
from helpers.runs import quick_merge

from hf_locstitch.errors import MismatchError
from hf_locstitch.plan.planning import make_plan
from hf_locstitch.plan.recipe import make_recipe

ROPE = {"rope_theta": 1e4, "rope_type": "default"}  # a nested dict without a model_type


def pair(tmp: Path, base: Any, finetuned: Any) -> dict[str, Any]:
    """Folders with these configs, as fields of a recipe."""
    state = random_state(0)
    refs = [str(save(tmp / name, part, json.dumps(config))) for name, part, config in (
        ("base", state, base), ("ft", finetune(state, 1), finetuned),
    )]  # fmt: skip
    return {"base": refs[0], "finetuned": refs[1:]}


def test_model_types_with_nested_settings(tmp_path: Path) -> None:
    configs = [{"model_type": kind, "rope_parameters": ROPE} for kind in ("llama", "mistral")]
    with pytest.raises(MismatchError, match=r"ft is a mistral model, the base .*base a llama model"):
        make_plan(make_recipe(pair(tmp_path, *configs)))


def test_architectures_that_only_share_a_part(tmp_path: Path) -> None:
    vision = {"model_type": "clip_vision_model"}
    configs = [
        {"model_type": kind, "vision_config": vision, "rope_parameters": ROPE} for kind in ("llava", "llava_next")
    ]
    with pytest.raises(MismatchError, match=r"ft is a llava_next model, the base .*base a llava model"):
        make_plan(make_recipe(pair(tmp_path, *configs)))


@pytest.mark.parametrize(
    ("base", "finetuned"),
    [
        (
            {"model_type": "clip", "vision_config": {"model_type": "clip_vision_model"}},
            {"model_type": "clip_vision_model"},
        ),
        ({"rope_parameters": ROPE}, {"model_type": "llama", "rope_parameters": ROPE}),
        ({}, {"model_type": "llama"}),
    ],
    ids=["a part", "none in the base", "no config"],
)  # fmt: skip
def test_model_types_that_fit(tmp_path: Path, base: Any, finetuned: Any) -> None:
    make_plan(make_recipe(pair(tmp_path, base, finetuned)))


def with_more_layers(state: State) -> State:
    return {**state, "more.layers.0.mlp.up_proj.weight": torch.ones(2, 2), "more.layers.0.norm.weight": torch.ones(2)}


@pytest.mark.parametrize("only_in", ["base", "ft"])
def test_layers_of_one_side_name_the_glob_that_leaves_them_out(tmp_path: Path, only_in: str) -> None:
    state = random_state(0)
    states = {"base": state, "ft": finetune(state, 1)}
    states[only_in] = with_more_layers(states[only_in])
    base, ft = (save(tmp_path / name, state) for name, state in states.items())
    with pytest.raises(MismatchError, match=r"--exclude 'more\.\*'"):
        quick_merge(base, [ft], out=tmp_path / "out")
    quick_merge(base, [ft], out=tmp_path / "out", exclude=["more.*"])


def test_many_names_of_which_none_fits(tmp_path: Path) -> None:
    """As many as a large mixture of experts has: the work grows with them, not with their square."""
    for folder, last in (("base", "weight"), ("ft", "weighty")):
        save(tmp_path / folder, {f"model.layers.{i}.{last}": torch.ones(1) for i in range(40_000)})
    began = time.process_time()
    with pytest.raises(MismatchError, match=r"lacks model\.layers.*and 39999 more.*--exclude 'model\.\*'"):
        make_plan(make_recipe({"base": str(tmp_path / "base"), "finetuned": str(tmp_path / "ft")}))
    assert time.process_time() - began < 10
