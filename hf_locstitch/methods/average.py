"""The plain mean of the finetuned models. Source: Wortsman et al., Model soups, ICML 2022, arXiv 2203.05482."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hf_locstitch.methods import Dense

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np

    from hf_locstitch.checkpoints.dtypes import Values


def combine(base: Values, finetuned: Sequence[Values], *, scale: float, dtype: np.dtype[Any]) -> Values:
    """base + scale · (mean − base), in float64; with scale 1 the mean itself."""
    total = finetuned[0].astype("f8")
    for values in finetuned[1:]:
        total += values
    total /= len(finetuned)
    if scale != 1.0:
        start = base.astype("f8")
        total = start + scale * (total - start)
    return total.astype(dtype)


METHOD = Dense("Average", "https://arxiv.org/abs/2203.05482", combine)
