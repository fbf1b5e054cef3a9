"""The exact top k of billions of scores in one pass over them, in bounded memory.

Scores are non-negative float32, compared as their bits (their order is that of the numbers, with NaN the largest).
A bracket says where the k-th largest score may lie. The pass writes what reaches the bracket to a spill file. What
lies above the bracket is certainly among the k largest; what lies inside keeps its score too, and the exact threshold
is found among those by counting their upper and lower 16 bits. A bracket from a sample may miss the k-th largest; the
counts show this, and the pass is repeated with a bracket from a full histogram.

Ties at the threshold are kept evenly: numbered in (tensor name, flat index) order, tie j of T is kept iff
⌊(j+1)·r/T⌋ > ⌊j·r/T⌋ where r are wanted. So the mask depends only on the scores.
An element whose finetuned bits are the base's is in no mask: it carries no skill, and would pull others' values back.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hf_locstitch.artifacts.mask_source import MaskedValues
from hf_locstitch.localize.bracket import ABOVE_ALL, BELOW_ALL, BINS, Bracket, Ints, RisingBracket, histogram_bracket
from hf_locstitch.localize.candidates import Candidates
from hf_locstitch.localize.spill import Spill
from hf_locstitch.runtime.chunks import Chunk, for_each
from hf_locstitch.runtime.kernels import Bools
from hf_locstitch.runtime.processes import Processes
from hf_locstitch.runtime.settings import COMPACT_FROM, COMPACT_SLACK

COUNTED = 1 << 17  # scores counted together: with fewer, the empty bins would dominate the time


def evenly(first: int, count: int, keep: int, total: int) -> Bools:
    """Which of the ties first … first + count of `total` are kept, when `keep` of all are. Returns [count]."""
    if keep == 0 or count == 0:
        return np.zeros(count, dtype=bool)
    # Only the remainder of first·keep matters; Python integers hold the product, int64 might overflow.
    steps = (first * keep) % total + keep * np.arange(count + 1, dtype=np.int64)
    return np.diff(steps // total) > 0


@dataclass(frozen=True)
class Threshold:
    """bits: scores above are kept; of the `ties` equal to it, `keep`. ties counts a whole group of tensors."""

    bits: int
    ties: int
    keep: int


class BracketMissed(Exception):
    """The k-th largest score lies outside the bracket."""


class Selection:
    """The mask of one finetune, and its values there, read chunk by chunk.

    chunks: of the localized tensors, whose names are `names`. groups: (tensors that compete, k); brackets: one each.
    With several processes, each offers and reads its own chunks, and all settle together.
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
        self.chunks: Sequence[Chunk] = chunks
        self._processes = processes
        self._spill = spill
        self._brackets = brackets
        self._group_of = {tensor: group for group, (tensors, _) in enumerate(groups) for tensor in tensors}
        self.names: Sequence[str] = names
        self._groups = groups
        self._thresholds: list[Threshold] = []
        self._ones = [k for _, k in groups]
        self._tie_starts: npt.NDArray[np.int64] = np.zeros(len(chunks), dtype=np.int64)
        for chunk in chunks:
            if self.has(chunk):
                self._see(chunk, spill.scores(chunk.index))

    def bracket(self, chunk: Chunk) -> Bracket:
        return self._brackets[self._group_of[chunk.tensor]]

    def offer(self, chunk: Chunk, candidates: Candidates) -> None:
        """Keep what reaches the chunk's bracket."""
        self._spill.append(chunk.index, candidates)
        self._see(chunk, candidates.scores)

    def _see(self, chunk: Chunk, candidates: Ints) -> None:
        bracket = self.bracket(chunk)
        if isinstance(bracket, RisingBracket):
            bracket.see(candidates, chunk.count)

    def seen(self, groups: Sequence[int]) -> npt.NDArray[np.int64]:
        """How many candidates of each of these groups are in each bin of scores [groups, BINS], if brackets rise."""
        return np.stack([bracket.seen for bracket in self._rising(groups)])

    def raise_brackets(self, seen: npt.NDArray[np.int64], groups: Sequence[int]) -> None:
        """Take account of what all processes have seen of these groups."""
        for bracket, histogram in zip(self._rising(groups), seen, strict=True):
            bracket.rise(histogram)

    def _rising(self, groups: Sequence[int]) -> list[RisingBracket]:
        return [bracket for group in groups if isinstance(bracket := self._brackets[group], RisingBracket)]

    def compact(self) -> None:
        """Drop candidates that the raised brackets rule out, if worthwhile. Nothing may be offered meanwhile."""
        live = sum(bracket.reaching for bracket in self._brackets if isinstance(bracket, RisingBracket))
        if self._spill.size > COMPACT_FROM * self._spill.size_of(live) + COMPACT_SLACK:
            self._spill.compact(lambda index: self.bracket(self.chunks[index]).low)

    def has(self, chunk: Chunk) -> bool:
        """Whether the chunk was already offered, perhaps by an earlier process."""
        return bool(self._spill.done[chunk.index])

    @property
    def ones(self) -> int:
        """How many elements the mask keeps: k of each group, fewer where no more differ from the base."""
        return sum(self._ones)

    def close(self) -> None:
        self._spill.close()

    def settle(self, workers: int) -> None:
        """Find the thresholds after every chunk was offered. Raises BracketMissed."""
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
        self._ones[group] = sure + min(wanted, inside)
        if wanted == 0:
            return Threshold(ABOVE_ALL, 0, 0)
        if wanted >= inside:  # no more elements differ from the base
            return Threshold(BELOW_ALL, 0, 0)
        upper = self._histogram(chunks, lambda scores: scores >> 16, BINS, workers)
        bin_ = histogram_bracket(upper, wanted).low >> 16
        lower = self._histogram(chunks, lambda s: s[s >> 16 == bin_] & 0xFFFF, 1 << 16, workers)
        at_least = upper[bin_ + 1 :].sum() + np.cumsum(lower[::-1])[::-1]
        reaching = np.flatnonzero(at_least >= wanted)
        low = int(reaching[-1]) if len(reaching) else 0
        bits, ties = bin_ << 16 | low, int(lower[low])
        above = int(at_least[low]) - ties
        return Threshold(bits, ties, wanted - above)

    def _histogram(
        self, chunks: Sequence[Chunk], bin_of: Callable[[Ints], Ints], bins: int, workers: int
    ) -> npt.NDArray[np.int64]:
        """How many candidates inside the bracket fall into each bin. Returns [bins]."""
        counts = np.zeros(bins, dtype=np.int64)
        lock = threading.Lock()

        def count(batch: Sequence[int]) -> None:
            scores = np.concatenate([self._spill.scores(index) for index in batch])
            part = np.bincount(bin_of(scores), minlength=bins)
            with lock:
                np.add(counts, part, out=counts)

        indices = np.array([chunk.index for chunk in chunks if self._spill.open[chunk.index]], dtype=np.int64)
        batch_of = np.cumsum(self._spill.open[indices]) // COUNTED
        batches = np.split(indices, np.flatnonzero(np.diff(batch_of)) + 1)
        for_each(count, [batch.tolist() for batch in batches if len(batch)], workers)
        return self._processes.sum(counts)

    def _number_ties(self, threshold: Threshold, chunks: Sequence[Chunk], workers: int) -> None:
        if threshold.keep == 0:
            return
        ties = np.zeros(len(self.chunks), dtype=np.int64)

        def count(chunk: Chunk) -> None:
            ties[chunk.index] = np.count_nonzero(self._spill.scores(chunk.index) == threshold.bits)

        for_each(count, [chunk for chunk in chunks if self.has(chunk)], workers)
        ties = self._processes.sum(ties)
        ordered = sorted(chunks, key=lambda chunk: (self.names[chunk.tensor], chunk.first))
        indices = [chunk.index for chunk in ordered]
        self._tie_starts[indices] = np.cumsum(ties[indices]) - ties[indices]

    def kept(self, chunk: Chunk) -> MaskedValues:
        """The mask and the finetuned values in one chunk."""
        threshold = self._thresholds[self._group_of[chunk.tensor]]
        candidates = self._spill.read(chunk.index)
        keep = candidates.scores > threshold.bits
        if threshold.keep:
            first = int(self._tie_starts[chunk.index])
            tied = np.flatnonzero(candidates.scores == threshold.bits)
            keep[tied[evenly(first, len(tied), threshold.keep, threshold.ties)]] = True
        return MaskedValues(*candidates.among(keep))
