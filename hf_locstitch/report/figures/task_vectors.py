"""Magnitudes of task vectors, estimated from a sample of every tensor, without reading the models a second time."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
from pydantic import TypeAdapter

from hf_locstitch.artifacts.mask_file import Positions
from hf_locstitch.runtime.dtypes import Values
from hf_locstitch.runtime.files import write_text

SAMPLE = 1 << 20  # values sampled from one model, about;
PER_TENSOR = 1 << 15  # of each tensor at most, in PIECES pieces
PIECES = 8
FILE = "task-vectors.json"


class Reader(Protocol):
    """Such as checkpoints.mapped.MappedCheckpoint."""

    def values(self, name: str, first: int, count: int) -> Values: ...


@dataclass(frozen=True)
class TaskVectors:
    """One finetune's task vector over the localized tensors, estimated from `sampled` of its entries.

    edges: of the bins of |task vector|, [bins + 1], powers of two. shares: of all entries, [bins]; with `unchanged`,
    the share that is exactly zero, they add up to 1. threshold: the smallest sampled |entry| that the mask keeps, None
    if it keeps none of the sample; tied: share of all entries that are just as large. norm, base_norm: of the whole
    task vector and of the base.
    """

    edges: list[float]
    shares: list[float]
    unchanged: float
    threshold: float | None
    tied: float
    norm: float
    base_norm: float
    sampled: int


def sampled_per_tensor(tensors: int) -> int:
    """Values to sample from each of so many tensors: memory does not grow with their number."""
    return max(PIECES, min(PER_TENSOR, SAMPLE // max(tensors, 1)))


def sample_places(numel: int, per_tensor: int = PER_TENSOR, pieces: int = PIECES) -> list[tuple[int, int]]:
    """(first, count) of the pieces of a tensor to sample, spread evenly; all of a small tensor."""
    if numel <= per_tensor:
        return [(0, numel)] if numel else []
    count = per_tensor // pieces
    return [(i * (numel - count) // (pieces - 1), count) for i in range(pieces)]


def sampled_values(
    reader: Reader, base: Reader, tensor: str, places: Sequence[tuple[int, int]]
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """|task vector| and base in these pieces of a tensor, float32 [sampled]."""
    start, moved = (
        np.concatenate([one.values(tensor, first, count).astype(np.float32) for first, count in places])
        for one in (base, reader)
    )
    return np.abs(moved - start), start


def kept_among(parts: Iterable[Positions], places: Sequence[tuple[int, int]]) -> tuple[npt.NDArray[np.bool_], int]:
    """Which of the sampled elements a mask keeps [sampled], and how many ones it has in total.

    parts: flat indices of its ones, ascending, a part at a time.
    """
    firsts = np.cumsum([0, *(count for _, count in places)])
    kept, ones = np.zeros(firsts[-1], dtype=bool), 0
    for positions in parts:
        ones += len(positions)
        for (first, count), start in zip(places, firsts, strict=False):
            begin, end = np.searchsorted(positions, [first, first + count])
            kept[start + positions[begin:end] - first] = True
    return kept, ones


@dataclass(frozen=True)
class Sample:
    """A sample of a tensor of `numel` elements. size: |task vector|; base: values; kept: by the mask; all [sampled]."""

    numel: int
    size: npt.NDArray[np.float32]
    base: npt.NDArray[np.float32]
    kept: npt.NDArray[np.bool_]


def summarize(samples: Iterable[Sample]) -> TaskVectors:
    """Every sampled entry stands for numel / sampled of its tensor's. Non-finite entries are left out."""
    sampled_tensors = [sample for sample in samples if len(sample.size)]
    weight = np.concatenate([np.full(len(s.size), s.numel / len(s.size)) for s in sampled_tensors])
    size = np.concatenate([s.size for s in sampled_tensors]).astype(np.float64)
    base = np.concatenate([s.base for s in sampled_tensors]).astype(np.float64)
    kept = np.concatenate([s.kept for s in sampled_tensors])
    fine = np.isfinite(size) & np.isfinite(base)
    weight, size, base, kept = weight[fine], size[fine], base[fine], kept[fine]
    moved = size > 0
    edges, counts = by_octave(size[moved], weight[moved])
    total = float(weight.sum()) or 1.0
    threshold = float(size[kept].min()) if kept.any() else None
    return TaskVectors(
        edges=edges.tolist(),
        shares=(counts / total).tolist(),
        unchanged=float(weight[~moved].sum()) / total,
        threshold=threshold,
        tied=float(weight[size == threshold].sum()) / total if threshold else 0.0,
        norm=math.sqrt(float((weight * size**2).sum())),
        base_norm=math.sqrt(float((weight * base**2).sum())),
        sampled=len(size),
    )


def by_octave(
    values: npt.NDArray[np.float64], weights: npt.NDArray[np.float64]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """A histogram of values (> 0). Bins end at powers of two, between which low-precision numbers are evenly spaced.

    Returns the edges [bins + 1] and the sum of the weights in each bin [bins].
    """
    if not len(values):
        return np.array([0.5, 1.0]), np.zeros(1)
    octave = np.frexp(values)[1]  # of 2^(octave − 1) ≤ value < 2^octave
    first, last = int(octave.min()), int(octave.max())
    edges = np.exp2(np.arange(first - 1, last + 1, dtype=np.float64))
    return edges, np.bincount(octave - first, weights, last - first + 1).astype(np.float64, copy=False)


def write_task_vectors(vectors: Mapping[str, TaskVectors], path: Path) -> None:
    content = {name: asdict(one) for name, one in vectors.items()}
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def read_task_vectors(path: Path) -> dict[str, TaskVectors]:
    """Raises ValueError or OSError if the file is invalid."""
    return TypeAdapter(dict[str, TaskVectors]).validate_json(path.read_bytes())
