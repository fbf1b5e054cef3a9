"""Candidates on disk: what a pass keeps of one finetuned model until its threshold is known."""

from __future__ import annotations

import struct
import threading
import zlib
from collections.abc import Callable, Iterable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hf_locstitch.localize.candidates import Candidates
from hf_locstitch.runtime.kernels import Bools, bits
from hf_locstitch.runtime.positioned_io import PositionedFile

PLACE = struct.Struct("<QQQQ")  # chunk, offset, sure, inside
RECORD = struct.Struct("<QQQQQ")  # the same, and the CRC-32 of that and of the block


class Spill:
    """Candidates of one finetune in one file, chunk by chunk: positions uint32 whose top bit is `sure`, values, scores.

    An index beside the file says which chunks are done: a later process with the same `heading` reuses them,
    after checking each block.
    """

    def __init__(
        self, path: Path, chunks: int, dtype: np.dtype[Any], heading: str, trusted: Bools | None = None
    ) -> None:
        """trusted: the chunks [chunks] whose candidates from an earlier process may be used; all by default."""
        self._path, self.dtype, self._heading = path, dtype, heading.encode() + b"\n"
        self._lock = threading.Lock()
        self._trusted = trusted
        self.size = 0  # bytes
        self._offsets = [0] * chunks
        self.sure = np.zeros(chunks, dtype=np.int64)
        self.open = np.zeros(chunks, dtype=np.int64)
        self.done = np.zeros(chunks, dtype=bool)
        self._file = PositionedFile.open(path)
        try:
            self._take_up()
            self._index = self._index_path.open("ab", buffering=0)
        except BaseException:
            self._file.close()
            raise

    @property
    def _index_path(self) -> Path:
        return self._path.with_name(self._path.name + ".index")

    def _take_up(self) -> None:
        """Reuse what an earlier process left, as far as it is intact; start afresh if the heading differs."""
        content = self._index_path.read_bytes() if self._index_path.exists() else b""
        records = content[len(self._heading) :] if content.startswith(self._heading) else b""
        whole = len(records) // RECORD.size * RECORD.size
        length = self._file.size
        with self._index_path.open("wb") as file:
            file.write(self._heading)
            for chunk, offset, sure, inside, crc in RECORD.iter_unpack(records[:whole]):
                size = self._size(sure + inside, inside)
                if chunk >= len(self.done) or offset + size > length:
                    continue
                if self._trusted is not None and not self._trusted[chunk]:
                    continue
                place = PLACE.pack(chunk, offset, sure, inside)
                if zlib.crc32(self._file.read(size, offset), zlib.crc32(place)) == crc:
                    self._offsets[chunk], self.sure[chunk], self.open[chunk] = offset, sure, inside
                    self.done[chunk] = True
                    self.size = max(self.size, offset + size)
                    file.write(RECORD.pack(chunk, offset, sure, inside, crc))

    def size_of(self, candidates: int) -> int:
        """Bytes of so many candidates with their scores."""
        return self._size(candidates, candidates)

    def _size(self, count: int, inside: int) -> int:
        return (4 + self.dtype.itemsize) * count + 4 * inside

    def append(self, index: int, kept: Candidates) -> None:
        """Keep the candidates of chunk `index`; safe to call from several threads."""
        size = self._size(len(kept.flagged), len(kept.scores))
        with self._lock:
            offset, self.size = self.size, self.size + size
        record = self._write(self._file, offset, index, kept)
        self._index.write(record)
        self.done[index] = True

    def _write(self, file: PositionedFile, offset: int, index: int, kept: Candidates) -> bytes:
        """Returns the index's record."""
        values = bits(kept.values.astype(self.dtype, copy=False))
        inside = len(kept.scores)
        sure = len(kept.flagged) - inside
        place = zlib.crc32(PLACE.pack(index, offset, sure, inside))
        crc = _write_parts(file, offset, (kept.flagged, values, kept.scores), place)
        self._offsets[index], self.sure[index], self.open[index] = offset, sure, inside
        return RECORD.pack(index, offset, sure, inside, crc)

    def compact(self, low_of: Callable[[int], int]) -> None:
        """Drop the candidates of each chunk whose scores are below low_of(chunk). Nothing may be appended meanwhile."""
        new = self._path.with_name(self._path.name + ".new")
        new_index = self._path.with_name(self._path.name + ".index.new")
        new.unlink(missing_ok=True)
        offset = 0
        with closing(PositionedFile.open(new)) as file, new_index.open("wb") as index:
            index.write(self._heading)
            for chunk in np.flatnonzero(self.done).tolist():
                index.write(self._write(file, offset, chunk, self.read(chunk).reaching(low_of(chunk))))
                offset += self._size(int(self.sure[chunk] + self.open[chunk]), int(self.open[chunk]))
        self.close()  # not every system renames files that are open
        # If killed between the two renames, the old index does not fit the new blocks, and their checksums show it.
        new.replace(self._path)
        new_index.replace(self._index_path)
        self._file, self.size = PositionedFile.open(self._path), offset
        self._index = self._index_path.open("ab", buffering=0)

    def scores(self, index: int) -> npt.NDArray[np.int32]:
        """Of the candidates inside the bracket."""
        count, sure = int(self.open[index]), int(self.sure[index])
        start = self._offsets[index] + self._size(sure + count, 0)
        return np.frombuffer(self._file.read(4 * count, start), dtype=np.int32)

    def read(self, index: int) -> Candidates:
        """Of one chunk."""
        inside = int(self.open[index])
        count = int(self.sure[index]) + inside
        if count == 0:
            return Candidates(np.empty(0, np.uint32), np.empty(0, self.dtype), np.empty(0, np.int32))
        raw = self._file.read(self._size(count, inside), self._offsets[index])
        return Candidates(
            np.frombuffer(raw, np.uint32, count),
            np.frombuffer(raw, self.dtype, count, 4 * count),
            np.frombuffer(raw, np.int32, offset=self._size(count, 0)),
        )

    def close(self) -> None:
        self._file.close()
        self._index.close()


def _write_parts(file: PositionedFile, offset: int, parts: Iterable[npt.NDArray[Any]], crc: int) -> int:
    """Write one part after the other. crc: of what precedes them. Returns the CRC-32 of all."""
    for part in parts:
        view = np.ascontiguousarray(part).data.cast("B") if part.nbytes else memoryview(b"")
        crc = zlib.crc32(view, crc)
        file.write(view, offset)
        offset += len(view)
    return crc
