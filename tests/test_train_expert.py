"""train_expert.py and experts/dagger.py: experts made by PPO, or distilled from a planner."""

import json
import signal
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lapo import stage3_decode, train_expert
from lapo.acting import checkpoint_actor, steps_played
from lapo.config import Config, DaggerConfig, to_dict, validate
from lapo.errors import UserError
from lapo.experts.dagger import UNKNOWN, Dagger, ParallelExpert
from lapo.experts.expert import LEFT, RIGHT, Expert
from lapo.experts.registry import expert_name, make_expert
from lapo.games.vec_env import VecEnv
from lapo.interface import load_policy
from lapo.models import Policy
from lapo.policies import load_policy_checkpoint
from lapo.runs.checkpoints import load_checkpoint
from support import CPU, TINY, Workplace, numbered_frames, read_numbers

GAME = "bigfish"  # its episodes are short, and its planner is fast
PLANNER = ["--env", GAME, "--teacher", "planner"]
ROUNDS = validate(TINY["dagger"] | {"lr": 1e-3}, DaggerConfig)
"""Five rounds, of which two are kept."""


def folder_of(workplace: Workplace, exp: str = "main") -> Path:
    return workplace.results / exp / GAME / "seed0" / "expert"


def config(workplace: Workplace, teacher: str = "planner", lr: str = "1e-3") -> Config:
    """The configuration that the command of `distilled` makes, but for what is given."""
    return workplace.config(*PLANNER[:2], "--expert.teacher", teacher, "--dagger.lr", lr)


def lines(folder: Path) -> list[dict]:
    """The lines of a run's metrics, without the time they took."""
    return [
        {key: value for key, value in json.loads(line).items() if key != "seconds"}
        for line in (folder / "metrics.jsonl").read_text().splitlines()
    ]


def assert_equal_runs(found: Path, expected: Path) -> None:
    """Equal metrics and, bit for bit, equal weights."""
    assert lines(found) == lines(expected)
    ours, theirs = (load_checkpoint(folder / "checkpoint.pt") for folder in (found, expected))
    assert ours["metrics"] == theirs["metrics"]
    for key, value in theirs["state"]["policy"].items():
        assert torch.equal(ours["state"]["policy"][key], value), key


@pytest.fixture(scope="module")
def distilled(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    """A workplace with an expert distilled by the real command, to be left as it is."""
    workplace = Workplace(tmp_path_factory.mktemp("distilled"))
    done = workplace.run("train_expert.py", *PLANNER)
    assert done.returncode == 0, done.stderr
    path = folder_of(workplace) / "checkpoint.pt"
    assert f"expert done: {path}\n" in done.stdout
    assert done.stdout.endswith(f"`python record_expert.py --env {GAME} --expert {path}`\n")
    return workplace


# ---------------------------------------------------------------- the command


def test_the_finished_checkpoint_is_a_small_file_that_says_what_it_is(distilled):
    path = folder_of(distilled) / "checkpoint.pt"
    assert {file.name for file in path.parent.iterdir()} == {"checkpoint.pt", "config.yaml", "metrics.jsonl"}
    assert path.stat().st_size < 3_000_000
    expert = torch.load(path, weights_only=True)
    assert expert["state"].keys() == {"policy", "origin"}
    assert expert["state"]["origin"].keys() == {"method", "procgen", "experts"}
    assert expert["state"]["origin"]["method"] == f"DAgger, taught by {expert_name(GAME)}"
    config = expert["config"]
    assert (config["env"], config["seed"], config["visuals"]) == (GAME, 0, "full")
    assert config["expert"]["teacher"] == "planner"
    assert expert["metrics"].keys() >= {"return_mean", "return_stderr", "episodes", "env_steps", "agreement"}
    assert expert["metrics"]["env_steps"] == steps_played(expert) == 160
    assert expert["provenance"].keys() == {"revision", "python", "torch"}


def test_an_expert_acts_by_its_weights(distilled):
    expert = load_policy_checkpoint(folder_of(distilled) / "checkpoint.pt")
    policy = Policy(15, 1)
    policy.load_state_dict(expert["state"]["policy"])
    frames = np.random.default_rng(0).integers(256, size=(32, 64, 64, 3), dtype=np.uint8)
    expected = policy.logits(torch.from_numpy(frames)).argmax(-1)
    assert np.array_equal(checkpoint_actor(expert, CPU, greedy=True)(frames), expected)
    assert np.array_equal(load_policy(folder_of(distilled), "cpu").act(frames, greedy=True), expected)


def test_an_expert_outlives_keys_of_the_config_that_do_not_shape_it(distilled):
    expert = load_policy_checkpoint(folder_of(distilled) / "checkpoint.pt")
    del expert["config"]["probe"], expert["config"]["model"]["wm_width"]
    expert["config"]["of_old"] = {"a": 1}
    action = checkpoint_actor(expert, CPU, True)(np.zeros((2, 64, 64, 3), np.uint8))
    assert action.shape == (2,)


def test_a_finished_run_says_so_and_another_setting_is_refused(distilled, capsys):
    path = folder_of(distilled) / "checkpoint.pt"
    before = path.read_bytes()
    train_expert.train(config(distilled))
    assert "finished already\n" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"with other settings \(dagger\.lr: 0\.001 → 0\.5\); choose another"):
        train_expert.train(config(distilled, lr="0.5"))
    with pytest.raises(UserError, match=r"with other settings \(expert\.teacher: planner → none"):
        train_expert.train(config(distilled, teacher="none"))
    assert path.read_bytes() == before


def test_a_killed_run_ends_as_an_uninterrupted_one(distilled, tmp_path):
    """Killed once the buffer has begun to forget its first rounds."""
    workplace = Workplace(tmp_path)
    path = folder_of(workplace) / "checkpoint.pt"
    process = workplace.start("train_expert.py", *PLANNER)
    while not path.exists() or load_checkpoint(path)["step"] < 3:
        assert process.poll() is None
        time.sleep(0.1)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not load_checkpoint(path)["finished"]
    train_expert.train(config(workplace))
    assert_equal_runs(path.parent, folder_of(distilled))


def test_ppo_is_stage_3_from_scratch(workplace, monkeypatch, capsys):
    command = ["train_expert.py", "--config", str(workplace.config_file), "--expert.steps", "96"]
    monkeypatch.setattr(sys, "argv", command)
    train_expert.main()
    assert "expert of bossfight, seed 0, on cpu (1 threads), fp32\n" in capsys.readouterr().out
    expert = load_policy_checkpoint(workplace.run_dir("expert") / "checkpoint.pt")
    assert expert["state"]["origin"]["method"] == "PPO from scratch"
    assert steps_played(expert) == 96
    stage3_decode.train(workplace.config("--stage3.mode", "scratch", "--stage3.steps", "96"))
    scratch = load_policy_checkpoint(workplace.run_dir("stage3_scratch") / "checkpoint.pt")
    assert lines(workplace.run_dir("expert")) == lines(workplace.run_dir("stage3_scratch"))
    for key, value in scratch["state"]["policy"].items():
        assert torch.equal(expert["state"]["policy"][key], value), key


def test_mistakes(workplace, monkeypatch):
    with pytest.raises(UserError, match="'mygame' is not a Procgen game"):
        train_expert.train(workplace.config("--env", "mygame"))
    monkeypatch.setattr(sys, "argv", ["train_expert.py", "--teacher", "planer"])
    with pytest.raises(
        UserError, match=r"'expert\.teacher' is 'planer': input should be 'none' or 'planner'"
    ):
        train_expert.main()


# ---------------------------------------------------------------- DAgger


def make_dagger(
    cfg: DaggerConfig = ROUNDS, env: VecEnv | None = None, make=None, game: str = "maze"
) -> Dagger:
    torch.manual_seed(0)
    env = env or VecEnv(game, cfg.num_envs, seed=3, num_threads=0)
    return Dagger(cfg, CPU, env, make or partial(make_expert, game), Policy(15, 1))


class Counter:
    """An environment whose frames are numbered, 1000 · environment + step; its states spell the same."""

    def __init__(self, num_envs: int):
        self.num_envs, self.steps = num_envs, 0

    def numbers(self) -> np.ndarray:
        return 1000 * np.arange(self.num_envs) + self.steps

    def observe(self) -> np.ndarray:
        return numbered_frames(self.numbers())

    def get_state(self) -> list[bytes]:
        return [str(number).encode() for number in self.numbers()]

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        self.steps += 1
        return self.observe(), np.ones(self.num_envs), np.full(self.num_envs, self.steps % 10 == 0)


class Numberer(Expert):
    """Chooses by the number that a state spells."""

    def act(self, states: list[bytes]) -> np.ndarray:
        return np.array([int(state) % 9 for state in states], np.int32)


def test_the_latest_frames_are_kept_each_with_its_own_label():
    dagger = make_dagger(env=Counter(4), make=lambda number: Numberer())
    seen = []
    for number in range(ROUNDS.rounds):
        for step in range(8 * number, 8 * number + 8):
            seen += [1000 * env + step for env in range(4)]
        dagger.collect()
        filled = min(number + 1, 2)
        kept = read_numbers(dagger.frames[:filled].flatten(0, 2))
        assert sorted(kept) == sorted(seen[-64:])
        assert np.array_equal(dagger.labels[:filled].flatten().numpy(), kept % 9)
    assert list(dagger.recent) == [10.0] * 4 * 4


@pytest.mark.slow
@pytest.mark.parametrize("game", ["maze", "coinrun"])
def test_labels_are_what_the_teacher_does_at_exactly_the_frames_seen(game):
    """A teacher who has seen nothing before; the one in coinrun carries out plans of several steps."""
    dagger = make_dagger(game=game)
    for _ in range(2):
        dagger.collect()
    env = VecEnv(game, 4, seed=3, num_threads=0)
    for frames, labels, actions in zip(
        dagger.frames.flatten(0, 1), dagger.labels.flatten(0, 1), dagger.actions.flatten(0, 1), strict=True
    ):
        assert np.array_equal(env.observe(), frames)
        assert np.array_equal(make_expert(game, 4).act(env.get_state()), labels)
        env.step(actions.numpy().astype(np.int32))
    # At first the teacher acts alone, then the two take turns.
    assert torch.equal(dagger.actions[0], dagger.labels[0])
    assert not torch.equal(dagger.actions[1], dagger.labels[1])


def test_every_third_frame_is_labelled_and_each_that_the_teacher_plays():
    """The teacher is asked about an environment's every third frame, the policy is trained on these only."""
    cfg = validate(to_dict(ROUNDS) | {"label_every": 3, "num_envs": 6, "buffer": 96}, DaggerConfig)
    dagger = make_dagger(cfg, Counter(6), lambda number: Numberer())
    dagger.collect()  # the teacher plays
    assert (dagger.labels[0] != UNKNOWN).all()
    dagger.collect()  # the other round that is kept
    dagger.count = 4
    agreement = dagger.collect()["agreement"].item()
    labels, numbers = dagger.labels[0], read_numbers(dagger.frames[0].flatten(0, 1)).reshape(8, 6)
    for env in range(6):
        known = (labels[:, env] != UNKNOWN).nonzero().squeeze(1)
        assert known.diff().tolist() == [3] * (len(known) - 1)
        assert known[0] < 3
        assert np.array_equal(labels[known, env].numpy(), numbers[known, env] % 9)
    known = labels != UNKNOWN
    predicted = dagger.policy.logits(dagger.frames[0].flatten(0, 1)).argmax(-1).reshape(8, 6)
    assert agreement == pytest.approx((predicted == labels)[known].float().mean().item())
    trained = []
    dagger.loss_of = lambda frames, labels: (trained.append(labels), dagger._loss_of(frames, labels))[1]
    dagger.fit()
    assert len(torch.cat(trained).unique()) > 1
    assert torch.cat(trained).max() < 9


def test_the_policy_acts_alone_in_the_end():
    dagger = make_dagger()
    dagger.count = 3
    dagger.policy.policy_head.weight.data.zero_()
    dagger.policy.policy_head.bias.data[:] = torch.eye(15)[14] * 100
    metrics = dagger.collect()
    assert (dagger.actions[1] == 14).all()
    assert metrics["agreement"] == 0


def test_learning_equals_a_plain_loop():
    """Frames drawn evenly from all kept, cross-entropy, Adam, a rate that falls to 0."""
    dagger, policy = make_dagger(), make_dagger().policy
    optimizer = torch.optim.Adam(policy.parameters())
    for number in range(4):
        dagger.collect()
        optimizer.param_groups[0]["lr"] = 1e-3 * (1 - number / 5)
        filled = min(number + 1, 2)
        frames, labels = dagger.frames[:filled].flatten(0, 2), dagger.labels[:filled].flatten()
        random, losses = torch.get_rng_state(), []
        for _ in range(ROUNDS.updates):
            ids = torch.randint(32 * filled, (ROUNDS.batch_size,))
            loss = F.cross_entropy(policy.logits(frames[ids]), labels[ids].long())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        torch.set_rng_state(random)
        assert dagger.fit()["loss"].item() == pytest.approx(np.mean(losses), rel=1e-4)
    for ours, theirs in zip(policy.parameters(), dagger.policy.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


def test_what_is_saved_brings_back_all_frames():
    dagger, again = make_dagger(), make_dagger()
    for _ in range(3):
        dagger.collect()
    state = dagger.state_dict()
    assert sum(x.numel() for x in state["start"]) < 4 * 30_000
    again.load_state_dict(state)
    assert torch.equal(again.frames, dagger.frames)
    assert torch.equal(again.labels, dagger.labels)
    assert list(again.starts) == list(dagger.starts)
    assert again.env.get_state() == dagger.env.get_state()


@pytest.mark.slow
def test_learning_to_go_where_the_teacher_goes():
    """Behind the same wall of pixels, half of the environments are told left and half right."""

    class Sides(Expert):
        def act(self, states: list[bytes]) -> np.ndarray:
            return np.array([RIGHT if int(state) % 2 else LEFT for state in states], np.int32)

    class Bright(Counter):
        def observe(self) -> np.ndarray:
            frames = np.zeros((self.num_envs, 64, 64, 3), np.uint8)
            frames[self.numbers() % 2 == 1] = 255
            return frames

    values = to_dict(ROUNDS) | {"steps": 256, "updates": 6}
    cfg = validate(values, DaggerConfig)
    dagger = make_dagger(cfg, Bright(4), lambda number: Sides())
    agreements = []
    for _ in range(cfg.rounds):
        agreements.append(dagger.collect()["agreement"].item())
        dagger.fit()
    assert agreements[0] < 0.6
    assert agreements[-1] == 1


def test_a_panel_says_what_one_expert_says():
    env = VecEnv("bigfish", 20, seed=0, num_threads=0)
    one, panel = make_expert("bigfish", 20), ParallelExpert(partial(make_expert, "bigfish"), 20)
    assert len(panel.experts) == 16
    for step in range(20):
        states = env.get_state()
        label = one.act(states)
        assert np.array_equal(panel.act(states), label)
        env.step(label)
        if step == 10:
            one.forget()
            panel.forget()
