"""What a recipe is warned of: that its masks or values come from what it is evaluated on."""

from __future__ import annotations

from typing import Any

import pytest

from hf_locstitch.plan.checking import judged_on
from hf_locstitch.plan.recipe import make_recipe
from hf_locstitch.tasks.leaks import leaks


@pytest.mark.parametrize(
    ("fields", "use"),
    [
        ({"localizer": {"method": "saliency"}, "data": ["gsm8k"]}, "masks were found"),
        ({"stitch": {"data": ["gsm8k"], "lambdas": [1]}}, "values were fitted"),
        ({"method": "regmean", "data": {"c": "gsm8k"}}, "values were fitted"),
        ({"method": {"name": "regmean", "data": ["gsm8k"]}}, "values were fitted"),
    ],
)
def test_every_place_in_a_recipe_counts(fields: dict[str, Any], use: str) -> None:
    recipe = make_recipe(
        {"base": "a/b", "finetuned": ["a/c"], "evaluate": {"tasks": ["gsm8k:5", "arc_easy"]}, **fields}
    )
    (warning,) = leaks(judged_on(recipe.evaluate), recipe.used_data)
    assert warning.startswith("gsm8k is named like gsm8k") and use in warning


def test_suites_are_resolved() -> None:
    fields = {"base": "a/b", "finetuned": ["a/c"], "localizer": {"method": "saliency"}, "data": ["cais/mmlu"]}
    recipe = make_recipe({**fields, "evaluate": {"suite": "paper"}})
    assert "mmlu is named like cais/mmlu" in leaks(judged_on(recipe.evaluate), recipe.used_data)[0]
