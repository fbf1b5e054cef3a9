"""The figures' data by hand, and what a merge leaves in figures/."""

from __future__ import annotations

import csv
import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.models import finetune, load, random_state, save

from hf_locstitch import Magnitude, load_mask, merge_from_hub
from hf_locstitch.report.figures import draw
from hf_locstitch.report.figures.mask_layout import OUTSIDE, count_layout, layer_and_kind, write_layout
from hf_locstitch.report.figures.survey import jaccard_matrix
from hf_locstitch.report.figures.task_vectors import (
    Sample,
    by_octave,
    kept_among,
    read_task_vectors,
    sample_places,
    sampled_values,
    summarize,
)
from hf_locstitch.runtime.dtypes import DTYPE, Values


@pytest.mark.parametrize(
    ("tensor", "layer", "kind"),
    [
        ("model.layers.3.self_attn.q_proj.weight", "3", "self_attn.q_proj"),
        ("model.layers.10.self_attn.q_proj.bias", "10", "self_attn.q_proj.bias"),
        ("transformer.h.0.attn.c_attn.weight", "0", "attn.c_attn"),
        ("model.layers.1.mlp.experts.17.w1.weight", "1", "mlp.experts.*.w1"),
        ("encoder.block.2.layer.0.SelfAttention.q.weight", "2", "encoder.layer.*.SelfAttention.q"),
        ("decoder.block.2.layer.0.SelfAttention.q.weight", "2", "decoder.layer.*.SelfAttention.q"),
        ("lm_head.weight", OUTSIDE, "lm_head"),
    ],
)
def test_layer_and_kind(tensor: str, layer: str, kind: str) -> None:
    assert layer_and_kind(tensor) == (layer, kind)


def test_places(tmp_path: Path) -> None:
    shapes = {
        "lm_head.weight": (2, 5), "h.2.a.weight": (2, 2), "h.10.a.weight": (2, 2), "h.10.b.0.weight": (3,),
        "h.10.b.1.weight": (3,),
    }  # fmt: skip
    ones = {"one": dict(zip(shapes, (1, 2, 3, 1, 3), strict=True)), "none": dict.fromkeys(shapes, 0)}
    places = count_layout(shapes, ones)
    assert places.layers == ["2", "10", OUTSIDE] and places.kinds == ["a", "b.*", "lm_head"]
    assert places.elements.sum() == 24 and places.ones["one"][0].tolist() == [2, 3, 0]
    assert places.share["one"].sum() == pytest.approx(1) and places.share["none"].sum() == 0
    write_layout(places, tmp_path / "places.csv")
    rows = list(csv.DictReader((tmp_path / "places.csv").open()))
    assert rows[0] == {
        "mask": "one",
        "layer": "2",
        "kind": "a",
        "elements": "4",
        "ones": "2",
        "share_of_mask": "0.2",
        "density": "0.5",
    }
    assert sum(int(row["ones"]) for row in rows) == 10 and all(row["elements"] != "0" for row in rows)


def test_jaccard_matrix() -> None:
    overlap = [{"masks": ["a", "c"], "both": 1, "jaccard": 0.25}, {"masks": ["b", "c"], "both": 2, "jaccard": 0.5}]
    assert jaccard_matrix(["a", "b", "c"], overlap).tolist() == [[1, 0, 0.25], [0, 1, 0.5], [0.25, 0.5, 1]]


def test_sampled_places_lie_in_the_tensor() -> None:
    assert sample_places(0) == [] and sample_places(7) == [(0, 7)]
    places = sample_places(1000, per_tensor=40, pieces=4)
    assert places[0] == (0, 10) and places[-1] == (990, 10) and sum(count for _, count in places) == 40
    assert all(after[0] >= before[0] + before[1] for before, after in pairwise(places))


def test_which_of_a_sample_a_mask_keeps() -> None:
    parts = [np.array([0, 3]), np.array([11, 12]), np.array([], dtype=np.int64), np.array([25])]
    kept, ones = kept_among(parts, [(2, 3), (10, 2), (25, 2)])
    assert kept.tolist() == [False, True, False, False, True, True, False] and ones == 5


def test_a_summary_weighs_samples() -> None:
    """Two of ten entries are seen of the one tensor, all four of the other."""
    seen = Sample(10, np.float32([0, 2]), np.float32([1, 1]), np.array([False, True]))
    whole = Sample(4, np.float32([1, 1, 1, 3]), np.float32([2, 0, 0, 0]), np.array([False, False, False, True]))
    found = summarize([seen, whole])
    assert found.unchanged == pytest.approx(5 / 14) and sum(found.shares) + found.unchanged == pytest.approx(1)
    assert found.norm == pytest.approx((5 * 4 + 3 + 9) ** 0.5) and found.base_norm == pytest.approx((10 + 4) ** 0.5)
    assert found.threshold == 2.0 and found.sampled == 6 and found.tied == pytest.approx(5 / 14)
    assert found.edges == [1, 2, 4] and found.shares == pytest.approx([3 / 14, 6 / 14])


def test_odd_samples() -> None:
    nothing = summarize([Sample(3, np.float32([0, 0, 0]), np.float32([1, 1, 1]), np.array([True, False, False]))])
    assert nothing.unchanged == 1 and nothing.norm == 0 and nothing.threshold == 0
    broken = summarize([Sample(2, np.float32([np.nan, 1]), np.float32([1, 1]), np.array([True, True]))])
    assert broken.norm == 1 and broken.sampled == 1


def test_octaves() -> None:
    values, weights = np.array([1e-3, 0.25, 1.0, np.nextafter(1.0, 0)]), np.array([1.0, 2.0, 4.0, 8.0])
    edges, counts = by_octave(values, weights)
    assert edges.tolist() == [2.0**power for power in range(-10, 2)]
    assert counts.tolist() == [1, 0, 0, 0, 0, 0, 0, 0, 2, 8, 4]
    assert counts.tolist() == np.histogram(values, edges, weights=weights)[0].tolist()


class InMemory:
    def __init__(self, **tensors: Values) -> None:
        self.tensors = tensors

    def values(self, name: str, first: int, count: int) -> Values:
        return self.tensors[name][first : first + count]


def test_sampled_values() -> None:
    base, moved = InMemory(w=np.arange(6, dtype=DTYPE["BF16"])), InMemory(w=np.arange(6.0)[::-1])
    size, start = sampled_values(moved, base, "w", [(0, 2), (5, 1)])
    assert size.tolist() == [5, 3, 5] and start.tolist() == [0, 1, 5]


def test_a_merge_leaves_its_figures(tmp_path: Path) -> None:
    base = random_state(0)
    folders = [save(tmp_path / "base", base)]
    folders += [save(tmp_path / name, finetune(base, seed)) for seed, name in enumerate(("maths", "code"), start=1)]
    for out in ("one", "two"):
        merge_from_hub(folders[0], folders[1:], out=tmp_path / out, localizer=Magnitude(density=0.3))
    figures = tmp_path / "one" / "figures"
    stems = {"overlap", "places", "layers", "task-vectors"}
    pictures = {f"{stem}.{kind}" for stem in stems for kind in ("png", "svg")}
    data = {"overlap.csv", "places.csv", "task-vectors.json"}
    assert {path.name for path in figures.iterdir()} == {*pictures, *data, "masks.html"}
    for path in figures.iterdir():  # the same merge gives the same bytes
        assert path.read_bytes() == (tmp_path / "two" / "figures" / path.name).read_bytes(), path.name
    assert (figures / "places.png").read_bytes().startswith(b"\x89PNG") and "<svg" in (
        figures / "places.svg"
    ).read_text()

    record = json.loads((tmp_path / "one" / "locstitch.json").read_text())
    assert {f"figures/{name}" for name in pictures} < record["outputs"].keys()
    card = (tmp_path / "one" / "README.md").read_text()
    assert all(f"figures/{stem}.png" in card for stem in stems) and "(figures/masks.html)" in card

    states = {folder.name: load(folder) for folder in folders}
    rows = list(csv.DictReader((figures / "places.csv").open()))
    for name, found in read_task_vectors(figures / "task-vectors.json").items():
        mask = load_mask(tmp_path / "one", name)
        vector = {t: (states[name][t] - states["base"][t]).abs() for t in mask}
        kept = torch.cat([vector[t][mask[t]] for t in mask])
        assert found.threshold == pytest.approx(float(kept.min())) and found.unchanged == 0
        assert found.norm == pytest.approx(sum(float((v**2).sum()) for v in vector.values()) ** 0.5, rel=1e-5)
        assert sum(int(row["ones"]) for row in rows if row["mask"] == name) == len(kept)


def test_figures_can_be_left_out(tmp_path: Path) -> None:
    base = random_state(0)
    folders = [save(tmp_path / "base", base), save(tmp_path / "ft", finetune(base, 1))]
    merge_from_hub(folders[0], folders[1:], out=tmp_path / "without", figures=False)
    merge_from_hub(folders[0], folders[1:], out=tmp_path / "dense", method="average", localizer=None)  # type: ignore[arg-type]
    for out in ("without", "dense"):
        assert (
            not (tmp_path / out / "figures").exists() and "figures/" not in (tmp_path / out / "README.md").read_text()
        )


def test_pictures_take_any_number_of_masks(tmp_path: Path) -> None:
    """One to sixteen masks, one to forty layers, settings of the caller's that would spoil them."""
    import matplotlib

    shapes = {f"model.layers.{layer}.mlp.up_proj.weight": (4, 4) for layer in range(40)}
    sizes = []
    with matplotlib.rc_context({"axes.facecolor": "red", "text.usetex": True, "font.size": 30}):
        for count in (1, 3, 16):
            ones = {f"task-{i}": {tensor: i for tensor in shapes} for i in range(count)}
            paths = draw.save(draw.draw_mask_layout(count_layout(shapes, ones)), tmp_path / f"places-{count}")
            names = list(ones)
            paths += draw.save(draw.draw_overlap(names, np.eye(count)), tmp_path / f"overlap-{count}")
            sizes += [path.stat().st_size for path in paths]
    assert len(sizes) == 12 and min(sizes) > 1000


def contrast(one: str, other: str) -> float:
    """As WCAG 2 defines it, of two colours as #rrggbb."""

    def luminance(colour: str) -> float:
        parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))

    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("ground", ["#ffffff", "#0b0f19"])
def test_figures_are_legible_on_light_and_dark_pages(ground: str, tmp_path: Path) -> None:
    assert contrast(draw.INK, ground) > 4.2 and all(contrast(colour, ground) > 3 for colour in draw.COLOURS)
    shapes = {f"h.{layer}.a.weight": (2, 2) for layer in range(3)}
    layout = count_layout(shapes, {"one": dict.fromkeys(shapes, 1), "other": dict.fromkeys(shapes, 2)})
    drawn = {"layers": draw.draw_layers(layout), "places": draw.draw_mask_layout(layout)}
    for name, figure in {**drawn, "overlap": draw.draw_overlap(["one", "other"], np.eye(2))}.items():
        png, svg = draw.save(figure, tmp_path / name)
        from matplotlib.image import imread

        assert imread(png)[0, 0, 3] == 0 and "fill: #ffffff" not in svg.read_text()[:2000]
