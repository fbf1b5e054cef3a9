"""Linear layers of a refit without data, solved for once more and compared with those of the merge."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from hf_locstitch.checkpoints.tensors import TORCH_DTYPE
from hf_locstitch.inspection.verification.fitted import Fit, Looked
from hf_locstitch.inspection.verification.report import Finding
from hf_locstitch.inspection.verification.sample import sample
from hf_locstitch.inspection.verification.solved import (
    Rows,
    Solving,
    cut_back,
    dense,
    inside,
    longest_change,
    moments,
    whole,
)
from hf_locstitch.localize.cost import free_memory
from hf_locstitch.stitch.dataless.layers import Unit
from hf_locstitch.stitch.dataless.opened import OpenedModels, matrices, put_part, take_apart
from hf_locstitch.stitch.dataless.shared_inputs import SharedInput
from hf_locstitch.stitch.refit.models import reading
from hf_locstitch.stitch.refit.weights import Part, Weights
from hf_locstitch.tasks.parameter_names import to_disk

CPU = torch.device("cpu")
EXPERTS = 4  # of a stack
BYTES = 80  # of memory for an element of layers that are solved together
EPSILON = torch.finfo(torch.float32).eps


def affordable(
    opened: OpenedModels, refitted: Collection[str], tasks: int, work: float
) -> list[tuple[Unit, Sequence[SharedInput]]]:
    """Layers that can be solved for with so much work and the free memory: one of each kind first. Of a stack of
    experts, a few."""
    units = [unit for unit in opened.layers.units if any(name in refitted for name in unit.disk)]
    by_kind: dict[str, list[int]] = {}
    for number, unit in enumerate(units):
        by_kind.setdefault(re.sub(r"\d+", "*", unit.groups[0].parameters[0]), []).append(number)
    first = [number for numbers in by_kind.values() for number in sample(numbers, 1)]
    others = [number for number in range(len(units)) if number not in first]
    memory, chosen = free_memory("cpu"), []
    for number in (*first, *sample(others, len(others))):
        unit = units[number]
        shared = [unit.inputs[one] for one in sample(range(len(unit.inputs)), EXPERTS)]
        elements = sum(math.prod(opened.layers.parts[name].shape) for group in unit.groups for name in group.parameters)
        cost = sum(_work(one, tasks) for one in shared)
        if cost <= work and BYTES * elements <= memory:
            work -= cost
            chosen.append((unit, shared))
    return chosen


def _work(shared: SharedInput, tasks: int) -> float:
    """Floating-point operations."""
    sizes = [
        (math.prod(linear.weight.shape), _inputs(linear.weight.shape, linear.transposed)) for linear in shared.linears
    ]
    width = max(width for _, width in sizes)
    return width**3 + sum(4 * (tasks + 1) * elements * width for elements, _ in sizes)


def _inputs(shape: Sequence[int], transposed: bool) -> int:
    return shape[0] if transposed else math.prod(shape[1:])


class LayerCheck:
    """The weights of layers that are solved together, which are fetched now."""

    def __init__(self, fit: Fit, opened: OpenedModels, unit: Unit, solving: Solving) -> None:
        self._fit, self._opened, self._unit, self._solving = fit, opened, unit, solving
        inputs = fit.inputs(unit.disk)
        self._reader = fit.merged(unit.disk)
        self._merged = self._weights(reading(self._reader), opened.layers.disk)
        self._covered = self._weights(fit.covered, opened.layers.disk)
        readers = [inputs[name] for name in ("base", *fit.order)]
        self._base, *self._finetuned = (self._weights(reading(one), list(one.checkpoint.tensors)) for one in readers)

    def _weights(self, read: Callable[[str], Tensor], disk: Collection[str]) -> Weights:
        return Weights(self._opened.layers.model, disk, read, CPU)

    def check(self, chosen: Sequence[SharedInput], looked: Looked) -> Iterator[Finding]:
        """Compare layers with what they should be. chosen: of the unit."""
        due: dict[str, Tensor] = {}
        slack: dict[str, Tensor] = {}
        places: dict[str, Tensor] = {}
        for shared in chosen:
            starts = matrices(self._base, shared.linears, shared.biased)
            for linear, start, rows in zip(shared.linears, starts, self._rows(shared, starts), strict=True):
                if isinstance(rows, Finding):
                    yield rows
                    continue
                for parameters, values in (
                    (due, _filled(start, rows.numbers, start[rows.numbers] + self._fit.scale * rows.values)),
                    (slack, _filled(start, rows.numbers, abs(self._fit.scale) * rows.slack)),
                    (places, _filled(start.bool(), rows.numbers, torch.ones_like(rows.values, dtype=torch.bool))),
                ):
                    for part, own in take_apart(values, linear):
                        put_part(parameters, part, own)
        yield from self._compare(due, slack, places, looked)

    def _rows(self, shared: SharedInput, starts: Sequence[Tensor]) -> Iterator[Rows | Finding]:
        """For each layer, rows of its change; or a finding, if that is longer than it may be."""
        linears, biased, scale = shared.linears, shared.biased, self._fit.scale
        found = moments(
            [(tuned - start).double() for tuned, start in zip(matrices(one, linears, biased), starts, strict=True)]
            for one in self._finetuned
        )
        solved = dense(found, self._solving, starts)
        masks = [covered > 0 for covered in matrices(self._covered, linears, biased)]
        all_covered = all(mask.all() for mask in masks)
        for number, (linear, merged) in enumerate(zip(linears, matrices(self._merged, linears, biased), strict=True)):
            change = torch.where(masks[number], merged.double() - starts[number], 0.0)
            length, most = float(change.norm()), abs(scale) * longest_change(starts[number], found.longest[number])
            rounding = float((self._epsilon(linear.weight.parameter) * merged[masks[number]]).double().norm())
            if not length <= 1.001 * most + rounding:
                what = "how far the values under the masks are from the base's, as a norm"
                yield Finding("values", self._name(linear.weight), what, f"{length:.6g}", f"at most {most:.6g}")
            elif all_covered:
                yield whole(solved[number])
            else:
                rows = inside(found, number, solved[number], masks[number], self._solving)
                at_most = scale and length + rounding >= 0.99 * most
                yield cut_back(rows, change[rows.numbers] / scale) if at_most else rows

    def _epsilon(self, parameter: str) -> float:
        """Of the dtype that the layer is written in."""
        names = self._merged.groups[parameter].disk
        return max(torch.finfo(TORCH_DTYPE[self._reader.checkpoint.info(name).dtype]).eps for name in names)

    def _name(self, part: Part) -> str:
        group = self._merged.groups[part.parameter]
        if group.direct:
            return group.disk[0]
        return part.parameter if part.index is None else f"{part.parameter}[{part.index}]"

    def _compare(
        self, due: dict[str, Tensor], slack: dict[str, Tensor], places: dict[str, Tensor], looked: Looked
    ) -> Iterator[Finding]:
        """By the names on disk."""

        def on_disk(parameters: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
            layers, found = self._opened.layers, {}
            for group in self._unit.groups:
                none = {name: torch.zeros(layers.parts[name].shape, dtype=dtype) for name in group.parameters}
                found |= to_disk(layers.model, group, {name: parameters.get(name, none[name]) for name in none})
            return found

        if not due:
            return
        wide, bounds, where = on_disk(due, torch.float64), on_disk(slack, torch.float64), on_disk(places, torch.bool)
        for name in self._unit.disk:
            if name in looked.names and where[name].any():
                error = bounds[name].reshape(-1) + EPSILON * wide[name].reshape(-1).abs()
                yield from self._fit.compare(name, wide[name].reshape(-1), error, where[name].reshape(-1), looked)


def _filled(like: Tensor, rows: Tensor, values: Tensor) -> Tensor:
    """A matrix of that shape with these rows, 0 elsewhere."""
    filled = torch.zeros(like.shape, dtype=values.dtype)
    filled[rows] = values
    return filled
