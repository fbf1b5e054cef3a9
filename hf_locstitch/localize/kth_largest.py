"""The exact k-th largest of the numbers in several tensors, found by counting: no copy, no sort.

Numbers are compared as unsigned integers of the same order (`sortable`). Ties at the threshold are kept evenly, as
in selection.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import numpy.typing as npt
import torch

from hf_locstitch.localize.selection import Threshold, evenly

Keys = npt.NDArray[np.uint32]
Counts = npt.NDArray[np.int64]
SIGN = np.uint32(1 << 31)
FINE = 11  # low bits of a float32, worth less than one part in 4096


def sortable(values: torch.Tensor) -> Keys:
    """Integers in the order of float32 `values` [n]; −0 counts as 0. Returns uint32 [n]."""
    bits = (values.detach().float().cpu() + 0.0).numpy().view(np.uint32)
    return np.where(bits & SIGN, ~bits, bits | SIGN)


def kth_largest(
    keys: Callable[[], Iterable[Keys]], k: int, add_up: Callable[[Counts], Counts] = lambda counts: counts
) -> Threshold:
    """The threshold of the k largest keys. keys: iterates over all of them at every call. k: 0 … their number.

    add_up: counts of one process -> of all processes, where each has its own keys.
    """
    if k == 0:
        return Threshold((1 << 32) - 1, 0, 0)
    upper = np.zeros(1 << 16, dtype=np.int64)
    for part in keys():
        upper += np.bincount(part >> np.uint32(16), minlength=1 << 16)
    upper = add_up(upper)
    high, above = _last_reaching(upper, k)
    lower = np.zeros(1 << 16, dtype=np.int64)
    for part in keys():
        lower += np.bincount(part[part >> np.uint32(16) == high] & np.uint32(0xFFFF), minlength=1 << 16)
    lower = add_up(lower)
    low, above = _last_reaching(lower, k - above, above)
    return Threshold(high << 16 | low, int(lower[low]), k - above)


def _last_reaching(histogram: Counts, wanted: int, before: int = 0) -> tuple[int, int]:
    """The highest bin that, together with all above it, holds `wanted`, and how many lie above it (plus `before`)."""
    at_least = np.cumsum(histogram[::-1])[::-1]
    bin_ = int(np.flatnonzero(at_least >= wanted)[-1])
    return bin_, before + int(at_least[bin_] - histogram[bin_])


class Sizes:
    """A histogram of magnitudes, to one part in 4096, so that the numbers need not be read again."""

    def __init__(self) -> None:
        self._counts = np.zeros(1 << (31 - FINE), dtype=np.int64)

    def add(self, values: torch.Tensor) -> None:
        """values: [n], real."""
        size = (sortable(values.abs()) & ~SIGN) >> np.uint32(FINE)
        self._counts += np.bincount(size, minlength=len(self._counts))

    def kth_largest(self, k: int, add_up: Callable[[Counts], Counts] | None = None) -> float:
        """The k-th largest magnitude, rounded down by at most one part in 4096; 0 if there are fewer.

        k ≥ 1. add_up: as kth_largest's.
        """
        counts = add_up(self._counts) if add_up else self._counts
        reaching = np.flatnonzero(np.cumsum(counts[::-1])[::-1] >= k)
        return float(np.array(reaching[-1] << FINE, dtype=np.uint32).view(np.float32)) if len(reaching) else 0.0


class TopK:
    """Selects the k largest elements, one tensor after another. Ties are numbered in the order of the calls."""

    def __init__(self, threshold: Threshold) -> None:
        self._threshold = threshold
        self._seen = 0

    def keep(self, keys: Keys) -> npt.NDArray[np.bool_]:
        """keys: of the next elements [n]. Returns [n]."""
        threshold = self._threshold
        kept = keys > threshold.bits
        if threshold.keep:
            tied = np.flatnonzero(keys == threshold.bits)
            kept[tied[evenly(self._seen, len(tied), threshold.keep, threshold.ties)]] = True
            self._seen += len(tied)
        return kept
