"""What a refit without data will cost, estimated from headers before any weight is read."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from hf_locstitch.runtime.dtypes import ITEM_BYTES
from hf_locstitch.runtime.human import human, in_each
from hf_locstitch.runtime.processes import launched
from hf_locstitch.runtime.settings import Settings
from hf_locstitch.stitch.dataless.layers import Layers, layers_of
from hf_locstitch.stitch.dataless.shared_inputs import SharedInput
from hf_locstitch.stitch.fit_cost import LIBRARIES
from hf_locstitch.stitch.fitting import Fittable
from hf_locstitch.stitch.refit.solve import ROWS
from hf_locstitch.stitch.refit.weights import HELD

FLOAT = 4  # bytes
STEPS = 10  # of conjugate gradients
STRIP = 1 << 27  # elements of the layers that share an input, which are solved for together unless memory is short
COPIES = 5  # of these: task vectors, their sums, solution, mask; and
LAYERS = 5  # of the largest of them: the base's, and what is computed from it
GRAMS = 4  # Gram matrix of a task, of all, the system and its factor
VECTORS = 10  # for each of the ROWS that a thread solves for at once
CONVERTED = 5  # numbers in place of one, while experts become a stack


@dataclass(frozen=True)
class DatalessCost:
    """Bytes in each process, except flops and the two on disk. layers: copies of linear layers that share an input.
    grams: Gram matrices. stacks: of experts that are not read one by one. dense, values: on
    disk, of all processes together."""

    layers: int
    grams: int
    stacks: int
    dense: int
    values: int
    flops: float
    processes: int = 1

    @property
    def peak(self) -> int:
        return LIBRARIES + self.layers + self.grams + self.stacks

    @property
    def disk(self) -> int:
        return self.dense + self.values

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "peak": self.peak, "disk": self.disk}

    def describe(self) -> str:
        """For people, one line."""
        each = in_each(self.processes)
        stacks = f", {human(self.stacks)} stacks of experts" if self.stacks else ""
        return (
            f"solving    at most about {human(self.peak)} of memory{each} ({human(self.layers)} linear layers that "
            f"share an input, {human(self.grams)} Gram matrices{stacks}), {human(self.disk)} of disk; "
            f"{self.flops / 1e12:.3g} TFLOP"
        )


def dataless_cost(plan: Fittable) -> DatalessCost | None:
    """None where there is no linear layer. Raises RequestError as layers_of."""
    layers = layers_of(plan.base, [info.name for info in plan.mask_tensors])
    if not layers.units:
        return None
    tasks = len(plan.finetuned)
    most = strip_size(layers, tasks, plan.settings)
    held, grams, stacks = _memory(layers, tasks, most, plan.settings)
    shared = [one for unit in layers.units for one in unit.inputs]
    work = sum(rows * one.width**2 for one in shared for rows in _outputs(one))
    products = 2 * (2 * 2 * tasks + 2) + 2 * STEPS  # moments twice, two solutions
    return DatalessCost(
        layers=held,
        grams=grams,
        stacks=stacks,
        dense=FLOAT * plan.n,
        values=max(ITEM_BYTES[info.dtype] for info in plan.mask_tensors) * min(plan.n, tasks * plan.k),
        flops=float(work * products),
        processes=launched(),
    )


def strip_size(layers: Layers, tasks: int, settings: Settings) -> int:
    """Elements of the layers that are in memory at once: fewer where memory is short, but never less than a layer."""
    most = STRIP
    while (
        settings.limit is not None and most and LIBRARIES + sum(_memory(layers, tasks, most, settings)) > settings.limit
    ):
        most //= 2
    return most


def _memory(layers: Layers, tasks: int, most: int, settings: Settings) -> tuple[int, int, int]:
    """Bytes of the layers and Gram matrices of one input, where they are most, and of the stacks."""
    each = [_solving(shared, tasks, most, settings) for unit in layers.units for shared in unit.inputs]
    return (*max(each, key=sum), _stacks(layers, tasks))


def _solving(shared: SharedInput, tasks: int, most: int, settings: Settings) -> tuple[int, int]:
    """Bytes of the layers, and of the Gram matrices."""
    strips = shared.strips(most)
    sizes = [[linear.matrix[0] * shared.width for linear in strip] for strip in strips]
    rows = VECTORS * settings.workers * ROWS * shared.width
    layers = COPIES * max(map(sum, sizes)) + LAYERS * max(map(max, sizes)) + rows
    return FLOAT * layers, FLOAT * (GRAMS + (tasks if len(strips) > 1 else 0)) * shared.width**2


def _outputs(shared: SharedInput) -> Iterable[int]:
    return (linear.matrix[0] for linear in shared.linears)


def _stacks(layers: Layers, tasks: int) -> int:
    """Bytes of stacks whose experts cannot be read one by one: some of the base's, the finetunes', the solution's and
    the mask's, and what is computed from the largest."""
    linears = [linear for unit in layers.units for shared in unit.inputs for linear in shared.linears]
    sizes = {
        linear.weight.parameter: linear.weight.stacked * math.prod(linear.weight.shape)
        for linear in linears
        if linear.weight.index is not None and layers.pieces_of(linear.weight) is None
    }
    following = list(sizes.values())  # in the order in which they are read
    held = max((sum(following[first : first + HELD]) for first in range(len(following))), default=0)
    return FLOAT * ((tasks + 3) * held + (CONVERTED + 2) * max(following, default=0))
