"""The figure of a comparison: scores against density, the mean over the tasks beside the worst task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING

from hf_locstitch.comparison.cells import shown
from hf_locstitch.comparison.report import FIGURE, ComparisonReport, Entry
from hf_locstitch.report.figures.draw import COLOURS, INK, LINES, MARKERS, WIDTH, new_figure, save, styled
from hf_locstitch.runtime.escape import figure as text
from hf_locstitch.runtime.human import counted

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LISTED = 24  # lines that a legend can tell apart
FAR = 8  # times the smallest density


def save_comparison(report: ComparisonReport, folder: Path) -> list[Path]:
    """PNG and SVG, in the folder's `figures`. Returns their paths."""
    stem = folder / Path(FIGURE).with_suffix("")
    stem.parent.mkdir(parents=True, exist_ok=True)
    return save(draw_comparison(report), stem)


def curves(entries: Sequence[Entry]) -> dict[str, list[Entry]]:
    """Entries that differ in density only, under what they have in common, by density."""
    found: dict[str, list[Entry]] = {}
    for entry in entries:
        common = ", ".join(shown(axis, value) for axis, value in entry.settings.items() if axis != "density")
        found.setdefault(common or "all", []).append(entry)
    return {name: sorted(curve, key=lambda entry: entry.density or 0) for name, curve in found.items()}


@styled
def draw_comparison(report: ComparisonReport) -> Figure:
    """A line for each method (and other settings); without a density, a level across the page."""
    found = curves(report.entries)
    figure = new_figure(WIDTH, 3.6 + 0.16 * min(len(found), LISTED))
    mean, worst = figure.subplots(1, 2, sharex=True, sharey=True)
    factor = 100 if report.relative else 1
    for axes, what, title in ((mean, "mean", "mean over the tasks"), (worst, "worst", "worst task")):
        _draw(axes, found, what, factor)
        if report.chosen.density is not None:
            best = getattr(report.chosen, what) * factor
            axes.plot(report.chosen.density, best, "o", markersize=12, fillstyle="none", color=INK, zorder=4)
        axes.set_title(title)
        axes.set_xlabel("density")
        axes.grid()
    _scale(mean, {entry.density for entry in report.entries if entry.density is not None})
    mean.set_ylabel("share of the best finetune's score, %" if report.relative else "score")
    handles, labels = mean.get_legend_handles_labels()
    figure.legend(handles[:LISTED], labels[:LISTED], loc="outside lower center", ncols=3, frameon=False)
    figure.suptitle(f"{counted(len(report.entries), 'merge')}; the best: {text(report.chosen.label)}", fontsize=11)
    return figure


def _scale(axes: Axes, densities: set[float]) -> None:
    """Ticks where there are merges, on a logarithmic axis if they are far apart."""
    if not densities:
        axes.set_xticks([])
        return
    if max(densities) >= FAR * min(densities):
        axes.set_xscale("log")
    axes.set_xticks(sorted(densities), [f"{density:g}" for density in sorted(densities)])
    axes.set_xticks([], minor=True)


def _draw(axes: Axes, found: Mapping[str, Sequence[Entry]], what: str, factor: float) -> None:
    for number, ((name, curve), colour, marker) in enumerate(
        zip(found.items(), cycle(COLOURS), cycle(MARKERS), strict=False)
    ):
        line = LINES[number // len(COLOURS) % len(LINES)]
        values = [getattr(entry, what) * factor for entry in curve]
        if curve[0].density is None:
            axes.axhline(values[0], color=colour, linestyle=":", linewidth=1.2, label=text(name))
        else:
            densities = [entry.density or 0.0 for entry in curve]
            axes.plot(densities, values, line, marker=marker, color=colour, linewidth=1.3, label=text(name))
