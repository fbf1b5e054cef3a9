"""Tensors of a local safetensors file as views of the memory-mapped file: nothing is copied until used."""

from __future__ import annotations

import mmap
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType

from hf_locstitch.checkpoints.checkpoint import Checkpoint
from hf_locstitch.checkpoints.following_hash import FollowingHash
from hf_locstitch.checkpoints.header import Header, header_length, parse_header
from hf_locstitch.checkpoints.reader import CheckpointReader

STRETCH = 1 << 22  # bytes; Python holds its lock during madvise
LAGGING = 16  # stretches that the slowest thread may be behind
NOT_HASHED: Mapping[str, FollowingHash] = MappingProxyType({})

COPIED = 1 << 20  # bytes; a smaller private part is copied, as each mapping keeps a file open


class MappedFile:
    """A TensorFile. Views stay valid as long as they are referenced. hashed: what follows as parts are released."""

    def __init__(self, path: Path, hashed: FollowingHash | None = None) -> None:
        self._path, self._hashed = path, hashed
        with path.open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def raw(self, start: int, stop: int) -> memoryview:
        return memoryview(self._map)[start:stop]

    def private(self, start: int, stop: int) -> memoryview:
        if stop - start < COPIED:
            return memoryview(bytearray(self.raw(start, stop)))
        aligned = start - start % mmap.ALLOCATIONGRANULARITY
        with self._path.open("rb") as file:
            pages = mmap.mmap(file.fileno(), stop - aligned, access=mmap.ACCESS_COPY, offset=aligned)
        return memoryview(pages)[start - aligned :]

    def release(self, start: int, stop: int) -> None:
        """Advise the kernel to drop whole stretches once their end is reached, so that resident memory stays small.

        Earlier stretches are dropped again: another thread may have read them since.
        """
        if self._hashed is not None:
            self._hashed.follow(stop, self.raw)
        first, last = start // STRETCH, stop // STRETCH
        if last > first and hasattr(self._map, "madvise"):
            first = max(0, first - LAGGING)
            self._map.madvise(mmap.MADV_DONTNEED, first * STRETCH, (last - first) * STRETCH)

    def close(self) -> None:
        """Nothing more is read. Where there are views left, the file stays open as long as the last of them."""
        with suppress(BufferError):
            self._map.close()


def read_header(path: Path, label: str) -> Header:
    """Of a safetensors file on this machine. Raises CheckpointError, which calls it `label`, and OSError."""
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        return parse_header(prefix + file.read(header_length(prefix, size, label) - 8), size, label)


class MappedCheckpoint(CheckpointReader):
    """paths: where each of the checkpoint's files lies on this machine. hashed: what follows the reading of some."""

    def __init__(
        self, checkpoint: Checkpoint, paths: Mapping[str, Path], hashed: Mapping[str, FollowingHash] = NOT_HASHED
    ) -> None:
        self._mapped = {file: MappedFile(path, hashed.get(file)) for file, path in paths.items()}
        super().__init__(checkpoint, self._mapped)

    def close(self) -> None:
        for file in self._mapped.values():
            file.close()
