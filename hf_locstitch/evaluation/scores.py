"""What was measured, and the arithmetic of comparing it. Plain numbers in, plain numbers out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hf_locstitch.runtime.human import counted


@dataclass(frozen=True)
class Score:
    """metric: its name; lm-eval's with the filter after a comma where there is one. stderr: None if not known."""

    metric: str
    value: float
    stderr: float | None = None
    higher_is_better: bool = True


@dataclass(frozen=True)
class TaskResult:
    """One model on one task or group of lm-eval's, or on one labelled set. The first score is the main one.

    shots: examples in the prompt; None where the members of a group differ. limit: examples per task as requested,
    None for all. examples: how many were evaluated. dataset: its id on the Hub, None for local data; config, split and
    revision (a commit) of it where there is one. subtasks: of a group, member -> value of its main metric. lm_eval,
    hf_locstitch: the version of which of the two measured it. Of a labelled set: objective, its kind; head, the name of
    the input whose head judged, None for the model's own; left_out, how many rows have no answer that could be judged.
    hub_task: what the Hub calls such a task.
    """

    task: str
    shots: int | None
    limit: int | None
    examples: int
    scores: tuple[Score, ...]
    dataset: str | None = None
    config: str | None = None
    split: str | None = None
    revision: str | None = None
    version: str | None = None
    lm_eval: str = ""
    date: str = ""
    subtasks: Mapping[str, float] = field(default_factory=dict)
    objective: str | None = None
    head: str | None = None
    hub_task: str = "text-generation"
    left_out: int = 0
    hf_locstitch: str = ""

    @property
    def main(self) -> Score:
        return self.scores[0]

    @property
    def measured_by(self) -> str:
        """What measured it, and how: `lm-eval 0.4.13, 5-shot`."""
        if self.objective is not None:
            head = "" if self.head is None else f", head of {self.head}"
            return f"hf-locstitch {self.hf_locstitch}, {self.objective}{head}"
        shots = f"{self.shots}-shot" if self.shots is not None else "shots as in the task"
        return f"lm-eval {self.lm_eval}, {shots}"

    @property
    def title(self) -> str:
        """For people: how it was asked, and whether only some examples were."""
        notes = [] if self.shots is None else [f"{self.shots}-shot"]
        notes += [self.taken] if self.taken else []
        return f"{self.task} ({', '.join(notes)})" if notes else self.task

    @property
    def taken(self) -> str:
        """Which examples, if only some: lm-eval takes the first ones, and of a labelled set rows are drawn."""
        if self.limit is None:
            return ""
        if self.objective is None:
            return f"first {counted(self.limit, 'example')}"
        return counted(self.limit, "drawn example")


def result_from_json(fields: Mapping[str, Any]) -> TaskResult:
    """The inverse of dataclasses.asdict. Raises TypeError or KeyError if the fields do not fit."""
    return TaskResult(**{**fields, "scores": tuple(Score(**score) for score in fields["scores"])})


@dataclass(frozen=True)
class Comparison:
    """A score compared with others of the same task and metric.

    difference: value − the base's; stderr: of the difference; exceeds: whether it is larger than that, in absolute
    value. best_parent: name of the finetune that scores best; kept: share of its score. None: unknown.
    """

    difference: float | None = None
    stderr: float | None = None
    exceeds: bool | None = None
    best_parent: str | None = None
    kept: float | None = None


def compare(score: Score, base: Score | None, parents: Mapping[str, Score]) -> Comparison:
    """Compare with the base and the finetunes, where they are known."""
    difference = stderr = exceeds = None
    if base is not None:
        difference = score.value - base.value
        stderr = difference_stderr(score.stderr, base.stderr)
        exceeds = None if stderr is None else abs(difference) > stderr
    name = best(parents)
    return Comparison(difference, stderr, exceeds, name, None if name is None else kept_share(score, parents[name]))


def difference_stderr(one: float | None, other: float | None) -> float | None:
    """Standard error of a difference of independent scores. Both models see the same examples, so the true
    standard error is usually smaller, and the test is conservative."""
    return None if one is None or other is None else math.hypot(one, other)


def best(scores: Mapping[str, Score]) -> str | None:
    """Name of the best score, the first among equals; None if there are no scores."""
    if not scores:
        return None
    return max(scores, key=lambda name: scores[name].value * (1 if scores[name].higher_is_better else -1))


def kept_share(score: Score, parent: Score) -> float | None:
    """How much of the parent's score is kept, 1 for all; None where the ratio is meaningless.

    Where lower is better, as for a perplexity, the parent's share of the score.
    """
    part, whole = (score.value, parent.value) if score.higher_is_better else (parent.value, score.value)
    return part / whole if whole > 0 and part >= 0 else None


def common(values: Sequence[Any]) -> Any:
    """The one value that all have; None if they differ or there are none."""
    return values[0] if values and all(value == values[0] for value in values) else None
