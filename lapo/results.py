"""Compare runs: `python results.py --exp main` tabulates and draws all games, seeds, modes and settings.

Reads `<results_dir>/<exp>/<env>/seed<k>/` of one or several experiments and writes, into the folder of the
first one or `--out`,

    results.md, results.json    a row per game, mode and setting; aggregates; what is missing; the commands
    online.*                    returns over env steps, a panel per game
    online_all.*                the same as relative returns, over all games
    labels.*                    returns over the number of labelled frames, a panel per game
    labels_all.*                the same as relative returns, over all games
    final.*                     final returns, a panel per game
    relative.*                  mean and interquartile mean of relative returns, with 95 % intervals

The figures are PNG and PDF files. Keys of the config in which the runs differ become columns. Runs that are
missing, unfinished or damaged are named. results.json also holds what is needed of each finished run, also
those of earlier calls, so that checkpoints may be deleted, or lie on another machine (`--with`). See
docs/results.md.
"""

import argparse
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from lapo.command_line import Parser
from lapo.config import load_config, resolve
from lapo.errors import UserError, run_main
from lapo.games.make import env_spec
from lapo.games.table import GAMES
from lapo.modes import MODES, check_modes
from lapo.reporting import curves, published
from lapo.reporting.aggregate import (
    ENOUGH_SEEDS,
    Curve,
    Row,
    Setting,
    has_references,
    label_curve,
    labels_over_games,
    over_games,
)
from lapo.reporting.comparison import Comparison, label_count, published_return, to_json, to_markdown
from lapo.reporting.curves import Final, Line, Panel
from lapo.reporting.grid import Grid, read_grid
from lapo.reporting.records import read_records, to_records, with_runs_of
from lapo.runs.files import atomic_write, write_json, writing
from lapo.runs.ranks import require_single_process


def main() -> None:
    """Compare the runs that the command line names."""
    require_single_process("results.py")
    compare(parse())


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line. Raises `UserError` for an impossible one."""
    defaults = load_config([])
    parser = Parser(__doc__)
    parser.add_argument(
        "--exp", nargs="+", default=[defaults.exp], metavar="NAME", help=f"experiments ({defaults.exp})"
    )
    parser.add_argument(
        "--env", nargs="+", default=[], metavar="GAME", help="only these games, all of which are expected"
    )
    parser.add_argument(
        "--seeds", nargs="+", default=[], metavar="K", help="only these seeds, all of which are expected"
    )
    parser.add_argument(
        "--modes", nargs="+", default=[], metavar="MODE", help="only these modes, all of which are expected"
    )
    parser.add_argument("--results-dir", default=defaults.results_dir, help="folder of all results")
    parser.add_argument(
        "--with",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        dest="recorded",
        help="also the runs in these results.json, whose checkpoints are elsewhere",
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="where tables and figures go (the first experiment's folder)"
    )
    args = parser.parse_args(argv)
    for name in ("exp", "env", "seeds", "modes"):  # as in launch.sh: 0,1,2
        words = [part for word in getattr(args, name) for part in word.split(",") if part]
        setattr(args, name, list(dict.fromkeys(words)))
    check_modes(args.modes)
    for seed in args.seeds:
        if not seed.isdecimal():
            raise UserError(f"--seeds: '{seed}' is no seed; list some, as in --seeds 0,1,2")
    if not args.exp:
        raise UserError("--exp names no experiment; list some, as in --exp main")
    return args


def read(args: argparse.Namespace) -> Grid:
    """The runs that the command line asks for. Raises `UserError` if there are none."""
    recorded = read_records(args.recorded, args.results_dir)
    others = {found.exp for found in (*recorded.policies, *recorded.stage1)} - set(args.exp)
    if others:
        print(f"--with: left out are the runs of {', '.join(sorted(others))}; add them with --exp")
    return read_grid(args.results_dir, args.exp, args.env, list(map(int, args.seeds)), args.modes, recorded)


def compare(args: argparse.Namespace) -> dict:
    """Write tables and figures, print the tables; returns the content of results.json.

    Raises `UserError` if there is no run, or if the folder cannot be written.
    """
    comparison = Comparison(read(args))
    folder = args.out or resolve(args.results_dir) / args.exp[0]
    with writing(folder, "nothing was changed"):
        folder.mkdir(parents=True, exist_ok=True)
    figures = draw(comparison)
    text, found = to_markdown(comparison, list(figures)), to_json(comparison)
    kept = with_runs_of(comparison.grid, folder / "results.json", args.results_dir)
    found["runs"] = to_records(kept)
    atomic_write(folder / "results.md", lambda path: path.write_text(text, encoding="utf-8"))
    write_json(folder / "results.json", found)
    for name in FIGURES:
        if name in figures:
            save(figures[name], folder / name)
        else:  # one of an earlier call would not show what the tables say
            for kind in ("png", "pdf"):
                (folder / f"{name}.{kind}").unlink(missing_ok=True)
    print(f"{text}\ntables and figures: {folder}")
    return found


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG and PDF; the same figure gives the same bytes."""
    for kind, metadata in (("png", {}), ("pdf", {"CreationDate": None})):
        atomic_write(
            path.with_name(f"{path.name}.{kind}"),
            lambda part, kind=kind, metadata=metadata: figure.savefig(part, format=kind, metadata=metadata),
        )


# ---------------------------------------------------------------- figures


def draw(comparison: Comparison) -> dict[str, Figure]:
    """The figures for which there is something to show, by name."""
    return draw_online(comparison) | draw_labels(comparison) | draw_final(comparison)


def draw_online(comparison: Comparison) -> dict[str, Figure]:
    """Returns over env steps, per game and over games."""
    drawn, every = {}, [curve for found in comparison.curves.values() for curve in found.values()]
    if not every:
        return {}
    kinds = {curve.evaluated for curve in every}
    what = {
        (True,): "mean return on held-out levels",
        (False,): "mean return of the latest training episodes",
    }.get(tuple(kinds), "mean return (held-out levels where evaluated, else training episodes)")
    bands = "bands: ± standard error over seeds"
    panels = []
    for game in comparison.games:
        lines = [
            our_line(comparison, setting, found[game])
            for setting, found in comparison.curves.items()
            if game in found
        ]
        if lines:
            panels.append(Panel(game, [*lines, *papers(published.online(game))], levels(game)))
    title = f"Returns while learning from rewards\n({bands})"
    drawn["online"] = curves.curves(panels, title, "environment steps (log scale)", what)

    lines, counts = [], set()
    for setting in comparison.curves:
        if scaled := comparison.curves_of(setting, scaled=True):
            curve = over_games(list(scaled.values()))
            if len(curve.x):
                lines.append(our_line(comparison, setting, curve, len(scaled)))
                counts.add(len(scaled))
    if lines:
        panel = Panel("", [*lines, *papers(published.online(None))], UNIT_LEVELS)
        title = f"Relative return while learning from rewards, mean over {games_in_words(counts)}\n({bands})"
        ylabel = what.replace("return", "relative return", 1)
        drawn["online_all"] = curves.curves([panel], title, "environment steps (log scale)", ylabel)
    return drawn


def draw_labels(comparison: Comparison) -> dict[str, Figure]:
    """Returns over the number of labels, per game and over games; only if there are several numbers."""
    found: dict[Setting, dict[str, list[Row]]] = {}
    for row in comparison.rows:
        if row.labels is not None:
            found.setdefault(row.setting, {}).setdefault(row.game, []).append(row)
    if len({row.labels for games in found.values() for group in games.values() for row in group}) < 2:
        return {}
    drawn, xlabel, bands = {}, "labelled frames (log scale)", "bands: ± standard error over seeds"
    panels = []
    for game in comparison.games:
        lines = [
            our_line(comparison, setting, curve)
            for setting, games in found.items()
            if game in games and len((curve := label_curve(games[game])).x)
        ]
        if lines:
            panels.append(
                Panel(game, [*lines, *papers(published.offline(published.PAPER, game))], levels(game))
            )
    seeds = {len(row.returns) for games in found.values() for group in games.values() for row in group}
    inner = "; of one seed, over draws or episodes" if 1 in seeds else ""
    title = f"Returns of learning from few labels\n({bands}{inner})"
    drawn["labels"] = curves.curves(panels, title, xlabel, "mean return on held-out levels")

    lines, counts = [], set()
    for setting, games in found.items():
        groups = [group for game, group in games.items() if has_references(game)]
        if groups and (curve := labels_over_games(groups)):
            lines.append(our_line(comparison, setting, curve, len(groups)))
            counts.add(len(groups))
    if lines:
        lines += papers(published.offline(published.PAPER, None))
        lines += papers(published.offline(published.LAPO_PLUS, None), published.LAPO_PLUS)
        title = f"Relative return of learning from few labels, mean over {games_in_words(counts)}\n({bands})"
        ylabel = "mean relative return on held-out levels"
        drawn["labels_all"] = curves.curves([Panel("", lines, UNIT_LEVELS)], title, xlabel, ylabel)
    return drawn


def draw_final(comparison: Comparison) -> dict[str, Figure]:
    """Bars of final returns per game; mean and IQM of relative returns with their intervals."""
    drawn, games = {}, {}
    for row in comparison.rows:
        if row.main:
            names = comparison.names[row.setting] + amount(row.labels, row.env_steps)
            paper = published_return(row)
            variant = comparison.variant(row.setting)
            bar = Final(names, row.setting.mode, row.mean, row.shown_error, variant, paper)
            games.setdefault(row.game, []).append(bar)
    if games:
        title = "Final returns on held-out levels\n(± standard error over seeds; of one seed, see results.md)"
        drawn["final"] = curves.bars(games, title, "mean return per episode")

    shown = [found for found in comparison.aggregates if found.main]
    if shown:
        estimates = [
            (
                comparison.names[found.setting] + amount(found.labels, found.env_steps),
                *(found.setting.mode, comparison.variant(found.setting)),
                {
                    "mean": (found.mean, found.mean_interval),
                    "interquartile mean": (found.iqm, found.iqm_interval),
                },
            )
            for found in shown
        ]
        note = "boxes: 95 % stratified bootstrap intervals"
        if any(found.narrow for found in shown):
            note += f",\ntoo narrow with fewer than {ENOUGH_SEEDS} seeds"
        if any(found.mean_interval is None for found in shown):
            note += "; none where a game has a single seed"
        title = f"Relative returns over {games_in_words({len(found.games) for found in shown})}\n({note})"
        xlabel = "relative return (0: random play, 1: published expert)"
        drawn["relative"] = curves.intervals(estimates, title, xlabel)
    return drawn


FIGURES = "online", "online_all", "labels", "labels_all", "final", "relative"
"""Names of all figures."""
UNIT_LEVELS = {"random": 0.0, "expert": 1.0}


def our_line(comparison: Comparison, setting: Setting, curve: Curve, games: int | None = None) -> Line:
    """A curve under its setting's name, which says over how many `games` it is."""
    label = comparison.names[setting]
    if games is not None:
        label += f" ({games} game{'' if games == 1 else 's'})"
    variant = comparison.variant(setting)
    return Line(label, setting.mode, curve.x, curve.mean, curve.error, variant)


def papers(found: published.Curves, paper: str = published.PAPER) -> list[Line]:
    """Published curves as thin lines."""
    titles = {mode: MODES[mode].title for mode in MODES}
    return [
        Line(
            f"{paper}: {titles.get(mode) or published.EXTRA_TITLES.get(mode, mode)}",
            *(mode, np.array(x), np.array(y)),
            paper=paper,
        )
        for mode, (x, y) in found.items()
    ]


def levels(game: str) -> dict[str, float]:
    """The reference returns of a game, if it has any."""
    if not has_references(game):
        return {}
    return dict(zip(("random", "expert"), env_spec(game).reference_returns, strict=True))


def games_in_words(counts: set[int]) -> str:
    """Over how many games a figure's aggregates are."""
    if counts == {len(GAMES)}:
        return f"all {len(GAMES)} games"
    numbers = " or ".join(map(str, sorted(counts)))
    return f"{numbers} of {len(GAMES)} games"


def amount(labels: int | None, env_steps: int | None) -> str:
    """What a policy was trained with, in short."""
    return f", {label_count(labels)} labels" if labels is not None else f", {env_steps:,} env steps"


if __name__ == "__main__":
    run_main(main)
