"""Writing the output's tensors chunk by chunk: merged where the method ranges, copied elsewhere."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from hf_locstitch.checkpoints.dtypes import DTYPE, Values
from hf_locstitch.checkpoints.reader import CheckpointReader
from hf_locstitch.checkpoints.writer import SafetensorsWriter
from hf_locstitch.chunks import Chunk, chunks_by_name, chunks_of, for_each
from hf_locstitch.localize.scan import check_finite
from hf_locstitch.localize.selection import Keeper
from hf_locstitch.methods import Dense, Masked
from hf_locstitch.output import OutputShard, PlannedTensor
from hf_locstitch.plan import MergePlan
from hf_locstitch.select import is_buffer
from hf_locstitch.stitch import coverage, overlaps

if TYPE_CHECKING:
    from hf_locstitch.refit.values import Refitted


@dataclass(frozen=True)
class Overlap:
    """covered: by how many masks each coordinate is covered [models + 1]. pairs: covered by both [models, models]."""

    covered: npt.NDArray[np.int64]
    pairs: npt.NDArray[np.int64]

    @classmethod
    def none(cls, models: int) -> Overlap:
        return cls(np.zeros(models + 1, np.int64), np.zeros((models, models), np.int64))

    def in_order(self, places: Sequence[int]) -> Overlap:
        """Of the same models in another order. places: where each is now."""
        return Overlap(self.covered, self.pairs[np.ix_(places, places)])

    def __add__(self, other: Overlap) -> Overlap:
        return Overlap(self.covered + other.covered, self.pairs + other.pairs)


class Merger:
    """own: names of the tensors that this process writes. selections: the masks, none for a method without.

    refitted: values under the masks that take the place of what the method makes of them.
    """

    def __init__(
        self,
        plan: MergePlan,
        inputs: Mapping[str, CheckpointReader],
        selections: Mapping[str, Keeper],
        own: Collection[str],
        refitted: Refitted | None = None,
        *,
        chunk: int,
        workers: int,
        advance: Callable[[int], object],
    ) -> None:
        self.plan, self.inputs, self.selections, self.own = plan, inputs, selections, own
        self.chunk, self.workers, self.advance = chunk, workers, advance
        self.refitted = refitted
        self.base = inputs["base"]
        self.rest = next(reader for reader in inputs.values() if reader.checkpoint is plan.rest)
        self._order = plan.order
        self._places = [self._order.index(name) for name in plan.finetuned]
        tensors = plan.localized
        pieces = chunks_of([info.numel for info in tensors], chunk)
        self._chunks = chunks_by_name([info.name for info in tensors], pieces)
        self._lock = threading.Lock()
        self._overlap = Overlap.none(len(plan.finetuned))

    def write(self, shard: OutputShard, path: Path) -> tuple[Overlap, str]:
        """Fill a shard whose file stands already. Returns how the masks overlap in it, and its SHA-256."""
        with SafetensorsWriter(path, shard.entries, shard.metadata, new=False, sync=False) as writer:
            with writer.hashing() as hashed:
                overlap = self._fill(shard, writer)
            return overlap, hashed.result()

    def write_part(self, shard: OutputShard, path: Path) -> Overlap:
        """Fill this process's part of it; others, perhaps on other machines, fill theirs. It is on the disk then."""
        with SafetensorsWriter(path, shard.entries, shard.metadata, new=False) as writer:
            return self._fill(shard, writer)

    def _fill(self, shard: OutputShard, writer: SafetensorsWriter) -> Overlap:
        self._overlap = Overlap.none(len(self.plan.finetuned))
        for_each(lambda job: job(writer), self._jobs(shard), self.workers)
        return self._overlap.in_order(self._places)

    def _jobs(self, shard: OutputShard) -> Iterator[Callable[[SafetensorsWriter], None]]:
        for tensor in shard.tensors:
            if tensor.name not in self.own:
                continue
            if tensor.localized:
                yield from (partial(self._merge, tensor, chunk) for chunk in self._chunks[tensor.name])
            else:
                numel = self.rest.checkpoint.info(tensor.name).numel
                yield from (partial(self._copy, tensor, chunk) for chunk in chunks_of([numel], self.chunk))

    def _merge(self, tensor: PlannedTensor, chunk: Chunk, writer: SafetensorsWriter) -> None:
        method = self.plan.method
        merged = (
            self._merge_dense(method, tensor, chunk)
            if isinstance(method, Dense)
            else self._merge_masked(method, tensor, chunk)
        )
        self._put(writer, tensor, chunk, merged)
        self.base.release(tensor.name, chunk.first, chunk.count)

    def _merge_masked(self, method: Masked, tensor: PlannedTensor, chunk: Chunk) -> Values:
        kept = [self.selections[name].kept(chunk) for name in self._order]
        covered = coverage(chunk.count, kept)
        overlap = Overlap(*overlaps(covered, kept))
        with self._lock:
            self._overlap += overlap
        merged = method.combine(
            self.base.values(tensor.name, chunk.first, chunk.count),
            kept,
            covered,
            scale=self.plan.recipe.scale,
            dtype=DTYPE[tensor.dtype],
        )
        if self.refitted is not None and tensor.name in self.refitted:
            number = chunk.index - self._chunks[tensor.name][0].index
            merged[np.flatnonzero(covered.times)] = self.refitted.chunk(tensor.name, number)
        return merged

    def _merge_dense(self, method: Dense, tensor: PlannedTensor, chunk: Chunk) -> Values:
        base = self._checked(self.base, tensor.name, chunk)
        finetuned = [self._checked(self.inputs[name], tensor.name, chunk) for name in self._order]
        dtype = DTYPE[tensor.dtype]
        merged = method.combine(base, finetuned, scale=self.plan.recipe.scale, dtype=dtype)
        for name in self._order:
            self.inputs[name].release(tensor.name, chunk.first, chunk.count)
        return merged

    def _copy(self, tensor: PlannedTensor, chunk: Chunk, writer: SafetensorsWriter) -> None:
        """A piece of a tensor that is not merged."""
        info = self.rest.checkpoint.info(tensor.name)
        if info.floating:
            values = self._checked(self.rest, tensor.name, chunk)
            self._put(writer, tensor, chunk, values.astype(DTYPE[tensor.dtype], copy=False))
        else:
            item = info.nbytes // info.numel
            first = chunk.first * item
            content = self.rest.raw(tensor.name, first, first + chunk.count * item)
            writer.write(tensor.name, content, first)
            self.advance(len(content))
        self.rest.release(tensor.name, chunk.first, chunk.count)

    def _checked(self, model: CheckpointReader, name: str, chunk: Chunk) -> Values:
        """A chunk of a model. Raises NonFiniteError."""
        values = model.values(name, chunk.first, chunk.count)
        if not self.plan.recipe.allow_non_finite and not is_buffer(model.checkpoint.info(name)):
            check_finite(model, name, chunk, values)
        return values

    def _put(self, writer: SafetensorsWriter, tensor: PlannedTensor, chunk: Chunk, values: Values) -> None:
        content = values.view(np.uint8).data
        writer.write(tensor.name, content, chunk.first * values.itemsize)
        self.advance(content.nbytes)
