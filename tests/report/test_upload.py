"""Uploads in the background: several at once, no byte hashed again, and OUT does not wait for them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from helpers.models import finetune, random_state, save, save_sharded
from helpers.runs import quick_merge
from huggingface_hub import HfApi, lfs

from hf_locstitch.report import publish
from loopback_hub import LoopbackHub

Send = Callable[..., None]


@pytest.fixture
def models(tmp_path: Path) -> list[Path]:
    base = random_state(0)
    folder = save_sharded(tmp_path / "base", base, lambda names: [[name] for name in names])
    return [folder, save(tmp_path / "ft", finetune(base, 1))]


@pytest.fixture
def target() -> str:
    return f"demo/{uuid4().hex[:12]}"


def send_as(monkeypatch: pytest.MonkeyPatch, how: Callable[[Send, list[str], dict[str, Any]], None]) -> None:
    """Let `how` take the place of an upload; it is given the real one, the files and its arguments."""
    real = HfApi.preupload_lfs_files

    def send(self: HfApi, *args: Any, **more: Any) -> None:
        how(lambda: real(self, *args, **more), [one.path_in_repo for one in more["additions"]], more)

    monkeypatch.setattr(HfApi, "preupload_lfs_files", send)


def test_several_files_at_once(
    home_hub: LoopbackHub, models: list[Path], target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    together = threading.Barrier(3)

    def send(real: Send, files: list[str], _: dict[str, Any]) -> None:
        if files[0].startswith("model-0000") and int(files[0][10]) <= 3:
            together.wait(20)  # broken, if they come one after another
        real()

    send_as(monkeypatch, send)
    quick_merge(*models, push_to=target)
    assert len(home_hub.commits(target)) == 2


def test_no_file_is_read_for_a_hash_that_is_known(
    home_hub: LoopbackHub, models: list[Path], tmp_path: Path, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[str] = []
    real = lfs.sha_fileobj
    monkeypatch.setattr(lfs, "sha_fileobj", lambda file, *more: (hashed.append(file.name), real(file, *more))[1])
    quick_merge(*models, out=tmp_path / "out", push_to=target)
    assert not [file for file in hashed if file.endswith(".safetensors")]
    for path in (tmp_path / "out").rglob("*.safetensors"):
        assert home_hub.read(target, path.relative_to(tmp_path / "out").as_posix()) == path.read_bytes()


@pytest.mark.parametrize("fails", [False, True], ids=["goes on", "fails"])
@pytest.mark.parametrize("moves", [True, False], ids=["open files move", "they do not"])
def test_the_folder_does_not_wait_for_the_upload(
    home_hub: LoopbackHub,
    models: list[Path],
    tmp_path: Path,
    target: str,
    monkeypatch: pytest.MonkeyPatch,
    moves: bool,
    fails: bool,
) -> None:
    """What is on its way when the folder is moved arrives all the same, or is sent again from where it is then. Where
    the system moves no file that is open, that file is waited for."""
    out, slow = tmp_path / "out", "model-00002-of"
    seen: list[bool] = []
    monkeypatch.setattr(publish, "OPEN_FILES_MOVE", moves)

    def send(real: Send, files: list[str], _: dict[str, Any]) -> None:
        if files[0].startswith(slow) and not seen:
            until = time.monotonic() + (30 if moves else 0.5)
            while not out.exists() and time.monotonic() < until:
                threading.Event().wait(0.05)
            seen.append(out.exists())
            if fails:
                raise FileNotFoundError(files[0])
        real()

    send_as(monkeypatch, send)
    quick_merge(*models, out=out, push_to=target)
    assert seen == [moves]
    local = {path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("*") if path.is_file()}
    on_hub = {file: home_hub.read(target, file) for file in home_hub.files(target) if file != ".gitattributes"}
    assert on_hub == local and len(home_hub.commits(target)) == 2
