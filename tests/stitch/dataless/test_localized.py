"""A single finetune whose values are solved for again under its mask: a localized checkpoint that holds more of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers.data import write_texts
from helpers.families import build, family
from helpers.models import load, same_bits
from helpers.runs import quick_localize, quick_merge, quick_stitch

from hf_locstitch import RequestError, load_localized
from hf_locstitch.cli.main import main


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    return family(build("llama", torch.float32), tmp_path)


def test_it_holds_what_a_merge_of_it_alone_does(folders: list[Path], tmp_path: Path) -> None:
    quick_localize(folders[0], folders[1], out=tmp_path / "l", stitch="refit", localizer={"density": 0.2})
    quick_stitch(folders[0], tmp_path / "l", out=tmp_path / "stitched")
    quick_merge(folders[0], folders[1], out=tmp_path / "merged", stitch="refit", localizer={"density": 0.2})
    assert same_bits(load(tmp_path / "stitched"), load(tmp_path / "merged"))
    quick_localize(folders[0], folders[1], out=tmp_path / "plain", localizer={"density": 0.2})
    one, other = load_localized(tmp_path / "l"), load_localized(tmp_path / "plain")
    assert one.refitted and not other.refitted and one.ones == other.ones
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(one.mask(name), other.mask(name)) and not torch.equal(one.values(name), other.values(name))


def test_it_says_so(folders: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inputs = ["--base", str(folders[0]), "--ft", str(folders[1])]
    asked = ["localize", *inputs, "--out", str(tmp_path / "l"), "--stitch", "refit", "--no-figures"]
    assert main(asked[:-1]) == 0
    assert "refit without data" in capsys.readouterr().err
    card = (tmp_path / "l" / "README.md").read_text()
    assert "no longer the finetuned model's own" in card and "those that were solved for" in card
    assert "the finetuned values where" not in card
    assert json.loads((tmp_path / "l" / "locstitch.json").read_text())["stitch"]["refitted"]
    assert main(["verify", str(tmp_path / "l"), *inputs]) == 0
    said = capsys.readouterr().err
    assert "refitted" in said
    recipe = str(tmp_path / "l" / "locstitch.yaml")
    assert main(["localize", recipe, *inputs, "--out", str(tmp_path / "again"), "--quiet"]) == 0
    values = "values/ft0.safetensors"
    assert (tmp_path / "again" / values).read_bytes() == (tmp_path / "l" / values).read_bytes()
    quick_localize(folders[0], folders[2], out=tmp_path / "other")
    capsys.readouterr()
    both = [str(tmp_path / "l"), str(tmp_path / "other")]
    assert main(["stitch", "--base", str(folders[0]), "--localized", *both, "--out", str(tmp_path / "out")]) == 0
    assert "the values of ft0 are not the finetuned model's own" in capsys.readouterr().err


def test_data_is_for_the_localizer(folders: list[Path], tmp_path: Path) -> None:
    data = [str(write_texts(tmp_path / "texts.jsonl"))]
    out = tmp_path / "l"
    quick_localize(folders[0], folders[1], out=out, stitch="refit", localizer={"method": "saliency"}, data=data)
    assert load_localized(out).refitted
    with pytest.raises(RequestError, match="works in merge only"):
        quick_localize(folders[0], folders[1], out=tmp_path / "no", stitch={"data": data})
