"""Which of lm-eval's tasks are run, with how many shots; and bundles of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from hf_locstitch.errors import RecipeError


@dataclass(frozen=True)
class TaskSpec:
    """name: of an lm-eval task, group or tag. shots: examples in the prompt; None: as the task has it."""

    name: str
    shots: int | None = None

    def __str__(self) -> str:
        return self.name if self.shots is None else f"{self.name}:{self.shots}"


@dataclass(frozen=True)
class Suite:
    """limit: examples a task unless another limit is asked for; None for all."""

    tasks: tuple[TaskSpec, ...]
    limit: int | None = None


# The paper judges its language models on MMLU, ARC and TruthfulQA and names no shots; these are the customary ones.
# TruthfulQA's tasks have six examples of their own in the prompt and allow no others.


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
            f"{text!r} is no task: write NAME, or NAME:SHOTS with the number of examples, such as mmlu:5."
        )
    return TaskSpec(name, int(shots) if colon else None)


def chosen_tasks(tasks: Sequence[str], suite: str | None, limit: int | None) -> tuple[list[TaskSpec], int | None]:
    """The tasks and the limit that are asked for. Raises RecipeError for an unknown suite or a task named twice."""
    if suite is not None and suite not in SUITES:
        raise RecipeError(f"unknown suite {suite!r} (known are {', '.join(SUITES)}).")
    bundle = SUITES[suite] if suite is not None else Suite(())
    specs = [*bundle.tasks, *map(parse_task, tasks)]
    if not specs:
        raise RecipeError(f"nothing says what to evaluate: give --tasks NAME..., or --suite {'|'.join(SUITES)}.")
    names = [spec.name for spec in specs]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise RecipeError(f"the task {twice[0]!r} is named twice. Name it once.")
    if limit is not None and limit < 1:
        raise RecipeError(f"--limit must be 1 or more, not {limit}.")
    return specs, limit if limit is not None else bundle.limit
