"""What methods share that drop entries of task vectors by their rank in a tensor: the rest is added up, or signs are
elected."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from hf_locstitch.stitch.method import Context, TensorMethod

if TYPE_CHECKING:
    from hf_locstitch.runtime.dtypes import Values
    from hf_locstitch.stitch.task_vectors import Vector


class ThinnedTensors(TensorMethod):
    """elect: whether a sign is elected for each element, and only the task vectors that have it count, as in TIES.
    normalize: whether the weighted sum is divided by that of the weights (of those that count)."""

    weighted: ClassVar[bool] = True
    copies: ClassVar[float] = 7
    of_each: ClassVar[float] = 2
    elect: bool = False
    normalize: bool = False

    @property
    def normalized(self) -> bool:
        return self.normalize and not self.elect

    @abstractmethod
    def thin(self, task_vector: Vector, *, tensor: str, model: int) -> Vector:
        """What is left of a task vector [*shape]. model: number of the finetune."""

    def merge(self, base: Values, finetuned: Sequence[Values], context: Context) -> Values:
        """base + scale · Σ weight · what is left of the task vectors, in float64, and as elect and normalize say."""
        from hf_locstitch.stitch.task_vectors import agreeing_mean, task_vectors, weighted_sum

        start = base.astype("f8")
        vectors = enumerate(task_vectors(start, finetuned))
        thinned = (self.thin(vector, tensor=context.tensor, model=model) for model, vector in vectors)
        combine = agreeing_mean if self.elect else weighted_sum
        change = combine(thinned, context.weights, scale=context.scale, normalize=self.normalize)
        return (start + change).astype(context.dtype)
