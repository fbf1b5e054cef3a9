"""A checkpoint's tensors by name, wherever its files are: mapped from disk, or still being downloaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_locstitch.checkpoints.checkpoint import Checkpoint
from hf_locstitch.checkpoints.header import TensorInfo
from hf_locstitch.checkpoints.tensor_file import TensorFile
from hf_locstitch.runtime.dtypes import DTYPE, ITEM_BYTES, Values

if TYPE_CHECKING:
    import torch


def read_values(file: TensorFile, info: TensorInfo, first: int, count: int) -> Values:
    """Elements first … first + count of a tensor, flattened. Returns [count] in the tensor's dtype, read-only."""
    dtype = DTYPE[info.dtype]
    start = info.start + first * dtype.itemsize
    raw = file.raw(start, start + count * dtype.itemsize) if count else b""
    # Always read-only, or every compiled loop would be compiled twice.
    return np.frombuffer(memoryview(raw).toreadonly(), dtype=dtype)


class CheckpointReader:
    """files: those opened; a checkpoint may have others that are never read."""

    def __init__(self, checkpoint: Checkpoint, files: Mapping[str, TensorFile]) -> None:
        self.checkpoint = checkpoint
        self._files = {shard.file: shard.opened(files) for shard in checkpoint.shards if shard.file in files}

    def values(self, name: str, first: int, count: int) -> Values:
        """Elements first … first + count of a tensor, flattened. Returns [count] in the tensor's dtype, read-only."""
        shard, info = self.checkpoint.tensors[name]
        return read_values(self._files[shard.file], info, first, count)

    def flat(self, name: str, first: int, count: int) -> torch.Tensor:
        """The same as a torch tensor of its own: models may write into their weights, and nobody else sees it."""
        from hf_locstitch.checkpoints.tensors import as_tensor

        shard, info = self.checkpoint.tensors[name]
        dtype = DTYPE[info.dtype]
        start = info.start + first * dtype.itemsize
        raw = self._files[shard.file].private(start, start + count * dtype.itemsize) if count else b""
        return as_tensor(np.frombuffer(raw, dtype=dtype))

    def raw(self, name: str, first: int, stop: int) -> memoryview:
        """Bytes first … stop of a tensor, of whatever dtype."""
        shard, info = self.checkpoint.tensors[name]
        return self._files[shard.file].raw(info.start + first, info.start + stop)

    def release(self, name: str, first: int, count: int) -> None:
        """These elements will not be needed soon."""
        shard, info = self.checkpoint.tensors[name]
        item = ITEM_BYTES[info.dtype]
        self._files[shard.file].release(info.start + first * item, info.start + (first + count) * item)

    def close(self) -> None:
        """Nothing more is read: close the files that this has opened itself."""

    def dtype(self, name: str) -> np.dtype[Any]:
        return DTYPE[self.checkpoint.info(name).dtype]

    def where(self, name: str) -> str:
        """For messages: the file that holds a tensor."""
        return f"{self.checkpoint.label}/{self.checkpoint.tensors[name][0].file}"
