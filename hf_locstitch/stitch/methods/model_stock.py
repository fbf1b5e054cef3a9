"""Model Stock: the mean of the finetuned models, drawn towards the base by the angle between them. Source: Jang et al.,
Model Stock: All we need is just a few fine-tuned models, ECCV 2024, arXiv 2403.19522."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import TYPE_CHECKING, ClassVar, Literal

from hf_locstitch.stitch.method import Context, TensorMethod

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from hf_locstitch.runtime.dtypes import Values

SINGULAR = 1e-6  # below which the denominator says nothing, and the base stays


class ModelStock(TensorMethod):
    """filter_wise: whether each row of a tensor (an output of its layer) has an angle of its own, not the tensor."""

    name: Literal["model-stock"] = "model-stock"
    title: ClassVar[str] = "Model Stock"
    paper: ClassVar[str] = "https://arxiv.org/abs/2403.19522"
    copies: ClassVar[float] = 4
    of_each: ClassVar[float] = 1.5
    least: ClassVar[int] = 2
    filter_wise: bool = False

    def merge(self, base: Values, finetuned: Sequence[Values], context: Context) -> Values:
        """base + scale · t · (mean − base), with t = k cos θ / (1 + (k − 1) cos θ) and cos θ the mean over pairs of
        the k task vectors, in float64."""
        rows = len(base) if self.filter_wise and base.ndim > 1 else 1
        start = base.astype("f8").reshape(rows, -1)
        task_vectors = [values.astype("f8").reshape(rows, -1) - start for values in finetuned]
        total = sum(task_vectors[1:], start=task_vectors[0].copy())
        count = len(task_vectors)
        start += (context.scale / count) * _shares(task_vectors)[:, None] * total
        return start.astype(context.dtype).reshape(base.shape)


def _shares(task_vectors: Sequence[npt.NDArray[np.float64]]) -> npt.NDArray[np.float64]:
    """How far from the base to the mean each row goes: of task vectors [rows, columns], t [rows]."""
    import numpy as np

    from hf_locstitch.stitch.vectors import cosine

    count, rows = len(task_vectors), range(len(task_vectors[0]))
    pairs = list(combinations(task_vectors, 2))
    cosines = np.array([sum(cosine(one[row], other[row]) for one, other in pairs) / len(pairs) for row in rows])
    below = 1 + (count - 1) * cosines
    singular = abs(below) < SINGULAR
    return np.where(singular, 0.0, count * cosines / np.where(singular, 1.0, below))


COMPONENT = ModelStock
