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


def combine(
    base: torch.Tensor, kept: Sequence[Kept], times: npt.NDArray[np.uint8], *, scale: float, dtype: torch.dtype
) -> torch.Tensor:
    """base + scale · mean of the trimmed task vectors whose sign is that of their sum, in float64."""
    start = base.double()
    trimmed = [_trimmed(start, one) for one in kept]
    total = sum(trimmed[1:], start=trimmed[0].clone())
    elected = total.sign()
    update, agreeing = start.new_zeros(len(start)), start.new_zeros(len(start))
    for task_vector in trimmed:
        agrees = (task_vector.sign() == elected) & (elected != 0)
        update += task_vector * agrees
        agreeing += agrees
    return start.add_(update.div_(agreeing.clamp_(min=1)), alpha=scale).to(dtype)


def _trimmed(base: torch.Tensor, kept: Kept) -> torch.Tensor:
    """The task vector where the mask keeps it, 0 elsewhere. base: float64 [n]. Returns float64 [n]."""
    task_vector = base.new_zeros(len(base))
    task_vector[kept.positions] = kept.values.double() - base[kept.positions]
    return task_vector


METHOD = Masked("TIES", "https://arxiv.org/abs/2306.01708", combine, density=0.2, blocks_only=False)
