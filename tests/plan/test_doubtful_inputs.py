"""Inputs that may not be those that were meant: the plan says so."""

from __future__ import annotations

from pathlib import Path
from uuid import uuid4

import pytest
from helpers.models import finetune, random_state, save

from hf_locstitch.plan.describe import format_plan
from hf_locstitch.plan.planning import make_plan
from hf_locstitch.plan.recipe import make_recipe
from loopback_hub import LoopbackHub


def plan_of(base: str, *finetuned: str) -> str:
    return format_plan(make_plan(make_recipe({"base": base, "finetuned": list(finetuned)})))


def test_a_folder_that_hides_a_repo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = random_state(0)
    save(tmp_path / "demo" / "base", state)
    save(tmp_path / "demo" / "ft", finetune(state, 1))
    monkeypatch.chdir(tmp_path)
    assert plan_of("demo/base", "./demo/ft").count("the folder here, not the repo demo/base on the Hub") == 1
    assert plan_of("./demo/base", "demo/ft").count("the folder here, not the repo demo/ft on the Hub") == 1
    (tmp_path / "demo" / "ft" / "model.safetensors").rename(tmp_path / "demo" / "ft.safetensors")
    said = "(the file here, not the repo demo/ft.safetensors on the Hub; write ./demo/ft.safetensors for a file)"
    assert said in plan_of("./demo/base", "demo/ft.safetensors")
    save(tmp_path / "demo" / "again", finetune(state, 1))
    assert "not the repo" not in plan_of("./demo/base", str(tmp_path / "demo" / "again"))


@pytest.mark.parametrize("several", [False, True], ids=["text", "list"])
def test_swapped_base_and_finetune(tmp_path: Path, home_hub: LoopbackHub, several: bool) -> None:
    state = random_state(0)
    repos = [f"demo/{uuid4().hex[:12]}" for _ in range(2)]
    for repo, weights, parent in zip(repos, (state, finetune(state, 1)), (None, repos[0]), strict=True):
        folder = save(tmp_path / repo, weights)
        if parent is not None:
            (folder / "README.md").write_text(f"---\nbase_model: {[parent] if several else parent}\n---\n")
        home_hub.add_repo(repo, {file.name: file for file in folder.iterdir()})
    assert "may be swapped" in plan_of(repos[1], repos[0])
    assert "may be swapped" not in plan_of(repos[0], repos[1])
