"""The merges that are compared: rows of the tables, each one merge or several of which validation chooses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

WITH_DATA = ("saliency", "mask")
RIVALS = ("average", "task arithmetic, tuned", "TIES, tuned")
# Measured for other numbers of tasks, too.
COUNTED = (*RIVALS, "magnitude 10%", "magnitude, tuned")
# What is left of the base is measured of these.
REMEMBERED = (*RIVALS, "magnitude 1%", "magnitude 5%", "magnitude 10%", "mask 1%")


@dataclass(frozen=True)
class Grid:
    """densities: of magnitude's masks. by_tensor: of those with scope tensor. tuned: of these and of TIES, what
    validation chooses from.

    sparse: of masks found with data. counts: of merged tasks; a testbed's own number always. skills: how many are
    removed and added again.
    """

    densities: Sequence[float] = (0.01, 0.05, 0.1, 0.2)
    by_tensor: Sequence[float] = (0.01, 0.05, 0.1)
    tuned: Sequence[float] = (0.05, 0.1, 0.2)
    scales: Sequence[float] = (0.2, 0.3, 0.5, 0.7, 1.0)
    ties_scales: Sequence[float] = (1.0, 1.5)
    sparse: float = 0.01
    counts: Sequence[int] = (2, 8)
    skills: int = 3


@dataclass(frozen=True)
class Merge:
    """By Localize-and-Stitch, or by a method that is named. localizer: of the masks, if there are any."""

    name: str
    localizer: Mapping[str, Any] = field(default_factory=dict)
    method: str = ""
    scale: float = 1.0

    @property
    def stitched(self) -> bool:
        """Whether it can be put together of localized checkpoints."""
        return not self.method

    @property
    def looks_at_data(self) -> bool:
        return self.localizer.get("method") in WITH_DATA


def magnitude(density: float, scope: str = "model") -> Merge:
    name = f"magnitude {100 * density:g}%" + ("" if scope == "model" else f", scope {scope}")
    return Merge(name, {"method": "magnitude", "density": density, "scope": scope})


def with_data(localizer: str, density: float) -> Merge:
    return Merge(f"{localizer} {100 * density:g}%", {"method": localizer, "density": density, "micro_batch": 32})


def ties(density: float, scale: float = 1.0) -> Merge:
    name = f"TIES {100 * density:g}%" + ("" if scale == 1 else f", scale {scale:g}")
    return Merge(name, magnitude(density).localizer, "ties", scale)


def task_arithmetic(scale: float) -> Merge:
    return Merge(f"task arithmetic, scale {scale:g}", method="task-arithmetic", scale=scale)


def rows(grid: Grid) -> dict[str, Sequence[Merge]]:
    """By name."""
    dataless = [magnitude(density) for density in grid.densities]
    by_tensor = [magnitude(density, "tensor") for density in grid.by_tensor]
    learned = [with_data(localizer, grid.sparse) for localizer in WITH_DATA]
    single = [Merge("average", method="average"), *dataless, *by_tensor, *learned, *map(ties, grid.tuned)]
    return {
        **{merge.name: [merge] for merge in single},
        "task arithmetic, tuned": [task_arithmetic(scale) for scale in grid.scales],
        "TIES, tuned": [ties(density, scale) for density in grid.tuned for scale in grid.ties_scales],
        "magnitude, tuned": [magnitude(density) for density in grid.tuned],
    }
