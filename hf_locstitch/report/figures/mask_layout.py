"""Mask layout: the ones of each mask, counted by layer and kind of module."""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from hf_locstitch.checkpoints.localizable import BLOCKS
from hf_locstitch.runtime.escape import cell

OUTSIDE = "–"  # stands for the layer of tensors outside all layers
MOST_KINDS, MOST_LAYERS = 64, 512  # rows and columns that are told apart; a figure of more takes minutes and gigabytes
NUMBERS = re.compile(r"(^|\.)\d+(?=\.)")

Counts = Mapping[str, Mapping[str, int]]  # mask -> tensor -> ones


@dataclass(frozen=True)
class MaskLayout:
    """layers, kinds: names. elements: int64 [kinds, layers]. ones, share: the same for each mask."""

    layers: list[str]
    kinds: list[str]
    elements: npt.NDArray[np.int64]
    ones: Mapping[str, npt.NDArray[np.int64]]

    @property
    def share(self) -> dict[str, npt.NDArray[np.float64]]:
        return {name: ones / max(int(ones.sum()), 1) for name, ones in self.ones.items()}


def layer_and_kind(tensor: str) -> tuple[str, str]:
    """model.layers.3.self_attn.q_proj.weight -> ("3", "self_attn.q_proj"). Experts count as one kind."""
    block = BLOCKS.search(tensor)
    if block is None:
        return OUTSIDE, tensor.removesuffix(".weight")
    layer = block.group(0).strip(".").rsplit(".", 1)[-1]
    stack = next((part for part in ("encoder", "decoder") if part in tensor[: block.start()].split(".")), "")
    kind = NUMBERS.sub(r"\1*", tensor[block.end() :]).removesuffix(".weight")
    return layer, f"{stack}.{kind}" if stack else kind


def count_layout(shapes: Mapping[str, tuple[int, ...]], ones: Counts) -> MaskLayout:
    """shapes: of the localized tensors, in the model's order. Kinds keep that order; those outside layers come last."""
    at = _folded({tensor: layer_and_kind(tensor) for tensor in shapes}, shapes)
    used = dict.fromkeys(layer for layer, _ in at.values())
    layers = sorted(used, key=_layer_order)
    inside = [kind for layer, kind in at.values() if layer != OUTSIDE]
    kinds = list(dict.fromkeys([*inside, *(kind for _, kind in at.values())]))
    row, column = {k: i for i, k in enumerate(kinds)}, {n: i for i, n in enumerate(layers)}
    elements = np.zeros((len(kinds), len(layers)), dtype=np.int64)
    counted = {name: np.zeros_like(elements) for name in ones}
    for tensor, (layer, kind) in at.items():
        at_cell = row[kind], column[layer]
        elements[at_cell] += math.prod(shapes[tensor])
        for name, of_mask in ones.items():
            counted[name][at_cell] += of_mask[tensor]
    return MaskLayout(layers, kinds, elements, counted)


def _layer_order(layer: str) -> tuple[bool, int, str]:
    """Layers by number, however many digits it has, then the others."""
    digits = layer.lstrip("0")
    return not layer.isdecimal(), len(digits), digits


def _folded(at: Mapping[str, tuple[str, str]], shapes: Mapping[str, tuple[int, ...]]) -> Mapping[str, tuple[str, str]]:
    """The same with one kind in place of all but the largest, and one layer in place of all but the first, if need be.

    at: tensor -> its layer and kind.
    """
    sizes: dict[str, int] = {}
    for tensor, (_, kind) in at.items():
        sizes[kind] = sizes.get(kind, 0) + math.prod(shapes[tensor])
    kinds = sorted(sizes, key=lambda kind: -sizes[kind])
    layers = sorted({layer for layer, _ in at.values()}, key=_layer_order)
    if len(kinds) <= MOST_KINDS and len(layers) <= MOST_LAYERS:
        return at
    own_kind = _at_most(kinds, MOST_KINDS, "kinds")
    own_layer = _at_most(layers, MOST_LAYERS, "layers")
    return {tensor: (own_layer[layer], own_kind[kind]) for tensor, (layer, kind) in at.items()}


def _at_most(names: Sequence[str], most: int, called: str) -> dict[str, str]:
    """Each name, or what stands for all that are beyond the number."""
    if len(names) <= most:
        return {name: name for name in names}
    rest = f"{len(names) - most + 1} other {called}"
    return {name: name if i < most - 1 else rest for i, name in enumerate(names)}


def write_layout(layout: MaskLayout, path: Path) -> None:
    """One CSV row for each mask, layer and kind that has elements."""
    with path.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(["mask", "layer", "kind", "elements", "ones", "share_of_mask", "density"])
        for name, ones in layout.ones.items():
            total = max(int(ones.sum()), 1)
            for (r, c), elements in np.ndenumerate(layout.elements):
                if elements:
                    count = int(ones[r, c])
                    numbers = [count, f"{count / total:.6g}", f"{count / elements:.6g}"]
                    rows.writerow([cell(name), layout.layers[c], cell(layout.kinds[r]), int(elements), *numbers])
