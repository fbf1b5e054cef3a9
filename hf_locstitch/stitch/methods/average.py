"""The mean of the finetuned models. Source: Wortsman et al., Model soups, ICML 2022, arXiv 2203.05482."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from hf_locstitch.stitch.method import DenseMethod, Place

if TYPE_CHECKING:
    import numpy as np

    from hf_locstitch.runtime.dtypes import Values


class Average(DenseMethod):
    """normalize: whether the weighted sum of the models is divided by that of the weights."""

    name: Literal["average"] = "average"
    title: ClassVar[str] = "Average"
    paper: ClassVar[str] = "https://arxiv.org/abs/2203.05482"
    weighted: ClassVar[bool] = True
    of_models: ClassVar[bool] = True
    normalize: bool = True

    def combine(
        self,
        base: Values,
        finetuned: Sequence[Values],
        *,
        weights: Sequence[float],
        place: Place,
        scale: float,
        dtype: np.dtype[Any],
    ) -> Values:
        return mean_of(base, finetuned, weights, scale, dtype, normalize=self.normalize)


def mean_of(
    base: Values,
    finetuned: Sequence[Values],
    weights: Sequence[float],
    scale: float,
    dtype: np.dtype[Any],
    *,
    normalize: bool = True,
) -> Values:
    """base + scale · (mean − base), in float64; with scale 1 the mean itself. normalize: else the weighted sum."""
    total = finetuned[0].astype("f8")
    total *= weights[0]
    for values, weight in zip(finetuned[1:], weights[1:], strict=True):
        total += values if weight == 1.0 else weight * values.astype("f8")
    if normalize:
        total /= sum(weights)
    if scale != 1.0:
        start = base.astype("f8")
        total = start + scale * (total - start)
    return total.astype(dtype)


COMPONENT = Average
