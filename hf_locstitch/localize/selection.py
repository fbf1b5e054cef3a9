"""The exact top k of billions of scores in one pass over them, in bounded memory.

Scores are non-negative float32, compared as their bits (their order is that of the numbers, and of NaN as the
largest). The pass keeps the *candidates*, all that reach a bound estimated from a sample, in a spill file; the
threshold is then the exact k-th largest, found by counting the candidates' upper and lower 16 bits. If the
bound was too high, fewer than k were kept: that is noticed, and the pass is made again without a bound.

Ties at the threshold are kept evenly: numbered in (tensor name, flat index) order, tie j of T is kept iff
⌊(j+1)·r/T⌋ > ⌊j·r/T⌋ where r are wanted. So the mask depends on nothing but the scores.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from hf_locstitch.chunks import Chunk, for_each

Ints = npt.NDArray[np.integer]
Bools = npt.NDArray[np.bool_]

NON_FINITE = 0x7F800000  # bits of +inf; those of every NaN without its sign are larger
NOTHING = 0x7FFFFFFF + 1  # a threshold that no score reaches


def evenly(first: int, count: int, keep: int, total: int) -> Bools:
    """Which of the ties first … first + count of `total` are kept, when `keep` of all are. Returns [count]."""
    if keep == 0 or count == 0:
        return np.zeros(count, dtype=bool)
    # Only the remainder of first·keep matters; Python's integers hold the product, int64 might not.
    steps = (first * keep) % total + keep * np.arange(count + 1, dtype=np.int64)
    return np.diff(steps // total) > 0


def sample_bound(sample: Ints, k: int, n: int) -> int:
    """A score's bits that about k of n elements, and hardly fewer, reach. 0 where the sample cannot tell."""
    expected = k / n * len(sample)
    rank = int(1.1 * expected + 8 * expected**0.5 + 64)  # neighbours are alike, so the margin is wide
    if rank >= len(sample):
        return 0
    return int(np.partition(sample, len(sample) - rank)[len(sample) - rank])


@dataclass(frozen=True)
class Kept:
    """What one mask keeps of one chunk. positions: [m] ascending, from the chunk's start; values: [m] in the
    finetuned dtype. unchanged: [u] further positions kept, where the finetuned value is the base's, bit for bit.
    """

    positions: npt.NDArray[np.int64]
    values: torch.Tensor
    unchanged: npt.NDArray[np.int64]

    def all_positions(self) -> npt.NDArray[np.int64]:
        return np.union1d(self.positions, self.unchanged) if len(self.unchanged) else self.positions


@dataclass(frozen=True)
class Threshold:
    """bits: scores above are kept; of the `ties` equal to it, `keep`. ties counts a whole group of tensors."""

    bits: int
    ties: int
    keep: int


class Spill:
    """Candidates of one finetune, chunk by chunk, in one file: positions uint32, scores int32, values."""

    def __init__(self, path: Path, chunks: int, dtype: torch.dtype) -> None:
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        self._end = 0
        self._lock = threading.Lock()
        self._dtype = dtype
        self._offsets = [0] * chunks
        self.counts = np.zeros(chunks, dtype=np.int64)
        self.largest = np.zeros(chunks, dtype=np.int32)  # score in each chunk

    def append(self, index: int, positions: Ints, scores: Ints, values: torch.Tensor) -> None:
        """Keep the candidates of chunk `index`. All [m]; safe to call from several threads."""
        count = len(positions)
        if count == 0:
            return
        parts = [
            positions.astype(np.uint32).data,
            scores.data,
            values.to(self._dtype).view(torch.uint8).numpy().data,
        ]
        size = sum(part.nbytes for part in parts)
        with self._lock:
            offset, self._end = self._end, self._end + size
        if os.pwritev(self._fd, parts, offset) != size:
            raise OSError(errno.ENOSPC, "no space left on device")
        self._offsets[index], self.counts[index], self.largest[index] = offset, count, scores.max()

    def scores(self, index: int) -> npt.NDArray[np.int32]:
        count = int(self.counts[index])
        return np.frombuffer(os.pread(self._fd, 4 * count, self._offsets[index] + 4 * count), dtype=np.int32)

    def read(self, index: int) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.int32], torch.Tensor]:
        count = int(self.counts[index])
        if count == 0:
            return np.empty(0, np.uint32), np.empty(0, np.int32), torch.empty(0, dtype=self._dtype)
        raw = bytearray(os.pread(self._fd, (8 + self._dtype.itemsize) * count, self._offsets[index]))
        return (
            np.frombuffer(raw, np.uint32, count),
            np.frombuffer(raw, np.int32, count, 4 * count),
            torch.frombuffer(raw, dtype=self._dtype, count=count, offset=8 * count),
        )

    def close(self) -> None:
        os.close(self._fd)


class BoundTooHigh(Exception):
    """Fewer candidates than k were kept: the pass has to be made again without a bound."""


class Selection:
    """The mask of one finetune, and its values there, read chunk by chunk.

    chunks: of the localized tensors. groups: (tensors that compete, k). bounds: one a group; a bound of 0 keeps
    every element that differs from the base in any bit, so what is not kept equals the base and scores 0.
    """

    def __init__(
        self,
        spill: Spill,
        names: Sequence[str],
        chunks: Sequence[Chunk],
        groups: Sequence[tuple[Sequence[int], int]],
        bounds: Sequence[int],
    ) -> None:
        self.spill = spill
        self.chunks = chunks
        self.bounds = bounds
        self._group_of = {tensor: group for group, (tensors, _) in enumerate(groups) for tensor in tensors}
        self._names = names
        self._groups = groups
        self._thresholds: list[Threshold] = []
        self._tie_starts: npt.NDArray[np.int64] = np.zeros(len(chunks), dtype=np.int64)

    def offer(self, chunk: Chunk, scores: npt.NDArray[np.int32], changed: Bools | None, values: torch.Tensor) -> None:
        """Keep a chunk's candidates. scores: bits [count]; values: [count].

        changed: where values differ from the base [count], needed if the bound is 0.
        """
        bound = self.bound(chunk)
        positions = np.flatnonzero(scores >= bound) if changed is None else np.flatnonzero(changed)
        self.spill.append(chunk.index, positions, scores[positions], values[torch.from_numpy(positions)])

    def bound(self, chunk: Chunk) -> int:
        return self.bounds[self._group_of[chunk.tensor]]

    def settle(self, workers: int) -> None:
        """Find the thresholds once every chunk was offered. Raises BoundTooHigh."""
        of_group: list[list[Chunk]] = [[] for _ in self._groups]
        for chunk in self.chunks:
            of_group[self._group_of[chunk.tensor]].append(chunk)
        self._thresholds = [self._threshold(group, chunks, workers) for group, chunks in enumerate(of_group)]
        for threshold, chunks in zip(self._thresholds, of_group, strict=True):
            self._number_ties(threshold, chunks, workers)

    def _threshold(self, group: int, chunks: Sequence[Chunk], workers: int) -> Threshold:
        k, bound = self._groups[group][1], self.bounds[group]
        if k == 0:
            return Threshold(NOTHING, 0, 0)
        upper = self._histogram(chunks, lambda scores: scores >> 16, 1 << 15, workers)
        if upper.sum() < k and bound > 0:
            raise BoundTooHigh
        at_least = np.cumsum(upper[::-1])[::-1]  # candidates in this bin or above
        reaching = np.flatnonzero(at_least >= k)
        bin_ = int(reaching[-1]) if len(reaching) else 0
        lower = self._histogram(chunks, lambda s: s[s >> 16 == bin_] & 0xFFFF, 1 << 16, workers)
        at_least = at_least[bin_] - upper[bin_] + np.cumsum(lower[::-1])[::-1]  # the same for each of its scores
        reaching = np.flatnonzero(at_least >= k)
        low = int(reaching[-1]) if len(reaching) else 0
        bits, ties = bin_ << 16 | low, int(lower[low])
        above = int(at_least[low]) - ties
        if bits == 0:  # elements that are not in the spill score 0 too
            ties = sum(chunk.count for chunk in chunks) - above
        return Threshold(bits, ties, k - above)

    def _histogram(
        self, chunks: Sequence[Chunk], bin_of: Callable[[Ints], Ints], bins: int, workers: int
    ) -> npt.NDArray[np.int64]:
        """How many candidates fall into each bin. Returns [bins]."""
        counts = np.zeros(bins, dtype=np.int64)
        lock = threading.Lock()

        def count(chunk: Chunk) -> None:
            if self.spill.counts[chunk.index]:
                part = np.bincount(bin_of(self.spill.scores(chunk.index)), minlength=bins)
                with lock:
                    np.add(counts, part, out=counts)

        for_each(count, chunks, workers)
        return counts

    def _number_ties(self, threshold: Threshold, chunks: Sequence[Chunk], workers: int) -> None:
        if threshold.keep == 0:
            return
        ties = np.zeros(len(self.chunks), dtype=np.int64)

        def count(chunk: Chunk) -> None:
            scores = self.spill.scores(chunk.index)
            if threshold.bits:
                ties[chunk.index] = np.count_nonzero(scores == threshold.bits)
            else:
                ties[chunk.index] = chunk.count - np.count_nonzero(scores)

        for_each(count, chunks, workers)
        ordered = sorted(chunks, key=lambda chunk: (self._names[chunk.tensor], chunk.first))
        indices = [chunk.index for chunk in ordered]
        self._tie_starts[indices] = np.cumsum(ties[indices]) - ties[indices]

    def kept(self, chunk: Chunk) -> Kept:
        """The mask and the finetuned values in one chunk."""
        threshold = self._thresholds[self._group_of[chunk.tensor]]
        positions, scores, values = self.spill.read(chunk.index)
        keep = scores > threshold.bits
        unchanged = np.empty(0, dtype=np.int64)
        if threshold.keep:
            first = int(self._tie_starts[chunk.index])
            if threshold.bits:
                tied = np.flatnonzero(scores == threshold.bits)
            else:  # every element without a score is tied, in the spill or not
                scored = np.zeros(chunk.count, dtype=bool)
                scored[positions] = scores > 0
                tied = np.flatnonzero(~scored)
            chosen = tied[evenly(first, len(tied), threshold.keep, threshold.ties)]
            if threshold.bits:
                keep[chosen] = True
            else:
                in_spill = np.isin(positions, chosen)
                keep |= in_spill
                unchanged = np.setdiff1d(chosen, positions[in_spill], assume_unique=True)
        where = np.flatnonzero(keep)
        return Kept(positions[where].astype(np.int64), values[torch.from_numpy(where)], unchanged)
