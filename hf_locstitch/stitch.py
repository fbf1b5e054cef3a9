"""The merged value of every coordinate: the mean of the finetuned values of the masks that cover it.

Source: arXiv 2408.13656, section 3.3; θ_pre + Σ γ'_i ⊙ τ_i with γ'_i = γ_i / Σ_j γ_j is that mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from hf_locstitch import kernels
from hf_locstitch.kernels import Positions, bits
from hf_locstitch.localize.selection import Kept


@dataclass(frozen=True)
class Coverage:
    """times: how many masks cover each coordinate [n]. shared: positions that more than one covers, ascending."""

    times: kernels.Counts
    shared: Positions


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
        kernels.put(bits(merged), one.positions, bits(one.values.to(merged.dtype)))
    averaged = covered.shared if scale == 1.0 else _more_than(covered.times, 0)
    if len(averaged):
        mean = _mean(base, kept, averaged, covered.times)
        if scale != 1.0:
            start = base[torch.from_numpy(averaged)].float()
            mean = start + scale * (mean.float() - start)
        kernels.put(bits(merged), averaged, bits(mean.to(merged.dtype)))
    return merged


def coverage(n: int, kept: Sequence[Kept]) -> Coverage:
    """How the masks cover n coordinates."""
    times = np.zeros(n, dtype=np.uint8)
    for one in kept:
        kernels.count_up(times, one.positions)
        kernels.count_up(times, one.unchanged)
    return Coverage(times, _more_than(times, 1))


def _more_than(times: kernels.Counts, least: int) -> Positions:
    """Where more than so many masks cover a coordinate; ascending."""
    positions = np.empty(len(times) + 1, np.int32)
    return positions[: kernels.more_than(times, least, positions)]


def _mean(base: torch.Tensor, kept: Sequence[Kept], wanted: Positions, times: kernels.Counts) -> torch.Tensor:
    """Mean of the finetuned values at the `wanted` positions, ascending. Returns float64 [len(wanted)]."""
    # −0 is the sum's neutral element, +0 is not: the mean of −0 and −0 is −0.
    total = torch.full((len(wanted),), -0.0, dtype=torch.float64)
    for one in kept:
        taken, slots = _find(one.positions, wanted)
        _add(total, slots, one.values, taken)
        if len(one.unchanged):
            taken, slots = _find(one.unchanged, wanted)
            _add(total, slots, base, one.unchanged[taken])
    return total / torch.from_numpy(times[wanted]).double()


def _find(positions: Positions, wanted: Positions) -> tuple[Positions, Positions]:
    """Which of the positions are wanted, and as the how manieth; both ascending."""
    taken, slots = np.empty(len(positions), np.int32), np.empty(len(positions), np.int32)
    count = kernels.find(positions, wanted, taken, slots)
    return taken[:count], slots[:count]


def _add(total: torch.Tensor, slots: Positions, values: torch.Tensor, places: Positions) -> None:
    """total[slots] += values[places]; no slot comes twice."""
    total.index_add_(0, torch.from_numpy(slots), values.index_select(0, torch.from_numpy(places)).double())


def overlaps(covered: Coverage, kept: Sequence[Kept]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Counts of coordinates: by how many masks cover them, and by both of a pair.

    Returns int64 [models + 1] and [models, models]; the diagonal holds each mask's ones.
    """
    shared = covered.shared
    members = np.zeros((len(kept), len(shared)), dtype=np.float32)
    for row, one in zip(members, kept, strict=True):
        for positions in (one.positions, one.unchanged):
            row[_find(positions, shared)[1]] = 1
    rows = torch.from_numpy(members)  # numpy's own product has threads that wait busily between two calls
    pairs = (rows @ rows.T).round().long().numpy()
    ones = [len(one.positions) + len(one.unchanged) for one in kept]
    np.fill_diagonal(pairs, ones)
    counts = np.bincount(covered.times[shared], minlength=len(kept) + 1)
    counts[1] = sum(ones) - (counts * np.arange(len(counts))).sum()
    counts[0] = len(covered.times) - counts.sum()
    return counts, pairs
