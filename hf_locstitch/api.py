"""The same from Python: `merge_from_hub`, `localize_from_hub`, `stitch_from_hub`, and what they return.

The command line is a thin layer over this.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from hf_locstitch.checkpoints.checkpoint import open_checkpoint
from hf_locstitch.checkpoints.ref import parse_ref
from hf_locstitch.data.sets import open_set
from hf_locstitch.errors import PublishError, RecipeError
from hf_locstitch.hashes import InputHashes
from hf_locstitch.localize.localizer import Localizer
from hf_locstitch.plan import MergePlan, data_sets, finetuned_names, make_plan, refit_sets
from hf_locstitch.progress import Progress, only_our_bars
from hf_locstitch.recipe import Recipe, make_recipe
from hf_locstitch.refit.config import Refit
from hf_locstitch.settings import DEFAULT, Settings, make_settings

if TYPE_CHECKING:
    from hf_locstitch.evaluation.main import AfterMerge
    from hf_locstitch.evaluation.report import EvaluationReport
    from hf_locstitch.manifest import Manifest
    from hf_locstitch.processes import Processes
    from hf_locstitch.publish import Published, Upload


@dataclass(frozen=True)
class MergeResult:
    """out: the folder, None if it was only pushed. url, commit: of the pushed repo, None if it was not.

    evaluation: if the recipe asked for one.
    """

    out: Path | None
    url: str | None
    commit: str | None
    manifest: Manifest
    evaluation: EvaluationReport | None = None

    def as_json(self) -> dict[str, Any]:
        return {
            "out": None if self.out is None else str(self.out),
            "url": self.url,
            "commit": self.commit,
            "manifest": asdict(self.manifest),
            **({"evaluation": self.evaluation.as_json()} if self.evaluation else {}),
        }

    def describe(self) -> str:
        """For a person, one line a place."""
        done = "localized" if self.manifest.is_localized else "merged"
        lines = [f"{done:<9}  {self.out}"] if self.out else []
        lines += [f"published  {self.url} at {self.commit}"] if self.url else []
        densities = [f"{name} {100 * mask.real_density:.4g} %" for name, mask in self.manifest.masks.items()]
        lines += ["density    " + ", ".join(densities)] if densities else []
        lines += ["", self.evaluation.describe()] if self.evaluation else []
        return "\n".join(lines)


def merge_from_hub(
    base: str | Path,
    finetuned: Sequence[str | Path],
    *,
    out: str | Path | None = None,
    push_to: str | None = None,
    localizer: Localizer | None = None,
    names: Sequence[str] | None = None,
    cache: bool = True,
    max_memory: int | str | None = None,
    device: Literal["cpu", "cuda"] = "cpu",
    show_progress: bool | None = None,
    **options: Any,
) -> MergeResult:
    """Merge finetuned models into their base, by Localize-and-Stitch unless a `method` is given.

    base, finetuned: folders, org/name or org/name@revision. At least one of out (a folder that does not exist yet)
    and push_to (org/name) says where the result goes. localizer: how masks are found; by magnitude, at the method's
    density, by default. names: what the masks are called; the refs' last parts by default. cache: False streams the
    inputs and keeps none of them. max_memory: bytes, or such as "1GB". device: where models are compared; the bytes are
    the same. options: any further field of a recipe (method, stitch, data, scale, include, exclude, dtype, shard_size,
    private, …).
    show_progress: None shows bars on a terminal only.

    Raises RequestError if that cannot be done, with nothing written, and WorkError if the work fails.
    """
    fields = {"base": str(base), "finetuned": _entries(finetuned, names), **_given(localizer)}
    recipe = make_recipe({**fields, "out": out, "push_to": push_to, **options})
    return merge(recipe, plan_merge(recipe, make_settings(cache, max_memory, device)), Progress(show_progress))


def localize_from_hub(
    base: str | Path,
    finetuned: str | Path,
    *,
    out: str | Path | None = None,
    push_to: str | None = None,
    localizer: Localizer | None = None,
    name: str | None = None,
    cache: bool = True,
    max_memory: int | str | None = None,
    device: Literal["cpu", "cuda"] = "cpu",
    show_progress: bool | None = None,
    **options: Any,
) -> MergeResult:
    """Cut one finetuned model down to its mask and the values under it: a localized checkpoint.

    Arguments and errors are those of merge_from_hub; of the recipe's further fields data, include, exclude,
    allow_non_finite, figures and private may be given.
    """
    fields = {"base": str(base), "finetuned": _entries([finetuned], name and [name]), **_given(localizer)}
    recipe = make_recipe({**fields, "out": out, "push_to": push_to, **options})
    return merge(recipe, plan_localize(recipe, make_settings(cache, max_memory, device)), Progress(show_progress))


def stitch_from_hub(
    base: str | Path,
    localized: Sequence[str | Path],
    *,
    out: str | Path | None = None,
    push_to: str | None = None,
    names: Sequence[str] | None = None,
    cache: bool = True,
    max_memory: int | str | None = None,
    show_progress: bool | None = None,
    **options: Any,
) -> MergeResult:
    """Merge localized checkpoints into the base that they were localized against.

    The weights are, bit for bit, those of one merge of the same finetuned models with the same settings.
    names: what the masks are called; as they were by default. Other arguments and errors are those of merge_from_hub;
    of the recipe's further fields scale, dtype, shard_size, allow_non_finite, figures and private may be given.
    """
    fields = {"base": str(base), "localized": _entries(localized, names), "out": out, "push_to": push_to}
    recipe = make_recipe({**fields, **options})
    return merge(recipe, plan_merge(recipe, make_settings(cache, max_memory)), Progress(show_progress))


def _given(localizer: Localizer | None) -> dict[str, Localizer]:
    return {} if localizer is None else {"localizer": localizer}


def _entries(refs: Sequence[str | Path], names: Sequence[str] | None) -> list[dict[str, str]]:
    """As a recipe has them. Raises RecipeError unless there is a name for each, or none."""
    entries = [{"ref": str(ref)} for ref in refs]
    if names is None:
        return entries
    if len(names) != len(entries):
        raise RecipeError(f"{len(names)} names are given for {len(entries)} finetunes. Give one each.")
    return [{**entry, "name": name} for entry, name in zip(entries, names, strict=True)]


def plan_localize(recipe: Recipe, settings: Settings = DEFAULT) -> MergePlan:
    """As plan_merge, for a localized checkpoint of the recipe's one finetune."""
    from hf_locstitch.localized.plan import check_localizable, localize_plan

    check_localizable(recipe)
    return localize_plan(plan_merge(recipe, settings))


def plan_merge(recipe: Recipe, settings: Settings = DEFAULT) -> MergePlan:
    """Pin every revision, read every header, and plan. Raises RequestError with all that is wrong."""
    if recipe.localized:
        return _plan_stitch(recipe, settings)
    refs = [parse_ref(entry.ref) for entry in (recipe.base, *recipe.finetuned)]
    names = finetuned_names(recipe, [ref.name for ref in refs[1:]])
    with only_our_bars(), ThreadPoolExecutor(min(8, len(refs))) as pool:
        base, *finetuned = pool.map(open_checkpoint, refs)
    data = {name: open_set(asked) for name, asked in data_sets(recipe, names).items()}
    refit_data = {name: open_set(asked) for name, asked in refit_sets(recipe, names).items()}
    models = dict(zip(names, finetuned, strict=True))
    plan = make_plan(recipe, base, models, settings, data, refit_data)
    if isinstance(recipe.stitch, Refit) and recipe.stitch.judge != "agreement":
        from hf_locstitch.refit.subject import check_labels  # slow to import

        check_labels(recipe.stitch, models, refit_data)
    return plan


def _plan_stitch(recipe: Recipe, settings: Settings) -> MergePlan:
    from hf_locstitch.localized.checkpoint import open_localized
    from hf_locstitch.localized.plan import stitch_plan

    refs = [parse_ref(entry.ref) for entry in recipe.localized]
    with only_our_bars(), ThreadPoolExecutor(min(8, len(refs) + 1)) as pool:
        base = pool.submit(open_checkpoint, parse_ref(recipe.base.ref))
        localized = list(pool.map(open_localized, refs))
        names = finetuned_names(recipe, [one.name for one in localized])
        return stitch_plan(recipe, base.result(), dict(zip(names, localized, strict=True)), settings)


def merge(recipe: Recipe, plan: MergePlan, progress: Progress) -> MergeResult:
    """Carry out a plan and publish what comes of it. Raises as merge_from_hub."""
    from hf_locstitch.processes import find_processes

    if recipe.out is None and recipe.push_to is None:
        raise RecipeError("nothing says where the merge goes: give --out DIR, --push-to ORG/NAME, or both.")
    processes = find_processes()
    if processes.count > 1 and not plan.settings.cache:
        raise RecipeError(
            f"--no-cache works in one process, not in {processes.count}: processes share what lies in the cache. "
            "Drop --no-cache, or the launcher."
        )
    if recipe.push_to is not None:
        from hf_locstitch.publish import check_target

        check_target(recipe.push_to)
    with only_our_bars():
        if recipe.out is not None:
            return _merge_into(recipe.out, recipe, plan, progress, processes)
        if recipe.evaluate is None:
            return _merge_and_push(recipe, plan, progress, processes)
        scratch = _scratch(recipe)
        result = _merge_into(scratch / "merged", recipe, plan, progress, processes)
        if processes.first:
            shutil.rmtree(scratch, ignore_errors=True)
        return replace(result, out=None)


def _judge(recipe: Recipe, plan: MergePlan) -> AfterMerge | None:
    """The evaluation that the recipe asks for, if any. Raises RequestError."""
    if recipe.evaluate is None:
        return None
    from hf_locstitch.evaluation.main import AfterMerge

    return AfterMerge(recipe, plan)


def _scratch(recipe: Recipe) -> Path:
    """Where a merge lies that is only pushed: found again by the same command if this one is cut short."""
    from huggingface_hub import constants

    return Path(constants.HF_HOME) / "hf-locstitch" / str(recipe.push_to).replace("/", "--")


def _merge_into(out: Path, recipe: Recipe, plan: MergePlan, progress: Progress, processes: Processes) -> MergeResult:
    from hf_locstitch.places import check_disk, check_out

    record = check_out(out, plan)
    if record is None:
        check_disk(out, plan)
    judge = _judge(recipe, plan)
    with _upload(recipe, processes) as upload:
        record = record or _run(plan, out, progress, processes, upload)
        report = judge.run(out, processes) if judge else None
        processes.end()
        if upload is None:
            return MergeResult(out, None, None, record, report)
        try:
            published = upload.commit(out, _message(plan), progress)
        except PublishError as error:
            raise PublishError(
                f"the merge is complete in {out}, but {error} Or upload it by hand: hf upload {recipe.push_to} {out}"
            ) from error
    return MergeResult(out, published.url, published.commit, record, report)


def _merge_and_push(recipe: Recipe, plan: MergePlan, progress: Progress, processes: Processes) -> MergeResult:
    """Nothing stays on this machine; what a failure leaves is found again by the same command."""
    from hf_locstitch.places import check_disk

    scratch = _scratch(recipe)
    check_disk(scratch, plan)
    published: list[Published] = []
    with _upload(recipe, processes, discard=not plan.settings.cache) as upload:

        def publish(folder: Path) -> None:
            assert upload is not None
            published.append(upload.commit(folder, _message(plan), progress))

        record = _run(plan, scratch / "merged", progress, processes, upload, publish)
        processes.end()
    if not published:
        return MergeResult(None, None, None, record)
    shutil.rmtree(scratch, ignore_errors=True)
    return MergeResult(None, published[0].url, published[0].commit, record)


def _run(
    plan: MergePlan,
    out: Path,
    progress: Progress,
    processes: Processes,
    upload: Upload | None,
    publish: Callable[[Path], object] | None = None,
) -> Manifest:
    with InputHashes(plan.inputs, processes.rank, processes.count) as hashes:  # begins while libraries are imported
        from hf_locstitch.run import run

        return run(plan, out, progress, hashes, processes, upload, publish)


@contextmanager
def _upload(recipe: Recipe, processes: Processes, discard: bool = False) -> Iterator[Upload | None]:
    """In the process that publishes, if anything is to be published."""
    if recipe.push_to is None or not processes.first:
        yield None
        return
    from hf_locstitch.publish import Upload

    upload = Upload(recipe.push_to, private=recipe.private, discard=discard)
    try:
        yield upload
    finally:
        upload.close()


def _message(plan: MergePlan) -> str:
    return f"{plan.command.capitalize()} {', '.join(plan.finetuned)} with hf-locstitch"
