"""The base plus scaled task vectors. Source: Ilharco et al., Editing models with task arithmetic, ICLR 2023,
arXiv 2212.04089."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hf_locstitch.methods import Dense

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch


def combine(base: torch.Tensor, finetuned: Sequence[torch.Tensor], *, scale: float, dtype: torch.dtype) -> torch.Tensor:
    """base + scale · Σ (finetuned − base), in float64."""
    start = base.double()
    total = start * -len(finetuned)
    for values in finetuned:
        total += values
    return start.add_(total, alpha=scale).to(dtype)


METHOD = Dense("Task arithmetic", "https://arxiv.org/abs/2212.04089", combine)
