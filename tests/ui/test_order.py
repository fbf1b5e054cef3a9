"""What the form may ask for."""

from __future__ import annotations

import pytest

from hf_locstitch.errors import RecipeError
from hf_locstitch.plan.recipe import make_recipe
from hf_locstitch.ui.order import Order, check_repo, make_order, offered_methods, suggested_target, takes_density

ASKED = {"base": "org/base", "finetuned": ["org/a", "org/b@v1"], "method": "locstitch", "percent": 5, "scale": 1}
NO_REPOS = ["/etc/passwd", "../x/y", "./a/b", "~/a", "org", "org/..", "a/b/c", "org/a@../x", "", "x" * 300, "<b>/x"]


def order(**changed: object) -> Order:
    return make_order(**{**ASKED, **changed})  # type: ignore[arg-type]


def test_an_order_is_a_recipe() -> None:
    recipe = make_recipe(order().pushed_to("me/merged", True).recipe_fields())
    assert [one.ref for one in (recipe.base, *recipe.finetuned)] == ["org/base", "org/a", "org/b@v1"]
    assert recipe.localizer is not None and recipe.localizer.model_dump()["density"] == 0.05
    assert (recipe.push_to, recipe.private) == ("me/merged", True)


@pytest.mark.parametrize("method", [name for _, name in offered_methods()])
def test_every_method_that_is_offered_makes_a_recipe(method: str) -> None:
    recipe = make_recipe(order(method=method).recipe_fields())
    assert recipe.method.name == method and not recipe.method.needs_data
    assert (recipe.localizer is not None) == takes_density(method)


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"base": " "}, "no base"),
        ({"finetuned": []}, "no finetuned model"),
        ({"finetuned": ["org/a", "org/a"]}, "twice"),
        ({"finetuned": [f"org/m{n}" for n in range(17)]}, "17 models"),
        ({"method": "regmean"}, "no method"),
        ({"percent": 0}, "density"),
        ({"percent": None}, "density is empty"),
        ({"scale": None}, "scale is empty"),
        ({"scale": float("nan")}, "scale is no finite number"),
        ({"scale": "1; x"}, "scale is no finite number"),
        ({"base": "/etc"}, "'/etc' is not the name"),
    ],
)
def test_what_is_wrong_is_said(changed: dict[str, object], told: str) -> None:
    with pytest.raises(RecipeError, match=told):
        order(**changed)


@pytest.mark.parametrize("text", NO_REPOS)
def test_only_repos_are_refs(text: str) -> None:
    with pytest.raises(RecipeError, match="not the name of a model"):
        check_repo(text)


def test_the_address_of_a_page_is_a_ref() -> None:
    assert check_repo(" https://huggingface.co/org/name/ ") == "org/name"


def test_a_target_is_checked() -> None:
    with pytest.raises(RecipeError, match="cannot be pushed to"):
        order().pushed_to("nonsense", False)


def test_the_key_is_of_the_person_and_of_all_that_is_asked_for() -> None:
    keys = {order().key("a"), order().key("b"), order(scale=2).key("a"), order().pushed_to("me/x", False).key("a")}
    assert len(keys) == 4 and order().key("a") in keys


def test_a_target_is_suggested() -> None:
    assert suggested_target("me", order()) == "me/base-stitched"
    assert suggested_target("me", order(method="ties")) == "me/base-ties"
