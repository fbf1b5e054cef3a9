"""Tensors of a local safetensors file as views of the mapped file: no byte is copied before it is used."""

from __future__ import annotations

import mmap
from collections.abc import Mapping
from pathlib import Path

from hf_locstitch.checkpoints.checkpoint import Checkpoint
from hf_locstitch.checkpoints.reader import CheckpointReader

STRETCH = 1 << 22  # bytes; Python holds its lock while the kernel is told
LAGGING = 16  # stretches that the slowest thread may be behind


class MappedFile:
    """A reader.TensorFile; read-only. Views stay valid as long as somebody holds them."""

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def raw(self, start: int, stop: int) -> memoryview:
        return memoryview(self._map)[start:stop]

    def release(self, start: int, stop: int) -> None:
        """Tell the kernel, so that resident memory stays small: of whole stretches, once their end is reached.

        Those before are told of again: another thread may have come back to them.
        """
        first, last = start // STRETCH, stop // STRETCH
        if last > first and hasattr(self._map, "madvise"):
            first = max(0, first - LAGGING)
            self._map.madvise(mmap.MADV_DONTNEED, first * STRETCH, (last - first) * STRETCH)


class MappedCheckpoint(CheckpointReader):
    """paths: where each of the checkpoint's files lies on this machine."""

    def __init__(self, checkpoint: Checkpoint, paths: Mapping[str, Path]) -> None:
        super().__init__(checkpoint, {file: MappedFile(path) for file, path in paths.items()})
