"""What is compared, and by what: the `compare` field of a recipe."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from hf_locstitch.tasks.benchmarks import EvaluateOptions

LARGEST = 1000  # merges of one comparison, unless trials bound them


class CompareOptions(BaseModel):
    """grid: fields of the recipe, and `density` and `scope` as the flags of `merge` have them, each with the values to
    try; every combination is merged. select: what the merges are judged on to choose one; the recipe's `evaluate` says
    what the chosen one is reported on, which should be other examples. by: the largest `mean` over the tasks of the
    share of the best finetune's score that is kept, or the largest such share on the `worst` task. trials: so many
    combinations only, chosen by Optuna (TPE) from `seed` on by the scores before.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    grid: Mapping[str, tuple[Any, ...]] = Field(min_length=1)
    select: EvaluateOptions
    by: Literal["mean", "worst"] = "mean"
    trials: int | None = Field(default=None, ge=1)
    seed: int = Field(default=0, ge=0)

    @field_validator("grid", mode="before")
    @classmethod
    def _one_alone(cls, value: Any) -> Any:
        """A value alone is a list of one."""
        if not isinstance(value, Mapping):
            return value
        return {axis: tried if isinstance(tried, list | tuple) else (tried,) for axis, tried in value.items()}

    @field_validator("grid")
    @classmethod
    def _has_values(cls, value: Mapping[str, tuple[Any, ...]]) -> Mapping[str, tuple[Any, ...]]:
        if empty := [axis for axis, tried in value.items() if not tried]:
            raise ValueError(f"no values to try for {empty[0]}")
        return value

    @property
    def size(self) -> int:
        """The number of combinations."""
        return math.prod(len(tried) for tried in self.grid.values())
