"""Masks found before, read back with their values: what they keep of any chunk, in the form of a scan's selection."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from hf_locstitch.artifacts.localized_checkpoint import LocalizedCheckpoint
from hf_locstitch.artifacts.mask_file import DamagedMask, MaskFile, Positions
from hf_locstitch.artifacts.mask_source import MaskedValues
from hf_locstitch.checkpoints.header import TensorInfo
from hf_locstitch.checkpoints.reader import CheckpointReader
from hf_locstitch.errors import CheckpointError
from hf_locstitch.localize.candidates import Candidates
from hf_locstitch.localize.spill import Spill
from hf_locstitch.runtime.chunks import Chunk, chunks_by_name, chunks_of, for_each
from hf_locstitch.runtime.dtypes import Values, common_dtype
from hf_locstitch.runtime.human import counted
from hf_locstitch.runtime.kernels import SURE

NONE = np.empty(0, dtype=np.int32)


Part = tuple[Chunk, Positions, Values]  # positions from the chunk's start


class GivenMask(ABC):
    """A mask found before, and the finetuned values there, laid out chunk by chunk in a temporary file.

    tensors: the localized ones, as in the base. spill: the file. dtypes: of the values. reuse: whether what an earlier
    process wrote is used.
    """

    def __init__(
        self, ones: int, tensors: Sequence[TensorInfo], dtypes: Collection[str], spill: Path, chunk: int, reuse: bool
    ) -> None:
        self.ones = ones
        self.names = [info.name for info in tensors]
        self.chunks = chunks_of([info.numel for info in tensors], chunk)
        common = common_dtype(set(dtypes))
        trusted = None if reuse else np.zeros(len(self.chunks), dtype=bool)
        heading = json.dumps([chunk, str(common), "given"])
        self._spill = Spill(spill, len(self.chunks), common, heading=heading, trusted=trusted)

    def read(self, own: Collection[str], workers: int, advance: Callable[[int], object]) -> None:
        """Lay out the tensors named in `own`. Raises CheckpointError if mask and values do not fit."""
        of_each = chunks_by_name(self.names, self.chunks)
        chunks = {name: found for name, found in of_each.items() if name in own}

        def read(name: str) -> None:
            if not all(self._spill.done[chunk.index] for chunk in chunks[name]):
                try:
                    for chunk, positions, values in self.parts(name, chunks[name]):
                        flagged = positions.astype(np.uint32) | np.uint32(SURE)
                        self._spill.append(chunk.index, Candidates(flagged, values, NONE))
                except DamagedMask as error:
                    raise CheckpointError(str(error)) from error
            advance(self.nbytes(name))

        for_each(read, chunks, workers)

    @abstractmethod
    def parts(self, name: str, chunks: Sequence[Chunk]) -> Iterator[Part]:
        """Of each chunk of a tensor, where the mask is one and the finetuned values there. Raises CheckpointError."""

    @abstractmethod
    def nbytes(self, name: str) -> int:
        """What is read for a tensor's values."""

    def kept(self, chunk: Chunk) -> MaskedValues:
        """The mask and the finetuned values in one chunk."""
        candidates = self._spill.read(chunk.index)
        return MaskedValues(candidates.positions, candidates.values)

    def close(self) -> None:
        self._spill.close()


class LocalizedMask(GivenMask):
    """Of a localized checkpoint, which is checked before it is read."""

    def __init__(self, localized: LocalizedCheckpoint, tensors: Sequence[TensorInfo], spill: Path, chunk: int) -> None:
        dtypes = {localized.stored(info.name).dtype for info in tensors}
        super().__init__(localized.ones, tensors, dtypes, spill, chunk, reuse=True)
        self._localized = localized

    def parts(self, name: str, chunks: Sequence[Chunk]) -> Iterator[Part]:
        first, stored = 0, self._localized.stored(name).numel
        for chunk, positions in by_chunk(self._localized.iter_positions(name), chunks):
            values = self._localized.read(name, first, min(len(positions), stored - first))
            first += len(positions)
            if first > stored:
                break
            yield chunk, positions, values
        if first != stored:
            ones = f"more than {counted(stored, 'element')}" if first > stored else counted(first, "element")
            raise CheckpointError(
                f"{self._localized.label} is damaged: its mask keeps {ones} of {name}, but {counted(stored, 'value')} "
                f"{'is' if stored == 1 else 'are'} stored. Download it again."
            )

    def nbytes(self, name: str) -> int:
        return self._localized.stored(name).nbytes


class MergedMask(GivenMask):
    """Of a finetune whose mask a merge holds: values are taken from the finetuned model as it is read, or arrives."""

    def __init__(
        self, mask: MaskFile, finetuned: CheckpointReader, tensors: Sequence[TensorInfo], spill: Path, chunk: int
    ) -> None:
        dtypes = {finetuned.checkpoint.info(info.name).dtype for info in tensors}
        super().__init__(mask.ones, tensors, dtypes, spill, chunk, reuse=False)
        self._mask, self._finetuned = mask, finetuned

    def parts(self, name: str, chunks: Sequence[Chunk]) -> Iterator[Part]:
        for chunk, positions in by_chunk(self._mask.iter_positions(name), chunks):
            values = self._finetuned.values(name, chunk.first, chunk.count)[positions]
            self._finetuned.release(name, chunk.first, chunk.count)
            yield chunk, positions, values

    def nbytes(self, name: str) -> int:
        return self._finetuned.checkpoint.info(name).nbytes


def by_chunk(parts: Iterable[Positions], chunks: Sequence[Chunk]) -> Iterator[tuple[Chunk, Positions]]:
    """Ascending positions in a tensor, divided among its chunks in order, relative to each chunk's start."""
    rest, held = iter(parts), np.empty(0, dtype=np.int64)
    for chunk in chunks:
        end = chunk.first + chunk.count
        while not len(held) or held[-1] < end:
            part = next(rest, None)
            if part is None:
                break
            held = np.concatenate([held, part])
        cut = int(np.searchsorted(held, end))
        yield chunk, held[:cut] - chunk.first
        held = held[cut:]
