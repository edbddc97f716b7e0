"""Statistics of many runs: over seeds, over games, over draws of labels.

Dimensions: S seeds · G games · X points of a curve
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby

import numpy as np
from scipy import stats

from lapo.errors import UserError
from lapo.games.make import relative_return
from lapo.modes import MODES
from lapo.reporting.grid import Policy, Stage1, evaluations, game_order
from lapo.reporting.summary import error_of_draws

CONFIDENCE = 0.95
RESAMPLES = 9999
"""Of the bootstrap."""
ENOUGH_SEEDS = 5
"""Seeds of each game from which on the intervals are shown without a warning."""

Statistic = Callable[..., np.ndarray]
"""Of one array (…, S) per game and an `axis`, as `scipy.stats.bootstrap` calls it."""


@dataclass(frozen=True)
class Setting:
    """What is compared: a mode under one choice of the keys in which runs differ."""

    mode: str
    values: tuple[tuple[str, str], ...]
    """Keys and values, of the keys that matter to the mode and differ between its runs or other modes'."""
    exp: str
    """Its experiments; empty, unless others repeat its seeds under the same settings, see `pools`."""


@dataclass(frozen=True)
class Row:
    """The final returns of all seeds of one game under one setting, with one number of labels."""

    game: str
    setting: Setting
    labels: int | None
    """0: all."""
    env_steps: int | None
    main: bool
    """Whether `labels` stands for the run, see `own_labels`; the others are points of its curve."""
    policies: tuple[Policy, ...]
    returns: np.ndarray
    """(S,) mean returns, each over the seed's draws of labels."""
    inner_error: float | None
    """Of a single seed, see `summary.error_of_draws`."""

    @property
    def mean(self) -> float:
        """Mean return over the seeds."""
        return float(self.returns.mean())

    @property
    def error(self) -> float | None:
        """Standard error over the seeds, see `standard_error`."""
        return standard_error(self.returns)

    @property
    def shown_error(self) -> float | None:
        """Standard error over the seeds or, of a single one, `inner_error`."""
        return self.inner_error if self.error is None else self.error

    @property
    def num_labels(self) -> float | None:
        """`labels` or, where these are all, how many there are; None if that is unknown."""
        counts = [
            entry["labels"]
            for policy in self.policies
            for entry in results(policy)[self.labels]
            if entry.get("all")
        ]
        return self.labels or (float(np.mean(counts)) if counts else None)

    @property
    def quantised(self) -> bool:
        """Whether stages 1 and 2 had a quantiser, if the mode builds on them."""
        return all(policy.settings.get("vq.enabled") != "false" for policy in self.policies)

    @property
    def relative(self) -> np.ndarray | None:
        """(S,) relative returns; None for a game without reference returns."""
        return relative(self.game, self.returns)

    def average(self, value: Callable[[Policy], float | None]) -> float | None:
        """Mean of `value` over the seeds that have one."""
        values = [x for policy in self.policies if (x := value(policy)) is not None]
        return sum(values) / len(values) if values else None


@dataclass(frozen=True)
class Aggregate:
    """Relative returns of one setting over all its games."""

    setting: Setting
    labels: int | None
    env_steps: int | None
    main: bool
    """As `Row.main`, in any game."""
    games: tuple[str, ...]
    seeds: tuple[int, ...]
    """How many seeds each game has."""
    mean: float
    mean_interval: tuple[float, float] | None
    iqm: float
    iqm_interval: tuple[float, float] | None

    @property
    def narrow(self) -> bool:
        """Whether the intervals are too narrow: resampled, n seeds have (n - 1) / n of their variance."""
        return self.mean_interval is not None and min(self.seeds) < ENOUGH_SEEDS


@dataclass(frozen=True)
class Curve:
    """A mean over seeds or games at points along x (X,), with its standard error; NaN where unknown."""

    x: np.ndarray
    mean: np.ndarray
    error: np.ndarray
    evaluated: bool = False
    """Whether the values are returns on held-out levels, not those of training episodes."""


def standard_error(values: np.ndarray) -> float | None:
    """Standard error of the mean of `values` (S,); None if there is only one."""
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None


def relative(game: str, returns: np.ndarray) -> np.ndarray | None:
    """`returns` scaled such that random play has 0 and the published expert 1; None without references."""
    with suppress(UserError):  # a game of one's own whose module is not there
        scaled = relative_return(game, returns)
        return None if scaled is None else np.asarray(scaled)
    return None


def has_references(game: str) -> bool:
    """Whether a game's relative returns are known."""
    return relative(game, np.zeros(1)) is not None


# ---------------------------------------------------------------- settings


def differing_keys(runs: Iterable[Policy | Stage1]) -> list[str]:
    """The keys of the config in which runs differ, among those that have the key."""
    found: dict[str, set[str]] = defaultdict(set)
    for run in runs:
        for key, value in run.settings.items():
            found[key].add(value)
    return [key for key, values in found.items() if len(values) > 1]


def by_setting(policies: Sequence[Policy]) -> dict[Setting, list[Policy]]:
    """The policies of each setting, in the order of the modes.

    Seeds may come from several experiments; where these repeat a seed, they are several settings: `pools`.
    """
    keys = differing_keys(policies)
    grouped: dict[Setting, list[Policy]] = defaultdict(list)
    for mode in MODES:
        of_mode = [policy for policy in policies if policy.mode == mode]

        def values(policy: Policy) -> tuple[tuple[str, str], ...]:
            return tuple((key, policy.settings[key]) for key in keys if key in policy.settings)

        equal: dict[tuple, list[Policy]] = defaultdict(list)
        for policy in of_mode:
            equal[values(policy)].append(policy)
        for chosen, group in equal.items():
            runs = [
                (policy.exp, (policy.game, policy.seed, labels))
                for policy in group
                for labels in results(policy) or [policy.labels]
            ]
            names = pools(runs)
            for policy in group:
                grouped[Setting(mode, chosen, names[policy.exp])].append(policy)
    return dict(grouped)


def pools(runs: Iterable[tuple[str, tuple]]) -> dict[str, str]:
    """The pool of each experiment, named by its experiments; "" if there is one pool alone.

    `runs` are experiments and what they ran. An experiment joins the first pool that has none of its runs.
    """
    by_exp: dict[str, set[tuple]] = defaultdict(set)
    for exp, run in runs:
        by_exp[exp].add(run)
    found: list[tuple[list[str], set[tuple]]] = []
    for exp, own in by_exp.items():
        members, taken = next((pool for pool in found if not pool[1] & own), ([], set()))
        if not members:
            found.append((members, taken))
        members.append(exp)
        taken |= own
    return {exp: " + ".join(members) if len(found) > 1 else "" for members, _ in found for exp in members}


def name_settings(groups: dict[Setting, list[Policy]]) -> dict[Setting, str]:
    """A name for each setting: its mode and, where these differ within the mode, its values.

    Where settings differ in more than two keys, their experiments name them, if that tells them apart.
    """
    settings, names, many = list(groups), {}, set()
    exps = {
        setting: " + ".join(dict.fromkeys(policy.exp for policy in policies))
        for setting, policies in groups.items()
    }
    for setting in settings:
        others = [other for other in settings if other.mode == setting.mode]
        differing = [
            f"{key} {value}"
            for key, value in setting.values
            if value and any(dict(other.values).get(key) != value for other in others)
        ]
        names[setting] = ", ".join([MODES[setting.mode].title, *differing, *filter(None, [setting.exp])])
        if len(differing) > 2:
            many.add(setting.mode)
    for mode in many:
        of_mode = [setting for setting in settings if setting.mode == mode]
        if len({exps[setting] for setting in of_mode}) == len(of_mode):
            names |= {setting: f"{MODES[mode].title}, {exps[setting]}" for setting in of_mode}
    return names


# ---------------------------------------------------------------- final returns


def rows(groups: dict[Setting, list[Policy]]) -> list[Row]:
    """A row for each game, setting and number of labels or env steps, of finished policies."""
    found: list[Row] = []
    for setting, policies in groups.items():
        # By game, labels, env steps: per seed, its returns and their errors
        cells: dict[tuple, list[tuple[Policy, list[float], list[float | None]]]] = defaultdict(list)
        for policy in policies:
            if policy.finished:
                for labels, entries in results(policy).items():
                    means = [entry["return_mean"] for entry in entries]
                    errors = [entry.get("return_stderr") for entry in entries]
                    cells[policy.game, labels, policy.env_steps].append((policy, means, errors))
        for (game, labels, env_steps), seeds in cells.items():
            inner_error = None
            if len(seeds) == 1:
                _, means, errors = seeds[0]
                inner_error = error_of_draws(means, errors)
            found.append(
                Row(
                    *(game, setting, labels, env_steps),
                    main=any(labels == own_labels(policy) for policy, _, _ in seeds),
                    policies=tuple(policy for policy, _, _ in seeds),
                    returns=np.array([np.mean(means) for _, means, _ in seeds]),
                    inner_error=inner_error,
                )
            )
    modes = list(MODES)
    found.sort(
        key=lambda row: (
            game_order(row.game),
            modes.index(row.setting.mode),
            row.labels or math.inf,  # all of them last
            row.env_steps or 0,
        )
    )
    return found


def results(policy: Policy) -> dict[int | None, list[dict]]:
    """The evaluations of a policy by number of labels, 0 for all: one, or one per draw of a sweep."""
    found: dict[int | None, list[dict]] = defaultdict(list)
    for entry in evaluations(policy.stage.metrics):
        if entry is not policy.stage.metrics:
            found[0 if entry.get("all") else entry["labels"]].append(entry)
        elif policy.labels not in found:  # else, the run's own number is among the sweep's
            found[policy.labels].append(entry)
    return dict(found)


def own_labels(policy: Policy) -> int | None:
    """The number of labels that stands for the run: its own or, if a sweep lacks that, its largest."""
    found = results(policy)
    return policy.labels if policy.labels in found else 0 if 0 in found else max(found)


# ---------------------------------------------------------------- over games


def aggregates(found: list[Row]) -> list[Aggregate]:
    """Mean and IQM of relative returns, one for each setting and number of labels or env steps."""

    def cell(row: Row) -> tuple:
        labels = row.labels or math.inf
        return (list(MODES).index(row.setting.mode), repr(row.setting), labels, row.env_steps or 0)

    made = []
    for _, group in groupby(sorted(found, key=cell), key=cell):
        scored = [(row, scores) for row in group if (scores := row.relative) is not None]
        if not scored:
            continue
        first, samples = scored[0][0], [scores for _, scores in scored]
        made.append(
            Aggregate(
                *(first.setting, first.labels, first.env_steps),
                main=any(row.main for row, _ in scored),
                games=tuple(row.game for row, _ in scored),
                seeds=tuple(map(len, samples)),
                mean=float(mean_over_games(*samples)),
                mean_interval=interval(samples, mean_over_games),
                iqm=float(iqm(*samples)),
                iqm_interval=interval(samples, iqm),
            )
        )
    return made


def mean_over_games(*samples: np.ndarray, axis: int = -1) -> np.ndarray:
    """Mean over games of each game's mean over its seeds; arrays (…, S), one per game."""
    return np.mean([np.mean(scores, axis=axis) for scores in samples], axis=0)


def iqm(*samples: np.ndarray, axis: int = -1) -> np.ndarray:
    """Interquartile mean over all seeds of all games: a quarter at either end is left out.

    Agarwal et al., Deep reinforcement learning at the edge of the statistical precipice, NeurIPS 2021.
    """
    return stats.trim_mean(np.concatenate(samples, axis=axis), 0.25, axis=axis)


def interval(samples: list[np.ndarray], statistic: Statistic, seed: int = 0) -> tuple[float, float] | None:
    """95 % interval of a statistic by the stratified percentile bootstrap: seeds are drawn within each game.

    `samples` are one array (S,) per game. None if a game has one seed only: nothing varies there.
    """
    if min(map(len, samples)) < 2:
        return None
    found = stats.bootstrap(
        samples,
        statistic,
        n_resamples=RESAMPLES,
        vectorized=True,
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


# ---------------------------------------------------------------- curves


def learning_curve(policies: list[Policy], *, scaled: bool = False) -> Curve | None:
    """Mean return over env steps of the seeds of one game and setting, as relative return if `scaled`.

    Returns on held-out levels, the final ones included, of the seeds that were evaluated along the way or, if
    none was, those of training episodes. At every step, the mean is over the seeds that have come so far.
    None if there is nothing yet.
    """
    for key in ("eval_return_mean", "train_return"):
        seeds = [
            np.array([(line["step"], line[key]) for line in policy.stage.lines if key in line], dtype=float)
            for policy in policies
        ]
        if key == "eval_return_mean":
            if not any(map(len, seeds)):
                continue
            pairs = zip(seeds, policies, strict=True)
            seeds = [with_final(points, policy) for points, policy in pairs if len(points)]
        seeds = [points.T for points in seeds if len(points)]
        if not seeds:
            return None
        x = np.unique(np.concatenate([steps for steps, _ in seeds]))
        values = np.array([within(x, steps, returns) for steps, returns in seeds])
        if scaled:
            values = relative(policies[0].game, values)
            if values is None:
                return None
        return Curve(x, *mean_and_error(values), evaluated=key == "eval_return_mean")
    return None


def with_final(points: np.ndarray, policy: Policy) -> np.ndarray:
    """Points (X, 2) of steps and returns, with those of the evaluation at the end if it has been done."""
    if not policy.finished:
        return points
    return np.vstack([points, (policy.stage.steps, policy.stage.metrics["return_mean"])])


def within(x: np.ndarray, steps: np.ndarray, values: np.ndarray) -> np.ndarray:
    """`values` at `steps`, interpolated at `x` (X,); NaN before the first step and after the last."""
    return np.interp(x, steps, values, left=np.nan, right=np.nan)


def mean_and_error(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard error (X,) over the seeds of `values` (S, X) that are not NaN; NaN if unknown."""
    known = ~np.isnan(values)
    count = known.sum(0)
    mean = np.where(known, values, 0).sum(0) / np.maximum(count, 1)
    spread = (np.where(known, values - mean, 0) ** 2).sum(0) / np.maximum(count - 1, 1)
    return np.where(count, mean, np.nan), np.where(count > 1, np.sqrt(spread / np.maximum(count, 1)), np.nan)


def over_games(curves: list[Curve]) -> Curve:
    """Mean over games where every game has a value; its error is that of the seeds, games being fixed.

    With standard errors e_g of G games, that is √(Σ e_g²) / G.
    """
    x = np.unique(np.concatenate([curve.x for curve in curves]))
    means = np.array([within(x, curve.x, curve.mean) for curve in curves])
    errors = np.array([within(x, curve.x, curve.error) for curve in curves])
    known = ~np.isnan(means).any(0)
    error = np.sqrt((errors**2).sum(0)) / len(curves)
    evaluated = all(curve.evaluated for curve in curves)
    return Curve(x[known], means.mean(0)[known], error[known], evaluated)


def label_curve(group: list[Row], *, scaled: bool = False) -> Curve:
    """Mean return over the number of labels of one game's rows, as relative return if `scaled`.

    The errors are those over seeds or, with a single one, `Row.inner_error`; relative returns have none then.
    Rows of all labels are left out if their number is unknown.
    """
    group = sorted((row for row in group if row.num_labels), key=lambda row: row.num_labels)
    values = [row.relative if scaled else row.returns for row in group]
    errors = [standard_error(scores) for scores in values] if scaled else [row.shown_error for row in group]
    return Curve(
        np.array([row.num_labels for row in group], dtype=float),
        np.array([scores.mean() for scores in values]),
        np.array([np.nan if error is None else error for error in errors]),
        evaluated=True,
    )


def labels_over_games(groups: list[list[Row]]) -> Curve | None:
    """Mean relative return of games' rows, at the numbers of labels that all games have; None without any.

    All labels are another number in each game, and left out.
    """
    shared = set.intersection(*({row.labels for row in group if row.labels} for group in groups))
    if not shared:
        return None
    return over_games(
        [label_curve([row for row in group if row.labels in shared], scaled=True) for group in groups]
    )
