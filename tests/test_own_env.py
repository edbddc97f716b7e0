"""The grid world of docs/extending.md through all scripts, and environments that cannot save their state."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from lapo import evaluate, record_expert, stage1_idm_wm, stage2_bc, stage3_decode, train_expert
from lapo.config import load_config
from lapo.errors import UserError
from lapo.games.env import Env
from lapo.games.make import make_env
from lapo.modes import MODES
from lapo.ppo import Collector, PPOTrainer
from lapo.runs.checkpoints import load_checkpoint
from support import CPU, LAPO, ROOT, TINY

NAME = "grid_world:make_env"
PAGE = ROOT / "docs" / "extending.md"


@pytest.fixture
def module(tmp_path: Path, monkeypatch) -> Path:
    """The page's grid world as a file that Python finds."""
    code = re.search(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)[1]
    assert len(code.splitlines()) <= 60
    path = tmp_path / "grid_world.py"
    path.write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    yield path
    sys.modules.pop("grid_world", None)


def options(folder: Path, *more: str) -> list[str]:
    """The tiny configuration for the grid world, as a command line."""
    file = folder / "tiny.json"  # JSON is YAML
    places = {"env": NAME, "data_dir": str(folder / "data"), "results_dir": str(folder / "results")}
    file.write_text(json.dumps(TINY | places | {"data": {"image_size": 16}}))
    return ["--config", str(file), *more]


@pytest.mark.slow
def test_the_grid_world_of_the_docs_runs_through_all_modes_and_scripts(module, tmp_path, call_main, capsys):
    def config(*more: str):
        return load_config(options(tmp_path, *more))

    run_dir = tmp_path / "results" / "main" / NAME / "seed0"
    train_expert.train(config("--expert.steps=64"))
    expert = str(run_dir / "expert" / "checkpoint.pt")
    recording = ("--env", NAME, "--frames=300", "--test-frames=100", "--workers=1", "--data-dir")
    status, _, err = call_main(record_expert.main, *recording, str(tmp_path / "data"), "--expert", expert)
    assert status == 0, err
    with np.load(tmp_path / "data" / NAME / "train" / "0.npz") as chunk:
        assert chunk["obs"].shape == (300, 16, 16, 3)
        assert set(chunk["ta"]) == {0, 1, 2, 3}
    stage1_idm_wm.train(config())
    stage2_bc.train(config())
    for mode in MODES:
        stage3_decode.train(config("--stage3.mode", mode))
        saved = load_checkpoint(run_dir / f"stage3_{mode}" / "checkpoint.pt")
        assert saved["metrics"]["relative_return"] == pytest.approx(
            (saved["metrics"]["return_mean"] - 0.5) / (10.1 - 0.5)
        )
    process = subprocess.run(
        [sys.executable, str(LAPO / "report.py"), *options(tmp_path)], capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr
    assert f"1 that of the expert that {NAME} names" in process.stdout
    assert {"returns.png", "predictions.png"} <= {path.name for path in run_dir.iterdir()}
    played = ("--env", NAME, "--results-dir", str(tmp_path / "results"), "--episodes=2", "--num-envs=2")
    for policy in (*MODES, "random"):
        status, out, err = call_main(evaluate.main, *played, "--policy", policy, "--device=cpu")
        assert status == 0, err
        assert "(0: random, 0.50; 1: expert, 10.10)" in out
    status, _, err = call_main(evaluate.main, "--env", "maze", "--checkpoint", expert, "--device=cpu")
    assert (status, f"chooses among 4 actions, but maze has 15; play {NAME} with it" in err) == (2, True)


def test_the_grid_world_goes_on_from_its_state(module):
    first, second = (make_env(NAME, 3, seed=seed) for seed in (0, 1))
    rng = np.random.default_rng(0)
    for _ in range(70):
        first.step(rng.integers(4, size=3))
    second.set_state(first.get_state())
    for _ in range(70):
        actions = rng.integers(4, size=3)
        for mine, other in zip(first.step(actions), second.step(actions), strict=True):
            np.testing.assert_array_equal(mine, other)


def test_what_needs_planners_or_another_size_is_refused(module, tmp_path, call_main):
    recording = ("--env", NAME, "--data-dir", str(tmp_path / "data"))
    status, _, err = call_main(record_expert.main, *recording)
    assert (status, "there is no planner for grid_world:make_env" in err) == (2, True)
    with pytest.raises(UserError, match="is not a Procgen game"):
        train_expert.train(load_config(options(tmp_path, "--expert.teacher=planner")))
    with pytest.raises(UserError, match=r"frames have 16×16 pixels, but data.image_size is 64; choose"):
        stage3_decode.train(load_config(options(tmp_path, "--stage3.mode=scratch", "--data.image_size=64")))


class Forgetful(Env):
    """Every episode counts its steps in the frames; nothing is saved."""

    num_actions = 2

    def __init__(self, num_envs: int):
        self.num_envs, self.time = num_envs, 0

    def observe(self) -> np.ndarray:
        return np.full((self.num_envs, 8, 8, 3), self.time, np.uint8)

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        self.time += 1
        return self.observe(), np.ones(self.num_envs, np.float32), np.zeros(self.num_envs, bool)


def test_without_a_saved_state_new_episodes_begin(capsys):
    """Returns of unfinished episodes are forgotten, statistics of rewards are kept."""
    played = Collector(Forgetful(2), 0.99, CPU, image_size=8)
    for _ in range(3):
        frames, rewards, dones = played.env.step(np.zeros(2))
        played.normalize(rewards, dones), played.tracker.update(rewards, dones)
    played.frames = torch.from_numpy(frames)
    resumed = Collector(Forgetful(2), 0.99, CPU, image_size=8)
    resumed.load_state_dict(played.state_dict())
    assert "new episodes begin" in capsys.readouterr().err
    assert not resumed.frames.any()
    assert not resumed.tracker.returns.any()
    assert not resumed.normalize.returns.any()
    assert resumed.normalize.var == played.normalize.var != 1.0


class Part:
    """Stands in for what a trainer consists of."""

    def load_state_dict(self, state: dict) -> None:
        self.last_steps = state


@pytest.mark.parametrize("saved", [[], [b"state"]])
def test_no_window_reaches_from_a_lost_episode_into_a_new_one(saved):
    trainer = PPOTrainer.__new__(PPOTrainer)
    trainer.policy, trainer.optimizer, trainer.collector, trainer.decoder = (Part() for _ in range(4))
    names = "policy", "optimizer", "collector", "decoder"
    trainer.load_state_dict({name: {"env": saved} for name in names})
    assert (trainer.decoder.last_steps is None) == (saved == [])
