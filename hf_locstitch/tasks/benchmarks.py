"""What models are judged on: lm-eval's tasks, with how many shots, suites of them, and labelled sets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from hf_locstitch.checkpoints.ref import expand_home
from hf_locstitch.errors import RecipeError
from hf_locstitch.runtime.parsing import parse_yaml
from hf_locstitch.tasks.choosing_objectives import AnyObjective
from hf_locstitch.tasks.evaluation_sets import EvaluationSet, named_sets
from hf_locstitch.tasks.lm_eval_options import LmEvalOptions


class EvaluateOptions(BaseModel):
    """What a merge, its base, its finetunes and their plain average are judged on: lm-eval's tasks, labelled sets, or
    both.

    tasks: NAME or NAME:SHOTS. suite: a bundle of tasks. data: labelled sets by name, each a file, a surrogate, a data
    set org/name, or its fields. objective, metrics: of the sets that have none of their own. limit: examples per task
    or set, by default all. batch_size: by default the largest that fits. dtype: that models are judged in, by default
    their own. include_path: a folder of further task files. chat_template: whether to apply the model's to the prompts.
    lm_eval: further options of lm-eval's. parents, average: what the merge is compared with.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)

    tasks: tuple[str, ...] = ()
    suite: Literal["paper", "quick"] | None = None
    data: Annotated[dict[str, EvaluationSet], BeforeValidator(named_sets)] = Field(default_factory=dict)
    objective: AnyObjective | None = None
    metrics: tuple[str, ...] = ()
    limit: int | None = Field(default=None, ge=1)
    batch_size: int | None = Field(default=None, ge=1)
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    include_path: Path | None = None
    chat_template: bool = False
    lm_eval: LmEvalOptions = Field(default_factory=LmEvalOptions)
    parents: bool = True
    average: bool = False

    @field_validator("include_path")
    @classmethod
    def _expand_home(cls, value: Path | None) -> Path | None:
        return None if value is None else expand_home(value)

    @model_validator(mode="after")
    def _names_tasks(self) -> EvaluateOptions:
        if not self.tasks and self.suite is None and not self.data:
            raise ValueError("set tasks, a suite or data")
        if self.lm_eval.fewshot_as_multiturn and not self.chat_template:
            raise ValueError("lm_eval.fewshot_as_multiturn needs chat_template: turns are its")
        return self

    @field_validator("objective", mode="before")
    @classmethod
    def _objective_by_name(cls, value: Any) -> Any:
        """Or its fields as YAML has them, as on the command line."""
        if not isinstance(value, str):
            return value
        return parse_yaml(value) if value.lstrip().startswith("{") else {"kind": value}

    @property
    def sets(self) -> dict[str, EvaluationSet]:
        """`data`, with what holds for all sets filled in."""
        common = {"objective": self.objective, "metrics": self.metrics or None, "number": self.limit}
        return {name: asked.model_copy(update=_missing(asked, common)) for name, asked in self.data.items()}

    def dump(self) -> dict[str, Any]:
        """Fields that ask for the same: all that differ from the defaults."""
        fields = self.model_dump(mode="json", exclude={"data", "objective"}, exclude_defaults=True)
        fields |= {"objective": self.objective.model_dump(mode="json")} if self.objective is not None else {}
        return fields | ({"data": {name: one.dump() for name, one in self.data.items()}} if self.data else {})


def _missing(asked: EvaluationSet, common: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in common.items() if value is not None and not getattr(asked, key)}


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
