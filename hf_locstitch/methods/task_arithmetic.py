"""The base plus scaled task vectors. Source: Ilharco et al., Editing models with task arithmetic, ICLR 2023,
arXiv 2212.04089."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hf_locstitch.methods import Dense

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np

    from hf_locstitch.checkpoints.dtypes import Values


def combine(base: Values, finetuned: Sequence[Values], *, scale: float, dtype: np.dtype[Any]) -> Values:
    """base + scale · Σ (finetuned − base), in float64."""
    start = base.astype("f8")
    total = start * -len(finetuned)
    for values in finetuned:
        total += values
    total *= scale
    total += start
    return total.astype(dtype)


METHOD = Dense("Task arithmetic", "https://arxiv.org/abs/2212.04089", combine)
