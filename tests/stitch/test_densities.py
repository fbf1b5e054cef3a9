"""Densities of each finetune, for methods that drop entries of task vectors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers.models import State, finetune, load, random_state, same_bits
from helpers.runs import merge_folders, merged

from hf_locstitch.errors import RecipeError
from hf_locstitch.plan.recipe import make_recipe
from hf_locstitch.plan.recipe_file import dump_recipe

METHODS = ("dare", "dare-linear", "dare-ties", "della", "breadcrumbs")
BY_PART = {"*.mlp.*": 0.3, "*": 0.8}


def models() -> tuple[State, list[State]]:
    base = random_state(0)
    return base, [finetune(base, seed) for seed in range(2)]


@pytest.mark.parametrize("name", METHODS)
def test_one_density_for_each_is_that_density(tmp_path: Path, name: str) -> None:
    base, finetuned = models()
    together = merged(tmp_path, base, finetuned, method={"name": name, "density": 0.6})
    entries = [{"ref": str(tmp_path / f"ft{i}"), "name": f"ft{i}"} for i in range(2)]
    apart = merge_folders(tmp_path, entries, method={"name": name, "densities": [0.6, {"*": 0.6}]})
    assert same_bits(load(together), load(apart))


@pytest.mark.parametrize("name", METHODS)
def test_densities_follow_their_finetunes(tmp_path: Path, name: str) -> None:
    base, finetuned = models()
    one = merged(tmp_path, base, finetuned, method={"name": name, "densities": [0.5, BY_PART]})
    entries = [{"ref": str(tmp_path / f"ft{i}"), "name": f"ft{i}"} for i in (1, 0)]
    other = merge_folders(tmp_path, entries, method={"name": name, "densities": [BY_PART, 0.5]})
    swapped = merge_folders(tmp_path, entries, method={"name": name, "densities": [0.5, BY_PART]})
    assert same_bits(load(one), load(other))
    assert not same_bits(load(one), load(swapped))


def test_breadcrumbs_keep_the_share_of_each(tmp_path: Path) -> None:
    base, finetuned = models()
    method = {"name": "breadcrumbs", "gamma": 0, "densities": [BY_PART, 0.5]}
    found = load(merged(tmp_path, base, finetuned, method=method))
    for tensor, start in base.items():
        total = start.double()
        for state, density in zip(finetuned, (0.3 if ".mlp." in tensor else 0.8, 0.5), strict=True):
            change = (state[tensor].double() - start.double()).flatten()
            kept = change.abs().argsort(descending=True)[: int(density * change.numel())]
            total += torch.zeros_like(change).index_put((kept,), change[kept]).view(start.shape)
        torch.testing.assert_close(found[tensor].double(), total, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "due"),
    [
        ({"name": "dare"}, [2.5, 1.25]),
        ({"name": "dare-linear"}, [2.5, 1.25]),
        ({"name": "dare-linear", "rescale": False}, [1.0, 1.0]),
        ({"name": "dare-ties"}, [2.5, 1.25]),
        ({"name": "dare-ties", "rescale": False}, [1.0, 1.0]),
    ],
)
def test_what_is_kept_is_divided_by_the_density_of_each(
    tmp_path: Path, settings: dict[str, Any], due: list[float]
) -> None:
    """Each finetune changes a half of its own by 1, so that entries tell what became of it."""
    base = {"layers.0.w": torch.zeros(2, 4000)}
    finetuned = [
        {"layers.0.w": torch.stack([torch.full((4000,), float(row == i)) for row in range(2)])} for i in range(2)
    ]
    found = load(merged(tmp_path, base, finetuned, method={**settings, "densities": [0.4, 0.8]}))["layers.0.w"]
    for row, value, density in zip(found, due, (0.4, 0.8), strict=True):
        torch.testing.assert_close(row.unique(), torch.tensor([0.0, value]))
        assert float((row > 0).float().mean()) == pytest.approx(density, abs=0.04)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"densities": [0.5]}, "densities needs one for each finetune: expected 2, got 1"),
        ({"densities": [0.5, 0.5], "density": 0.5}, "density and densities are both given"),
        ({"densities": [0.5, 1.5]}, "at most 1, not 1.5"),
        ({"densities": [0.5, {"*": 0}]}, "greater than 0"),
    ],
)
def test_what_is_wrong_is_told(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        make_recipe({"base": "org/b", "finetuned": ["org/x", "org/y"], "method": {"name": "dare", **settings}})


def test_della_checks_the_chances_of_each() -> None:
    method = {"name": "della", "densities": [0.5, 0.1], "epsilon": 0.2}
    with pytest.raises(RecipeError, match=r"0\.1 ± 0\.2"):
        make_recipe({"base": "org/b", "finetuned": ["org/x", "org/y"], "method": method})


def test_globs_that_match_nothing_are_refused(tmp_path: Path) -> None:
    base, finetuned = models()
    with pytest.raises(
        RecipeError, match=r"'\*\.mpl\.\*' matches no tensor in what is merged \(method\.densities\.1\)"
    ):
        merged(tmp_path, base, finetuned, method={"name": "dare", "densities": [0.5, {"*.mpl.*": 0.5, "*": 1}]})


@pytest.mark.parametrize("settings", [{"density": 0.3}, {"densities": [0.3, {"*": 0.5}]}])
def test_a_recipe_is_written_as_it_was_given(settings: dict[str, Any]) -> None:
    fields = {"base": "org/b", "finetuned": ["org/x", "org/y"], "method": {"name": "dare", **settings}}
    recipe = make_recipe(fields)
    written = yaml.safe_load(dump_recipe(recipe))
    assert written["method"] == {"name": "dare", **settings, "seed": 0}
    assert make_recipe(written).method == recipe.method
