"""What `make reproduce` measures, on a testbed too small to learn anything; its rule; and the page that it wrote."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import pytest
import reproduce
import vision
from reproduction.beds import open_vision
from reproduction.masks import group
from reproduction.measure import Seed
from reproduction.page import NUMBERS, write_page
from reproduction.record import Record
from reproduction.results import Results, SeedResult
from reproduction.rows import Grid, rows
from reproduction.verdict import Comparison, half_width, verdict

TINY = Grid(
    densities=(0.01, 0.05, 0.1), by_tensor=(0.1,), tuned=(0.1, 0.2), scales=(0.5,), ties_scales=(1.0,), counts=(),
    skills=1,
)  # fmt: skip


def test_a_seed_and_its_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vision, "COUNTS", dict.fromkeys(vision.COUNTS, 60))
    few = vision.Training(steps=2, learning_rate=1e-3, batch=8)
    how = vision.Making(hidden=16, layers=1, pretraining=few, finetuning=few)
    facts = {"testbed": "vision", "seed": 0}
    bed, lines = open_vision(tmp_path, 0, how, tuple(vision.TASKS)[:2]), []
    Seed(bed, TINY, tmp_path / "made", Record(tmp_path / "record.json", facts), lines.append).measure()
    measured = len(lines)
    again = Record(tmp_path / "record.json", facts)
    Seed(bed, TINY, tmp_path / "made", again, lines.append).measure()
    assert len(lines) == measured > 30  # all of it was known

    content = again.content
    assert content["skills"]["largest"]["same"] == {"removed": True, "added": True}
    assert {pair["jaccard"] <= 1 for pair in content["overlap"]["mask 1%"]} == {True}
    sizes = content["bytes"]["magnitude 10%"]["turned"]
    assert 0 < sizes["masks"] + sizes["values"] < sizes["finetuned"]
    elements = [counts[0] for counts in content["layout"]["magnitude 10%"]["groups"].values()]
    ones = [counts[1] for counts in content["layout"]["magnitude 10%"]["groups"].values()]
    assert sum(ones) == sum(elements) // 10

    write_page([content], tmp_path / "page.md", TINY)
    text = (tmp_path / "page.md").read_text(encoding="utf-8")
    assert text.count("\n## ") == 10 and "nan" not in text
    for name in text.split("](assets/reproduction/")[1:]:
        assert (tmp_path / "assets" / "reproduction" / name.split(")")[0]).stat().st_size > 0


def test_a_record_of_other_settings_is_begun_anew(tmp_path: Path) -> None:
    first = Record(tmp_path / "record.json", {"seed": 0})
    assert first.get("part", "name", lambda: 1) == 1
    assert Record(tmp_path / "record.json", {"seed": 0}).get("part", "name", lambda: 2) == 1
    assert Record(tmp_path / "record.json", {"seed": 1}).get("part", "name", lambda: 2) == 2


def test_the_rule() -> None:
    assert half_width([1.0, 2.0, 3.0]) == pytest.approx(4.302653 / 3**0.5, rel=1e-5)

    def of(*margins: Sequence[float]) -> Comparison:
        return Comparison("", {str(number): own for number, own in enumerate(margins)})

    yes, no, unclear = (0.3, 0.31, 0.29), (-0.3, -0.31, -0.29), (0.3, 0.01, -0.1)
    assert list(of(yes, no, unclear, [0.3]).outcomes.values()) == ["yes", "no", "open", "open"]
    assert verdict([of(yes, yes), of(yes)]) == "confirmed"
    assert verdict([of(yes, unclear), of(no)]) == "partly confirmed"
    assert verdict([of(unclear), of(no)]) == "not confirmed"


def test_shares_and_ratios() -> None:
    content = {
        "tasks": ["a", "b", "c"],
        "main": 2,
        "experts": {"test": {"a": 0.8, "b": 0.5, "c": 0.1}},
        "base": {"test": {"a": 0.4, "b": 0.25, "c": 0.1}},
        "chosen": {"2 tuned": "second"},
        "test": {"2 second": {"a": 0.4, "b": 0.5}},
        "layout": {"m": {"groups": {"norms": [10, 4, 2], "MLP": [90, 6, 8]}}},
    }
    seed = SeedResult(content)
    assert seed.mean("tuned") == 0.75 and seed.mean("base") == 0.5
    assert seed.density_ratio("m", "groups") == pytest.approx({"norms": 3.0, "MLP": 0.7 / 0.9})


def test_groups_of_tensors() -> None:
    found = {
        "encoder.layer.0.attention.output.LayerNorm.bias": "norms",
        "encoder.layer.0.attention.self.query.bias": "biases",
        "encoder.layer.0.attention.output.dense.weight": "attention",
        "encoder.layer.0.output.dense.weight": "MLP",
        "model.layers.0.self_attn.o_proj.weight": "attention",
        "model.layers.0.post_attention_layernorm.weight": "norms",
        "vit.layers.0.mlp.fc1.weight": "MLP",
    }
    assert {name: group(name) for name in found} == found


def test_rows_have_names_of_their_own() -> None:
    merges = [merge for merges in rows(Grid()).values() for merge in merges]
    by_name = {merge.name: merge for merge in merges}
    assert all(by_name[merge.name] == merge for merge in merges)


def test_testbeds_that_were_not_measured_keep_their_numbers(tmp_path: Path) -> None:
    def content(testbed: str, grid: Grid, **more: int) -> dict[str, object]:
        return {"facts": {"testbed": testbed, "grid": json.loads(json.dumps(asdict(grid)))}, **more}

    kept = tmp_path / "assets" / "reproduction" / NUMBERS
    kept.parent.mkdir(parents=True)
    kept.write_text(json.dumps([content("decoders", TINY), content("vision", TINY), content("vision", Grid())]))
    found = reproduce.with_others(
        [content("MiniLM", TINY), content("decoders", TINY, new=1)], tmp_path / "page.md", TINY
    )
    assert found == [content("MiniLM", TINY), content("decoders", TINY, new=1), content("vision", TINY)]


def test_the_page_is_made_of_its_numbers(tmp_path: Path) -> None:
    """Nothing on it was written by hand."""
    kept = reproduce.PAGE.parent / "assets" / "reproduction" / NUMBERS
    contents = json.loads(kept.read_text(encoding="utf-8"))
    assert all(len(seeds) >= 3 for seeds in Results.of(contents).testbeds.values())
    write_page(contents, tmp_path / "reproduction.md", Grid())
    assert (tmp_path / "reproduction.md").read_text(encoding="utf-8") == reproduce.PAGE.read_text(encoding="utf-8")
