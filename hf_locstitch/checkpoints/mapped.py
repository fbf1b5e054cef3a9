"""Tensors of a local safetensors file as views of the mapped file: no byte is copied before it is used."""

from __future__ import annotations

import mmap
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch

from hf_locstitch.checkpoints.checkpoint import Checkpoint
from hf_locstitch.checkpoints.header import ITEM_BYTES, TensorInfo

TORCH_DTYPE = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip
# The maps are read-only and so is every use of their views; a filter local to the call is not thread-safe.
warnings.filterwarnings("ignore", message="The given buffer is not writable")

DTYPE_NAME = {dtype: name for name, dtype in TORCH_DTYPE.items()}


class MappedFile:
    """Read-only and safe to share between threads. Views stay valid until `close`."""

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def flat(self, info: TensorInfo, first: int = 0, count: int | None = None) -> torch.Tensor:
        """Elements first … first + count of a tensor, flattened. Returns [count] in the tensor's dtype."""
        dtype = TORCH_DTYPE[info.dtype]
        count = info.numel - first if count is None else count
        if count == 0:
            return torch.empty(0, dtype=dtype)
        offset = info.start + first * dtype.itemsize
        return torch.frombuffer(self._map, dtype=dtype, count=count, offset=offset)

    def raw(self, start: int, stop: int) -> memoryview:
        """Bytes start … stop of the file."""
        return memoryview(self._map)[start:stop]

    def release(self, start: int, stop: int) -> None:
        """Tell the kernel that these bytes will not be needed soon, so that resident memory stays small."""
        page = mmap.PAGESIZE
        first, last = -(-start // page) * page, stop // page * page
        if last > first and hasattr(self._map, "madvise"):
            self._map.madvise(mmap.MADV_DONTNEED, first, last - first)


class MappedCheckpoint:
    """A checkpoint's tensors by name. paths: where each of its files lies on this machine."""

    def __init__(self, checkpoint: Checkpoint, paths: Mapping[str, Path]) -> None:
        self.checkpoint = checkpoint
        self._files = {shard.file: MappedFile(paths[shard.file]) for shard in checkpoint.shards}

    def flat(self, name: str, first: int, count: int) -> torch.Tensor:
        """Elements first … first + count of a tensor, flattened. Returns [count] in the tensor's dtype."""
        shard, info = self.checkpoint.tensors[name]
        return self._files[shard.file].flat(info, first, count)

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
