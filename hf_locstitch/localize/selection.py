"""The exact top k of billions of scores in one pass over them, in bounded memory.

Scores are non-negative float32, compared as their bits (their order is that of the numbers, with NaN the largest).
A sample brackets the k-th largest score beforehand. The pass keeps what reaches the bracket in a spill file: what
lies above it surely is among the k largest, what lies inside keeps its score too, and the exact threshold is found
among those by counting their upper and lower 16 bits. If the k-th largest lies outside the bracket, the counts
show it, and the pass is made again with a bracket from a full histogram.

Ties at the threshold are kept evenly: numbered in (tensor name, flat index) order, tie j of T is kept iff
⌊(j+1)·r/T⌋ > ⌊j·r/T⌋ where r are wanted. So the mask depends on nothing but the scores.
"""

from __future__ import annotations

import errno
import os
import struct
import threading
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from hf_locstitch.chunks import Chunk, for_each
from hf_locstitch.processes import Processes

Ints = npt.NDArray[np.integer]
Bools = npt.NDArray[np.bool_]

NON_FINITE = 0x7F800000  # bits of +inf; those of every NaN without its sign are larger
ABOVE_ALL = 1 << 31  # larger than the bits of any score
BINS = 1 << 15  # of the upper 16 bits, whose first is the sign


def evenly(first: int, count: int, keep: int, total: int) -> Bools:
    """Which of the ties first … first + count of `total` are kept, when `keep` of all are. Returns [count]."""
    if keep == 0 or count == 0:
        return np.zeros(count, dtype=bool)
    # Only the remainder of first·keep matters; Python's integers hold the product, int64 might not.
    steps = (first * keep) % total + keep * np.arange(count + 1, dtype=np.int64)
    return np.diff(steps // total) > 0


@dataclass(frozen=True)
class Bracket:
    """Where the k-th largest score is looked for: low ≤ bits < high. Scores from `high` on are kept surely.

    A low of 0 keeps every element that differs from the base in any bit: what is not kept equals the base.
    """

    low: int
    high: int


EVERYTHING = Bracket(0, ABOVE_ALL)


def sample_bracket(sample: npt.NDArray[np.int32], k: int, n: int) -> Bracket:
    """A bracket that hardly misses the k-th largest of n scores. sample: [runs, neighbours], spread evenly."""
    if k == 0:
        return Bracket(NON_FINITE, NON_FINITE)
    share, size = k / n, sample.size
    ascending = np.sort(sample, axis=None)

    def reaching(bits: int) -> tuple[float, float]:
        """Share of scores from `bits` on, and four standard errors of it; neighbours are alike, runs are not."""
        shares = (sample >= bits).mean(axis=1)
        return float(shares.mean()), float(4 * shares.std() / len(shares) ** 0.5)

    low, high = 0, ABOVE_ALL
    for factor in (1.03, 1.06, 1.12, 1.25, 1.5, 2.0, 3.0):
        rank = int(factor * share * size) + 16
        if rank >= size:
            break
        found, error = reaching(int(ascending[-rank]))
        if found - error >= share:
            low = int(ascending[-rank])
            break
    for factor in (0.97, 0.94, 0.88, 0.75, 0.5, 0.25):
        rank = int(factor * share * size) - 16
        if rank <= 0:
            break
        found, error = reaching(int(ascending[-rank]) + 1)
        if found + error <= share:
            high = int(ascending[-rank]) + 1
            break
    return Bracket(low, high)


def histogram_bracket(histogram: Ints, k: int) -> Bracket:
    """The bin that holds the k-th largest of all scores. histogram: of their upper 16 bits [BINS]."""
    at_least = np.cumsum(histogram[::-1])[::-1]
    reaching = np.flatnonzero(at_least >= k)
    bin_ = int(reaching[-1]) if len(reaching) else 0
    return Bracket(bin_ << 16, bin_ + 1 << 16)


@dataclass(frozen=True)
class Kept:
    """What one mask keeps of one chunk, in no particular order.

    positions: [m], from the chunk's start; values: [m] in the finetuned dtype. unchanged: [u] further positions,
    where the finetuned value is the base's, bit for bit.
    """

    positions: npt.NDArray[np.int64]
    values: torch.Tensor
    unchanged: npt.NDArray[np.int64]

    def ascending(self) -> npt.NDArray[np.int64]:
        """All positions, sorted."""
        return np.sort(np.concatenate([self.positions, self.unchanged]), kind="stable")  # merges sorted runs


@dataclass(frozen=True)
class Threshold:
    """bits: scores above are kept; of the `ties` equal to it, `keep`. ties counts a whole group of tensors."""

    bits: int
    ties: int
    keep: int


RECORD = struct.Struct("<QQQQQ")  # chunk, offset, sure, inside, CRC-32 of the block


class Spill:
    """Candidates of one finetune in one file, chunk by chunk: positions uint32, values, scores int32.

    First come those whose scores are above the bracket (their scores are not stored), then those inside. An index
    beside the file says which chunks are done: a later process with the same `heading` goes on with them, each
    block checked first.
    """

    def __init__(self, path: Path, chunks: int, dtype: torch.dtype, heading: str) -> None:
        self._dtype = dtype
        self._lock = threading.Lock()
        self._end = 0
        self._offsets = [0] * chunks
        self.sure = np.zeros(chunks, dtype=np.int64)
        self.open = np.zeros(chunks, dtype=np.int64)
        self.done = np.zeros(chunks, dtype=bool)
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        index = path.with_name(path.name + ".index")
        self._take_up(index, heading.encode() + b"\n")
        self._index = index.open("ab", buffering=0)

    def _take_up(self, index: Path, heading: bytes) -> None:
        """Believe what an earlier process left as far as it is whole; begin anew where it is another's."""
        found = index.read_bytes() if index.exists() else b""
        records = found[len(heading) :] if found.startswith(heading) else b""
        whole = len(records) // RECORD.size * RECORD.size
        with index.open("wb") as file:
            file.write(heading)
            for chunk, offset, sure, inside, crc in RECORD.iter_unpack(records[:whole]):
                size = self._size(sure + inside, inside)
                if zlib.crc32(os.pread(self._fd, size, offset)) == crc:
                    self._offsets[chunk], self.sure[chunk], self.open[chunk] = offset, sure, inside
                    self.done[chunk] = True
                    self._end = max(self._end, offset + size)
                    file.write(RECORD.pack(chunk, offset, sure, inside, crc))

    def _size(self, count: int, inside: int) -> int:
        return (4 + self._dtype.itemsize) * count + 4 * inside

    def append(self, index: int, sure: Ints, inside: Ints, scores: Ints, values: torch.Tensor) -> None:
        """Keep the candidates of chunk `index`; safe to call from several threads.

        sure, inside: positions; scores: of those inside; values: of the whole chunk.
        """
        positions = np.concatenate([sure, inside])
        chosen = values[torch.from_numpy(positions)].to(self._dtype)
        parts = [positions.astype(np.uint32), chosen.view(torch.uint8).numpy(), scores]
        parts = [part.data for part in parts if part.nbytes]
        size = self._size(len(positions), len(inside))
        with self._lock:
            offset, self._end = self._end, self._end + size
        if parts and os.pwritev(self._fd, parts, offset) != size:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        crc = 0
        for part in parts:
            crc = zlib.crc32(part, crc)
        self._offsets[index], self.sure[index], self.open[index] = offset, len(sure), len(inside)
        self._index.write(RECORD.pack(index, offset, len(sure), len(inside), crc))
        self.done[index] = True

    def scores(self, index: int) -> npt.NDArray[np.int32]:
        """Of the candidates inside the bracket."""
        count, sure = int(self.open[index]), int(self.sure[index])
        start = self._offsets[index] + self._size(sure + count, 0)
        return np.frombuffer(os.pread(self._fd, 4 * count, start), dtype=np.int32)

    def read(self, index: int) -> tuple[npt.NDArray[np.uint32], torch.Tensor, npt.NDArray[np.int32]]:
        """Positions and values of all candidates, scores of those inside the bracket, which come last."""
        inside = int(self.open[index])
        count = int(self.sure[index]) + inside
        if count == 0:
            return np.empty(0, np.uint32), torch.empty(0, dtype=self._dtype), np.empty(0, np.int32)
        raw = bytearray(os.pread(self._fd, self._size(count, inside), self._offsets[index]))
        return (
            np.frombuffer(raw, np.uint32, count),
            torch.frombuffer(raw, dtype=self._dtype, count=count, offset=4 * count),
            np.frombuffer(raw, np.int32, offset=self._size(count, 0)),
        )

    def close(self) -> None:
        os.close(self._fd)
        self._index.close()


class BracketMissed(Exception):
    """The k-th largest score lies outside the bracket."""


class Selection:
    """The mask of one finetune, and its values there, read chunk by chunk.

    chunks: of the localized tensors, whose names are `names`. groups: (tensors that compete, k); brackets: one each.
    Under several processes each offers and reads the chunks of its own, and all settle together.
    """

    def __init__(
        self,
        spill: Spill,
        names: Sequence[str],
        chunks: Sequence[Chunk],
        groups: Sequence[tuple[Sequence[int], int]],
        brackets: Sequence[Bracket],
        processes: Processes,
    ) -> None:
        self.chunks = chunks
        self._processes = processes
        self._spill = spill
        self._brackets = brackets
        self._group_of = {tensor: group for group, (tensors, _) in enumerate(groups) for tensor in tensors}
        self.names = names
        self._groups = groups
        self._thresholds: list[Threshold] = []
        self._tie_starts: npt.NDArray[np.int64] = np.zeros(len(chunks), dtype=np.int64)

    def bracket(self, chunk: Chunk) -> Bracket:
        return self._brackets[self._group_of[chunk.tensor]]

    def offer(self, chunk: Chunk, scores: npt.NDArray[np.int32], changed: Bools | None, values: torch.Tensor) -> int:
        """Keep a chunk's candidates. scores: bits [count]; values: [count]. Returns the largest candidate score.

        changed: where values differ from the base [count], needed if the bracket begins at 0.
        """
        bracket = self.bracket(chunk)
        positions = np.flatnonzero(scores >= bracket.low) if changed is None else np.flatnonzero(changed)
        found = scores[positions]
        inside = found < bracket.high
        self._spill.append(chunk.index, positions[~inside], positions[inside], found[inside], values)
        return int(found.max(initial=0))

    def has(self, chunk: Chunk) -> bool:
        """Whether the chunk was offered already, perhaps by an earlier process."""
        return bool(self._spill.done[chunk.index])

    def close(self) -> None:
        self._spill.close()

    def settle(self, workers: int) -> None:
        """Find the thresholds once every chunk was offered. Raises BracketMissed."""
        of_group: list[list[Chunk]] = [[] for _ in self._groups]
        for chunk in self.chunks:
            of_group[self._group_of[chunk.tensor]].append(chunk)
        self._thresholds = [self._threshold(group, chunks, workers) for group, chunks in enumerate(of_group)]
        for threshold, chunks in zip(self._thresholds, of_group, strict=True):
            self._number_ties(threshold, chunks, workers)

    def _threshold(self, group: int, chunks: Sequence[Chunk], workers: int) -> Threshold:
        k, bracket = self._groups[group][1], self._brackets[group]
        indices = [chunk.index for chunk in chunks]
        own = np.array([self._spill.sure[indices].sum(), self._spill.open[indices].sum()])
        sure, inside = (int(count) for count in self._processes.sum(own))
        wanted = k - sure  # of those inside
        if wanted < 0 or (wanted > inside and bracket.low > 0):
            raise BracketMissed
        if wanted == 0:
            return Threshold(ABOVE_ALL, 0, 0)
        upper = self._histogram(chunks, lambda scores: scores >> 16, BINS, workers)
        bin_ = histogram_bracket(upper, wanted).low >> 16
        lower = self._histogram(chunks, lambda s: s[s >> 16 == bin_] & 0xFFFF, 1 << 16, workers)
        at_least = upper[bin_ + 1 :].sum() + np.cumsum(lower[::-1])[::-1]
        reaching = np.flatnonzero(at_least >= wanted)
        low = int(reaching[-1]) if len(reaching) else 0
        bits, ties = bin_ << 16 | low, int(lower[low])
        above = int(at_least[low]) - ties
        if bits == 0:  # elements that are not in the spill score 0 too
            ties = sum(chunk.count for chunk in chunks) - sure - above
        return Threshold(bits, ties, wanted - above)

    def _histogram(
        self, chunks: Sequence[Chunk], bin_of: Callable[[Ints], Ints], bins: int, workers: int
    ) -> npt.NDArray[np.int64]:
        """How many candidates inside the bracket fall into each bin. Returns [bins]."""
        counts = np.zeros(bins, dtype=np.int64)
        lock = threading.Lock()

        def count(chunk: Chunk) -> None:
            part = np.bincount(bin_of(self._spill.scores(chunk.index)), minlength=bins)
            with lock:
                np.add(counts, part, out=counts)

        for_each(count, [chunk for chunk in chunks if self._spill.open[chunk.index]], workers)
        return self._processes.sum(counts)

    def _number_ties(self, threshold: Threshold, chunks: Sequence[Chunk], workers: int) -> None:
        if threshold.keep == 0:
            return
        ties = np.zeros(len(self.chunks), dtype=np.int64)

        def count(chunk: Chunk) -> None:
            scores = self._spill.scores(chunk.index)
            if threshold.bits:
                ties[chunk.index] = np.count_nonzero(scores == threshold.bits)
            else:
                ties[chunk.index] = chunk.count - int(self._spill.sure[chunk.index]) - np.count_nonzero(scores)

        for_each(count, [chunk for chunk in chunks if self.has(chunk)], workers)
        ties = self._processes.sum(ties)
        ordered = sorted(chunks, key=lambda chunk: (self.names[chunk.tensor], chunk.first))
        indices = [chunk.index for chunk in ordered]
        self._tie_starts[indices] = np.cumsum(ties[indices]) - ties[indices]

    def kept(self, chunk: Chunk) -> Kept:
        """The mask and the finetuned values in one chunk."""
        threshold = self._thresholds[self._group_of[chunk.tensor]]
        positions, values, scores = self._spill.read(chunk.index)
        sure = len(positions) - len(scores)
        keep = scores > threshold.bits  # of those inside the bracket
        unchanged = np.empty(0, dtype=np.int64)
        if threshold.keep:
            first = int(self._tie_starts[chunk.index])
            if threshold.bits:
                tied = np.flatnonzero(scores == threshold.bits)
                keep[tied[evenly(first, len(tied), threshold.keep, threshold.ties)]] = True
            else:  # every element without a score is tied, in the spill or not
                scored = np.zeros(chunk.count, dtype=bool)
                scored[positions[:sure]] = True
                scored[positions[sure:][keep]] = True
                tied = np.flatnonzero(~scored)
                chosen = tied[evenly(first, len(tied), threshold.keep, threshold.ties)]
                in_spill = np.isin(positions[sure:], chosen)
                keep |= in_spill
                unchanged = np.setdiff1d(chosen, positions[sure:][in_spill], assume_unique=True)
        where = np.flatnonzero(keep) + sure
        return Kept(
            np.concatenate([positions[:sure], positions[where]]).astype(np.int64),
            torch.cat([values[:sure], values[torch.from_numpy(where)]]),
            unchanged,
        )
