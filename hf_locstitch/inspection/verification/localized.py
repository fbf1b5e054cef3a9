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

    finetuned: whose names, dtypes and shapes it has.
    """

    def __init__(self, given: LocalizedCheckpoint, base: CheckpointReader, finetuned: CheckpointReader) -> None:
        super().__init__(finetuned.checkpoint, {})
        self._given, self._base = given, base
        self._positions = lru_cache(1)(self._read)  # a tensor is looked at piece by piece

    def _read(self, name: str) -> Positions:
        return self._given.positions(name)

    def flat(self, name: str, first: int, count: int) -> torch.Tensor:
        graft = self._base.flat(name, first, count).to(TORCH_DTYPE[self.checkpoint.info(name).dtype], copy=True)
        positions = self._positions(name)
        begin, end = np.searchsorted(positions, [first, first + count]).tolist()
        graft[torch.from_numpy(positions[begin:end] - first)] = self._given.values(name, begin, end - begin)
        return graft

    def release(self, name: str, first: int, count: int) -> None:
        del name, first, count  # what was made is nobody else's

    def where(self, name: str) -> str:
        return f"{self._given.label}/{self._given.shards[1].file}"
