"""Labelled sets as a suite: each under its objective, with the head that judges, by its metrics."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from hf_locstitch.checkpoints.config import architecture
from hf_locstitch.errors import CheckpointError, RecipeError
from hf_locstitch.evaluation.models import Model
from hf_locstitch.evaluation.running import explaining_memory
from hf_locstitch.evaluation.scores import Score, TaskResult
from hf_locstitch.evaluation.suite import Suite
from hf_locstitch.runtime.human import counted
from hf_locstitch.runtime.processes import Processes
from hf_locstitch.runtime.progress import Progress
from hf_locstitch.runtime.version import __version__
from hf_locstitch.tasks.answers import Answers, joined
from hf_locstitch.tasks.benchmarks import EvaluateOptions
from hf_locstitch.tasks.choosing_metrics import chosen_metrics
from hf_locstitch.tasks.choosing_objectives import suggest
from hf_locstitch.tasks.custom_code import refuse_custom_code
from hf_locstitch.tasks.evaluation_sets import EvaluationSet, open_evaluation_set
from hf_locstitch.tasks.leaks import JudgedTask, texts_of
from hf_locstitch.tasks.metric import Metric
from hf_locstitch.tasks.objective import NoAnswers, Objective
from hf_locstitch.tasks.positions import within_positions
from hf_locstitch.tasks.sets import OpenSet, Rows, open_rows

if TYPE_CHECKING:
    from pathlib import Path

    from hf_locstitch.evaluation.judged_model import Loading

BATCH = 32  # examples
BLOCK = 512  # examples that are prepared together: images take half a megabyte each


@dataclass(frozen=True)
class JudgedSet:
    """head: the input whose head judges every model; None: each its own. note: on its split, if there is anything to
    say. classes: how many there are; 1 without labels."""

    name: str
    data: OpenSet[EvaluationSet]
    note: str | None
    objective: Objective
    classes: int
    metrics: Mapping[str, Metric]
    head: Model | None

    @property
    def needs_head(self) -> bool:
        """Whether each model must bring a head of its own."""
        return self.head is None and self.objective.head_of == "finetune" and bool(self.objective.architectures)


def make_judged_set(name: str, asked: EvaluationSet, subject: Model, inputs: Mapping[str, Model]) -> JudgedSet:
    """A set with all that is known before models are loaded. subject: the model that the evaluation is about. inputs:
    the base ("base") and the finetunes that it was made of, by name, as far as they are known. Raises RequestError.
    """
    if asked.head is not None and asked.head not in inputs:
        known = f"choose from {', '.join(inputs)}" if inputs else "no inputs are known: name them with --base and --ft"
        raise RecipeError(f"the set {name} is to be judged by the head of {asked.head!r}, which is no input ({known}).")
    named = asked.head or (name if name in inputs else None)
    objective = asked.objective or _suggested(named, subject, inputs)
    if asked.head is None and objective.head_of != "finetune":
        named = "base" if objective.head_of == "base" and "base" in inputs else None
    if objective.labels == "none":
        raise RecipeError(f"nothing is right or wrong under {objective.kind}, so {name} cannot be judged by it.")
    head = inputs[named] if named is not None else None
    objective = within_positions(objective, _config(head or subject), (head or subject).ref)
    classes = objective.class_count(_config(head or subject))
    metrics = chosen_metrics(asked.metrics, objective, classes, name)
    data, note = open_evaluation_set(asked)
    return JudgedSet(name, data, note, objective, classes, metrics, head)


def _suggested(named: str | None, subject: Model, inputs: Mapping[str, Model]) -> Objective:
    """By the architecture of the input whose head may judge; if that is not to be had, by the subject's."""
    if named is None:
        return suggest(_config(subject), subject.ref)
    try:
        return suggest(_config(inputs[named]), inputs[named].ref)
    except CheckpointError as error:
        try:
            return suggest(_config(subject), subject.ref)
        except RecipeError:
            raise error from None


def _config(model: Model) -> Mapping[str, Any]:
    return model.checkpoint.config if model.checkpoint is not None else {}


class LabelledSuite(Suite):
    def __init__(
        self, options: EvaluateOptions, subject: Model, inputs: Mapping[str, Model], progress: Progress
    ) -> None:
        """As make_judged_set."""
        self._options = options
        self._progress = progress
        self._sets = {name: make_judged_set(name, asked, subject, inputs) for name, asked in options.sets.items()}
        self._rows: dict[str, Rows] = {}
        self.names = list(self._sets)
        self.limit = options.limit
        self.flags = self._flags()

    def check(self, model: Model) -> None:
        checkpoint = model.checkpoint
        if checkpoint is None:
            return
        if not checkpoint.config.get("model_type"):
            raise CheckpointError(
                f"{checkpoint.label} has no config.json with a model_type, so transformers cannot load it. Name a "
                "complete model; merge an adapter into its base first."
            )
        refuse_custom_code(checkpoint, "an evaluation")
        for one in self._sets.values():
            within_positions(one.objective, checkpoint.config, checkpoint.label)
            if one.needs_head and not one.objective.suits(checkpoint.config):
                raise CheckpointError(
                    f"{checkpoint.label} is a {architecture(checkpoint.config) or 'model without a class'}, which has "
                    f"no head for {one.objective.kind}, and no finetune is named {one.name}, as the set is. Name the "
                    "set as the finetune whose head judges it (--data NAME=REF), say so by its `head`, or name the "
                    "finetunes with --ft."
                )

    def facts(self, model: Model, name: str) -> dict[str, Any]:
        one = self._sets[name]
        data = one.data.pinned.model_dump(mode="json", exclude={"objective", "metrics", "head"})
        return {
            "model": model.content,
            "head": None if one.head is None else one.head.content,
            "name": name,
            "data": {**data, "ref": one.data.repo or "", "revision": one.data.commit or one.data.sha256},
            "config": one.data.config,
            "objective": one.objective.model_dump(mode="json"),
            "metrics": list(one.metrics),
            "dtype": self._options.dtype,
            "hf_locstitch": __version__,
            "transformers": version("transformers"),
        }

    def measure(
        self, model: Model, names: Sequence[str], processes: Processes
    ) -> Iterator[tuple[str, list[TaskResult]]]:
        from hf_locstitch.evaluation.judged_model import Loading

        with ExitStack() as stack:
            loading = Loading(stack.enter_context(model.folder()), self._options.dtype, model.ref)
            for name in names:
                one = self._sets[name]
                lent = one.head if one.head is not None and one.head.content != model.content else None
                head = stack.enter_context(lent.folder()) if lent is not None else None
                work = partial(self._answers, one, loading, head, processes)
                _, parts = processes.share(work, lambda own: own)
                found = [answers for part in parts for answers in part]
                if not found:
                    raise NoAnswers(
                        f"none of the {len(self._open(name))} examples of {name} has an answer within the objective's "
                        "max_length. Raise it, or check the columns."
                    )
                yield name, [self._result(one, joined(found))]

    def judged(self, results: Sequence[TaskResult], texts: bool) -> list[JudgedTask]:
        found = []
        for result in results:
            data = self._sets[result.task].data
            rows = self._open(result.task).part(0, len(self._open(result.task))) if texts else None
            found.append(
                JudgedTask(
                    result.task,
                    data.repo or (data.file.name if data.file else None),
                    data.config,
                    None if rows is None else frozenset(texts_of(rows)),
                    data.asked.split,
                    data.sha256,
                )
            )
        return found

    def notes(self, results: Sequence[TaskResult]) -> list[str]:
        notes = [f"{one.name}: {one.note}" for one in self._sets.values() if one.note]
        for result in results:
            if result.left_out:
                notes.append(
                    f"{result.task}: {result.left_out} of {result.left_out + result.examples} examples left out, which "
                    "have no answer within the objective's max_length"
                )
            if result.limit is not None:
                drawn = counted(result.limit, "drawn example")
                notes.append(f"the scores of {result.task} are rough: of only {drawn}")
        return notes

    @property
    def entries(self) -> dict[str, Any]:
        """Without the rows' number where --limit says it, and without paths of this machine."""
        found = {}
        for name, one in self._sets.items():
            asked = one.data.pinned.model_copy(
                update={"split": self._options.data[name].split, "number": self._options.data[name].number}
            )
            found[name] = asked.dump()
        return {} if all(fields.keys() <= {"ref"} for fields in found.values()) else found

    def _flags(self) -> tuple[str, ...]:
        if self.entries:
            return ("--data", "sets.yaml")
        return ("--data", *(f"{name}={one.data.pinned.ref}" for name, one in self._sets.items()))

    def _open(self, name: str) -> Rows:
        if name not in self._rows:
            self._rows[name] = open_rows(self._sets[name].data)
        return self._rows[name]

    def _answers(self, one: JudgedSet, loading: Loading, head: Path | None, processes: Processes) -> list[Answers]:
        """Those to this process's rows, some at a time. head: the folder of that whose head judges; None: its own."""
        from hf_locstitch.evaluation.judged_model import answers_to

        size = self._options.batch_size or BATCH
        rows = self._open(one.name)
        own = processes.own(len(rows))
        parts = []
        bar = self._progress.bar(f"judging {one.name}", own.stop - own.start, " examples")
        with explaining_memory(loading.label, size), bar as advance:
            judged = loading.model(head, one.objective)
            prepare = one.objective.preparing(judged.processor, judged.head)
            for first in range(own.start, own.stop, BLOCK):
                block = rows.part(first, min(first + BLOCK, own.stop))
                with suppress(NoAnswers):  # others may have some
                    parts.append(answers_to(judged, prepare(block), size))
                advance(len(block))
        return parts

    def _result(self, one: JudgedSet, answers: Answers) -> TaskResult:
        scores = []
        for name, metric in one.metrics.items():
            value, error = metric.measure(answers, one.classes)
            scores.append(Score(name, value, error, metric.higher_is_better))
        rows = len(self._open(one.name))
        return TaskResult(
            task=one.name,
            shots=None,
            limit=one.data.asked.number if rows == one.data.asked.number else None,  # all, if there are fewer
            examples=len(answers),
            scores=tuple(scores),
            dataset=one.data.repo,
            config=one.data.config,
            split=one.data.asked.split,
            revision=one.data.commit,
            date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            objective=str(one.objective.kind),
            head=one.head.name if one.head is not None else None,
            hub_task=one.objective.hub_task,
            left_out=rows - len(answers),
            hf_locstitch=__version__,
        )
