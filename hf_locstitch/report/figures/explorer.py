"""The masks as one HTML page to explore: by layer and kind of module, with the overlaps. No network, no libraries."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hf_locstitch.report.figures.mask_layout import OUTSIDE, MaskLayout
from hf_locstitch.runtime.escape import line
from hf_locstitch.runtime.files import write_text

FILE = "masks.html"
TEMPLATE = Path(__file__).parents[1] / "templates" / FILE
MOST = 48_000  # characters of data; with the page itself below 60 kB
LONGEST = 60  # characters of a name


def write_explorer(layout: MaskLayout, overlap: Sequence[Mapping[str, Any]], path: Path) -> bool:
    """overlap: as in the manifest. Returns whether it was written: it is not where there are too many masks."""
    data = explorer_data(layout, overlap)
    if data is not None:
        page = TEMPLATE.read_text(encoding="utf-8").replace("DATA", data)
        write_text(path, page)
    return data is not None


def explorer_data(layout: MaskLayout, overlap: Sequence[Mapping[str, Any]]) -> str | None:
    """JSON that no name can break out of: counts of each cell, of as many layers at a time as fit; else None."""
    together = 1
    while len(data := _as_json(layout, overlap, together)) > MOST:
        if together >= len(layout.layers):
            return None
        together *= 2
    return data


def _as_json(layout: MaskLayout, overlap: Sequence[Mapping[str, Any]], together: int) -> str:
    inside = sum(layer != OUTSIDE for layer in layout.layers)
    firsts = [*range(0, inside, together), *range(inside, len(layout.layers))]
    ends = [*firsts[1:], len(layout.layers)]
    layers = [
        layout.layers[first] if end - first == 1 else f"{layout.layers[first]} to {layout.layers[end - 1]}"
        for first, end in zip(firsts, ends, strict=True)
    ]

    def cells(counts: npt.NDArray[np.int64]) -> list[list[int]]:
        return np.add.reduceat(counts, firsts, axis=1).tolist() if firsts else []

    names = dict(zip(layout.ones, _distinct(list(layout.ones)), strict=True))
    pairs = [pair for pair in overlap if names.keys() >= set(pair["masks"])]
    content = {
        "layers": list(map(_short, layers)),
        "kinds": list(map(_short, layout.kinds)),
        "elements": cells(layout.elements),
        "masks": {names[name]: cells(ones) for name, ones in layout.ones.items()},
        "overlap": [[*(names[one] for one in p["masks"]), p["both"], round(p["jaccard"], 4)] for p in pairs],
    }
    return json.dumps(content, ensure_ascii=True, separators=(",", ":")).replace("<", "\\u003c")


def _short(name: str) -> str:
    plain = line(name)
    return plain if len(plain) <= LONGEST else f"{plain[: LONGEST - 1]}…"


def _distinct(names: Sequence[str]) -> list[str]:
    """Shortened, and still as many."""
    short = list(map(_short, names))
    return short if len(set(short)) == len(names) else [f"{n + 1}: {name}" for n, name in enumerate(short)]
