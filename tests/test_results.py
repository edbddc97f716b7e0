"""results.py: whole experiments in tables and figures, among them missing, unfinished and damaged runs."""

import json
import math
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from lapo import results
from lapo.config import load_config
from lapo.games.table import GAMES
from lapo.modes import MODES
from lapo.reporting import aggregate, published
from lapo.reporting.aggregate import (
    Curve,
    interval,
    iqm,
    learning_curve,
    mean_over_games,
    over_games,
)
from lapo.reporting.comparison import Comparison, commands, to_json, to_markdown
from lapo.reporting.grid import Grid, read_grid
from lapo.runs.checkpoints import load_checkpoint, weights_checksum
from lapo.runs.files import write_json
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


@pytest.fixture
def runs(tmp_path, monkeypatch) -> Runs:
    monkeypatch.setattr(aggregate, "RESAMPLES", 199)  # fast; the intervals have tests of their own
    return Runs(tmp_path)


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


# ---------------------------------------------------------------- statistics


def naive_iqm(values: list[float]) -> float:
    values = sorted(values)
    cut = len(values) // 4
    kept = values[cut : len(values) - cut]
    return sum(kept) / len(kept)


def test_iqm_by_hand():
    samples = [np.array([50.0, 0.0, 1.0]), np.array([2.0, 10.0]), np.array([1.0, 4.0, 0.0])]
    # sorted: 0 0 | 1 1 2 4 | 10 50
    assert float(iqm(*samples)) == 2.0
    assert float(mean_over_games(*samples)) == pytest.approx((17 + 6 + 5 / 3) / 3)


@pytest.mark.parametrize("statistic", [iqm, mean_over_games])
def test_intervals_equal_those_of_a_naive_loop(statistic):
    rng = np.random.default_rng(1)
    samples = [rng.normal(game, 1 + game, size=3 + game) for game in range(3)]

    def naive(drawn: list[list[float]]) -> float:
        if statistic is iqm:
            return naive_iqm([x for scores in drawn for x in scores])
        return sum(sum(scores) / len(scores) for scores in drawn) / len(drawn)

    values = sorted(
        naive([[scores[rng.integers(len(scores))] for _ in scores] for scores in samples])
        for _ in range(10_000)
    )
    low, high = interval(samples, statistic)
    assert low == pytest.approx(values[249], abs=0.06)
    assert high == pytest.approx(values[9749], abs=0.06)
    assert interval(samples, statistic) == (low, high)  # the random numbers are fixed


def test_seeds_are_resampled_within_their_game():
    """Games that differ without any variation between seeds leave nothing uncertain."""
    assert interval([np.zeros(3), np.ones(3)], mean_over_games) == (0.5, 0.5)


def test_one_seed_has_no_interval():
    assert interval([np.array([0.1, 0.2]), np.array([0.3])], mean_over_games) is None


def test_a_curve_over_games_has_the_error_of_fixed_games():
    a = Curve(np.array([1.0, 3.0]), np.array([0.0, 4.0]), np.array([3.0, 3.0]))
    b = Curve(np.array([1.0, 2.0]), np.array([2.0, 2.0]), np.array([4.0, 4.0]))
    both = over_games([a, b])
    assert both.x.tolist() == [1, 2]  # b ends at 2
    assert both.mean.tolist() == [1, 2]
    assert both.error.tolist() == [2.5, 2.5]


# ---------------------------------------------------------------- rows


def test_mean_and_standard_error_over_seeds(runs):
    for seed, mean in enumerate((1.0, 2.0, 6.0)):
        runs.policy("a", "maze", seed, "scratch", mean)
    found = row(runs.compare("--exp", "a"), mode="scratch")
    assert found["return_mean"] == 3
    assert found["return_stderr"] == pytest.approx(math.sqrt(7 / 3))
    game = GAMES["maze"]
    span = game.expert_return - game.random_return
    assert found["relative_mean"] == pytest.approx((3 - game.random_return) / span)
    assert found["relative_stderr"] == pytest.approx(math.sqrt(7 / 3) / span)
    assert (found["seeds"], found["env_steps"], found["labels"]) == ([0, 1, 2], 32768, None)
    assert found["published_return"] == 7.45
    assert found["devices"] == [str(CPU)]
    cells = line_of(runs.text, "| maze", "PPO from scratch")
    assert {"3.00 ± 1.53", "3", "32,768", "7.45", str(CPU)} <= set(cells)


def test_the_error_of_a_single_seed_is_bracketed_and_no_interval_is_claimed(runs):
    runs.policy("a", "maze", 0, "scratch", 5.0)
    found = runs.compare("--exp", "a")
    assert row(found, mode="scratch")["return_stderr"] is None
    assert found["aggregates"][0]["mean_interval"] is None
    text = runs.text
    assert "5.00 (± 0.25)" in text
    assert "it takes two seeds of every game" in text
    assert "1 of 16" in text


def test_aggregates_are_over_games(runs):
    for game in ("maze", "heist"):
        for seed in (0, 1):
            runs.policy("a", game, seed, "scratch", 5.0 + seed)
    found = runs.compare("--exp", "a")
    (over,) = found["aggregates"]
    scores = [
        [(5 + seed - GAMES[game].random_return) / (GAMES[game].expert_return - GAMES[game].random_return)]
        for game in ("heist", "maze")
        for seed in (0, 1)
    ]
    assert over["games"] == ("heist", "maze")
    assert over["mean"] == pytest.approx(np.mean(scores))
    low, high = over["mean_interval"]
    assert low < over["mean"] < high
    assert "2 of 16" in runs.text
    assert "say nothing about the others" in runs.text


def test_keys_in_which_runs_differ_become_columns(runs):
    """A sweep over the learning rate of stage 1, whose value the policies' own configs do not hold."""
    for exp, lr in (("low", "1e-4"), ("high", "3e-4")):
        runs.stages(exp, "maze", 0, "--stage1.lr", lr)
        runs.policy(exp, "maze", 0, "offline", 5.0 if exp == "low" else 7.0)
    found = runs.compare("--exp", "low", "high")
    assert found["keys"] == ["stage1.lr"]
    assert [(row["values"]["stage1.lr"], row["return_mean"]) for row in found["rows"]] == [
        ("0.0001", 5.0),
        ("0.0003", 7.0),
    ]
    text = runs.text
    assert "stage1.lr" in line_of(text, "| game", "return")
    assert "0.0003" in line_of(text, "| maze", "7.00")
    assert "LAPO offline, stage1.lr 0.0003" in text


def test_seeds_of_several_experiments_are_pooled_unless_they_repeat(runs):
    runs.policy("a", "maze", 0, "bc", 4.0)
    runs.policy("b", "maze", 1, "bc", 6.0)
    assert row(runs.compare("--exp", "a", "b"), mode="bc")["seeds"] == [0, 1]
    runs.policy("b", "maze", 0, "bc", 8.0)
    found = runs.compare("--exp", "a", "b")
    assert {(row["experiment"], row["return_mean"]) for row in found["rows"]} == {("a", 4.0), ("b", 7.0)}


def test_a_number_of_labels_that_a_sweep_and_a_run_share_is_no_second_seed(runs):
    sweep = [{"labels": 64, "draw": 0, "return_mean": 1.0}]
    runs.policy("main", "maze", 0, "bc", 2.0, sweep=sweep)
    runs.policy("few", "maze", 0, "bc", 3.0, options=["--offline.labels", "64"])
    found = runs.compare("--exp", "main", "few")
    assert {(row["experiment"], row["labels"], row["return_mean"]) for row in found["rows"]} == {
        ("main", 64, 1.0),
        ("main", 256, 2.0),
        ("few", 64, 3.0),
    }


def test_runs_of_other_lengths_are_no_seeds_of_one_curve(runs):
    """Their learning rates fall at other steps."""
    for seed, (steps, end) in enumerate([(32768, 5.0), (65536, 9.0)]):
        lines = [(1000, {"train_return": 1.0}), (4000, {"train_return": end})]
        runs.policy("a", "maze", seed, "scratch", end, options=["--stage3.steps", str(steps)], lines=lines)
    found = runs.compare("--exp", "a")
    assert sorted(curve["return_mean"] for curve in found["curves"]) == [[1, 5], [1, 9]]
    assert "stage3.steps" not in line_of(runs.text, "| game", "return", "env steps")
    assert line_of(runs.text, "| PPO from scratch, stage3.steps 65536")


def test_all_labels_of_a_sweep_are_compared_over_games(runs):
    """There are another number of them in each game."""
    for game, labels in (("maze", 1000), ("heist", 2000)):
        sweep = [
            {"labels": 64, "draw": 0, "return_mean": 3.0},
            {"labels": labels, "all": True, "draw": 0, "return_mean": 6.0},
        ]
        runs.policy("a", game, 0, "bc", 5.0, sweep=sweep)
    found = runs.compare("--exp", "a")
    assert [(each["labels"], each["games"]) for each in found["aggregates"]] == [
        (labels, ("heist", "maze")) for labels in (64, 256, 0)
    ]
    assert row(found, game="heist", labels=0)["num_labels"] == 2000
    assert "all 2,000" in line_of(runs.text, "| heist", "6.00")
    assert line_of(runs.text, "| behaviour cloning", "| all ", "2 of 16")
    figures = results.draw(Comparison(runs.grid("a")))
    for ax, labels in zip(figures["labels"].axes, (2000, 1000), strict=True):
        ours = next(line for line in ax.lines if line.get_label() == "behaviour cloning")
        assert ours.get_xdata().tolist() == [64, 256, labels]
    (ax,) = figures["labels_all"].axes
    ours = next(line for line in ax.lines if line.get_label().startswith("behaviour cloning"))
    assert ours.get_xdata().tolist() == [64, 256]


def test_without_a_quantiser_the_paper_has_no_return_per_game(runs):
    for mode in ("online", "no_sl", "scratch"):
        runs.policy("a", "maze", 0, mode, 5.0, options=["--vq.enabled", "false"])
    found = runs.compare("--exp", "a")
    assert {row["mode"]: row["published_return"] for row in found["rows"]} == {
        "online": None,
        "no_sl": None,
        "scratch": 7.45,
    }


def test_what_stage_1_was_trained_with_counts_not_what_stage_3_was_called_with(runs):
    """Stage 3 alone was started with the preset's defaults."""
    stage1 = ["--model.wm_width", "16", "--data.train_chunks", "3", "--data_dir", "elsewhere"]
    for stage in ("stage1", "stage2"):
        runs.write("base", "maze", 0, stage, {}, options=stage1)
    for mode in ("no_sl", "offline"):
        runs.policy("a", "maze", 0, mode, 5.0, options=["--stages_from", "base"])
    found = {policy.mode: policy.settings for policy in runs.grid("a").policies}
    no_sl, offline = found["no_sl"], found["offline"]
    assert offline["model.wm_width"] == no_sl["model.wm_width"] == "16"
    assert (no_sl["data.train_chunks"], no_sl["data_dir"]) == ("3", "elsewhere")
    chunks, folder = load_config(["--preset", "demo"]).data.train_chunks, runs.folder / "no data"
    assert offline["data.train_chunks"] == f"3, labels {chunks}"
    assert offline["data_dir"] == f"elsewhere, labels {folder}"


def test_only_keys_on_which_a_mode_depends_split_its_seeds(runs):
    changes = {
        "scratch": ("--ppo.lr", "0.5", "--ppo.policy_head.peak", "2"),
        "idm_labelling": ("--vq.decay", "0.5", "--vq.enabled", "false"),
    }
    for mode, options in changes.items():
        runs.policy("a", "maze", 0, mode, 5.0)
        runs.policy("a", "maze", 1, mode, 5.0, options=options)
    assert runs.compare("--exp", "a")["keys"] == []
    changes = {
        "scratch": ("ppo.scratch_lr", "0.5"),
        "no_sl": ("ppo.policy_head.peak", "2.0"),
        "ilpo": ("model.wm_width", "32"),
        "idm_labelling": ("model.idm_scale", "3"),
    }
    for mode, (key, value) in changes.items():
        runs.policy("b", "maze", 0, mode, 5.0)
        runs.policy("b", "maze", 1, mode, 5.0, options=[f"--{key}", value])
        found = runs.compare("--exp", "b", "--modes", mode)
        assert found["keys"] == [key]
        assert [row["values"][key] for row in found["rows"]].count(value) == 1


def test_a_sweep_over_labels_is_a_row_per_number_and_averages_draws_first(runs):
    for seed, shift in ((0, 0.0), (1, 2.0)):
        sweep = [
            {"labels": labels, "draw": draw, "return_mean": math.log2(labels) + shift + draw}
            for labels in (16, 64)
            for draw in (0, 1)
        ]
        runs.policy("a", "maze", seed, "bc", 3.0 + shift, sweep=sweep)
    found = runs.compare("--exp", "a")
    assert [row["labels"] for row in found["rows"]] == [16, 64, 256]
    assert row(found, labels=64)["return_mean"] == 7.5  # 6 + mean of 0 and 1 + mean of 0 and 2
    assert row(found, labels=64)["return_stderr"] == 1
    assert row(found, labels=256)["return_mean"] == 4  # the run's own number, which the sweep lacks
    figures = results.draw(Comparison(runs.grid("a")))
    assert set(figures) == {"labels", "labels_all", "final", "relative"}
    ours = next(line for line in figures["labels"].axes[0].lines if line.get_label() == "behaviour cloning")
    assert ours.get_xydata().tolist() == [[16, 5.5], [64, 7.5], [256, 4]]


def test_a_sweep_without_the_runs_own_number_is_shown_by_its_largest(runs):
    sweep = [{"labels": labels, "draw": 0, "return_mean": 1.0} for labels in (16, 64)]
    runs.write("a", "maze", 0, "stage3_bc", {"sweep": sweep})
    runs.compare("--exp", "a")
    figures = results.draw(Comparison(runs.grid("a")))
    (bar,) = figures["final"].axes[0].get_legend_handles_labels()[1]
    assert bar == "behaviour cloning, 64 labels"


@pytest.mark.parametrize(
    ("mode", "stages", "seconds"),
    [("scratch", (), None), ("ilpo", ("ilpo_trunk",), 50), ("offline", ("stage1", "stage2"), 100)],
)
def test_the_time_before_stage_3_is_that_of_the_stages_that_a_mode_builds_on(runs, mode, stages, seconds):
    runs.policy("a", "maze", 0, mode, 5.0)
    for stage in ("stage1", "stage2", "ilpo_trunk"):
        runs.write("a", "maze", 0, stage, {}, took=50)
    assert row(runs.compare("--exp", "a"), mode=mode)["seconds_before_stage_3"] == seconds


def test_the_time_of_a_run_includes_its_evaluations_and_its_sweep(runs):
    """Which come after the last line of metrics.jsonl."""
    result = {"return_mean": 5.0, "return_stderr": 0.1}
    lines = [(1000, {"loss": 1.0})]
    runs.write("a", "maze", 0, "stage3_bc", result, lines=lines, took=50)
    path = runs.folder / "a/maze/seed0/stage3_bc/metrics.jsonl"
    path.write_text(json.dumps({"step": 1000, "seconds": 20, "loss": 1.0}) + "\n")
    assert row(runs.compare("--exp", "a"), mode="bc")["seconds_stage_3"] == 50


def test_draws_of_a_single_seed_give_its_error(runs):
    sweep = [{"labels": 256, "draw": draw, "return_mean": mean} for draw, mean in enumerate((1.0, 3.0))]
    runs.policy("a", "maze", 0, "bc", 1.0, sweep=sweep)
    found = row(runs.compare("--exp", "a"), labels=256)
    assert (found["return_mean"], found["single_seed_stderr"]) == (2, 1)


# ---------------------------------------------------------------- curves


def test_returns_on_held_out_levels_are_preferred(runs):
    lines = [
        (1000, {"train_return": 1.0}),
        (2000, {"train_return": 2.0, "eval_return_mean": 8.0, "eval_return_stderr": 0.5}),
        (4000, {"train_return": 3.0, "eval_return_mean": 9.0, "eval_return_stderr": 0.5}),
        (5000, {"train_return": 3.0}),
    ]
    for seed in (0, 1):
        runs.policy("a", "maze", seed, "scratch", 9.5, lines=lines)
    policies = runs.grid("a").policies
    curve = learning_curve(policies)
    assert curve.evaluated
    assert (curve.x.tolist(), curve.mean.tolist()) == ([2000, 4000, 5000], [8, 9, 9.5])
    assert curve.error.tolist() == [0, 0, 0]
    runs.compare("--exp", "a")
    assert line_of(runs.text, "4,000 env steps")[2:] == [f"{k},000 env steps" for k in (2, 4, 5)]
    assert line_of(runs.text, "9.00 ± 0.00", "8.00 ± 0.00", "9.50 ± 0.00")


def test_a_seed_that_has_not_been_evaluated_yet_hides_no_other(runs):
    lines = [(2000, {"train_return": 1.0, "eval_return_mean": 8.0}), (4000, {"train_return": 3.0})]
    runs.policy("a", "maze", 0, "scratch", 9.0, lines=lines)
    runs.write("a", "maze", 1, "stage3_scratch", lines=[(1000, {"train_return": 1.0})])
    runs.policy("a", "maze", 2, "scratch", 5.0, lines=[(4000, {"train_return": 3.0})])
    curve = learning_curve(runs.grid("a").policies)
    assert curve.evaluated
    assert (curve.x.tolist(), curve.mean.tolist()) == ([2000, 4000], [8, 7])


def test_an_unfinished_run_has_no_final_return(runs):
    lines = [(2000, {"eval_return_mean": 8.0, "eval_return_stderr": 0.5}), (3000, {"train_return": 1.0})]
    runs.write("a", "maze", 0, "stage3_scratch", lines=lines)
    assert learning_curve(runs.grid("a").policies).x.tolist() == [2000]


def test_unfinished_runs_are_drawn_as_far_as_they_have_come(runs):
    runs.policy("a", "maze", 0, "scratch", 5.0, lines=[(1000, {"train_return": 2.0}), *ONLINE[1:]])
    runs.write("a", "maze", 1, "stage3_scratch", lines=[(1000, {"train_return": 4.0})])
    curve = learning_curve(runs.grid("a").policies)
    assert curve.mean.tolist() == [3, 5]
    assert curve.error[0] == 1
    assert math.isnan(curve.error[1])


# ---------------------------------------------------------------- what is missing


def missing(found: dict) -> dict[tuple, str]:
    return {(each["game"], each["seed"], each["stage"]): each["state"] for each in found["missing"]}


def test_what_is_missing_is_named(runs):
    for game, seed in (("heist", 0), ("maze", 0), ("maze", 1)):
        runs.stages("a", game, seed)
        runs.policy("a", game, seed, "scratch", 5.0)
    runs.policy("a", "maze", 0, "offline", 6.0)
    runs.write("a", "maze", 1, "stage3_offline")
    (runs.folder / "a" / "maze" / "seed1" / "stage3_scratch" / "checkpoint.pt").write_bytes(b"nothing")
    found = runs.compare("--exp", "a")
    assert missing(found) == {
        ("heist", 0, "stage3_offline"): "missing",
        ("heist", 1, "stage1"): "missing",
        ("heist", 1, "stage2"): "missing",
        ("heist", 1, "stage3_scratch"): "missing",
        ("heist", 1, "stage3_offline"): "missing",
        ("maze", 1, "stage3_offline"): "unfinished",
        ("maze", 1, "stage3_scratch"): "damaged",
    }
    text = runs.text
    assert "- a: 3 of 8 policies (2 games × 2 seeds × 2 modes), **not complete**" in text
    assert "a, maze, seed 1, stage3_offline: unfinished, at step 7 of 500" in text
    assert "checkpoint.pt is damaged" in text


def test_a_complete_grid_lacks_nothing(runs):
    runs.policy("a", "maze", 0, "bc", 5.0)
    assert runs.compare("--exp", "a")["missing"] == []
    assert "- a: 1 of 1 policies (1 game × 1 seed × 1 mode), complete" in runs.text
    assert "## What is missing\n\nNothing." in runs.text


def test_what_was_asked_for_is_expected(runs):
    runs.policy("a", "maze", 0, "bc", 5.0)
    runs.policy("a", "maze", 0, "scratch", 5.0)
    found = runs.compare("--exp", "a", "--env", "maze,heist", "--seeds", "0,2", "--modes", "bc")
    assert [row["mode"] for row in found["rows"]] == ["bc"]
    assert missing(found).keys() == {
        (game, seed, "stage3_bc") for game, seed in (("maze", 2), ("heist", 0), ("heist", 2))
    }


def test_games_of_other_experiments_are_named(runs):
    runs.policy("a", "maze", 0, "bc", 5.0)
    runs.policy("b", "maze", 0, "bc", 5.0)
    runs.policy("b", "heist", 0, "bc", 5.0)
    runs.compare("--exp", "a", "b")
    assert "- a: no run of heist" in runs.text


def test_policies_of_other_stages_than_those_on_disk_are_named(runs):
    runs.stages("a", "maze", 0)
    result = {"return_mean": 5.0, "return_stderr": 0.1}
    runs.write("a", "maze", 0, "stage3_offline", result, built_on={"stage1": "another"})
    found = runs.compare("--exp", "a")
    assert missing(found) == {("maze", 0, "stage3_offline"): "stale"}
    assert "trained on another stage1 than is there now" in runs.text
    assert row(found, mode="offline")["return_mean"] == 5  # still shown
    assert found["experiments"]["a"]["finished"] == 0
    assert "0 of 1 policies (1 game × 1 seed × 1 mode), **not complete**" in runs.text


def test_stale_policies_are_no_seeds_of_the_others(runs):
    """And do not stand under the settings of stages that they were not trained on."""
    result = {"return_mean": 5.0, "return_stderr": 0.1}
    for seed, built_on in enumerate(({}, {"stage1": "another"})):
        runs.stages("a", "maze", seed, "--stage1.lr", "0.125")
        runs.write("a", "maze", seed, "stage3_offline", result, built_on=built_on)
    found = runs.compare("--exp", "a")
    assert [(row["seeds"], row["values"]) for row in found["rows"]] == [
        ([0], {"built on": ""}),
        ([1], {"built on": "another stage1"}),
    ]
    assert "LAPO offline, built on another stage1" in runs.text
    settings = [policy.settings.get("stage1.lr") for policy in runs.grid("a").policies]
    assert settings == ["0.125", None]


def test_a_stage_2_of_another_stage_1_makes_its_policies_stale(runs):
    """Mode no_sl needs stage 2 alone, but what is said of its stage 1 must be true."""
    runs.write("a", "maze", 0, "stage1", {})
    runs.write("a", "maze", 0, "stage2", {}, built_on={"stage1": "another"})
    runs.policy("a", "maze", 0, "no_sl", 5.0)
    assert missing(runs.compare("--exp", "a")) == {("maze", 0, "stage3_no_sl"): "stale"}


def test_a_policy_on_the_trunk_that_is_there_is_not_stale(runs):
    trunk = runs.write("a", "maze", 0, "ilpo_trunk", {})
    weights = weights_checksum(load_checkpoint(trunk.checkpoint_path))
    result = {"return_mean": 5.0, "return_stderr": 0.1}
    for seed, found in enumerate((weights, "another")):
        runs.write("a", "maze", seed, "ilpo_trunk", {}) if seed else None
        runs.write("a", "maze", seed, "stage3_ilpo", result, built_on={"ilpo_trunk": found})
    assert missing(runs.compare("--exp", "a")) == {("maze", 1, "stage3_ilpo"): "stale"}


def test_a_renamed_experiment_has_its_own_stages(runs):
    """Also where another one has its old name by now."""
    runs.stages("old", "maze", 0, "--stage1.lr", "0.125")
    runs.policy("old", "maze", 0, "offline", 5.0)
    (runs.folder / "old").rename(runs.folder / "new")
    runs.stages("old", "maze", 0, "--stage1.lr", "0.25")
    grid = runs.grid("new")
    assert grid.policies[0].settings["stage1.lr"] == "0.125"
    assert "--exp new" in commands(grid.policies)[0]


def test_stages_of_another_experiment_are_not_missing(runs):
    runs.stages("base", "maze", 0, "--stage1.lr", "0.125")
    runs.policy("a", "maze", 0, "offline", 5.0, options=["--stages_from", "base"])
    grid = runs.grid("a")
    assert grid.missing == []
    assert grid.policies[0].settings["stage1.lr"] == "0.125"


def test_before_the_first_policy_there_is_a_report_as_well(runs):
    runs.write("a", "maze", 0, "stage1", lines=[(5, {"loss": 1.0})])
    found = runs.compare("--exp", "a")
    assert missing(found)["maze", 0, "stage1"] == "unfinished"
    assert "No policy has been trained to the end" in runs.text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--exp", "b"], r"has no run of b; .*this one holds a\)"),
        (["--exp", "a", "--modes", "onlin"], "'onlin' is no mode; choose among bc"),
        (["--exp", "a", "--seeds", "x"], "'x' is no seed"),
        (["--exp", ","], "--exp names no experiment"),
    ],
)
def test_mistakes_are_one_sentence(runs, call_main, words, message):
    runs.policy("a", "maze", 0, "bc", 5.0)
    status, _, err = call_main(results.main, *words, "--results_dir", str(runs.folder))
    assert status == 2
    assert re.search(message, err)
    assert err.count("\n") == 1


# ---------------------------------------------------------------- runs without their checkpoints


@pytest.fixture
def recorded(runs) -> Path:
    """Two games with and without sweeps, as results.json has them, the checkpoints of which are gone."""
    sweep = [{"labels": 64, "draw": draw, "return_mean": 1.0 + draw} for draw in (0, 1)]
    lines = [(2000, {"train_return": 3.0, "loss": 1.0, "eval_return_mean": 8.0})]
    for game in ("heist", "maze"):
        runs.stages("a", game, 0, "--stage1.lr", "0.125")
        runs.policy("a", game, 0, "offline", 5.0, sweep=sweep, stderr=math.nan)
        runs.policy("a", game, 0, "online", 7.0, lines=lines, options=["--ppo.gamma", "0.5"])
    runs.write("a", "maze", 0, "stage3_bc")
    runs.write("a", "maze", 0, "stage3_no_sl", {"return_mean": 5.0}, built_on={"stage1": "another"})
    path = runs.folder / "results.json"
    write_json(path, runs.compare("--exp", "a"))
    return path


def test_results_can_be_made_again_without_checkpoints(runs, recorded):
    before, text = runs.compare("--exp", "a"), runs.text
    json.loads(recorded.read_text(), parse_constant=pytest.fail)  # NaN is no JSON
    shutil.rmtree(runs.folder / "a")
    after = runs.compare("--exp", "a", "--with", str(recorded))
    assert after.keys() == before.keys()
    for key in before.keys() - {"missing"}:
        assert after[key] == before[key], key
    assert runs.text.partition("## What is missing")[0] == text.partition("## What is missing")[0]


def test_recorded_runs_and_those_on_disk_are_one_grid(runs, recorded):
    shutil.rmtree(runs.folder / "a")
    runs.stages("a", "maze", 1, "--stage1.lr", "0.125")
    runs.policy("a", "maze", 1, "online", 9.0, options=["--ppo.gamma", "0.5"])
    runs.write("a", "maze", 0, "stage3_offline")  # trained again here, not to the end
    runs.policy("a", "heist", 0, "offline", 2.0)  # finished here: this counts
    found = runs.compare("--exp", "a", "--with", str(recorded), "--modes", "online,offline")
    assert row(found, game="maze", mode="online")["returns"] == [7, 9]
    assert row(found, game="maze", labels=64)["return_mean"] == 1.5
    assert row(found, game="heist", mode="offline")["return_mean"] == 2
    assert missing(found) == {
        ("maze", 1, "stage3_offline"): "missing",
        **{
            ("heist", 1, stage): "missing"
            for stage in ("stage1", "stage2", "stage3_offline", "stage3_online")
        },
    }


def test_records_of_other_experiments_are_left_out(runs, recorded):
    runs.policy("b", "maze", 0, "bc", 5.0)
    assert [row["experiments"] for row in runs.compare("--exp", "b", "--with", str(recorded))["rows"]] == [
        ["b"]
    ]


@pytest.mark.parametrize(
    "text", [None, "", "[]", '{"rows": []}', '{"runs": {"config": {}, "policies": [{}]}}']
)
def test_a_file_without_runs_is_refused(runs, tmp_path, call_main, text):
    runs.policy("a", "maze", 0, "bc", 5.0)
    path = tmp_path / "other.json"
    if text is not None:
        path.write_text(text)
    words = ["--exp", "a", "--results_dir", str(runs.folder), "--with", str(path)]
    status, _, err = call_main(results.main, *words)
    assert status == 2
    assert f"--with {path}: " in err
    assert "results.json" in err


# ---------------------------------------------------------------- commands and figures


def test_the_commands_make_the_same_configs(runs):
    options = ["--stage1.lr", "1e-4", "--decoder.hidden", "64,32", "--vq.enabled", "false"]
    for game, seed in (("maze", 0), ("heist", 1)):
        runs.policy("a", game, seed, "scratch", 5.0, options=options)
        runs.policy("a", game, seed, "bc", 5.0, options=options)
    policies = runs.grid("a").policies
    (command,) = commands(policies)
    words = shlex.split(command)
    assert words[:10] == shlex.split("bash launch.sh heist maze --seeds 0,1 --stages 3 --modes bc,scratch")
    assert "--preset demo" in command
    given = words[words.index("--exp") :]
    for policy in policies:
        place = ["--env", policy.game, "--seed", str(policy.seed), "--stage3.mode", policy.mode]
        assert load_config([*given, *place, "--precision", "fp32"]) == policy.stage.cfg


def test_the_commands_name_how_stages_1_and_2_were_trained(runs):
    """Whatever the later stages were called with."""
    runs.write("a", "maze", 0, "stage1", {}, options=["--stage1.lr", "1e-4"])
    runs.write("a", "maze", 0, "stage2", {}, options=["--stage2.steps", "3000"])
    for mode in ("bc", "offline"):
        runs.policy("a", "maze", 0, mode, 5.0)
    (command,) = commands(runs.grid("a").policies)
    assert command.startswith("bash launch.sh maze --seeds 0 --modes bc,offline ")
    assert "--stage1.lr 0.0001 " in command
    assert "--stage2.steps 3000 " in command


def test_the_commands_train_the_stages_of_another_experiment_first(runs):
    """And do not train stages 1 and 2 again in the experiment that takes them from there."""
    runs.write("base", "maze", 0, "stage1", {}, options=["--stage1.lr", "1e-4"])
    runs.write("base", "maze", 0, "stage2", {}, options=["--stage1.lr", "2e-4", "--stage2.steps", "3000"])
    runs.policy("a", "maze", 0, "offline", 5.0, options=["--stages_from", "base"])
    first, second = (shlex.split(command) for command in commands(runs.grid("a").policies))
    assert first[:9] == shlex.split("bash launch.sh maze --seeds 0 --stages 1,2 --exp base")
    cfg = load_config(first[first.index("--exp") :])
    assert (cfg.stage1.lr, cfg.stage2.steps) == (1e-4, 3000)
    assert second[:11] == shlex.split("bash launch.sh maze --seeds 0 --stages 3 --modes offline --exp a")
    assert load_config(second[second.index("--exp") :]).stages_from == "base"
    runs.policy("base", "maze", 0, "offline", 5.0)
    both = [command.split(" --preset")[0] for command in commands(runs.grid("a", "base").policies)]
    assert both == [
        "bash launch.sh maze --seeds 0 --stages 3 --modes offline --exp a",
        "bash launch.sh maze --seeds 0 --modes offline --exp base",
    ]


@pytest.mark.slow
def test_every_figure_shows_something(runs, tmp_path, call_main, monkeypatch):
    sweep = [{"labels": labels, "draw": 0, "return_mean": 4.0 + labels / 64} for labels in (16, 64)]
    for exp, lr, seeds in (("a", "1e-4", (0, 1)), ("b", "3e-4", (0,))):
        options = ["--decoder.lr", lr]
        for game in ("maze", "heist", "bigfish", "ninja", "coinrun"):
            for seed in seeds:
                runs.policy(exp, game, seed, "online", 5.0 + seed, options=options)
                runs.policy(exp, game, seed, "offline", 5.0 + seed, options=options, sweep=sweep)
    drawn, draw = {}, results.draw
    monkeypatch.setattr(results, "draw", lambda comparison: drawn.update(draw(comparison)) or drawn)
    words = ["--exp", "a,b", "--results_dir", str(runs.folder), "--out", str(tmp_path / "out")]
    status, out, _ = call_main(results.main, *words)
    assert status == 0
    names = {"online", "online_all", "labels", "labels_all", "final", "relative"}
    files = {path.name for path in (tmp_path / "out").iterdir()}
    kinds = {f"{name}.{kind}" for name in names for kind in ("png", "pdf")}
    assert files == kinds | {"results.md", "results.json"}
    json.loads((tmp_path / "out" / "results.json").read_text(), parse_constant=pytest.fail)
    text = (tmp_path / "out" / "results.md").read_text()
    assert text in out
    assert all(f"![{name}]({name}.png)" in text for name in names)

    assert drawn.keys() == names
    for name, figure in drawn.items():
        panels = {"online": 5, "labels": 5, "final": 5, "relative": 2}
        assert len(figure.axes) == panels.get(name, 1)
        for ax in figure.axes:
            drawn = [line for line in ax.lines if line.get_linewidth() > 1.5] or ax.patches
            assert len(drawn) >= 2, (name, ax.get_title())  # the two settings
        assert figure.axes[0].get_title() == {"relative": "mean"}.get(
            name, "bigfish" if panels.get(name) else ""
        )
        if name in ("online", "online_all", "labels", "labels_all"):
            labels = [text.get_text() for text in figure.legends[0].get_texts()]
            assert sum(label.startswith("LAPO o") and ", decoder.lr " in label for label in labels) == 2
            assert any(label.startswith("paper: ") for label in labels)


# ---------------------------------------------------------------- published curves


def over_games_of(read, mode: str, index: int) -> float:
    """The mean relative return over all games at a point of the published curves per game."""
    means = {game: read(game)[mode][1][index] for game in GAMES}
    spans = {game: GAMES[game].expert_return - GAMES[game].random_return for game in GAMES}
    return float(np.mean([(means[game] - GAMES[game].random_return) / spans[game] for game in GAMES]))


def test_published_curves_agree_with_their_aggregates():
    """The games' curves and the one over all games come from different figures."""
    for mode in ("online", "no_sl", "scratch"):
        final = published.online(None)[mode][1][-1]
        assert over_games_of(published.online, mode, -1) == pytest.approx(final, abs=0.01)
    labels, values = published.offline(published.PAPER, None)["offline"]
    for index, value in enumerate(values):
        found = over_games_of(lambda game: published.offline(published.PAPER, game), "offline", index)
        assert found == pytest.approx(value, abs=0.002), labels[index]
    # Early in training they do not; docs/results.md says so.
    early = {mode: over_games_of(published.online, mode, 0) for mode in ("online", "scratch")}
    assert early == {"online": pytest.approx(0.683, abs=0.001), "scratch": pytest.approx(0.123, abs=0.001)}
    assert [published.online(None)[mode][1][0] for mode in early] == [0.57, 0.07]


def test_published_returns_beside_ours():
    assert published.final("online", "maze", None) == 9.94
    assert published.final("offline", "maze", 256) == 7.52
    assert published.final("offline", "maze", 100) is None
    assert published.final("bc", "maze", 256) is None
    assert published.online("a game of mine") == {}
    assert set(published.offline(published.LAPO_PLUS, None)) == {
        "bc",
        "idm_labelling",
        "offline",
        "lapo_plus",
    }
