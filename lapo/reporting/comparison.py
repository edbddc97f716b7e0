"""Tables of many runs, as Markdown and as plain data: returns, aggregates, what is missing, commands."""

from dataclasses import asdict

import numpy as np

from lapo.games.table import GAMES
from lapo.modes import MODES
from lapo.reporting import published
from lapo.reporting.aggregate import (
    ENOUGH_SEEDS,
    RESAMPLES,
    Aggregate,
    Curve,
    Row,
    Setting,
    aggregates,
    by_setting,
    differing_keys,
    learning_curve,
    name_settings,
    rows,
    standard_error,
)
from lapo.reporting.commands import commands
from lapo.reporting.grid import Grid, Policy, game_order
from lapo.reporting.learning import learned, learned_data, learned_parts
from lapo.reporting.records import to_records
from lapo.reporting.tables import table

POINTS = 6
"""Columns of the table of returns along the way."""


class Comparison:
    """What is compared, computed once.

    Attributes
        grid        the runs
        keys        keys of the config in which they differ
        groups      the policies of each setting
        names       a name for each setting
        games       games of which there are policies
        rows        final returns, see `Row`
        aggregates  relative returns over games, see `Aggregate`
        learned     what stage 1 learned, see `Learned`
        commands    what trains the runs
        curves      returns over env steps by setting and game
    """

    def __init__(self, grid: Grid):
        self.grid = grid
        self.keys = differing_keys(grid.policies)
        self.groups = by_setting(grid.policies)
        self.names = name_settings(self.groups)
        self.games = sorted({policy.game for policy in grid.policies}, key=game_order)
        self.rows: list[Row] = rows(self.groups)
        self.aggregates: list[Aggregate] = aggregates(self.rows)
        self.learned = learned(grid.stage1)
        self.commands = commands(grid)
        self.curves: dict[Setting, dict[str, Curve]] = {
            setting: found
            for setting in self.groups
            if MODES[setting.mode].plays and (found := self.curves_of(setting))
        }

    def curves_of(self, setting: Setting, *, scaled: bool = False) -> dict[str, Curve]:
        """The learning curve of each game that has one, of relative returns if `scaled`."""
        found = {}
        for game in self.games:
            policies = [policy for policy in self.groups[setting] if policy.game == game]
            if policies and (curve := learning_curve(policies, scaled=scaled)):
                found[game] = curve
        return found

    def variant(self, setting: Setting) -> int:
        """The number of a setting within its mode."""
        return [other for other in self.groups if other.mode == setting.mode].index(setting)


# ---------------------------------------------------------------- Markdown


def to_markdown(comparison: Comparison, figures: list[str]) -> str:
    """All tables; `figures` are the names of the figures beside them."""
    grid = comparison.grid
    parts = [f"# Results of {', '.join(grid.expected)}", "\n".join(progress_lines(grid))]
    parts += ["## Returns on held-out levels"]
    if comparison.rows:
        head, body = return_table(comparison)
        parts += [table(head, body), RETURN_NOTE]
        parts += along_the_way(comparison)
    else:
        parts += ["No policy has been trained to the end and evaluated yet."]
    if comparison.aggregates:
        parts += ["## Relative returns over games", aggregate_table(comparison), aggregate_note(comparison)]
    parts += learned_parts(comparison.learned)
    parts += ["## What is missing", "\n".join(missing_lines(grid))]
    if figures:
        parts += ["## Figures", "\n".join(f"![{name}]({name}.png)" for name in figures)]
    if comparison.commands:
        parts += ["## Commands", "```bash\n" + "\n".join(comparison.commands) + "\n```"]
    return "\n\n".join(parts) + "\n"


RETURN_NOTE = (
    "Return: mean ± standard error over the seeds. With one seed, the brackets hold the standard error over"
    " its episodes or, if greater, over its draws of labels. Relative: 0 is the random policy's mean"
    " return, 1 that of the published expert frames. Paper: return after 4M env steps or with as many labels,"
    " read off its figures. Times are a seed's, on average; a sweep over labels shares its time."
)


def progress_lines(grid: Grid) -> list[str]:
    """How much of each experiment is finished."""
    lines = []
    for exp, (games, seeds, modes) in grid.expected.items():
        done, expected = grid.progress(exp)
        verdict = "complete" if done == expected > 0 else "**not complete**"
        kinds = [(games, "game"), (seeds, "seed"), *([(modes, "mode")] if modes else [])]
        size = " × ".join(f"{len(x)} {kind}{'' if len(x) == 1 else 's'}" for x, kind in kinds)
        lines.append(
            f"- {exp}: {done} of {expected} {'policies' if modes else 'stages 1'} ({size}), {verdict}"
        )
    return lines


def return_table(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the table of final returns; columns that would be empty are left out."""
    exps = any(row.setting.exp for row in comparison.rows)
    keys = [key for key in comparison.keys if key != "stage3.steps"]  # which has a column in any case
    head = ["game", "policy", *keys, "experiment", "labels", "env steps", "frames", "seeds"]
    head += ["return", "relative", "paper", "before stage 3", "stage 3", "device"]
    body = []
    for row in comparison.rows:
        values = dict(row.setting.values)
        scores = row.relative
        paper = published_return(row)
        frames = row.average(lambda policy: policy.frames)
        body.append(
            [
                row.game,
                MODES[row.setting.mode].title,
                *(values.get(key, "") for key in keys),
                row.setting.exp if exps else "",
                *(label_count(row.labels, row.num_labels), count(row.env_steps), count(frames)),
                str(len(row.returns)),
                with_error(row.mean, row.error, row.inner_error),
                "" if scores is None else with_error(float(scores.mean()), standard_error(scores)),
                "" if paper is None else f"{paper:.2f}",
                duration(row.average(earlier_seconds)),
                duration(row.average(lambda policy: policy.stage.seconds)),
                "; ".join(devices(row)),
            ]
        )
    used = [column for column in range(len(head)) if any(line[column] for line in body)]
    return [head[column] for column in used], [[line[column] for column in used] for line in body]


def along_the_way(comparison: Comparison) -> list[str]:
    """A heading and a table of the returns of evaluations during training, where there were any."""
    curves = {
        (game, setting): curve
        for setting, found in comparison.curves.items()
        for game, curve in found.items()
        if curve.evaluated
    }
    if not curves:
        return []
    steps = np.unique(np.concatenate([curve.x for curve in curves.values()]))
    if len(steps) > POINTS:  # evenly on a logarithmic axis
        wanted = np.geomspace(max(steps[0], 1), steps[-1], POINTS)
        steps = np.unique([steps[np.abs(steps - x).argmin()] for x in wanted])
    body = []
    for game, setting in sorted(curves, key=lambda key: game_order(key[0])):
        curve = curves[game, setting]
        points = {x: (y, error) for x, y, error in zip(curve.x, curve.mean, curve.error, strict=True)}
        cells = [
            with_error(points[x][0], None if np.isnan(points[x][1]) else points[x][1]) if x in points else ""
            for x in steps
        ]
        body.append([game, comparison.names[setting], *cells])
    head = ["game", "policy", *(f"{x:,.0f} env steps" for x in steps)]
    return ["## Returns along the way, on held-out levels", table(head, body)]


def aggregate_table(comparison: Comparison) -> str:
    """Mean and IQM of each setting."""
    body = [
        [
            comparison.names[found.setting],
            *(label_count(found.labels), count(found.env_steps)),
            f"{len(found.games)} of {len(GAMES)}",
            "–".join(map(str, sorted({min(found.seeds), max(found.seeds)}))),
            with_interval(found.mean, found.mean_interval),
            with_interval(found.iqm, found.iqm_interval),
        ]
        for found in comparison.aggregates
    ]
    return table(["policy", "labels", "env steps", "games", "seeds", "mean", "IQM"], body)


def aggregate_note(comparison: Comparison) -> str:
    """How the intervals were made, and what they do not cover."""
    found, note = comparison.aggregates, ""
    if any(each.mean_interval for each in found):
        note = (
            f"In brackets: 95 % intervals of the stratified percentile bootstrap ({RESAMPLES:,} resamples;"
            " seeds are drawn within each game). "
        )
    if any(each.narrow for each in found):
        note += (
            f"With fewer than {ENOUGH_SEEDS} seeds of a game they are too narrow; those of two seeds reach"
            " about one standard error to either side. "
        )
    if any(len(each.games) < len(GAMES) for each in found):
        note += f"Aggregates over fewer than the {len(GAMES)} games say nothing about the others. "
    if any(each.mean_interval is None for each in found):
        note += "Where a game has one seed only there is no interval: it takes two seeds of every game. "
    if len({each.games for each in found}) > 1:
        note += "Settings that have other games than the rest cannot be compared with it."
    return note.strip()


def missing_lines(grid: Grid) -> list[str]:
    """A line for each stage that is missing, unfinished, damaged or stale, and for games of others alone."""
    lines = [
        f"- {found.exp}, {found.game}, seed {found.seed}, {found.stage}: {found.detail}"
        for found in grid.missing
    ]
    everywhere = {game for games, _, _ in grid.expected.values() for game in games}
    for exp, (games, _, _) in grid.expected.items():
        if lacking := sorted(everywhere - set(games), key=game_order):
            lines.append(f"- {exp}: no run of {', '.join(lacking)}")
    return lines or ["Nothing."]


def with_error(mean: float, error: float | None, inner: float | None = None) -> str:
    """`1.23 ± 0.45`, or `1.23 (± 0.45)` with another error than that over seeds."""
    text = f"{round(mean, 2) + 0.0:.2f}"  # no -0.00
    if error is not None:
        return f"{text} ± {error:.2f}"
    return text if inner is None else f"{text} (± {inner:.2f})"


def with_interval(value: float, ends: tuple[float, float] | None) -> str:
    """`0.57 [0.51, 0.63]`."""
    text = f"{value:.2f}"
    return text if ends is None else f"{text} [{ends[0]:.2f}, {ends[1]:.2f}]"


def count(value: float | None) -> str:
    """A whole number with separators, empty for None."""
    return "" if value is None else f"{value:,.0f}"


def label_count(labels: int | None, known: float | None = None) -> str:
    """A number of labels; of all labels how many these are, if that is `known`."""
    if labels != 0:
        return count(labels)
    return f"all {known:,.0f}" if known else "all"


def duration(seconds: float | None) -> str:
    """Seconds as a person says them, empty for None."""
    if seconds is None:
        return ""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def earlier_seconds(policy: Policy) -> float | None:
    """Time of the stages that a policy was built on; None if it needs none."""
    return sum(stage.seconds for stage in policy.earlier.values()) if policy.earlier else None


def published_return(row: Row) -> float | None:
    """The paper's return of the row's mode, see `published.final`."""
    return published.final(row.setting.mode, row.game, row.labels, quantised=row.quantised)


def devices(row: Row) -> list[str]:
    """What the seeds' policies were trained on; older checkpoints do not say."""
    return sorted({policy.stage.device or "unknown" for policy in row.policies})


# ---------------------------------------------------------------- plain data


def to_json(comparison: Comparison) -> dict:
    """Everything as plain data."""
    grid = comparison.grid
    experiments = {}
    for exp, (games, seeds, modes) in grid.expected.items():
        done, expected = grid.progress(exp)
        size = {"games": games, "seeds": seeds, "modes": modes}
        experiments[exp] = size | {"finished": done, "expected": expected}
    return {
        "experiments": experiments,
        "keys": comparison.keys,
        "rows": [row_data(row) for row in comparison.rows],
        "aggregates": [
            asdict(found) | {"setting": setting_data(found.setting)} for found in comparison.aggregates
        ],
        "curves": [
            setting_data(setting) | {"game": game} | curve_data(curve)
            for setting, found in comparison.curves.items()
            for game, curve in found.items()
        ],
        "stage1": [learned_data(row) for row in comparison.learned],
        "missing": [asdict(found) for found in grid.missing],
        "commands": comparison.commands,
        "runs": to_records(grid),
    }


def setting_data(setting: Setting) -> dict:
    """A setting as plain data."""
    return {"mode": setting.mode, "values": dict(setting.values), "experiment": setting.exp}


def row_data(row: Row) -> dict:
    """A row as plain data."""
    scores = row.relative
    return setting_data(row.setting) | {
        "game": row.game,
        "labels": row.labels,
        "num_labels": row.num_labels,
        "env_steps": row.env_steps,
        "frames": row.average(lambda policy: policy.frames),
        "experiments": sorted({policy.exp for policy in row.policies}),
        "seeds": [policy.seed for policy in row.policies],
        "returns": row.returns.tolist(),
        "return_mean": row.mean,
        "return_stderr": row.error,
        "single_seed_stderr": row.inner_error,
        "relative_mean": None if scores is None else float(scores.mean()),
        "relative_stderr": None if scores is None else standard_error(scores),
        "published_return": published_return(row),
        "seconds_before_stage_3": row.average(earlier_seconds),
        "seconds_stage_3": row.average(lambda policy: policy.stage.seconds),
        "devices": devices(row),
    }


def curve_data(curve: Curve) -> dict:
    """A learning curve as plain data; None where no standard error is known."""
    error = [None if np.isnan(x) else x for x in curve.error.tolist()]
    return {
        "evaluated": curve.evaluated,
        "env_steps": curve.x.tolist(),
        "return_mean": curve.mean.tolist(),
        "return_stderr": error,
    }
