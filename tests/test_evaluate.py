"""evaluate.py: its command line on checkpoints of a tiny run."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from finished_run import finished_run
from lapo import evaluate
from lapo.acting import Evaluation, evaluate_actor, random_actor
from lapo.games.make import relative_return
from lapo.games.table import GAMES
from lapo.runs.checkpoints import load_checkpoint
from support import LAPO, Workplace

GAME = Workplace.GAME
PLAYED = Evaluation(np.array([1.0, 2.0]), np.array([3, 4]))
TINY_EVAL = ("--episodes", "2", "--num-envs", "2", "--device", "cpu")


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Workplace:
    """A run with all stages and modes, to be left as it is."""
    return finished_run(tmp_path_factory.getbasetemp() / "finished")


def checkpoint_of(place: Workplace, stage: str) -> Path:
    return place.run_dir(stage) / "checkpoint.pt"


@pytest.fixture
def call(trained, call_main):
    """Runs evaluate.py on the tiny run; gives exit status, stdout and stderr."""
    return partial(call_main, evaluate.main, "--results-dir", str(trained.results), *TINY_EVAL)


def test_the_shipped_expert_plays_in_the_visuals_of_its_training(call, tmp_path):
    file = tmp_path / "maze.json"
    status, _, err = call("--policy", "expert", "--env", "maze", "--json", str(file))
    assert status == 0, err
    result = json.loads(file.read_text())
    assert (result["policy"], Path(result["checkpoint"]).name) == ("learned expert", "maze.pt")
    args, cfg = evaluate.parse(["--policy", "expert", "--env", "maze"])
    assert (cfg.visuals, evaluate.choose(args, cfg).visuals) == ("full", "plain")


def test_a_game_without_a_shipped_expert_is_named_in_a_sentence(call):
    status, _, err = call("--policy", "expert", "--env", "bigfish")
    assert status != 0
    assert err.count("\n") == 1
    assert (
        "no learned expert of bigfish is shipped, only of fruitbot, leaper, maze; choose --policy planner"
        in err
    )


def test_command_line_repeats_the_result_of_stage_3(trained, tmp_path):
    """Greedy play leaves nothing to chance; a path for --json is the shell's."""
    options = ["--env", GAME, "--policy", "offline", "--results_dir", str(trained.results), *TINY_EVAL]
    process = subprocess.run(
        [sys.executable, str(LAPO / "evaluate.py"), *options, "--greedy", "--json", "out.json"],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    result = json.loads((tmp_path / "out.json").read_text())
    path = checkpoint_of(trained, "stage3_offline")
    metrics = load_checkpoint(path)["metrics"]
    for key in ("return_mean", "return_stderr", "relative_return", "episodes"):
        assert result[key] == pytest.approx(metrics[key])
    assert (result["game"], result["policy"], result["checkpoint"]) == (GAME, "offline", str(path))
    assert f"{result['return_mean']:.2f} ± {result['return_stderr']:.2f}" in process.stdout
    assert f"relative  {result['relative_return']:.2f}" in process.stdout
    assert list(tmp_path.iterdir()) == [tmp_path / "out.json"]


def test_a_result_is_written_before_it_is_printed(call, tmp_path, monkeypatch):
    """Whoever read what is printed may have gone meanwhile."""
    file, describe = tmp_path / "out.json", evaluate.describe

    def spy(result: dict) -> str:
        assert json.loads(file.read_text()) == result
        return describe(result)

    monkeypatch.setattr(evaluate, "describe", spy)
    status, out, err = call("--policy", "random", "--env", GAME, "--json", str(file))
    assert (status, err) == (0, "")
    assert f"written to {file}" in out


def test_random_policy_needs_no_run(call, trained, tmp_path):
    file = tmp_path / "out.json"
    arguments = ("--policy", "random", "--env", GAME, "--exp", "nowhere", "--seed", "5", "--json", str(file))
    status, out, err = call(*arguments)
    assert (status, err) == (0, "")
    played = evaluate_actor(random_actor(5), GAME, "full", trained.config().eval, seed=5)
    result = json.loads(file.read_text())
    assert result.pop("steps_per_cpu_second") > 0
    assert result == {
        "game": GAME,
        "policy": "random",
        "checkpoint": None,
        "seed": 5,
        "greedy": False,
        "episodes": 2,
        "return_mean": played.mean,
        "return_stderr": pytest.approx(abs(np.subtract(*played.returns)) / 2),
        "relative_return": relative_return(GAME, played.mean),
        "mean_length": played.lengths.mean(),
    }
    assert f"0: random, {GAMES[GAME].random_return:.2f}" in out


def test_expert_plays_the_levels_that_others_are_judged_on(call, tmp_path):
    """Two environments, of which one has to wait for the other."""
    file = tmp_path / "out.json"
    arguments = ("--policy", "planner", "--env", "maze", "--episodes", "4", "--json", str(file))
    status, out, _ = call(*arguments)
    assert status == 0
    assert "MazeExpert, an expert without training, plays 4 episodes of maze" in out
    result = json.loads(file.read_text())
    assert (result["policy"], result["return_mean"], result["episodes"]) == ("planner", 10.0, 4)


def test_checkpoint_brings_its_game_and_policy(call, trained):
    status, out, _ = call("--checkpoint", str(checkpoint_of(trained, "stage3_online")))
    assert status == 0
    assert f"online policy {checkpoint_of(trained, 'stage3_online')} plays 2 episodes of {GAME}" in out


def test_checkpoint_plays_another_game_when_asked(call, trained):
    status, out, _ = call("--checkpoint", str(checkpoint_of(trained, "stage3_online")), "--env", "chaser")
    assert status == 0
    assert "plays 2 episodes of chaser" in out


@pytest.mark.parametrize(("options", "visuals"), [([], "full"), (["--visuals", "plain"], "plain")])
def test_visuals_are_those_of_the_training_unless_said(call, trained, monkeypatch, options, visuals):
    seen = []
    monkeypatch.setattr(
        evaluate, "evaluate_actor", lambda act, game, visuals, *rest: seen.append(visuals) or PLAYED
    )
    for who in (["--checkpoint", str(checkpoint_of(trained, "stage3_bc"))], ["--policy", "random"]):
        assert call(*who, *options)[0] == 0
    assert seen == [visuals, visuals]


def test_unfinished_policy_plays(call, trained, tmp_path):
    checkpoint = load_checkpoint(checkpoint_of(trained, "stage3_online"))
    torch.save(checkpoint | {"finished": False, "step": 3}, tmp_path / "some.pt")
    status, out, _ = call("--checkpoint", str(tmp_path / "some.pt"))
    assert status == 0
    assert "unfinished, at step 96" in out  # 3 updates of 4 environments × 8 steps


def test_single_episode_has_no_standard_error(call, tmp_path):
    file = tmp_path / "out.json"
    status, out, _ = call("--policy", "random", "--env", GAME, "--episodes", "1", "--json", str(file))
    assert status == 0
    assert json.loads(file.read_text())["return_stderr"] is None
    assert "±" not in out.splitlines()[1].split("(")[0]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--env", "bigfsh"], "'bigfsh' is not a Procgen game; choose one of bigfish, "),
        (["--env", "maze"], "make it with `python stage3.py --env maze --exp main --seed 0"),
        (["--env", GAME, "--policy", "bc", "--seed", "1"], "--seed 1 --stage3.mode bc`"),
        (["--env", GAME, "--exp", "no/name"], "the command line: 'exp' is 'no/name'"),
        (["--episodes", "0"], "'eval.episodes' is '0'"),
        (["--device", "tpu"], "'device' is 'tpu'"),
        (["--policy", "bc", "--checkpoint", "some.pt"], "give one of the two"),
        (["--checkpoint", "absent.pt"], "the checkpoint absent.pt does not exist"),
        (["--checkpoint", __file__], "is damaged, or was not written by lapo"),
        (["--policy", "random", "--json", "absent/out.json"], "the folder absent does not exist"),
    ],
)
def test_mistake_is_one_sentence(call, arguments, sentence):
    status, out, err = call(*arguments)
    assert status == 2
    assert (out, len(err.splitlines())) == ("", 1)
    assert err.startswith("error: ")
    assert sentence in err


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_earlier_stage_cannot_act(call, trained, stage):
    status, _, err = call("--checkpoint", str(checkpoint_of(trained, stage)))
    assert status == 2
    assert f"is a checkpoint of {stage}, which cannot act" in err
    assert f"`python stage3.py --env {GAME} --exp main --seed 0`" in err


def test_frames_of_no_game_cannot_be_played(call, trained, tmp_path):
    checkpoint = load_checkpoint(checkpoint_of(trained, "stage3_offline"))
    checkpoint["config"]["env"] = "holiday"
    torch.save(checkpoint, tmp_path / "holiday.pt")
    status, _, err = call("--checkpoint", str(tmp_path / "holiday.pt"))
    assert status == 2
    assert "'holiday' is not a Procgen game" in err
