"""Lambdas judged by labels: against a loaded model's loss and accuracy, and refused where there are none."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from demo.skills import make_tokenizer
from helpers.data import write_jsonl, write_texts
from helpers.families import build, family, masked_tokenizer
from helpers.refits import HOW, read_record
from helpers.runs import quick_merge
from torch.nn.functional import cross_entropy

from hf_locstitch import RequestError
from hf_locstitch.tasks.objectives.causal_lm import CausalLM, answer_logits

HELD: dict[str, Any] = {"inputs": 24, "held_out": 0.25, "batch": 5, "tokens": 32}


def write_questions(path: Path, *, seed: int) -> Path:
    letters = random.Random(seed)
    rows = [{"prompt": "".join(letters.choices("abc0123", k=letters.randint(3, 9))) + "=",
             "completion": "".join(letters.choices("def", k=letters.randint(1, 4)))} for _ in range(24)]  # fmt: skip
    return write_jsonl(path, rows)


def write_classes(path: Path, *, seed: int, labels: int = 24, classes: int = 3) -> Path:
    """labels: how many rows have one."""
    rows = [json.loads(line) for line in write_texts(path, seed=seed).read_text().splitlines()]
    drawn = random.Random(seed)
    return write_jsonl(
        path, [{**row, "label": drawn.randrange(classes) if i < labels else None} for i, row in enumerate(rows)]
    )


@pytest.mark.parametrize("judge", ["loss", "accuracy"])
def test_a_language_model_is_judged_on_its_answers(judge: str, tmp_path: Path) -> None:
    """The score of a lambda is that of the model that is shipped for it, on the same held-out questions."""
    folders = family(build("llama", torch.float32), tmp_path)
    files = [write_questions(tmp_path / f"{seed}.jsonl", seed=seed) for seed in range(2)]
    stitch = {**HELD, "judge": judge, "lambdas": [0.1, "inf"]}
    quick_merge(
        folders[0], folders[1:], out=tmp_path / "out", localizer=HOW, data=[str(file) for file in files], stitch=stitch
    )
    record = read_record(tmp_path / "out")["stitch"]
    assert record["judge"] == judge and "disagreement" not in record
    curve = record["loss" if judge == "loss" else "error"]
    assert record["lambda"] == min(curve, key=lambda name: curve[name]) and list(curve) == ["0.1", "inf"]
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    scores = []
    for file in files:
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        chosen = [rows[place] for place in random.Random(0).sample(range(24), 24)][18:]
        examples = CausalLM().prepare(chosen, make_tokenizer(), None).examples
        with torch.no_grad():
            logits, wanted = answer_logits(model, examples, 0)
        right = (logits.argmax(-1) == wanted).double().mean().item()
        scores.append(cross_entropy(logits, wanted).item() if judge == "loss" else 1 - right)
    assert curve[record["lambda"]] == pytest.approx(sum(scores) / 2, abs=1e-5)
    card = (tmp_path / "out" / "README.md").read_text()
    title = "Loss on the held-out inputs and their labels" if judge == "loss" else "Share of wrong answers"
    assert title in card and f"chosen by {judge} on up to 6 held-out inputs" in card and "Disagreement" not in card
    if record["refitted"]:
        assert "chosen by their labels" in card and "unlabelled" not in card
    else:
        assert f"judged by {judge}" in card


def test_classes_are_judged_by_their_labels(tmp_path: Path) -> None:
    folders = family(build("bert-classes", torch.float32), tmp_path, masked_tokenizer())
    classes = len(transformers.AutoConfig.from_pretrained(folders[0]).id2label)
    data = [str(write_classes(tmp_path / f"{seed}.jsonl", seed=seed, classes=classes)) for seed in range(2)]
    stitch = {**HELD, "judge": "loss", "lambdas": [1, "inf"]}
    quick_merge(folders[0], folders[1:], out=tmp_path / "out", localizer=HOW, data=data, stitch=stitch)
    assert all(0 < loss < 5 for loss in read_record(tmp_path / "out")["stitch"]["loss"].values())


@pytest.mark.parametrize("judge", ["loss", "accuracy"])
def test_labels_are_asked_for_before_work_starts(judge: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = family(build("bert-classes", torch.float32), tmp_path, masked_tokenizer())
    files = [str(write_classes(tmp_path / f"{seed}.jsonl", seed=seed, labels=24 - 5 * seed)) for seed in range(2)]
    monkeypatch.setattr("hf_locstitch.engine.execute.InputHashes", lambda *_: pytest.fail("work has started"))
    with pytest.raises(RequestError, match=rf"judge: {judge} .* 5 of the 24 inputs of ft1 in .*1.jsonl have none"):
        quick_merge(
            folders[0], folders[1:], out=tmp_path / "out", localizer=HOW, data=files, stitch={**HELD, "judge": judge}
        )
    texts = [str(write_texts(tmp_path / f"text{seed}.jsonl", seed=seed)) for seed in range(2)]
    with pytest.raises(RequestError, match=r"24 of the 24 inputs .* have none"):
        quick_merge(
            folders[0], folders[1:], out=tmp_path / "out", localizer=HOW, data=texts, stitch={**HELD, "judge": judge}
        )
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


def test_hidden_states_have_no_labels(tmp_path: Path) -> None:
    folders = family(build("bert", torch.float32), tmp_path, masked_tokenizer())
    data = [str(write_classes(tmp_path / f"{seed}.jsonl", seed=seed)) for seed in range(2)]
    with pytest.raises(RequestError, match="for ft0 only hidden states are compared"):
        quick_merge(
            folders[0], folders[1:], out=tmp_path / "out", localizer=HOW, data=data, stitch={**HELD, "judge": "loss"}
        )
