"""Writing the output's tensors chunk by chunk: merged where the method ranges, copied elsewhere."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from hf_locstitch.artifacts.overlap import Overlap
from hf_locstitch.checkpoints.writer import SafetensorsWriter
from hf_locstitch.plan.layout import OutputShard, PlannedTensor
from hf_locstitch.runtime.chunks import Chunk, chunks_of, for_each
from hf_locstitch.runtime.dtypes import Values
from hf_locstitch.stitch.view import StitchView


class ShardWriter:
    """view: gives the values. own: names of the tensors that this process writes. order: each mask's place in the view,
    in the order in which masks are counted."""

    def __init__(
        self,
        view: StitchView,
        own: Collection[str],
        order: Sequence[int],
        *,
        workers: int,
        advance: Callable[[int], object],
    ) -> None:
        self._view, self._own, self._order = view, own, order
        self._workers, self._advance = workers, advance
        self._lock = threading.Lock()
        self._overlap = Overlap.none(len(order))

    def write(self, shard: OutputShard, path: Path) -> tuple[Overlap, str]:
        """Fill a shard whose file already exists. Returns how the masks overlap in it, and its SHA-256."""
        with SafetensorsWriter(path, shard.tensors, shard.metadata, new=False, sync=False) as writer:
            with writer.hashing() as hashed:
                overlap = self._fill(shard, writer)
            return overlap, hashed.result()

    def write_part(self, shard: OutputShard, path: Path) -> Overlap:
        """Fill this process's part of it; others, perhaps on other machines, fill theirs. Synced on return."""
        with SafetensorsWriter(path, shard.tensors, shard.metadata, new=False) as writer:
            return self._fill(shard, writer)

    def _fill(self, shard: OutputShard, writer: SafetensorsWriter) -> Overlap:
        self._overlap = Overlap.none(len(self._order))
        for_each(lambda job: job(writer), self._jobs(shard), self._workers)
        return self._overlap.in_order(self._order)

    def _jobs(self, shard: OutputShard) -> Iterator[Callable[[SafetensorsWriter], None]]:
        for tensor in shard.tensors:
            if tensor.name not in self._own:
                continue
            if tensor.localized:
                yield from (partial(self._merge, tensor, chunk) for chunk in self._view.chunks[tensor.name])
            else:
                numel = self._view.unmasked.checkpoint.info(tensor.name).numel
                yield from (partial(self._copy, tensor, chunk) for chunk in chunks_of([numel], self._view.chunk))

    def _merge(self, tensor: PlannedTensor, chunk: Chunk, writer: SafetensorsWriter) -> None:
        merged, overlap = self._view.merge(tensor.name, chunk)
        if overlap is not None:
            with self._lock:
                self._overlap += overlap
        self._put(writer, tensor, chunk, merged)

    def _copy(self, tensor: PlannedTensor, chunk: Chunk, writer: SafetensorsWriter) -> None:
        """A piece of a tensor that is not merged."""
        unmasked = self._view.unmasked
        info = unmasked.checkpoint.info(tensor.name)
        if info.floating:
            self._put(writer, tensor, chunk, self._view.copied(tensor.name, chunk))
        else:
            item = info.nbytes // info.numel
            first = chunk.first * item
            content = unmasked.raw(tensor.name, first, first + chunk.count * item)
            writer.write(tensor.name, content, first)
            self._advance(len(content))
        unmasked.release(tensor.name, chunk.first, chunk.count)

    def _put(self, writer: SafetensorsWriter, tensor: PlannedTensor, chunk: Chunk, values: Values) -> None:
        content = values.view(np.uint8).data
        writer.write(tensor.name, content, chunk.first * values.itemsize)
        self._advance(content.nbytes)
