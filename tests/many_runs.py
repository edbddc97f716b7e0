"""Runs of whole experiments, written as the stages do, with made-up numbers."""

from pathlib import Path

import torch

from lapo import results
from lapo.config import load_config
from lapo.modes import MODES
from lapo.reporting.comparison import Comparison, to_json, to_markdown
from lapo.reporting.grid import Grid, read_grid
from lapo.runs.run import Run
from support import CPU

ONLINE = [(1000, {"train_return": 2.0}), (4000, {"train_return": 5.0})]


class Runs:
    """Writes runs as the stages do, with made-up numbers."""

    def __init__(self, folder: Path):
        self.folder = folder

    def write(
        self, exp, game, seed, stage, result=None, *, options=(), lines=(), built_on=None, took=0
    ) -> Run:
        """A stage's run, finished if there is a `result`; it `took` so many seconds."""
        words = ["--results_dir", str(self.folder), "--exp", exp, "--env", game, "--seed", str(seed)]
        words += ["--data_dir", str(self.folder / "no data"), "--preset", "demo", "--exp", exp]
        if stage.startswith("stage3_"):
            words += ["--stage3.mode", stage.removeprefix("stage3_")]
        run = Run(load_config([*words, *options]), stage, ("stage3",), CPU, built_on)
        run._started -= took
        for step, values in lines:
            run.log(step, values)
        run.step = lines[-1][0] if lines else 7
        state = {"policy": {"weight": torch.full((2,), float(seed))}, "idm": {}}
        if result is None:
            run.save(state)
            run._lock.close()
        else:
            run.finish(state, result)
        return run

    def policy(self, exp, game, seed, mode, mean, *, stderr=0.25, options=(), **rest) -> None:
        """A finished policy; `rest` may hold `lines`, or more of the result."""
        lines = rest.pop("lines", ONLINE if MODES[mode].plays else ())
        result = {"return_mean": mean, "return_stderr": stderr, "episodes": 8} | rest
        self.write(exp, game, seed, f"stage3_{mode}", result, options=options, lines=lines)

    def stages(self, exp, game, seed, *options) -> None:
        """Finished stages 1 and 2."""
        for stage in ("stage1", "stage2"):
            self.write(exp, game, seed, stage, {}, options=options)

    def grid(self, *exps: str) -> Grid:
        return read_grid(str(self.folder), list(exps), [], [], [])

    def compare(self, *words: str) -> dict:
        """The tables as plain data; `text` has them as Markdown."""
        args = results.parse(["--results_dir", str(self.folder), *words])
        comparison = Comparison(results.read(args))
        self.text = to_markdown(comparison, [])
        return to_json(comparison)


def row(found: dict, **wanted) -> dict:
    """The one row with these values."""
    rows = [row for row in found["rows"] if all(row[key] == value for key, value in wanted.items())]
    assert len(rows) == 1
    return rows[0]


def line_of(text: str, *words: str) -> list[str]:
    """The cells of the one table line that holds all words."""
    lines = [line for line in text.splitlines() if line[:1] == "|" and all(word in line for word in words)]
    assert len(lines) == 1
    return [cell.strip() for cell in lines[0].strip("|").split("|")]


def missing(found: dict) -> dict[tuple, str]:
    return {(each["game"], each["seed"], each["stage"]): each["state"] for each in found["missing"]}


def learned(error: float, probe: float) -> dict:
    """Some of stage 1's metrics."""
    return {"wm_loss_test": error, "copy_loss_test": 0.5, "probe_acc_test": probe, "perplexity": 8.0}
