"""Writing safetensors incrementally: the header first, then every tensor at its own offset.

The library's `save_file` needs all tensors in memory at once.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from hf_locstitch.checkpoints.header import TensorSpec, encode_header
from hf_locstitch.runtime.positioned_io import PositionedFile

BLOCK = 1 << 20  # bytes hashed at once


class SafetensorsWriter:
    """A file for these tensors in this order. Threads may write different places at once.

    Nothing is written twice.

    new: create the file; else another process has done so and this one fills in its part. sync: closing waits until
    the content is on the disk.
    """

    def __init__(
        self,
        path: Path,
        tensors: Iterable[TensorSpec],
        metadata: Mapping[str, str],
        *,
        new: bool = True,
        sync: bool = True,
    ) -> None:
        self._sync = sync
        tensors = list(tensors)
        header = encode_header(tensors, metadata)
        self._starts: dict[str, int] = {}
        at = len(header)
        for spec in tensors:
            self._starts[spec.name] = at
            at += spec.nbytes
        self._size = at
        self._reached = len(header)  # everything before it is written,
        self._beyond: dict[int, int] = {}  # and these ranges beyond it: start -> end
        self._moved = threading.Condition()
        self._over = False
        self._file = PositionedFile.open(path, create=new, truncate=new, mode=0o644)
        if new:
            self._file.reserve(at)  # a full disk fails here, before the work
            self._write(header, 0)

    def write(self, name: str, content: bytes | memoryview, start: int = 0) -> None:
        """Write bytes of a tensor, `start` bytes from its beginning."""
        self._write(content, self._starts[name] + start)

    def _write(self, content: bytes | memoryview, offset: int) -> None:
        view = memoryview(content).cast("B")
        if not view:
            return
        self._file.write(view, offset)
        with self._moved:
            self._beyond[offset] = offset + len(view)
            while self._reached in self._beyond:
                self._reached = self._beyond.pop(self._reached)
            self._moved.notify_all()

    @contextmanager
    def hashing(self) -> Iterator[Future[str]]:
        """Hash the file while it is written. Yields the future SHA-256, available once everything is written."""
        with ThreadPoolExecutor(1) as pool:
            try:
                yield pool.submit(self._sha256)
            finally:
                with self._moved:
                    self._over = True
                    self._moved.notify_all()

    def _sha256(self) -> str:
        digest, at, buffer = hashlib.sha256(), 0, memoryview(bytearray(BLOCK))
        while at < self._size:
            reached = self._wait_beyond(at)
            while at < reached:
                count = self._file.read_into(buffer[: reached - at], at)
                if not count:
                    raise EOFError(f"the file ends at byte {at} of {self._size}: another process has truncated it")
                digest.update(buffer[:count])
                self._file.begin_write_back(at, count)
                at += count
        return digest.hexdigest()

    def _wait_beyond(self, at: int) -> int:
        """Up to where the file is completely written, once that is beyond `at`."""
        with self._moved:
            self._moved.wait_for(lambda: self._reached > at or self._over)
            if self._reached == at:
                raise EOFError(f"only {at} of {self._size} bytes were written")
            return self._reached

    def close(self) -> None:
        if self._sync:
            self._file.sync()
        self._file.close()

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
