"""From a plan to a finished folder, a pushed repo, or both."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hf_locstitch.artifacts.manifest import Manifest
from hf_locstitch.checkpoints.hashes import InputHashes
from hf_locstitch.checkpoints.ref import WEIGHTS
from hf_locstitch.checkpoints.source import Source
from hf_locstitch.engine.preflight import (
    check_inputs,
    check_out,
    check_output_given,
    check_place,
    check_work,
    find_record,
)
from hf_locstitch.engine.record import check_strict
from hf_locstitch.engine.rehearsal import loops_ready
from hf_locstitch.engine.steps import EVALUATING, EXPORTING, FITTING, LOCALIZING, MERGING, READING, UPLOADING, WRITING
from hf_locstitch.engine.work_dir import clear_work, fingerprint, open_work_dir
from hf_locstitch.errors import OutputError, PublishError
from hf_locstitch.plan.plans import LocalizePlan, MergePlan, Plan, StitchPlan
from hf_locstitch.plan.push_target import MAIN, PushTarget
from hf_locstitch.runtime.own_cache import own_cache
from hf_locstitch.runtime.processes import Processes, find_processes
from hf_locstitch.runtime.progress import Progress, hide_library_bars
from hf_locstitch.stitch.method import TensorMethod

if TYPE_CHECKING:
    from hf_locstitch.report.publish import Published, Upload

AfterRun = Callable[[Path, Processes], None]  # called with the finished folder, in every process


@dataclass(frozen=True)
class Finished:
    """out: the folder, None if it was only pushed. url, commit: of the pushed repo, None if it was not."""

    out: Path | None
    url: str | None
    commit: str | None
    manifest: Manifest


def execute(plan: Plan, progress: Progress, prepare: Callable[[], AfterRun | None] = lambda: None) -> Finished:
    """Carry out a plan and publish the result.

    prepare: called once all is checked, before the work starts; what it returns is called after it, before the
    upload's commit.
    Raises RequestError, with nothing written, if the plan cannot be carried out, and WorkError if the work fails.
    """
    recipe = plan.recipe
    check_output_given(recipe.out, recipe.push_to)
    processes = find_processes()
    _check_push(plan)
    with hide_library_bars():
        if recipe.out is not None:
            return _into(recipe.out, plan, progress, processes, prepare)
        if recipe.evaluate is None and recipe.adapter is None:
            return _to_hub(plan, progress, processes, prepare)
        scratch = _scratch(plan)
        # Of its own name, for a merge of another recipe may lie there that could not be pushed.
        done = _into(scratch / f"merged-{fingerprint(plan)[:16]}", plan, progress, processes, prepare)
        if processes.first:
            shutil.rmtree(scratch, ignore_errors=True)
        return Finished(None, done.url, done.commit, done.manifest)


def steps_of(plan: Plan) -> list[str]:
    """What carrying out a plan takes, as `Progress.steps` has it."""
    recipe, localizes = plan.recipe, isinstance(plan, LocalizePlan)
    asked = {
        LOCALIZING: plan.masked and not isinstance(plan, StitchPlan),
        READING: isinstance(plan, StitchPlan),
        FITTING: recipe.fitting is not None,
        WRITING if localizes else MERGING: True,
        EXPORTING: recipe.adapter is not None,
        EVALUATING: recipe.evaluate is not None,
        UPLOADING: recipe.target is not None,
    }
    return [step for step, taken in asked.items() if taken]


def check_possible(plan: Plan) -> None:
    """As `execute` before its work: whether the Hub takes the result, and inputs and disk are there. RequestError."""
    if plan.recipe.out is not None:
        find_record(plan.recipe.out, plan)
    _check_push(plan)
    if plan.recipe.out is not None or plan.recipe.push_to is not None:
        check_place(plan.recipe.out or _scratch(plan) / "merged")
    check_inputs(plan)


def _check_push(plan: Plan) -> None:
    if (target := plan.recipe.target) is not None:
        sources = {name: one.source for name, one in plan.inputs.items()}
        merges = {f"the mask of {name}": source for name, source in plan.merges.items()}
        check_push(target, sources | merges, plan.command)


def check_push(target: PushTarget, inputs: Mapping[str, Source], command: str) -> None:
    """Raises OutputError unless this user may push there, and no input's files are taken the place of."""
    from hf_locstitch.report.push_rights import check_target

    own = next((name for name, source in inputs.items() if _same_repo(source.repo, target.repo)), None)
    if own is not None and target.replaces:
        raise OutputError(
            f"{target} is an input of this {command} ({own}), whose files the result would take the place of. "
            f"Use another --push-to, a branch (--push-to {target.repo}@BRANCH), or --create-pr."
        )
    check_target(target)


def _same_repo(one: str | None, other: str) -> bool:
    return one is not None and one.casefold() == other.casefold()  # the Hub's names have no case


def _scratch(plan: Plan) -> Path:
    assert plan.recipe.target is not None
    return scratch(plan.recipe.target)


def scratch(target: PushTarget) -> Path:
    """Where a result that is only pushed is made; the same command finds it again after an interruption."""
    return own_cache() / target.ref.replace("/", "--")


def by_hand(target: PushTarget | None, folder: Path) -> str:
    """How a finished folder is uploaded without this program."""
    if target is None:
        return ""
    flags = f" --revision {target.branch}" * (target.branch != MAIN) + " --create-pr" * target.pull_request
    return f"Or upload it by hand: hf upload {target.repo} {folder}{flags}"


def _into(
    out: Path, plan: Plan, progress: Progress, processes: Processes, prepare: Callable[[], AfterRun | None]
) -> Finished:
    record = check_out(out, plan)
    if record is None:
        check_work(out, plan)
    else:
        check_strict(plan.recipe, record)
        if processes.first:
            clear_work(plan, out)
    after = prepare()
    with _upload(plan, processes) as upload:
        record = record or make(plan, out, progress, processes, upload)
        if after is not None:
            after(out, processes)
        processes.end()
        if upload is None:
            return Finished(out, None, None, record)
        try:
            progress.step(UPLOADING)
            published = upload.commit(out, _message(plan), progress, _known(record))
        except PublishError as error:
            raise PublishError(
                f"the merge is complete in {out}, but {error} {by_hand(plan.recipe.target, out)}"
            ) from error
    return Finished(out, published.url, published.commit, record)


def _to_hub(plan: Plan, progress: Progress, processes: Processes, prepare: Callable[[], AfterRun | None]) -> Finished:
    """Nothing stays on this machine; after a failure the same command resumes."""
    scratch = _scratch(plan)
    check_work(scratch / "merged", plan)
    after = prepare()
    assert after is None  # it needs the finished folder: see `execute`
    published: list[Published] = []
    with _upload(plan, processes, discard=not plan.settings.cache) as upload:

        def publish(folder: Path, record: Manifest) -> None:
            assert upload is not None
            progress.step(UPLOADING)
            published.append(upload.commit(folder, _message(plan), progress, _known(record)))

        record = make(plan, scratch / "merged", progress, processes, upload, publish)
        processes.end()
    if not published:
        return Finished(None, None, None, record)
    shutil.rmtree(scratch, ignore_errors=True)
    return Finished(None, published[0].url, published[0].commit, record)


def make(
    plan: Plan,
    out: Path,
    progress: Progress,
    processes: Processes | None = None,
    upload: Upload | None = None,
    publish: Callable[[Path, Manifest], object] | None = None,
) -> Manifest:
    """Make the folder `out`. Raises RequestError, or WorkError after which the same call resumes.

    upload: receives each shard as soon as it is finished. publish: called with the finished folder and its
    record instead of moving it to `out`.
    """
    processes = processes or Processes()
    # What such runs keep of their inputs, for a later process, is not told apart by the files it comes from.
    deferred = processes.count == 1 and not _runs_models(plan) and not plan.adapters
    with (
        InputHashes(plan.inputs, processes.rank, processes.count, deferred=deferred) as hashes,
        ExitStack() as stack,
    ):
        stack.enter_context(loops_ready(plan, progress if processes.first else Progress(False)))
        if _runs_models(plan) or plan.adapters or _uses_linear_algebra(plan):
            from hf_locstitch.runtime.allocator import share_one_arena
            from hf_locstitch.runtime.chunks import one_torch_thread

            share_one_arena()
            stack.enter_context(one_torch_thread())
        if _runs_models(plan):
            from hf_locstitch.runtime.allocator import freed_memory_goes_back

            stack.enter_context(freed_memory_goes_back())
        work = stack.enter_context(open_work_dir(plan, out, None if publish else out, processes))
        if isinstance(plan, LocalizePlan):
            from hf_locstitch.engine.localize_run import LocalizeRun

            run = LocalizeRun(plan, work, processes, progress, hashes, upload)
        else:
            from hf_locstitch.engine.model_run import MergeRun, StitchRun

            if isinstance(plan, StitchPlan):
                run = StitchRun(plan, work, processes, progress, hashes, upload)
            else:
                assert isinstance(plan, MergePlan)
                run = MergeRun(plan, work, processes, progress, hashes, upload)
        record = run.run()
        if publish is not None and processes.first:
            publish(work.stage, record)
        if upload is not None:
            upload.pause()  # the files are about to move
        return record


def _runs_models(plan: Plan) -> bool:
    """Whether torch is needed; importing it takes longer than merging small models."""
    with_data = isinstance(plan, MergePlan | LocalizePlan) and plan.masked and plan.localizer.needs_data
    return with_data or plan.recipe.fitting is not None


def _uses_linear_algebra(plan: Plan) -> bool:
    method = plan.recipe.method
    return isinstance(method, TensorMethod) and method.linear_algebra


@contextmanager
def _upload(plan: Plan, processes: Processes, discard: bool = False) -> Iterator[Upload | None]:
    """In the process that publishes, if anything is to be published."""
    if plan.recipe.target is None or not processes.first:
        yield None
        return
    from hf_locstitch.report.publish import Upload

    upload = Upload(plan.recipe.target, private=plan.recipe.private, discard=discard)
    try:
        yield upload
    finally:
        upload.close()


def _known(record: Manifest) -> dict[str, str]:
    """SHA-256 of the files that nobody writes to any more."""
    return {file: entry["sha256"] for file, entry in record.outputs.items() if file.endswith(WEIGHTS)}


def _message(plan: Plan) -> str:
    return f"{plan.command.capitalize()} {', '.join(plan.finetuned)} with hf-locstitch"
