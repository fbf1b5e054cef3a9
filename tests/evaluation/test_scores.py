"""The arithmetic of comparing scores, by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hf_locstitch.evaluation.report import EvaluationReport, ModelScores, markdown
from hf_locstitch.evaluation.scores import Score, TaskResult, compare, difference_stderr, kept_share


def score(value: float, stderr: float | None = None, *, higher: bool = True) -> Score:
    return Score("acc", value, stderr, higher)


def test_difference_and_its_error() -> None:
    beside = compare(score(0.5, 0.03), score(0.44, 0.04), {})
    assert beside.difference == pytest.approx(0.06) and beside.stderr == pytest.approx(0.05)
    assert beside.exceeds is True and beside.best_parent is None and beside.kept is None
    assert compare(score(0.44, 0.03), score(0.5, 0.04), {}).exceeds is True  # also where it is worse
    assert compare(score(0.5, 0.03), score(0.46, 0.04), {}).exceeds is False
    assert compare(score(0.5), score(0.4, 0.1), {}).exceeds is None and difference_stderr(None, 0.1) is None
    assert compare(score(0.5), None, {}).difference is None


def test_share_of_the_best_parent() -> None:
    parents = {"maths": score(0.4), "code": score(0.8), "chat": score(0.8)}
    beside = compare(score(0.6), None, parents)
    assert beside.best_parent == "code" and beside.kept == pytest.approx(0.75)
    assert kept_share(score(0.6), score(0.0)) is None


def test_where_lower_is_better() -> None:
    parents = {"maths": score(10.0, higher=False), "code": score(20.0, higher=False)}
    beside = compare(score(12.5, higher=False), None, parents)
    assert beside.best_parent == "maths" and beside.kept == pytest.approx(0.8)


def result(task: str, *scores: Score, dataset: str | None = None) -> TaskResult:
    return TaskResult(task, 5, None, 100, scores, dataset)


def test_tables() -> None:
    models = (
        ModelScores("base", "base", "lab/base@" + "a" * 40, "1", (result("mmlu", score(0.25, 0.03)),)),
        ModelScores("maths", "finetuned", "lab/maths@" + "b" * 40, "2", (result("mmlu", score(0.5, 0.05)),)),
        ModelScores("merged", "model", "lab/merged@" + "c" * 40, "3", (result("mmlu", score(0.4, 0.04)),), cached=1),
    )
    report = EvaluationReport(models, ("mmlu:5",), None)
    assert report.subject is models[2] and report.judged == [models[2]]
    assert report.score_table() == [
        ["task", "metric", "base", "maths", "merged"],
        ["mmlu (5-shot)", "acc", "0.2500 ± 0.0300", "0.5000 ± 0.0500", "0.4000 ± 0.0400"],
    ]
    assert report.comparison_table()[1] == [
        "merged",
        "mmlu (5-shot)",
        "acc",
        "+0.1500 ± 0.0500",
        "yes",
        "maths",
        "80.0 %",
    ]
    assert "measured   2 scores, 1 more from the cache" in report.describe()
    beside = report.as_json()["comparisons"]["merged"]["mmlu"]["acc"]
    assert beside["kept"] == pytest.approx(0.8) and beside["exceeds"] is True


def test_markdown_table() -> None:
    assert markdown([["a", "b"], ["x|y", "1"]]) == "| a | b |\n| :--- | ---: |\n| x\\|y | 1 |"


def test_which_examples_were_taken_is_said_as_it_was_done() -> None:
    """lm-eval takes the first ones; of a set rows are drawn."""
    first = TaskResult("arc", 0, 5, 5, (Score("acc", 0.5),))
    drawn = replace(first, task="mine", shots=None, objective="causal-lm")
    assert (first.title, drawn.title) == ("arc (0-shot, first 5 examples)", "mine (5 drawn examples)")

    def taken(*results: TaskResult) -> str:
        return EvaluationReport((ModelScores("merge", "model", "", "", results),), (), 5).taken

    assert taken(first) == "the first 5 examples of each task" and taken(drawn) == "5 drawn examples of each set"
    assert taken(first, drawn) == "5 examples of each task" and taken(replace(drawn, limit=None)) == ""
