"""Task vectors, and what becomes of several: in float64, in the order of the finetunes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import numpy.typing as npt

from hf_locstitch.runtime.dtypes import Values
from hf_locstitch.stitch.per_tensor import SMALLEST_SUM

Vector = npt.NDArray[np.float64]


def task_vectors(start: Vector, finetuned: Sequence[Values]) -> Iterator[Vector]:
    """What each finetune changed, one after the other. start: the base's values."""
    for values in finetuned:
        yield values.astype(np.float64) - start


def weighted_sum(vectors: Iterable[Vector], weights: Sequence[float], *, scale: float, normalize: bool) -> Vector:
    """scale · the weighted sum of task vectors, one after the other. normalize: divided by that of the weights."""
    total: Vector | None = None
    for vector, weight in zip(vectors, weights, strict=True):
        total = weight * vector if total is None else total + weight * vector
    assert total is not None
    return total * (scale / sum(weights) if normalize else scale)


def agreeing_mean(vectors: Iterable[Vector], weights: Sequence[float], *, scale: float, normalize: bool) -> Vector:
    """Of each element, scale · the weighted mean of the task vectors whose sign is that of their weighted sum; where
    that is 0, 0. normalize: else their sum. Source: TIES, arXiv 2306.01708, section 3.2."""
    weighted = [vector if weight == 1.0 else weight * vector for vector, weight in zip(vectors, weights, strict=True)]
    return mean_of_sign(weighted, weights, elected_sign(weighted), scale=scale, normalize=normalize)


def elected_sign(vectors: Sequence[Vector]) -> Vector:
    """That of the sum: −1, 0 or 1."""
    return np.sign(sum(vectors[1:], start=vectors[0]))


def mean_of_sign(
    weighted: Sequence[Vector], weights: Sequence[float], sign: Vector, *, scale: float, normalize: bool
) -> Vector:
    """The same with a sign that is given, of task vectors that are weighted already. Where the weights of those that
    agree cancel, their sum is not divided."""
    update, total = np.zeros(sign.shape), np.zeros(sign.shape)
    for vector, weight in zip(weighted, weights, strict=True):
        agrees = (np.sign(vector) == sign) & (sign != 0)
        update += vector * agrees
        total += weight * agrees
    update *= scale
    cancelled = SMALLEST_SUM if min(weights) < 0 else 0.0
    return update / np.where(abs(total) <= cancelled, 1.0, total) if normalize else update
