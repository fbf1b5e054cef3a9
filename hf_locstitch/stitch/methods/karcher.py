"""The Karcher mean: of each tensor, as a direction on the sphere, the point whose squared arcs to those of the
finetunes add up to the least; its length is their mean one. Source: Grove and Karcher, Math. Z. 132, 1973; for weights
of models arXiv 2603.04972."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from hf_locstitch.stitch.method import Context, TensorMethod

if TYPE_CHECKING:
    from hf_locstitch.runtime.dtypes import Values
    from hf_locstitch.stitch.task_vectors import Vector


class Karcher(TensorMethod):
    """max_iter: steps at most. tol: a shorter step ends them."""

    name: Literal["karcher"] = "karcher"
    title: ClassVar[str] = "Karcher mean"
    paper: ClassVar[str] = "https://arxiv.org/abs/2603.04972"
    weighted: ClassVar[bool] = True
    of_models: ClassVar[bool] = True
    copies: ClassVar[float] = 5
    of_each: ClassVar[float] = 1.5
    max_iter: int = Field(default=10, ge=1)
    tol: float = Field(default=1e-5, gt=0, allow_inf_nan=False)

    @property
    def normalized(self) -> bool:
        return True

    def merge(self, base: Values, finetuned: Sequence[Values], context: Context) -> Values:
        """The mean of the weights themselves, in float64; with scale ≠ 1, base + scale · (mean − base)."""
        from hf_locstitch.stitch.vectors import norm

        shares = [weight / sum(context.weights) for weight in context.weights]
        vectors = [values.astype("f8").reshape(-1) for values in finetuned]
        lengths = [norm(vector) for vector in vectors]
        for vector, length in zip(vectors, lengths, strict=True):
            vector /= length or 1.0
        directions = [(share, one) for share, one, length in zip(shares, vectors, lengths, strict=True) if length]
        mean = self._direction(directions) if directions else vectors[0]
        mean *= sum(share * length for share, length in zip(shares, lengths, strict=True))
        if context.scale != 1.0:
            start = base.astype("f8").reshape(-1)
            mean = start + context.scale * (mean - start)
        return mean.astype(context.dtype).reshape(base.shape)

    def _direction(self, directions: Sequence[tuple[float, Vector]]) -> Vector:
        """Of unit vectors [n] with their shares: from their mean, along the mean of the arcs to them."""
        from math import acos, cos, sin

        from hf_locstitch.stitch.task_vectors import weighted_sum
        from hf_locstitch.stitch.vectors import inner, norm

        first = directions[0][1]
        shares = [share for share, _ in directions]
        mean = weighted_sum((one for _, one in directions), shares, scale=1.0, normalize=False)
        length = norm(mean)
        mean = mean / length if length >= self.tol else first.copy()
        for _ in range(self.max_iter):
            step = first * 0
            for share, one in directions:
                cosine = min(1.0, max(-1.0, inner(mean, one)))
                if (angle := acos(cosine)) >= self.tol:
                    step += share * angle / sin(angle) * (one - cosine * mean)
            if (length := norm(step)) < self.tol:
                break
            mean = cos(length) * mean + sin(length) / length * step
            mean /= norm(mean)
        return mean


COMPONENT = Karcher
