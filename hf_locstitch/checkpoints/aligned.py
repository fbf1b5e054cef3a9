"""Matrices with a row for each token, seen in the rows of another vocabulary: each row from one model, or the mean of
several.

Rows are gathered as they are read, a chunk at a time; no matrix is ever held.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from hf_locstitch.checkpoints.byte_ranges import Piece
from hf_locstitch.checkpoints.checkpoint import Checkpoint
from hf_locstitch.checkpoints.header import TensorInfo
from hf_locstitch.checkpoints.reader import CheckpointReader
from hf_locstitch.checkpoints.vocabulary import resized, row_count, row_width, with_rows
from hf_locstitch.runtime.dtypes import DTYPE, ITEM_BYTES, ON_DISK, Values, common_dtype

if TYPE_CHECKING:
    import torch

Rows: TypeAlias = npt.NDArray[np.int64]
RowSources: TypeAlias = Mapping[str, Rows]  # model -> which of its rows stands at each row [rows]; -1: none


@dataclass(frozen=True)
class Alignment:
    """rows: of every matrix. own: the models as their files have them. matrices: name in the base -> model -> the name
    of the matrix there. sources: model -> where each of its rows comes from, of "base" and all finetunes; a row of
    several sources is their mean, in their order, in float32.
    """

    rows: int
    own: Mapping[str, Checkpoint] = field(repr=False)
    matrices: Mapping[str, Mapping[str, str]]
    sources: Mapping[str, RowSources] = field(repr=False)

    def seen(self, name: str) -> Checkpoint:
        """A model with its matrices in these rows, in a dtype that holds every value of theirs."""
        infos = {
            matrix: self._resized(matrix, name, self._dtype(matrix))
            for matrix, owners in self.matrices.items()
            if name in owners
        }
        seen = _with_infos(self.own[name], infos)
        counts = {row_count(self.own[name].info(own[name]).shape) for own in self.matrices.values() if name in own}
        return replace(seen, config=resized(seen.config, counts, self.rows))

    def layout(self) -> Checkpoint:
        """The base with its matrices in these rows, in its own dtypes."""
        base = self.own["base"]
        return _with_infos(base, {name: self._resized(name, "base", base.info(name).dtype) for name in self.matrices})

    def _resized(self, matrix: str, model: str, dtype: str) -> TensorInfo:
        info = self.own[model].info(self.matrices[matrix][model])
        shape = with_rows(info.shape, self.rows)
        return TensorInfo(matrix, dtype, shape, info.start, info.start + math.prod(shape) * ITEM_BYTES[dtype])

    def _dtype(self, matrix: str) -> str:
        stored = {self.own[model].info(name).dtype for model, name in self.matrices[matrix].items()}
        mean = any(_are_means(sources) for sources in self.sources.values())
        dtype = common_dtype({*stored, "F32"} if mean else stored)
        return next(name for name in ON_DISK.values() if DTYPE[name] == dtype)

    def reader(self, name: str, readers: Mapping[str, CheckpointReader]) -> AlignedReader:
        """readers: of the models as their files have them."""
        return AlignedReader(self, name, readers)

    def readers(self, own: Mapping[str, CheckpointReader]) -> dict[str, CheckpointReader]:
        """All of them. own: of the models as their files have them."""
        return {name: self.reader(name, own) for name in own}

    def pieces(self, matrix: str) -> Iterator[tuple[str, Piece]]:
        """(model, piece of it) that the base's matrix in these rows is made of."""
        for model, rows in self.sources["base"].items():
            taken = np.unique(rows[rows >= 0])
            width = row_width(self.own["base"].info(matrix))
            for _, first, count in _stretches(taken):
                yield model, (self.matrices[matrix][model], first * width, count * width)


class AlignedReader(CheckpointReader):
    """One of the models of an alignment. readers: of them all, as their files have them. Safe to share."""

    def __init__(self, alignment: Alignment, name: str, readers: Mapping[str, CheckpointReader]) -> None:
        super().__init__(alignment.seen(name), {})
        self._own, self._matrices = readers[name], alignment.matrices
        self._sources, self._readers = alignment.sources[name], readers

    def values(self, name: str, first: int, count: int) -> Values:
        if name not in self._matrices:
            return self._own.values(name, first, count)
        info = self.checkpoint.info(name)
        width = row_width(info)
        start, stop = first // width, -(-(first + count) // width)
        gathered = self._rows(name, start, stop, width, DTYPE[info.dtype]).reshape(-1)
        values = gathered[first - start * width :][:count]
        values.flags.writeable = False
        return values

    def _rows(self, matrix: str, start: int, stop: int, width: int, dtype: np.dtype[Any]) -> Values:
        """Rows start … stop of a matrix [stop − start, width]."""
        gathered = np.zeros((stop - start, width), dtype)
        times = np.zeros((stop - start, 1), np.int64)
        for model, rows in self._sources.items():
            for first, there, count in _stretches(rows[start:stop]):
                here = slice(first, first + count)
                found = self._readers[model].values(self._matrices[matrix][model], there * width, count * width)
                found, again = found.reshape(-1, width), times[here] > 0
                gathered[here] = np.where(again, gathered[here] + found, found) if again.any() else found
                times[here] += 1
        return np.where(times > 1, gathered / times.astype(dtype), gathered) if (times > 1).any() else gathered

    def flat(self, name: str, first: int, count: int) -> torch.Tensor:
        if name not in self._matrices:
            return self._own.flat(name, first, count)
        from hf_locstitch.checkpoints.tensors import as_tensor

        return as_tensor(self.values(name, first, count).copy())

    def raw(self, name: str, first: int, stop: int) -> memoryview:
        if name not in self._matrices:
            return self._own.raw(name, first, stop)
        item = ITEM_BYTES[self.checkpoint.info(name).dtype]
        whole = self.values(name, first // item, -(-stop // item) - first // item)
        return whole.view(np.uint8).data[first % item :][: stop - first]

    def release(self, name: str, first: int, count: int) -> None:
        if name not in self._matrices:
            return self._own.release(name, first, count)
        width = row_width(self.checkpoint.info(name))
        start, stop = first // width, -(-(first + count) // width)
        for model, rows in self._once.items():
            for place, there, length in _stretches(rows[start:stop]):
                begin = max(first, (start + place) * width)
                end = min(first + count, (start + place + length) * width)
                at = there * width + begin - (start + place) * width
                self._readers[model].release(self._matrices[name][model], at, end - begin)

    @cached_property
    def _once(self) -> RowSources:
        """The sources without rows that stand in several places: those are never released."""
        found: dict[str, Rows] = {}
        for model, rows in self._sources.items():
            taken, times = np.unique(rows, return_counts=True)
            found[model] = np.where(np.isin(rows, taken[times > 1]), -1, rows)
        return found


def _are_means(sources: RowSources) -> bool:
    return bool((np.sum([rows >= 0 for rows in sources.values()], axis=0) > 1).any())


def _stretches(rows: Rows) -> Iterator[tuple[int, int, int]]:
    """Rows that stand together as they do in their model: place, row there, how many. rows: [n]; -1: none."""
    rows = np.where(rows < 0, -2, rows)  # −1 and 0 would be neighbours
    cuts = sorted({0, *(np.flatnonzero(np.diff(rows) != 1) + 1).tolist(), len(rows)})
    for first, stop in pairwise(cuts):
        if rows[first] >= 0:
            yield first, int(rows[first]), stop - first


def _with_infos(checkpoint: Checkpoint, infos: Mapping[str, TensorInfo]) -> Checkpoint:
    """The checkpoint with these tensors in place of its own, or beside them."""
    shards = tuple(
        replace(
            shard,
            header=replace(shard.header, tensors=tuple(infos.get(info.name, info) for info in shard.header.tensors)),
        )
        for shard in checkpoint.shards
    )
    where = {shard.file: shard for shard in shards}
    tensors = {name: (where[shard.file], infos.get(name, info)) for name, (shard, info) in checkpoint.tensors.items()}
    missing = {name: (shards[0], info) for name, info in infos.items() if name not in tensors}
    return replace(checkpoint, shards=shards, tensors={**tensors, **missing})
