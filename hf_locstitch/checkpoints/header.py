"""Safetensors headers: names, dtypes, shapes and byte ranges, checked before any weight is read.

Format: 8 bytes little-endian length n, n bytes of JSON, then the tensors' bytes without gaps.
Source: https://huggingface.co/docs/safetensors
"""

from __future__ import annotations

import json
import math
import struct
from bisect import bisect_right
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from hf_locstitch.errors import CheckpointError
from hf_locstitch.runtime.dtypes import FLOATING, ITEM_BYTES
from hf_locstitch.runtime.parsing import parse_json

MAX_HEADER_BYTES = 25_000_000  # the limit of the Hub's own client: some 200,000 tensors in one file
MAX_SIZE = 2**64 - 1  # of a number in a header


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

    def number_at(self, start: int) -> int:
        """Which of the tensors has the byte `start`."""
        return bisect_right(self._starts, start) - 1

    @cached_property
    def _starts(self) -> list[int]:
        return [info.start for info in self.tensors]


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
        entries = _entries(raw[8:data_start])
        metadata = _metadata(entries.pop("__metadata__", None))
        tensors = [_tensor_info(name, entry, data_start, where) for name, entry in entries.items()]
    except (ValueError, TypeError, KeyError) as error:
        fault = f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else str(error)
        raise CheckpointError(f"{where} has a malformed safetensors header ({fault}). Fetch it again.") from error
    tensors.sort(key=lambda t: (t.start, t.stop))
    _check_contiguous(tensors, data_start, file_size, where)
    return Header(tuple(tensors), metadata, data_start)


def _entries(content: bytes) -> dict[str, Any]:
    """Raises ValueError for all that the safetensors library refuses, too."""
    if not content.startswith(b"{"):
        raise ValueError("it does not begin with '{'")
    return parse_json(
        content,
        object_pairs_hook=_no_duplicates,
        parse_int=_whole_number,
        parse_float=_no_number,
        parse_constant=_no_number,
    )


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    seen = dict(pairs)
    if len(seen) < len(pairs):
        raise ValueError("a tensor name or field appears twice")
    return seen


def _whole_number(text: str) -> int:
    if text.startswith("-") or len(text) > 20 or int(text) > MAX_SIZE:
        return _no_number(text)
    return int(text)


def _no_number(text: str) -> Any:
    raise ValueError(f"{text[:30]} is not a whole number from 0 to {MAX_SIZE}")


def _metadata(value: Any) -> dict[str, str]:
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise ValueError("__metadata__ must map texts to texts")
    return value


def _tensor_info(name: str, entry: Any, data_start: int, where: str) -> TensorInfo:
    if not isinstance(entry, dict):
        raise ValueError(f"{name}: expected dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
        raise ValueError(f"{name}: shape and data_offsets must be lists of whole numbers")
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise ValueError(f"{name}: the dtype {dtype!r} is not one of {', '.join(ITEM_BYTES)}")
    _check_product(name, [*shape, 8 * ITEM_BYTES[dtype]])
    info = TensorInfo(name, dtype, tuple(shape), data_start + offsets[0], data_start + offsets[1])
    if info.nbytes != (expected := info.numel * ITEM_BYTES[dtype]):
        raise CheckpointError(
            f"{where}: {name} is {info.dtype} {list(info.shape)}, which takes {expected} bytes, "
            f"but its offsets span {info.nbytes}. The file is damaged: fetch it again."
        )
    return info


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(size) is int for size in value)  # a bool is an int, too


def _check_product(name: str, sizes: Iterable[int]) -> None:
    """Multiplied one after the other, as the safetensors library does: a zero after an overflow comes too late."""
    product = 1
    for size in sizes:
        product *= size
        if product > MAX_SIZE:
            raise ValueError(f"{name}: its shape has too many elements")


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
