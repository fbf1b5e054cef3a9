"""DARE: drop entries of the task vectors at random, rescale the rest, and add them up. Source: Yu et al., Language
Models are Super Mario, ICML 2024, arXiv 2311.03099."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from hf_locstitch.stitch.method import Context, DenseMethod
from hf_locstitch.stitch.random_drop import RandomDrop

if TYPE_CHECKING:
    from hf_locstitch.runtime.dtypes import Values


class Dare(RandomDrop, DenseMethod):
    name: Literal["dare"] = "dare"
    title: ClassVar[str] = "DARE"
    paper: ClassVar[str] = "https://arxiv.org/abs/2311.03099"
    weighted: ClassVar[bool] = True

    def combine(self, base: Values, finetuned: Sequence[Values], context: Context) -> Values:
        """base + scale · Σ weight · kept · (finetuned − base) / density, in float64."""
        start = base.astype("f8")
        return (start + self.kept_sum(start, finetuned, context)).astype(context.dtype)


COMPONENT = Dare
