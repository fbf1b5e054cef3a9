"""Inputs that somebody writes to while they are merged."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.models import finetune, random_state, save
from helpers.runs import quick_localize, quick_merge
from helpers.systems import needs_open_files_to_move

from hf_locstitch.checkpoints.folder import FolderSource
from hf_locstitch.engine.run import Run
from hf_locstitch.errors import CheckpointError


def rewritten(path: Path) -> None:
    """The same size, another time. In place: a file cut to nothing first would end a process that has it mapped."""
    last = path.read_bytes()[-1]
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last ^ 1]))
    os.utime(path, ns=(1, 1))


def rewritten_unseen(path: Path) -> None:
    """The same size and time."""
    state = path.stat()
    rewritten(path)
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))


def replaced(path: Path) -> None:
    """Another file of the same size and time."""
    state = path.stat()
    new = path.with_name("new")
    new.write_bytes(path.read_bytes())
    os.utime(new, ns=(state.st_atime_ns, state.st_mtime_ns))
    new.replace(path)


def grown(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"x")


@pytest.mark.parametrize(
    "change", [rewritten, rewritten_unseen, pytest.param(replaced, marks=needs_open_files_to_move), grown]
)
@pytest.mark.parametrize("name", ["base", "ft"])
@pytest.mark.parametrize("method", ["locstitch", "average", "localize"])
def test_an_input_that_changes(
    method: str, name: str, change: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the masks are there and the shards are not: no hash of it could be told."""
    base = random_state(0)
    save(tmp_path / "base", base)
    save(tmp_path / "ft", finetune(base, 1))
    survey = Run._survey

    def changing(self, *args):  # type: ignore[no-untyped-def]
        change(tmp_path / name / "model.safetensors")
        return survey(self, *args)

    monkeypatch.setattr(Run, "_survey", changing)
    with pytest.raises(CheckpointError, match=rf"{name}/model.safetensors changed while it was read"):
        if method == "localize":
            quick_localize(tmp_path / "base", tmp_path / "ft", out=tmp_path / "out")
        else:
            quick_merge(tmp_path / "base", [tmp_path / "ft"], out=tmp_path / "out", method=method)
    assert not list(tmp_path.glob("*out*"))


@pytest.mark.parametrize("change", [rewritten, rewritten_unseen, replaced, grown])
def test_what_was_begun_with_other_weights_is_not_gone_on_with(change: Callable[[Path], None], tmp_path: Path) -> None:
    """The folder of an interrupted merge is found by what its inputs were."""
    folder = save(tmp_path / "model", random_state(0))
    before = FolderSource(folder).identity
    assert FolderSource(folder).identity == before
    change(folder / "model.safetensors")
    assert FolderSource(folder).identity != before


@pytest.mark.skipif(sys.platform != "linux", reason="how the system tells of it is Linux's")
def test_a_file_cut_short_while_it_is_mapped(tmp_path: Path) -> None:
    """The process ends with a word, and not by the signal alone."""
    program = """
import os, sys
from pathlib import Path
from hf_locstitch.checkpoints.mapped import MappedFile
from hf_locstitch.runtime.bus_error import explain_bus_errors
explain_bus_errors()
path = Path(sys.argv[1])
path.write_bytes(bytes(100_000))
file = MappedFile(path)
os.truncate(path, 10)
print(sum(file.raw(50_000, 50_001)))
"""
    done = subprocess.run([sys.executable, "-c", program, tmp_path / "file"], capture_output=True, text=True)
    assert done.returncode == 1 and "cut short by another program" in done.stderr and not done.stdout
