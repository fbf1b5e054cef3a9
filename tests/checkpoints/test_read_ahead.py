"""Ranges over several connections, delivered in order whatever order they come in."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_locstitch.checkpoints import read_ahead
from hf_locstitch.checkpoints.read_ahead import ReadAhead, Slots

PIECE = 10


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read_ahead, "SMALLEST", PIECE)
    monkeypatch.setattr(read_ahead, "LARGEST", PIECE)
    monkeypatch.setattr(read_ahead, "AT_ONCE", 3)


def content(file: str, size: int) -> bytes:
    return bytes((ord(file[0]) * 31 + 7 * i) % 256 for i in range(size))


class Server:
    """Files, in blocks of three bytes; what was asked for, and how much of it at a time."""

    def __init__(self, sizes: Mapping[str, int], wait: float = 0.0) -> None:
        self.files = {file: content(file, size) for file, size in sizes.items()}
        self.asked: list[tuple[str, int, int]] = []
        self.wait, self.now, self.most = wait, 0, 0
        self.failing: set[tuple[str, int]] = set()
        self.whole: set[str] = set()
        self._lock = threading.Lock()

    def fetch(self, file: str, start: int, stop: int) -> Iterator[bytes]:
        with self._lock:
            self.asked.append((file, start, stop))
            self.now += 1
            self.most = max(self.most, self.now)
        try:
            time.sleep(self.wait)
            if (file, start) in self.failing:
                raise ConnectionError(f"{file} at {start}")
            for at in range(start, stop, 3):
                yield self.files[file][at : min(at + 3, stop)]
        finally:
            with self._lock:
                self.now -= 1

    def ahead(self, begin: Mapping[str, int] | None = None) -> ReadAhead:
        sizes = {file: len(whole) for file, whole in self.files.items()}
        return ReadAhead(self.fetch, sizes, lambda file: (begin or {}).get(file, 0), lambda file: file in self.whole)


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 95), min_size=1, max_size=5),
    starts=st.lists(st.integers(0, 95), min_size=5, max_size=5),
    expected=st.lists(st.integers(0, 95), min_size=5, max_size=5),
    whole=st.sets(st.integers(0, 4)),
)
def test_every_byte_in_order(sizes: list[int], starts: list[int], expected: list[int], whole: set[int]) -> None:
    """Also where a file is read from another byte than was expected, or only comes as a whole."""
    names = [f"{chr(97 + i)}.bin" for i in range(len(sizes))]
    server = Server(dict(zip(names, sizes, strict=True)))
    server.whole = {names[i] for i in whole if i < len(names)}
    with server.ahead(dict(zip(names, expected, strict=False))) as ahead:
        for name, size, start in zip(names, sizes, starts, strict=False):
            at = min(start, size)
            assert b"".join(ahead.read(name, at)) == server.files[name][at:]


def test_no_byte_is_asked_for_twice() -> None:
    server = Server({"a": 95, "b": 40, "c": 7})
    with server.ahead() as ahead:
        for file in server.files:
            assert b"".join(ahead.read(file, 0)) == server.files[file]
    assert sum(stop - start for _, start, stop in server.asked) == 95 + 40 + 7


def test_the_last_pieces_are_the_smallest_and_none_is_a_sliver(monkeypatch: pytest.MonkeyPatch) -> None:
    """All connections end at about the same time; a sliver takes as long to ask for as a piece."""
    monkeypatch.setattr(read_ahead, "LARGEST", 30)
    server = Server({"a": 901, "b": 601})
    with server.ahead() as ahead:
        for file in server.files:
            assert b"".join(ahead.read(file, 0)) == server.files[file]
    pieces = [stop - start for _, start, stop in sorted(server.asked)]
    assert max(pieces) == pieces[0] == 30
    assert min(pieces) >= 8 and pieces[-1] <= PIECE
    assert pieces[-1] < pieces[-12] < pieces[0]


def test_connections_cross_the_borders_of_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read_ahead, "SLOTS", Slots(16))
    server = Server({name: 10 for name in "abcdefgh"}, wait=0.1)
    began = time.monotonic()
    with server.ahead() as ahead:
        for file in server.files:
            assert b"".join(ahead.read(file, 0)) == server.files[file]
    assert server.most >= 4 and time.monotonic() - began < 0.1 * len(server.files)


def test_what_came_before_an_error_is_delivered() -> None:
    server = Server({"a": 50})
    server.failing = {("a", 20)}
    heard = b""
    with server.ahead() as ahead, pytest.raises(ConnectionError, match="a at 20"):
        for block in ahead.read("a", 0):
            heard += block
    assert heard == server.files["a"][:20]


def test_a_reader_that_waits_is_served_before_all_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Though everything that may be held is held by repos whose readers have stopped for now."""
    monkeypatch.setattr(read_ahead, "SLOTS", Slots(2))
    greedy, other = Server({"a": 95}), Server({"b": 30})
    with greedy.ahead() as first, other.ahead() as second:
        stopped = first.read("a", 0)
        next(stopped)
        time.sleep(0.1)
        assert b"".join(second.read("b", 0)) == other.files["b"]
        assert len(greedy.asked) <= 4
        assert greedy.files["a"].endswith(b"".join(stopped))


def test_slots_grow_again_after_a_server_turned_connections_away() -> None:
    slots = Slots(4)
    for _ in range(9):
        slots.turned_away()
    slots.take(at_once=lambda: False)  # one is always had
    taken = threading.Event()
    thread = threading.Thread(target=lambda: (slots.take(at_once=lambda: False), taken.set()), daemon=True)
    thread.start()
    assert not taken.wait(0.05)
    for _ in range(4):
        slots.served()
    assert taken.wait(5)


def test_no_thread_is_left() -> None:
    server = Server({"a": 95, "b": 40})
    with server.ahead() as ahead:
        for file in server.files:
            assert b"".join(ahead.read(file, 0)) == server.files[file]
        time.sleep(0.05)  # all wait for more to ask for
    for thread in ahead._threads:
        thread.join(5)
        assert not thread.is_alive()
