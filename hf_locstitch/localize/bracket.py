"""Where to look for the k-th largest score: from a sample, from a histogram, or raised while scores arrive."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.integer]

NON_FINITE = 0x7F800000  # bits of +inf; those of every NaN without its sign are larger
ABOVE_ALL = 1 << 31  # larger than the bits of any score
BELOW_ALL = -1
BINS = 1 << 15  # of the upper 16 bits, whose first is the sign


class Bracket(Protocol):
    """low ≤ bits < high. Scores of at least `high` are certainly kept, scores below `low` certainly not.

    A low of 0 keeps every element that differs from the base in any bit: what is not kept equals the base.
    """

    @property
    def low(self) -> int: ...

    @property
    def high(self) -> int: ...


@dataclass(frozen=True)
class FixedBracket:
    low: int
    high: int


EVERYTHING = FixedBracket(0, ABOVE_ALL)


class RisingBracket:
    """Starts with everything and rises as scores arrive: once k of them reach a bound, so does the k-th largest.

    Unlike a sampled one, it never misses and needs no look-ahead, but it keeps more candidates. n: elements in total.
    """

    high = ABOVE_ALL

    def __init__(self, k: int, n: int) -> None:
        self._k, self._unseen = k, n
        self._histogram: npt.NDArray[np.int64] | None = None
        self._lock = threading.Lock()
        self.low = NON_FINITE if k == 0 else 0
        self.reaching = 0  # candidates so far that reach `low`

    def see(self, candidates: Ints, count: int) -> None:
        """candidates: bits of those scores among `count` more elements that may be among the k largest."""
        part = np.bincount(candidates >> 16, minlength=BINS)
        with self._lock:
            if self._histogram is None:
                self._histogram = np.zeros(BINS, dtype=np.int64)
            self._histogram += part
            self._rise(self._histogram)
            self._unseen -= count
            if self._unseen == 0:
                self._histogram = None  # so that many groups do not keep theirs at once

    @property
    def seen(self) -> npt.NDArray[np.int64]:
        """Candidates so far in each bin of scores [BINS]."""
        return np.zeros(BINS, dtype=np.int64) if self._histogram is None else self._histogram

    def rise(self, seen: npt.NDArray[np.int64]) -> None:
        """Take account of all candidates [BINS] that several such brackets have seen, this one among them."""
        with self._lock:
            self._rise(seen)

    def _rise(self, seen: npt.NDArray[np.int64]) -> None:
        at_least = np.cumsum(seen[::-1])[::-1]
        if self._k and at_least[0] >= self._k:
            self.low = max(self.low, int(np.flatnonzero(at_least >= self._k)[-1]) << 16)
        self.reaching = int(self.seen[self.low >> 16 :].sum())


def sample_bracket(sample: npt.NDArray[np.int32], k: int, n: int) -> FixedBracket:
    """A bracket that rarely misses the k-th largest of n scores. sample: [runs, neighbours], spread evenly."""
    if k == 0:
        return FixedBracket(NON_FINITE, NON_FINITE)
    share, size = k / n, sample.size
    ascending = np.sort(sample, axis=None)

    def reaching(bits: int) -> tuple[float, float]:
        """Share of scores ≥ `bits`, and four standard errors of it; neighbours are correlated, runs are independent."""
        shares = (sample >= bits).mean(axis=1)
        return float(shares.mean()), float(4 * shares.std() / len(shares) ** 0.5)

    low, high = 0, ABOVE_ALL
    for factor in (1.03, 1.06, 1.12, 1.25, 1.5, 2.0, 3.0):
        rank = int(factor * share * size) + 16
        if rank >= size:
            break
        reached, error = reaching(int(ascending[-rank]))
        if reached - error >= share:
            low = int(ascending[-rank])
            break
    for factor in (0.97, 0.94, 0.88, 0.75, 0.5, 0.25):
        rank = int(factor * share * size) - 16
        if rank <= 0:
            break
        reached, error = reaching(int(ascending[-rank]) + 1)
        if reached + error <= share:
            high = int(ascending[-rank]) + 1
            break
    return FixedBracket(low, high)


def histogram_bracket(histogram: Ints, k: int) -> FixedBracket:
    """The bin that holds the k-th largest of all scores. histogram: of their upper 16 bits [BINS]."""
    at_least = np.cumsum(histogram[::-1])[::-1]
    reaching = np.flatnonzero(at_least >= k)
    bin_ = int(reaching[-1]) if len(reaching) else 0
    return FixedBracket(bin_ << 16, bin_ + 1 << 16)
