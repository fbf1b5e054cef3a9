"""File systems that cannot lock files, and folders that cannot be written to."""

from __future__ import annotations

import errno
import logging
import os
from pathlib import Path
from unittest.mock import Mock
from uuid import uuid4

import pytest
from filelock import FileLock
from helpers.models import State, finetune, random_state, save
from helpers.runs import files_of, quick_merge
from helpers.systems import needs_links
from huggingface_hub import constants

from hf_locstitch.cli.main import main
from hf_locstitch.errors import CheckpointError, OutputError
from hf_locstitch.runtime.files import is_writable
from hf_locstitch.runtime.locks import remove_locked, try_lock
from loopback_hub import LoopbackHub


@pytest.fixture
def models(base: State, tmp_path: Path) -> list[str]:
    return [str(tmp_path / "base"), str(save(tmp_path / "ft", finetune(base, 1)))]


@pytest.mark.parametrize("why", [OSError(errno.ENOLCK, "no locks"), OSError(errno.ENOSYS, ""), NotImplementedError()])
def test_without_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, why: Exception
) -> None:
    monkeypatch.setattr(FileLock, "acquire", Mock(side_effect=why))
    with caplog.at_level(logging.WARNING, "hf_locstitch"):
        lock = try_lock(tmp_path / "work" / "lock")
    assert "cannot lock files" in caplog.text and lock is not None
    lock.release()


def test_a_merge_without_locks(models: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FileLock, "acquire", Mock(side_effect=OSError(errno.EOPNOTSUPP, "no locks")))
    quick_merge(*models, out=tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").exists() and not list(tmp_path.glob(".out*"))


def test_a_lock_that_is_held(tmp_path: Path) -> None:
    first = try_lock(tmp_path / "lock")
    assert first is not None and try_lock(tmp_path / "lock") is None
    first.release()
    second = try_lock(tmp_path / "lock")
    assert second is not None
    (tmp_path / "left").touch()
    remove_locked(tmp_path, second)
    assert not tmp_path.exists()


@pytest.fixture
def nowhere(tmp_path: Path) -> Path:
    """No folder can be made there, by anybody."""
    (tmp_path / "file").write_text("")
    assert not is_writable(tmp_path / "file" / "folder") and is_writable(tmp_path / "new" / "folder")
    return tmp_path / "file" / "folder"


@pytest.fixture
def repos(home_hub: LoopbackHub, tmp_path: Path) -> list[str]:
    base = random_state(0)
    refs = []
    for name, state in {"base": base, "maths": finetune(base, 1)}.items():
        folder = save(tmp_path / "in" / name, state)
        refs.append(f"demo/{uuid4().hex[:8]}-{name}")
        home_hub.add_repo(refs[-1], {file.name: file for file in folder.iterdir()})
    return refs


def test_a_cache_that_cannot_be_written_to(
    repos: list[str], tmp_path: Path, nowhere: Path, hub_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick_merge(*repos, out=tmp_path / "expected", names=["maths"])
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(nowhere / "hub"))
    with pytest.raises(OutputError, match=r"model\.safetensors of .* cannot be written to.*HF_HOME.*--no-cache"):
        quick_merge(*repos, out=tmp_path / "out", names=["maths"])
    assert not list(tmp_path.glob(".out*")) and not (tmp_path / "out").exists()
    quick_merge(*repos, out=tmp_path / "out", names=["maths"], cache=False)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "expected")
    assert not nowhere.exists()


def test_a_full_cache_is_only_read(
    repos: list[str], tmp_path: Path, hub_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick_merge(*repos, out=tmp_path / "expected", names=["maths"])
    monkeypatch.setattr("hf_locstitch.checkpoints.hub.is_writable", lambda _: False)
    before = {path: path.stat().st_mtime_ns for path in hub_cache.rglob("*")}
    quick_merge(*repos, out=tmp_path / "out", names=["maths"])
    assert files_of(tmp_path / "out") == files_of(tmp_path / "expected")
    assert before == {path: path.stat().st_mtime_ns for path in hub_cache.rglob("*")}


@needs_links
def test_a_link_is_checked_where_the_work_is_done(
    models: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("closed", "open"):
        (tmp_path / name / "merged").mkdir(parents=True)
    monkeypatch.setattr("hf_locstitch.engine.preflight.is_writable", lambda folder: folder != tmp_path / "closed")
    (tmp_path / "open" / "out").symlink_to("../closed/merged")
    (tmp_path / "closed" / "out").symlink_to("../open/merged")
    with pytest.raises(OutputError, match="closed cannot be written to"):
        quick_merge(*models, out=tmp_path / "open" / "out")
    quick_merge(*models, out=tmp_path / "closed" / "out")
    assert (tmp_path / "open" / "merged" / "model.safetensors").exists()


@pytest.mark.parametrize("closed", ["ft", "ft/model.safetensors", "ft/config.json"])
def test_an_input_that_cannot_be_read(
    models: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, closed: str
) -> None:
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path / closed and access(path, mode))
    with pytest.raises(CheckpointError, match=f"{closed} cannot be read"):
        quick_merge(*models, out=tmp_path / "out")


def test_a_place_that_cannot_be_written_to(
    models: list[str], home_hub: LoopbackHub, nowhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["merge", "--base", models[0], "--ft", models[1], "--dry-run"]
    with pytest.raises(OutputError, match="cannot be written to"):
        quick_merge(*models, out=nowhere / "out")
    assert main([*command, "--out", str(nowhere / "out")]) == 2
    monkeypatch.setattr(constants, "HF_HOME", str(nowhere))
    with pytest.raises(OutputError, match=r"cannot be written to.*--out.*HF_HOME"):
        quick_merge(*models, push_to="demo/from-nowhere")
    assert main([*command, "--push-to", "demo/from-nowhere"]) == 2
