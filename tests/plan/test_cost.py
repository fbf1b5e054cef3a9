"""What a plan says that it takes."""

from __future__ import annotations

from pathlib import Path
from uuid import uuid4

import pytest
from helpers.models import finetune, random_state, save
from helpers.runs import carry_out

from hf_locstitch.checkpoints import read_ahead, xet
from hf_locstitch.plan import cost
from hf_locstitch.plan.cost import XET_BYTES, estimate, files_here
from hf_locstitch.plan.planning import make_plan
from hf_locstitch.plan.recipe import make_recipe
from loopback_hub import LoopbackHub


def test_memory_counts_what_came_before_its_turn(
    home_hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And hf_xet, where it is used; nothing once the files are here."""
    repos = []
    for seed in (0, 1):
        folder = save(tmp_path / f"m{seed}", finetune(random_state(0), seed) if seed else random_state(0))
        repos.append(f"demo/{uuid4().hex[:8]}")
        home_hub.add_repo(repos[-1], {path.name: path for path in folder.iterdir()})
    recipe = make_recipe({"base": repos[0], "finetuned": repos[1:], "figures": False})
    plan = make_plan(recipe)
    for usable in (False, True):
        monkeypatch.setattr(xet, "is_usable", lambda usable=usable: usable)
        found = estimate(plan, files_here(plan))
        assert found.memory == plan.settings.memory + found.download + usable * XET_BYTES
    monkeypatch.setattr(cost, "LARGEST", 10)
    assert estimate(plan, files_here(plan)).memory == plan.settings.memory + 10 * read_ahead.IN_ALL + XET_BYTES
    carry_out(plan, tmp_path / "out")
    assert estimate(plan, files_here(plan)).memory == plan.settings.memory
