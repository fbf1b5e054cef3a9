"""`inspect`: what a merge or localized checkpoints say of themselves: densities, overlaps, where the masks lie, and
what looks odd."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any, Literal

from hf_locstitch.artifacts.fit import unlike
from hf_locstitch.artifacts.localized_checkpoint import LocalizedCheckpoint, read_localized
from hf_locstitch.artifacts.manifest import Manifest, MaskRecord, open_manifest
from hf_locstitch.artifacts.mask_file import MaskFile
from hf_locstitch.artifacts.overlap import pair_record
from hf_locstitch.checkpoints.checkpoint import open_source
from hf_locstitch.checkpoints.ref import parse_ref
from hf_locstitch.checkpoints.source import Source
from hf_locstitch.errors import CheckpointError, LocstitchError, MismatchError, RecipeError
from hf_locstitch.inspection.verification.inputs import fetch_tensors, input_refs, open_inputs
from hf_locstitch.inspection.verification.masks import tally
from hf_locstitch.report.figures.survey import Survey, draw_masks, noted_task_vectors, survey
from hf_locstitch.report.figures.task_vectors import TaskVectors

FAR = 3.0  # times the median norm of the other task vectors
CONCENTRATED = 0.5  # share of a mask's ones in one tensor ...
CROWDED = 3.0  # ... that holds so many times fewer of the elements
ALIKE = 0.9  # Jaccard index
DISTANT = 0.5  # norm of a task vector over that of the base: finetuning moves far less
TIED = 0.25  # share of a mask that may hang on entries of one size
LARGEST = 3  # tensors named for each mask


@dataclass(frozen=True)
class MaskView:
    """One finetune's mask. density: asked for, None where masks are rounded. densest: tensors with the largest share of
    its ones, with that share.

    norm, relative_norm (to the base's), unchanged, threshold: of its task vector over the localized tensors,
    estimated from a sample; None if nobody sampled it.
    """

    name: str
    ref: str
    ones: int
    density: float | None
    real_density: float
    densest: list[tuple[str, float]]
    norm: float | None = None
    relative_norm: float | None = None
    unchanged: float | None = None
    threshold: float | None = None


@dataclass(frozen=True)
class Inspection:
    """layers: mask -> layer -> share of its ones; kinds: likewise by kind of module. covered_by: as in the manifest.

    signs: what looks odd, a sentence each. figures: paths of the pictures that were drawn.
    """

    ref: str
    kind: Literal["merge", "localized"]
    method: str
    localizer: Mapping[str, Any] | None
    scale: float
    N: int
    k: int | None
    masks: tuple[MaskView, ...]
    overlap: Sequence[Mapping[str, Any]]
    covered_by: Sequence[int]
    layers: Mapping[str, Mapping[str, float]]
    kinds: Mapping[str, Mapping[str, float]]
    signs: tuple[str, ...]
    warnings: tuple[str, ...]
    figures: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    def describe(self) -> str:
        """For a person, one line each."""
        lines = [f"{self.kind:<9}  {self.ref}"]
        if self.kind == "merge":
            lines.append(f"method     {self.method}, scale {self.scale:g}")
        if not self.masks:
            lines.append("masks      none: this method uses whole models")
        else:
            settings = ", ".join(f"{key} {value}" for key, value in (self.localizer or {}).items())
            each = "" if self.k is None else f", k = {self.k:,}"
            lines += [f"localizer  {settings or 'several'}", f"masks      N = {self.N:,} elements{each}"]
        lines += [f"  {_describe_mask(mask)}" for mask in self.masks]
        for mask in self.masks:
            densest = ", ".join(f"{tensor} {100 * share:.1f} %" for tensor, share in mask.densest)
            lines.append(f"  {mask.name} lies most in {densest}")
        for pair in self.overlap:
            lines.append(f"overlap    {' and '.join(pair['masks'])}: {pair['both']:,}, Jaccard {pair['jaccard']:.3f}")
        if self.covered_by:
            shares = [f"{times}: {100 * count / max(self.N, 1):.2f} %" for times, count in enumerate(self.covered_by)]
            lines.append(f"covered    by so many masks: {', '.join(shares)} of the elements")
        lines += [f"note       {warning}" for warning in self.warnings]
        lines += [f"odd        {sign}" for sign in self.signs]
        lines += [f"figure     {figure}" for figure in self.figures]
        return "\n".join([*lines, *([] if self.signs else ["odd        nothing"])])


def _describe_mask(mask: MaskView) -> str:
    asked = "" if mask.density is None else f" (asked {100 * mask.density:.4g} %)"
    text = f"{mask.name}: {mask.ones:,} ones, density {100 * mask.real_density:.4g} %{asked}"
    if mask.norm is None or mask.relative_norm is None or mask.unchanged is None:
        return text
    text += f", ‖τ‖ about {mask.norm:.4g} ({100 * mask.relative_norm:.2g} % of the base)"
    text += f", {100 * mask.unchanged:.1f} % of the weights unchanged"
    return text + ("" if mask.threshold is None else f", |τ| kept from {mask.threshold:.3g} on")


def inspect(
    ref: str | Path,
    *others: str | Path,
    figures: str | Path | None = None,
    base: str | Path | None = None,
    finetuned: Sequence[str | Path] | None = None,
    inputs: bool = False,
) -> Inspection:
    """Look at a merge, or at one or several localized checkpoints: folders, org/name or org/name@revision.

    Only small files are fetched. others: further localized checkpoints of the same base, to compare with.
    figures: a folder to draw into. inputs: also sample the inputs (fetched if need be), which the manifest names or
    base and finetuned say; without, what was noted of them is used.
    Raises CheckpointError if it is neither, MismatchError if several do not belong together, IntegrityError if a mask
    is damaged.
    """
    source, record, masks, noted = _open([open_source(parse_ref(str(one))) for one in (ref, *others)])
    if inputs or base is not None or finetuned is not None:
        found = _survey_inputs(record, masks, base, finetuned)
    else:
        found = survey(masks)
        found = Survey(found.shapes, found.ones, noted)
    drawn: list[str] = []
    if figures is not None and record.masks:
        folder = Path(figures)
        drawn = [str(folder / f"{stem}.png") for stem in draw_masks(record.overlap, found, folder)]
    return summarize(source, record, found, drawn)


def _open(sources: Sequence[Source]) -> tuple[str, Manifest, dict[str, Path], Mapping[str, TaskVectors]]:
    """What they are called, their record, their mask files by name, and what was noted of the inputs."""
    records = [open_manifest(source) for source in sources]
    record, masks, noted = records[0], {}, {}
    if len(records) > 1:
        given = [_localized(source, record) for source, record in zip(sources, records, strict=True)]
        if problems := list(unlike(given)):
            raise MismatchError(problems)
    for source, one in zip(sources, records, strict=True):
        if twice := masks.keys() & one.masks.keys():
            raise RecipeError(f"two of them are named {min(twice)!r}, {source.label} the second. Look at them apart.")
        masks |= {name: fetch_mask(source, name, mask) for name, mask in one.masks.items()}
        noted |= noted_task_vectors(source)
    if len(records) > 1:
        record = _joined(records, masks)
    return ", ".join(source.pinned for source in sources), record, masks, noted


def _localized(source: Source, record: Manifest) -> LocalizedCheckpoint:
    if not record.is_localized:
        raise CheckpointError(f"{source.label} is a merged model; only localized checkpoints are looked at together.")
    return read_localized(source, record)


def _joined(records: Sequence[Manifest], masks: Mapping[str, Path]) -> Manifest:
    """One record of several localized checkpoints, as a merge of them has it."""
    files = {name: MaskFile(path) for name, path in masks.items()}
    counts = tally(files, next(iter(files.values())).shapes)
    first, total = records[0], {name: sum(ones.values()) for name, ones in counts.ones.items()}
    overlap = [pair_record(one, other, both, total[one], total[other]) for (one, other), both in counts.both.items()]
    return replace(
        first,
        localizer=first.localizer if all(record.localizer == first.localizer for record in records) else None,
        k=first.k if all(record.k == first.k for record in records) else None,
        inputs=[first.inputs[0], *(entry for record in records for entry in record.inputs if entry.role != "base")],
        masks={name: mask for record in records for name, mask in record.masks.items()},
        covered_by=counts.covered,
        overlap=overlap,
        warnings=[warning for record in records for warning in record.warnings],
    )


def fetch_mask(source: Source, name: str, mask: MaskRecord) -> Path:
    """Raises CheckpointError if it is absent."""
    if mask.file not in source.files:
        raise CheckpointError(f"{source.label} lacks {mask.file}, the mask of {name} that its manifest lists.")
    return source.fetch(mask.file)


def _survey_inputs(
    record: Manifest, masks: Mapping[str, Path], base: str | Path | None, finetuned: Sequence[str | Path] | None
) -> Survey:
    named = None if finetuned is None else [str(one) for one in finetuned]
    opened, reasons = open_inputs(input_refs(record, None if base is None else str(base), named))
    if reasons:
        raise CheckpointError(f"{'; '.join(reasons)} --base REF and --ft REF... say where the inputs are.")
    tensors = survey(masks).shapes
    readers = {name: fetch_tensors(checkpoint, tensors) for name, checkpoint in opened.items()}
    try:
        return survey(masks, readers["base"], {name: readers[name] for name in masks})
    except LocstitchError:
        raise
    except (KeyError, RuntimeError, ValueError) as error:
        raise CheckpointError(
            f"the inputs are not those of this merge ({type(error).__name__}: {error}). Name the right ones."
        ) from error


def summarize(ref: str, record: Manifest, found: Survey, figures: Sequence[str] = ()) -> Inspection:
    """Everything that is said, from the manifest and the masks."""
    refs = {entry.name: entry.ref for entry in record.inputs}
    places = found.places if found.ones else None
    share = places.share if places else {}
    return Inspection(
        ref=ref,
        kind="localized" if record.is_localized else "merge",
        method=record.method,
        localizer=record.localizer,
        scale=record.scale,
        N=record.N,
        k=record.k,
        masks=tuple(_view(name, refs[name], mask, found) for name, mask in record.masks.items()),
        overlap=record.overlap,
        covered_by=record.covered_by,
        layers={n: dict(zip(places.layers, s.sum(axis=0).tolist(), strict=True)) for n, s in share.items()}
        if places
        else {},
        kinds={n: dict(zip(places.kinds, s.sum(axis=1).tolist(), strict=True)) for n, s in share.items()}
        if places
        else {},
        signs=tuple(odd_signs(record, found)),
        warnings=tuple(record.warnings),
        figures=tuple(figures),
    )


def _view(name: str, ref: str, mask: MaskRecord, found: Survey) -> MaskView:
    shares = _shares(found.ones[name])
    densest = sorted(shares.items(), key=lambda item: -item[1])[:LARGEST]
    view = MaskView(name, ref, sum(found.ones[name].values()), mask.density, mask.real_density, densest)
    one = found.vectors.get(name)
    if one is None:
        return view
    relative = one.norm / one.base_norm if one.base_norm else None
    return MaskView(**{**vars(view), "norm": one.norm, "relative_norm": relative, "unchanged": one.unchanged,
                       "threshold": one.threshold})  # fmt: skip


def _shares(ones: Mapping[str, int]) -> dict[str, float]:
    total = sum(ones.values()) or 1
    return {tensor: count / total for tensor, count in ones.items()}


def odd_signs(record: Manifest, found: Survey) -> Iterator[str]:
    """What a person should look at before trusting the merge."""
    elements = {tensor: math.prod(shape) for tensor, shape in found.shapes.items()}
    total = sum(elements.values()) or 1
    for name, ones in found.ones.items():
        for tensor, share in _shares(ones).items():
            own = elements[tensor] / total
            if share > CONCENTRATED and share > CROWDED * own:
                yield (
                    f"the mask of {name} lies to {100 * share:.0f} % in {tensor}, "
                    f"which has {100 * own:.1f} % of the elements"
                )
    for pair in record.overlap:
        if pair["jaccard"] > ALIKE:
            yield f"the masks of {' and '.join(pair['masks'])} are nearly the same (Jaccard {pair['jaccard']:.3f})"
    yield from _odd_vectors(record, found.vectors)


def _odd_vectors(record: Manifest, vectors: Mapping[str, TaskVectors]) -> Iterator[str]:
    for name, one in vectors.items():
        others = [other.norm for key, other in vectors.items() if key != name]
        middle = median(others) if others else 0.0
        if middle and not 1 / FAR <= one.norm / middle <= FAR:
            yield (
                f"the task vector of {name} has the norm {one.norm:.3g}, the others about {middle:.3g}: "
                "the larger one rules where masks overlap"
            )
        if one.base_norm and one.norm > DISTANT * one.base_norm:
            yield (
                f"the task vector of {name} is {100 * one.norm / one.base_norm:.0f} % as long as the base: "
                "perhaps it was finetuned from another model"
            )
        mask = record.masks.get(name)
        if mask is not None and 1 - one.unchanged < mask.real_density:
            yield (
                f"{name} changes {100 * (1 - one.unchanged):.2g} % of the weights, fewer than the "
                f"{100 * mask.real_density:.2g} % that its mask keeps: the rest of it is unchanged weights"
            )
        if mask is not None and one.tied > TIED * mask.real_density:
            yield (
                f"{100 * one.tied:.3g} % of the weights of {name} moved by just {one.threshold:.3g}, the least that "
                f"its mask of {100 * mask.real_density:.2g} % keeps: which of them it keeps is arbitrary (ties)"
            )
