"""The plain stitch, tensor by tensor in memory: the starting point of a refit, and what it may change."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import numpy as np
import torch

from hf_locstitch.checkpoints.tensors import TORCH_DTYPE, as_tensor
from hf_locstitch.runtime.chunks import Chunk
from hf_locstitch.runtime.dtypes import DTYPE
from hf_locstitch.runtime.kernels import Positions
from hf_locstitch.stitch.view import StitchView


class PlainStitch:
    """view: without fitted values."""

    def __init__(self, view: StitchView) -> None:
        self._view, self._chunks, self._dtypes = view, view.chunks, view.dtypes
        self.base, self._unmasked = view.base, view.unmasked

    def dtype_name(self, name: str) -> str:
        """The output's dtype of a tensor, as on disk."""
        return self._dtypes[name]

    def dtype(self, name: str) -> torch.dtype:
        """The same of torch."""
        return TORCH_DTYPE[self._dtypes[name]]

    def is_localized(self, name: str) -> bool:
        return name in self._chunks

    def values(self, name: str) -> torch.Tensor:
        """The values as they would be written, [*shape] in the output's dtype; not a copy if the tensor is not
        localized."""
        if name not in self._chunks:
            info = self._unmasked.checkpoint.info(name)
            stored = self._unmasked.flat(name, 0, info.numel).view(info.shape)
            return stored.to(TORCH_DTYPE.get(self._dtypes.get(name, "")))
        pieces = [np.empty(0, DTYPE[self._dtypes[name]])]
        pieces += [self._view.values(name, chunk) for chunk in self._chunks[name]]
        self.release(name)
        return as_tensor(np.concatenate(pieces)).view(self.base.checkpoint.info(name).shape)

    def release(self, name: str) -> None:
        """The pages read of a tensor are not needed soon."""
        reader = self.base if name in self._chunks else self._unmasked
        reader.release(name, 0, reader.checkpoint.info(name).numel)

    def chunks(self, name: str) -> Sequence[Chunk]:
        """Of a tensor, in order; none if it is not localized."""
        return self._chunks.get(name, ())

    def union(self, chunk: Chunk) -> torch.Tensor:
        """Positions that any mask covers: int64, ascending, relative to the chunk's start."""
        return torch.from_numpy(_union([one.positions for one in self._view.kept(chunk)])).long()

    def cut(self, name: str, values: torch.Tensor) -> list[torch.Tensor]:
        """Of values [*shape], those that any mask covers, for each chunk in turn, in the output's dtype."""
        flat, chunks = values.reshape(-1), self.chunks(name)
        return [self.cut_chunk(name, chunk, flat[chunk.first : chunk.first + chunk.count]) for chunk in chunks]

    def cut_chunk(self, name: str, chunk: Chunk, values: torch.Tensor) -> torch.Tensor:
        """The same of a chunk's values [n]."""
        return values.to(self.dtype(name))[self.union(chunk)]

    def covered(self, name: str) -> torch.Tensor:
        """bool [*shape]: where any mask covers the tensor. False everywhere if it is not localized."""
        info = self.base.checkpoint.info(name)
        return self.covered_part(name, 0, info.numel).view(info.shape)

    def covered_part(self, name: str, first: int, count: int) -> torch.Tensor:
        """The same of elements first … first + count, bool [count]."""
        covered = torch.zeros(count, dtype=torch.bool)
        for chunk in self.chunks(name):
            if chunk.first < first + count and first < chunk.first + chunk.count:
                places = self.union(chunk) + (chunk.first - first)
                covered[places[(places >= 0) & (places < count)]] = True
        return covered


def _union(positions: Sequence[Positions]) -> Positions:
    return reduce(np.union1d, positions)
