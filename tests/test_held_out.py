"""What is measured on held-out levels and held-out frames, and how the policies evaluated there act."""

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finished_run import finished_run
from lapo import evaluate, stage3_decode, train_expert
from lapo.acting import evaluate_policy, network_actor, random_actor
from lapo.games.vec_env import HELD_OUT_LEVELS, VecEnv
from lapo.models import make_acting_policy, make_idm, make_latent_policy, normalize, stack_frames
from lapo.runs.checkpoints import load_checkpoint
from support import CPU, Workplace, logged


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    """A run with all stages and modes, to be left as it is."""
    return finished_run(tmp_path_factory.getbasetemp() / "finished")


# ---------------------------------------------------------------- levels


class Games:
    """All games that were played: how they were made, levels shown at the start, actions step by step."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.made: list[tuple[int, int, str]] = []  # environments, seed, visuals
        self.levels: list[np.ndarray] = []
        self.actions: list[list[int]] = []
        make, act = VecEnv.__init__, VecEnv.act

        def noting_make(env: VecEnv, *args, **options) -> None:
            make(env, *args, **options)
            self.made.append((env.num_envs, options["seed"], options.get("visuals", "full")))
            self.levels.append(env.level_seeds())
            self.actions.append([])

        def noting_act(env: VecEnv, actions: np.ndarray) -> None:
            self.actions[-1] += np.asarray(actions).tolist()
            act(env, actions)

        monkeypatch.setattr(VecEnv, "__init__", noting_make)
        monkeypatch.setattr(VecEnv, "act", noting_act)

    def held_out(self) -> list[bool]:
        """Whether all levels of each game were held out."""
        first, number = HELD_OUT_LEVELS
        return [bool(((first <= seeds) & (seeds < first + number)).all()) for seeds in self.levels]


@pytest.fixture
def games(monkeypatch: pytest.MonkeyPatch) -> Games:
    """What is played from now on."""
    return Games(monkeypatch)


@pytest.fixture(scope="session")
def played(trained: Workplace) -> Games:
    """What the modes of stage 3 played, as experiment `held-out`."""
    trained.branch("held-out", "stage1", "stage2")
    with pytest.MonkeyPatch.context() as patch:
        games = Games(patch)
        for mode in ("online", "scratch", "offline", "bc"):
            stage3_decode.train(trained.config("--exp", "held-out", "--stage3.mode", mode))
    return games


def test_policies_learn_on_all_levels_and_are_judged_on_held_out_ones(played):
    assert played.held_out() == [False, True, False, True, True, True]
    for levels, held_out in zip(played.levels, played.held_out(), strict=True):
        assert held_out or levels.max() > sum(HELD_OUT_LEVELS)


@pytest.mark.parametrize("teacher", ["none", "planner"])
def test_experts_are_judged_on_held_out_levels(workplace, games, monkeypatch, teacher):
    """As everybody: PPO from scratch is stage 3's. Seed and visuals are those of the run everywhere."""
    options = ("--env", "maze", "--seed", "5", "--visuals", "plain", "--expert.steps", "32")
    train_expert.train(workplace.config(*options, "--expert.teacher", teacher))
    assert games.held_out() == [False, True]  # maze's planner needs no simulator
    assert games.made == [(4, 5, "plain"), (2, 5, "plain")]


@pytest.mark.parametrize("policy", ["online", "bc", "random", "planner"])
def test_evaluate_plays_held_out_levels(finished, games, call_main, policy):
    options = ["--results-dir", str(finished.results), "--policy", policy, "--device", "cpu"]
    options += ["--env", "maze" if policy in ("random", "planner") else finished.GAME]
    status, _, err = call_main(evaluate.main, *options, "--episodes", "2", "--num-envs", "2")
    assert (status, err) == (0, "")
    assert games.held_out() == [True]


# ---------------------------------------------------------------- actions


class Leaning(nn.Module):
    """Action 7 is twice as likely as each of the others."""

    def logits(self, frames: Tensor) -> Tensor:
        return 0.7 * F.one_hot(torch.full((len(frames),), 7), 15).float()


def test_actions_are_drawn_as_the_policy_says_unless_it_is_greedy():
    frames = np.zeros((3000, 64, 64, 3), np.uint8)
    assert (network_actor(Leaning(), CPU, greedy=True)(frames) == 7).all()
    leaning = Leaning().logits(torch.zeros(1)).softmax(-1)[0].numpy()
    uniform = np.full(15, 1 / 15)
    for act, probs in ((network_actor(Leaning(), CPU, greedy=False), leaning), (random_actor(0), uniform)):
        counts = np.bincount(act(frames), minlength=15)
        assert (abs(counts - 3000 * probs) < 5 * np.sqrt(3000 * probs)).all()


def through_evaluate_policy(
    workplace: Workplace, finished: Workplace, call_main: Callable, greedy: bool
) -> None:
    cfg = workplace.config("--eval.greedy", str(greedy).lower(), "--eval.episodes", "1")
    evaluate_policy(Leaning(), cfg, CPU)


def through_evaluate(workplace: Workplace, finished: Workplace, call_main: Callable, greedy: bool) -> None:
    options = ["--results-dir", str(finished.results), "--policy", "bc", "--env", finished.GAME]
    options += ["--episodes", "1", "--num-envs", "1", "--device", "cpu"]
    assert call_main(evaluate.main, *options, *(["--greedy"] if greedy else []))[0] == 0


@pytest.mark.parametrize("judge", [through_evaluate_policy, through_evaluate])
def test_policies_are_judged_greedily_where_that_is_asked_for(
    workplace, finished, games, call_main, monkeypatch, judge
):
    monkeypatch.setattr("lapo.acting.restore_policy", lambda checkpoint, compute: Leaning())
    for greedy in (True, False):
        judge(workplace, finished, call_main, greedy)
    assert set(games.actions[0]) == {7}
    assert len(set(games.actions[1])) > 5


# ---------------------------------------------------------------- frames


def held_out_windows(workplace: Workplace) -> Iterator[tuple[Tensor, int]]:
    """The windows (T, H, W, C) of the test folder that no end touches, with the actions at their middles."""
    with np.load(workplace.data / workplace.GAME / "test" / "0.npz") as chunk:
        for start in range(len(chunk["obs"]) - 2):
            if not chunk["done"][start : start + 3].any():
                yield torch.from_numpy(chunk["obs"][start : start + 3]), int(chunk["ta"][start + 1])


def test_stages_1_and_2_measure_the_held_out_frames(trained):
    """Every time, of all of them."""
    windows, ta = zip(*held_out_windows(trained), strict=True)
    frames = torch.stack(windows)
    images = stack_frames(frames)
    copy_error = F.mse_loss(images[:, 3:6], images[:, 6:]).item()
    second = np.array(ta[len(ta) // 2 :])
    majority = np.bincount(second).max() / len(second)
    first, *lines = logged(trained.run_dir("stage1"))
    measured = [line for line in lines if "wm_loss_test" in line]
    assert [line["step"] for line in measured] == [4, 8]
    for line in ({key.removeprefix("untrained_"): value for key, value in first.items()}, *measured):
        assert line["copy_loss_test"] == pytest.approx(copy_error, rel=1e-5)
        assert line["majority_acc_test"] == pytest.approx(majority)

    cfg = trained.config()
    idm, policy = make_idm(cfg), make_latent_policy(cfg)
    idm.load_state_dict(load_checkpoint(trained.run_dir("stage1") / "checkpoint.pt")["state"]["idm"])
    final = load_checkpoint(trained.run_dir("stage2") / "checkpoint.pt")
    policy.load_state_dict(final["state"]["policy"])
    loss = F.mse_loss(policy(normalize(frames[:, 1])), idm.infer_latents(images)).item()
    assert final["metrics"]["loss_test"] == pytest.approx(loss, rel=1e-4)


@pytest.mark.parametrize("mode", ["offline", "bc"])
def test_policies_learnt_from_labels_are_judged_on_the_held_out_frames(trained, played, mode):
    final = load_checkpoint(trained.run_dir(f"stage3_{mode}", "held-out") / "checkpoint.pt")
    windows, ta = zip(*held_out_windows(trained), strict=True)
    policy = make_acting_policy(trained.config(), mode, 15)
    policy.load_state_dict(final["state"]["policy"])
    guesses = policy.logits(torch.stack(windows)[:, 1]).argmax(-1).numpy()
    assert final["metrics"]["action_acc_test"] == pytest.approx((guesses == np.array(ta)).mean())
    assert final["metrics"]["majority_acc_test"] == pytest.approx(np.bincount(ta).max() / len(ta))
