"""A Hub that answers only so many requests in a window of time."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal
from uuid import uuid4

import pytest
from helpers.models import finetune, random_state, save_sharded
from helpers.runs import files_of, quick_merge

from hf_locstitch import Magnitude
from hf_locstitch.checkpoints import hub_client
from hf_locstitch.checkpoints.hub import HubSource
from hf_locstitch.checkpoints.hub_client import Attempts, RateLimit, limited_for
from hf_locstitch.errors import DownloadError
from loopback_hub import Fault, LoopbackHub
from loopback_hub import RateLimit as Limit


@pytest.fixture
def limited(home_hub: LoopbackHub, hub_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    """Failures are not waited for, and one more would be the last."""
    monkeypatch.setattr(hub_client, "LONGEST_WAIT", 0.01)
    monkeypatch.setattr(hub_client, "ATTEMPTS", 1)
    monkeypatch.setattr(hub_client, "RATE_LIMIT", RateLimit())
    monkeypatch.setattr("hf_locstitch.checkpoints.repo_files.RATE_LIMIT", hub_client.RATE_LIMIT)
    yield home_hub
    home_hub.rate_limit = None


@pytest.mark.parametrize("headers", ["RateLimit", "Retry-After"])
@pytest.mark.parametrize("cache", [True, False], ids=["caching", "passing"])
def test_a_merge_under_a_limit(
    limited: LoopbackHub, tmp_path: Path, cache: bool, headers: Literal["RateLimit", "Retry-After"]
) -> None:
    """Many small shards: every one of them costs requests, and none is answered before its window."""
    base = random_state(0)
    repos = []
    for name, state in {"base": base, "maths": finetune(base, 1), "code": finetune(base, 2)}.items():
        folder = save_sharded(tmp_path / name, state, lambda names: [[tensor] for tensor in names])
        repos.append(f"demo/{uuid4().hex[:8]}-{name}")
        limited.add_repo(repos[-1], {file.name: file for file in folder.iterdir()})
    limited.requests.clear()
    limited.rate_limit = Limit(20, 1.0, headers)
    for out in ("out", "again"):
        quick_merge(
            repos[0],
            repos[1:],
            out=tmp_path / out,
            names=["maths", "code"],
            localizer=Magnitude(density=0.3),
            cache=cache,
        )
    turned_away = [request for request in limited.requests if request.status == 429]
    assert turned_away and len(limited.requests) > 2 * 20
    assert files_of(tmp_path / "out") == files_of(tmp_path / "again")


def test_one_gate_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who is turned away keeps the others from asking; the gate never opens early."""
    gate, heard = RateLimit(), []
    gate.close(0.3)
    gate.close(0.05)
    threads = [threading.Thread(target=lambda: (gate.wait(), heard.append(time.monotonic()))) for _ in range(3)]
    began = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert min(heard) - began > 0.25


class Answered(Exception):
    """Stands for an error with a response."""

    def __init__(self, headers: dict[str, str]) -> None:
        self.response = type("Response", (), {"status_code": 429, "headers": headers})()


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"RateLimit": '"resolvers";r=0;t=41'}, 41),
        ({"ratelimit": '"api";r=0;t=0'}, 1),
        ({"RateLimit": '"api";r=0;t=99999'}, 600),
        ({"RateLimit": '"api";r=7;t=41', "Retry-After": "3"}, 3),
        ({"Retry-After": "300"}, 300),
        ({"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}, 2),
        ({}, 2),
    ],
)
def test_how_long(headers: dict[str, str], seconds: float) -> None:
    assert limited_for(2, Answered(headers)) == seconds


def test_a_limit_that_is_never_lifted(limited: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    repo = f"demo/{uuid4().hex}"
    limited.add_repo(repo, {"config.json": "{}"})
    monkeypatch.setattr(hub_client, "LONGEST_LIMITED", 0.1)
    limited.fail(Fault("status", path=f"/api/models/{repo}", status=429, times=10_000))
    with pytest.raises(DownloadError, match="429"):
        HubSource(repo, None)
    limited._faults._waiting.clear()


def test_a_failure_after_progress_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_client, "LONGEST_WAIT", 0.0)
    monkeypatch.setattr(hub_client, "ATTEMPTS", 2)
    attempts = Attempts()
    told = [attempts.wait_after(ConnectionError(), progress=progress) for progress in (False, True, False, False)]
    assert told == [True, True, True, False]
