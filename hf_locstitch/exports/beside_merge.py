"""The PEFT adapter that a recipe asks for beside its merge: judged by the plan beforehand, exported afterwards."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from hf_locstitch.checkpoints.adapter import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from hf_locstitch.checkpoints.checkpoint import CARD
from hf_locstitch.checkpoints.mapped import read_header
from hf_locstitch.engine.preflight import check_place, check_space, is_free, taken
from hf_locstitch.engine.work_dir import fingerprint
from hf_locstitch.errors import CheckpointError, LocstitchError, MismatchError, OutputError, RecipeError, WorkError
from hf_locstitch.exports.expressible import check_masked, misfits, unlike
from hf_locstitch.exports.form import MADE_OF
from hf_locstitch.runtime.packages import MODELS, need
from hf_locstitch.runtime.processes import find_processes
from hf_locstitch.runtime.progress import Progress, hide_all_library_bars

if TYPE_CHECKING:
    from hf_locstitch.exports.export import ExportResult
    from hf_locstitch.plan.plans import ModelPlan

LABEL, FLAG = "the merge", "--adapter"
FILES = frozenset({ADAPTER_WEIGHTS, ADAPTER_CONFIG, CARD})  # of an adapter


def check_adapter(plan: ModelPlan) -> None:
    """Raises RequestError if the adapter cannot be written, or cannot hold the merge. Reads no weights."""
    adapter = plan.recipe.adapter
    if adapter is None or _is_written(adapter, plan):
        return
    need("--adapter", "peft", *MODELS)
    _check_folder(adapter, plan)
    recipe, base = plan.recipe, plan.base
    check_masked(LABEL, recipe, masked=plan.masked, new_rows=plan.vocabulary is not None)
    planned = {tensor.name: (tensor.dtype, tensor.shape) for shard in plan.shards for tensor in shard.tensors}
    problems = misfits(LABEL, base, [(info.name, info.shape) for info in plan.mask_tensors])
    if found := [*problems, *unlike(LABEL, base, planned)]:
        raise MismatchError(found)
    from hf_locstitch.exports.adapter_layout import Changed, lay_out

    share = min(1.0, len(plan.localizers) * plan.k / plan.n)
    ones = {info.name: math.ceil(share * info.numel) for info in plan.mask_tensors}  # if masks do not overlap
    with hide_all_library_bars():
        check_space(adapter, lay_out(Changed(LABEL, "merge", base, ones)).nbytes)


def _check_folder(adapter: Path, plan: ModelPlan) -> None:
    if find_processes().count > 1:
        raise RecipeError("an adapter is exported in one process. Run it without the launcher, or drop --adapter.")
    if not plan.settings.cache and not plan.base.source.local:
        raise RecipeError(
            "an adapter is made from the base once more, which --no-cache does not keep. Drop one of them."
        )
    if not is_free(adapter, FLAG) and not (_files(adapter) < FILES and _is_of(adapter, plan)):
        raise taken(adapter, FLAG)
    out = plan.recipe.out
    if out is not None and _nested(out.resolve(), adapter.resolve()):
        raise OutputError(
            f"{adapter} and {out} are one folder, or one lies in the other, but the adapter is none of the merge's "
            "files. Use another --adapter."
        )
    check_place(adapter)


def _nested(one: Path, other: Path) -> bool:
    return one.is_relative_to(other) or other.is_relative_to(one)


def _is_written(adapter: Path, plan: ModelPlan) -> bool:
    """Whether an earlier call has written this very adapter, and all of its files are still there."""
    return _files(adapter) >= FILES and _is_of(adapter, plan)


def _files(folder: Path) -> set[str]:
    """The names in it; none if there is no folder."""
    return {path.name for path in folder.iterdir()} if folder.is_dir() else set()


def _is_of(adapter: Path, plan: ModelPlan) -> bool:
    """Whether the weights in a folder are this very adapter's."""
    file = adapter / ADAPTER_WEIGHTS
    try:
        return read_header(file, str(file)).metadata.get(MADE_OF) == fingerprint(plan)
    except (OSError, CheckpointError):
        return False


def write_adapter(plan: ModelPlan, merged: Path, progress: Progress) -> ExportResult | None:
    """Export a finished merge, anew where files of an adapter are missing. Returns None if an earlier call did. Raises
    WorkError."""
    from hf_locstitch.engine.delivery import Delivery
    from hf_locstitch.exports.export import carry_out, plan_export

    adapter = plan.recipe.adapter
    assert adapter is not None
    if _is_written(adapter, plan):
        return None
    for file in _files(adapter) & FILES if _is_of(adapter, plan) else ():  # what is left of it
        (adapter / file).unlink()
    base = plan.base.source.pinned if plan.base.source.repo else plan.recipe.base.ref
    try:
        return carry_out(plan_export(merged, base=base), Delivery("export", adapter, None), progress)
    except LocstitchError as error:
        raise WorkError(f"the merge is complete in {merged}, but its adapter in {adapter} is not: {error}") from error
