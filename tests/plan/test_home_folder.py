"""`~` stands for the home folder wherever a path is given, also where no shell expands it."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.models import finetune, random_state, save
from helpers.runs import quick_merge

from hf_locstitch.cli import main
from hf_locstitch.errors import RecipeError
from hf_locstitch.plan.recipe import make_recipe


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """With a base and a finetune in it; the working directory is another."""
    state = random_state(0)
    save(tmp_path / "home" / "base", state)
    save(tmp_path / "home" / "ft", finetune(state, 1))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def test_out_on_the_command_line_in_python_and_in_a_recipe(home: Path) -> None:
    assert main(["merge", "--base", "~/base", "--ft", "~/ft", "--out=~/one", "--no-figures", "--quiet"]) == 0
    quick_merge("~/base", "~/ft", out="~/two")
    Path("recipe.yaml").write_text("{base: ~/base, finetuned: [~/ft], out: ~/three, figures: false}")
    assert main(["merge", "recipe.yaml", "--quiet"]) == 0
    assert {"one", "two", "three"} <= {path.name for path in home.iterdir()}
    assert [path.name for path in Path().iterdir()] == ["recipe.yaml"]


def test_other_paths_and_unknown_users(home: Path) -> None:
    fields = {"base": "b/b", "finetuned": ["b/f"]}
    evaluate = make_recipe({**fields, "evaluate": {"tasks": ["t"], "include_path": "~/tasks"}}).evaluate
    assert evaluate is not None and evaluate.include_path == home / "tasks"
    with pytest.raises(RecipeError, match="unknown user"):
        make_recipe({**fields, "out": "~nobody-of-this-name/x"})
