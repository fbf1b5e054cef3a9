"""Where masks lie and how much they share, counted from localized checkpoints."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import combinations
from typing import Any

from hf_locstitch import LocalizedCheckpoint
from hf_locstitch.artifacts.overlap import jaccard
from hf_locstitch.report.figures.mask_layout import count_layout, layer_and_kind

GROUPS = ("attention", "MLP", "norms", "biases")  # of linear layers; a norm's bias counts as the norm's


def overlaps(opened: Mapping[str, LocalizedCheckpoint]) -> list[dict[str, Any]]:
    """Of every two masks the Jaccard index, and what it would be by chance: with their ones anywhere, and with as many
    ones in each tensor as they have."""
    positions = {name: {tensor: one.positions(tensor) for tensor in one.shapes} for name, one in opened.items()}
    return [
        {
            "masks": [a, b],
            "jaccard": _jaccard(opened[a], opened[b], _both(positions[a], positions[b])),
            "anywhere": _jaccard(opened[a], opened[b], opened[a].ones * opened[b].ones / opened[a].N),
            "within tensors": _jaccard(opened[a], opened[b], _expected(opened[a].shapes, positions[a], positions[b])),
        }
        for a, b in combinations(opened, 2)
    ]


def _jaccard(a: LocalizedCheckpoint, b: LocalizedCheckpoint, both: float) -> float:
    return jaccard(both, a.ones, b.ones)  # pyright: ignore[reportArgumentType]


def _both(a: Mapping[str, Any], b: Mapping[str, Any]) -> int:
    import numpy as np

    return sum(len(np.intersect1d(a[tensor], b[tensor], assume_unique=True)) for tensor in a)


def _expected(shapes: Mapping[str, tuple[int, ...]], a: Mapping[str, Any], b: Mapping[str, Any]) -> float:
    return sum(len(a[tensor]) * len(b[tensor]) / math.prod(shape) for tensor, shape in shapes.items())


def group(tensor: str) -> str:
    """Which of GROUPS a tensor of a block belongs to."""
    kind = layer_and_kind(tensor)[1].lower()
    if "norm" in kind:
        return "norms"
    if kind.endswith(".bias"):
        return "biases"
    return "attention" if "att" in kind else "MLP"


def layout(opened: Mapping[str, LocalizedCheckpoint]) -> dict[str, dict[str, list[int]]]:
    """Group or layer -> its elements, and the ones of each mask in it."""
    first = next(iter(opened.values()))
    ones = {name: {tensor: len(one.positions(tensor)) for tensor in one.shapes} for name, one in opened.items()}
    counted = count_layout(first.shapes, ones)
    layers = {
        f"layer {name}": [int(counted.elements[:, at].sum()), *(int(c[:, at].sum()) for c in counted.ones.values())]
        for at, name in enumerate(counted.layers)
    }
    groups: dict[str, list[int]] = {}
    for tensor, shape in first.shapes.items():
        counts = [math.prod(shape), *(own[tensor] for own in ones.values())]
        before = groups.get(group(tensor), [0] * len(counts))
        groups[group(tensor)] = [a + b for a, b in zip(before, counts, strict=True)]
    return {"groups": groups, "layers": layers}
