"""The arithmetic of the refit without data: for linear layers that share an input, and for all other weights.

For task vectors τ_i [outputs, inputs] and the Gram matrices G_i [inputs, inputs] that they stand for, S = Σ τ_i:

    D = aS + (Σ (τ_i − aS) G_i) (Σ G_i + ρnI)⁻¹,   a = Σ tr(S G_i τ_iᵀ) / Σ tr(S G_i Sᵀ)

so that n identical task vectors give that task vector (a = 1/n), and disjoint ones their sum (a = 1). Inside a mask M
the values are solved again from D∘M: X with (X (Σ G_i + ρnI)) ∘ M = (Σ (τ_i − D∘M) G_i) ∘ M is added.

Products are taken in blocks of a fixed size, so that the result does not depend on the number of threads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from hf_locstitch.runtime.chunks import for_each
from hf_locstitch.stitch.dataless.cost import STEPS
from hf_locstitch.stitch.refit.solve import ROWS, solve_masked

RIDGE = 0.3  # ρ
LOW_RANK_RIDGE = 10.0
CAP = 0.3  # of the base's norm: a linear layer's change is at most this, or as long as the longest task vector
EIGHTH = 8  # energy is looked for in so many of the singular directions
LOW_RANK = 0.995  # of the energy in an eighth of the singular directions; full finetunes have .89 to .98
SKETCHED = 1 << 12  # rows of a task vector that tell of its rank

Job = TypeVar("Job")
Each = Callable[[Callable[[Job], object], Iterable[Job]], object]


@dataclass(frozen=True)
class Threads:
    """How many work on one matrix."""

    count: int

    def product(self, left: Tensor, right: Tensor) -> Tensor:
        """left [m, k] · right [k, n]."""
        return self.rows(left, lambda rows: rows @ right, right.shape[1])

    def rows(self, matrix: Tensor, work: Callable[[Tensor], Tensor], width: int) -> Tensor:
        """`work` on blocks of rows of a matrix. Returns [rows, width]."""
        result = matrix.new_empty(len(matrix), width)

        def one(first: int) -> None:
            result[first : first + ROWS] = work(matrix[first : first + ROWS])

        for_each(one, range(0, len(matrix), ROWS), self.count)
        return result

    def gram(self, matrix: Tensor) -> Tensor:
        """matrixᵀ · matrix, from its upper half."""
        width = matrix.shape[1]
        result = matrix.new_empty(width, width)

        def one(first: int) -> None:
            block = matrix[:, first : first + ROWS].T @ matrix[:, first:]
            result[first : first + ROWS, first:] = block
            result[first:, first : first + ROWS] = block.T

        for_each(one, range(0, width, ROWS), self.count)
        return result


@dataclass
class Moments:
    """Over tasks, for linear layers that share an input. Each has a tensor in these lists, [outputs, inputs].

    total: S. cross: Σ τ_i G_i. gram: Σ G_i [inputs, inputs]. tasks: n. largest: max ‖τ_i‖.
    """

    total: list[Tensor]
    cross: list[Tensor]
    gram: Tensor
    tasks: int
    largest: list[float]


def moments(tasks: Iterable[Sequence[Tensor]], threads: Threads, grams: Sequence[Tensor] | None = None) -> Moments:
    """tasks: for each, the task vectors of the layers, float32 [outputs, inputs]. They are summed in this order. grams:
    of each task, where these are not all of the layers that share the input."""
    found: Moments | None = None
    for vectors in tasks:
        gram = input_gram(vectors, threads) if grams is None else grams[found.tasks if found else 0]
        norms = [_norm(vector) for vector in vectors]
        if found is None:
            total, cross = [v.clone() for v in vectors], [threads.product(v, gram) for v in vectors]
            found = Moments(total, cross, gram if grams is None else gram.clone(), 1, norms)
        else:
            for number, vector in enumerate(vectors):
                found.total[number] += vector
                found.cross[number] += threads.product(vector, gram)
            found.gram += gram
            found.tasks += 1
            found.largest = list(map(max, found.largest, norms))
        del vectors  # before the next ones are read
    assert found is not None
    return found


def input_gram(vectors: Iterable[Tensor], threads: Threads) -> Tensor:
    """What a task's vectors of layers that share an input tell of it: the Gram matrix of their rows, every layer of
    equal weight, scaled to a mean diagonal of 1. 0 if nothing changed."""
    gram = torch.zeros(())
    for vector in vectors:
        if gram.dim() == 0:
            gram = vector.new_zeros(vector.shape[1], vector.shape[1])
        if (norm := _norm(vector)) > 0:
            gram += threads.gram(vector / norm)
    trace = gram.diagonal().double().sum().item()
    return gram.mul_(len(gram) / trace) if trace > 0 else gram


def system(found: Moments, ridge: float) -> Tensor:
    """Σ G_i + ρnI."""
    matrix = found.gram.clone()
    matrix.diagonal().add_(ridge * found.tasks)
    return matrix


def dense(
    found: Moments, threads: Threads, low_rank: bool = False, share: float | None = None, ridge: float | None = None
) -> list[Tensor]:
    """D of each layer. low_rank: whether updates are of low rank, whose rows do not tell of the inputs: then the start
    is the mean, and the solution stays near it. share: a, where these are not all of the layers that share the input.
    ridge: ρ, if it is another.
    """
    ridge = (LOW_RANK_RIDGE if low_rank else RIDGE) if ridge is None else ridge
    factor = torch.linalg.cholesky(system(found, ridge))
    images = [threads.product(total, found.gram) for total in found.total]
    if low_rank:
        share = 1 / found.tasks
    elif share is None:
        share = start(start_terms(found, images))
    solved = []
    for total, cross, image in zip(found.total, found.cross, images, strict=True):
        rest = cross - share * image
        change = threads.rows(rest, lambda rows: torch.cholesky_solve(rows.T.contiguous(), factor).T, rest.shape[1])
        solved.append(change.add_(total, alpha=share))
    return solved


def start_terms(found: Moments, images: Sequence[Tensor]) -> list[tuple[float, float]]:
    """Of each layer, what it adds to the numerator and the denominator of a. images: S Σ G_i of each."""
    layers = zip(found.total, found.cross, images, strict=True)
    return [(_dot(total, cross), _dot(total, image)) for total, cross, image in layers]


def start(terms: Sequence[tuple[float, float]]) -> float:
    """a, from the terms of all layers that share an input."""
    above, below = (sum(term[side] for term in terms) for side in range(2))
    return above / below if below > 0 else 0.0


def inside(
    found: Moments, begin: Sequence[Tensor], masks: Sequence[Tensor], threads: Threads, low_rank: bool = False
) -> list[Tensor]:
    """The values of each layer inside its mask, 0 elsewhere. begin: D∘M. masks: bool [outputs, inputs]."""
    matrix = system(found, LOW_RANK_RIDGE if low_rank else RIDGE)
    solved = []
    for values, cross, mask in zip(begin, found.cross, masks, strict=True):
        rest = cross - threads.product(values, found.gram)
        both = torch.cat([rest, mask.to(rest.dtype)], dim=1)
        width = rest.shape[1]
        change = threads.rows(
            both, lambda rows, width=width: solve_masked(matrix, rows[:, :width], rows[:, width:] > 0, STEPS), width
        )
        solved.append(change.add_(values))
    return solved


def capped(change: Tensor, base: Tensor, largest: float) -> Tensor:
    """No longer than CAP of the base, or the longest task vector: solutions of badly posed problems run away."""
    norm = _norm(change)
    most = max(CAP * _norm(base), largest)
    return change * (most / norm) if norm > most else change


def of_vectors(task_vectors: Sequence[Tensor]) -> Tensor:
    """Outside linear layers, element by element: Σ τ³ / Σ τ², so that equal ones give that one, disjoint ones their
    sum; 0 where nothing changed."""
    wide = [vector.double() for vector in task_vectors]
    above, below = sum((v**3 for v in wide), torch.zeros(())), sum((v**2 for v in wide), torch.zeros(()))
    return torch.where(below > 0, above / torch.where(below > 0, below, 1), 0.0).float()


def energy(vector: Tensor) -> float | None:
    """The share of a task vector's squared norm in the largest eighth of its singular directions; None if it is zero
    or too small to tell. From a sketch, so a little less than it is."""
    if vector.dim() != 2 or min(vector.shape) < 2 * EIGHTH or not vector.any():
        return None
    rows = vector[:: -(-len(vector) // SKETCHED)]
    rank = min(rows.shape) // EIGHTH
    generator = torch.Generator().manual_seed(0)
    sketch = torch.randn(rows.shape[1], rank, generator=generator).to(rows.device)
    for _ in range(2):
        basis, _ = torch.linalg.qr(rows @ sketch)
        sketch = rows.T @ basis
    return (sketch.double().square().sum() / rows.double().square().sum()).item()


def _norm(matrix: Tensor) -> float:
    return math.sqrt(_dot(matrix, matrix))


def _dot(left: Tensor, right: Tensor) -> float:
    """Block by block in float64, so that no copy of a large matrix is needed."""
    parts = zip(left.split(ROWS), right.split(ROWS), strict=True)
    return sum((one.double() * other.double()).sum().item() for one, other in parts)
