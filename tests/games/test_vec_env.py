import math
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from procgen import ProcgenGym3Env

from lapo.errors import UserError
from lapo.games import vec_env
from lapo.games.simulator_state import State
from lapo.games.vec_env import ALL_LEVELS, HELD_OUT_LEVELS, TRAIN_LEVELS, EpisodeTracker, VecEnv, num_cores
from lapo.ppo import ReturnNormalizer
from support import PATIENCE, ROOT

FORWARD = [5, 7, 8, 9]  # UP, RIGHT, RIGHT-UP and one more: episodes end soon


def random_steps(env: VecEnv, steps: int, seed: int = 0) -> list[tuple[np.ndarray, ...]]:
    rng = np.random.default_rng(seed)
    return [env.step(rng.choice(FORWARD, env.num_envs)) for _ in range(steps)]


def same(left: list[tuple[np.ndarray, ...]], right: list[tuple[np.ndarray, ...]]) -> bool:
    return all(
        np.array_equal(a, b) for x, y in zip(left, right, strict=True) for a, b in zip(x, y, strict=True)
    )


def test_shapes_and_types() -> None:
    env = VecEnv("coinrun", 3, seed=0)
    obs = env.observe()
    assert obs.shape == (3, 64, 64, 3)
    assert obs.dtype == np.uint8
    obs, rewards, dones = env.step(np.zeros(3, np.int64))
    assert (obs.shape, rewards.shape, dones.shape) == ((3, 64, 64, 3), (3,), (3,))
    assert (obs.dtype, rewards.dtype, dones.dtype) == (np.uint8, np.float32, bool)


def test_seed_decides_everything_and_threads_nothing() -> None:
    runs = [
        random_steps(VecEnv("leaper", 4, seed=seed, num_threads=threads), 200)
        for seed, threads in ((1, 0), (1, 3), (2, 0))
    ]
    assert any(dones.any() for _, _, dones in runs[0])
    assert same(runs[0], runs[1])
    assert not same(runs[0], runs[2])


@pytest.mark.parametrize("visuals", ["full", "plain"])
def test_games_are_procgens_own_in_easy_mode(visuals) -> None:
    plain = visuals == "plain"
    options = {"distribution_mode": "easy", "start_level": 7, "num_levels": 3, "rand_seed": 5}
    theirs = ProcgenGym3Env(4, "coinrun", use_backgrounds=not plain, restrict_themes=plain, **options)
    ours = VecEnv("coinrun", 4, seed=5, levels=(7, 3), visuals=visuals)
    for step in range(20):
        np.testing.assert_array_equal(ours.observe(), theirs.observe()[1]["rgb"])
        actions = np.full(4, 5 + step % 4, np.int32)
        theirs.act(actions)
        ours.act(actions)
    theirs.close()


def test_arrays_are_the_callers_to_keep() -> None:
    env = VecEnv("starpilot", 2, seed=0)
    kept = env.observe()
    copy = kept.copy()
    random_steps(env, 5)
    assert np.array_equal(kept, copy)
    assert not np.array_equal(kept, env.observe())


@pytest.mark.parametrize("game", ["coinrun", "jumper", "maze"])
def test_plain_visuals_change_the_frames_and_nothing_else(game: str) -> None:
    full, plain = (VecEnv(game, 4, seed=1, visuals=visuals) for visuals in ("full", "plain"))
    for (obs, *facts), (plain_obs, *plain_facts) in zip(
        random_steps(full, 200), random_steps(plain, 200), strict=True
    ):
        assert same([tuple(facts)], [tuple(plain_facts)])
        assert (obs != plain_obs).any()
    assert (full.level_seeds() == plain.level_seeds()).all()


@pytest.mark.parametrize("game", ["coinrun", "leaper", "starpilot"])
def test_state_continues_in_another_environment(game: str) -> None:
    original, copy = VecEnv(game, 4, seed=1), VecEnv(game, 4, seed=2)
    random_steps(original, 20)
    random_steps(copy, 7, seed=5)
    copy.set_state(original.get_state())
    assert np.array_equal(copy.observe(), original.observe())
    # Long enough for episodes to end: the levels that follow are the same too.
    expected, found = random_steps(original, 150), random_steps(copy, 150)
    assert any(dones.any() for _, _, dones in expected)
    assert same(expected, found)


def test_state_waits_for_the_step_in_progress() -> None:
    env, reference = VecEnv("coinrun", 16, seed=0), VecEnv("coinrun", 16, seed=0)
    for _ in range(10):
        actions = np.full(16, 7)
        env.act(actions)
        reference.step(actions)
        assert env.get_state() == reference.get_state()


def test_done_frame_is_the_first_of_the_next_episode() -> None:
    env = VecEnv("leaper", 8, seed=0)
    ended = 0
    for _, _, dones in (env.step(np.full(8, 5)) for _ in range(100)):
        times = np.array([State(state).episode[1] for state in env.get_state()])
        assert ((times == 0) == dones).all()
        ended += dones.sum()
    assert ended > 0


FREED_DURING_ANOTHERS_LOOKUP = """
import gc, sys
from lapo.games.vec_env import VecEnv

gc.disable()
cycle = [VecEnv("maze", 1, seed=0, num_threads=0)]
cycle.append(cycle)
del cycle
collected = []
def profile(frame, event, argument):
    if frame.f_code.co_name == "accessor_function" and not collected:
        collected.append(gc.collect())
sys.setprofile(profile)
VecEnv("maze", 1, seed=0, num_threads=0)
sys.setprofile(None)
print(bool(collected))
"""


@pytest.mark.slow
def test_environment_can_be_freed_while_another_is_made() -> None:
    command = [sys.executable, "-c", FREED_DURING_ANOTHERS_LOOKUP]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)
    assert result.stdout == "True\n", result.stderr


def test_level_ranges_are_kept_and_disjoint() -> None:
    for start, number in (TRAIN_LEVELS, HELD_OUT_LEVELS):
        env = VecEnv("leaper", 64, seed=0, levels=(start, number))
        seen = set()
        for _ in range(60):
            seen.update(env.level_seeds().tolist())
            env.step(np.full(64, 5))
        assert len(seen) > 64
        assert min(seen) >= start
        assert max(seen) < start + number
    assert TRAIN_LEVELS[0] + TRAIN_LEVELS[1] <= HELD_OUT_LEVELS[0]
    assert VecEnv("leaper", 64, seed=0, levels=ALL_LEVELS).level_seeds().max() > sum(HELD_OUT_LEVELS)


def test_procgen_ignores_the_first_level_of_an_endless_range() -> None:
    seeds = [VecEnv("maze", 16, seed=0, levels=(start, 0)).level_seeds() for start in (0, 1_000_000)]
    assert np.array_equal(seeds[0], seeds[1])


def test_return_normalizer_equals_a_naive_one() -> None:
    rng = np.random.default_rng(0)
    gamma, num_envs, steps = 0.9, 3, 50
    rewards = rng.exponential(size=(steps, num_envs)) * (rng.random((steps, num_envs)) < 0.3)
    dones = rng.random((steps, num_envs)) < 0.1
    normalizer = ReturnNormalizer(num_envs, gamma=gamma, clip=2.0)
    returns, seen = [0.0] * num_envs, []
    for t in range(steps):
        for i in range(num_envs):
            returns[i] = returns[i] * gamma + rewards[t, i]
            seen.append(returns[i])
        # As if a sample of weight 1e-4, with mean 0 and variance 1, had come first.
        weight = len(seen) + 1e-4
        mean = sum(seen) / weight
        variance = (sum(value**2 for value in seen) + 1e-4) / weight - mean**2
        expected = np.clip(rewards[t] / math.sqrt(variance + 1e-8), -2, 2)
        scaled = normalizer(rewards[t], dones[t])
        assert scaled.dtype == np.float32
        np.testing.assert_allclose(scaled, expected, rtol=1e-5)
        for i in range(num_envs):
            if dones[t, i]:
                returns[i] = 0.0


def test_scaled_rewards_lie_within_ten() -> None:
    normalizer = ReturnNormalizer(100, gamma=0.9)
    alive, rewards = np.zeros(100, bool), np.zeros(100)
    rewards[:2] = 1000, -1000
    for _ in range(5):
        normalizer(np.zeros(100), alive)
    scaled = normalizer(rewards, alive)
    assert (scaled[0], scaled[1], scaled[2]) == (10, -10, 0)


def test_normalizer_and_tracker_continue_from_their_state() -> None:
    rng = np.random.default_rng(0)
    rewards, dones = rng.normal(size=(20, 2)), rng.random((20, 2)) < 0.2
    for make in (lambda: ReturnNormalizer(2, gamma=0.9).__call__, lambda: EpisodeTracker(2).update):
        straight, first, second = make(), make(), make()
        expected = [straight(*step) for step in zip(rewards, dones, strict=True)]
        found = [first(*step) for step in zip(rewards[:10], dones[:10], strict=True)]
        second.__self__.load_state_dict(first.__self__.state_dict())
        found += [second(*step) for step in zip(rewards[10:], dones[10:], strict=True)]
        for left, right in zip(expected, found, strict=True):
            np.testing.assert_array_equal(np.array(left), np.array(right))


def test_tracker_gives_finished_episodes_in_order_of_environments() -> None:
    tracker = EpisodeTracker(3)
    returns, lengths = tracker.update(np.array([1.0, 2.0, 3.0]), np.array([False, True, False]))
    assert (returns.tolist(), lengths.tolist()) == ([2.0], [1])
    returns, lengths = tracker.update(np.array([1.0, 2.0, 3.0]), np.array([True, True, False]))
    assert (returns.tolist(), lengths.tolist()) == ([2.0, 2.0], [2, 1])


def test_only_cores_that_we_may_use_are_counted(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda process: {3, 5}, raising=False)
    assert num_cores() == 2
    monkeypatch.delattr("os.sched_getaffinity")
    assert num_cores() == os.cpu_count()


@pytest.mark.parametrize("missing", ["gym_notices", "procgen"])
def test_a_missing_simulator_is_one_sentence(monkeypatch, missing) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.setitem(sys.modules, f"{missing}.notices", None)
    with pytest.raises(UserError, match=rf"no module '{missing}[.\w]*'\); `pip install -e '\.\[procgen\]'`"):
        VecEnv("maze", 1, seed=0)


def test_a_library_that_the_simulator_lacks_is_named(monkeypatch):
    def lacks(**options):
        raise OSError(
            "cannot load library '/site/procgen/libenv.so': libGL.so.1: cannot open shared object"
            " file: No such file or directory.  Additionally, ctypes.util.find_library() did not manage"
        )

    monkeypatch.setattr(vec_env, "_procgen", lambda: SimpleNamespace(ProcgenGym3Env=lacks))
    with pytest.raises(UserError, match=r"cannot be loaded: libGL\.so\.1 is missing, .* package libgl1"):
        VecEnv("maze", 1, seed=0)
