"""Which lm-eval tasks are run, with how many shots; and suites of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from hf_locstitch.checkpoints.ref import expand_home
from hf_locstitch.errors import RecipeError


class EvaluateOptions(BaseModel):
    """lm-eval's tasks for a merge, its base, its finetunes and their plain average.

    tasks: NAME or NAME:SHOTS. suite: a bundle of tasks. limit: examples per task, by default all. batch_size: by
    default the largest that fits. include_path: a folder of further task files. chat_template: whether to apply the
    model's to the prompts. parents, average: what the merge is compared with.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)

    tasks: tuple[str, ...] = ()
    suite: Literal["paper", "quick"] | None = None
    limit: int | None = Field(default=None, ge=1)
    batch_size: int | None = Field(default=None, ge=1)
    include_path: Path | None = None
    chat_template: bool = False
    parents: bool = True
    average: bool = False

    @field_validator("include_path")
    @classmethod
    def _expand_home(cls, value: Path | None) -> Path | None:
        return None if value is None else expand_home(value)

    @model_validator(mode="after")
    def _names_tasks(self) -> EvaluateOptions:
        if not self.tasks and self.suite is None:
            raise ValueError("set tasks or a suite")
        return self


@dataclass(frozen=True)
class TaskSpec:
    """name: of an lm-eval task, group or tag. shots: examples in the prompt; None: as the task has it."""

    name: str
    shots: int | None = None

    def __str__(self) -> str:
        return self.name if self.shots is None else f"{self.name}:{self.shots}"


@dataclass(frozen=True)
class Suite:
    """limit: examples per task unless another limit is given; None for all."""

    tasks: tuple[TaskSpec, ...]
    limit: int | None = None


# The paper judges its language models on MMLU, ARC and TruthfulQA and names no shots; these are the customary ones.
# TruthfulQA's tasks have six examples of their own in the prompt and allow no others.
SUITES: Mapping[str, Suite] = MappingProxyType({
    "paper": Suite((
        TaskSpec("mmlu", 5), TaskSpec("arc_easy", 0), TaskSpec("arc_challenge", 25),
        TaskSpec("truthfulqa_mc1", 0), TaskSpec("truthfulqa_mc2", 0),
    )),
    "quick": Suite((TaskSpec("arc_easy", 0), TaskSpec("arc_challenge", 0), TaskSpec("truthfulqa_mc1", 0)), limit=100),
})  # fmt: skip


def parse_task(text: str) -> TaskSpec:
    """NAME or NAME:SHOTS. Raises RecipeError."""
    name, colon, shots = text.partition(":")
    if not name or (colon and not shots.isdecimal()):
        raise RecipeError(
            f"invalid task {text!r}: use NAME, or NAME:SHOTS with the number of few-shot examples, such as mmlu:5."
        )
    return TaskSpec(name, int(shots) if colon else None)


def chosen_tasks(tasks: Sequence[str], suite: str | None, limit: int | None) -> tuple[list[TaskSpec], int | None]:
    """The requested tasks and limit. Raises RecipeError for an unknown suite or a task given twice."""
    if suite is not None and suite not in SUITES:
        raise RecipeError(f"unknown suite {suite!r} (choose from {', '.join(SUITES)}).")
    bundle = SUITES[suite] if suite is not None else Suite(())
    specs = [*bundle.tasks, *map(parse_task, tasks)]
    if not specs:
        raise RecipeError(f"no tasks given: use --tasks NAME... or --suite {'|'.join(SUITES)}.")
    names = [spec.name for spec in specs]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise RecipeError(f"the task {twice[0]!r} is given twice. Give it once.")
    return specs, limit if limit is not None else bundle.limit


def make_options(fields: Mapping[str, Any]) -> EvaluateOptions:
    """Raises RecipeError with every fault."""
    try:
        return EvaluateOptions.model_validate(fields)
    except ValidationError as error:
        faults = [f"{'.'.join(map(str, e['loc']))}: {e['msg']} (got {e['input']!r})" for e in error.errors()]
        raise RecipeError(f"invalid evaluation options: {'; '.join(faults)}.") from error
