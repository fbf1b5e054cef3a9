"""SLERP: two models' weights interpolated along the arc between them, each tensor a vector. Source: Shoemake, Animating
rotation with quaternion curves, SIGGRAPH 1985; for weights of models as in mergekit, arXiv 2403.13257."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from hf_locstitch.stitch.method import Context, TensorMethod
from hf_locstitch.stitch.per_tensor import PerTensor, value_for

if TYPE_CHECKING:
    from hf_locstitch.runtime.dtypes import Values

NEARLY_PARALLEL = 0.9995  # |cosine|, above which the arc is taken for a line


class Slerp(TensorMethod):
    """t: how far from the first finetune (0) to the second (1); a number, or one for each glob of tensors."""

    name: Literal["slerp"] = "slerp"
    title: ClassVar[str] = "SLERP"
    paper: ClassVar[str] = "https://arxiv.org/abs/2403.13257"
    least: ClassVar[int] = 2
    most: ClassVar[int | None] = 2
    ordered: ClassVar[bool] = True
    of_models: ClassVar[bool] = True
    by_globs: ClassVar[tuple[str, ...]] = ("t",)
    t: PerTensor = 0.5

    def merge(self, base: Values, finetuned: Sequence[Values], context: Context) -> Values:
        """The point on the arc, in float64; with scale ≠ 1, base + scale · (point − base)."""
        from hf_locstitch.stitch.vectors import cosine  # numpy is not needed for planning

        first, second = (values.astype("f8") for values in finetuned)
        t = value_for(self.t, context.tensor, 0.5)
        from_first, from_second = weights_on_arc(cosine(first.reshape(-1), second.reshape(-1)), t)
        first *= from_first
        second *= from_second
        first += second
        if context.scale != 1.0:
            start = base.astype("f8")
            first = start + context.scale * (first - start)
        return first.astype(context.dtype)


def weights_on_arc(cosine: float, t: float) -> tuple[float, float]:
    """The factors on two vectors, sin((1 − t)θ) / sin θ and sin(tθ) / sin θ; 1 − t and t where they are parallel."""
    if abs(cosine) > NEARLY_PARALLEL:
        return 1 - t, t
    angle = math.acos(cosine)
    return math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)


COMPONENT = Slerp
