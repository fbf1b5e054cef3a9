"""A merge by Localize-and-Stitch: its masks, and its values against its inputs."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from hf_locstitch.artifacts.manifest import FILE, Manifest
from hf_locstitch.artifacts.mask_file import MaskFile
from hf_locstitch.artifacts.summing_order import recorded_order
from hf_locstitch.checkpoints.checkpoint import Checkpoint
from hf_locstitch.checkpoints.reader import CheckpointReader
from hf_locstitch.checkpoints.source import Source
from hf_locstitch.errors import LocstitchError
from hf_locstitch.inspection.verification.fitted import Fit, refitted_names
from hf_locstitch.inspection.verification.grafts import GraftReader
from hf_locstitch.inspection.verification.inputs import InputRef, check_hashes, fetch_tensors
from hf_locstitch.inspection.verification.masks import check_masks, open_masks, top_k
from hf_locstitch.inspection.verification.parts import Parts, open_parts
from hf_locstitch.inspection.verification.planned_vocabulary import check_vocabulary, plan_again
from hf_locstitch.inspection.verification.report import Finding, Notes
from hf_locstitch.inspection.verification.rows import check_rows
from hf_locstitch.inspection.verification.sample import Tensors, sample
from hf_locstitch.inspection.verification.values import MergeSettings, ValueCheck, check_layout
from hf_locstitch.plan.checking import chosen_tensors
from hf_locstitch.plan.recipe import Recipe
from hf_locstitch.plan.vocabulary import VocabularyPlan
from hf_locstitch.runtime.human import some
from hf_locstitch.runtime.progress import Progress

OTHERS = 2  # non-localized tensors in a sample
NAME_THEM = "Name them with --base REF and --ft REF..."


@dataclass(frozen=True)
class Merge:
    """A merge whose recipe, headers and masks can be read. localized: names of tensors."""

    record: Manifest
    recipe: Recipe
    weights: Checkpoint
    localized: frozenset[str]
    masks: Mapping[str, MaskFile]

    @property
    def rest(self) -> str:
        """The name of the input that provides the tensors that are not localized."""
        return self.recipe.rest_from or "base"

    @property
    def order(self) -> tuple[str, ...]:
        """Finetunes as they were summed."""
        return recorded_order(self.record)


@dataclass(frozen=True)
class Opened:
    """The inputs of a merge, whose files are fetched when their tensors are read."""

    parts: Parts
    vocabulary: VocabularyPlan | None

    def own(self, tensors: Collection[str]) -> dict[str, CheckpointReader]:
        """The models as their files have them."""
        matrices = self.vocabulary.alignment.matrices.values() if self.vocabulary is not None else ()
        under = [name for by in matrices for name in by.values()]
        return {name: fetch_tensors(one, [*tensors, *under]) for name, one in self.parts.models.items()}

    def aligned(self, own: Mapping[str, CheckpointReader]) -> dict[str, CheckpointReader]:
        """The models as the method saw them. own: as their files have them."""
        if self.vocabulary is None or not self.vocabulary.localized:
            return dict(own)
        alignment = self.vocabulary.alignment
        return {**own, **alignment.readers({name: one for name, one in own.items() if name in alignment.sources})}


def read_merge(source: Source, record: Manifest, recipe: Recipe, weights: Checkpoint, notes: Notes) -> Merge | None:
    """Check the masks. None, with the reason noted, if values cannot be computed from them."""
    masks, damaged = open_masks(source, record)
    if recipe.localized and masks:  # the recipe does not say which tensors were localized
        chosen = [name for name in next(iter(masks.values())).shapes if name in weights.tensors]
    else:
        chosen = chosen_tensors(recipe, weights)
    if not check_masks(record, masks, damaged, [weights.info(name) for name in chosen], notes):
        notes.skip("values", "the masks cannot be used")
        return None
    merge = Merge(record, recipe, weights, frozenset(chosen), masks)
    inputs, due = sorted(entry.name for entry in record.inputs), sorted(["base", *masks])
    if inputs != due or merge.rest not in due:
        notes.findings.append(Finding("recipe", FILE, "the list of inputs", ", ".join(inputs), ", ".join(due)))
        notes.skip("values", "the inputs do not match the masks")
        return None
    return merge


def check_merge(merge: Merge, refs: Sequence[InputRef], tensors: Tensors, progress: Progress, notes: Notes) -> None:
    """Compare values of so many tensors with the inputs. Raises CheckpointError for an input that the user named."""
    parts = open_parts(merge.record, refs)
    if parts.missing:
        notes.skip("values", f"{parts.missing} {NAME_THEM}")
        return
    if merge.rest not in parts.models:  # a finetune that was read as a localized checkpoint
        notes.skip("values", f"{merge.rest}, which the other tensors are from, is not at hand. {NAME_THEM}")
        return
    try:
        opened = Opened(parts, _vocabulary(merge, parts, notes))
        notes.findings += _check_inputs(merge, parts)
        _values(merge, opened, tensors, progress, notes)
    except LocstitchError as error:
        notes.skip("values", str(error))


def _vocabulary(merge: Merge, parts: Parts, notes: Notes) -> VocabularyPlan | None:
    """Where rows come from, if that is not simply the base; to be what the manifest records."""
    stitched = {entry.name for entry in merge.recipe.localized if entry.mask is None}  # which bring no tokens
    finetuned = {name: parts.models[name] for name in merge.order if name in parts.models and name not in stitched}
    planned = plan_again(merge.recipe, parts.models["base"], finetuned, merge.localized)
    notes.findings += check_vocabulary(merge.record, planned)
    return planned


def _check_inputs(merge: Merge, parts: Parts) -> Iterator[Finding]:
    """They are what was merged: models and localized checkpoints by their hashes."""
    for entry in merge.record.inputs:
        if entry.name in parts.models:
            yield from check_hashes(entry, parts.models[entry.name])
    for name, one in parts.localized.items():
        yield from check_hashes(merge.record.localized[name], one.as_checkpoint())


def _values(merge: Merge, opened: Opened, tensors: Tensors, progress: Progress, notes: Notes) -> None:
    """Raises LocstitchError if an input cannot be read."""
    parts, vocabulary = opened.parts, opened.vocabulary
    base, rest = parts.models["base"], parts.models[merge.rest]
    if vocabulary is not None:
        base = rest = vocabulary.alignment.layout()
    layout = list(check_layout(merge.weights, base, rest, merge.localized, merge.recipe.dtype))
    notes.findings += layout
    sound = merge.weights.tensors.keys() - {finding.where for finding in layout}
    ours = sample(sound & merge.localized, tensors)
    others = sample(sound - merge.localized, tensors if tensors == "all" else OTHERS)
    matched = [name for name in vocabulary.matrices if name in sound] if vocabulary is not None else []
    others = [*(name for name in others if name not in matched), *(name for name in matched if name not in ours)]
    own = opened.own([*ours, *others])
    check = _value_check(merge, opened, own, [*ours, *others], notes)
    sizes = {name: merge.weights.info(name).nbytes for name in [*ours, *others]}
    with progress.bar("values", sum(sizes.values())) as advance, np.errstate(all="ignore"):
        for name, size in sizes.items():
            if vocabulary is not None and name in matched and name not in merge.localized:
                notes.findings += check_rows(name, check.merged, vocabulary.alignment, own)
                check.coordinates += merge.weights.info(name).numel
            elif name in merge.localized:
                notes.findings += _same_masks(name, merge, parts)
                notes.findings += check.localized(name)
            else:
                notes.findings += check.other(name)
            advance(size)
    notes.findings += check.kept_the_largest()
    notes.count(
        inputs=len(merge.record.inputs) - len(parts.unknown),
        tensors=len(sizes),
        of_tensors=len(merge.weights.tensors),
        coordinates=check.coordinates,
        partly=len(check.partly),
    )
    if check.settings.refitted:
        from hf_locstitch.inspection.verification.refits import check_refit  # slow to import

        fit = Fit(
            merged=lambda names: fetch_tensors(merge.weights, names),
            inputs=lambda names: opened.aligned(opened.own(names)),
            order=merge.order,
            masks=merge.masks,
            record=merge.record,
            scale=merge.recipe.scale,
        )
        check_refit(fit, sound & merge.localized, tensors, progress, notes)


def _value_check(
    merge: Merge, opened: Opened, own: Mapping[str, CheckpointReader], tensors: Collection[str], notes: Notes
) -> ValueCheck:
    """With the files open that hold the tensors. own: the inputs as their files have them."""
    parts, models = opened.parts, opened.aligned(own)
    grafts = {name: GraftReader(one, models["base"]) for name, one in parts.localized.items()}
    values = {**models, **grafts}
    scope = top_k(merge.record, notes)
    if scope and (absent := [name for name in merge.order if name not in models]):
        notes.skip("top k", f"{some(absent)} not at hand, and localized checkpoints hold only what their masks keep")
    for name, why in parts.unknown.items():
        notes.skip(
            f"values under the mask of {name}",
            f"they were solved for again in a localized checkpoint, which cannot be read: {why} Name the localized "
            "checkpoints with --ft REF...",
        )
    return ValueCheck(
        merged=fetch_tensors(merge.weights, tensors),
        base=models["base"],
        rest=models[merge.rest],
        finetuned={name: values[name] for name in merge.order if name not in parts.unknown},
        ranked={name: models[name] for name in merge.order if name in models},
        masks=merge.masks,
        settings=MergeSettings(
            scale=merge.recipe.scale,
            top_k=scope,
            refitted=frozenset() if parts.localized or parts.unknown else refitted_names(merge.record),
            unknown=parts.unknown.keys(),
        ),
    )


def _same_masks(tensor: str, merge: Merge, parts: Parts) -> Iterator[Finding]:
    """The masks are those of the localized checkpoints. Raises DamagedMask."""
    for name, one in parts.localized.items():
        mask = merge.masks[name]
        due = one.positions(tensor) if tensor in one.shapes else np.empty(0, np.int64)
        if not np.array_equal(found := mask.positions(tensor), due):
            only = len(np.setdiff1d(found, due))
            where = f"ones of {tensor} that {one.label} does not have"
            yield Finding("masks", mask.label, where, only, f"0, and the same {len(due):,} ones")
