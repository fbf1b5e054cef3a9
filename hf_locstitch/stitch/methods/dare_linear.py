"""DARE and a linear combination: `dare`, with a choice of how its sum is scaled. Source: Yu et al., Language Models are
Super Mario, ICML 2024, arXiv 2311.03099."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal

from hf_locstitch.stitch.method import Context, DenseMethod
from hf_locstitch.stitch.random_drop import RandomDrop

if TYPE_CHECKING:
    from hf_locstitch.runtime.dtypes import Values


class DareLinear(RandomDrop, DenseMethod):
    """rescale: whether what is kept is divided by the density. normalize: whether the sum is divided by that of the
    weights."""

    name: Literal["dare-linear"] = "dare-linear"
    title: ClassVar[str] = "DARE, linear"
    paper: ClassVar[str] = "https://arxiv.org/abs/2311.03099"
    weighted: ClassVar[bool] = True
    rescale: bool = True
    normalize: bool = False

    def combine(self, base: Values, finetuned: Sequence[Values], context: Context) -> Values:
        """base + scale · Σ weight · kept · (finetuned − base), in float64, and as rescale and normalize say."""
        start = base.astype("f8")
        if self.normalize:
            context = replace(context, scale=context.scale / sum(context.weights))
        change = self.kept_sum(start, finetuned, context, rescale=self.rescale)
        return (start + change).astype(context.dtype)


COMPONENT = DareLinear
