"""Tensors whose elements become known in their order, a few at a time: written chunk by chunk, never held whole."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hf_locstitch.runtime.chunks import Chunk
from hf_locstitch.stitch.fitted_values import FittedWriter


@dataclass
class _Growing:
    """chunks: still to be written. waiting: the elements known of the first of them, in parts."""

    chunks: deque[Chunk]
    waiting: list[Tensor] = field(default_factory=list)

    @property
    def lacking(self) -> int:
        """Elements of the first chunk that are not known."""
        return self.chunks[0].count - sum(map(len, self.waiting))


class GrowingTensors:
    """chunks: of a tensor. dtype: of what is written of it, as on disk. cut: what is written of a chunk [n]."""

    def __init__(
        self,
        writer: FittedWriter,
        chunks: Callable[[str], Sequence[Chunk]],
        dtype: Callable[[str], str],
        cut: Callable[[str, Chunk, Tensor], Tensor],
    ) -> None:
        self._writer, self._chunks, self._dtype, self._cut = writer, chunks, dtype, cut
        self._growing: dict[str, _Growing] = {}

    def add(self, name: str, values: Tensor) -> None:
        """The next elements of a tensor, in any shape."""
        if name not in self._growing:
            self._growing[name] = _Growing(deque(self._chunks(name)))
            self._writer.begin(name, self._dtype(name))
        growing, left = self._growing[name], values.reshape(-1)
        while len(left):
            taken, left = left[: growing.lacking], left[growing.lacking :]
            growing.waiting.append(taken)
            if growing.lacking == 0:
                chunk, (first, *more) = growing.chunks.popleft(), growing.waiting
                growing.waiting = []
                self._writer.append(name, self._cut(name, chunk, torch.cat([first, *more]) if more else first))
        growing.waiting = [part.clone() for part in growing.waiting]  # not the tensor that it is a view of
        if not growing.chunks:
            del self._growing[name]
            self._writer.end(name)
