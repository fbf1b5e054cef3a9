"""The base plus scaled task vectors. Source: Ilharco et al., Editing models with task arithmetic, ICLR 2023,
arXiv 2212.04089."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from hf_locstitch.stitch.method import Context, DenseMethod

if TYPE_CHECKING:
    from hf_locstitch.runtime.dtypes import Values


class TaskArithmetic(DenseMethod):
    """normalize: whether the weighted sum of the task vectors is divided by that of the weights."""

    name: Literal["task-arithmetic"] = "task-arithmetic"
    title: ClassVar[str] = "Task arithmetic"
    paper: ClassVar[str] = "https://arxiv.org/abs/2212.04089"
    weighted: ClassVar[bool] = True
    normalize: bool = False

    def combine(self, base: Values, finetuned: Sequence[Values], context: Context) -> Values:
        """base + scale · Σ weight · (finetuned − base), in float64."""
        start = base.astype("f8")
        total = start * -sum(context.weights)
        for values, weight in zip(finetuned, context.weights, strict=True):
            total += values if weight == 1.0 else weight * values.astype("f8")
        total *= context.scale / sum(context.weights) if self.normalize else context.scale
        total += start
        return total.astype(context.dtype)


COMPONENT = TaskArithmetic
