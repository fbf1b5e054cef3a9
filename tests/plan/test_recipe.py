"""Recipes: what is shipped is valid, what is pinned says the same again."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from hf_locstitch.checkpoints.ref import Ref, parse_ref
from hf_locstitch.errors import RecipeError
from hf_locstitch.plan.recipe import make_recipe
from hf_locstitch.plan.recipe_file import dump_recipe, load_recipe

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_shipped_recipes(path: Path) -> None:
    recipe = make_recipe(load_recipe(path), str(path))
    names = [entry.name or parse_ref(entry.ref).name for entry in recipe.finetuned]
    assert len(set(names)) == len(names) and len(names) >= 2


def test_there_are_recipes() -> None:
    assert len(RECIPES) >= 2


def test_dumped_is_read_back() -> None:
    fields = {
        "base": "org/base@abc",
        "finetuned": ["org/a", {"ref": "org/b", "name": "b2"}],
        "localizer": {"density": 0.29, "scope": "tensor"},
        "shard_size": "5GB",
        "scale": 0.5,
        "exclude": ["*.bias"],
        "out": "x",
    }
    recipe = make_recipe(fields)
    again = make_recipe(yaml.safe_load(dump_recipe(recipe)))
    assert again == recipe.model_copy(update={"out": None})
    assert recipe.shard_size == 5_000_000_000


def test_every_fault_at_once() -> None:
    with pytest.raises(RecipeError) as raised:
        make_recipe({"finetuned": [], "localizer": {"density": 2, "scop": "model"}, "scale": "big", "dtype": "int8"})
    for words in ("'base' is missing", "finetuned", "localizer.density", "did you mean 'scope'", "scale", "dtype"):
        assert words in str(raised.value)


def test_a_number_that_is_written_otherwise() -> None:
    for given, hint in (("10%", " (did you mean 0.1?)"), ("0,1", " (did you mean 0.1?)"), ("a tenth", "")):
        fields = {"base": "org/base", "finetuned": ["org/a"], "localizer": {"method": "magnitude", "density": given}}
        with pytest.raises(RecipeError) as raised:
            make_recipe(fields)
        assert str(raised.value).endswith(f": localizer.density: {given!r} is not a number{hint}.")


def test_refs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert parse_ref("org/name") == Ref(repo="org/name")
    assert parse_ref("org/name@v1.0") == Ref(repo="org/name", revision="v1.0")
    assert parse_ref("org/name@refs/pr/3").revision == "refs/pr/3"
    assert parse_ref("gpt2").repo == "gpt2"
    assert parse_ref("./x").folder == Path("x") and parse_ref("/a/b").name == "b"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert parse_ref("org/name").folder == Path("org/name")
    for text in ("a b", "a//c", "org/name@", "@main", ""):
        with pytest.raises(RecipeError):
            parse_ref(text)
