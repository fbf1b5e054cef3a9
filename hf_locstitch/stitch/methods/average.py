"""The mean of the finetuned models. Source: Wortsman et al., Model soups, ICML 2022, arXiv 2203.05482."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from hf_locstitch.stitch.method import Context, DenseMethod

if TYPE_CHECKING:
    from hf_locstitch.runtime.dtypes import Values


class Average(DenseMethod):
    """normalize: whether the weighted sum of the models is divided by that of the weights."""

    name: Literal["average"] = "average"
    title: ClassVar[str] = "Average"
    paper: ClassVar[str] = "https://arxiv.org/abs/2203.05482"
    weighted: ClassVar[bool] = True
    of_models: ClassVar[bool] = True
    normalize: bool = True

    def combine(self, base: Values, finetuned: Sequence[Values], context: Context) -> Values:
        return mean_of(base, finetuned, context, normalize=self.normalize)


def mean_of(base: Values, finetuned: Sequence[Values], context: Context, *, normalize: bool = True) -> Values:
    """base + scale · (mean − base), in float64; with scale 1 the mean itself. normalize: else the weighted sum."""
    total = finetuned[0].astype("f8")
    total *= context.weights[0]
    for values, weight in zip(finetuned[1:], context.weights[1:], strict=True):
        total += values if weight == 1.0 else weight * values.astype("f8")
    if normalize:
        total /= sum(context.weights)
    if context.scale != 1.0:
        start = base.astype("f8")
        total = start + context.scale * (total - start)
    return total.astype(context.dtype)


COMPONENT = Average
