"""What methods share that change the matrices of linear layers by linear algebra, and all else by the mean."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from hf_locstitch.stitch.method import Context, TensorMethod

if TYPE_CHECKING:
    from torch import Tensor

    from hf_locstitch.runtime.dtypes import Values

ZERO = 1e-12  # of the largest singular value: directions that are not there are arbitrary, and would turn the others


class MatrixMethod(TensorMethod):
    """A tensor of two dimensions is a matrix [outputs, inputs], one of three a stack of them, such as experts,
    unless it is a convolution by its name. The mean of the task vectors changes all others, as in the papers.

    squares: matrices [inputs, inputs] that it holds at once; squares_of_each: and for each finetune.
    """

    blocks_only: ClassVar[bool] = True
    linear_algebra: ClassVar[bool] = True
    packages: ClassVar[tuple[str, ...]] = ("torch",)
    copies: ClassVar[float] = 12
    of_each: ClassVar[float] = 2
    squares: ClassVar[float] = 0
    squares_of_each: ClassVar[float] = 0

    @abstractmethod
    def change(self, task_vectors: Sequence[Tensor]) -> Tensor:
        """What a matrix of the base changes by, before `scale`. task_vectors: float64 [outputs, inputs], which are left
        as they are. Returns the same."""

    def merge(self, base: Values, finetuned: Sequence[Values], context: Context) -> Values:
        """base + scale · change, in float64."""
        import torch

        from hf_locstitch.stitch.task_vectors import task_vectors

        start = base.astype("f8")
        # In memory of torch's own, which is aligned: else products are rounded in another way.
        vectors = [torch.from_numpy(vector).clone() for vector in task_vectors(start, finetuned)]
        if not has_matrices(context.tensor, base.shape):
            change = sum(vectors[1:], start=vectors[0]) / len(vectors)
        elif base.ndim == 2:
            change = self.change(vectors)
        else:
            change = torch.stack([self.change(matrices) for matrices in zip(*vectors, strict=True)])
        return (start + context.scale * change.numpy()).astype(context.dtype)

    def memory(self, shape: Sequence[int], models: int) -> int:
        squares = self.squares + self.squares_of_each * models
        return super().memory(shape, models) + math.ceil(8 * squares * (shape[-1] ** 2 if len(shape) > 1 else 0))


def has_matrices(tensor: str, shape: Sequence[int]) -> bool:
    """Whether a tensor is a matrix, or a stack of them."""
    return len(shape) == 2 or (len(shape) == 3 and "conv" not in tensor.lower())


def nearest_orthogonal(matrix: Tensor) -> Tensor:
    """U Vᵀ of its singular value decomposition U S Vᵀ, over the directions that are there."""
    import torch

    left, sizes, right = torch.linalg.svd(matrix, full_matrices=False)
    count = directions(sizes)
    return left[:, :count] @ right[:count]


def directions(sizes: Tensor) -> int:
    """How many singular values, in descending order, are not 0."""
    return int((sizes > sizes[:1] * ZERO).sum())
