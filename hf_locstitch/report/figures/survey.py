"""The figures of a merge: from its masks and its inputs into figures/."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_locstitch.plan.plans import Plan, StitchPlan
from hf_locstitch.report.figures.explorer import FILE as EXPLORER
from hf_locstitch.report.figures.explorer import write_explorer
from hf_locstitch.report.figures.mask_layout import MaskLayout, count_layout, write_layout
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
from hf_locstitch.runtime.escape import cell

if TYPE_CHECKING:
    from hf_locstitch.checkpoints.reader import CheckpointReader
    from hf_locstitch.checkpoints.source import Source

FOLDER = "figures"
OVERLAP, LAYOUT, LAYERS, VECTORS = "overlap", "places", "layers", "task-vectors"


@dataclass(frozen=True)
class Survey:
    """Counts from masks. ones: mask -> tensor -> ones. vectors: of each finetune whose weights were available."""

    shapes: Mapping[str, tuple[int, ...]]
    ones: Mapping[str, Mapping[str, int]]
    vectors: Mapping[str, TaskVectors]

    @cached_property
    def layout(self) -> MaskLayout:
        return count_layout(self.shapes, self.ones)


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
    """Survey the masks in stage/masks; None without masks, or if no figures are requested.

    Task vectors are sampled where the inputs are on this machine: inputs that were only streamed are not read again.
    For localized checkpoints, their recorded samples are used.
    """
    if not plan.masked or not plan.recipe.figures:
        return None
    files = {plan.mask_file(name): name for name in reversed(plan.finetuned)}
    if len(files) < len(plan.finetuned):
        return survey({Path(file).stem: stage / file for file in files})  # a joint mask is of no one task vector
    masks = {name: stage / file for file, name in reversed(files.items())}
    if isinstance(plan, StitchPlan):
        parts = {**plan.localized_inputs, **plan.merged_inputs}
        noted = {name: noted_task_vectors(parts[name].source).get(parts[name].name) for name in masks}
        surveyed = survey(masks)
        return Survey(surveyed.shapes, surveyed.ones, {name: one for name, one in noted.items() if one is not None})
    readers = inputs_at_hand(plan)
    return survey(masks, readers["base"], readers) if readers else survey(masks)


def noted_task_vectors(source: Source) -> Mapping[str, TaskVectors]:
    """The task vectors that a merge or localized checkpoint recorded; empty if there are none."""
    file = f"{FOLDER}/{FILE}"
    try:
        return read_task_vectors(source.fetch(file)) if file in source.files else {}
    except ValueError:
        return {}


def inputs_at_hand(plan: Plan) -> dict[str, Reader]:
    """Readers of all inputs; empty if any would have to be downloaded, or computed once more."""
    from hf_locstitch.checkpoints.mapped import MappedCheckpoint

    if plan.adapters:
        return {}
    readers: dict[str, CheckpointReader] = {}
    for name, checkpoint in (plan.aligned.own if plan.aligned else plan.inputs).items():
        paths = {shard.file: checkpoint.source.cached(shard.file) for shard in checkpoint.shards}
        local = {file: path for file, path in paths.items() if path is not None}
        if len(local) < len(paths):
            return {}
        readers[name] = MappedCheckpoint(checkpoint, local)
    return {**plan.aligned.readers(readers)} if plan.aligned else {**readers}


def jaccard_matrix(names: Sequence[str], overlap: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """[masks, masks], 1 on the diagonal. overlap: as in the manifest."""
    matrix = np.eye(len(names))
    for pair in overlap:
        i, j = (names.index(name) for name in pair["masks"])
        matrix[i, j] = matrix[j, i] = pair["jaccard"]
    return matrix


def draw_masks(overlap: Sequence[Mapping[str, Any]], surveyed: Survey, folder: Path) -> list[str]:
    """All figures of the masks, with their data. Returns the files to look at: PNGs, with an SVG each, and a page."""
    return [*draw_overlap(overlap, surveyed, folder), *draw_survey(surveyed, folder)]


def draw_overlap(overlap: Sequence[Mapping[str, Any]], surveyed: Survey, folder: Path) -> list[str]:
    """The page to explore, and the figure of how much masks overlap, where there are several; likewise. overlap: as in
    the manifest."""
    from hf_locstitch.report.figures import draw

    folder.mkdir(parents=True, exist_ok=True)
    files = [EXPLORER] if write_explorer(surveyed.layout, overlap, folder / EXPLORER) else []
    names = list(surveyed.ones)
    if len(names) < 2:
        return files
    jaccard = jaccard_matrix(names, overlap)
    _write_matrix(names, jaccard, folder / f"{OVERLAP}.csv")
    draw.save(draw.draw_overlap(names, jaccard), folder / OVERLAP)
    return [*files, f"{OVERLAP}.png"]


def draw_survey(surveyed: Survey, folder: Path) -> list[str]:
    """Those of where each mask lies, and of the task vectors, where they were sampled; likewise."""
    from hf_locstitch.report.figures import draw

    folder.mkdir(parents=True, exist_ok=True)
    layout = surveyed.layout
    write_layout(layout, folder / f"{LAYOUT}.csv")
    figures = {LAYOUT: draw.draw_mask_layout(layout)}
    if len(layout.layers) > 1:
        figures[LAYERS] = draw.draw_layers(layout)
    if surveyed.vectors:
        write_task_vectors(surveyed.vectors, folder / FILE)
        figures[VECTORS] = draw.draw_task_vectors(surveyed.vectors)
    for stem, figure in figures.items():
        draw.save(figure, folder / stem)
    return [f"{stem}.png" for stem in figures]


def _write_matrix(names: Sequence[str], matrix: np.ndarray, path: Path) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(["jaccard", *map(cell, names)])
        rows.writerows(
            [cell(name), *(f"{value:.6g}" for value in row)] for name, row in zip(names, matrix, strict=True)
        )
