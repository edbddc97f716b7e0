"""Stage 1 of many runs: what it learned, by game and setting.

Dimensions: S seeds
"""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from lapo.reporting.aggregate import differing_keys, pools, standard_error
from lapo.reporting.grid import Stage1, game_order
from lapo.reporting.tables import table


def metric(key: str) -> Callable[[Stage1], float | None]:
    """Reads a metric of stage 1, None if it was not measured."""
    return lambda found: found.run.metrics.get(key)


def error_ratio(found: Stage1) -> float | None:
    """The world model's squared error over that of repeating o[t]."""
    error, copying = metric("wm_loss_test")(found), metric("copy_loss_test")(found)
    return error / copying if error is not None and copying else None


def perplexity(found: Stage1) -> float | None:
    """Of the bottleneck; None without one."""
    return metric("perplexity")(found) if found.run.cfg.vq.enabled else None


COLUMNS: dict[str, tuple[Callable[[Stage1], float | None], str]] = {
    "error": (error_ratio, ".3f"),
    "probe": (metric("probe_acc_test"), ".1%"),
    "untrained": (metric("untrained_probe_acc_test"), ".1%"),
    "commonest": (metric("majority_acc_test"), ".1%"),
    "perplexity": (perplexity, ".1f"),
    "PSNR, dB": (metric("psnr_1"), ".1f"),
    "repeating o[t]": (metric("copy_psnr_1"), ".1f"),
    "ΔPSNR, t = 1": (metric("delta_psnr_1"), ".1f"),
    "t = 4": (metric("delta_psnr_4"), ".1f"),
    "read back": (metric("readback_acc"), ".0%"),
    "ceiling": (metric("readback_ceiling"), ".0%"),
    "chance": (metric("readback_chance"), ".0%"),
    "minutes": (lambda found: found.run.seconds / 60, ".1f"),
}
"""Columns: what they show of a run, and the format of numbers."""
NOTE = (
    "On held-out frames, mean ± standard error over the seeds. Error: the world model's squared error over"
    " that of repeating o[t]. Probe: how many true actions are predicted from the latent ones; untrained:"
    " from those of an untrained IDM; commonest: by always naming the commonest. PSNR: of the predicted next"
    " frame. ΔPSNR: what is lost under other latent actions. Read back: true actions named by an observer of"
    " the predictions, mean over the actions; ceiling: by one of the true frames."
)


@dataclass(frozen=True)
class Learned:
    """The stages 1 of all seeds of one game under one setting."""

    game: str
    values: tuple[tuple[str, str], ...]
    """Of the keys of the config in which stages 1 differ."""
    exp: str
    """As `aggregate.Setting.exp`."""
    runs: tuple[Stage1, ...]

    def samples(self, column: str) -> np.ndarray:
        """(S,) values of the seeds that have one, possibly (0,)."""
        found = [COLUMNS[column][0](run) for run in self.runs]
        return np.array([value for value in found if value is not None])

    def cell(self, column: str) -> str:
        """Mean ± standard error in words, empty if there is none."""
        samples, form = self.samples(column), COLUMNS[column][1]
        if not len(samples):
            return ""
        error = standard_error(samples)
        return format(samples.mean(), form) + ("" if error is None else f" ± {format(error, form)}")


def learned(found: list[Stage1]) -> list[Learned]:
    """Stages 1 by game and setting."""
    keys = differing_keys(found)
    equal: dict[tuple, list[Stage1]] = defaultdict(list)
    for run in found:
        equal[tuple((key, run.settings[key]) for key in keys)].append(run)
    groups: dict[tuple, list[Stage1]] = defaultdict(list)
    for values, runs in equal.items():
        names = pools((run.exp, (run.game, run.seed)) for run in runs)
        for run in runs:
            groups[run.game, values, names[run.exp]].append(run)
    rows = [Learned(*place, tuple(group)) for place, group in groups.items()]
    return sorted(rows, key=lambda row: game_order(row.game))


def learned_parts(rows: list[Learned]) -> list[str]:
    """A heading, a table of `rows` and a note; nothing without rows. Empty columns are left out."""
    if not rows:
        return []
    keys = [key for key, _ in rows[0].values]
    head = ["game", *keys, "experiment", "seeds", *COLUMNS]
    body = [
        [
            row.game,
            *(value for _, value in row.values),
            row.exp,
            str(len(row.runs)),
            *map(row.cell, COLUMNS),
        ]
        for row in rows
    ]
    used = [column for column in range(len(head)) if any(line[column] for line in body)]
    cells = [[line[column] for column in used] for line in body]
    return ["## Stage 1", table([head[column] for column in used], cells), NOTE]


def learned_data(row: Learned) -> dict:
    """A row as plain data."""
    means = {column: row.samples(column) for column in COLUMNS}
    return {
        "game": row.game,
        "values": dict(row.values),
        "experiment": row.exp,
        "seeds": [run.seed for run in row.runs],
        "means": {column: float(found.mean()) for column, found in means.items() if len(found)},
        "stderrs": {column: standard_error(found) for column, found in means.items() if len(found)},
    }
