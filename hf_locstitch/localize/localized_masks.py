"""A localized checkpoint read back: what its mask keeps of any chunk, in the form of a scan's selection."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from hf_locstitch.artifacts.localized_checkpoint import LocalizedCheckpoint
from hf_locstitch.artifacts.mask_file import Positions
from hf_locstitch.artifacts.mask_source import MaskedValues
from hf_locstitch.checkpoints.header import TensorInfo
from hf_locstitch.errors import CheckpointError, IntegrityError
from hf_locstitch.localize.candidates import Candidates
from hf_locstitch.localize.spill import Spill
from hf_locstitch.runtime.chunks import Chunk, chunks_by_name, chunks_of, for_each
from hf_locstitch.runtime.dtypes import common_dtype
from hf_locstitch.runtime.kernels import SURE

NONE = np.empty(0, dtype=np.int32)


class LocalizedMask:
    """A mask found before, and the finetuned values there, laid out chunk by chunk in a temporary file.

    tensors: the localized ones, as in the base. spill: the file; what an earlier process wrote is reused.
    """

    def __init__(self, localized: LocalizedCheckpoint, tensors: Sequence[TensorInfo], spill: Path, chunk: int) -> None:
        self.ones = localized.ones
        self.names = [info.name for info in tensors]
        self.chunks = chunks_of([info.numel for info in tensors], chunk)
        common = common_dtype({localized.stored(name).dtype for name in self.names})
        self._localized = localized
        self._spill = Spill(spill, len(self.chunks), common, heading=json.dumps([chunk, str(common), "given"]))

    def read(self, own: Collection[str], workers: int, advance: Callable[[int], object]) -> None:
        """Lay out the tensors named in `own`. Raises CheckpointError if mask and values do not fit."""
        of_each = chunks_by_name(self.names, self.chunks)
        chunks = {name: found for name, found in of_each.items() if name in own}

        def read(name: str) -> None:
            if not all(self._spill.done[chunk.index] for chunk in chunks[name]):
                self._read(name, chunks[name])
            advance(self._localized.stored(name).nbytes)

        for_each(read, chunks, workers)

    def _read(self, name: str, chunks: Sequence[Chunk]) -> None:
        first, stored = 0, self._localized.stored(name).numel
        try:
            for chunk, positions in by_chunk(self._localized.iter_positions(name), chunks):
                values = self._localized.read(name, first, min(len(positions), stored - first))
                first += len(positions)
                if first > stored:
                    break
                flagged = positions.astype(np.uint32) | np.uint32(SURE)
                self._spill.append(chunk.index, Candidates(flagged, values, NONE))
        except IntegrityError as error:
            raise CheckpointError(str(error)) from error
        if first != stored:
            ones = f"more than {stored}" if first > stored else first
            raise CheckpointError(
                f"{self._localized.label} is damaged: its mask keeps {ones} elements of {name}, but "
                f"{stored} values are stored. Download it again."
            )

    def kept(self, chunk: Chunk) -> MaskedValues:
        """The mask and the finetuned values in one chunk."""
        candidates = self._spill.read(chunk.index)
        return MaskedValues(candidates.positions, candidates.values)

    def close(self) -> None:
        self._spill.close()


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
