"""Drawing: data in, a matplotlib Figure out. Nothing behind it, so that a page's own ground shows.

A page of the Hub is light or dark as its reader set it there, which an image cannot know (`prefers-color-scheme` is the
system's). So every ink is of middle lightness, legible on white and on near black alike. Colours: after Okabe and
Ito's, for models, always with a marker or line style of their own; the middle of cividis for shares.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import numpy as np

from hf_locstitch.report.figures.mask_layout import OUTSIDE, MaskLayout
from hf_locstitch.report.figures.task_vectors import TaskVectors
from hf_locstitch.runtime.escape import figure as text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure


P = ParamSpec("P")
T = TypeVar("T")

COLOURS = (
    "#1A85C8",
    "#D55E00",
    "#009E73",
    "#C264A0",
    "#A67C00",
    "#7B6FD0",
    "#808080",
)  # 3 : 1 or more on either ground
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LINES = ("-", "--", "-.", ":")
INK = "#777B80"  # 4.2 : 1 or more on either ground
ON_LIGHT, ON_DARK = "#1F2328", "white"  # inside cells
GRID = "#777B8059"
PART_OF_MAP = (0.15, 0.92)  # its ends would be lost on a dark or a light page
ANNOTATED = 12  # up to so many masks, numbers fit into the cells
PAGE = 7.2  # inches: the width of a figure, so that a page shows all text in one size
WIDTH = 9.0  # inches of panels side by side
LEGEND = 90  # characters in a row of a legend
RARE = 1e-3  # share of the entries that may lie left of the axes
STYLE: Mapping[Any, Any] = {
    "font.size": 9,
    "font.family": "DejaVu Sans",
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "xtick.color": INK,
    "ytick.color": INK,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "axes.axisbelow": True,
    "figure.dpi": 100,
    "figure.constrained_layout.h_pad": 0.04,
    "figure.constrained_layout.w_pad": 0.12,
    "savefig.dpi": 160,
    "svg.fonttype": "path",
    "svg.hashsalt": "hf-locstitch",
}


def styled(draw: Callable[P, T]) -> Callable[P, T]:
    """Draw with our settings, whatever the caller's matplotlib settings are."""

    @wraps(draw)
    def styled(*args: P.args, **kwargs: P.kwargs) -> T:
        import matplotlib

        with matplotlib.rc_context():
            matplotlib.rcdefaults()
            for name, value in STYLE.items():
                matplotlib.rcParams[name] = value
            return draw(*args, **kwargs)

    return styled


@styled
def save(figure: Figure, stem: Path) -> list[Path]:
    """stem.png and stem.svg; the same figure gives the same bytes. Its layout, half of the work, is found once."""
    paths = [stem.with_name(f"{stem.name}.png"), stem.with_name(f"{stem.name}.svg")]
    figure.savefig(paths[0], metadata={"Software": None})
    figure.set_layout_engine(None)
    figure.savefig(paths[1], metadata={"Date": None, "Creator": None})
    return paths


def new_figure(width: float, height: float) -> Figure:
    """width, height: inches. No pyplot: nothing global, no display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def heat_map() -> ListedColormap:
    """The part of cividis that stands out from light and dark pages. No colour for what is masked out."""
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap

    return ListedColormap(colormaps["cividis"](np.linspace(*PART_OF_MAP, 256)))


@styled
def draw_overlap(names: Sequence[str], jaccard: np.ndarray) -> Figure:
    """Heat map of the masks' pairwise Jaccard index. jaccard: [masks, masks], 1 on the diagonal."""
    count, labels = len(names), list(map(text, names))
    figure = new_figure(PAGE, max(2.6, min(PAGE, 1.6 + 0.42 * count)))
    axes = figure.subplots()
    apart = jaccard[~np.eye(count, dtype=bool)]
    top = max(float(apart.max()), 1e-9) if len(apart) else 1.0
    shown = np.ma.masked_array(jaccard, np.eye(count, dtype=bool))
    image = axes.imshow(shown, cmap=heat_map(), vmin=0, vmax=top, aspect="auto")
    axes.set_xticks(range(count), labels, rotation=45, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(count), labels)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    if count <= ANNOTATED:
        for row, column in np.ndindex(count, count):
            value = jaccard[row, column]
            ink = INK if row == column else ON_LIGHT if value > 0.5 * top else ON_DARK
            axes.text(column, row, f"{value:.2f}".removesuffix(".00"), ha="center", va="center", color=ink)
    figure.colorbar(image, ax=axes, label="in both / in either")
    axes.set_title("Overlap of the masks (Jaccard index)")
    return figure


@styled
def draw_mask_layout(layout: MaskLayout) -> Figure:
    """Where each mask's ones lie: layers across, kinds of module down, one panel a mask."""
    names, layers, kinds = list(layout.share), layout.layers, layout.kinds
    wide = max(1.9, min(6.0, 0.11 * len(layers) + 0.9))
    columns = min(max(1, int(WIDTH // wide)), len(names))
    rows = -(-len(names) // columns)
    high = max(1.3, 0.19 * len(kinds) + 0.5)
    figure = new_figure(1.7 + columns * wide + 0.8, 0.7 + rows * (high + 0.25))
    axes: list[Axes] = list(figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).flatten())
    top = max((float(share.max()) for share in layout.share.values()), default=0.0) or 1.0
    image = None
    for panel, name in zip(axes, names, strict=False):
        share = np.ma.masked_array(100 * layout.share[name], layout.elements == 0)
        image = panel.imshow(share, cmap=heat_map(), vmin=0, vmax=100 * top, aspect="auto")
        panel.set_title(text(name))
        panel.tick_params(length=0)
        panel.spines[:].set_visible(False)
        step = max(1, -(-len(layers) // 8))
        panel.set_xticks(range(0, len(layers), step), list(map(text, layers[::step])))
        panel.set_yticks(range(len(kinds)), list(map(text, kinds)))
    for panel in axes[len(names) :]:
        panel.set_visible(False)
    for lowest in axes[max(0, len(names) - columns) : len(names)]:
        lowest.tick_params(labelbottom=True)
        lowest.set_xlabel("layer")
    if image is not None:
        figure.colorbar(image, ax=axes, label="share of the mask's ones, %")
    figure.suptitle("Where the masks lie", fontsize=11)
    return figure


@styled
def draw_layers(layout: MaskLayout) -> Figure:
    """How each mask's ones are spread over the layers, beside an even spread. What lies outside all layers is last."""
    inside = sum(layer != OUTSIDE for layer in layout.layers)
    places = np.arange(len(layout.layers))
    in_row = max(1, min(5, LEGEND // (8 + max(map(len, layout.ones), default=0))))
    figure = new_figure(PAGE, 1.8 + 0.18 * -(-(len(layout.ones) + 1) // in_row))
    axes = figure.subplots()
    even = 100 * layout.elements.sum(axis=0) / max(int(layout.elements.sum()), 1)
    axes.plot(places[:inside], even[:inside], color=INK, linewidth=0.9, linestyle=":", label="spread evenly")
    kinds = zip(layout.share.items(), cycle(COLOURS), cycle(MARKERS), cycle(LINES), strict=False)
    for (name, share), colour, marker, line in kinds:
        of_layer = 100 * share.sum(axis=0)
        style: dict[str, Any] = {"color": colour, "marker": marker, "markersize": 3.5}
        axes.plot(places[:inside], of_layer[:inside], line, linewidth=1.5, label=text(name), **style)
        axes.plot(places[inside:], of_layer[inside:], linestyle="", **style)
    ticks = [*range(0, inside, max(1, -(-inside // 16))), *range(inside, len(places))]
    axes.set_xticks(ticks, [text(layout.layers[tick]) for tick in ticks])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("layer", labelpad=0)
    axes.set_ylabel("share of ones, %")
    axes.set_title("Where the masks lie")
    axes.grid(axis="y")
    figure.legend(loc="outside lower center", ncols=in_row, frameon=False)
    return figure


@styled
def draw_task_vectors(vectors: Mapping[str, TaskVectors]) -> Figure:
    """Magnitudes of each task vector's entries, and the smallest one that its mask keeps."""
    figure = new_figure(PAGE, 3.6)
    axes = figure.subplots()
    for (name, vector), colour, line in zip(vectors.items(), cycle(COLOURS), cycle(LINES), strict=False):
        label = text(name) if vector.unchanged < 5e-4 else f"{text(name)} ({100 * vector.unchanged:.1f} % unchanged)"
        axes.stairs(
            100 * np.array(vector.shares), vector.edges, color=colour, linestyle=line, linewidth=1.6, label=label
        )
        if vector.threshold is not None:
            axes.axvline(vector.threshold, color=colour, linestyle=line, linewidth=0.9, alpha=0.9)
    axes.set_xscale("log")
    axes.set_xlim(left=min(_first_seen(vector) for vector in vectors.values()))
    axes.set_ylim(bottom=0)
    axes.set_xlabel("|task vector|; vertical lines: the smallest entry that the mask keeps")
    axes.set_ylabel("share of the entries, %")
    axes.set_title(
        f"Size of the task vectors' entries ({max(vector.sampled for vector in vectors.values()):,} sampled)"
    )
    axes.legend(frameon=False)
    return figure


def _first_seen(vector: TaskVectors) -> float:
    """The left edge of the axes: at most RARE of the entries lie below it."""
    passed = np.cumsum(vector.shares) > RARE
    return vector.edges[int(np.argmax(passed))] if passed.any() else vector.edges[0]
