"""What a killed process left among the finished files is not taken for a part of the result."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from uuid import uuid4

import pytest
from helpers.models import State, finetune, save
from helpers.runs import Killed, quick_localize, quick_merge

from hf_locstitch import verify
from hf_locstitch.engine import work_dir
from hf_locstitch.report.publish import Upload
from loopback_hub import LoopbackHub


def stop(*_: object, **__: object) -> None:
    raise Killed


def record(out: Path) -> dict[str, object]:
    return {**json.loads((out / "locstitch.json").read_text()), "seconds": 0}


@pytest.mark.parametrize("make", [quick_merge, quick_localize], ids=["merge", "localize"])
def test_a_kill_at_the_very_end(
    make: Callable[..., object], base: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The manifest was already written, a temporary file was not yet gone."""
    models = [tmp_path / "base", save(tmp_path / "ft", finetune(base, 1))]
    make(*models, out=tmp_path / "due")
    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(work_dir, "_move", stop)
        make(*models, out=tmp_path / "out")
    (stage,) = tmp_path.glob(".out.*.partial/out")
    (stage / ".model.safetensors.1.new").write_bytes(b"half")
    (stage / "figures").mkdir(exist_ok=True)
    (stage / "figures" / "half.svg").write_bytes(b"half")
    make(*models, out=tmp_path / "out")
    assert record(tmp_path / "out") == record(tmp_path / "due")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {path.name for path in (tmp_path / "due").iterdir()}
    assert verify(tmp_path / "out").ok
    make(*models, out=tmp_path / "out")  # recognised as finished


def test_a_kill_before_the_commit(
    base: State, tmp_path: Path, home_hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    repo = f"demo/{uuid4().hex[:8]}"
    models = [tmp_path / "base", save(tmp_path / "ft", finetune(base, 1))]
    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(Upload, "commit", stop)
        quick_merge(*models, push_to=repo)
    quick_merge(*models, push_to=repo)
    assert "locstitch.json" not in json.loads(home_hub.read(repo, "locstitch.json"))["outputs"]


def test_a_kill_after_the_last_step(base: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models = [tmp_path / "base", save(tmp_path / "ft", finetune(base, 1))]
    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(work_dir.shutil, "rmtree", stop)
        quick_merge(*models, out=tmp_path / "out")
    assert list(tmp_path.glob(".out.*.partial"))
    quick_merge(*models, out=tmp_path / "out")
    assert not list(tmp_path.glob(".out.*"))
