"""The plain mean of the finetuned models. Source: Wortsman et al., Model soups, ICML 2022, arXiv 2203.05482."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hf_locstitch.methods import Dense

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch


def combine(base: torch.Tensor, finetuned: Sequence[torch.Tensor], *, scale: float, dtype: torch.dtype) -> torch.Tensor:
    """base + scale · (mean − base), in float64; with scale 1 the mean itself."""
    total = finetuned[0].double()
    for values in finetuned[1:]:
        total += values
    mean = total.div_(len(finetuned))
    if scale != 1.0:
        mean = base.double().lerp_(mean, scale)
    return mean.to(dtype)


METHOD = Dense("Average", "https://arxiv.org/abs/2203.05482", combine)
