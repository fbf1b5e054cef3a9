"""`verify`: files against the manifest, masks against densities, values against inputs. Only reads.

For a localized checkpoint, the values are those under its mask."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hf_locstitch.artifacts.manifest import RECIPE_FILE, Manifest, open_manifest
from hf_locstitch.checkpoints.checkpoint import Checkpoint, open_source
from hf_locstitch.checkpoints.opening import read_checkpoint
from hf_locstitch.checkpoints.ref import parse_ref
from hf_locstitch.checkpoints.source import Source
from hf_locstitch.errors import RequestError
from hf_locstitch.inspection.verification.files import check_files, check_recipe
from hf_locstitch.inspection.verification.finite import absent_shards, check_all_finite
from hf_locstitch.inspection.verification.inputs import InputRef, input_refs
from hf_locstitch.inspection.verification.localized import check_localized
from hf_locstitch.inspection.verification.masks import METHOD, check_foreign_masks
from hf_locstitch.inspection.verification.merges import check_merge, read_merge
from hf_locstitch.inspection.verification.report import Finding, Notes, VerifyReport
from hf_locstitch.inspection.verification.sample import Tensors
from hf_locstitch.plan.recipe import Recipe
from hf_locstitch.plan.recipe_file import recipe_of
from hf_locstitch.runtime.human import some
from hf_locstitch.runtime.progress import Progress


def verify(
    ref: str | Path,
    *,
    base: str | Path | None = None,
    finetuned: Sequence[str | Path] | None = None,
    tensors: Tensors = 8,
    show_progress: bool | None = None,
) -> VerifyReport:
    """Read a merge or a localized checkpoint back; check its files, its masks and, for Localize-and-Stitch, its values.

    ref: a folder, org/name or org/name@revision. base, finetuned: where the inputs are, if not where the manifest
    says; relative paths start from the working directory. Of a stitch, finetuned may name its localized checkpoints.
    tensors: how many localized tensors to recompute (and two others), "all" for every tensor. show_progress: None shows
    bars on a terminal only.

    Raises CheckpointError if `ref` is neither. A failed check raises nothing: it is a finding of the report.
    """
    source = open_source(parse_ref(str(ref)))
    record = open_manifest(source)
    refs = input_refs(
        record, None if base is None else str(base), None if finetuned is None else [str(one) for one in finetuned]
    )
    notes, progress = Notes(), Progress(show_progress)
    _files(source, record, progress, notes)
    recipe = _recipe(source, record, notes)
    if record.is_localized:
        check_localized(source, record, refs, tensors, progress, notes)
    elif (weights := _weights(source, notes)) is None:
        notes.skip("masks and values", "the weights cannot be read")
    else:
        _model(source, record, recipe, weights, refs, tensors, progress, notes)
    return VerifyReport(
        source.pinned, record.method, notes.checked, tuple(notes.skipped), tuple(notes.findings), notes.refitted
    )


def _files(source: Source, record: Manifest, progress: Progress, notes: Notes) -> None:
    total = sum(entry.get("size", 0) for entry in record.outputs.values())
    with progress.bar("files", total) as advance:
        notes.findings += check_files(source, record, advance)
    notes.count(files=len(record.outputs), bytes=total)


def _recipe(source: Source, record: Manifest, notes: Notes) -> Recipe | None:
    try:
        recipe = recipe_of(source)
    except RequestError as error:
        notes.findings.append(Finding("recipe", RECIPE_FILE, "the recipe", f"unreadable ({error})", "readable"))
        return None
    if recipe is not None:  # its absence is a finding already
        notes.findings += check_recipe(recipe, record)
    return recipe


def _weights(source: Source, notes: Notes) -> Checkpoint | None:
    """The merged model's headers."""
    try:
        return read_checkpoint(source)
    except RequestError as error:
        notes.findings.append(Finding("files", source.label, "the model", f"unreadable ({error})", "readable"))
        return None


def _model(
    source: Source,
    record: Manifest,
    recipe: Recipe | None,
    weights: Checkpoint,
    refs: Sequence[InputRef],
    tensors: Tensors,
    progress: Progress,
    notes: Notes,
) -> None:
    """Masks and values of a merge, and whether its values are finite."""
    if record.method != METHOD:
        check_foreign_masks(source, record, weights, notes)
        notes.skip(
            "values",
            f"they are recomputed for method {METHOD} only; this merge was made by {record.method}, and of its weights "
            f"nothing is checked but the files' hashes and NaN and infinity. {RECIPE_FILE} makes the same bytes again",
        )
    elif recipe is None:
        notes.skip("masks and values", "the recipe cannot be read")
    elif merge := read_merge(source, record, recipe, weights, notes):
        check_merge(merge, refs, tensors, progress, notes)
    if recipe is None or not recipe.allow_non_finite:
        notes.findings += check_all_finite(weights)
        if absent := absent_shards(weights):
            notes.skip("NaN and infinity", f"{some(absent)} not fetched; --tensors all fetches all")
