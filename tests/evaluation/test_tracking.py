"""Scores in the real Trackio and the real Weights & Biases, without a network, where these are installed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hf_locstitch.evaluation.models import Role
from hf_locstitch.evaluation.report import EvaluationReport, ModelScores
from hf_locstitch.evaluation.scores import Score, TaskResult
from hf_locstitch.evaluation.tracking import PROJECT, log_report


@pytest.fixture
def report() -> EvaluationReport:
    def scored(name: str, role: Role, value: float) -> ModelScores:
        result = TaskResult("mmlu", 5, None, 100, (Score("acc", value, 0.03125),), subtasks={"maths": value / 2})
        return ModelScores(name, role, f"lab/{name}", "", (result,))

    return EvaluationReport((scored("base", "base", 0.25), scored("merged", "model", 0.75)), ("mmlu:5",), None)


def test_trackio(
    report: EvaluationReport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path))  # which is read when trackio is imported
    trackio = pytest.importorskip("trackio")
    from trackio.sqlite_storage import SQLiteStorage

    log_report(report, "trackio")
    runs = {run.name: run for run in trackio.Api().runs(PROJECT)}
    assert {name: run.config["ref"] for name, run in runs.items()} == {"base": "lab/base", "merged": "lab/merged"}
    (logged,) = SQLiteStorage.get_logs(PROJECT, "merged")
    expected = {"mmlu/acc": 0.75, "mmlu/acc_stderr": 0.03125, "maths/acc": 0.375}
    assert expected.items() <= logged.items()
    assert capsys.readouterr().out == ""  # which is for the JSON of `evaluate --json`


def test_wandb(report: EvaluationReport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    wandb = pytest.importorskip("wandb")
    log_report(report, "wandb")
    wandb.teardown()  # as at the end of a program: its service writes the last records
    (record,) = (
        text for path in tmp_path.glob("wandb/offline-run-*/*.wandb") if b"lab/merged" in (text := path.read_bytes())
    )
    for said in (PROJECT, "mmlu/acc", "maths/acc", json.dumps(0.75), json.dumps(0.375)):
        assert said.encode() in record
