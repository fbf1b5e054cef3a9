"""The masks of a merge, one tensor at a time: what they cover, counted again."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Literal

import numpy as np

from hf_locstitch.artifacts.manifest import Manifest, told
from hf_locstitch.artifacts.mask_file import DamagedMask, ForeignMask, MaskFile, Positions, Shapes
from hf_locstitch.artifacts.overlap import jaccard
from hf_locstitch.checkpoints.checkpoint import Checkpoint
from hf_locstitch.checkpoints.header import TensorInfo
from hf_locstitch.checkpoints.source import Source
from hf_locstitch.inspection.verification.report import Finding, Notes
from hf_locstitch.runtime.shares import exact_share

METHOD = "locstitch"  # the method whose values are recomputed
SPARSE = 256  # elements for each one; real masks have fewer


def mask_finding(error: DamagedMask | ForeignMask) -> Finding:
    return Finding("masks", error.file, "the file", error.fault, "a mask file of hf-locstitch")


def open_masks(source: Source, record: Manifest) -> tuple[dict[str, MaskFile], list[Finding]]:
    """The masks that can be read, and a finding for each that cannot."""
    masks: dict[str, MaskFile] = {}
    findings = []
    for name, entry in record.masks.items():
        if entry.file not in source.files:
            findings.append(Finding("masks", entry.file, "the file", "absent", "a mask file of hf-locstitch"))
            continue
        try:
            masks[name] = MaskFile(source.fetch(entry.file), entry.file)
        except (DamagedMask, ForeignMask) as error:
            findings.append(mask_finding(error))
    return masks, findings


def check_masks(
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
    for_people = told(record)
    joint = for_people is not record
    notes.count(masks=len(for_people.masks), joint=joint, mask_elements=sum(info.numel for info in ranged))
    return True


def check_foreign_masks(source: Source, record: Manifest, merged: Checkpoint, notes: Notes) -> None:
    """Masks of another method may cover other tensors: those of the first mask are expected in all."""
    if not record.masks:
        notes.skip("masks", "the manifest lists none")
        return
    masks, damaged = open_masks(source, record)
    shapes = next(iter(masks.values())).shapes if masks else {}
    ranged = [merged.info(name) for name in shapes if name in merged.tensors]
    check_masks(record, masks, damaged, ranged, notes)


def top_k(record: Manifest, notes: Notes) -> Literal["model", "tensor", ""]:
    """The scope in which a mask keeps the largest entries; "" if it was not found by magnitude."""
    if record.localizer is not None and record.localizer.get("method") == "magnitude":
        return "tensor" if record.localizer.get("scope") == "tensor" else "model"
    notes.skip("top k", "the search for these masks was not by magnitude alone and is not repeated")
    return ""


def check_tensors(masks: Mapping[str, MaskFile], localized: Sequence[TensorInfo]) -> Iterator[Finding]:
    """Each mask has exactly the localized tensors, in their shapes."""
    shapes = {info.name: info.shape for info in localized}
    for mask in masks.values():
        for tensor in sorted(shapes.keys() | mask.shapes.keys()):
            actual, expected = mask.shapes.get(tensor), shapes.get(tensor)
            if actual != expected:
                yield Finding("masks", mask.label, f"the shape of {tensor}", _shape(actual), _shape(expected))


def _shape(shape: tuple[int, ...] | None) -> str:
    return "absent" if shape is None else str(list(shape))


@dataclass(frozen=True)
class Tally:
    """ones: of each mask in each tensor. covered: coordinates in 0, 1, … masks [masks + 1]. both: of each pair."""

    ones: Mapping[str, Mapping[str, int]]
    covered: list[int]
    both: Mapping[tuple[str, str], int]


def tally(masks: Mapping[str, MaskFile], shapes: Shapes) -> Tally:
    """Count the ones of all masks, a tensor at a time. Raises DamagedMask."""
    ones: dict[str, dict[str, int]] = {name: {} for name in masks}
    both = dict.fromkeys(combinations(masks, 2), 0)
    covered = np.zeros(len(masks) + 1, dtype=np.int64)
    for tensor, shape in shapes.items():
        numel, (size, positions) = math.prod(shape), _renumbered(positions_of(masks, tensor), math.prod(shape))
        times = np.zeros(size, dtype=np.uint8)
        for i, (name, own) in enumerate(positions.items()):
            ones[name][tensor] = len(own)
            member = np.zeros(size, dtype=bool)
            member[own] = True
            times += member
            for other in list(positions)[i + 1 :]:
                both[name, other] += int(np.count_nonzero(member[positions[other]]))
        covered[1:] += [np.count_nonzero(times == count) for count in range(1, len(covered))]
        covered[0] += numel - np.count_nonzero(times)
    return Tally(ones, covered.tolist(), both)


def _renumbered(positions: dict[str, Positions], numel: int) -> tuple[int, dict[str, Positions]]:
    """The masks of one tensor as positions among `size` elements, of which few are in no mask.

    So what is allocated is in proportion to the ones, however many elements a file claims to have.
    """
    if SPARSE * sum(map(len, positions.values())) >= numel:
        return numel, positions
    used = np.unique(np.concatenate([np.empty(0, np.int64), *positions.values()]))
    return len(used), {name: np.searchsorted(used, own) for name, own in positions.items()}


def positions_of(masks: Mapping[str, MaskFile], tensor: str) -> dict[str, Positions]:
    """Of every mask, in one tensor. Raises DamagedMask."""
    return {name: mask.positions(tensor) for name, mask in masks.items()}


def check_counts(record: Manifest, counts: Tally) -> Iterator[Finding]:
    """Ones, coverage and overlaps are those of the manifest."""
    for name, entry in record.masks.items():
        ones = sum(counts.ones[name].values())
        if ones != entry.ones:
            yield Finding("masks", entry.file, "number of ones", ones, entry.ones)
    if counts.covered != record.covered_by:
        due = f"{record.covered_by} (covered_by in locstitch.json)"
        yield Finding("masks", "masks", "coordinates covered by 0, 1, … masks", str(counts.covered), due)
    listed = {tuple(entry["masks"]): entry for entry in record.overlap}
    for pair, both in counts.both.items():
        counted = both, jaccard(both, *(sum(counts.ones[name].values()) for name in pair))
        entry = listed.get(pair, {})
        if counted != (due := (entry.get("both"), entry.get("jaccard"))):
            where = " and ".join(f"masks/{name}" for name in pair)
            yield Finding("masks", where, "overlap (both, jaccard)", str(counted), f"{due} as in locstitch.json")


def check_shares(record: Manifest, counts: Tally, localized: Sequence[TensorInfo]) -> Iterator[Finding]:
    """N, k and densities of a merge by Localize-and-Stitch agree."""
    n = sum(info.numel for info in localized)
    if n != record.N:
        yield Finding("masks", "locstitch.json", "N", record.N, f"{n}, the number of elements in the localized tensors")
    localizer = dict(record.localizer or {})
    density = localizer.get("density")
    if density is not None and not _is_share(density):
        yield Finding("masks", "locstitch.json", "density of the localizer", str(density), "a number from 0 to 1")
        return
    for name, entry in record.masks.items():
        if entry.density != density and density is not None:
            yield Finding("masks", "locstitch.json", f"density of mask {name}", str(entry.density), str(density))
        if record.k is not None and entry.ones != record.k:
            yield Finding("masks", "locstitch.json", f"number of ones of mask {name}", entry.ones, f"k = {record.k}")
        real = entry.ones / n if n else 0.0
        if entry.real_density != real:
            yield Finding("masks", "locstitch.json", f"real density of mask {name}", str(entry.real_density), str(real))
    if density is not None:
        yield from _check_k(record, counts, localized, float(density), localizer.get("scope") == "tensor")


def _is_share(value: Any) -> bool:
    return isinstance(value, int | float) and 0 <= value <= 1


def _check_k(
    record: Manifest, counts: Tally, localized: Sequence[TensorInfo], density: float, per_tensor: bool
) -> Iterator[Finding]:
    shares = {info.name: exact_share(density, info.numel) for info in localized}
    k = sum(shares.values()) if per_tensor else exact_share(density, sum(info.numel for info in localized))
    if record.k not in (k, None):
        yield Finding("masks", "locstitch.json", f"k at density {density}", str(record.k), k)
    for mask in record.masks.values():
        if record.k is None and mask.ones > k:  # fewer are kept only where fewer weights changed
            yield Finding("masks", mask.file, "number of ones", mask.ones, f"at most k = {k}")
    for name, ones in counts.ones.items() if per_tensor else ():
        for tensor, share in shares.items():
            if ones[tensor] != share and (record.k is not None or ones[tensor] > share):
                yield Finding("masks", f"masks/{name}", f"number of ones in {tensor}", ones[tensor], share)
