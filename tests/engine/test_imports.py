"""What a merge imports besides the plan: in time, and not for plans."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.models import finetune, random_state, save

from hf_locstitch import api, merge_from_hub
from hf_locstitch.cli.main import main
from hf_locstitch.engine import imports

PLAN_ONLY = """
import sys
from hf_locstitch import plan_merge
plan_merge({"base": "base", "finetuned": ["ft"]})
assert not {"numba", "scipy", "torch", "jinja2"} & set(sys.modules), sys.modules.keys()
"""
AHEAD = """
import sys, threading
from hf_locstitch.engine.imports import import_ahead
import_ahead()
for thread in threading.enumerate():
    if thread is not threading.current_thread():
        thread.join()
assert {"numba.np.arrayobj", "hf_locstitch.engine.model_run", "hf_locstitch.localize.search"} <= set(sys.modules)
assert ("accelerate" in sys.modules) == (len(sys.argv) > 1), sys.argv
assert len(sys.argv) > 1 or "huggingface_hub.hf_api" not in sys.modules  # for inputs in folders
"""


# Numba locks its compiler and its target, in either order: until both are there, one thread must be alone with it.
ALONE = """
from hf_locstitch.runtime import compiling
from numba.core.registry import cpu_target
assert {"_toplevel_target_context", "_toplevel_typing_context"} <= set(vars(cpu_target))
"""


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    base = random_state(0, torch.bfloat16, {"model.layers.0.w.weight": (30, 20)})
    save(tmp_path / "base", base)
    save(tmp_path / "ft", finetune(base, 1))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("code", [PLAN_ONLY, AHEAD, ALONE])
def test_what_is_imported(code: str, models: Path) -> None:
    done = subprocess.run([sys.executable, "-c", code], cwd=models, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_what_several_processes_speak_through_is_imported_ahead(models: Path) -> None:
    environment = {**os.environ, "WORLD_SIZE": "2"}
    words = [sys.executable, "-c", AHEAD, "several"]
    done = subprocess.run(words, cwd=models, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_merge_imports_while_it_is_planned(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From Python and from the command line; a dry run does not."""
    order: list[str] = []
    make_plan = api.make_plan

    def plan(*args: object) -> object:
        order.append("plan")
        return make_plan(*args)  # type: ignore[arg-type]

    for module in (api, imports):
        monkeypatch.setattr(module, "import_ahead", lambda: order.append("import"))
    for place in ("hf_locstitch.api.make_plan", "hf_locstitch.plan.planning.make_plan"):
        monkeypatch.setattr(place, plan)
    merge_from_hub("base", "ft", out="one", figures=False)
    flags = ["merge", "--base", "base", "--ft", "ft", "--no-figures", "--quiet"]
    assert main([*flags, "--out", "two"]) == 0
    assert order == ["import", "plan"] * 2
    assert main([*flags, "--dry-run"]) == 0
    assert order[4:] == ["plan"]
