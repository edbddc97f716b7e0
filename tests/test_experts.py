import numpy as np
import pytest

from errors import UserError
from experts import EXPERTS, LEFT, RIGHT, RIGHT_UP, Explorer, State, find_expert, make_expert
from procgen_env import GAMES, HELD_OUT_LEVELS, Evaluation, VecEnv, play


def evaluate(game: str, *, num_envs: int, episodes: int, seed: int = 0) -> Evaluation:
    env = VecEnv(game, num_envs, seed=seed, levels=HELD_OUT_LEVELS, num_threads=0)
    expert = make_expert(game, num_envs)
    return play(lambda obs: expert.act(env.get_state()), env, episodes)


@pytest.mark.parametrize("game", GAMES)
def test_state_is_read_in_every_game(game: str) -> None:
    env = VecEnv(game, 2, seed=0, num_threads=0)
    for time in range(3):
        for level, data in zip(env.level_seeds(), env.get_state(), strict=True):
            state = State(data)
            assert state.episode == (level, time)
            height, width = state.grid.shape
            assert 0 < state.agent["x"] < width
            assert 0 < state.agent["y"] < height
            for name in ("x", "y", "vx", "vy", "rx", "ry"):
                assert np.isfinite(state.entities[name]).all()
            assert (np.abs(state.entities["type"]) < 1000).all()
        env.step(np.full(2, 4))


def test_agent_is_where_its_moves_lead() -> None:
    env = VecEnv("maze", 8, seed=0, num_threads=0)
    walls = [State(state).grid != 51 for state in env.get_state()]
    before = [State(state).agent for state in env.get_state()]
    _, _, dones = env.step(np.full(8, RIGHT))
    assert not dones.all()
    for i in np.flatnonzero(~dones):
        free, old, new = walls[i], before[i], State(env.get_state()[i]).agent
        assert new["y"] == old["y"]
        assert new["x"] - old["x"] == free[int(old["y"]), int(old["x"]) + 1]


@pytest.mark.parametrize("game", ["bigfish", "coinrun", "climber", "jumper", "starpilot"])
def test_states_without_looks_play_on_alike(game: str) -> None:
    env = VecEnv(game, 8, seed=0, num_threads=0)
    simulator = VecEnv(game, 8, seed=1, num_threads=0)
    rng = np.random.default_rng(0)
    for _ in range(20):
        env.step(rng.integers(15, size=8))
    states = env.get_state()
    simulator.set_state([State(state).without_looks() for state in states])
    playing = np.ones(8, bool)
    for _ in range(40):
        actions = rng.integers(15, size=8)
        _, rewards, dones = env.step(actions)
        _, simulated_rewards, simulated_dones = simulator.step(actions)
        assert (rewards == simulated_rewards)[playing].all()
        assert (dones == simulated_dones)[playing].all()
        playing &= ~dones
        pairs = list(zip(env.get_state(), simulator.get_state(), strict=True))
        for i in np.flatnonzero(playing):
            state, simulated = (State(data) for data in pairs[i])
            assert state.episode == simulated.episode
            assert np.array_equal(state.entities, simulated.entities)
            assert np.array_equal(state.grid, simulated.grid)
    assert playing.any()


def test_maze_expert_finds_the_cheese() -> None:
    result = evaluate("maze", num_envs=8, episodes=32)
    assert result.mean >= 9.5
    assert result.lengths.max() < 100


def test_coinrun_expert_gets_the_coin_and_keeps_to_plain_actions() -> None:
    env = VecEnv("coinrun", 4, seed=0, levels=HELD_OUT_LEVELS, num_threads=0)
    expert = make_expert("coinrun", 4)

    def act(obs: np.ndarray) -> np.ndarray:
        states = env.get_state()
        actions = expert.act(states)
        assert set(actions) <= {LEFT, RIGHT, RIGHT_UP}
        for action, data in zip(actions, states, strict=True):
            assert action != RIGHT_UP or State(data).agent["vy"] == 0
        return actions

    assert play(act, env, episodes=8).mean >= 8


def test_bigfish_expert_eats_and_lives() -> None:
    env = VecEnv("bigfish", 16, seed=0, levels=HELD_OUT_LEVELS, num_threads=0)
    expert = make_expert("bigfish", 16)
    eaten, deaths = 0.0, 0
    for _ in range(200):
        _, rewards, dones = env.step(expert.act(env.get_state()))
        eaten += rewards.sum()
        deaths += dones.sum()
    assert eaten / 16 > 8
    assert deaths <= 6


@pytest.mark.parametrize("game", EXPERTS)
def test_expert_is_a_function_of_what_it_was_shown(game: str) -> None:
    env = VecEnv(game, 3, seed=0, num_threads=0)
    one, other = make_expert(game, 3), make_expert(game, 3)
    for _ in range(12):
        states = env.get_state()
        actions = one.act(states)
        assert actions.dtype == np.int32
        assert np.array_equal(actions, other.act(states))
        env.step(actions)


def test_jumper_expert_finds_the_carrot() -> None:
    assert evaluate("jumper", num_envs=4, episodes=12).mean >= 6


def test_explorer_takes_its_share_of_random_actions() -> None:
    env = VecEnv("maze", 50, seed=0, num_threads=0)
    expert, rare, always = (make_expert("maze", 50) for _ in range(3))
    rare, always = Explorer(rare, 0.2, seed=1), Explorer(always, 1.0, seed=1)
    other, counts = 0, np.zeros(15, int)
    for _ in range(40):
        states = env.get_state()
        actions = expert.act(states)
        other += (rare.act(states) != actions).sum()
        counts += np.bincount(always.act(states), minlength=15)
        env.step(actions)
    # One random action in four is the expert's own.
    assert other / 2000 == pytest.approx(0.2 * 3 / 4, abs=0.03)
    assert counts[list(expert.actions)] / 2000 == pytest.approx(1 / 4, abs=0.05)
    assert counts.sum() == 2000


def test_simplest_action_has_the_same_effect() -> None:
    env, simulator = (VecEnv("jumper", 8, seed=0, num_threads=0) for _ in range(2))
    expert = make_expert("jumper", 8)
    rng = np.random.default_rng(0)
    simplified = 0
    for _ in range(30):
        actions = rng.choice(expert.actions, 8).astype(np.int32)
        states = env.get_state()
        simplest = expert.simplest(states, actions)
        simplified += (simplest != actions).sum()
        simulator.set_state(states)
        _, rewards, dones = simulator.step(simplest)
        _, expected_rewards, expected_dones = env.step(actions)
        assert np.array_equal(rewards, expected_rewards)
        assert np.array_equal(dones, expected_dones)
        for ours, theirs in zip(simulator.get_state(), env.get_state(), strict=True):
            for name in ("x", "y", "vx", "vy"):
                assert State(ours).agent[name] == State(theirs).agent[name]
    assert simplified > 10


def test_missing_expert_is_told_those_there_are() -> None:
    with pytest.raises(
        UserError, match="no expert for fruitbot yet; there is one for bigfish, coinrun, jumper, maze"
    ):
        find_expert("fruitbot")
    with pytest.raises(UserError, match="'pong' is not a Procgen game"):
        find_expert("pong")
