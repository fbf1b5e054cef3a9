"""Logging scores to Trackio or Weights & Biases, if installed, under lm-eval's names."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from importlib import import_module
from typing import Any

from hf_locstitch.evaluation.report import EvaluationReport, ModelScores
from hf_locstitch.runtime.packages import need

PROJECT = "hf-locstitch"


def find_tracker(name: str) -> Any:
    """The module; both have init(project=, name=, config=), log(dict) and finish(). Raises RecipeError."""
    need(f"--track {name}", name)
    return import_module(name)


def log_report(report: EvaluationReport, name: str) -> None:
    """Log one run per model. What the tracker prints goes to standard error: standard output is the report's."""
    tracker = find_tracker(name)
    with redirect_stdout(sys.stderr):
        for model in report.models:
            config = {"ref": model.ref, "role": model.role, "tasks": list(report.tasks), "limit": report.limit}
            tracker.init(project=PROJECT, name=model.name, config=config)
            tracker.log(metrics_of(model))
            tracker.finish()


def metrics_of(model: ModelScores) -> dict[str, float]:
    """task/metric -> value and task/metric_stderr -> standard error, members of groups included."""
    metrics: dict[str, float] = {}
    for result in model.results:
        for score in result.scores:
            metrics[f"{result.task}/{score.metric}"] = score.value
            if score.stderr is not None:
                metrics[f"{result.task}/{score.metric}_stderr"] = score.stderr
        metrics |= {f"{member}/{result.main.metric}": value for member, value in result.subtasks.items()}
    return metrics
