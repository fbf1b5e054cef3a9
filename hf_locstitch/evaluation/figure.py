"""The figure of the scores."""

from __future__ import annotations

from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from hf_locstitch.evaluation.report import EvaluationReport
from hf_locstitch.report.figures.draw import COLOURS, INK, MARKERS, PAGE, new_figure, save, styled
from hf_locstitch.runtime.escape import figure as text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STEM = "scores"


def draw_evaluation(report: EvaluationReport, folder: Path) -> list[Path]:
    """Draw the scores, as PNG and SVG. The caller writes the report's data beside them."""
    folder.mkdir(parents=True, exist_ok=True)
    return save(draw_scores(report), folder / STEM)


@styled
def draw_scores(report: EvaluationReport) -> Figure:
    """The main metric of each task, one marker per model, with standard errors."""
    results = report.models[0].results
    models = report.models
    figure = new_figure(PAGE, 1.1 + len(results) * max(0.36, 0.1 * len(models)))
    axes = figure.subplots()
    offsets = np.linspace(-0.32, 0.32, len(models)) if len(models) > 1 else [0.0]
    marks = zip(models, offsets, islice(cycle(COLOURS), len(models)), cycle(MARKERS), strict=False)
    for model, offset, colour, marker in marks:
        scores = [(place, model.score(r.task, r.main.metric)) for place, r in enumerate(results)]
        points = [(place + offset, score.value, score.stderr or 0.0) for place, score in scores if score is not None]
        if not points:
            continue
        heights, values, errors = zip(*points, strict=True)
        judged = model is report.subject
        axes.errorbar(
            values, heights, xerr=errors, fmt=marker, color=colour, markersize=7 if judged else 5, capsize=2,
            elinewidth=1, markeredgecolor=INK if judged else colour, label=text(model.name), zorder=3 if judged else 2,
        )  # fmt: skip
    axes.set_yticks(range(len(results)), [f"{text(r.title)}\n{text(r.main.metric)}" for r in results])
    axes.set_ylim(len(results) - 0.45, -0.55)
    axes.grid(axis="x")
    axes.set_xlabel("score, with its standard error")
    axes.set_title("Scores")
    figure.legend(loc="outside lower center", ncols=min(6, len(models)), frameon=False)
    return figure
