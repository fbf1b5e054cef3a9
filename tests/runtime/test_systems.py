"""One system has what another lacks: what few modules may know of, and what is written is the same bytes on all."""

from __future__ import annotations

import os
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from hf_locstitch.checkpoints.known_hashes import FileState
from hf_locstitch.runtime import files
from hf_locstitch.runtime.files import link, write_text

PACKAGE = Path(__file__).parents[2] / "hf_locstitch"
LINES = {
    f"{path.relative_to(PACKAGE).as_posix()}:{number}": line
    for path in sorted(PACKAGE.rglob("*.py"))
    for number, line in enumerate(path.read_text("utf-8").splitlines(), start=1)
}
ONLY_IN = {
    "runtime/positioned_io.py": {"preadv", "pwrite", "posix_fallocate", "posix_fadvise", "POSIX_FADV_DONTNEED"},
    "runtime/chunks.py": {"sched_getaffinity"},
    "runtime/own_cache.py": {"getuid"},
    "runtime/bus_error.py": {"SIGBUS"},
    "ui/worker.py": {"pthread_kill", "resource"},
}
POSIX = re.compile(
    r"\b(?:os|signal)\.(preadv?|pwritev?|posix_\w+|POSIX_\w+|sched_\w+|fork\w*|[gs]ete?[ug]id|statvfs|f?chown|"
    r"fchmod|mk(?:fifo|nod)|nice|getloadavg|sysconf|uname|killpg|[gs]et(?:sid|pgid|pgrp)|wait\w*|[gs]et_blocking|sendfile|"
    r"copy_file_range|memfd_create|lockf|O_DIRECTORY|O_NOFOLLOW|O_CLOEXEC|SEEK_HOLE|SEEK_DATA|pthread_\w+|alarm|setitimer|"
    r"pause|SIG(?:HUP|KILL|BUS|USR1|USR2|CHLD|PIPE|QUIT|ALRM|STOP|CONT))\b"
)
MODULES = re.compile(r"^\s*(?:import|from) (fcntl|resource|pwd|grp|termios|pty|tty|msvcrt|winreg|syslog)\b")
TEXT_MODE = re.compile(r"open\((?:\w+, )?\"([rwax+t]+)\"")


def test_few_modules_use_what_not_every_system_has() -> None:
    found: dict[str, set[str]] = {}
    for where, line in LINES.items():
        for name in (*POSIX.findall(line), *MODULES.findall(line)):
            found.setdefault(where.partition(":")[0], set()).add(name)
    assert found == ONLY_IN


def test_text_has_one_encoding_and_one_line_end() -> None:
    for where, line in LINES.items():
        assert ".read_text()" not in line, f"{where} reads text in the encoding of the system"
        assert ".write_text(" not in line or where.startswith("runtime/files.py"), f"{where}: use files.write_text"
        for mode in TEXT_MODE.findall(line):
            assert "encoding=" in line, f"{where} has the encoding of the system"
            assert mode == "r" or "newline=" in line, f"{where} has the line ends of the system"


def test_text_is_the_same_bytes_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.linesep", "\r\n")  # what Python writes for "\n" unless it is told
    write_text(tmp_path / "text", "τ\nß\r\n")
    assert (tmp_path / "text").read_bytes() == "τ\nß\r\n".encode()


@pytest.mark.parametrize(("refused", "hard"), [((), True), (("symlink",), True), (("symlink", "link"), True),
                                               (("symlink",), False)])  # fmt: skip
def test_a_link_or_what_stands_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: tuple[str, ...], hard: bool
) -> None:
    """A hard link where it changes nothing of a file's state: else an input would seem to have been written to."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "abc").write_bytes(b"content")
    before = FileState.of(tmp_path / "blobs" / "abc")

    def refuse(*_: object, **__: object) -> None:
        raise OSError(22, "A required privilege is not held by the client")

    monkeypatch.setattr(files, "HARD_LINKS", hard)
    for name in refused:
        monkeypatch.setattr(os, name, refuse)
    linked = "symlink" not in refused or (hard and "link" not in refused)
    for number, target in enumerate(("blobs/abc", tmp_path / "blobs" / "abc")):
        link(tmp_path / f"file{number}", target)
        assert (tmp_path / f"file{number}").read_bytes() == b"content"
        assert (tmp_path / f"file{number}").samefile(tmp_path / "blobs" / "abc") == linked
        with pytest.raises(FileExistsError):
            link(tmp_path / f"file{number}", target)
    if not hard:
        assert FileState.of(tmp_path / "blobs" / "abc") == before


def test_a_hard_link_does_not_change_the_state_of_a_file_on_windows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There the file's own time is that of its creation, whatever a version of Python calls its ctime."""
    (tmp_path / "file").write_bytes(b"content")
    found = os.stat(tmp_path / "file")
    state = SimpleNamespace(**{name: getattr(found, name) for name in dir(found) if name.startswith("st_")})
    state.st_birthtime_ns = 5
    monkeypatch.setattr(Path, "stat", lambda *_, **__: state)
    before = FileState.of(tmp_path / "file")
    state.st_ctime_ns += 1
    assert FileState.of(tmp_path / "file") == before


def test_half_a_copy_is_never_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process would read it."""
    (tmp_path / "file").write_bytes(b"content")

    def half(_: Path, copy: Path) -> None:
        copy.write_bytes(b"cont")
        raise OSError(28, "No space left on device")

    def refuse(*_: object, **__: object) -> None:
        raise OSError(22, "A required privilege is not held by the client")

    monkeypatch.setattr(os, "symlink", refuse)
    monkeypatch.setattr(files, "HARD_LINKS", False)
    monkeypatch.setattr("shutil.copyfile", half)
    with pytest.raises(OSError, match="No space"):
        link(tmp_path / "copy", tmp_path / "file")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
