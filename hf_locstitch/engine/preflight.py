"""Checks before the work: whether the output may be written where requested, and whether it fits."""

from __future__ import annotations

import logging
import shutil
from itertools import count
from pathlib import Path

from hf_locstitch.artifacts.manifest import FILE, Manifest, is_intact, parse_manifest
from hf_locstitch.engine.work_dir import fingerprint
from hf_locstitch.errors import CheckpointError, OutputError, RecipeError
from hf_locstitch.localize.cost import LearningCost, free_memory
from hf_locstitch.plan.cost import estimate, files_here, localizing_cost
from hf_locstitch.plan.plans import ModelPlan, Plan
from hf_locstitch.plan.whole_tensors import whole_tensors_memory
from hf_locstitch.runtime.files import existing_part, is_mount_point, is_writable
from hf_locstitch.runtime.human import human

LOG = logging.getLogger("hf_locstitch")


def check_output_given(out: Path | None, push_to: str | None) -> None:
    """Raises RecipeError if there is no place for the result."""
    if out is None and push_to is None:
        raise RecipeError("no output given: use --out DIR, --push-to ORG/NAME, or both.")


def check_out(out: Path, plan: Plan) -> Manifest | None:
    """The record of this very merge if `out` holds it complete.

    Raises OutputError if it holds anything else, or a finished folder cannot be moved there.
    """
    record = find_record(out, plan)
    if record is not None and not is_intact(record, out):
        raise taken(out)
    return record


def find_record(out: Path, plan: Plan) -> Manifest | None:
    """The record of this very merge if `out` holds it, whose files may be damaged; None if nothing is there.

    Raises OutputError if it holds anything else, or a finished folder cannot be moved there. Reads no weights.
    """
    if is_free(out):
        return None
    record = _read_manifest(out)
    if record is None or record.fingerprint != fingerprint(plan):
        raise taken(out)
    return record


def is_free(out: Path, flag: str = "--out") -> bool:
    """Whether nothing is there, or an empty folder. Raises OutputError if a finished folder cannot be moved there.

    flag: that names it.
    """
    if out.is_symlink() and not out.exists():
        raise OutputError(
            f"{out} is a link to {out.resolve()}, which does not exist. Make that folder, or use another {flag}."
        )
    if is_mount_point(out):
        raise OutputError(
            f"{out} is a mount point, and a finished folder cannot be moved onto one. Use a folder in it: "
            f"{flag} {out / 'merged'}."
        )
    return not out.exists() or (out.is_dir() and not any(out.iterdir()))


def taken(out: Path, flag: str = "--out") -> OutputError:
    free = next(path for number in count(2) if not (path := out.with_name(f"{out.name}-{number}")).exists())
    return OutputError(
        f"{out} exists and is not an empty folder; nothing is overwritten. Use another folder, such as {flag} {free}."
    )


def _read_manifest(folder: Path) -> Manifest | None:
    """None if there is none that this version can read."""
    try:
        return parse_manifest((folder / FILE).read_bytes(), str(folder / FILE))
    except (OSError, CheckpointError):
        return None


def check_work(near: Path, plan: Plan) -> None:
    """All that must hold before a plan is carried out beside `near`. Raises RequestError; warns of memory."""
    check_place(near)
    check_inputs(plan)
    check_disk(near, plan)
    warn_of_memory(plan)


def check_inputs(plan: Plan) -> None:
    """Raises RequestError if a file that will be read is not here and cannot be fetched."""
    for name, files in plan.needed.items():
        plan.inputs[name].source.check_obtainable(files, plan.settings.cache)
    if isinstance(plan, ModelPlan):
        plan.files.source.check_obtainable(plan.side_files.copied, cache=False)  # small: see HubSource


def check_place(near: Path) -> None:
    """Raises OutputError if nothing can be written beside `near`, or beside what it is a link to."""
    beside = near.resolve().parent
    if not is_writable(beside):
        raise OutputError(
            f"{beside} cannot be written to, and the work is done there. Use --out with a folder "
            "elsewhere; without --out, HF_HOME names the place."
        )


def check_disk(folder: Path, plan: Plan) -> None:
    """Raises OutputError if the output and its temporary files will not fit beside `folder`."""
    check_space(folder, estimate(plan, files_here(plan)).disk)


def check_space(folder: Path, needed: float) -> None:
    """Raises OutputError if so many bytes will not fit beside `folder`."""
    if (free := shutil.disk_usage(existing_part(folder)).free) < needed:
        raise OutputError(
            f"{folder} needs up to {human(needed)} of disk space, but only {human(free)} is free. "
            "Free some space, or use an --out elsewhere."
        )


def warn_of_memory(plan: Plan) -> None:
    """Log a warning if finding masks or merging whole tensors may take more memory than is free on its device."""
    whole = whole_tensors_memory(plan)
    if whole and whole > (free := free_memory("cpu")):
        LOG.warning(
            f"{plan.recipe.method.name} takes whole tensors, which may need {human(whole)} of memory, but only "
            f"{human(free)} is free. --max-memory makes it merge fewer at a time."
        )
    cost = localizing_cost(plan)
    if not isinstance(cost, LearningCost):
        return
    if cost.peak > (free := free_memory(cost.device)):
        LOG.warning(
            f"localizing takes about {human(cost.peak)} of memory, but only {human(free)} is free on "
            f"{cost.device}: it may not fit. "
            "Set micro_batch: 1, checkpointing: true, or state_on: cpu in the recipe's localizer."
        )
