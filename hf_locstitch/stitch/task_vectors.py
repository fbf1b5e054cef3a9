"""Task vectors, and what becomes of several: in float64, in the order of the finetunes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from hf_locstitch.runtime.dtypes import Values

Vector = npt.NDArray[np.float64]


def task_vectors(start: Vector, finetuned: Sequence[Values]) -> Iterator[Vector]:
    """What each finetune changed, one after the other. start: the base's values."""
    for values in finetuned:
        yield values.astype(np.float64) - start


def agreeing_mean(vectors: Sequence[Vector], weights: Sequence[float], *, scale: float, normalize: bool) -> Vector:
    """Of each element, scale · the weighted mean of the task vectors whose sign is that of their weighted sum; where
    that is 0, 0. normalize: else their sum. Source: TIES, arXiv 2306.01708, section 3.2."""
    weighted = [vector * weight for vector, weight in zip(vectors, weights, strict=True)]
    elected = np.sign(sum(weighted[1:], start=weighted[0]))
    update, total = np.zeros(elected.shape), np.zeros(elected.shape)
    for vector, weight in zip(weighted, weights, strict=True):
        agrees = (np.sign(vector) == elected) & (elected != 0)
        update += vector * agrees
        total += weight * agrees
    return scale * update / np.where(total == 0, 1.0, total) if normalize else scale * update
