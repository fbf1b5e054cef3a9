"""The figures of a merge: from its masks and its inputs into figures/."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_locstitch.plan.plans import Plan, StitchPlan
from hf_locstitch.report.figures.mask_layout import Places, count_places, write_places
from hf_locstitch.report.figures.task_vectors import (
    FILE,
    Reader,
    Sample,
    TaskVectors,
    kept_among,
    read_task_vectors,
    sample_places,
    sampled_per_tensor,
    sampled_values,
    summarize,
    write_task_vectors,
)

if TYPE_CHECKING:
    from hf_locstitch.artifacts.manifest import Manifest
    from hf_locstitch.checkpoints.source import Source

FOLDER = "figures"
OVERLAP, PLACES, VECTORS = "overlap", "places", "task-vectors"


@dataclass(frozen=True)
class Survey:
    """What masks say. ones: mask -> tensor -> ones. vectors: of each finetune, where the inputs were at hand."""

    shapes: Mapping[str, tuple[int, ...]]
    ones: Mapping[str, Mapping[str, int]]
    vectors: Mapping[str, TaskVectors]

    @property
    def places(self) -> Places:
        return count_places(self.shapes, self.ones)


def survey(
    masks: Mapping[str, Path], base: Reader | None = None, finetuned: Mapping[str, Reader] | None = None
) -> Survey:
    """Read the mask files once, and a sample of the inputs if given. Raises IntegrityError."""
    shapes: Mapping[str, tuple[int, ...]] = {}
    ones: dict[str, dict[str, int]] = {}
    vectors = {}
    for name, path in masks.items():
        reader = (finetuned or {}).get(name)
        shapes, ones[name], samples = _read_mask(path, base, reader)
        if samples:
            vectors[name] = summarize(samples)
    return Survey(shapes, ones, vectors)


def _read_mask(
    path: Path, base: Reader | None, finetuned: Reader | None
) -> tuple[Mapping[str, tuple[int, ...]], dict[str, int], list[Sample]]:
    from hf_locstitch.artifacts.mask_file import MaskFile

    mask, ones, samples = MaskFile(path), {}, []
    each = sampled_per_tensor(len(mask.shapes))
    for tensor, shape in mask.shapes.items():
        numel = math.prod(shape)
        places = sample_places(numel, each) if base is not None and finetuned is not None else []
        kept, ones[tensor] = kept_among(mask.iter_positions(tensor), places)
        if places and base is not None and finetuned is not None:
            size, start = sampled_values(finetuned, base, tensor, places)
            samples.append(Sample(numel, size, start, kept))
    return mask.shapes, ones, samples


def survey_merge(plan: Plan, stage: Path) -> Survey | None:
    """What the masks in stage/masks say; None if no figures are wanted, or there are no masks.

    Task vectors are looked at where the inputs are on this machine: those that were only streamed are not read again.
    Of localized checkpoints it is taken what these noted.
    """
    if not plan.masked or not plan.recipe.figures:
        return None
    masks = {name: stage / "masks" / f"{name}.safetensors" for name in plan.finetuned}
    if isinstance(plan, StitchPlan):
        noted = {name: noted_task_vectors(one.source).get(one.name) for name, one in plan.localized_inputs.items()}
        found = survey(masks)
        return Survey(found.shapes, found.ones, {name: one for name, one in noted.items() if one is not None})
    readers = _inputs_at_hand(plan)
    return survey(masks, readers["base"], readers) if readers else survey(masks)


def noted_task_vectors(source: Source) -> Mapping[str, TaskVectors]:
    """What a merge or a localized checkpoint noted of its inputs; nothing if it did not."""
    file = f"{FOLDER}/{FILE}"
    try:
        return read_task_vectors(source.fetch(file)) if file in source.files else {}
    except (ValueError, TypeError):
        return {}


def draw_merge(record: Manifest, found: Survey | None, stage: Path) -> list[str]:
    """The figures of a merge into stage/figures. Returns the pictures' stems; none without a survey."""
    return [] if found is None else draw_masks(record.overlap, found, stage / FOLDER)


def _inputs_at_hand(plan: Plan) -> dict[str, Reader]:
    """Readers of all inputs; none if any has to be fetched."""
    from hf_locstitch.checkpoints.mapped import MappedCheckpoint

    readers: dict[str, Reader] = {}
    for name, checkpoint in plan.inputs.items():
        paths = {shard.file: checkpoint.source.cached(shard.file) for shard in checkpoint.shards}
        found = {file: path for file, path in paths.items() if path is not None}
        if len(found) < len(paths):
            return {}
        readers[name] = MappedCheckpoint(checkpoint, found)
    return readers


def jaccard_matrix(names: Sequence[str], overlap: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """[masks, masks], 1 on the diagonal. overlap: as in the manifest."""
    matrix = np.eye(len(names))
    for pair in overlap:
        i, j = (names.index(name) for name in pair["masks"])
        matrix[i, j] = matrix[j, i] = pair["jaccard"]
    return matrix


def draw_masks(overlap: Sequence[Mapping[str, Any]], found: Survey, folder: Path) -> list[str]:
    """Every figure that masks have, as PNG and SVG, with its data. Returns the pictures' stems."""
    from hf_locstitch.report.figures import draw

    folder.mkdir(parents=True, exist_ok=True)
    names, places, stems = list(found.ones), found.places, []
    if len(names) > 1:
        jaccard = jaccard_matrix(names, overlap)
        _write_matrix(names, jaccard, folder / f"{OVERLAP}.csv")
        draw.save(draw.draw_overlap(names, jaccard), folder / OVERLAP)
        stems.append(OVERLAP)
    write_places(places, folder / f"{PLACES}.csv")
    draw.save(draw.draw_places(places), folder / PLACES)
    stems.append(PLACES)
    if found.vectors:
        write_task_vectors(found.vectors, folder / FILE)
        draw.save(draw.draw_task_vectors(found.vectors), folder / VECTORS)
        stems.append(VECTORS)
    return stems


def _write_matrix(names: Sequence[str], matrix: np.ndarray, path: Path) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(["jaccard", *names])
        rows.writerows([name, *(f"{value:.6g}" for value in row)] for name, row in zip(names, matrix, strict=True))
