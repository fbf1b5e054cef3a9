"""Weights in FP8 with a scale for each block, as DeepSeek-V3 has them: read as the bfloat16 tensors they stand for.

A shard is shown as the file that it would be if all its weights were bfloat16: its header, and where in it what lies.
Bytes of it are computed when they are asked for: value = float32(FP8) · scale of its block, rounded to bfloat16.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from hf_locstitch.checkpoints.checkpoint import QUANTIZATION, Checkpoint, Config, Shard
from hf_locstitch.checkpoints.header import TensorInfo
from hf_locstitch.checkpoints.tensor_file import TensorFile
from hf_locstitch.errors import CheckpointError, NonFiniteError
from hf_locstitch.runtime.dtypes import DTYPE, ITEM_BYTES
from hf_locstitch.runtime.human import more

QUANTIZED, DEQUANTIZED = "F8_E4M3", "BF16"
SUFFIX = "_scale_inv"  # of the tensor with a weight's scales, after the weight's own name
SCALES = frozenset({"F32", "BF16", "F16"})
FP8_VALUES = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)

Block = tuple[int, int]  # rows, columns


@dataclass(frozen=True)
class Scales:
    """Where the scales of a weight [..., rows, columns] lie: [..., blocks of rows, blocks of columns]."""

    file: str
    info: TensorInfo
    block: Block


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as its file has it. scales: of one that is quantized."""

    info: TensorInfo
    scales: Scales | None

    def bytes_of(self, first: int, last: int) -> tuple[int, int]:
        """Where its elements first … last lie in its file."""
        item = ITEM_BYTES[self.info.dtype]
        return self.info.start + first * item, self.info.start + last * item


@dataclass(frozen=True)
class DequantizedShard(Shard):
    """header: as if the weights were bfloat16. tensors: what is stored, in the header's order."""

    tensors: tuple[StoredTensor, ...]

    def stored(self, start: int, stop: int) -> list[tuple[str, int, int]]:
        tensor, first, last = self.find(start, stop)
        own = (self.file, *tensor.bytes_of(first, last))
        return (
            [own]
            if tensor.scales is None
            else [own, (tensor.scales.file, tensor.scales.info.start, tensor.scales.info.stop)]
        )

    def opened(self, files: Mapping[str, TensorFile]) -> TensorFile:
        return DequantizedFile(self, files)

    def find(self, start: int, stop: int) -> tuple[StoredTensor, int, int]:
        """The tensor shown at bytes start … stop, and which of its elements they are."""
        number = self.header.number_at(start)
        shown = self.header.tensors[number]
        item = ITEM_BYTES[shown.dtype]
        return self.tensors[number], (start - shown.start) // item, (stop - shown.start) // item


class DequantizedFile:
    """A TensorFile of a shard as it is shown. files: those that it is computed from, open."""

    def __init__(self, shard: DequantizedShard, files: Mapping[str, TensorFile]) -> None:
        self._shard, self._files = shard, files
        self._left: dict[str, int] = {}  # elements of a weight that are still to be released
        self._lock = threading.Lock()

    def raw(self, start: int, stop: int) -> memoryview:
        tensor, first, last = self._shard.find(start, stop)
        if tensor.scales is None:
            return self._files[self._shard.file].raw(*tensor.bytes_of(first, last))
        return self._dequantized(tensor, tensor.scales, first, last)

    def private(self, start: int, stop: int) -> memoryview:
        tensor, first, last = self._shard.find(start, stop)
        if tensor.scales is None:
            return self._files[self._shard.file].private(*tensor.bytes_of(first, last))
        return self._dequantized(tensor, tensor.scales, first, last)

    def release(self, start: int, stop: int) -> None:
        """The pieces of a weight share its scales, which are dropped with the last of them."""
        tensor, first, last = self._shard.find(start, stop)
        self._files[self._shard.file].release(*tensor.bytes_of(first, last))
        if tensor.scales is None:
            return
        name, scales = tensor.info.name, tensor.scales.info
        with self._lock:
            left = self._left[name] = self._left.pop(name, tensor.info.numel) - (last - first)
            if left <= 0:
                del self._left[name]
        if left <= 0:
            self._files[tensor.scales.file].release(scales.start, scales.stop)

    def _dequantized(self, tensor: StoredTensor, scales: Scales, first: int, last: int) -> memoryview:
        stored = np.frombuffer(self._files[self._shard.file].raw(*tensor.bytes_of(first, last)), dtype=np.uint8)
        scale = self._block_scales(tensor.info, scales, first, last)
        with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is found where all values are checked
            return (FP8_VALUES[stored] * scale).astype(DTYPE[DEQUANTIZED]).view(np.uint8).data

    def _block_scales(self, info: TensorInfo, scales: Scales, first: int, last: int) -> npt.NDArray[np.float32]:
        """The scale of each of a weight's elements first … last, flattened. Raises NonFiniteError."""
        rows, columns = info.shape[-2:]
        blocks = scales.info.shape[-1]
        row = np.arange(first // columns, -(-last // columns))
        block_row = row // rows * scales.info.shape[-2] + row % rows // scales.block[0]
        low, high = int(block_row[0]), int(block_row[-1]) + 1
        item = ITEM_BYTES[scales.info.dtype]
        begin = scales.info.start + low * blocks * item
        raw = self._files[scales.file].raw(begin, begin + (high - low) * blocks * item)
        few = np.frombuffer(raw, dtype=DTYPE[scales.info.dtype]).astype(np.float32).reshape(high - low, blocks)
        if not np.isfinite(few).all():
            raise NonFiniteError(
                f"{scales.info.name} in {scales.file} holds NaN or infinity, which would spread over whole blocks of "
                f"{info.name}. The checkpoint is damaged: fetch it again."
            )
        wide = np.repeat(few, scales.block[1], axis=1)[:, :columns]
        skipped = first - int(row[0]) * columns
        return wide[block_row - low].reshape(-1)[skipped : skipped + last - first]


def fp8_block(config: Config, where: str) -> Block | None:
    """The rows and columns of a block that shares a scale; None if the config names no FP8 weights with blocks.

    Raises CheckpointError if it names them, but not their blocks.
    """
    quantization = config.get(QUANTIZATION)
    if not isinstance(quantization, dict) or quantization.get("quant_method") != "fp8":
        return None
    block: Any = quantization.get("weight_block_size")
    if block is None:
        return None
    if not isinstance(block, list) or len(block) != 2 or not all(type(size) is int and size > 0 for size in block):
        raise CheckpointError(
            f"{where} has a weight_block_size of {block!r} in its {QUANTIZATION}; two numbers above 0 are "
            "expected, such as [128, 128]. Fetch config.json again."
        )
    return block[0], block[1]


def dequantized(checkpoint: Checkpoint, block: Block) -> Checkpoint:
    """The checkpoint as if its FP8 weights were bfloat16, without their scales. Raises CheckpointError."""
    tensors = checkpoint.tensors
    quantized = [name for name, (_, info) in tensors.items() if info.dtype == QUANTIZED]
    problems = [problem for name in quantized for problem in _problems(checkpoint, name, block)]
    scales = [name for name in tensors if name.endswith(SUFFIX)]
    problems += [problem for name in scales for problem in _misplaced(checkpoint, name)]
    if problems:
        raise CheckpointError(
            f"{checkpoint.label} cannot be dequantized: {problems[0]}{more(len(problems))}. Fetch it again, or use "
            "the unquantized checkpoint it was made from."
        )
    left_out = frozenset(scales)
    shards = tuple(_shown(checkpoint, shard, block, left_out) for shard in checkpoint.shards)
    places = {info.name: (shard, info) for shard in shards for info in shard.header.tensors}
    return replace(
        checkpoint,
        shards=shards,
        tensors={name: places[name] for name in tensors if name in places},
        config={key: value for key, value in checkpoint.config.items() if key != QUANTIZATION},
        dequantized=f"FP8 blocks of {block[0]}×{block[1]}",
    )


def _problems(checkpoint: Checkpoint, name: str, block: Block) -> Iterator[str]:
    """Why a quantized tensor cannot be dequantized."""
    info, scale = checkpoint.info(name), name + SUFFIX
    if len(info.shape) < 2:
        yield f"{name} is {info.dtype} {list(info.shape)}, not a matrix with blocks of {block[0]}×{block[1]}"
        return
    if scale not in checkpoint.tensors:
        yield f"{name} is {info.dtype}, but there is no {scale}"
        return
    got = checkpoint.info(scale)
    due = (*info.shape[:-2], *(math.ceil(size / of) for size, of in zip(info.shape[-2:], block, strict=True)))
    if got.shape != due:
        yield (
            f"{scale} is {list(got.shape)}, but {name} of {list(info.shape)} in blocks of {block[0]}×{block[1]} needs "
            f"{list(due)}"
        )
    if got.dtype not in SCALES:
        yield f"{scale} is {got.dtype}, not one of {', '.join(sorted(SCALES))}"


def _misplaced(checkpoint: Checkpoint, scale: str) -> Iterator[str]:
    """Why there should be no such scales."""
    name = scale.removesuffix(SUFFIX)
    if name not in checkpoint.tensors:
        yield f"it has {scale}, but no {name}"
    elif (dtype := checkpoint.info(name).dtype) != QUANTIZED:
        yield f"it has {scale}, but {name} is {dtype}, not {QUANTIZED}"


def _shown(checkpoint: Checkpoint, shard: Shard, block: Block, left_out: frozenset[str]) -> DequantizedShard:
    """A shard without its scales, its weights laid out as bfloat16 one after another."""
    tensors = tuple(
        StoredTensor(info, _scales_of(checkpoint, info, block))
        for info in shard.header.tensors
        if info.name not in left_out
    )
    at, shown = shard.header.data_start, []
    for tensor in tensors:
        dtype = DEQUANTIZED if tensor.scales else tensor.info.dtype
        stop = at + tensor.info.numel * ITEM_BYTES[dtype]
        shown.append(replace(tensor.info, dtype=dtype, start=at, stop=stop))
        at = stop
    header = replace(shard.header, tensors=tuple(shown))
    return DequantizedShard(shard.file, shard.size, header, tensors)


def _scales_of(checkpoint: Checkpoint, info: TensorInfo, block: Block) -> Scales | None:
    if info.dtype != QUANTIZED:
        return None
    shard, scales = checkpoint.tensors[info.name + SUFFIX]
    return Scales(shard.file, scales, block)
