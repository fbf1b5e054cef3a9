"""Tensors as vectors: inner products and norms in float64, the same whatever the number of threads.

BLAS would add in another order on another machine; numpy's own sums are pairwise and of one thread.
"""

from __future__ import annotations

import math

import numpy as np

from hf_locstitch.runtime.dtypes import Values

PIECE = 1 << 20  # elements that are multiplied at a time


def inner(one: Values, other: Values) -> float:
    """Of two flat float64 vectors [n]."""
    pieces = range(0, len(one), PIECE)
    return math.fsum(float(np.sum(one[at : at + PIECE] * other[at : at + PIECE])) for at in pieces)


def norm(vector: Values) -> float:
    return math.sqrt(inner(vector, vector))


def cosine(one: Values, other: Values) -> float:
    """0 for a vector of zeros."""
    lengths = norm(one) * norm(other)
    return min(1.0, max(-1.0, inner(one, other) / lengths)) if lengths else 0.0
