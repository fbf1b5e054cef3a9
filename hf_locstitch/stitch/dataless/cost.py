"""What a refit without data will cost, estimated from headers before any weight is read."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

from hf_locstitch.checkpoints.localizable import BLOCKS
from hf_locstitch.runtime.dtypes import ITEM_BYTES
from hf_locstitch.runtime.human import human
from hf_locstitch.runtime.processes import launched
from hf_locstitch.stitch.fit_cost import LIBRARIES
from hf_locstitch.stitch.fitting import Fittable

FLOAT = 4  # bytes
STEPS = 10  # of conjugate gradients
LAYERS = 6  # copies of the linear layers that share an input: task vectors, base, sums, solution, mask
GRAMS = 4  # Gram matrix of a task, of all, the system and its factor


@dataclass(frozen=True)
class DatalessCost:
    """Bytes in each process, except flops and the two on disk. layers: copies of the largest linear layers that may
    share an input. grams: Gram matrices of the widest. dense, values: on disk, of all processes together."""

    layers: int
    grams: int
    dense: int
    values: int
    flops: float
    processes: int = 1

    @property
    def peak(self) -> int:
        return LIBRARIES + self.layers + self.grams

    @property
    def disk(self) -> int:
        return self.dense + self.values

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "peak": self.peak, "disk": self.disk}

    def describe(self) -> str:
        """For people, one line."""
        each = f" in each of {self.processes} processes" if self.processes > 1 else ""
        return (
            f"solving    at most about {human(self.peak)} of memory{each} ({human(self.layers)} linear layers that "
            f"share an input, {human(self.grams)} Gram matrices), {human(self.disk)} of disk; "
            f"{self.flops / 1e12:.3g} TFLOP"
        )


def dataless_cost(plan: Fittable) -> DatalessCost | None:
    """None where there is no linear layer."""
    shapes = {info.name: info.shape for info in plan.mask_tensors if len(info.shape) > 1}
    if not shapes:
        return None
    alike: Counter[tuple[str, int]] = Counter()  # block of layers, width -> elements
    for name, shape in shapes.items():
        block = name[: found.end()] if (found := BLOCKS.search(name)) else name
        alike[block, shape[-1]] += math.prod(shape)
    tasks, widest = len(plan.finetuned), max(min(shape[-1], math.prod(shape)) for shape in shapes.values())
    work = sum(math.prod(shape) * shape[-1] for shape in shapes.values())
    products = 2 * (2 * 2 * tasks + 2) + 2 * STEPS  # moments twice, two solutions
    return DatalessCost(
        layers=FLOAT * LAYERS * max(alike.values()),
        grams=FLOAT * GRAMS * widest**2,
        dense=FLOAT * plan.n,
        values=max(ITEM_BYTES[info.dtype] for info in plan.mask_tensors) * min(plan.n, tasks * plan.k),
        flops=float(work * products),
        processes=launched(),
    )
