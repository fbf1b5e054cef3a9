"""Writing safetensors piece by piece: the header first, then every tensor at its own place.

The library's `save_file` wants all tensors in memory at once.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType

from hf_locstitch.checkpoints.header import encode_header


class SafetensorsWriter:
    """A file for `tensors` (name, dtype, shape, bytes) in this order. Threads may write different places at once.

    new: lay the file out; else another process has done so and this one fills in its part. sync: what was written is
    on the disk when it is closed.
    """

    def __init__(
        self,
        path: Path,
        tensors: Iterable[tuple[str, str, tuple[int, ...], int]],
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
        for name, _, _, nbytes in tensors:
            self._starts[name] = at
            at += nbytes
        self._fd = os.open(path, os.O_WRONLY | (os.O_CREAT | os.O_TRUNC if new else 0), 0o644)
        if not new:
            return
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(self._fd, 0, at)  # a full disk shows here, before the work
        else:
            os.ftruncate(self._fd, at)
        self._write(header, 0)

    def write(self, name: str, content: bytes | memoryview, start: int = 0) -> None:
        """Write bytes of a tensor, `start` bytes from its beginning."""
        self._write(content, self._starts[name] + start)

    def _write(self, content: bytes | memoryview, offset: int) -> None:
        view = memoryview(content).cast("B")
        while view:
            count = os.pwrite(self._fd, view, offset)
            view, offset = view[count:], offset + count

    def close(self) -> None:
        if self._sync:
            os.fsync(self._fd)
        os.close(self._fd)

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def sync_file(path: Path) -> None:
    """Until all that was written to it is on the disk."""
    with path.open("r+b") as file:
        os.fsync(file.fileno())
