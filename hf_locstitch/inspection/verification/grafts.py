"""A localized checkpoint read as a model, so that its values can be checked like a merge's, or a merge's by them."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from hf_locstitch.artifacts.localized_checkpoint import LocalizedCheckpoint
from hf_locstitch.artifacts.mask_file import Positions
from hf_locstitch.checkpoints.header import TensorInfo
from hf_locstitch.checkpoints.reader import CheckpointReader
from hf_locstitch.errors import IntegrityError
from hf_locstitch.runtime.dtypes import DTYPE, Values
from hf_locstitch.runtime.human import counted

if TYPE_CHECKING:
    import torch


class GraftReader(CheckpointReader):
    """The base with a localized checkpoint's values under its mask, in the finetuned dtypes, as if it were a model that
    has the localized tensors alone."""

    def __init__(self, localized: LocalizedCheckpoint, base: CheckpointReader) -> None:
        files = localized.as_checkpoint()
        infos = {
            name: (localized.shards[1], TensorInfo(name, localized.stored(name).dtype, shape, 0, 0))
            for name, shape in localized.shapes.items()
        }
        super().__init__(replace(files, tensors=infos), {})
        self._localized, self._base = localized, base
        self._held: tuple[str, Positions] | None = None

    def _positions(self, name: str) -> Positions:
        """Of one tensor they are kept: it is read piece by piece. Raises IntegrityError."""
        if (held := self._held) is None or held[0] != name:
            self._held = held = name, self._read(name)
        return held[1]

    def _read(self, name: str) -> Positions:
        positions, stored = self._localized.positions(name), self._localized.stored(name).numel
        if len(positions) != stored:
            raise IntegrityError(
                f"{self.where(name)} holds {counted(stored, 'value')} for {name}, but its mask has {len(positions):,} "
                "ones there. Fetch it again."
            )
        return positions

    def values(self, name: str, first: int, count: int) -> Values:
        graft = self._grafted(name, first, count)
        graft.flags.writeable = False
        return graft

    def flat(self, name: str, first: int, count: int) -> torch.Tensor:
        from hf_locstitch.checkpoints.tensors import as_tensor

        return as_tensor(self._grafted(name, first, count))

    def _grafted(self, name: str, first: int, count: int) -> Values:
        graft = self._base.values(name, first, count).astype(DTYPE[self.checkpoint.info(name).dtype])
        positions = self._positions(name)
        begin, end = np.searchsorted(positions, [first, first + count]).tolist()
        graft[positions[begin:end] - first] = self._localized.read(name, begin, end - begin)
        return graft

    def release(self, name: str, first: int, count: int) -> None:
        del name, first, count  # the values were computed, nothing is mapped

    def where(self, name: str) -> str:
        return f"{self._localized.label}/{self._localized.shards[1].file}"
