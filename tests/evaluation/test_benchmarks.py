"""The paper's benchmarks, under their own ids and schemas on a Hub on loopback, unchanged through lm-eval."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.language_models import LOGIT, WORDS, add_arc, add_mmlu, add_truthfulqa, favouring, mmlu_subjects
from huggingface_hub import ModelCard, parse_eval_result_entries

from hf_locstitch.cli.main import main
from loopback_hub import LoopbackHub

MASS = math.exp(LOGIT)  # of a favoured word, every other having 1


def test_the_suite_of_the_paper(
    home_hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A model that favours B and beta. MMLU: the answers of each subject are B, B, A. ARC: beta twice of four.
    TruthfulQA: beta is the true answer of two questions of four; where it is delta, it draws, and the first wins."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "home"))
    names = mmlu_subjects()
    assert len(names) == 57
    add_mmlu(home_hub, names, answers=(1, 1, 0))
    add_arc(home_hub, ["B", "C", "B", "D"])
    add_truthfulqa(home_hub, ["beta", "beta", "delta", "delta"])
    model = favouring(tmp_path / "model", ["B", "beta"])
    home_hub.add_repo("demo/known", {file.name: file for file in model.iterdir()})

    assert main(["evaluate", "demo/known", "--suite", "paper", "--push", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    results = {result["task"]: result for result in report["models"][0]["results"]}
    scores = {task: result["scores"][0] for task, result in results.items()}
    share = MASS / (MASS + 1)  # of the true answer beside one false one
    assert {task: score["metric"] for task, score in scores.items()} == {
        "mmlu": "acc", "arc_easy": "acc", "arc_challenge": "acc_norm", "truthfulqa_mc1": "acc", "truthfulqa_mc2": "acc",
    }  # fmt: skip
    assert {task: score["value"] for task, score in scores.items()} == {
        "mmlu": pytest.approx(2 / 3), "arc_easy": 0.5, "arc_challenge": 0.5, "truthfulqa_mc1": 1.0,
        "truthfulqa_mc2": pytest.approx((share + share + 0.5 + 0.5) / 4, abs=1e-4),
    }  # fmt: skip
    assert len(WORDS) == 11 and results["mmlu"]["examples"] == 3 * 57
    assert results["mmlu"]["subtasks"] == {f"mmlu_{name}": pytest.approx(2 / 3) for name in names}
    assert {task: result["shots"] for task, result in results.items()} == {
        "mmlu": 5, "arc_easy": 0, "arc_challenge": 25, "truthfulqa_mc1": 0, "truthfulqa_mc2": 0,
    }  # fmt: skip

    for task, dataset in {"mmlu": "cais/mmlu", "arc_challenge": "allenai/ai2_arc"}.items():
        (entry,) = parse_eval_result_entries(yaml.safe_load(home_hub.read("demo/known", f".eval_results/{task}.yaml")))
        assert (entry.dataset_id, entry.task_id, entry.value) == (dataset, task, scores[task]["value"])
        assert entry.dataset_revision == home_hub.head(dataset, repo_type="dataset")
    data: Any = ModelCard.load("demo/known").data
    found = {entry.metric_name: entry.metric_value for entry in data.eval_results}
    measured = {f"{t} {s['metric']}": s["value"] for t, result in results.items() for s in result["scores"]}
    assert found == measured and found["arc_easy acc_norm"] == 0.5
