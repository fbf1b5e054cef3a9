"""The same from Python: `merge_from_hub` and what it returns. The command line is a thin layer over this."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_locstitch.checkpoints.checkpoint import open_checkpoint
from hf_locstitch.checkpoints.ref import parse_ref
from hf_locstitch.errors import PublishError, RecipeError
from hf_locstitch.localize.magnitude import Magnitude
from hf_locstitch.plan import MergePlan, finetuned_names, make_plan
from hf_locstitch.progress import Progress
from hf_locstitch.recipe import Recipe, make_recipe

if TYPE_CHECKING:
    from hf_locstitch.manifest import Manifest
    from hf_locstitch.publish import Published


@dataclass(frozen=True)
class MergeResult:
    """out: the folder, None if it was only pushed. url, commit: of the pushed repo, None if it was not."""

    out: Path | None
    url: str | None
    commit: str | None
    manifest: Manifest

    def as_json(self) -> dict[str, Any]:
        return {
            "out": None if self.out is None else str(self.out),
            "url": self.url,
            "commit": self.commit,
            "manifest": asdict(self.manifest),
        }

    def describe(self) -> str:
        """For a person, one line a place."""
        lines = [f"merged     {self.out}"] if self.out else []
        lines += [f"published  {self.url} at {self.commit}"] if self.url else []
        densities = [f"{name} {100 * mask.real_density:.4g} %" for name, mask in self.manifest.masks.items()]
        lines += ["density    " + ", ".join(densities)] if densities else []
        return "\n".join(lines)


def merge_from_hub(
    base: str | Path,
    finetuned: Sequence[str | Path],
    *,
    out: str | Path | None = None,
    push_to: str | None = None,
    localizer: Magnitude = Magnitude(),  # noqa: B008 - frozen
    names: Sequence[str] | None = None,
    show_progress: bool | None = None,
    **options: Any,
) -> MergeResult:
    """Merge finetuned models into their base by Localize-and-Stitch.

    base, finetuned: folders, org/name or org/name@revision. At least one of out (a folder that does not exist yet)
    and push_to (org/name) says where the result goes. names: what the masks are called; the refs' last parts by
    default. options: any further field of a recipe (scale, include, exclude, dtype, shard_size, private, …).
    show_progress: None shows bars on a terminal only.

    Raises RequestError if that cannot be done, with nothing written, and WorkError if the work fails.
    """
    entries = [{"ref": str(ref)} for ref in finetuned]
    if names is not None:
        if len(names) != len(entries):
            raise RecipeError(f"{len(names)} names are given for {len(entries)} finetunes. Give one each.")
        entries = [{**entry, "name": name} for entry, name in zip(entries, names, strict=True)]
    fields = {"base": str(base), "finetuned": entries, "localizer": localizer, "out": out, "push_to": push_to}
    recipe = make_recipe({**fields, **options})
    return merge(recipe, plan_merge(recipe), Progress(show_progress))


def plan_merge(recipe: Recipe) -> MergePlan:
    """Pin every revision, read every header, and plan. Raises RequestError with all that is wrong."""
    refs = [parse_ref(entry.ref) for entry in (recipe.base, *recipe.finetuned)]
    names = finetuned_names(recipe, [ref.name for ref in refs[1:]])
    with ThreadPoolExecutor(min(8, len(refs))) as pool:
        base, *finetuned = pool.map(open_checkpoint, refs)
    return make_plan(recipe, base, dict(zip(names, finetuned, strict=True)))


def merge(recipe: Recipe, plan: MergePlan, progress: Progress) -> MergeResult:
    """Carry out a plan and publish what comes of it. Raises as merge_from_hub."""
    from hf_locstitch.processes import find_processes
    from hf_locstitch.run import Settings, check_disk, check_out, run

    if recipe.out is None and recipe.push_to is None:
        raise RecipeError("nothing says where the merge goes: give --out DIR, --push-to ORG/NAME, or both.")
    out = recipe.out or _scratch(str(recipe.push_to))
    record = check_out(out, plan)
    if record is None:
        check_disk(out, plan)
    if recipe.push_to is not None:
        from hf_locstitch.publish import check_target

        check_target(recipe.push_to)
    processes = find_processes()
    record = record or run(plan, out, progress, Settings(), processes)
    processes.end()
    published = None
    if recipe.push_to is not None and processes.first:
        published = _publish(out, recipe, plan, progress)
        if recipe.out is None:
            shutil.rmtree(out.parent, ignore_errors=True)
    url, commit = (published.url, published.commit) if published else (None, None)
    return MergeResult(recipe.out, url, commit, record)


def _scratch(repo: str) -> Path:
    """Where a merge lies that is only pushed: found again by the same command if this one is cut short."""
    from huggingface_hub import constants

    return Path(constants.HF_HOME) / "hf-locstitch" / repo.replace("/", "--") / "merged"


def _publish(out: Path, recipe: Recipe, plan: MergePlan, progress: Progress) -> Published:
    from hf_locstitch.publish import publish

    repo = str(recipe.push_to)
    message = f"Merge {', '.join(plan.finetuned)} with hf-locstitch"
    try:
        return publish(out, repo, private=recipe.private, message=message, progress=progress)
    except PublishError as error:
        raise PublishError(
            f"{error} It is kept in {out}: give the same command again, or upload it with: hf upload {repo} {out}"
        ) from error
