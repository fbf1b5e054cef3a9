"""From masks to refitted values: one fit for each lambda, of which the best is kept."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from hf_locstitch.errors import RequestError
from hf_locstitch.runtime.journal import read_record, write_record
from hf_locstitch.stitch.fitted_values import FittedValues, FittedWriter, open_fitted
from hf_locstitch.stitch.fitting import FitJob
from hf_locstitch.stitch.refit.agreement import disagreement
from hf_locstitch.stitch.refit.fit import Advance, Fit, Seen
from hf_locstitch.stitch.refit.models import TaskModels, open_task_models
from hf_locstitch.stitch.refit.plain import PlainStitch
from hf_locstitch.stitch.refit.settings import SCORES, RefitSettings
from hf_locstitch.stitch.refit.states import making_states
from hf_locstitch.tasks.loading import find_device

JOURNAL = "refit.json"


@dataclass
class Journal:
    """The state of the search. heading: identifies it. scores: by lambda ("inf" is the plain stitch), see SCORES; None
    without held-out inputs. inputs: of each finetune, how many are fitted and held out. kept: tensors that keep the
    plain stitch, with the reason. notes: for people, by lambda.
    """

    heading: str
    scores: dict[str, float | None] = field(default_factory=dict)
    inputs: dict[str, dict[str, int]] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)
    notes: dict[str, list[str]] = field(default_factory=dict)

    @property
    def best(self) -> str:
        """The lambda with the lowest score, the first among equals."""
        known = {name: math.inf if score is None else score for name, score in self.scores.items()}
        return min(known, key=lambda name: known[name])


def refit(config: RefitSettings, job: FitJob) -> tuple[FittedValues | None, dict[str, Any]]:
    """The refitted values (None where the plain stitch is best), and what to record. Raises RequestError."""
    folder, processes = job.folder, job.processes
    processes.on_first(lambda: folder.mkdir(exist_ok=True))
    heading = json.dumps({"chunk": job.settings.chunk})
    journal = processes.gather(_read(folder, heading) if processes.first else Journal(heading))[0]
    opened: Refitting | None = None

    def fit(name: str) -> None:
        nonlocal opened
        opened = opened or Refitting(config, job)
        journal.scores[name] = opened.fit(float(name), journal)
        processes.on_first(keep)

    def keep() -> None:
        for other in journal.scores.keys() - {journal.best}:
            shutil.rmtree(folder / other, ignore_errors=True)
        write_record(folder / JOURNAL, asdict(journal))

    def found(name: str) -> FittedValues | None:
        return open_fitted(folder / name, journal.heading, job.own, processes)

    for lambda_ in config.lambdas:
        if f"{lambda_:g}" not in journal.scores:
            fit(f"{lambda_:g}")
    if journal.best != "inf" and found(journal.best) is None:
        fit(journal.best)
    values = None if journal.best == "inf" else found(journal.best)
    return values, record(job, config, journal, values)


class Refitting:
    """The models of every finetune and its inputs, opened for any number of fits."""

    def __init__(self, config: RefitSettings, job: FitJob) -> None:
        self._config, self._job, self._processes = config, job, job.processes
        self._device = job.processes.together(lambda: find_device(config.device, float64=True))
        self._plain = PlainStitch(job.view)
        model_folder = job.folder / f"models.{job.processes.rank}"
        self._models: list[TaskModels] = job.processes.together(
            lambda: [
                open_task_models(
                    config, name, self._plain, job.readers[name], job.data[name], model_folder, self._device
                )
                for name in job.order
            ]
        )
        self._seen: Seen | None = None
        self._untouched: float | None = None  # the plain stitch's score
        self._base: list[float] | None = None  # the base's, of each task

    def fit(self, lambda_: float, journal: Journal) -> float | None:
        """Write the values for one lambda under its name, and update the journal. Returns its score."""
        if self._seen is None:
            self._follow()
        journal.inputs = {task_models.name: task_models.counts for task_models in self._models}
        if math.isinf(lambda_):
            return self._untouched
        assert self._seen is not None
        writer = FittedWriter(self._job.folder / f"{lambda_:g}", self._job.own, self._processes)
        with self._job.progress.bar(f"refitting, λ {lambda_:g}", len(self._seen.calls), " layers") as advance:
            fit_run, scores = self._run(lambda_, writer, self._seen, advance, self._models)
        writer.finish(journal.heading)
        journal.notes[f"{lambda_:g}"] = notes(fit_run.least_squares.tokens, lambda_, self._config)
        journal.kept = {
            info.name: "called more than once"
            if fit_run.is_twice(info.name)
            else "not called as a linear by these inputs"
            for info in self._job.tensors
            if info.name not in writer.names and len(info.shape) > 1
        }
        return self._score(scores)

    def _score(self, scores: list[float] | None) -> float | None:
        """One number of those of the tasks."""
        if scores is None:
            return None
        return sum(scores) / len(scores) if self._base is None else disagreement(scores, self._base)

    def _follow(self) -> None:
        """Trace which linear layers are called, in the plain stitch and the finetuned models."""
        with self._job.progress.bar("tracing", 0, " layers") as advance:
            if self._config.judge == "agreement":
                base = [replace(task_models, merged=task_models.original) for task_models in self._models]
                _, self._base = self._run(math.inf, None, None, advance, base)
            first, untouched = self._run(math.inf, None, None, advance, self._models)
            self._seen, self._untouched = first.calls, self._score(untouched)
        self._processes.together(lambda: _check_calls(first))

    def _run(
        self,
        lambda_: float,
        writer: FittedWriter | None,
        seen: Seen | None,
        advance: Advance,
        models: Sequence[TaskModels],
    ) -> tuple[Fit, list[float] | None]:
        """Run a fit. Returns it and its scores."""
        folder = self._job.folder / f"states.{self._processes.rank}"
        with making_states(self._config.states_on, self._device, folder) as states:
            fit = Fit(self._config, lambda_, models, self._plain, writer, seen, self._device,
                      self._job.settings.workers, self._processes, states, advance)  # fmt: skip
            return fit, fit.run()


def _check_calls(first: Fit) -> None:
    if not any(first.refittable(key) for key in first.calls.calls):
        if first.calls.twice:
            raise RequestError(
                "the model uses each of its localized linear layers several times in a pass, and a refit on inputs "
                "fits a layer where it is used once. Use a refit without inputs, or --method regmean, which adds up "
                "the inputs of all uses."
            )
        raise RequestError(
            "with these inputs, the model uses no localized tensor as a linear layer exactly once per pass: there is "
            "nothing to refit. Use --stitch mean, or check --include and the data's objective."
        )


def notes(tokens: Mapping[str, tuple[int, int]], lambda_: float, config: RefitSettings) -> list[str]:
    """Notes on the inputs, for people. tokens: for each tensor, those of the task with the fewest, and its input
    width."""
    short = {name: found for name, found in tokens.items() if found[0] < found[1]}
    if not short:
        return []
    name, (fewest, width) = min(short.items(), key=lambda item: item[1][0] / item[1][1])
    held = f"lambda {lambda_:g} and ridge {config.ridge:g} keep" if lambda_ else f"only ridge {config.ridge:g} keeps"
    return [
        f"{len(short)} of {len(tokens)} refitted matrices have more input features than some task has tokens (the "
        f"worst is {name}: {fewest} tokens for {width}); {held} the rest near the plain stitch. "
        "More or longer inputs help."
    ]


def record(job: FitJob, config: RefitSettings, journal: Journal, values: FittedValues | None) -> dict[str, Any]:
    """The manifest's record of a refit."""
    return {
        **config.as_record(),
        "lambda": journal.best,
        SCORES[config.judge][0]: journal.scores,
        "counts": journal.inputs,
        "data": {name: found.pinned.dump() for name, found in job.data.items()},
        "refitted": [] if values is None else sorted(values.names),
        "kept_plain": {} if values is None else journal.kept,
        "notes": [] if values is None else journal.notes[journal.best],
    }


def _read(folder: Path, heading: str) -> Journal:
    """What an earlier process left under the same heading."""
    known = read_record(folder / JOURNAL)
    return Journal(**known) if known is not None and known["heading"] == heading else Journal(heading)
