"""The figures of many runs: curves per game and over games, bars, intervals. Nothing is computed here.

Dimensions: G games · X points of a curve
"""

from dataclasses import dataclass, field

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullFormatter

from lapo.reporting.figures import COLORS, new_figure
from lapo.reporting.published import LAPO_PLUS, PAPER

OTHER_COLORS = {
    "no_sl": "#5b3a8c",
    "no_sl_no_vq": "#b48ad6",
    "ilpo": "#8a5a2b",
    "idm_labelling": "#4f9a68",
    "lapo_plus": "#12365e",
}
"""Of published methods that are no mode here."""
DASHES = {PAPER: (0, (4, 1.5)), LAPO_PLUS: (0, (1, 1.5))}
DOTS = (0, (1, 1))
PUBLISHED = "paper: after 4M env steps, or with as many labels"
LINES = "-", "--", "-.", ":"
HATCHES = "", "///", "...", "xx"
COLUMNS = 4


Estimate = tuple[float, tuple[float, float] | None]
"""A value and the ends of its interval, None if it has none."""


@dataclass(frozen=True)
class Line:
    """A curve of ours, with its error, or a published one."""

    label: str
    mode: str
    x: np.ndarray
    y: np.ndarray
    error: np.ndarray | None = None
    """Standard error (X,), NaN where unknown."""
    variant: int = 0
    """Number of the setting within its mode."""
    paper: str = ""
    """Whose it is, a key of `DASHES`; empty for ours."""


@dataclass(frozen=True)
class Panel:
    """The axes of one game, or of all games."""

    title: str
    lines: list[Line] = field(default_factory=list)
    levels: dict[str, float] = field(default_factory=dict)
    """Horizontal lines, by policy: random, expert."""


@dataclass(frozen=True)
class Final:
    """A final return with its standard error."""

    label: str
    mode: str
    value: float
    error: float | None = None
    variant: int = 0
    published: float | None = None


def color_of(mode: str, variant: int = 0) -> tuple[float, float, float]:
    """A mode's colour, lighter for its further settings."""
    color = np.array(to_rgb(COLORS.get(mode) or OTHER_COLORS.get(mode, "#777777")))
    return tuple(1 - (1 - color) * 0.65 ** min(variant, 3))


def grid_of(count: int, title: str, width: float = 3.3, height: float = 2.7) -> tuple[Figure, list[Axes]]:
    """A figure with exactly `count` axes, `COLUMNS` in a row."""
    columns = min(COLUMNS, count)
    rows = -(-count // columns)
    figure = new_figure(max(width * columns, 7), height * rows + 1.6, title)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for ax in axes[count:]:
        figure.delaxes(ax)
    return figure, list(axes[:count])


def curves(panels: list[Panel], title: str, xlabel: str, ylabel: str) -> Figure:
    """A panel per game, or a single one; x is logarithmic. One legend for all."""
    single = len(panels) == 1
    figure, axes = grid_of(len(panels), title, *((8.5, 4.6) if single else ()))
    for ax, panel in zip(axes, panels, strict=True):
        draw_panel(ax, panel, markers=single)
        if len(panels) - panels.index(panel) <= COLUMNS:  # the lowest of its column
            ax.set_xlabel(xlabel, fontsize=9.5)
    figure.supylabel(ylabel, fontsize=10)
    legend(figure, axes)
    return figure


def draw_panel(ax: Axes, panel: Panel, *, markers: bool) -> None:
    """The lines of a panel: ours wide and with an error band (a point: a bar), published ones thin."""
    for policy, level in panel.levels.items():
        ax.axhline(level, color=COLORS[policy], linewidth=0.9, linestyle=(0, (1, 2)), label=policy)
    for line in panel.lines:
        color = color_of(line.mode, line.variant)
        if line.paper:
            style = {"linewidth": 0.9, "linestyle": DASHES[line.paper], "alpha": 0.9}
            ax.plot(line.x, line.y, color=color, label=line.label, **style)
            continue
        few = len(line.x) <= 12
        style = {"linewidth": 1.9, "linestyle": LINES[line.variant % len(LINES)]}
        style |= {"marker": "o", "markersize": 4.5 if markers else 3.5} if few else {}
        ax.plot(line.x, line.y, color=color, label=line.label, zorder=3, **style)
        if line.error is not None and not np.isnan(line.error).all():
            if len(line.x) == 1:
                ax.errorbar(line.x, line.y, line.error, color=color, linewidth=1.2, capsize=3, zorder=2)
            else:
                low, high = line.y - line.error, line.y + line.error
                ax.fill_between(line.x, low, high, color=color, alpha=0.22, linewidth=0, zorder=2)
    ax.set_xscale("log")
    ax.xaxis.set_major_locator(LogLocator(numticks=9))
    ax.xaxis.set_major_formatter(EngFormatter(sep=""))
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.yaxis.set_major_locator(MaxNLocator(5))
    ax.set_title(panel.title, fontsize=10.5)
    finish(ax)


def finish(ax: Axes) -> None:
    """Light grid, no frame at the top and the right."""
    ax.grid(alpha=0.25, linewidth=0.7)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    ax.tick_params(labelsize=8.5)


def legend(figure: Figure, axes: list[Axes]) -> None:
    """One legend below the figure: ours first, then published curves, then levels."""
    found = {}
    for ax in axes:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    ordered = sorted(found, key=lambda label: (label in ("random", "expert"), ":" in label))
    widest = 0.7 + 0.066 * max(map(len, ordered), default=0)  # inches of an entry: a line, and its letters
    columns = max(1, min(4, int(figure.get_figwidth() / widest)))
    style = {"ncols": columns, "fontsize": 8.5, "frameon": False, "handlelength": 2.6}
    figure.legend([found[label] for label in ordered], ordered, loc="outside lower center", **style)


def bars(games: dict[str, list[Final]], title: str, ylabel: str) -> Figure:
    """A panel per game with a bar per setting; a short line marks the published number."""
    figure, axes = grid_of(len(games), title)
    for ax, (game, finals) in zip(axes, games.items(), strict=True):
        for x, bar in enumerate(finals):
            color, hatch = color_of(bar.mode, bar.variant), HATCHES[bar.variant % len(HATCHES)]
            ax.bar(x, bar.value, 0.76, color=color, hatch=hatch, edgecolor="white", label=bar.label)
            if bar.error is not None:
                ax.errorbar(x, bar.value, bar.error, color="#222222", linewidth=1.2, capsize=3)
            if bar.published is not None:
                ends = [x - 0.38, x + 0.38]
                ax.plot(
                    ends, [bar.published] * 2, color="black", linewidth=1, label=PUBLISHED, linestyle=DOTS
                )
        ax.axhline(0, color="black", linewidth=0.8)
        ax.set_xticks([])
        ax.yaxis.set_major_locator(MaxNLocator(5))
        ax.set_title(game, fontsize=10.5)
        finish(ax)
    figure.supylabel(ylabel, fontsize=10)
    legend(figure, axes)
    return figure


def intervals(rows: list[tuple[str, str, int, dict[str, Estimate]]], title: str, xlabel: str) -> Figure:
    """Rows of label, mode, variant and estimates by statistic: a column of axes per statistic."""
    names = list(rows[0][3])
    figure = new_figure(9, 0.42 * len(rows) + 1.9, title)
    axes = figure.subplots(1, len(names), squeeze=False, sharey=True)[0]
    for ax, name in zip(axes, names, strict=True):
        for y, (_, mode, variant, estimates) in enumerate(rows):
            color, (value, ends) = color_of(mode, variant), estimates[name]
            if ends:
                ax.barh(y, ends[1] - ends[0], 0.5, left=ends[0], color=color, alpha=0.35)
            ax.plot([value] * 2, [y - 0.32, y + 0.32], color=color, linewidth=2.6)
            ax.annotate(f"{value:.2f}", (value, y - 0.32), (0, 1), textcoords="offset points", fontsize=8)
        ax.set_title(name, fontsize=10.5)
        finish(ax)
        ax.use_sticky_edges = False  # else a box may touch the frame
        ax.margins(x=0.12)
        ax.xaxis.set_major_locator(MaxNLocator(6))
    axes[0].set_yticks(range(len(rows)), [label for label, *_ in rows], fontsize=9)
    axes[0].invert_yaxis()
    figure.supxlabel(xlabel, fontsize=10)
    return figure
