"""A refit on inputs goes on from the one without data."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from demo.skills import make_tokenizer
from helpers.data import write_texts
from helpers.families import build, family
from helpers.models import load, same_bits
from helpers.runs import quick_merge

JOINT: dict[str, Any] = {"method": "joint", "density": 0.3}
SMALL: dict[str, Any] = {"inputs": 24, "held_out": 0.25, "batch": 5}


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    return family(build("llama", torch.float32), tmp_path)


@pytest.fixture
def data(tmp_path: Path) -> list[str]:
    return [str(write_texts(tmp_path / f"{seed}.jsonl", seed=seed)) for seed in range(2)]


def merge(folders: list[Path], out: Path, **asked: Any) -> dict[str, Any]:
    quick_merge(folders[0], folders[1:], out=out, localizer=JOINT, **asked)
    return json.loads((out / "locstitch.json").read_text())["stitch"]


def test_an_infinite_lambda_is_the_refit_without_data(folders: list[Path], data: list[str], tmp_path: Path) -> None:
    merge(folders, tmp_path / "none", stitch="refit")
    record = merge(folders, tmp_path / "inf", stitch={**SMALL, "lambdas": ["inf"]}, data=data)
    assert same_bits(load(tmp_path / "none"), load(tmp_path / "inf"))
    assert record["lambda"] == "inf" and record["without_data"]["ridge"] == 0.3 and record["refitted"]
    card = (tmp_path / "inf" / "README.md").read_text()
    assert "what is found without data, so that was kept" in card and "WUDI-Merging" in card
    assert "to values solved for from the finetunes' task vectors alone" in " ".join(card.split())


def test_small_lambdas_move_linears_and_leave_vectors(folders: list[Path], data: list[str], tmp_path: Path) -> None:
    merge(folders, tmp_path / "none", stitch="refit")
    record = merge(folders, tmp_path / "out", stitch={**SMALL, "lambdas": [0.1]}, data=data)
    begun, fitted = load(tmp_path / "none"), load(tmp_path / "out")
    for name, values in fitted.items():
        assert torch.equal(values, begun[name]) == (values.dim() == 1 or ".layers." not in name), name
    assert set(record["refitted"]) == {name for name in fitted if ".layers." in name}
    card = " ".join((tmp_path / "out" / "README.md").read_text().split())
    assert "masked least squares from what is found without data" in card
    assert "to values fitted to what the finetuned models compute" in card


def test_the_judge(folders: list[Path], data: list[str], tmp_path: Path) -> None:
    """The squared distance of last hidden states from each finetune's, over the base's, on the held-out inputs."""
    record = merge(folders, tmp_path / "out", stitch={**SMALL, "lambdas": [0.1, "inf"]}, data=data)
    tokenizer, shares = make_tokenizer(), []
    for number, file in enumerate(data):
        rows = [json.loads(line)["text"] for line in Path(file).read_text().splitlines()][:24]
        chosen = [rows[place] for place in random.Random(0).sample(range(24), 24)][18:]
        far = {"out": 0.0, "base": 0.0}
        hidden = {name: states(tmp_path / name, chosen, tokenizer) for name in ("out", "base", f"ft{number}")}
        for name in far:
            pairs = zip(hidden[name], hidden[f"ft{number}"], strict=True)
            far[name] = sum((one - other).double().square().sum().item() for one, other in pairs)
        shares.append(far["out"] / far["base"])
    assert record["disagreement"][record["lambda"]] == pytest.approx(sum(shares) / 2, rel=1e-3)
    assert record["disagreement"]["inf"] >= record["disagreement"][record["lambda"]]


def states(folder: Path, texts: list[str], tokenizer: Any) -> list[torch.Tensor]:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        inputs = [tokenizer(text, return_tensors="pt")["input_ids"] for text in texts]
        return [model(ids, output_hidden_states=True).hidden_states[-1][0] for ids in inputs]
