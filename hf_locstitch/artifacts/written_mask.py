"""A mask read back from its file: all of it, where processes have selected a part each."""

from __future__ import annotations

import threading
from collections import OrderedDict
from pathlib import Path

import numpy as np

from hf_locstitch.artifacts.mask_file import MaskFile
from hf_locstitch.artifacts.mask_source import MaskedValues, MaskSource
from hf_locstitch.checkpoints.reader import CheckpointReader
from hf_locstitch.runtime.chunks import Chunk, chunks_by_name
from hf_locstitch.runtime.kernels import Positions

HELD = 2  # tensors whose positions are kept decoded: passes of several threads ask for the same ones


class WrittenMask:
    """path: of the mask file. part: what this process has selected. finetuned: gives the values, mapped.

    Safe to share between threads.
    """

    def __init__(self, path: Path, part: MaskSource, finetuned: CheckpointReader) -> None:
        self.names, self.chunks, self.ones = part.names, part.chunks, part.ones
        self._mask, self._finetuned = MaskFile(path), finetuned
        self._of_each = chunks_by_name(part.names, part.chunks)
        self._held: OrderedDict[str, dict[int, Positions]] = OrderedDict()
        self._lock = threading.Lock()

    def kept(self, chunk: Chunk) -> MaskedValues:
        """The mask and the finetuned values in one chunk. Raises IntegrityError."""
        name = self.names[chunk.tensor]
        with self._lock:
            if name not in self._held:
                self._held[name] = self._decode(name)
                while len(self._held) > HELD:
                    self._held.popitem(last=False)
            positions = self._held[name][chunk.index]
        values = self._finetuned.values(name, chunk.first, chunk.count)[positions]
        self._finetuned.release(name, chunk.first, chunk.count)
        return MaskedValues(positions, values)

    def close(self) -> None:
        self._mask.close()

    def _decode(self, name: str) -> dict[int, Positions]:
        """Positions in each chunk of a tensor, from its start."""
        positions = self._mask.positions(name)
        chunks = self._of_each[name]
        cuts = np.searchsorted(positions, [chunk.first for chunk in chunks[1:]])
        parts = zip(chunks, np.split(positions, cuts), strict=True)
        return {chunk.index: (part - chunk.first).astype(np.int32) for chunk, part in parts}
