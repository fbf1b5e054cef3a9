"""Models whose scores are known, a task, and a merge on the Hub."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from uuid import uuid4

import pytest
from helpers.language_models import favouring, local_task

from hf_locstitch import merge_from_hub
from hf_locstitch.cli.main import main
from loopback_hub import LoopbackHub

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "home"))


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """Of ten questions the answers are A, B and C in one, six and three."""
    return local_task(tmp_path / "tasks", "letters", "ABBBBBBCCC")


@pytest.fixture
def a(tmp_path: Path) -> Path:
    return favouring(tmp_path / "a", "A")


@pytest.fixture
def b(tmp_path: Path) -> Path:
    return favouring(tmp_path / "b", "B", seed=1)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def run(*args: object) -> tuple[int, str, str]:
        status = main([str(arg) for arg in args])
        return status, *capsys.readouterr()

    return run


@pytest.fixture
def published(home_hub: LoopbackHub, a: Path, b: Path, tmp_path: Path) -> str:
    """A merge on the Hub, with its figures, that has all of b, which favours B."""
    run_id = uuid4().hex[:12]
    for name, folder in {"base": a, "words": b}.items():
        (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# parent\n")
        home_hub.add_repo(f"demo/{run_id}-{name}", {file.name: file for file in folder.iterdir()})
    merge_from_hub(
        f"demo/{run_id}-base", [f"demo/{run_id}-words"], names=["words"], push_to=f"demo/{run_id}-merged",
        include=["*"], localizer={"density": 1.0},
    )  # fmt: skip
    return f"demo/{run_id}-merged"
