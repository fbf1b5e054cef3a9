"""`verify`: files against the manifest, masks against densities, values against inputs. Only reads.

For a localized checkpoint, the values are those under its mask."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, Literal

from hf_locstitch.artifacts.localized_checkpoint import LocalizedCheckpoint, read_localized
from hf_locstitch.artifacts.manifest import FILE, RECIPE_FILE, Manifest, open_manifest
from hf_locstitch.artifacts.mask_file import DamagedMask, MaskFile
from hf_locstitch.artifacts.summing_order import recorded_order
from hf_locstitch.checkpoints.checkpoint import Checkpoint, open_source
from hf_locstitch.checkpoints.header import TensorInfo
from hf_locstitch.checkpoints.opening import read_checkpoint
from hf_locstitch.checkpoints.reader import CheckpointReader
from hf_locstitch.checkpoints.ref import parse_ref
from hf_locstitch.checkpoints.source import Source
from hf_locstitch.errors import CheckpointError, LocstitchError, RequestError
from hf_locstitch.inspection.verification.files import check_files, check_recipe
from hf_locstitch.inspection.verification.finite import absent_shards, check_all_finite
from hf_locstitch.inspection.verification.inputs import InputRef, check_hashes, fetch_tensors, input_refs, open_inputs
from hf_locstitch.inspection.verification.localized import GraftReader
from hf_locstitch.inspection.verification.masks import (
    check_counts,
    check_shares,
    check_tensors,
    mask_finding,
    open_masks,
    tally,
)
from hf_locstitch.inspection.verification.report import Finding, Notes, VerifyReport
from hf_locstitch.inspection.verification.rows import check_rows
from hf_locstitch.inspection.verification.values import MergeSettings, ValueCheck, check_layout
from hf_locstitch.plan.checking import chosen_tensors
from hf_locstitch.plan.recipe import Recipe, make_recipe
from hf_locstitch.plan.recipe_file import load_recipe
from hf_locstitch.plan.vocabulary import VocabularyPlan, plan_vocabulary
from hf_locstitch.runtime.chunks import one_torch_thread
from hf_locstitch.runtime.human import some
from hf_locstitch.runtime.progress import Progress

METHOD = "locstitch"  # the method whose values are recomputed
GROUPS = 2  # inputs whose linear layers are solved for again in a sample, and
ALL_GROUPS = 16  # where all tensors are asked for
OTHERS = 2  # non-localized tensors in a sample
SEED = 0

Tensors = int | Literal["all"]


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
    says; relative paths start from the working directory. tensors: how many localized tensors to recompute
    (and two others), "all" for every tensor. show_progress: None shows bars on a terminal only.

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
        _localized(source, record, refs, tensors, progress, notes)
    elif (weights := _weights(source, notes)) is None:
        notes.skip("masks and values", "the weights cannot be read")
    else:
        if record.method != METHOD:
            _foreign_masks(source, record, weights, notes)
            notes.skip(
                "values", f"they are recomputed for method {METHOD} only; this merge was made by {record.method}"
            )
        elif recipe is None:
            notes.skip("masks and values", "the recipe cannot be read")
        elif merge := _read_merge(source, record, recipe, weights, notes):
            _values(merge, refs, tensors, progress, notes)
        if recipe is None or not recipe.allow_non_finite:
            notes.findings += check_all_finite(weights)
            if absent := absent_shards(weights):
                notes.skip("NaN and infinity", f"{some(absent)} not fetched; --tensors all fetches all")
    return VerifyReport(source.pinned, record.method, notes.checked, tuple(notes.skipped), tuple(notes.findings))


def _files(source: Source, record: Manifest, progress: Progress, notes: Notes) -> None:
    total = sum(entry.get("size", 0) for entry in record.outputs.values())
    with progress.bar("files", total) as advance:
        notes.findings += check_files(source, record, advance)
    notes.count(files=len(record.outputs), bytes=total)


def _foreign_masks(source: Source, record: Manifest, merged: Checkpoint, notes: Notes) -> None:
    """Masks of another method may cover other tensors: those of the first mask are expected in all."""
    if not record.masks:
        notes.skip("masks", "the manifest lists none")
        return
    masks, damaged = open_masks(source, record)
    shapes = next(iter(masks.values())).shapes if masks else {}
    ranged = [merged.info(name) for name in shapes if name in merged.tensors]
    _masks(record, masks, damaged, ranged, notes)


@dataclass(frozen=True)
class Merge:
    """A merge by Localize-and-Stitch whose recipe, headers and masks can be read. localized: names of tensors."""

    record: Manifest
    recipe: Recipe
    weights: Checkpoint
    localized: frozenset[str]
    masks: Mapping[str, MaskFile]

    @property
    def rest(self) -> str:
        """The name of the input that provides the tensors that are not localized."""
        return self.recipe.rest_from or "base"


def _read_merge(source: Source, record: Manifest, recipe: Recipe, weights: Checkpoint, notes: Notes) -> Merge | None:
    """Check the masks. None, with the reason noted, if values cannot be computed from them."""
    masks, damaged = open_masks(source, record)
    if recipe.localized and masks:  # the recipe does not say which tensors were localized
        chosen = [name for name in next(iter(masks.values())).shapes if name in weights.tensors]
    else:
        chosen = chosen_tensors(recipe, weights)
    if not _masks(record, masks, damaged, [weights.info(name) for name in chosen], notes):
        notes.skip("values", "the masks cannot be used")
        return None
    merge = Merge(record, recipe, weights, frozenset(chosen), masks)
    inputs, due = sorted(entry.name for entry in record.inputs), sorted(["base", *masks])
    if inputs != due or merge.rest not in due:
        notes.findings.append(Finding("recipe", FILE, "the list of inputs", ", ".join(inputs), ", ".join(due)))
        notes.skip("values", "the inputs do not match the masks")
        return None
    return merge


def _localized(
    source: Source, record: Manifest, refs: Sequence[InputRef], tensors: Tensors, progress: Progress, notes: Notes
) -> None:
    """Mask and values of a localized checkpoint."""
    try:
        given = read_localized(source, record)
    except CheckpointError as error:
        notes.findings.append(Finding("files", source.label, "the localized checkpoint", str(error), "readable"))
        return
    masks, damaged = open_masks(source, record)
    ranged = [TensorInfo(name, given.stored(name).dtype, shape, 0, 0) for name, shape in given.shapes.items()]
    if not _masks(record, masks, damaged, ranged, notes):
        notes.skip("values", "the mask cannot be used")
        return
    inputs, reasons = open_inputs(refs)
    if reasons:
        notes.skip("values", f"{' '.join(reasons)} Name them with --base REF and --ft REF...")
        return
    sample = _sample(given.shapes, tensors)
    try:
        for entry in record.inputs:
            notes.findings += check_hashes(entry, inputs[entry.name])
        opened = {name: fetch_tensors(checkpoint, sample) for name, checkpoint in inputs.items()}
    except LocstitchError as error:
        notes.skip("values", str(error))
        return
    base, finetuned = opened["base"], opened[given.name]
    graft = GraftReader(given, base, finetuned)
    check = ValueCheck(
        graft,
        base,
        base,
        {given.name: finetuned},
        masks,
        MergeSettings(1.0, _top_k(record, notes), _refitted(record, notes)),
    )
    with progress.bar("values", sum(given.stored(name).nbytes for name in sample)) as advance, one_torch_thread():
        for name in sample:
            notes.findings += check.localized(name) if name in graft.checkpoint.tensors else _lacking(name, given)
            advance(given.stored(name).nbytes)
    notes.findings += check.kept_the_largest()
    notes.count(inputs=len(inputs), tensors=len(sample), of_tensors=len(given.shapes), coordinates=check.coordinates)


def _lacking(name: str, localized: LocalizedCheckpoint) -> Iterator[Finding]:
    yield Finding(
        "values", name, f"the tensor of {localized.finetuned.ref}", "absent", str(list(localized.shapes[name]))
    )


def _weights(source: Source, notes: Notes) -> Checkpoint | None:
    """The merged model's headers."""
    try:
        return read_checkpoint(source)
    except RequestError as error:
        notes.findings.append(Finding("files", source.label, "the model", f"unreadable ({error})", "readable"))
        return None


def _recipe(source: Source, record: Manifest, notes: Notes) -> Recipe | None:
    if RECIPE_FILE not in source.files:
        return None  # already a finding
    try:
        recipe = make_recipe(load_recipe(source.fetch(RECIPE_FILE)), where=RECIPE_FILE)
    except RequestError as error:
        notes.findings.append(Finding("recipe", RECIPE_FILE, "the recipe", f"unreadable ({error})", "readable"))
        return None
    notes.findings += check_recipe(recipe, record)
    return recipe


def _masks(
    record: Manifest,
    masks: Mapping[str, MaskFile],
    damaged: Sequence[Finding],
    ranged: Sequence[TensorInfo],
    notes: Notes,
) -> bool:
    """Whether the masks, over the tensors `ranged`, can be used to recompute values; wrong counts are findings only."""
    unfit = [*damaged, *check_tensors(masks, ranged)]
    notes.findings += unfit
    if unfit:
        return False
    try:
        counts = tally(masks, {info.name: info.shape for info in ranged})
    except DamagedMask as error:
        notes.findings.append(mask_finding(error))
        return False
    notes.findings += check_counts(record, counts)
    if record.method == METHOD:
        notes.findings += check_shares(record, counts, ranged)
    notes.count(masks=len(masks), mask_elements=sum(info.numel for info in ranged))
    return True


def _values(merge: Merge, refs: Sequence[InputRef], tensors: Tensors, progress: Progress, notes: Notes) -> None:
    inputs, reasons = open_inputs(refs)
    if reasons:
        notes.skip("values", f"{' '.join(reasons)} Name them with --base REF and --ft REF...")
        return
    try:
        vocabulary = _vocabulary(merge, inputs, notes)
    except LocstitchError as error:
        notes.skip("values", str(error))
        return
    base, rest = inputs["base"], inputs[merge.rest]
    if vocabulary is not None:
        base = rest = vocabulary.alignment.layout()
    layout = list(check_layout(merge.weights, base, rest, merge.localized, merge.recipe.dtype))
    notes.findings += layout
    sound = merge.weights.tensors.keys() - {finding.where for finding in layout}
    ours = _sample(sound & merge.localized, tensors)
    others = _sample(sound - merge.localized, tensors if tensors == "all" else OTHERS)
    matched = [name for name in vocabulary.matrices if name in sound] if vocabulary is not None else []
    others = [*(name for name in others if name not in matched), *(name for name in matched if name not in ours)]
    try:
        for entry in merge.record.inputs:
            notes.findings += check_hashes(entry, inputs[entry.name])
        check, own = _value_check(merge, inputs, vocabulary, [*ours, *others], notes)
    except LocstitchError as error:
        notes.skip("values", str(error))
        return
    sizes = {name: merge.weights.info(name).nbytes for name in [*ours, *others]}
    with progress.bar("values", sum(sizes.values())) as advance, one_torch_thread():
        for name, size in sizes.items():
            if vocabulary is not None and name in matched and name not in merge.localized:
                notes.findings += check_rows(name, check.merged, vocabulary.alignment, own)
                check.coordinates += merge.weights.info(name).numel
            else:
                notes.findings += check.localized(name) if name in merge.localized else check.other(name)
            advance(size)
    notes.findings += check.kept_the_largest()
    _solved(merge, inputs, tensors, notes)
    notes.count(
        inputs=len(inputs), tensors=len(sizes), of_tensors=len(merge.weights.tensors), coordinates=check.coordinates
    )


def _solved(merge: Merge, inputs: Mapping[str, Checkpoint], tensors: Tensors, notes: Notes) -> None:
    """Solve for a few values of a refit without data once more."""
    from hf_locstitch.inspection.verification.solved import Solved  # slow to import

    stitch = merge.record.stitch or {}
    if not is_without_data(stitch):
        return
    finetuned = [inputs[name] for name in recorded_order(merge.record)]
    solved = Solved(merge.weights, inputs["base"], finetuned, merge.masks, stitch, merge.recipe.scale)
    try:
        notes.findings += solved.check(sorted(merge.localized), GROUPS if tensors != "all" else ALL_GROUPS)
    except LocstitchError as error:
        notes.skip("values that were solved for", str(error))


def _vocabulary(merge: Merge, inputs: Mapping[str, Checkpoint], notes: Notes) -> VocabularyPlan | None:
    """Where rows come from, planned once more from the inputs' tokenizers; to be what the manifest records."""
    stitched = {entry.name for entry in merge.recipe.localized if entry.mask is None}  # which bring no tokens
    finetuned = {name: checkpoint for name, checkpoint in inputs.items() if name not in ("base", *stitched)}
    if not finetuned:
        return None
    chosen = sorted(merge.localized) if merge.recipe.localized else chosen_tensors(merge.recipe, inputs["base"])
    order = [name for name in recorded_order(merge.record) if name in finetuned]
    vocabulary, _ = plan_vocabulary(merge.recipe, inputs["base"], finetuned, chosen, order)
    due = vocabulary.as_json() if vocabulary is not None else None
    if due != merge.record.vocabulary:
        notes.findings.append(Finding("recipe", FILE, "vocabulary", str(merge.record.vocabulary), str(due)))
    return vocabulary


def _value_check(
    merge: Merge,
    inputs: Mapping[str, Checkpoint],
    vocabulary: VocabularyPlan | None,
    tensors: Sequence[str],
    notes: Notes,
) -> tuple[ValueCheck, Mapping[str, CheckpointReader]]:
    """With the files open (fetched if need be) that hold the tensors; also the inputs as their files have them."""
    alignment = vocabulary.alignment if vocabulary is not None else None
    under = {name for by in alignment.matrices.values() for name in by.values()} if alignment else ()
    own = {name: fetch_tensors(checkpoint, [*tensors, *under]) for name, checkpoint in inputs.items()}
    opened = alignment.readers(own) if alignment and vocabulary and vocabulary.localized else own
    check = ValueCheck(
        fetch_tensors(merge.weights, tensors),
        opened["base"],
        opened[merge.rest],
        {name: opened[name] for name in recorded_order(merge.record)},
        merge.masks,
        MergeSettings(merge.recipe.scale, _top_k(merge.record, notes), _refitted(merge.record, notes)),
    )
    return check, own


def _top_k(record: Manifest, notes: Notes) -> Literal["model", "tensor", ""]:
    """The scope in which a mask keeps the largest entries; "" if it was not found by magnitude."""
    if record.localizer is not None and record.localizer.get("method") == "magnitude":
        return "tensor" if record.localizer.get("scope") == "tensor" else "model"
    notes.skip("top k", "the search for these masks was not by magnitude alone and is not repeated")
    return ""


def _refitted(record: Manifest, notes: Notes) -> frozenset[str]:
    """Tensors whose values under the masks were fitted and are not the mean."""
    names = frozenset((record.stitch or {}).get("refitted", ()))
    if names:
        repeated = "repeated in a few rows only" if is_without_data(record.stitch) else "not repeated"
        notes.skip(
            f"values under the masks of {len(names)} refitted tensors",
            f"the fit is {repeated}; run the recipe again to compare them",
        )
    return names


def is_without_data(stitch: Mapping[str, Any] | None) -> bool:
    """Whether values were solved for from the task vectors alone. stitch: as recorded."""
    return stitch is not None and "low_rank" in stitch and "lambda" not in stitch


def _sample(names: Collection[str], count: Tensors) -> list[str]:
    """The same names every time, sorted."""
    ordered = sorted(names)
    return ordered if count == "all" or count >= len(ordered) else sorted(Random(SEED).sample(ordered, count))
