"""Models on the Hub that are merged while they are on their way."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from uuid import uuid4

import pytest
import torch
from helpers.models import State, finetune, random_state, save, save_sharded
from helpers.streaming import CACHING, SHAPES, empty_cache, merged

from hf_locstitch.checkpoints import hub_client
from hf_locstitch.checkpoints.hub import HubSource
from loopback_hub import LoopbackHub


@pytest.fixture(autouse=True)
def small_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_client, "LONGEST_WAIT", 0.01)
    for module in ("hf_locstitch.localize.selection", "hf_locstitch.plan.cost"):
        monkeypatch.setattr(f"{module}.COMPACT_SLACK", 0)
    for module in ("hf_locstitch.localize.scan", "hf_locstitch.plan.cost"):
        monkeypatch.setattr(f"{module}.BATCH", 1)


@pytest.fixture(scope="module")
def states() -> list[State]:
    base = random_state(0, torch.bfloat16, SHAPES)
    return [base, *(finetune(base, seed, 1e-2) for seed in (1, 2))]


@pytest.fixture
def repos(home_hub: LoopbackHub, hub_cache: Path, states: Sequence[State], tmp_path: Path) -> list[str]:
    """The base in two files, a finetune in one, a finetune in three whose tensors are in another order."""
    thirds = lambda names: [list(reversed(names[::3])), names[1::3], names[2::3]]  # noqa: E731
    folders = [
        save_sharded(tmp_path / "in" / "base", states[0], lambda names: [names[:4], names[4:]]),
        save(tmp_path / "in" / "ft1", states[1]),
        save_sharded(tmp_path / "in" / "ft2", states[2], thirds),
    ]
    run_id, names = uuid4().hex[:8], []
    for folder in folders:
        names.append(f"demo/{run_id}-{folder.name}")
        home_hub.add_repo(names[-1], {path.name: path for path in folder.iterdir()})
    home_hub.requests.clear()
    return names


@pytest.fixture
def expected(repos: list[str], home_hub: LoopbackHub, tmp_path: Path) -> dict[str, str]:
    """From a cache that holds everything already."""
    for repo in repos:
        source = HubSource(repo, None)
        for file in source.files:
            source.fetch(file)
    files = merged(repos, tmp_path / "expected", CACHING)
    empty_cache()
    home_hub.requests.clear()
    return files
