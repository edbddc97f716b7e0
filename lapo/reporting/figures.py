"""The figures of a report. Nothing is computed or read here.

Dimensions: M windows · T frames of a window (3) · H, W, C frame · K latent actions · A true actions
"""

import textwrap
from dataclasses import dataclass

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure

from lapo.modes import MODES
from lapo.reporting.inspection import Counterfactual, LatentProjection, Predictions

COLORS = {
    "random": "#9a9a9a",
    **{mode: MODES[mode].color for mode in MODES},
    "expert": "#3d3d3d",
}
"""The colour of each policy in every figure."""
LAPO, BASELINE, CONTROL = COLORS["online"], COLORS["scratch"], COLORS["random"]
WIDTH = 10.5
"""Inches, of a figure made of frames."""


def new_figure(width: float, height: float, title: str) -> Figure:
    """An empty figure, `width` × `height` inches, its title broken into lines that fit."""
    figure = Figure(figsize=(width, height), layout="constrained", dpi=110)
    lines = (textwrap.fill(line, round(9 * width)) for line in title.splitlines())
    figure.suptitle("\n".join(lines), fontsize=13, fontweight="bold")
    return figure


def draw(ax: Axes, lines: list[dict], *keys: str, **style) -> None:
    """Add the curve of the values under any of `keys` in lines of metrics, if there are any."""
    curve = [(line["step"], line[key]) for line in lines for key in keys if key in line]
    if curve:
        ax.plot(*zip(*curve, strict=True), **style)


# ---------------------------------------------------------------- stage 1


def learning(lines: list[dict], metrics: dict[str, float], title: str) -> Figure:
    """World-model error and, where the data has true actions, probe accuracy over the steps of stage 1.

    `lines` of metrics.jsonl, and the latest value of each metric.
    """
    probed = "untrained_probe_acc_test" in metrics
    figure = new_figure(11 if probed else 6, 4.2, title)
    axes = figure.subplots(1, 2 if probed else 1, squeeze=False)[0]

    copying = metrics.get("copy_loss_test", metrics["untrained_copy_loss_test"])
    held_out = ("untrained_wm_loss_test", "wm_loss_test")
    axes[0].axhline(copying, color=BASELINE, linestyle="--", label="repeating the last frame")
    draw(axes[0], lines, "wm_loss", color=COLORS["offline"], label="world model, training frames")
    draw(axes[0], lines, *held_out, color=LAPO, marker="o", label="world model, held-out frames")
    axes[0].set(yscale="log", ylabel="mean squared error (log scale)")
    axes[0].set_title("Error of predicting the next frame")

    if probed:
        accuracy = ("untrained_probe_acc_test", "probe_acc_test")
        untrained, majority = (metrics[f"untrained_{key}_acc_test"] for key in ("probe", "majority"))
        draw(axes[1], lines, *accuracy, color=LAPO, marker="o", label="probe of the latent action")
        axes[1].axhline(untrained, color=CONTROL, linestyle=":", label="probe of the untrained IDM's")
        axes[1].axhline(majority, color=BASELINE, linestyle="--", label="always the commonest action")
        axes[1].set(ylim=(0, 1.02), ylabel="accuracy on held-out frames")
        axes[1].set_title("How often a probe names the true action")
    for ax in axes:
        ax.set_xlabel("steps of stage 1")
        ax.grid(alpha=0.3)
        ax.legend(fontsize=9)
    return figure


def latents(views: list[LatentProjection], ta: np.ndarray, names: list[str], title: str) -> Figure:
    """Latent actions of windows with true actions `ta` (M,), indices of `names`, and confusion matrices."""
    figure = new_figure(11, 4.5 * len(views), title)
    palette = colormaps["tab10" if len(names) <= 10 else "tab20"].colors
    # The commonest actions get the most distinct colours; the rarest are drawn on top.
    rank = np.argsort(np.argsort(-np.bincount(ta, minlength=len(names))))
    for view, (left, right) in zip(views, figure.subplots(len(views), 2, width_ratios=(5, 4)), strict=True):
        for action, name in enumerate(names):
            xy = view.xy[ta == action]
            style = {"color": palette[rank[action]], "zorder": rank[action] + 2, "label": name}
            left.scatter(*xy.T, s=9, alpha=0.7, linewidths=0, **style)
        low, high = np.percentile(view.xy, [0.5, 99.5], axis=0)  # without a few outliers
        margin = (high - low) / 9 + 1e-9
        left.set(**dict(zip(("xlim", "ylim"), zip(low - margin, high + margin, strict=True), strict=True)))
        left.set(xticks=[], yticks=[], xlabel="each dot: the latent action of one step of the expert")
        left.set_title(view.title)
        left.legend(title="true action", fontsize=9, markerscale=2)

        image = right.imshow(view.confusion, cmap="Blues", vmin=0, vmax=1)
        right.set_xticks(range(len(names)), names, rotation=45, ha="right", fontsize=9)
        right.set_yticks(range(len(names)), names, fontsize=9)
        right.set(xlabel="action predicted from the latent action", ylabel="true action")
        for row, column in np.ndindex(view.confusion.shape):
            fraction = view.confusion[row, column]
            if fraction >= 0.005:
                color = "white" if fraction > 0.6 else "black"
                right.text(column, row, f"{fraction:.0%}", ha="center", va="center", color=color, fontsize=8)
        figure.colorbar(image, ax=right, shrink=0.8, format="{x:.0%}", label="fraction of the row")
    return figure


def show(ax: Axes, image: np.ndarray, **style) -> None:
    """A frame (H, W, C) or a map (H, W), without ticks."""
    ax.imshow(image, interpolation="nearest", **style)
    ax.set(xticks=[], yticks=[])


def predictions(seen: Predictions, counterfactuals: list[Counterfactual], title: str) -> Figure:
    """Predictions beside the truth; below, predictions from the same frames under other latent actions."""
    heights = [WIDTH / (seen.frames.shape[1] + 3) * len(seen.frames) + 0.7]
    if counterfactuals:
        columns = len(counterfactuals[0].frames) + len(counterfactuals[0].names)
        heights.append(WIDTH / columns * 2 * len(counterfactuals) + 1.0)
    figure = new_figure(WIDTH, sum(heights), title)
    parts = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    draw_predictions(parts[0], seen)
    if counterfactuals:
        draw_counterfactuals(parts[1], counterfactuals)
    return figure


def draw_predictions(part: SubFigure, seen: Predictions) -> None:
    """A row for each window: frames, prediction, errors of the prediction and of repeating o[t]."""
    heading = "Held-out steps with large changes: the next frame and its prediction"
    part.suptitle(heading, fontsize=11)
    frames, predicted = seen.frames / 255, seen.predicted / 255
    shown = (*past_heads(frames.shape[1] - 1), "o[t+1]: truth", "o[t+1]: predicted")
    heads = (*shown, "error: predicted", "error: o[t] again")
    errors = np.square(np.stack([predicted, frames[:, -2]], 1) - frames[:, -1:]).mean(-1)
    rows = part.subplots(len(frames), len(heads), squeeze=False)
    for ax, head in zip(rows[0], heads, strict=True):
        ax.set_title(head, fontsize=9)
    for row, axes in enumerate(rows):
        axes[0].set_ylabel(seen.names[row], fontsize=9)
        for ax, image in zip(axes[: len(shown)], (*frames[row], predicted[row]), strict=True):
            show(ax, image)
        for ax, error in zip(axes[len(shown) :], errors[row], strict=True):
            show(ax, np.sqrt(error), cmap="magma", vmin=0, vmax=0.5)
            ax.set_xlabel(f"mean square {error.mean():.4f}", fontsize=8)


def past_heads(count: int) -> tuple[str, ...]:
    """Headings of `count` frames, of which the last is o[t]."""
    return (*(f"o[t-{back}]" for back in range(count - 1, 0, -1)), "o[t]")


def draw_counterfactuals(part: SubFigure, cases: list[Counterfactual]) -> None:
    """Two rows for each case: predictions under each latent action, and their differences."""
    part.suptitle(
        "What if: predictions from the same frames under latent actions of steps with the true action above"
        "\n(below: difference to the mean of these predictions; blue: darker, red: brighter)",
        fontsize=11,
    )
    past = len(cases[0].frames)
    rows = part.subplots(2 * len(cases), past + len(cases[0].names))
    for case, top, bottom in zip(cases, rows[::2], rows[1::2], strict=True):
        predicted = case.predicted / 255
        change = (predicted - predicted.mean(0)).mean(-1)
        for ax, image in zip(top, (*case.frames, *predicted), strict=True):
            show(ax, image)
        for ax, head in zip(top, (*past_heads(past), *case.names), strict=True):
            ax.set_title(head, fontsize=9)
        for ax, image in zip(bottom[past:], change, strict=True):
            show(ax, image, cmap="bwr", vmin=-0.3, vmax=0.3)
        for ax in bottom[:past]:
            ax.set_axis_off()


# ---------------------------------------------------------------- stage 3


@dataclass(frozen=True)
class Bar:
    """One policy's mean return."""

    policy: str
    label: str
    mean: float
    stderr: float | None
    """Standard error; None if unknown."""


def returns(bars: list[Bar], title: str) -> Figure:
    """Mean returns with their standard errors."""
    figure = new_figure(8.5, 4.6, title)
    ax = figure.subplots()
    for x, bar in enumerate(bars):
        ax.bar(x, bar.mean, 0.7, yerr=bar.stderr, capsize=5, color=COLORS[bar.policy])
        top = bar.mean + (bar.stderr or 0)
        ax.annotate(f"{bar.mean:.2f}", (x, max(top, 0)), (0, 3), textcoords="offset points", ha="center")
    ax.set_xticks(range(len(bars)), [bar.label for bar in bars], fontsize=9)
    ax.set(ylabel="mean return per episode")
    ax.axhline(0, color="black", linewidth=0.8)
    ax.grid(axis="y", alpha=0.3)
    ax.set_axisbelow(True)
    ax.margins(y=0.1)
    return figure


def rl_curves(
    curves: dict[str, list[dict]], labels: dict[str, str], levels: dict[str, float], title: str
) -> Figure:
    """Returns over environment steps, from lines of metrics; `levels` are horizontal lines.

    They are those of the latest training episodes. If a policy was evaluated on the way, they are pale, and
    returns on held-out levels are drawn over them.
    """
    figure = new_figure(7.5, 4.4, title)
    ax = figure.subplots()
    held_out = {policy for policy, lines in curves.items() if any("eval_return_mean" in x for x in lines)}
    for policy, lines in curves.items():
        color, label = COLORS[policy], labels[policy]
        if policy in held_out:
            draw(ax, lines, "train_return", color=color, alpha=0.3, linewidth=1)
            draw(ax, lines, "eval_return_mean", color=color, marker="o", label=f"{label}, held-out levels")
        else:
            draw(ax, lines, "train_return", color=color, marker=".", label=label)
    for policy, level in levels.items():
        ax.axhline(level, color=COLORS[policy], linestyle="--", label=labels[policy])
    ylabel = (
        "mean return (pale: training episodes)" if held_out else "mean return of the latest training episodes"
    )
    ax.set(xlabel="environment steps", ylabel=ylabel)
    ax.xaxis.set_major_formatter("{x:,.0f}")
    ax.grid(alpha=0.3)
    ax.legend(fontsize=9)
    return figure
