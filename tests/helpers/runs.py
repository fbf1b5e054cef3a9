"""Running the package: merges that draw no figures, which take most of a small merge's time, unless a test is about
them; and what a merge left."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from helpers.models import State, save
from hf_locstitch import localize_from_hub, merge_from_hub, stitch_from_hub
from hf_locstitch.engine.execute import make
from hf_locstitch.plan.planning import make_plan
from hf_locstitch.plan.plans import MergePlan
from hf_locstitch.plan.recipe import make_recipe
from hf_locstitch.runtime.progress import Progress
from hf_locstitch.runtime.settings import Settings

quick_merge = partial(merge_from_hub, figures=False)
quick_localize = partial(localize_from_hub, figures=False)
quick_stitch = partial(stitch_from_hub, figures=False)


class Killed(BaseException):
    """Stands for a kill: nothing catches it, nothing is cleaned up for it."""


def carry_out(plan: MergePlan, out: Path) -> None:
    make(plan, out, Progress(False))


def merged(
    tmp: Path, base: State, finetuned: Sequence[State], settings: Settings | None = None, **fields: object
) -> Path:
    """Save, merge, and return OUT. fields: of the recipe."""
    save(tmp / "base", base)
    entries = [{"ref": str(save(tmp / f"ft{i}", state)), "name": f"ft{i}"} for i, state in enumerate(finetuned)]
    return merge_folders(tmp, entries, settings, **fields)


def merge_folders(
    tmp: Path, entries: Sequence[dict[str, str]], settings: Settings | None = None, **fields: object
) -> Path:
    recipe = make_recipe({"base": str(tmp / "base"), "finetuned": entries, "figures": False, **fields})
    out = tmp / f"out{len(list(tmp.glob('out*')))}"
    carry_out(make_plan(recipe, settings or Settings()), out)
    return out


def files_of(folder: Path) -> dict[str, str]:
    """Hash of every file but the manifest, which holds the time taken."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "locstitch.json"
    }
