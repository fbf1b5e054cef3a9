"""TIES: trim, elect a sign, average those that agree. Source: Yadav et al., TIES-Merging, NeurIPS 2023,
arXiv 2306.01708. Trimming is the top k of |task vector|, over the whole model as in the paper."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hf_locstitch.methods import Masked

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    import numpy.typing as npt
    import torch

    from hf_locstitch.localize.selection import Kept
    from hf_locstitch.stitch import Coverage


def combine(
    base: torch.Tensor, kept: Sequence[Kept], covered: Coverage, *, scale: float, dtype: torch.dtype
) -> torch.Tensor:
    """base + scale · mean of the trimmed task vectors whose sign is that of their sum, in float64."""
    import numpy as np  # not needed to plan

    where = np.flatnonzero(covered.times)
    start = base[where].double()
    trimmed = [_trimmed(start, where, one, base) for one in kept]
    elected = sum(trimmed[1:], start=trimmed[0]).sign()
    update, agreeing = start.new_zeros(len(where)), start.new_zeros(len(where))
    for task_vector in trimmed:
        agrees = (task_vector.sign() == elected) & (elected != 0)
        update += task_vector * agrees
        agreeing += agrees
    merged = base.to(dtype, copy=True)
    merged[where] = start.add_(update.div_(agreeing.clamp_(min=1)), alpha=scale).to(dtype)
    return merged


def _trimmed(start: torch.Tensor, where: npt.NDArray[np.int64], kept: Kept, base: torch.Tensor) -> torch.Tensor:
    """The task vector at the places `where` some mask keeps one: 0 if this mask does not. Returns float64 [m]."""
    task_vector = start.new_zeros(len(start))
    task_vector[where.searchsorted(kept.positions)] = kept.values.double() - base[kept.positions].double()
    return task_vector


METHOD = Masked("TIES", "https://arxiv.org/abs/2306.01708", combine, density=0.2, blocks_only=False)
