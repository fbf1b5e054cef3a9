"""A mask read back from its file: all of it, where processes have selected a part each."""

from __future__ import annotations

import threading
import zlib
from collections import OrderedDict
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from hf_locstitch.checkpoints.reader import CheckpointReader
from hf_locstitch.chunks import Chunk, chunks_by_name
from hf_locstitch.errors import IntegrityError
from hf_locstitch.kernels import Positions
from hf_locstitch.localize.selection import Keeper, Kept
from hf_locstitch.masks import decode_positions

HELD = 2  # tensors whose positions are kept decoded: passes of several threads ask for the same ones
NONE = np.empty(0, dtype=np.int32)


class WrittenMask:
    """path: of the mask file. part: what this process has selected. finetuned: gives the values, mapped.

    Safe to share between threads.
    """

    def __init__(self, path: Path, part: Keeper, finetuned: CheckpointReader) -> None:
        self.names, self.chunks, self.ones = part.names, part.chunks, part.ones
        self._path, self._finetuned = path, finetuned
        self._of_each = chunks_by_name(part.names, part.chunks)
        self._held: OrderedDict[str, dict[int, Positions]] = OrderedDict()
        self._lock = threading.Lock()

    def kept(self, chunk: Chunk) -> Kept:
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
        return Kept(positions, values, NONE)

    def close(self) -> None:
        """Nothing is open between calls."""

    def _decode(self, name: str) -> dict[int, Positions]:
        """Positions in each chunk of a tensor, from its start."""
        try:
            with safe_open(self._path, framework="np") as file:
                positions = decode_positions(file.get_tensor(name).tobytes())
        except (SafetensorError, zlib.error) as error:
            raise IntegrityError(f"the mask {self._path} is damaged in {name} ({error}).") from error
        chunks = self._of_each[name]
        cuts = np.searchsorted(positions, [chunk.first for chunk in chunks[1:]])
        parts = zip(chunks, np.split(positions, cuts), strict=True)
        return {chunk.index: (part - chunk.first).astype(np.int32) for chunk, part in parts}
