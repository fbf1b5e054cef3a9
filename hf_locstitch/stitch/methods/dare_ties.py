"""DARE and TIES: drop entries of the task vectors at random, rescale the rest, elect a sign, and add up those that
agree. Source: Yu et al., Language Models are Super Mario, ICML 2024, arXiv 2311.03099, for the drop; Yadav et al.,
TIES-Merging, NeurIPS 2023, arXiv 2306.01708, for the election."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from hf_locstitch.stitch.method import Context, DenseMethod
from hf_locstitch.stitch.random_drop import RandomDrop

if TYPE_CHECKING:
    from hf_locstitch.runtime.dtypes import Values


class DareTies(RandomDrop, DenseMethod):
    """rescale: whether what is kept is divided by the density. normalize: whether those that agree are averaged, not
    added up."""

    name: Literal["dare-ties"] = "dare-ties"
    title: ClassVar[str] = "DARE-TIES"
    paper: ClassVar[str] = "https://arxiv.org/abs/2311.03099"
    weighted: ClassVar[bool] = True
    rescale: bool = True
    normalize: bool = False

    @property
    def normalized(self) -> bool:
        """No: only the weights of those that agree are summed."""
        return False

    def combine(self, base: Values, finetuned: Sequence[Values], context: Context) -> Values:
        """base + scale · Σ of the weighted task vectors that are kept and agree, in float64."""
        from hf_locstitch.stitch.task_vectors import agreeing_mean, task_vectors  # not needed for planning

        start = base.astype("f8")
        divisor, factors = self.rescaling(context.tensor, len(finetuned), self.rescale)
        vectors = [
            vector * (factor * self.kept(context.place, model, len(base)))
            for model, (vector, factor) in enumerate(zip(task_vectors(start, finetuned), factors, strict=True))
        ]
        scale = context.scale / divisor
        change = agreeing_mean(vectors, context.weights, scale=scale, normalize=self.normalize)
        return (start + change).astype(context.dtype)


COMPONENT = DareTies
