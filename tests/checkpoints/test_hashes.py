"""Hashes of inputs: behind those who read, in any order; remembered as long as the file is the same, and no longer."""

from __future__ import annotations

import hashlib
import os
import random
import threading
import time
import tracemalloc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
from helpers.systems import needs_permissions

from hf_locstitch.checkpoints import following_hash, known_hashes
from hf_locstitch.checkpoints.following_hash import FollowingHash
from hf_locstitch.checkpoints.mapped import MappedFile
from hf_locstitch.checkpoints.source import file_sha256

SIZE = 3_000_001


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "hf-locstitch" / "hashes"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(random.Random(0).randbytes(SIZE))
    return path


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if all files had been there for long."""
    monkeypatch.setattr(known_hashes, "SETTLED", 0)


def true_hash(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


@pytest.mark.parametrize("seed", range(5))
def test_threads_that_read_in_any_order(file: Path, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(following_hash, "BEHIND", 10_007)
    hashed = FollowingHash(file)
    mapped = MappedFile(file, hashed)
    starts = [*range(0, SIZE, 50_000)]
    random.Random(seed).shuffle(starts)
    with ThreadPoolExecutor(4) as threads:
        for start in starts[: len(starts) if seed else 20]:
            threads.submit(mapped.release, start, min(start + 50_000, SIZE))
        early = threads.submit(hashed.result)
    assert early.result() == hashed.result() == true_hash(file)


def test_what_was_read_is_not_read_again(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed = FollowingHash(file)
    monkeypatch.setattr(FollowingHash, "_read", lambda *_: pytest.fail("read"))
    MappedFile(file, hashed).release(0, SIZE)
    assert hashed.result() == true_hash(file)


def test_a_thread_at_work_is_not_waited_for(file: Path) -> None:
    hashed, begun, go_on = FollowingHash(file), threading.Event(), threading.Event()
    content = memoryview(file.read_bytes())

    def slow(start: int, stop: int) -> memoryview:
        begun.set()
        assert go_on.wait(10)
        return content[start:stop]

    with ThreadPoolExecutor(1) as thread:
        thread.submit(hashed.follow, 1_000, slow)
        assert begun.wait(10)
        hashed.follow(2_000, lambda start, stop: pytest.fail("two at once"))
        go_on.set()
    assert hashed.result() == true_hash(file)


def test_a_file_is_hashed_once(file: Path, home: Path, settled: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert FollowingHash(file).known is None
    digest = FollowingHash(file).result()
    assert digest == true_hash(file) and len([*home.iterdir()]) == 1
    monkeypatch.setattr(FollowingHash, "_read", lambda *_: pytest.fail("hashed again"))
    link = file.with_name("link")
    with suppress(OSError):  # not every user may
        link.symlink_to(file)
        assert FollowingHash(link).result() == digest
    assert FollowingHash(file).result() == digest


def rewritten(file: Path) -> None:
    state = file.stat()
    file.write_bytes(file.read_bytes()[:-1] + b"!")
    os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))


def replaced(file: Path) -> None:
    state, new = file.stat(), file.with_name("new")
    new.write_bytes(file.read_bytes()[:-1] + b"!")
    os.utime(new, ns=(state.st_atime_ns, state.st_mtime_ns))
    new.replace(file)


def grown(file: Path) -> None:
    with file.open("ab") as handle:
        handle.write(b"!")


@pytest.mark.parametrize("change", [rewritten, replaced, grown])
def test_a_changed_file_is_hashed_again(file: Path, change: Callable[[Path], None], settled: None) -> None:
    """Also where its size and the time of its content are the same."""
    before = FollowingHash(file).result()
    time.sleep(0.02)  # a tick of the file system's clock
    change(file)
    assert FollowingHash(file).result() == true_hash(file) != before


def test_what_was_just_written_is_not_remembered(file: Path, home: Path) -> None:
    FollowingHash(file).result()
    assert not [*home.glob("*")]


def test_what_changes_while_it_is_hashed_is_not_remembered(file: Path, home: Path, settled: None) -> None:
    hashed = FollowingHash(file)
    hashed.follow(1_000, MappedFile(file).raw)
    time.sleep(0.02)
    rewritten(file)
    hashed.result()
    assert not [*home.glob("*")]


@pytest.mark.parametrize(
    "damage",
    [
        lambda record: record.write_bytes(b""),
        lambda record: record.write_bytes(b"\xff" * 100),
        lambda record: record.write_bytes(record.read_bytes()[:-9]),
        lambda record: record.write_bytes(record.read_bytes().replace(b"a", b"b")),
        lambda record: record.write_text('00000000 ["x"]\n'),
        lambda record: (record.unlink(), record.mkdir()),
        pytest.param(lambda record: record.parent.chmod(0o777), marks=needs_permissions),
    ],
    ids=["empty", "garbage", "cut", "flipped", "foreign", "folder", "shared"],
)
def test_a_damaged_memory_is_not_believed(
    file: Path, home: Path, settled: None, damage: Callable[[Path], object]
) -> None:
    FollowingHash(file).result()
    damage(next(home.iterdir()))
    assert FollowingHash(file).known is None and FollowingHash(file).result() == true_hash(file)


def test_no_place_to_remember(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settled: None) -> None:
    (tmp_path / "file-in-the-way").write_text("")
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "file-in-the-way"))
    assert FollowingHash(file).result() == true_hash(file)


def test_a_small_file_takes_little_memory(tmp_path: Path) -> None:
    """A merge hashes hundreds of them: fresh memory of a large file's size for each took most of its time."""
    path = tmp_path / "small"
    for content in (b"", b"x" * 1000):
        path.write_bytes(content)
        tracemalloc.start()
        try:
            assert file_sha256(path) == hashlib.sha256(content).hexdigest()
            assert tracemalloc.get_traced_memory()[1] < 1 << 20
        finally:
            tracemalloc.stop()
