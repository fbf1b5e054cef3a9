"""A localized checkpoint read back: what its mask keeps of any chunk, as a scan's selection tells it."""

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

    tensors: the localized ones, as the base holds them. spill: the file; what an earlier process put there is used.
    """

    def __init__(self, given: LocalizedCheckpoint, tensors: Sequence[TensorInfo], spill: Path, chunk: int) -> None:
        self.ones = given.ones
        self.names = [info.name for info in tensors]
        self.chunks = chunks_of([info.numel for info in tensors], chunk)
        common = common_dtype({given.stored(name).dtype for name in self.names})
        self._given = given
        self._spill = Spill(spill, len(self.chunks), common, heading=json.dumps([chunk, str(common), "given"]))

    def read(self, own: Collection[str], workers: int, advance: Callable[[int], object]) -> None:
        """Lay out the tensors named in `own`. Raises CheckpointError if mask and values do not fit."""
        of_each = chunks_by_name(self.names, self.chunks)
        chunks = {name: found for name, found in of_each.items() if name in own}

        def read(name: str) -> None:
            if not all(self._spill.done[chunk.index] for chunk in chunks[name]):
                self._read(name, chunks[name])
            advance(self._given.stored(name).nbytes)

        for_each(read, chunks, workers)

    def _read(self, name: str, chunks: Sequence[Chunk]) -> None:
        first, stored = 0, self._given.stored(name).numel
        try:
            for chunk, positions in by_chunk(self._given.iter_positions(name), chunks):
                values = self._given.read(name, first, min(len(positions), stored - first))
                first += len(positions)
                if first > stored:
                    break
                flagged = positions.astype(np.uint32) | np.uint32(SURE)
                self._spill.append(chunk.index, Candidates(flagged, values, NONE))
        except IntegrityError as error:
            raise CheckpointError(str(error)) from error
        if first != stored:
            raise CheckpointError(
                f"{self._given.label} is damaged: the mask keeps {'more' if first > stored else first} of {name}, of "
                f"which {stored} values are stored. Fetch it again."
            )

    def kept(self, chunk: Chunk) -> MaskedValues:
        """The mask and the finetuned values in one chunk."""
        found = self._spill.read(chunk.index)
        return MaskedValues(found.positions, found.values)

    def close(self) -> None:
        self._spill.close()


def by_chunk(parts: Iterable[Positions], chunks: Sequence[Chunk]) -> Iterator[tuple[Chunk, Positions]]:
    """Ascending positions in a tensor, shared out to its chunks, in order and from each one's start."""
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
