"""Playing and counting episodes."""

import math

import numpy as np
import pytest

from lapo.acting import Evaluation, play


class Clockwork:
    """Environment i's episodes last `lengths[i]` steps and return `lengths[i]`."""

    def __init__(self, lengths: list[int]):
        self.num_envs, self.lengths, self.steps = len(lengths), np.array(lengths), 0

    def observe(self) -> np.ndarray:
        return np.full(self.num_envs, self.steps)

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        assert ((actions == self.steps) | (actions == 0)).all()
        self.steps += 1
        return self.observe(), np.ones(self.num_envs), self.steps % self.lengths == 0


def test_skip_finished_asks_only_for_environments_that_still_contribute() -> None:
    asked = []

    def act(obs: np.ndarray) -> np.ndarray:
        asked.append(len(obs))
        return obs

    expected = play(lambda obs: obs, Clockwork([1, 10, 25]), episodes=6)
    result = play(act, Clockwork([1, 10, 25]), episodes=6, skip_finished=True)
    assert (result.returns == expected.returns).all()
    assert (result.lengths == expected.lengths).all()
    assert asked == [3] * 2 + [2] * 18 + [1] * 30


def test_play_counts_the_same_number_of_episodes_everywhere() -> None:
    env = Clockwork([1, 10, 25])
    result = play(lambda obs: obs, env, episodes=6)
    assert result.returns.tolist() == [1, 1, 10, 10, 25, 25]
    assert result.lengths.tolist() == [1, 1, 10, 10, 25, 25]
    assert env.steps == 50
    assert play(lambda obs: obs, Clockwork([1, 10, 25]), episodes=4).episodes == 6


def test_evaluation_statistics() -> None:
    result = Evaluation(np.array([0.0, 10.0, 10.0, 0.0]), np.ones(4, int))
    assert (result.episodes, result.mean) == (4, 5.0)
    assert result.stderr == pytest.approx(math.sqrt(100 / 3) / 2)
    assert math.isnan(Evaluation(np.array([1.0]), np.ones(1, int)).stderr)
