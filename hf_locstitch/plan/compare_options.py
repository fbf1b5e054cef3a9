"""What is compared, and by what: the `compare` field of a recipe."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, field_validator

from hf_locstitch.tasks.benchmarks import EvaluateOptions

LARGEST = 1000  # merges of one comparison
SEARCHED = 100_000  # combinations that trials may choose from

Grid: TypeAlias = Mapping[str, tuple[Any, ...]]


class CompareOptions(BaseModel):
    """grid: fields of the recipe, and `density` and `scope` as the flags of `merge` have them, each with the values
    to try; every combination is merged. Several such grids: all of their combinations. select: what the merges are
    judged on to choose one; the recipe's `evaluate` says what the chosen one is reported on, which should be other
    examples. by: the largest `mean` over the tasks of the share of the best finetune's score that is kept, or the
    largest such share on the `worst` task. trials: so many combinations only, chosen by Optuna (TPE) from `seed` on
    by the scores before.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    grid: tuple[Grid, ...] = Field(min_length=1)
    select: EvaluateOptions
    by: Literal["mean", "worst"] = "mean"
    trials: int | None = Field(default=None, ge=1)
    seed: int = Field(default=0, ge=0)

    @field_validator("grid", mode="before")
    @classmethod
    def _one_alone(cls, value: Any) -> Any:
        """A grid alone is a list of one, and so is a value."""
        grids = [value] if isinstance(value, Mapping) else value
        if not isinstance(grids, list | tuple):
            return value
        return [
            {axis: tried if isinstance(tried, list | tuple) else (tried,) for axis, tried in grid.items()}
            if isinstance(grid, Mapping)
            else grid
            for grid in grids
        ]

    @field_validator("grid")
    @classmethod
    def _has_values(cls, value: tuple[Grid, ...]) -> tuple[Grid, ...]:
        if empty := [axis for grid in value for axis, tried in grid.items() if not tried]:
            raise ValueError(f"no values to try for {empty[0]}")
        return value

    def dump(self) -> dict[str, Any]:
        """Fields that ask for the same: all that differ from the defaults."""
        return {**self.model_dump(mode="json", exclude_defaults=True), "select": self.select.dump()}

    @property
    def size(self) -> int:
        """The number of combinations."""
        return sum(math.prod(len(tried) for tried in grid.values()) for grid in self.grid)
