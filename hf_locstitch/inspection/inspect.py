"""`inspect`: what a merge or localized checkpoints record of themselves: densities, overlaps, layout, anomalies."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, Literal

from hf_locstitch.artifacts.fit import unlike
from hf_locstitch.artifacts.localized_checkpoint import LocalizedCheckpoint, read_localized
from hf_locstitch.artifacts.manifest import FILE, Manifest, MaskRecord, check_names, open_manifest, told
from hf_locstitch.artifacts.mask_file import MaskFile
from hf_locstitch.artifacts.overlap import pair_record
from hf_locstitch.checkpoints.checkpoint import open_source
from hf_locstitch.checkpoints.ref import parse_ref
from hf_locstitch.checkpoints.source import Source
from hf_locstitch.errors import CheckpointError, LocstitchError, MismatchError, OutputError, RecipeError
from hf_locstitch.inspection.verification.inputs import fetch_tensors, input_refs, open_inputs
from hf_locstitch.inspection.verification.masks import tally
from hf_locstitch.report.figures.survey import Survey, draw_masks, noted_task_vectors, survey
from hf_locstitch.report.figures.task_vectors import TaskVectors
from hf_locstitch.runtime import html
from hf_locstitch.runtime.escape import line
from hf_locstitch.runtime.every import every
from hf_locstitch.runtime.files import is_writable
from hf_locstitch.runtime.shares import exact_share

FAR = 3.0  # times the median norm of the other task vectors
CONCENTRATED = 0.5  # share of a mask's ones that lie in one tensor ...
CROWDED = 3.0  # ... and how many times larger it is than the tensor's share of the elements
ALIKE = 0.9  # Jaccard index
DISTANT = 0.5  # norm of a task vector over that of the base: finetuning changes far less
TIED = 0.25  # share of a mask that ties at the threshold may decide
FULL = 0.99  # of the elements asked for: below, a mask is smaller than rounding in each tensor makes it
ALL = "all finetunes"  # whose a joint mask is
LARGEST = 3  # tensors listed for each mask


@dataclass(frozen=True)
class MaskView:
    """One finetune's mask. density: requested, None where masks are rounded. densest: the tensors with the largest
    shares of its ones, and those shares.

    norm, relative_norm (to the base's), unchanged, threshold: of its task vector over the localized tensors,
    estimated from a sample; None if there is no sample.
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

    signs: anomalies, one sentence each. figures: paths of the figures that were drawn.
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
        """For people, one line each."""
        lines = [*self._head(), *(f"  {_describe_mask(mask)}" for mask in self.masks)]
        for mask in self.masks:
            lines.append(f"  {mask.name}: largest shares of its ones in {_densest(mask)}")
        lines += self._rest()
        return "\n".join(map(line, [*lines, *([] if self.signs else ["no anomalies"])]))

    def mask_table(self) -> list[list[str]]:
        """A row for each mask. What is known of its task vector is estimated, where there is a sample."""
        head = ["mask", "of", "largest shares in", "ones", "density", "requested"]
        head += ["‖τ‖", "of ‖θ‖", "unchanged", "smallest |τ| kept"]
        return [head, *(_row(mask) for mask in self.masks)]

    def _repr_html_(self) -> str:
        """For notebooks: what `describe` says, and the figures that were drawn."""
        rest = [*self._rest(), *([] if self.signs else ["anomaly    none"])]
        above, below = (html.summary("\n".join(map(line, lines))) for lines in (self._head(), rest))
        pictures = [html.picture(Path(one), Path(one).stem) for one in self.figures if one.endswith(".png")]
        return html.page(above, html.table(self.mask_table(), keys=3), below, *pictures)

    def _head(self) -> list[str]:
        lines = [f"{self.kind:<9}  {self.ref}"]
        if self.kind == "merge":
            lines.append(f"method     {self.method}, scale {self.scale:g}")
        if not self.masks:
            lines.append("masks      none: this method merges whole models")
        else:
            settings = ", ".join(f"{key} {value}" for key, value in (self.localizer or {}).items())
            each = "" if self.k is None else f", k = {self.k:,}"
            lines += [
                f"localizer  {settings or 'not the same for all masks'}",
                f"masks      N = {self.N:,} elements{each}",
            ]
        return lines

    def _rest(self) -> list[str]:
        """What follows what is said of each mask."""
        lines = [
            f"overlap    {' and '.join(pair['masks'])}: {pair['both']:,}, Jaccard {pair['jaccard']:.3f}"
            for pair in self.overlap
        ]
        if self.covered_by:
            shares = [f"{100 * count / max(self.N, 1):.2f} % by {masks}" for masks, count in enumerate(self.covered_by)]
            lines.append(f"covered    {', '.join(shares)} masks")
        lines += [f"note       {warning}" for warning in self.warnings]
        lines += [f"anomaly    {sign}" for sign in self.signs]
        return lines + [f"figure     {figure}" for figure in self.figures]


def _densest(mask: MaskView) -> str:
    return ", ".join(f"{tensor} {100 * share:.1f} %" for tensor, share in mask.densest)


def _row(mask: MaskView) -> list[str]:
    """Of the table of masks."""
    numbers = {
        "{:.4g} %": mask.density and 100 * mask.density,
        "{:.4g}": mask.norm,
        "{:.2g} %": mask.relative_norm and 100 * mask.relative_norm,
        "{:.1f} %": mask.unchanged and 100 * mask.unchanged,
        "{:.3g}": mask.threshold,
    }
    shown = ["–" if value is None else form.format(value) for form, value in numbers.items()]
    return [mask.name, mask.ref, _densest(mask), f"{mask.ones:,}", f"{100 * mask.real_density:.4g} %", *shown]


def _describe_mask(mask: MaskView) -> str:
    asked = "" if mask.density is None else f" (requested {100 * mask.density:.4g} %)"
    text = f"{mask.name}: {mask.ones:,} ones, density {100 * mask.real_density:.4g} %{asked}"
    if mask.norm is None or mask.relative_norm is None or mask.unchanged is None:
        return text
    text += f", ‖τ‖ about {mask.norm:.4g} ({100 * mask.relative_norm:.2g} % of the base's norm)"
    text += f", {100 * mask.unchanged:.1f} % of the weights unchanged"
    return text + ("" if mask.threshold is None else f", smallest |τ| kept about {mask.threshold:.3g}")


def inspect(
    ref: str | Path,
    *others: str | Path,
    figures: str | Path | None = None,
    base: str | Path | None = None,
    finetuned: Sequence[str | Path] | None = None,
    inputs: bool = False,
) -> Inspection:
    """Inspect a merge, or one or several localized checkpoints: folders, org/name or org/name@revision.

    Only small files are downloaded. others: further localized checkpoints of the same base, to compare with.
    figures: a folder for figures. inputs: also sample the inputs (downloaded if need be), as given by base and
    finetuned or else by the manifest; by default, the statistics recorded with the merge are used.
    Raises CheckpointError if `ref` is neither, MismatchError if several do not belong together, IntegrityError if a
    mask is damaged.
    """
    if figures is not None and not is_writable(Path(figures)):
        raise OutputError(f"{figures} is no folder that can be written to. Use another --figures.")
    source, record, masks, noted = _open(every([partial(_source, one) for one in (ref, *others)]))
    if inputs or base is not None or finetuned is not None:
        surveyed = _survey_inputs(record, masks, base, finetuned)
    else:
        surveyed = survey(masks)
        surveyed = Survey(surveyed.shapes, surveyed.ones, noted)
    drawn: list[str] = []
    if figures is not None and record.masks:
        folder = Path(figures)
        drawn = [str(folder / file) for file in draw_masks(record.overlap, surveyed, folder)]
    return summarize(source, record, surveyed, drawn)


def _source(ref: str | Path) -> Source:
    return open_source(parse_ref(str(ref)))


def _open(sources: Sequence[Source]) -> tuple[str, Manifest, dict[str, Path], Mapping[str, TaskVectors]]:
    """Their pinned refs, their manifest, their mask files by name, and the recorded statistics of the inputs."""
    records = [_open_checked(source) for source in sources]
    record, masks, noted = records[0], {}, {}
    if len(records) > 1:
        checkpoints = [_localized(source, record) for source, record in zip(sources, records, strict=True)]
        if problems := list(unlike(checkpoints)):
            raise MismatchError(problems)
    for source, entry in zip(sources, records, strict=True):
        if twice := masks.keys() & entry.masks.keys():
            raise RecipeError(
                f"two masks are named {min(twice)!r} (the second in {source.label}). Inspect these "
                "checkpoints separately."
            )
        masks |= {name: fetch_mask(source, name, mask) for name, mask in entry.masks.items()}
        noted |= noted_task_vectors(source)
    if len(records) > 1:
        record = _joined(records, masks)
    return ", ".join(source.pinned for source in sources), record, masks, noted


def _open_checked(source: Source) -> Manifest:
    record = open_manifest(source)
    try:
        check_names(record)
    except ValueError as error:
        raise CheckpointError(f"{source.label}/{FILE} contradicts itself ({error}). Fetch it again.") from error
    return told(record)


def _localized(source: Source, record: Manifest) -> LocalizedCheckpoint:
    if not record.is_localized:
        raise CheckpointError(
            f"{source.label} is a merged model; only localized checkpoints can be inspected together. Inspect it alone."
        )
    return read_localized(source, record)


def _joined(records: Sequence[Manifest], masks: Mapping[str, Path]) -> Manifest:
    """One manifest for several localized checkpoints, like that of a merge of them."""
    files = {name: MaskFile(path) for name, path in masks.items()}
    counts = tally(files, next(iter(files.values())).shapes)
    first, total = records[0], {name: sum(ones.values()) for name, ones in counts.ones.items()}
    overlap = [
        pair_record(first_name, second_name, both, total[first_name], total[second_name])
        for (first_name, second_name), both in counts.both.items()
    ]
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
        raise CheckpointError(
            f"{source.label} lacks {mask.file}, the mask of {name} that its manifest lists. Download it again."
        )
    return source.fetch(mask.file)


def _survey_inputs(
    record: Manifest, masks: Mapping[str, Path], base: str | Path | None, finetuned: Sequence[str | Path] | None
) -> Survey:
    named = None if finetuned is None else [str(one) for one in finetuned]
    opened, reasons = open_inputs(input_refs(record, None if base is None else str(base), named))
    if reasons:
        raise CheckpointError(f"{' '.join(reasons.values())} Name the inputs with --base REF and --ft REF...")
    tensors = survey(masks).shapes
    readers = {name: fetch_tensors(checkpoint, tensors) for name, checkpoint in opened.items()}
    try:
        return survey(masks, readers["base"], {name: readers[name] for name in masks if name in readers})
    except LocstitchError:
        raise
    except (KeyError, RuntimeError, ValueError) as error:
        raise CheckpointError(
            f"the inputs are not those of this merge ({type(error).__name__}: {error}). "
            "Name the right ones with --base REF and --ft REF..."
        ) from error


def summarize(ref: str, record: Manifest, surveyed: Survey, figures: Sequence[str] = ()) -> Inspection:
    """The whole report, from the manifest and the masks."""
    refs = {entry.name: entry.ref for entry in record.inputs}
    layout = surveyed.layout if surveyed.ones else None
    share = layout.share if layout else {}
    return Inspection(
        ref=ref,
        kind="localized" if record.is_localized else "merge",
        method=record.method,
        localizer=record.localizer,
        scale=record.scale,
        N=record.N,
        k=record.k,
        masks=tuple(_view(name, refs.get(name, ALL), mask, surveyed) for name, mask in record.masks.items()),
        overlap=record.overlap,
        covered_by=record.covered_by,
        layers={n: dict(zip(layout.layers, s.sum(axis=0).tolist(), strict=True)) for n, s in share.items()}
        if layout
        else {},
        kinds={n: dict(zip(layout.kinds, s.sum(axis=1).tolist(), strict=True)) for n, s in share.items()}
        if layout
        else {},
        signs=tuple(anomalies(record, surveyed)),
        warnings=tuple(record.warnings),
        figures=tuple(figures),
    )


def _view(name: str, ref: str, mask: MaskRecord, surveyed: Survey) -> MaskView:
    shares = _shares(surveyed.ones[name])
    densest = sorted(shares.items(), key=lambda item: -item[1])[:LARGEST]
    view = MaskView(name, ref, sum(surveyed.ones[name].values()), mask.density, mask.real_density, densest)
    vector = surveyed.vectors.get(name)
    if vector is None:
        return view
    relative = vector.norm / vector.base_norm if vector.base_norm else None
    return MaskView(**{**vars(view), "norm": vector.norm, "relative_norm": relative, "unchanged": vector.unchanged,
                       "threshold": vector.threshold})  # fmt: skip


def _shares(ones: Mapping[str, int]) -> dict[str, float]:
    total = sum(ones.values()) or 1
    return {tensor: count / total for tensor, count in ones.items()}


def anomalies(record: Manifest, surveyed: Survey) -> Iterator[str]:
    """What people should check before they trust the merge."""
    elements = {tensor: math.prod(shape) for tensor, shape in surveyed.shapes.items()}
    total = sum(elements.values()) or 1
    for name, ones in surveyed.ones.items():
        for tensor, share in _shares(ones).items():
            own = elements[tensor] / total
            if share > CONCENTRATED and share > CROWDED * own:
                yield (
                    f"{100 * share:.0f} % of the ones in the mask of {name} lie in {tensor}, "
                    f"which has only {100 * own:.1f} % of the elements"
                )
    for pair in record.overlap:
        if pair["jaccard"] > ALIKE:
            yield f"the masks of {' and '.join(pair['masks'])} are nearly identical (Jaccard {pair['jaccard']:.3f})"
    yield from _anomalous_vectors(record, surveyed.vectors)


def _anomalous_vectors(record: Manifest, vectors: Mapping[str, TaskVectors]) -> Iterator[str]:
    for name, vector in vectors.items():
        others = [other.norm for key, other in vectors.items() if key != name]
        middle = median(others) if others else 0.0
        if middle and not 1 / FAR <= vector.norm / middle <= FAR:
            yield (
                f"the task vector of {name} has norm {vector.norm:.3g}, the others about {middle:.3g}: "
                "where masks overlap, the larger one dominates"
            )
        if vector.base_norm and vector.norm > DISTANT * vector.base_norm:
            yield (
                f"the norm of the task vector of {name} is {100 * vector.norm / vector.base_norm:.0f} % of the base's: "
                "it may have been finetuned from another model"
            )
        mask = record.masks.get(name)
        if mask is not None and mask.density is not None and mask.ones < FULL * exact_share(mask.density, record.N):
            yield (
                f"{name} changed {100 * mask.real_density:.2g} % of the weights, less than the "
                f"{100 * mask.density:.2g} % requested: its mask keeps only those"
            )
        if mask is not None and vector.tied > TIED * mask.real_density:
            yield (
                f"{100 * vector.tied:.3g} % of the weights of {name} changed by exactly {vector.threshold:.3g}, the "
                f"smallest change that its mask of {100 * mask.real_density:.2g} % keeps: among these ties the choice "
                "is arbitrary"
            )
