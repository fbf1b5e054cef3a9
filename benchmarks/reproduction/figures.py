"""The two kinds of figure of the page: curves, and dots by row; a panel for each testbed, in the project's style."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from statistics import mean
from typing import TYPE_CHECKING

from hf_locstitch.report.figures.draw import COLOURS, LINES, MARKERS, WIDTH, new_figure, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Values = Sequence[float]  # one a seed
Curves = Mapping[str, Mapping[float, Values]]  # series -> x -> values
Rows = Mapping[str, Mapping[str, Values]]  # row -> series -> values


@styled
def draw_curves(
    panels: Mapping[str, Curves], x: str, y: str, levels: Mapping[str, Mapping[str, Values]] | None = None
) -> Figure:
    """A line through the means, whiskers from the smallest to the largest seed. panels: by testbed.

    levels: testbed -> series that do not depend on x, drawn across.
    """
    figure = new_figure(WIDTH, 3.4)
    for axes, (testbed, curves) in zip(_panels(figure, len(panels), share_x=False), panels.items(), strict=True):
        styles = zip(cycle(COLOURS), cycle(MARKERS), cycle(LINES), strict=False)
        for (name, points), (colour, marker, line) in zip(curves.items(), styles, strict=False):
            at, means = list(points), [mean(values) for values in points.values()]
            low = [middle - min(values) for middle, values in zip(means, points.values(), strict=True)]
            high = [max(values) - middle for middle, values in zip(means, points.values(), strict=True)]
            axes.errorbar(
                at, means, (low, high), label=name, color=colour, marker=marker, linestyle=line, linewidth=1.4,
                markersize=5, capsize=2,
            )  # fmt: skip
        for (name, values), (colour, _, line) in zip(((levels or {}).get(testbed) or {}).items(), styles, strict=False):
            axes.axhline(mean(values), color=colour, linestyle=line, linewidth=1.1, label=name)
        axes.set_title(testbed)
        axes.set_xlabel(x)
        ticks = sorted({at for points in curves.values() for at in points})
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    return _finished(figure, y)


@styled
def draw_dots(panels: Mapping[str, Rows], x: str | Mapping[str, str], line: float | None = None) -> Figure:
    """A small dot for each seed, a large one for their mean. x: label, or one by testbed. line: a value to mark."""
    longest = max(len(rows) for rows in panels.values())
    figure = new_figure(WIDTH, 1.3 + 0.34 * longest)
    all_axes = _panels(figure, len(panels), share_x=isinstance(x, str))
    for axes, (testbed, rows) in zip(all_axes, panels.items(), strict=True):
        series = list(dict.fromkeys(name for own in rows.values() for name in own))
        for number, name in enumerate(series):
            colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
            shift = 0.18 * (number - (len(series) - 1) / 2)
            places = [(place + shift, own[name]) for place, own in enumerate(rows.values()) if name in own]
            for place, values in places:
                axes.plot(values, [place] * len(values), marker, color=colour, markersize=3, alpha=0.5)
            middles = [mean(values) for _, values in places]
            axes.plot(middles, [place for place, _ in places], marker, color=colour, markersize=7, label=name)
        if line is not None:
            axes.axvline(line, color=COLOURS[-1], linestyle=":", linewidth=1)
        axes.set_yticks(range(len(rows)), list(rows))
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_title(testbed)
        axes.set_xlabel(x if isinstance(x, str) else x[testbed])
    return _finished(figure, "")


def _panels(figure: Figure, count: int, share_x: bool) -> list[Axes]:
    return list(figure.subplots(1, count, squeeze=False, sharey=True, sharex=share_x).flatten())


def _finished(figure: Figure, y: str) -> Figure:
    """With a grid, the vertical axis's label at the left, and one legend below if series are told apart."""
    for axes in figure.axes:
        axes.grid()
        axes.set_axisbelow(True)
    figure.axes[0].set_ylabel(y)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    if len(set(labels)) > 1:
        figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    return figure
