"""Evaluations on the way of the modes that play: what they measure, and that training goes on as without."""

import json
import signal

import pytest
import torch

from lapo import ppo, stage3_decode
from lapo.acting import evaluate_policy
from lapo.policies import load_policy_checkpoint, restore_policy
from support import CPU, Workplace, leaves, logged, result

EVERY = ("--stage3.eval_every", "60")  # after updates 2 and 4 of 32 steps, not after 6, the last
ASIDE = ("eval_return_mean", "eval_return_stderr", "eval_seconds")


def train(workplace: Workplace, exp: str, *arguments: str) -> None:
    stage3_decode.train(workplace.config("--stages_from", "main", "--exp", exp, *arguments))


def without_evaluations(values: dict) -> dict:
    """What a run left behind, but for the evaluations and the option that asks for them."""
    return {key: value for key, value in values.items() if not key.endswith((*ASIDE, "eval_every"))}


@pytest.mark.parametrize("mode", ["online", "scratch"])
def test_training_does_not_notice_evaluations(trained, mode, capsys):
    options = ("--stage3.mode", mode)
    train(trained, f"unwatched-{mode}", *options)
    assert "evaluations on the way" not in capsys.readouterr().out
    train(trained, f"watched-{mode}", *options, *EVERY)
    assert "2 evaluations on the way took" in capsys.readouterr().out
    stage = f"stage3_{mode}"
    plain, evaluated = (trained.run_dir(stage, f"{exp}-{mode}") for exp in ("unwatched", "watched"))
    assert without_evaluations(result(evaluated)) == without_evaluations(result(plain))
    lines = logged(evaluated)
    assert [line["step"] for line in lines if set(ASIDE) <= line.keys()] == [64, 128]
    assert not any(key.endswith(ASIDE) for key in leaves(logged(plain)))


def test_an_evaluation_is_that_of_the_policy_at_its_step(workplace):
    """Scratch mode's learning rate is constant: a run of 64 steps is the beginning of one of 192."""
    scratch = ("--stage3.mode", "scratch", "--eval.episodes", "6")
    train(workplace, "long", *scratch, *EVERY)
    train(workplace, "short", *scratch, "--stage3.steps", "64")
    cfg = workplace.config(*scratch)
    checkpoint = load_policy_checkpoint(workplace.run_dir("stage3_scratch", "short") / "checkpoint.pt")
    torch.manual_seed(cfg.seed)
    expected = evaluate_policy(restore_policy(checkpoint, CPU), cfg, CPU)
    line = logged(workplace.run_dir("stage3_scratch", "long"))[1]
    assert line["step"] == 64
    assert line["eval_return_mean"] == expected["return_mean"]
    assert line["eval_return_stderr"] == expected["return_stderr"]


def test_a_single_episode_has_no_standard_error(workplace):
    train(workplace, "single", "--stage3.mode", "scratch", "--eval.episodes", "1", *EVERY)
    line = logged(workplace.run_dir("stage3_scratch", "single"))[1]
    assert "eval_return_mean" in line
    assert "eval_return_stderr" not in line


def test_a_resumed_run_evaluates_once_at_each_point(trained, monkeypatch):
    evaluate, played = ppo.evaluate_aside, []

    def noted(*arguments):
        played.append(arguments[1].exp)
        if played == ["stopped"]:
            signal.raise_signal(signal.SIGTERM)  # the update, and so this evaluation, is completed
        return evaluate(*arguments)

    monkeypatch.setattr(ppo, "evaluate_aside", noted)
    for exp in ("whole", "stopped"):
        played.clear()
        if exp == "stopped":
            with pytest.raises(SystemExit):
                train(trained, exp, "--stage3.mode", "online", *EVERY)
            assert [json.loads(line)["step"] for line in metrics(trained, exp)] == [32, 64]
        train(trained, exp, "--stage3.mode", "online", *EVERY)
        assert played == [exp, exp]
    whole, stopped = (result(trained.run_dir("stage3_online", exp)) for exp in ("whole", "stopped"))
    for values in (whole, stopped):
        for key in [key for key in values if key.endswith("eval_seconds")]:
            del values[key]
    assert stopped == whole


def metrics(workplace: Workplace, exp: str) -> list[str]:
    """Lines of a run's metrics as they stand."""
    return (workplace.run_dir("stage3_online", exp) / "metrics.jsonl").read_text().splitlines()


def test_a_finished_run_is_neither_refused_nor_trained_again_for_evaluations(workplace):
    scratch = ("--stage3.mode", "scratch")
    train(workplace, "added", *scratch)
    before = result(workplace.run_dir("stage3_scratch", "added"))
    train(workplace, "added", *scratch, *EVERY)
    assert result(workplace.run_dir("stage3_scratch", "added")) == before
