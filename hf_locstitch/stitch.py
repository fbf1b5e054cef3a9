"""The merged value of every coordinate: the mean of the finetuned values of the masks that cover it.

Source: arXiv 2408.13656, section 3.3; θ_pre + Σ γ'_i ⊙ τ_i with γ'_i = γ_i / Σ_j γ_j is that mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from hf_locstitch.localize.selection import Kept


@dataclass(frozen=True)
class Coverage:
    """times: how many masks cover each coordinate [n]. shared: positions that more than one covers, ascending."""

    times: npt.NDArray[np.uint8]
    shared: npt.NDArray[np.int64]


def stitch(
    base: torch.Tensor,
    kept: Sequence[Kept],
    covered: Coverage,
    *,
    scale: float = 1.0,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Put the kept values of each finetune into a copy of the base; returns [n] in `dtype`, the base's by default.

    base: [n], floating point; covered: by the masks. Uncovered: the base's value. Covered once: that finetune's
    value. Covered more often: their mean in float64, cast once. With scale ≠ 1: base + scale·(mean − base) in
    float32, cast once.
    """
    merged = base.to(dtype or base.dtype, copy=True)
    for one in kept:
        merged[torch.from_numpy(one.positions)] = one.values.to(merged.dtype)
    averaged = covered.shared if scale == 1.0 else np.flatnonzero(covered.times)
    if len(averaged):
        where = torch.from_numpy(averaged)
        mean = _mean(base, kept, averaged, covered.times)
        if scale != 1.0:
            start = base[where].float()
            mean = start + scale * (mean.float() - start)
        merged[where] = mean.to(merged.dtype)
    return merged


def coverage(n: int, kept: Sequence[Kept]) -> Coverage:
    """How the masks cover n coordinates."""
    times = np.zeros(n, dtype=np.uint8)
    for one in kept:
        times[one.positions] += 1
        times[one.unchanged] += 1
    return Coverage(times, np.flatnonzero(times > 1))


def _mean(
    base: torch.Tensor, kept: Sequence[Kept], wanted: npt.NDArray[np.int64], times: npt.NDArray[np.uint8]
) -> torch.Tensor:
    """Mean of the finetuned values at the `wanted` positions, ascending. Returns float64 [len(wanted)]."""
    # −0 is the sum's neutral element, +0 is not: the mean of −0 and −0 is −0.
    total = torch.full((len(wanted),), -0.0, dtype=torch.float64)
    for one in kept:
        for positions, values in ((one.positions, one.values), (one.unchanged, base[torch.from_numpy(one.unchanged)])):
            taken, slots = _find(positions, wanted, times)
            total[slots] += values[taken].double()
    return total / torch.from_numpy(times[wanted]).double()


def _find(
    positions: npt.NDArray[np.int64], wanted: npt.NDArray[np.int64], times: npt.NDArray[np.uint8]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Which of the positions are wanted, and as the how manieth. wanted: all that are covered at least so often."""
    least = times[wanted].min()
    taken = np.flatnonzero(times[positions] >= least)
    return torch.from_numpy(taken), torch.from_numpy(np.searchsorted(wanted, positions[taken]))


def overlaps(covered: Coverage, kept: Sequence[Kept]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Counts of coordinates: by how many masks cover them, and by both of a pair.

    Returns int64 [models + 1] and [models, models]; the diagonal holds each mask's ones.
    """
    shared = covered.shared
    members = np.zeros((len(kept), len(shared)), dtype=np.float32)
    for row, one in zip(members, kept, strict=True):
        for positions in (one.positions, one.unchanged):
            if len(shared):
                row[_find(positions, shared, covered.times)[1].numpy()] = 1
    pairs = np.rint(members @ members.T).astype(np.int64)
    ones = [len(one.positions) + len(one.unchanged) for one in kept]
    np.fill_diagonal(pairs, ones)
    counts = np.bincount(covered.times[shared], minlength=len(kept) + 1)
    counts[1] = sum(ones) - (counts * np.arange(len(counts))).sum()
    counts[0] = len(covered.times) - counts.sum()
    return counts, pairs
