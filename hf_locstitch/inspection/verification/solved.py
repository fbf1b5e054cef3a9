"""The arithmetic of a refit without data once more, in float64 and independent of the solver's: rows of layers that
share an input. See stitch/dataless/solution.py for the formulas."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from pydantic import BaseModel, Field
from torch import Tensor

CAP = 0.3  # of the base's norm: a layer's change is at most this, or as long as the longest task vector
ROWS = 8  # of each layer at least,
WORK = 1e11  # floating-point operations for those of one layer, where more rows than that are solved for
SLACK = 0.02  # of the largest change in a row, and
UNSETTLED = 0.5  # of what is still to change: conjugate gradients stop early, and float32 steps lag behind
UNSTEADY = 5.0  # times how far float32 steps of another order may go
SETTLED = 200  # steps
SOLVED = 1e-28  # of what was to be solved, squared: no more is left of a row that is


class Solving(BaseModel):
    """How values were solved for, as recorded. ridge: ρ. steps: of conjugate gradients. low_rank: whether updates are
    of low rank, and the solution stays near their mean."""

    ridge: float = Field(gt=0, allow_inf_nan=False)
    steps: int = Field(ge=0, le=1000)
    low_rank: bool


@dataclass(frozen=True)
class Moments:
    """Sums over the tasks of layers that share an input. total, cross: S and Σ τ_i G_i of each layer [outputs, inputs].
    gram: Σ G_i [inputs, inputs]. longest: max ‖τ_i‖ of each layer."""

    total: list[Tensor]
    cross: list[Tensor]
    gram: Tensor
    tasks: int
    longest: list[float]


@dataclass(frozen=True)
class Rows:
    """Some rows of a layer's change. numbers: which. values [rows, inputs], and how far from them others may be, which
    were found in float32 and in fewer steps than are needed."""

    numbers: Tensor
    values: Tensor
    slack: Tensor


def moments(tasks: Iterable[Sequence[Tensor]]) -> Moments:
    """tasks: for each, the task vectors of the layers, float64 [outputs, inputs]."""
    found: Moments | None = None
    for vectors in tasks:
        width = vectors[0].shape[1]
        none = torch.zeros(width, width, dtype=torch.float64)
        gram = torch.stack([none, *(v.T @ v / v.square().sum() for v in vectors if v.any())]).sum(0)
        gram = gram * width / gram.trace() if gram.trace() > 0 else gram
        crosses, norms = [v @ gram for v in vectors], [float(v.norm()) for v in vectors]
        if found is None:
            found = Moments(list(vectors), crosses, gram, 1, norms)
            continue
        found = Moments(
            [total + v for total, v in zip(found.total, vectors, strict=True)],
            [cross + more for cross, more in zip(found.cross, crosses, strict=True)],
            found.gram + gram,
            found.tasks + 1,
            list(map(max, found.longest, norms)),
        )
    assert found is not None
    return found


def longest_change(base: Tensor, longest: float) -> float:
    """How long a layer's change may be. longest: the longest task vector."""
    return max(CAP * float(base.double().norm()), longest)


def dense(found: Moments, solving: Solving, bases: Sequence[Tensor]) -> list[Tensor]:
    """D of each layer, cut back to the length that is allowed. bases: their weights [outputs, inputs]."""
    images = [total @ found.gram for total in found.total]
    below = sum(float((total * image).sum()) for total, image in zip(found.total, images, strict=True))
    above = sum(float((total * cross).sum()) for total, cross in zip(found.total, found.cross, strict=True))
    share = 1 / found.tasks if solving.low_rank else above / below if below > 0 else 0.0
    factor, solved = torch.linalg.cholesky(_system(found, solving)), []
    for number, (total, cross, image) in enumerate(zip(found.total, found.cross, images, strict=True)):
        change = share * total + torch.cholesky_solve((cross - share * image).T, factor).T
        most = longest_change(bases[number], found.longest[number])
        solved.append(change * min(1.0, most / max(float(change.norm()), 1e-300)))
    return solved


def whole(change: Tensor) -> Rows:
    """All rows of a change in which nothing is left out by a mask."""
    return Rows(torch.arange(len(change)), change, SLACK * _largest(change).expand_as(change))


def inside(found: Moments, number: int, change: Tensor, mask: Tensor, solving: Solving) -> Rows:
    """Rows of a layer (by number), solved for inside its mask. change: D. mask: bool, both [outputs, inputs]."""
    matrix = _system(found, solving)
    width = len(matrix)
    count = min(len(change), max(ROWS, int(WORK / (2 * width**2 * (solving.steps + SETTLED)))))
    rows = torch.linspace(0, len(change) - 1, count).long()
    begin, kept = torch.where(mask[rows], change[rows], 0.0), mask[rows].double()
    rest = found.cross[number][rows] - begin @ found.gram
    values, settled = (begin + _gradients(matrix, rest, kept, steps) for steps in (solving.steps, SETTLED))
    # Where the system is badly conditioned, as of a router of few experts, a few steps in float32 end elsewhere.
    short = begin + _gradients(matrix.float(), rest.float(), kept.float(), solving.steps).double()
    apart = UNSETTLED * _largest(settled - values) + UNSTEADY * _largest(short - values)
    return Rows(rows, values, (SLACK * _largest(values) + apart).expand_as(values))


def cut_back(rows: Rows, found: Tensor) -> Rows:
    """The rows of a change that was cut back to the length allowed. found: its values, which tell the factor.

    To know that takes all rows, and is not needed: with another factor, the change would not have that length.
    """
    square = float(rows.values.square().sum())
    factor = min(1.0, max(0.0, float((found * rows.values).sum()) / square)) if square > 0 else 1.0
    return Rows(rows.numbers, factor * rows.values, factor * rows.slack)


def of_vectors(task_vectors: Sequence[Tensor]) -> Tensor:
    """Σ τ³ / Σ τ², element by element, 0 where nothing changed. task_vectors: float64."""
    squares = torch.stack([vector.square() for vector in task_vectors])
    shares = squares / squares.sum(0).clamp(min=torch.finfo(torch.float64).tiny)
    return (shares * torch.stack(list(task_vectors))).sum(0)


def _system(found: Moments, solving: Solving) -> Tensor:
    return found.gram + solving.ridge * found.tasks * torch.eye(len(found.gram)).double()


def _largest(change: Tensor) -> Tensor:
    return change.abs().amax(1, keepdim=True)


def _gradients(matrix: Tensor, rest: Tensor, mask: Tensor, steps: int) -> Tensor:
    """Conjugate gradients for rows of their own, preconditioned by the diagonal."""
    solution, residual = torch.zeros_like(rest), rest * mask
    scaled = residual / matrix.diagonal()
    direction, power = scaled, (residual * scaled).sum(1, keepdim=True)
    enough = SOLVED * power
    for _ in range(steps):
        open_ = power > enough  # else rounding is all that is left, and quotients of it mean nothing
        image = direction @ matrix * mask
        step = torch.where(open_, power / (direction * image).sum(1, keepdim=True), 0.0)
        solution, residual = solution + step * direction, residual - step * image
        scaled = residual / matrix.diagonal()
        before, power = power, torch.where(open_, (residual * scaled).sum(1, keepdim=True), power)
        direction = scaled + torch.where(open_, power / before, 0.0) * direction
    return solution
