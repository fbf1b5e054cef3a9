"""The page of masks: its data by hand, small whatever the model, and nothing of a stranger's that runs."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hf_locstitch.report.figures.explorer import LONGEST, MOST, TEMPLATE, explorer_data, write_explorer
from hf_locstitch.report.figures.mask_layout import MaskLayout, count_layout

NASTY = '</script><img src=x onerror=alert(1)>\x1b[2J\u202e"'
SHAPES = {"h.0.a.weight": (2, 5), "h.1.a.weight": (2, 2), "h.1.b.weight": (3,), "lm_head.weight": (2, 2)}


def data_of(layout: MaskLayout, overlap: Any = ()) -> dict[str, Any]:
    return json.loads(explorer_data(layout, overlap) or "")


def test_counts_and_overlaps() -> None:
    layout = count_layout(SHAPES, {"x": dict(zip(SHAPES, (1, 2, 3, 4), strict=True)), "y": dict.fromkeys(SHAPES, 1)})
    found = data_of(layout, [{"masks": ["x", "y"], "both": 4, "jaccard": 0.40001}])
    assert found == {
        "layers": ["0", "1", "–"],
        "kinds": ["a", "b", "lm_head"],
        "elements": [[10, 4, 0], [0, 3, 0], [0, 0, 4]],
        "masks": {"x": [[1, 2, 0], [0, 3, 0], [0, 0, 4]], "y": [[1, 1, 0], [0, 1, 0], [0, 0, 1]]},
        "overlap": [["x", "y", 4, 0.4]],
    }


@pytest.mark.parametrize(("masks", "layers"), [(3, 300), (16, 512)])
def test_layers_are_counted_together_until_the_page_is_small(tmp_path: Path, masks: int, layers: int) -> None:
    counts = np.arange(12 * layers).reshape(12, layers) + 100_000
    names = [*map(str, range(layers - 1)), "–"]
    layout = MaskLayout(names, [f"kind{i}" for i in range(12)], counts, {f"m{i}": counts - i for i in range(masks)})
    assert write_explorer(layout, [], tmp_path / "masks.html")
    assert (tmp_path / "masks.html").stat().st_size < 60_000
    found = data_of(layout)
    assert np.sum(found["elements"]) == counts.sum() and np.sum(found["masks"]["m2"]) == counts.sum() - 2 * counts.size
    assert found["layers"][0].startswith("0 to ") and found["layers"][-1] == "–"
    assert len(found["layers"]) == len(found["elements"][0]) < layers


def test_too_many_masks_make_no_page(tmp_path: Path) -> None:
    layout = count_layout(SHAPES, {f"mask number {i}": dict.fromkeys(SHAPES, 1) for i in range(2000)})
    assert not write_explorer(layout, [], tmp_path / "masks.html") and not (tmp_path / "masks.html").exists()


def test_names_of_strangers(tmp_path: Path) -> None:
    layout = count_layout({f"h.0.{NASTY}.weight": (2, 2)}, {NASTY: {f"h.0.{NASTY}.weight": 1}})
    assert write_explorer(layout, [], tmp_path / "masks.html")
    page = (tmp_path / "masks.html").read_text(encoding="utf-8")
    (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert NASTY[:20] in json.loads(data)["kinds"][0] and "<img" not in page
    assert "\x1b" not in page and "\u202e" not in page and page.count("</script>") == 2
    assert len(data_of(count_layout(SHAPES, {"n" * 500: dict.fromkeys(SHAPES, 1)}))["masks"].popitem()[0]) == LONGEST


def test_shortened_names_stay_apart() -> None:
    layout = count_layout(SHAPES, {"n" * 99 + end: dict.fromkeys(SHAPES, 1) for end in "ab"})
    assert len(data_of(layout)["masks"]) == 2


def test_the_page_needs_nothing_else() -> None:
    text = TEMPLATE.read_text(encoding="utf-8")
    assert len(text) + MOST < 60_000 and text.count("DATA") == 1
    assert not re.search(r"https?:|src=|href=|@import|innerHTML|fetch\(", text) and "default-src 'none'" in text
