"""Safetensors headers: names, dtypes, shapes and byte ranges, checked before any weight is read.

Format: 8 bytes little-endian length n, n bytes of JSON, then the tensors' bytes without gaps.
Source: https://huggingface.co/docs/safetensors
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from hf_locstitch.errors import CheckpointError
from hf_locstitch.runtime.dtypes import FLOATING, ITEM_BYTES

MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library itself


@dataclass(frozen=True)
class TensorSpec:
    """A tensor to be written."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a shard. start, stop: byte offsets in the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.stop - self.start

    @property
    def floating(self) -> bool:
        return self.dtype in FLOATING


@dataclass(frozen=True)
class Header:
    """tensors: in the order of their bytes. metadata: the free-text `__metadata__`. data_start: bytes."""

    tensors: tuple[TensorInfo, ...]
    metadata: Mapping[str, str]
    data_start: int


def header_length(first_bytes: bytes, file_size: int, where: str) -> int:
    """Total bytes of the 8-byte prefix and the JSON. Raises CheckpointError if the length is impossible."""
    if len(first_bytes) < 8:
        raise CheckpointError(
            f"{where} is only {file_size} bytes long, so it is not a safetensors file. Fetch it again."
        )
    (length,) = struct.unpack("<Q", first_bytes[:8])
    if length > MAX_HEADER_BYTES or 8 + length > file_size:
        raise CheckpointError(
            f"{where} claims a header of {length} bytes, but the file has {file_size} "
            f"(and {MAX_HEADER_BYTES} is the limit): it is truncated or not a safetensors file. Fetch it again."
        )
    return 8 + length


def parse_header(raw: bytes, file_size: int, where: str) -> Header:
    """Read and check a header. raw: at least the prefix and the JSON. Raises CheckpointError naming `where`."""
    data_start = header_length(raw, file_size, where)
    try:
        entries = json.loads(raw[8:data_start], object_pairs_hook=_no_duplicates)
        metadata = entries.pop("__metadata__", None) or {}
        tensors = [_tensor_info(name, entry, data_start, where) for name, entry in entries.items()]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{where} has a malformed safetensors header ({error}). Fetch it again.") from error
    tensors.sort(key=lambda t: (t.start, t.stop))
    _check_contiguous(tensors, data_start, file_size, where)
    return Header(tuple(tensors), metadata, data_start)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    seen = dict(pairs)
    if len(seen) < len(pairs):
        raise ValueError("a tensor name appears twice")
    return seen


def _tensor_info(name: str, entry: dict[str, Any], data_start: int, where: str) -> TensorInfo:
    begin, end = entry["data_offsets"]
    info = TensorInfo(name, entry["dtype"], tuple(entry["shape"]), data_start + begin, data_start + end)
    if any(not isinstance(size, int) or size < 0 for size in (*info.shape, begin, end)):
        raise ValueError(f"{name}: sizes and offsets must be non-negative integers, not {entry}")
    item = ITEM_BYTES.get(info.dtype)
    if item is not None and info.nbytes != info.numel * item:
        raise CheckpointError(
            f"{where}: {name} is {info.dtype} {list(info.shape)}, which takes {info.numel * item} bytes, "
            f"but its offsets span {info.nbytes}. The file is damaged: fetch it again."
        )
    return info


def _check_contiguous(tensors: list[TensorInfo], data_start: int, file_size: int, where: str) -> None:
    at = data_start
    for tensor in tensors:
        if tensor.start != at:
            fault = "overlaps the tensor before it" if tensor.start < at else "leaves a gap before it"
            raise CheckpointError(
                f"{where}: {tensor.name} starts at byte {tensor.start} instead of {at}: it {fault}. "
                "The file is damaged: fetch it again."
            )
        at = tensor.stop
    if at != file_size:
        fault = "truncated" if file_size < at else "followed by bytes that belong to no tensor"
        raise CheckpointError(
            f"{where} has {file_size} bytes, but its header calls for {at}: it is {fault}. Fetch it again."
        )


def encode_header(tensors: Iterable[TensorSpec], metadata: Mapping[str, str]) -> bytes:
    """Prefix and JSON of a file that holds these tensors in this order, padded to 8 bytes."""
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    at = 0
    for spec in tensors:
        entries[spec.name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [at, at + spec.nbytes]}
        at += spec.nbytes
    raw = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)
    return struct.pack("<Q", len(raw)) + raw
