"""`evaluate`: models and tasks in, a report out; and the same for a merge that was just made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from hf_locstitch.checkpoints.checkpoint import open_source
from hf_locstitch.checkpoints.opening import open_checkpoint
from hf_locstitch.checkpoints.ref import parse_ref
from hf_locstitch.errors import LocstitchError, RecipeError, WorkError
from hf_locstitch.evaluation.models import (
    Model,
    average_model,
    check_language_model,
    content_of,
    gather_models,
    with_own_names,
)
from hf_locstitch.evaluation.report import EvaluationReport
from hf_locstitch.evaluation.session import Session
from hf_locstitch.plan.plans import ModelPlan
from hf_locstitch.plan.recipe_file import recipe_of
from hf_locstitch.runtime.processes import Processes, find_processes
from hf_locstitch.tasks.benchmarks import SUITES, EvaluateOptions, make_options
from hf_locstitch.tasks.leaks import UsedData, used_open_set


def evaluate(
    refs: Sequence[str | Path] | str | Path,
    *,
    tasks: Sequence[str] = (),
    suite: Literal["paper", "quick"] | None = None,
    include_path: str | Path | None = None,
    limit: int | None = None,
    batch_size: int | None = None,
    chat_template: bool = False,
    base: str | Path | None = None,
    finetuned: Sequence[str | Path] | None = None,
    parents: bool = False,
    average: bool = False,
    push: bool = False,
    track: Literal["trackio", "wandb"] | None = None,
    cache: bool = True,
    show_progress: bool = False,
) -> EvaluationReport:
    """Run lm-eval's tasks on models side by side.

    refs: one or more folders, org/name or org/name@revision; the first is the subject. tasks: NAME or NAME:SHOTS.
    suite: a set of tasks. include_path: a folder with more task files. limit: examples per task, default all.
    batch_size: default the largest that fits. base, finetuned: models to compare with. parents: also evaluate the
    inputs of the first ref, a merge, as its manifest names them. average: also evaluate their plain average. push:
    write the results into the model card of the first ref: a folder or, in one commit, a repo. track: also log them.
    cache: whether to use cached scores.

    Raises RequestError if the request is invalid and WorkError if the work fails; finished scores stay cached.
    """
    listed = [str(refs)] if isinstance(refs, (str, Path)) else [str(ref) for ref in refs]
    if not tasks and suite is None:
        raise RecipeError(f"no tasks given: use --tasks NAME..., or --suite {'|'.join(SUITES)}.")
    if limit is not None and limit < 1:
        raise RecipeError(f"--limit must be 1 or more, not {limit}.")
    options = {"tasks": tuple(tasks), "suite": suite, "limit": limit, "batch_size": batch_size,
               "include_path": include_path, "chat_template": chat_template}  # fmt: skip
    session = Session(make_options(options), cache, show_progress)
    if track is not None:
        from hf_locstitch.evaluation.tracking import find_tracker

        find_tracker(track)
    models = gather_models(
        listed,
        base=None if base is None else str(base),
        finetuned=None if finetuned is None else [str(ref) for ref in finetuned],
        parents=parents,
        average=average,
    )
    if push:
        from hf_locstitch.evaluation.publishing import check_writable

        check_writable(listed[0])
    processes = find_processes()
    report = session.run(models, processes, _data_of(listed[0]))
    processes.end()
    if processes.first and push:
        from hf_locstitch.evaluation.publishing import write_results

        report = write_results(report, listed[0])
    if processes.first and track is not None:
        from hf_locstitch.evaluation.tracking import log_report

        log_report(report, track)
    return report


def _data_of(ref: str) -> list[UsedData]:
    """The data sets that a merge was made with, according to its recipe; none for other models."""
    try:
        recipe = recipe_of(open_source(parse_ref(ref)))
    except RecipeError:
        return []  # a recipe of another version
    return recipe.used_data if recipe is not None else []


def merged_model(folder: Path, ref: str | None = None) -> Model:
    """A merge that was just made. ref: where it will be; the folder if that is None."""
    merged = open_checkpoint(parse_ref(str(folder.absolute())))
    ref = ref or merged.source.pinned
    return Model(ref.rsplit("/", 1)[-1], "model", ref, content_of(merged), merged)


def reference_models(plan: ModelPlan, asked: EvaluateOptions) -> list[Model]:
    """What a merge is compared with: base, finetunes and their plain average, as asked for."""
    if not asked.parents and not asked.average:
        return []
    models = [
        Model(
            name,
            "base" if checkpoint is plan.base else "finetuned",
            checkpoint.source.pinned,
            content_of(checkpoint),
            checkpoint,
        )
        for name, checkpoint in plan.inputs.items()
    ]
    if asked.average:
        entries = (plan.recipe.base, *plan.recipe.finetuned)
        refs = [e.ref if m.checkpoint and m.checkpoint.source.commit is None else m.ref
                for m, e in zip(models, entries, strict=True)]  # fmt: skip
        models.append(average_model(models[0], models[1:], refs))
    return models


class AfterMerge:
    """The evaluation that a recipe asks for. Created before the merge, so that an invalid request fails early."""

    def __init__(self, plan: ModelPlan, show_progress: bool = False) -> None:
        """Raises RequestError."""
        asked = plan.recipe.evaluate
        assert asked is not None
        self.recipe, self.plan, self.asked = plan.recipe, plan, asked
        self.session = Session(asked, show_progress=show_progress)
        if not plan.settings.cache:
            raise RecipeError(
                "evaluate: needs the models on this machine. Drop --no-cache, or evaluate the merge later."
            )
        check_language_model(plan.files)
        _ = self.session.manager  # raises TaskError for unknown tasks

    def run(self, out: Path, processes: Processes) -> EvaluationReport:
        """Evaluate the merge in `out` and write the results into it. Raises WorkError; the merge stays."""
        try:
            report = self.session.run(self._models(out), processes, self._used())
            if processes.first:
                report = self._write(report, out)
            return report
        except LocstitchError as error:
            raise WorkError(
                f"the merge in {out} is complete, but its evaluation failed: {error} "
                "Run the same command again to continue."
            ) from error

    def _used(self) -> list[UsedData]:
        """The data sets that the merge was made with."""
        return [
            *(used_open_set(found, "masks were found") for found in self.plan.data.values()),
            *(used_open_set(found, "values were fitted") for found in self.plan.fit_data.values()),
        ]

    def _models(self, out: Path) -> list[Model]:
        subject = merged_model(out, self.recipe.target.ref if self.recipe.target else None)
        return with_own_names([*reference_models(self.plan, self.asked), subject])

    def _write(self, report: EvaluationReport, out: Path) -> EvaluationReport:
        from hf_locstitch.evaluation.publishing import record_in

        title = (self.recipe.target.repo if self.recipe.target else out.absolute().name).rsplit("/", 1)[-1]
        return replace(report, figures=tuple(str(path) for path in record_in(report, out, title)))
