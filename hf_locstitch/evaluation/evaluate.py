"""`evaluate`: models and tasks in, a report out; and the same for a merge that was just made."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from hf_locstitch.checkpoints.checkpoint import open_source
from hf_locstitch.checkpoints.opening import open_checkpoint
from hf_locstitch.checkpoints.ref import parse_ref
from hf_locstitch.errors import LocstitchError, RecipeError, WorkError
from hf_locstitch.evaluation.labelled_suite import LabelledSuite
from hf_locstitch.evaluation.lm_eval_suite import LmEvalSuite
from hf_locstitch.evaluation.models import (
    Inputs,
    Model,
    average_model,
    content_of,
    gather_models,
    known_inputs,
    model_of,
    with_own_names,
)
from hf_locstitch.evaluation.report import EvaluationReport
from hf_locstitch.evaluation.session import Session
from hf_locstitch.plan.plans import ModelPlan
from hf_locstitch.plan.recipe_file import recipe_of
from hf_locstitch.runtime import escape
from hf_locstitch.runtime.processes import Processes, find_processes
from hf_locstitch.runtime.progress import Progress
from hf_locstitch.tasks.benchmarks import SUITES, EvaluateOptions, make_options
from hf_locstitch.tasks.leaks import UsedData, used_open_set
from hf_locstitch.tasks.objective import Objective


def evaluate(
    refs: Sequence[str | Path] | str | Path,
    *,
    tasks: Sequence[str] = (),
    suite: Literal["paper", "quick"] | None = None,
    data: str | Path | Sequence[str | Path] | Mapping[str, Any] = (),
    objective: str | Mapping[str, Any] | Objective | None = None,
    metrics: Sequence[str] = (),
    include_path: str | Path | None = None,
    limit: int | None = None,
    batch_size: int | None = None,
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
    chat_template: bool = False,
    lm_eval: Mapping[str, Any] | None = None,
    base: str | Path | None = None,
    finetuned: Sequence[str | Path] | None = None,
    parents: bool = False,
    average: bool = False,
    push: bool = False,
    track: Literal["trackio", "wandb"] | None = None,
    cache: bool = True,
    show_progress: bool | None = False,
) -> EvaluationReport:
    """Judge models side by side on lm-eval's tasks, on labelled sets, or on both.

    refs: one or more folders, org/name or org/name@revision; the first is the subject. tasks: NAME or NAME:SHOTS.
    suite: a set of tasks. data: labelled sets, each [NAME=]REF, a YAML file of sets, or a mapping of names to sets as
    in a recipe; one that is named as a finetune is judged by that finetune's head. objective, metrics: of the sets that
    state none. include_path: a folder with more task files. limit: examples per task or set, default all.
    batch_size: default the largest that fits. dtype: that models are judged in, default their own. chat_template: put
    prompts into the model's. lm_eval: further options of lm-eval's, as in a recipe: backend, system_instruction,
    gen_kwargs, log_samples, …. base, finetuned: models to compare with. parents: also evaluate the
    inputs of the first ref, a merge, as its manifest names them. average: also evaluate their plain average. push:
    write the results into the model card of the first ref: a folder or, in one commit, a repo. track: also log them.
    cache: whether to use cached scores. show_progress: None shows bars on a terminal only.

    Raises RequestError if the request is invalid and WorkError if the work fails; finished scores stay cached.
    """
    listed = [str(refs)] if isinstance(refs, (str, Path)) else [str(ref) for ref in refs]
    if not tasks and suite is None and not data:
        raise RecipeError(
            f"nothing to judge by: use --tasks NAME..., --suite {'|'.join(SUITES)}, or --data [NAME=]FILE..."
        )
    if limit is not None and limit < 1:
        raise RecipeError(f"--limit must be 1 or more, not {limit}.")
    options = make_options({
        "tasks": tuple(tasks), "suite": suite, "data": data, "objective": objective, "metrics": tuple(metrics),
        "limit": limit, "batch_size": batch_size, "dtype": dtype, "include_path": include_path,
        "chat_template": chat_template, "lm_eval": dict(lm_eval or {}),
    })  # fmt: skip
    if track is not None:
        from hf_locstitch.evaluation.tracking import find_tracker

        find_tracker(track)
    benchmarks = lm_eval_suites(options)
    base_ref = None if base is None else str(base)
    finetuned_refs = None if finetuned is None else [str(ref) for ref in finetuned]
    models = gather_models(listed, base=base_ref, finetuned=finetuned_refs, parents=parents, average=average)
    subject = next(model for model in models if model.role == "model")
    progress = Progress(show_progress)
    inputs = partial(known_inputs, listed[0], base_ref, finetuned_refs, models)
    suites = [*benchmarks, *labelled_suites(options, subject, inputs, progress)]
    session = Session(suites, options.dtype, cache, progress)
    session.check(models)
    if push:
        from hf_locstitch.evaluation.publishing import check_writable

        check_writable(listed[0])
    processes = find_processes()
    report = session.run(models, processes, _data_of(listed[0]))
    report = replace(report, flags=(*report.flags, *_inputs_flags(models, base_ref, finetuned_refs)))
    processes.end()
    if processes.first and push:
        from hf_locstitch.evaluation.publishing import write_results

        report = write_results(report, listed[0])
    if processes.first and track is not None:
        from hf_locstitch.evaluation.tracking import log_report

        log_report(report, track)
    return report


def lm_eval_suites(options: EvaluateOptions) -> list[LmEvalSuite]:
    """lm-eval's tasks, if any are asked for. Raises RecipeError, also where lm-eval is not installed."""
    return [LmEvalSuite(options)] if options.tasks or options.suite is not None else []


def labelled_suites(
    options: EvaluateOptions, subject: Model, inputs: Callable[[], Mapping[str, Model]], progress: Progress
) -> list[LabelledSuite]:
    """Labelled sets, if any are asked for. subject: the model that the evaluation is about. inputs: gives what it was
    made of, for their heads. Raises RequestError."""
    return [LabelledSuite(options, subject, inputs(), progress)] if options.data else []


def _inputs_flags(models: Sequence[Model], base: str | None, finetuned: Sequence[str] | None) -> list[str]:
    """Flags that name again the base and the finetunes that were given: a manifest may name others, or none."""
    flags: list[str] = []
    for flag, role, given in (("--base", "base", base), ("--ft", "finetuned", finetuned)):
        if given:
            flags += [flag, *(escape.shell(model.ref) for model in models if model.role == role)]
    return flags


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


class Planned:
    """The evaluation of a merge that is not made yet: all that is known before. asked: what it is judged on.

    merge: its config and files.
    """

    def __init__(self, plan: ModelPlan, asked: EvaluateOptions, progress: Progress) -> None:
        """Raises RequestError."""
        if not plan.settings.cache:
            raise RecipeError(
                "evaluate: needs the models on this machine. Drop --no-cache, or evaluate the merge later."
            )
        self._plan, self._asked = plan, asked
        whole = [name for name in plan.inputs if name not in plan.adapters]
        self._inputs = Inputs({name: partial(self._input, name) for name in whole})
        self.merge = Model("merge", "model", plan.files.label, "", plan.files)
        benchmarks = lm_eval_suites(asked)
        suites = [*benchmarks, *labelled_suites(asked, self.merge, lambda: self._inputs, progress)]
        self.session = Session(suites, asked.dtype, progress=progress)
        self.session.check([self.merge])
        for suite in benchmarks:
            _ = suite.manager  # raises TaskError for unknown tasks

    def _input(self, name: str) -> Model:
        checkpoint = self._plan.inputs[name]
        return model_of(checkpoint, "base" if checkpoint is self._plan.base else "finetuned", name)

    def references(self) -> list[Model]:
        """What the merge is compared with: base, finetunes and their plain average, as asked for."""
        if not self._asked.parents and not self._asked.average:
            return []
        models = list(self._inputs.values())
        if self._asked.average:
            entries = (self._plan.recipe.base, *self._plan.recipe.finetuned)
            refs = [e.ref if m.checkpoint and m.checkpoint.source.commit is None else m.ref
                    for m, e in zip(models, entries, strict=True)]  # fmt: skip
            models.append(average_model(models[0], models[1:], refs))
        return models


class AfterMerge:
    """The evaluation that a recipe asks for. Created before the merge, so that an invalid request fails early."""

    def __init__(self, plan: ModelPlan, progress: Progress) -> None:
        """Raises RequestError."""
        asked = plan.recipe.evaluate
        assert asked is not None
        self.recipe, self.plan = plan.recipe, plan
        self.planned = Planned(plan, asked, progress)

    def run(self, out: Path, processes: Processes) -> EvaluationReport:
        """Evaluate the merge in `out` and write the results into it. Raises WorkError; the merge stays."""
        try:
            report = self.planned.session.run(self._models(out), processes, self._used())
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
        return with_own_names([*self.planned.references(), subject])

    def _write(self, report: EvaluationReport, out: Path) -> EvaluationReport:
        from hf_locstitch.evaluation.publishing import record_in

        title = (self.recipe.target.repo if self.recipe.target else out.absolute().name).rsplit("/", 1)[-1]
        return replace(report, figures=tuple(str(path) for path in record_in(report, out, title)))
