"""Statistics over seeds and games: what is pooled, and how."""

import math

import numpy as np
import pytest

from lapo.reporting.aggregate import (
    Curve,
    interval,
    iqm,
    learning_curve,
    mean_over_games,
    over_games,
)
from many_runs import ONLINE, line_of, row


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


def test_two_seeds_give_one_standard_error_to_either_side():
    """As results.md says of intervals from few seeds."""
    pair = np.array([0.0, 1.0])
    error = pair.std(ddof=1) / 2**0.5
    assert interval([pair], mean_over_games) == pytest.approx((0.5 - error, 0.5 + error))


def test_one_seed_has_no_interval():
    assert interval([np.array([0.1, 0.2]), np.array([0.3])], mean_over_games) is None


def test_a_curve_over_games_has_the_error_of_fixed_games():
    a = Curve(np.array([1.0, 3.0]), np.array([0.0, 4.0]), np.array([3.0, 3.0]))
    b = Curve(np.array([1.0, 2.0]), np.array([2.0, 2.0]), np.array([4.0, 4.0]))
    both = over_games([a, b])
    assert both.x.tolist() == [1, 2]  # b ends at 2
    assert both.mean.tolist() == [1, 2]
    assert both.error.tolist() == [2.5, 2.5]


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


def test_experiments_are_pooled_as_far_as_they_repeat_nothing(runs):
    """And a repetition under some settings splits no others."""
    for exp, gamma, seed in (("a", 0.5, 0), ("b", 0.5, 1), ("c", 0.9, 0), ("d", 0.9, 0), ("e", 0.9, 1)):
        runs.policy(exp, "maze", seed, "scratch", 1.0, options=["--ppo.gamma", str(gamma)])
    found = runs.compare("--exp", "a", "b", "c", "d", "e")
    assert sorted((row["experiment"], row["seeds"]) for row in found["rows"]) == [
        ("", [0, 1]),
        ("c + e", [0, 1]),
        ("d", [0]),
    ]


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
    assert (curve.x.tolist(), curve.mean.tolist()) == ([2000, 4000], [8, 9])


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
