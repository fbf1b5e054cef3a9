"""Values under masks that were fitted: solved for once more where that takes weights alone, or said not to be."""

from __future__ import annotations

from collections.abc import Collection, Iterator

import torch
from pydantic import ValidationError

from hf_locstitch.artifacts.manifest import FILE
from hf_locstitch.errors import LocstitchError
from hf_locstitch.inspection.verification.fitted import Fit, Looked, how_solved, refitted_names
from hf_locstitch.inspection.verification.refit_layers import CPU, EPSILON, LayerCheck, affordable
from hf_locstitch.inspection.verification.report import Finding, Notes
from hf_locstitch.inspection.verification.sample import Tensors, sample
from hf_locstitch.inspection.verification.solved import Solving, of_vectors
from hf_locstitch.runtime.human import counted
from hf_locstitch.runtime.progress import Progress
from hf_locstitch.stitch.dataless.layers import is_vector
from hf_locstitch.stitch.dataless.opened import OpenedModels, open_models
from hf_locstitch.stitch.dataless.solution import LOW_RANK_RIDGE, RIDGE
from hf_locstitch.stitch.refit.models import reading

VECTORS = 2  # in a sample, and
WORK = 2e12  # floating-point operations for the linear layers of one, and
ALL_WORK = 5e13  # for those where all tensors are asked for


def check_refit(fit: Fit, localized: Collection[str], tensors: Tensors, progress: Progress, notes: Notes) -> None:
    """Note what was found, and how much was looked at."""
    refitted = refitted_names(fit.record) & set(localized)
    ones = {name: count for name in sorted(refitted) if (count := len(fit.union(name)))}
    if not ones:
        return
    looked = Looked(ones)
    why = _solve(fit, looked, localized, tensors, progress, notes)
    notes.refitted = looked.report()
    left = len(notes.refitted.sampled) + len(notes.refitted.hashed)
    if left:
        notes.skip(f"values under the masks of {counted(left, 'refitted tensor')}", why)


def _solve(
    fit: Fit, looked: Looked, localized: Collection[str], tensors: Tensors, progress: Progress, notes: Notes
) -> str:
    """Solve once more. Returns why that was not done for all values."""
    recorded = how_solved(fit.record.stitch or {})
    if recorded is None:
        return "the fit is not repeated; run the recipe again to compare them"
    try:
        solving = Solving.model_validate(recorded)
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        what = f"stitch.{'.'.join(map(str, fault['loc']))}"
        notes.findings.append(Finding("recipe", FILE, what, str(recorded.get(str(fault["loc"][0]))), fault["msg"]))
        return "the manifest does not say how they were solved for"
    if solving.low_rank and tensors != "all":
        notes.skip("whether updates are of low rank, as recorded", "--tensors all looks at the layers that tell")
    try:
        notes.findings += _solve_some(fit, looked, localized, solving, tensors, progress)
    except LocstitchError as error:
        return str(error)
    return "the fit is repeated in a sample; run the recipe again to compare all of them"


def _solve_some(
    fit: Fit, looked: Looked, localized: Collection[str], solving: Solving, tensors: Tensors, progress: Progress
) -> Iterator[Finding]:
    """Raises LocstitchError."""
    inputs = fit.inputs(localized if tensors == "all" else [])
    readers = [inputs[name] for name in ("base", *fit.order)]
    opened = open_models(readers[0], readers[1:], sorted(localized), CPU)
    yield from _check_solving(solving, opened if tensors == "all" else None)
    base = readers[0].checkpoint
    vectors = [name for name in opened.layers.others if name in looked.names and is_vector(base.info(name))]
    for name in sample(vectors, "all" if tensors == "all" else VECTORS):
        yield from _check_vector(fit, name, looked)
    chosen = affordable(opened, looked.names, len(fit.order), ALL_WORK if tensors == "all" else WORK)
    with progress.bar("solving", len(chosen), " layers") as advance:
        for unit, shared in chosen:
            yield from LayerCheck(fit, opened, unit, solving).check(shared, looked)
            advance(1)


def _check_vector(fit: Fit, name: str, looked: Looked) -> Iterator[Finding]:
    """Check a tensor that is in no linear layer."""
    inputs = fit.inputs([name])
    base, *finetuned = (reading(inputs[one])(name).reshape(-1).float() for one in ("base", *fit.order))
    change = fit.scale * of_vectors([(tuned - base).double() for tuned in finetuned])
    slack = 2 * EPSILON * (base.abs() + change.abs())
    yield from fit.compare(name, base + change, slack, torch.ones_like(base, dtype=torch.bool), looked)


def _check_solving(solving: Solving, opened: OpenedModels | None) -> Iterator[Finding]:
    """Whether values were solved for as this version does it. opened: if it is to be told whether updates are of low
    rank."""
    due = LOW_RANK_RIDGE if solving.low_rank else RIDGE
    if solving.ridge != due:
        yield Finding("recipe", FILE, "stitch.ridge", str(solving.ridge), f"{due}, as of this version", warning=True)
    if opened is not None and (low_rank := opened.is_low_rank()) != solving.low_rank:
        yield Finding("recipe", FILE, "stitch.low_rank", str(solving.low_rank), f"{low_rank}, as the finetunes show")
