"""The plain mean of the finetuned models. Source: Wortsman et al., Model soups, ICML 2022, arXiv 2203.05482."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from hf_locstitch.stitch.method import DenseMethod, Place

if TYPE_CHECKING:
    import numpy as np

    from hf_locstitch.runtime.dtypes import Values


class Average(DenseMethod):
    name: Literal["average"] = "average"
    title: ClassVar[str] = "Average"
    paper: ClassVar[str] = "https://arxiv.org/abs/2203.05482"

    def combine(
        self, base: Values, finetuned: Sequence[Values], *, place: Place, scale: float, dtype: np.dtype[Any]
    ) -> Values:
        return mean_of(base, finetuned, scale, dtype)


def mean_of(base: Values, finetuned: Sequence[Values], scale: float, dtype: np.dtype[Any]) -> Values:
    """base + scale · (mean − base), in float64; with scale 1 the mean itself."""
    total = finetuned[0].astype("f8")
    for values in finetuned[1:]:
        total += values
    total /= len(finetuned)
    if scale != 1.0:
        start = base.astype("f8")
        total = start + scale * (total - start)
    return total.astype(dtype)


COMPONENT = Average
