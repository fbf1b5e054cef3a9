"""Names, licences and configs of strangers in cards, tables, figures and on the terminal."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers.models import finetune, save
from helpers.runs import quick_merge

from hf_locstitch import inspect, verify
from hf_locstitch.cli.main import main
from hf_locstitch.report.figures.mask_layout import MOST_KINDS, MOST_LAYERS, count_layout
from hf_locstitch.report.page import has_part, page, with_part
from hf_locstitch.runtime.parsing import front_matter

NASTY = "\n# Owned <img src=x> [a](http://evil) $x_{$ \x1b[2J\u202e|=1+1"
SHAPES = {f"model.layers.{layer}.{name}.weight": (4, 3) for layer in (0, 1) for name in ("=a$b_{$", f"q{NASTY}")}


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    generator = torch.Generator().manual_seed(0)
    base = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    base[f"other{NASTY}"] = torch.ones(2)
    for number, name in enumerate(("base", "a", "b")):
        state = finetune(base, number) if number else base
        if number:
            state[f"other{NASTY}"] = torch.ones(3)
        save(tmp_path / name, state)
        head = yaml.safe_dump({"license": "other", "license_name": f"{name}{NASTY}", "pipeline_tag": NASTY})
        (tmp_path / name / "README.md").write_text(f"---\n{head}---\n# Title\n", encoding="utf-8")
    return tmp_path


def harmless(text: str) -> bool:
    return (
        "\x1b" not in text and "\u202e" not in text and not any(line.startswith("# Owned") for line in text.split("\n"))
    )


def test_a_merge_of_nasty_names(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["merge", "--base", "base", "--ft", "a", "b", "--density", "0.5", "--out", "out"]
    assert main(command) == 0
    shown = capsys.readouterr()
    card = (folders / "out" / "README.md").read_text(encoding="utf-8")
    body = card.split("---\n", 2)[2]
    for text in (body, shown.err, shown.out):
        assert harmless(text)
    assert "<img src=x" not in body and "http://evil" not in body and "[a](http" not in body
    assert yaml.safe_load(front_matter(card))["pipeline_tag"] == NASTY
    record = json.loads((folders / "out" / "locstitch.json").read_text())
    assert not any("could not" in warning for warning in record["warnings"])
    kinds = {row["kind"] for row in csv.DictReader((folders / "out" / "figures" / "places.csv").open())}
    assert any(kind.startswith("'=a") for kind in kinds) and len(kinds) == 2
    assert (folders / "out" / "figures" / "places.svg").exists()
    assert harmless(inspect("out").describe()) and harmless(verify("out").describe())


def test_errors_of_nasty_names(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["merge", "--base", "base", "--ft", "a", "--include", "*", "--out", "out"]) == 2
    error = capsys.readouterr().err
    assert "Owned" in error and harmless(error)


@pytest.mark.parametrize("architectures", [{"a": 1}, 5, "ForCausalLM", [], [None], [["x"]], [{}], None])
def test_odd_architectures(tmp_path: Path, architectures: Any) -> None:
    base = {"model.layers.0.w": torch.ones(4, 4)}
    save(tmp_path / "base", base, config=json.dumps({"architectures": architectures, "text_config": "x"}))
    save(tmp_path / "ft", finetune(base, 1), config="{}")
    result = quick_merge(tmp_path / "base", [tmp_path / "ft"], out=tmp_path / "out")
    named = "AutoModelForCausalLM" if architectures == "ForCausalLM" else "AutoModel"
    assert f"{named}.from_pretrained" in (tmp_path / "out" / "README.md").read_text()
    assert not result.manifest.warnings


@pytest.mark.parametrize("broken", ["draw_survey", "draw_overlap", "write_card", "survey_merge"])
def test_what_cannot_be_drawn_is_said(
    folders: Path, broken: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no ink\nleft")

    monkeypatch.setattr(f"hf_locstitch.engine.run.{broken}", fail)
    assert main(["merge", "--base", "base", "--ft", "a", "b", "--out", "out", "--quiet"]) == 0
    record = json.loads((folders / "out" / "locstitch.json").read_text())
    assert [warning for warning in record["warnings"] if "RuntimeError: no ink left" in warning]
    assert "no ink left" in capsys.readouterr().err
    assert (folders / "out" / "README.md").exists() == (broken != "write_card")
    assert verify("out").ok


def test_a_template_escapes_what_is_not_marked() -> None:
    assert page("# {{ a }}\n{{ a | safe }} {{ a | python }}").render(a="<b>") == '# &lt;b&gt;\n<b> "<b>"'


def test_marks_of_parts_in_names_are_none() -> None:
    """A folder of that name stands in a card as code, before the part itself."""
    start, part = "Made from `./a <!-- evaluation -->`", "<!-- evaluation -->\n<!-- /evaluation -->"
    assert with_part(f"{start}.\n\n{part}\n", "evaluation", "Scores").startswith(f"{start}.\n\n<!--")
    assert not has_part(f"{start} and `./b <!-- /evaluation -->`.\n", "evaluation")


def test_many_kinds_and_layers_are_folded() -> None:
    shapes = {f"model.layers.{i}.kind{i}.weight": (i + 1, 2) for i in range(2500)}
    layout = count_layout({**shapes, "model.layers." + "9" * 5000 + ".x": (1,)}, {"m": {**shapes_to_ones(shapes)}})
    assert len(layout.kinds) == MOST_KINDS and len(layout.layers) == MOST_LAYERS
    assert f"{2501 - MOST_KINDS + 1} other kinds" in layout.kinds and layout.layers[:3] == ["0", "1", "2"]
    assert layout.elements.sum() == sum(2 * (i + 1) for i in range(2500)) + 1
    assert layout.ones["m"].sum() == 2500


def shapes_to_ones(shapes: dict[str, tuple[int, int]]) -> dict[str, int]:
    return {**dict.fromkeys(shapes, 1), "model.layers." + "9" * 5000 + ".x": 0}
