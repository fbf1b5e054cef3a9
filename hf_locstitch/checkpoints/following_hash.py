"""The SHA-256 of one file, taken behind those who read it, so that each byte leaves the disk once."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable
from pathlib import Path

from hf_locstitch.checkpoints.known_hashes import FileState, recall, remember
from hf_locstitch.checkpoints.source import HASHED_AT_ONCE

BEHIND = 1 << 20  # bytes hashed at once, beside readers
View = Callable[[int, int], memoryview]  # bytes start … stop of the file, as it is mapped


class FollowingHash:
    """Threads that have read a part say so; the one that finds nobody at work hashes up to there.

    followed: whether any thread has. size: of the file, bytes. known: the hash, once it is, or if it is remembered.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._state, self._since = path, FileState.of(path), time.time_ns()
        self.known = recall(self._state)
        self._digest, self._buffer = hashlib.sha256(), bytearray()
        self.size = self._state.size
        self._at = self._due = 0  # bytes hashed, and to be hashed
        self._busy = self.followed = False
        self._moved = threading.Condition()

    def follow(self, stop: int, view: View) -> None:
        """Everything before `stop` has been read, or is being read. Returns at once if another thread is at work."""
        self.followed = True
        self._reach(stop, lambda at: view(at, min(at + BEHIND, self._due)))

    def advance(self, piece: int = HASHED_AT_ONCE) -> bool:
        """Hash some more bytes of the file, once nobody is at work. Returns whether any are left."""
        with self._moved:
            self._moved.wait_for(lambda: not self._busy)
        self._reach(self._at + piece, self._read)
        return self.known is None and self._at < self.size

    def result(self) -> str:
        """Of the whole file, the rest of which is hashed now."""
        while self.advance(BEHIND):
            pass
        with self._moved:
            if self.known is None:
                self.known, self._buffer = self._digest.hexdigest(), bytearray()
                remember(self._state, self._since, self.known)
            return self.known

    def _reach(self, stop: int, read: Callable[[int], memoryview]) -> None:
        with self._moved:
            self._due = max(self._due, min(stop, self.size))
            if self._busy or self.known is not None or self._at >= self._due:
                return
            self._busy = True
        try:
            while self._at < self._due:
                block = read(self._at)
                self._digest.update(block)
                # A file cut short has the hash of what is left; that it changed is found by its size.
                self._at = self._at + len(block) if len(block) else self.size
        finally:
            with self._moved:
                self._busy = False
                self._moved.notify_all()

    def _read(self, at: int) -> memoryview:
        wanted = min(HASHED_AT_ONCE, self._due - at)
        if len(self._buffer) < wanted:
            self._buffer = bytearray(wanted)
        with self._path.open("rb", buffering=0) as file:
            file.seek(at)
            return memoryview(self._buffer)[: file.readinto(memoryview(self._buffer)[:wanted])]
