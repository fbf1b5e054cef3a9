"""The merged value of every coordinate: the mean of the finetuned values of the masks that cover it.

Source: arXiv 2408.13656, section 3.3; θ_pre + Σ γ'_i ⊙ τ_i with γ'_i = γ_i / Σ_j γ_j is that mean.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from hf_locstitch.localize.selection import Kept


def stitch(
    base: torch.Tensor, kept: Sequence[Kept], *, scale: float = 1.0, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """Put the kept values of each finetune into a copy of the base; returns [n] in `dtype`, the base's by default.

    base: [n], floating point. Uncovered: the base's value. Covered once: that finetune's value. Covered more
    often: their mean in float64, cast once. With scale ≠ 1: base + scale·(mean − base) in float32, cast once.
    """
    merged = base.to(dtype or base.dtype, copy=True)
    times = coverage(len(base), kept)
    for one in kept:
        merged[torch.from_numpy(one.positions)] = one.values.to(merged.dtype)
    if len(shared := np.flatnonzero(times > 1)):
        merged[torch.from_numpy(shared)] = _mean(base, kept, shared, times).to(merged.dtype)
    if scale != 1.0 and len(covered := np.flatnonzero(times)):
        where = torch.from_numpy(covered)
        start = base[where].float()
        mean = _mean(base, kept, covered, times).float()
        merged[where] = (start + scale * (mean - start)).to(merged.dtype)
    return merged


def coverage(n: int, kept: Sequence[Kept]) -> npt.NDArray[np.uint8]:
    """How many masks cover each of n coordinates. Returns [n]."""
    times = np.zeros(n, dtype=np.uint8)
    for one in kept:
        times[one.positions] += 1
        times[one.unchanged] += 1
    return times


def _mean(
    base: torch.Tensor, kept: Sequence[Kept], covered: npt.NDArray[np.int64], times: npt.NDArray[np.uint8]
) -> torch.Tensor:
    """Mean of the finetuned values at `covered`, ascending positions. Returns float64 [len(covered)]."""
    slot = np.full(len(base), -1, dtype=np.int64)
    slot[covered] = np.arange(len(covered))
    # −0 is the sum's neutral element, +0 is not: the mean of −0 and −0 is −0.
    total = torch.full((len(covered),), -0.0, dtype=torch.float64)
    for one in kept:
        for positions, values in (
            (one.positions, one.values),
            (one.unchanged, base[torch.from_numpy(one.unchanged)]),
        ):
            slots = slot[positions]
            wanted = slots >= 0
            total[torch.from_numpy(slots[wanted])] += values[torch.from_numpy(wanted)].double()
    return total / torch.from_numpy(times[covered]).double()


def overlaps(n: int, kept: Sequence[Kept]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Counts over n coordinates: by how many masks cover them, and by both of a pair.

    Returns int64 [models + 1] and [models, models]; the diagonal holds each mask's ones.
    """
    times = coverage(n, kept)
    shared = np.flatnonzero(times > 1)
    members = np.zeros((len(kept), len(shared)), dtype=np.float32)
    slot = np.full(n, -1, dtype=np.int32)
    slot[shared] = np.arange(len(shared), dtype=np.int32)
    for row, one in zip(members, kept, strict=True):
        for positions in (one.positions, one.unchanged):
            slots = slot[positions]
            row[slots[slots >= 0]] = 1
    pairs = np.rint(members @ members.T).astype(np.int64)
    np.fill_diagonal(pairs, [len(one.positions) + len(one.unchanged) for one in kept])
    return np.bincount(times, minlength=len(kept) + 1), pairs
