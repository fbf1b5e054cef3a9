"""Files that many threads read and write at once: by the system's own calls, and without."""

from __future__ import annotations

import os
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from hf_locstitch.runtime import positioned_io
from hf_locstitch.runtime.positioned_io import PositionedFile

BLOCK = 1000
WAYS = {"at-offsets": True, "by-seeking": False} if positioned_io.AT_OFFSETS else {"by-seeking": False}


@pytest.fixture(params=WAYS.values(), ids=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(positioned_io, "AT_OFFSETS", request.param)
    monkeypatch.setattr(positioned_io, "MOST", 300)  # so that a block takes several calls


@pytest.mark.usefixtures("way")
def test_threads_with_duplicates_read_what_others_have_written(tmp_path: Path) -> None:
    """Duplicates share the position in the file: without a lock, blocks come from other places."""
    due = [random.Random(number).randbytes(BLOCK) for number in range(64)]
    first = PositionedFile.open(tmp_path / "file")
    opened = [first, first.duplicate(), first.duplicate(), first.duplicate()]

    def pass_on(number: int) -> bool:
        opened[number % 4].write(due[number], number * BLOCK)
        return all(opened[i % 4].read(BLOCK, number * BLOCK) == due[number] for i in range(20))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(pass_on, range(64)))
    for file in opened:
        file.close()
    assert (tmp_path / "file").read_bytes() == b"".join(due)


@pytest.mark.usefixtures("way")
def test_reading_ends_where_the_file_does(tmp_path: Path) -> None:
    file = PositionedFile.open(tmp_path / "file")
    file.write(b"line\nline\r\n", 5)  # line ends are bytes as others
    assert file.read(100, 0) == b"\0\0\0\0\0line\nline\r\n" and file.size == 16
    assert file.read(100, 14) == b"\r\n" and file.read(10, 100) == b"" == file.read(0, 0)
    buffer = bytearray(b"????????")
    assert file.read_into(memoryview(buffer)[:4], 5) == 4 and buffer == b"line????"
    file.close()
    with pytest.raises(FileNotFoundError):
        PositionedFile.open(tmp_path / "other", create=False)
    PositionedFile.open(tmp_path / "file", truncate=True).close()
    assert (tmp_path / "file").read_bytes() == b""


@pytest.mark.parametrize("absent", [(), ("posix_fallocate", "posix_fadvise")])
def test_space_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, absent: tuple[str, ...]) -> None:
    for name in absent:
        monkeypatch.delattr(os, name, raising=False)
    file = PositionedFile.open(tmp_path / "file")
    file.reserve(1 << 20)
    assert file.size == 1 << 20
    file.write(b"x" * (1 << 20), 0)
    file.begin_write_back(0, 1 << 20)
    file.sync()
    freed = file.punch_hole(0, 1 << 19)
    due = b"\0" if freed else b"x"  # not every system can
    assert file.read(1 << 20, 0) == due * (1 << 19) + b"x" * (1 << 19)
    monkeypatch.setattr("sys.platform", "win32")
    assert file.punch_hole(0, 1 << 20) is False
    file.close()


def test_closed_twice_it_closes_no_other_file(tmp_path: Path) -> None:
    """A number that is free is the next file's."""
    first = PositionedFile.open(tmp_path / "first")
    first.close()
    second = PositionedFile.open(tmp_path / "second")
    first.close()
    second.write(b"there", 0)
    second.close()
    assert (tmp_path / "second").read_bytes() == b"there"
