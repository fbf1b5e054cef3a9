"""The merged value of every coordinate: the mean of the finetuned values of the masks that cover it.

Source: arXiv 2408.13656, section 3.3; θ_pre + Σ γ'_i ⊙ τ_i with γ'_i = γ_i / Σ_j γ_j is that mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import numpy.typing as npt

from hf_locstitch.artifacts.mask_source import MaskedValues
from hf_locstitch.runtime import kernels
from hf_locstitch.runtime.dtypes import Values
from hf_locstitch.runtime.kernels import Positions, bits

Found = tuple[Positions, Positions]  # of ascending positions: the wanted ones, and the index of each among the wanted


@dataclass(frozen=True)
class Coverage:
    """How masks cover n coordinates. times: how many masks cover each [n]. shared: positions covered by several.

    found: of each mask, where among its positions the shared ones are, and the index of each among the shared.
    """

    times: kernels.Counts
    shared: Positions
    found: Sequence[Found]


def stitch(
    base: Values,
    kept: Sequence[MaskedValues],
    covered: Coverage,
    *,
    scale: float = 1.0,
    dtype: np.dtype[Any] | None = None,
) -> Values:
    """Put the kept values of each finetune into a copy of the base; returns [n] in `dtype`, the base's by default.

    base: [n], floating point; covered: by the masks. Uncovered: the base's value. Covered once: that finetune's
    value. Covered more than once: their mean in float64, cast once. With scale ≠ 1: base + scale·(mean − base) in
    float32, cast once.
    """
    merged = base.astype(dtype or base.dtype)
    for one in kept:
        kernels.put(bits(merged), one.positions, bits(one.values.astype(merged.dtype, copy=False)))
    averaged, found = covered.shared, covered.found
    if scale != 1.0:
        averaged, found = _find(kept, covered.times, 0)
    if len(averaged):
        mean = _mean(kept, found, covered.times[averaged])
        if scale != 1.0:
            start = base[averaged].astype(np.float32)
            mean = start + np.float32(scale) * (mean.astype(np.float32) - start)
        kernels.put(bits(merged), averaged, bits(mean.astype(merged.dtype)))
    return merged


def coverage(n: int, kept: Sequence[MaskedValues]) -> Coverage:
    """How the masks cover n coordinates."""
    times = np.zeros(n, dtype=np.uint8)
    for one in kept:
        kernels.count_up(times, one.positions)
    return Coverage(times, *_find(kept, times, 1))


def _find(kept: Sequence[MaskedValues], times: kernels.Counts, least: int) -> tuple[Positions, list[Found]]:
    """Positions that more than `least` masks cover, ascending, and where they are among each mask's positions."""
    wanted = np.empty(len(times) + 1, np.int32)
    wanted = wanted[: kernels.more_than(times, least, wanted)]

    def find(positions: Positions) -> Found:
        taken, slots = np.empty(len(positions) + 1, np.int32), np.empty(len(positions) + 1, np.int32)
        count = kernels.find(positions, times, least, wanted, taken, slots)
        return taken[:count], slots[:count]

    return wanted, [find(one.positions) for one in kept]


def _mean(kept: Sequence[MaskedValues], shared: Sequence[Found], times: kernels.Counts) -> npt.NDArray[np.float64]:
    """Mean of the finetuned values at positions [m], each covered by `times` masks. Returns [m]."""
    # −0 is the neutral element of addition, +0 is not: the mean of −0 and −0 is −0.
    total = np.full(len(times), -0.0)
    for one, (taken, slots) in zip(kept, shared, strict=True):
        total[slots] += one.values[taken].astype(np.float64)
    return total / times


def overlaps(covered: Coverage, kept: Sequence[MaskedValues]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Counts of coordinates: by the number of masks that cover them, and in both masks of a pair.

    Returns int64 [models + 1] and [models, models]; the diagonal holds each mask's ones.
    """
    members = np.zeros((len(kept), len(covered.shared)), dtype=bool)
    for row, (_, slots) in zip(members, covered.found, strict=True):
        row[slots] = True
    ones = [len(one.positions) for one in kept]
    pairs = np.diag(np.array(ones, dtype=np.int64))
    for i, j in combinations(range(len(kept)), 2):
        pairs[i, j] = pairs[j, i] = np.count_nonzero(members[i] & members[j])
    counts = np.bincount(covered.times[covered.shared], minlength=len(kept) + 1)
    counts[1] = sum(ones) - (counts * np.arange(len(counts))).sum()
    counts[0] = len(covered.times) - counts.sum()
    return counts, pairs
