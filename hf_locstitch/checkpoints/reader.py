"""A checkpoint's tensors by name, wherever its files lie: mapped from this machine, or still on their way."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch

from hf_locstitch.checkpoints.checkpoint import Checkpoint
from hf_locstitch.checkpoints.header import ITEM_BYTES, TensorInfo

TORCH_DTYPE = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip


class TensorFile(Protocol):
    """One safetensors file. Safe to share between threads."""

    def raw(self, start: int, stop: int) -> memoryview:
        """Bytes start … stop of the file."""
        ...

    def release(self, start: int, stop: int) -> None:
        """These bytes will not be needed soon."""
        ...


def flat(file: TensorFile, info: TensorInfo, first: int, count: int) -> torch.Tensor:
    """Elements first … first + count of a tensor, flattened. Returns [count] in the tensor's dtype."""
    dtype = TORCH_DTYPE[info.dtype]
    if count == 0:
        return torch.empty(0, dtype=dtype)
    start = info.start + first * dtype.itemsize
    return torch.frombuffer(file.raw(start, start + count * dtype.itemsize), dtype=dtype)


class CheckpointReader:
    """files: the opened ones; a checkpoint may have others that are never read."""

    def __init__(self, checkpoint: Checkpoint, files: Mapping[str, TensorFile]) -> None:
        self.checkpoint = checkpoint
        self._files = files

    def flat(self, name: str, first: int, count: int) -> torch.Tensor:
        """Elements first … first + count of a tensor, flattened. Returns [count] in the tensor's dtype."""
        shard, info = self.checkpoint.tensors[name]
        return flat(self._files[shard.file], info, first, count)

    def raw(self, name: str, first: int, stop: int) -> memoryview:
        """Bytes first … stop of a tensor, of whatever dtype."""
        shard, info = self.checkpoint.tensors[name]
        return self._files[shard.file].raw(info.start + first, info.start + stop)

    def release(self, name: str, first: int, count: int) -> None:
        """These elements will not be needed soon."""
        shard, info = self.checkpoint.tensors[name]
        item = ITEM_BYTES[info.dtype]
        self._files[shard.file].release(info.start + first * item, info.start + (first + count) * item)

    def dtype(self, name: str) -> torch.dtype:
        return TORCH_DTYPE[self.checkpoint.info(name).dtype]

    def where(self, name: str) -> str:
        """For messages: the file that holds a tensor."""
        return f"{self.checkpoint.label}/{self.checkpoint.tensors[name][0].file}"
