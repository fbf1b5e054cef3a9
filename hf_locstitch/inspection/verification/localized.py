"""A localized checkpoint read as a model, so that its values can be checked like a merge's."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch

from hf_locstitch.artifacts.localized_checkpoint import LocalizedCheckpoint
from hf_locstitch.artifacts.mask_file import Positions
from hf_locstitch.checkpoints.reader import CheckpointReader
from hf_locstitch.checkpoints.tensors import TORCH_DTYPE


class GraftReader(CheckpointReader):
    """The base with a localized checkpoint's values under its mask, in the finetuned dtypes, as if it were a model.

    finetuned: gives names, dtypes and shapes.
    """

    def __init__(self, localized: LocalizedCheckpoint, base: CheckpointReader, finetuned: CheckpointReader) -> None:
        super().__init__(finetuned.checkpoint, {})
        self._localized, self._base = localized, base
        self._positions = lru_cache(1)(self._read)  # a tensor is checked piece by piece

    def _read(self, name: str) -> Positions:
        return self._localized.positions(name)

    def flat(self, name: str, first: int, count: int) -> torch.Tensor:
        graft = self._base.flat(name, first, count).to(TORCH_DTYPE[self.checkpoint.info(name).dtype], copy=True)
        positions = self._positions(name)
        begin, end = np.searchsorted(positions, [first, first + count]).tolist()
        graft[torch.from_numpy(positions[begin:end] - first)] = self._localized.values(name, begin, end - begin)
        return graft

    def release(self, name: str, first: int, count: int) -> None:
        del name, first, count  # the values were computed, nothing is mapped

    def where(self, name: str) -> str:
        return f"{self._localized.label}/{self._localized.shards[1].file}"
