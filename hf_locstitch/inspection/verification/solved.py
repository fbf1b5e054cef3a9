"""The values of a refit without data, checked from weights alone: solved for once more, in float64, in a few rows.

Independent of the solver's arithmetic; only which layers share an input is found in the same way.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_locstitch.artifacts.mask_file import MaskFile
from hf_locstitch.checkpoints.checkpoint import Checkpoint
from hf_locstitch.checkpoints.reader import CheckpointReader
from hf_locstitch.checkpoints.tensors import TORCH_DTYPE
from hf_locstitch.inspection.verification.inputs import fetch_tensors
from hf_locstitch.inspection.verification.report import Finding
from hf_locstitch.stitch.dataless.layers import Unit
from hf_locstitch.stitch.dataless.opened import OpenedModels, matrices, open_models
from hf_locstitch.stitch.refit.models import reading
from hf_locstitch.stitch.refit.weights import Weights

CPU = torch.device("cpu")
ROWS = 8  # of each layer
SLACK = 0.02  # of the largest change in a row, and
UNSETTLED = 0.5  # of what is still to change: conjugate gradients stop early, and float32 steps lag behind
SETTLED = 200  # steps


@dataclass(frozen=True)
class Solved:
    """merged, base, finetuned: checkpoints, the latter in the order of summation. masks: whose union was solved for.
    stitch: as recorded. scale: the recipe's."""

    merged: Checkpoint
    base: Checkpoint
    finetuned: Sequence[Checkpoint]
    masks: Mapping[str, MaskFile]
    stitch: Mapping[str, Any]
    scale: float

    def check(self, localized: Sequence[str], groups: int) -> Iterator[Finding]:
        """In the linear layers of so many inputs, spread over the model. Raises RequestError, IntegrityError."""
        closed = [CheckpointReader(one, {}) for one in (self.base, *self.finetuned)]
        opened = open_models(closed[0], closed[1:], localized, CPU)
        units = [unit for unit in opened.layers.units if len(unit.inputs) == 1]
        count = min(groups, len(units))
        for unit in [units[number * len(units) // count] for number in range(count)]:
            yield from self._check(opened, unit)

    def _check(self, opened: OpenedModels, unit: Unit) -> Iterator[Finding]:
        """The files that hold these layers are fetched."""

        def weights(checkpoint: Checkpoint) -> Weights:
            return Weights(opened.layers.model, opened.layers.disk, reading(fetch_tensors(checkpoint, unit.disk)), CPU)

        shared = unit.inputs[0]
        linears, biased = shared.linears, shared.biased
        starts = matrices(weights(self.base), linears, biased)
        tasks = [
            [
                (tuned - start).double()
                for tuned, start in zip(matrices(weights(one), linears, biased), starts, strict=True)
            ]
            for one in self.finetuned
        ]
        covered = matrices(Weights(opened.layers.model, opened.layers.disk, self._covered, CPU), linears, biased)
        merged = weights(self.merged)
        each = zip(linears, matrices(merged, linears, biased), starts, covered, strict=True)
        for number, (linear, found, start, mask) in enumerate(each):
            name = merged.groups[linear.weight.parameter].disk[0]
            most = max(0.3 * float(start.norm()), *(float(task[number].norm()) for task in tasks))
            if float((found - start).norm()) > 0.99 * self.scale * most:
                continue  # it was cut back to that length
            rows, change, settled = solve(tasks, number, mask > 0, start.double(), self.stitch)
            due, rounding = start[rows] + self.scale * change, torch.finfo(merged_dtype(self.merged, name)).eps
            unsure = SLACK * _largest(change) + UNSETTLED * _largest(settled - change)
            slack = self.scale * unsure + rounding * due.abs()
            yield from _compare(name, found[rows].double(), due, slack, mask[rows] > 0)

    def _covered(self, name: str) -> Tensor:
        shape = self.base.info(name).shape
        covered = torch.zeros(math.prod(shape), dtype=torch.bool)
        for mask in self.masks.values():
            covered[torch.from_numpy(mask.positions(name))] = True
        return covered.view(shape)


def _largest(change: Tensor) -> Tensor:
    return change.abs().amax(1, keepdim=True)


def merged_dtype(merged: Checkpoint, name: str) -> torch.dtype:
    return TORCH_DTYPE[merged.info(name).dtype]


def solve(
    tasks: Sequence[Sequence[Tensor]], number: int, mask: Tensor, base: Tensor, stitch: Mapping[str, Any]
) -> tuple[Tensor, Tensor, Tensor]:
    """Some rows of a layer, by number, their change, and what it would be after many more steps.

    tasks: task vectors of each task, of each layer. See
    stitch/dataless/solution.py for the formulas."""
    width, count = mask.shape[1], len(tasks)
    grams = []
    for vectors in tasks:
        gram = sum((v.T @ v / v.square().sum() for v in vectors if v.any()), torch.zeros(width, width).double())
        grams.append(gram * width / gram.trace() if gram.trace() > 0 else gram)
    summed = torch.stack(grams).sum(0)
    totals = [torch.stack(layer).sum(0) for layer in zip(*tasks, strict=True)]
    crosses = [
        torch.stack([v @ g for v, g in zip(layer, grams, strict=True)]).sum(0) for layer in zip(*tasks, strict=True)
    ]
    below = sum(float((total @ summed * total).sum()) for total in totals)
    above = sum(float((total * cross).sum()) for total, cross in zip(totals, crosses, strict=True))
    share = 1 / count if stitch["low_rank"] else above / below if below > 0 else 0.0
    matrix = summed + stitch["ridge"] * count * torch.eye(width).double()
    total, cross = totals[number], crosses[number]
    dense = share * total + torch.linalg.solve(matrix, cross - share * total @ summed, left=False)
    most = max(0.3 * float(base.norm()), *(float(vectors[number].norm()) for vectors in tasks))
    dense *= min(1.0, most / max(float(dense.norm()), 1e-300))
    rows = torch.linspace(0, len(total) - 1, min(ROWS, len(total))).long()
    begin = torch.where(mask, dense, 0.0)[rows]
    if mask.all():
        return rows, begin, begin
    rest, kept = cross[rows] - begin @ summed, mask[rows].double()
    found, settled = (begin + _gradients(matrix, rest, kept, steps) for steps in (stitch["steps"], SETTLED))
    return rows, found, settled


def _gradients(matrix: Tensor, rest: Tensor, mask: Tensor, steps: int) -> Tensor:
    """Conjugate gradients for rows of their own, preconditioned by the diagonal."""
    solution, residual = torch.zeros_like(rest), rest * mask
    scaled = residual / matrix.diagonal()
    direction, power = scaled, (residual * scaled).sum(1, keepdim=True)
    for _ in range(steps):
        image = direction @ matrix * mask
        step = torch.nan_to_num(power / (direction * image).sum(1, keepdim=True))
        solution, residual = solution + step * direction, residual - step * image
        scaled = residual / matrix.diagonal()
        new = (residual * scaled).sum(1, keepdim=True)
        direction, power = scaled + torch.nan_to_num(new / power) * direction, new
    return solution


def _compare(name: str, found: Tensor, due: Tensor, slack: Tensor, mask: Tensor) -> Iterator[Finding]:
    if (far := ((found - due).abs() > slack) & mask).any():
        row, column = (int(place) for place in far.nonzero()[0])
        what = f"a value that was solved for (of {int(mask.sum())} looked at, {int(far.sum())} are off)"
        yield Finding("values", name, what, f"{found[row, column]:.6g}", f"about {due[row, column]:.6g}")
