"""Which elements of a chunk may be in a mask: those that reach a bracket."""

from __future__ import annotations

import threading
from dataclasses import dataclass

import numpy as np

from hf_locstitch.localize.bracket import Bracket
from hf_locstitch.runtime import kernels
from hf_locstitch.runtime.dtypes import Values
from hf_locstitch.runtime.kernels import KIND, SURE, Bools, Flagged, Positions, Scores, bits


@dataclass(frozen=True)
class Candidates:
    """What may be kept of one chunk. flagged: positions [m], ascending; those above the bracket have the flag SURE.

    values: finetuned [m]. scores: bits of the scores of the others, in their order.
    """

    flagged: Flagged
    values: Values
    scores: Scores

    @property
    def positions(self) -> Positions:
        return (self.flagged & np.uint32(SURE - 1)).view(np.int32)

    @property
    def sure(self) -> Bools:
        return self.flagged >= SURE

    def among(self, wanted: Bools) -> tuple[Positions, Values]:
        """Positions and values of the sure ones and, of the others, of those in `wanted` (in the order of scores)."""
        size = len(self.flagged) + 1
        positions, values = np.empty(size, np.int32), np.empty(size, self.values.dtype)
        count = kernels.among(self.flagged, bits(self.values), wanted, positions, bits(values))
        return positions[:count], values[:count]

    def reaching(self, low: int) -> Candidates:
        """Those that are sure or whose scores are at least `low`."""
        enough = self.scores >= low
        chosen = self.sure
        chosen[~chosen] = enough
        places = np.flatnonzero(chosen)  # several times faster to select by than the booleans themselves
        return Candidates(self.flagged[places], self.values[places], self.scores[np.flatnonzero(enough)])


def magnitude_scores(finetuned: Values, base: Values) -> Scores:
    """Bits of |finetuned − base| in float32. finetuned, base: any floats [n]. Returns [n]."""
    scores = np.empty(len(base), np.int32)
    kernels.sizes(bits(finetuned), KIND[finetuned.dtype], bits(base), KIND[base.dtype], scores)
    return scores


class CandidateFinder:
    """Finds the candidates of one chunk after another; one instance serves many threads. chunk: the largest n."""

    def __init__(self, chunk: int) -> None:
        self._chunk = chunk
        self._local = threading.local()

    def begin(self, base: Values) -> None:
        local = self._local
        if not hasattr(local, "found"):
            size = self._chunk + 1
            local.found = np.empty(size, np.uint32), np.empty(size, np.float64), np.empty(size, np.int32)
        local.base = base

    def find(self, finetuned: Values, bracket: Bracket) -> tuple[Candidates, int]:
        base = self._local.base
        if bracket.low == 0:
            return self.reaching(magnitude_scores(finetuned, base), finetuned, bracket)
        found = self._buffers(finetuned)
        finetuned_bits, base_bits = bits(finetuned), bits(base)
        counts = kernels.candidates(
            finetuned_bits, KIND[finetuned.dtype], base_bits, KIND[base.dtype], bracket.low, bracket.high, found
        )
        return _cut(found, finetuned, counts)

    def reaching(self, scores: Scores, finetuned: Values, bracket: Bracket) -> tuple[Candidates, int]:
        """As `find`, for given scores [n]."""
        if bracket.low == 0:
            reach = differing(finetuned, self._local.base)
            return candidates_at(np.flatnonzero(reach), scores[reach], finetuned, bracket.high)
        found = self._buffers(finetuned)
        counts = kernels.reaching(scores, bracket.low, bracket.high, bits(finetuned), found)
        return _cut(found, finetuned, counts)

    def _buffers(self, finetuned: Values) -> kernels.Found:
        flagged, chosen, inside = self._local.found
        return flagged, chosen.view(bits(finetuned).dtype), inside


def _cut(found: kernels.Found, finetuned: Values, counts: kernels.Ints) -> tuple[Candidates, int]:
    """The candidates that a kernel found. counts: as kernels.reaching returns them."""
    flagged, chosen, inside = found
    count, open_, largest = counts.tolist()
    return Candidates(flagged[:count], chosen[:count].view(finetuned.dtype), inside[:open_]), largest


def candidates_at(positions: np.ndarray, scores: Scores, finetuned: Values, high: int) -> tuple[Candidates, int]:
    """The candidates at `positions` [m], whose scores [m] reach the bracket, and the largest score."""
    sure = scores >= high
    flagged = positions.astype(np.uint32)
    flagged[sure] |= np.uint32(SURE)
    return Candidates(flagged, finetuned[positions], scores[~sure]), int(scores.max(initial=0))


def differing(finetuned: Values, base: Values) -> Bools:
    """Where two arrays [n] differ in any bit, in float64 if their dtypes differ; 0.0 and −0.0 do. Returns [n]."""
    if finetuned.dtype != base.dtype:
        finetuned, base = finetuned.astype(np.float64), base.astype(np.float64)
    return bits(finetuned) != bits(base)
