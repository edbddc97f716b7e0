from dataclasses import replace

import numpy as np
import pytest

from lapo.acting import Evaluation, play
from lapo.errors import UserError
from lapo.experts.expert import LEFT, NOOP, RIGHT, RIGHT_UP, UP, Expert, NoisyExpert
from lapo.experts.planners import FruitBotExpert
from lapo.experts.registry import expert_name, find_expert, make_expert
from lapo.experts.search import SearchSettings, SimulatorSearch
from lapo.games.simulator_state import UNREACHABLE, State, cells, grid_distances, path_length, side_by_side
from lapo.games.table import GAMES
from lapo.games.vec_env import HELD_OUT_LEVELS, VecEnv


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
    simulator.set_state([State(state).strip_rendering() for state in states])
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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.parametrize("game", GAMES)
def test_expert_is_a_function_of_what_it_was_shown(game: str) -> None:
    """Twice the same levels: the same actions, all of them some that matter."""
    env = VecEnv(game, 1, seed=0, num_threads=0)
    expert = make_expert(game, 1)
    start, played = env.get_state(), []
    for _ in range(2):
        env.set_state(start)
        played.append([])
        for _ in range(9):
            actions = expert.act(env.get_state())
            assert actions.dtype == np.int32
            played[-1] += actions.tolist()
            env.step(actions)
    assert played[0] == played[1]
    assert set(played[0]) <= {*expert.actions, NOOP, LEFT, RIGHT}


@pytest.mark.slow
def test_jumper_expert_finds_the_carrot() -> None:
    assert evaluate("jumper", num_envs=4, episodes=12).mean >= 6


def test_explorer_takes_its_share_of_random_actions() -> None:
    env = VecEnv("maze", 50, seed=0, num_threads=0)
    expert, rare, always = (make_expert("maze", 50) for _ in range(3))
    rare, always = NoisyExpert(rare, 0.2, seed=1), NoisyExpert(always, 1.0, seed=1)
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


class Jumper(Expert):
    """Always wants to jump, which in the air has the effect of moving on."""

    actions = (RIGHT, LEFT, LEFT, RIGHT_UP)

    def act(self, states: list[bytes]) -> np.ndarray:
        return np.full(len(states), RIGHT_UP, np.int32)

    def canonical_actions(self, states: list[bytes], actions: np.ndarray) -> np.ndarray:
        in_the_air = np.array([state == b"air" for state in states])
        return np.where(in_the_air & (actions == RIGHT_UP), RIGHT, actions)


def test_probability_of_what_an_explorer_does_counts_all_ways_to_it() -> None:
    explorer, states = NoisyExpert(Jumper(), 0.4, seed=0), [b"air", b"ground"] * 2000
    actions, probability = explorer.draw(states)
    assert actions.dtype == np.int32
    expected = {
        b"air": {RIGHT: 0.6 + 0.1 + 0.1, LEFT: 0.2},
        b"ground": {RIGHT_UP: 0.6 + 0.1, RIGHT: 0.1, LEFT: 0.2},
    }
    for start, state in enumerate((b"air", b"ground")):
        assert set(actions[start::2]) == expected[state].keys()
        for action, value in expected[state].items():
            taken = actions[start::2] == action
            np.testing.assert_allclose(probability[start::2][taken], value)
            assert taken.mean() == pytest.approx(value, abs=0.04)  # four standard errors


def test_simplest_action_has_the_same_effect() -> None:
    env, simulator = (VecEnv("jumper", 8, seed=0, num_threads=0) for _ in range(2))
    expert = make_expert("jumper", 8)
    rng = np.random.default_rng(0)
    simplified = 0
    for _ in range(30):
        actions = rng.choice(expert.actions, 8).astype(np.int32)
        states = env.get_state()
        canonical = expert.canonical_actions(states, actions)
        simplified += (canonical != actions).sum()
        simulator.set_state(states)
        _, rewards, dones = simulator.step(canonical)
        _, expected_rewards, expected_dones = env.step(actions)
        assert np.array_equal(rewards, expected_rewards)
        assert np.array_equal(dones, expected_dones)
        for ours, theirs in zip(simulator.get_state(), env.get_state(), strict=True):
            for name in ("x", "y", "vx", "vy"):
                assert State(ours).agent[name] == State(theirs).agent[name]
    assert simplified > 10


def test_unknown_game_has_no_expert() -> None:
    assert [expert_name(game) for game in ("maze", "miner")] == ["MazeExpert", "SimulatorSearch"]
    with pytest.raises(UserError, match="'pong' is not a Procgen game"):
        find_expert("pong")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("game", "num_envs", "episodes", "least"),
    # Random play earns 2.5, -2.5, 3.1 and 2.6.
    [("leaper", 16, 32, 7.0), ("fruitbot", 8, 8, 22.0), ("heist", 2, 2, 10.0), ("ninja", 2, 4, 7.5)],
)
def test_expert_is_far_better_than_chance(game: str, num_envs: int, episodes: int, least: float) -> None:
    assert evaluate(game, num_envs=num_envs, episodes=episodes).mean >= least


@pytest.mark.slow
def test_leaper_hops_land_safely_one_cell_on() -> None:
    """Most hops end where the expert foresaw; new cars and logs, which nobody can foresee, are rare."""
    env = VecEnv("leaper", 32, seed=0, num_threads=0)
    expert = make_expert("leaper", 32)
    hops, deaths = 0, 0
    starts: dict[int, tuple[int, float]] = {}
    for t in range(120):
        states = [State(data) for data in env.get_state()]
        actions = expert.act([state.data for state in states])
        for i, state in enumerate(states):
            if i in starts and t - starts[i][0] == 5:
                assert float(state.agent["y"]) == pytest.approx(starts.pop(i)[1] + 1, abs=1e-3)
            if actions[i] == UP:
                starts[i] = t, float(state.agent["y"])
                hops += 1
        _, rewards, dones = env.step(actions)
        for i in np.flatnonzero(dones):
            deaths += i in starts and rewards[i] == 0
            starts.pop(i, None)
    assert hops > 100
    assert deaths <= 0.03 * hops


def test_fruitbot_taps_are_foreseen() -> None:
    env = VecEnv("fruitbot", 8, seed=0, num_threads=0)
    agents = []
    for t in range(22):
        agents.append(np.stack([State(state).agent for state in env.get_state()]))
        env.step(np.full(8, (LEFT, RIGHT)[t > 11] if t in (10, 12) else NOOP))
    tap = FruitBotExpert.PUSH / (1 - FruitBotExpert.FRICTION)
    left = agents[12]["x"] + agents[12]["vx"] * FruitBotExpert.FRICTION / (1 - FruitBotExpert.FRICTION)
    inside = agents[10]["x"] > 2
    assert inside.any()
    np.testing.assert_allclose((agents[10]["x"] - left)[inside], tap, atol=0.01)
    np.testing.assert_allclose((agents[21]["x"] - agents[10]["x"])[inside], 0, atol=0.02)
    np.testing.assert_allclose(agents[21]["y"] - agents[20]["y"], FruitBotExpert.SPEED, atol=1e-3)


def test_search_scores_plans_as_playing_them_does() -> None:
    """Rewards, death and progress of each plan, against one environment that plays them one by one."""
    settings = SearchSettings(actions=(RIGHT, UP), progress=lambda state: float(state.agent["x"]), steps=40)
    search = SimulatorSearch("coinrun", settings, 1)
    env = VecEnv("coinrun", 1, seed=3, num_threads=0)
    start = env.get_state()
    plans = np.random.default_rng(0).choice([RIGHT, RIGHT, RIGHT_UP], (settings.variations, settings.steps))
    plans = np.repeat(plans, 5, axis=1)[:, : settings.steps].astype(np.int32)
    scores, dead = search._try(search._second, State(start[0]), plans)
    for plan, score, died in zip(plans, scores, dead, strict=True):
        env.set_state(start)
        expected, over = 0.0, False
        for t, action in enumerate(plan):
            _, (reward,), (over,) = env.step(np.array([action]))
            expected += reward * 0.99**t
            if over:
                expected -= 0 if reward > 0 else 20 * 0.99**t
                break
        assert died == (over and reward <= 0)
        if not over:
            expected += float(State(env.get_state()[0]).agent["x"]) - float(State(start[0]).agent["x"])
        assert score == pytest.approx(expected, abs=1e-4)


def test_search_prefers_the_first_of_nearly_equal_plans() -> None:
    settings = SearchSettings(actions=(LEFT, RIGHT, UP), progress=lambda state: 0.0)
    env = VecEnv("heist", 1, seed=0, num_threads=0)
    assert SimulatorSearch("heist", settings, 1).act(env.get_state()).tolist() == [LEFT]
    settings = replace(settings, progress=lambda state: -float(state.agent["x"]))
    assert SimulatorSearch("heist", settings, 1).act(env.get_state()).tolist() == [LEFT]


def test_way_length_is_the_distance_on_the_grid() -> None:
    env = VecEnv("maze", 4, seed=0, num_threads=0)
    for state in map(State, env.get_state()):
        free = state.grid != 51
        goals = np.argwhere(state.grid == 2)
        row, column = cells(state.agent[None])[0]
        assert path_length(state, free, goals) == grid_distances(free, goals)[row + 1, column + 1]
        assert path_length(state, free, goals[:0]) >= UNREACHABLE


def test_things_are_filled_up_with_some_far_away() -> None:
    env = VecEnv("starpilot", 3, seed=0, num_threads=0)
    for _ in range(30):
        env.step(np.full(3, NOOP))
    things = [State(data).entities[:number] for data, number in zip(env.get_state(), (0, 1, 2), strict=True)]
    filled = side_by_side(things)
    assert filled.shape[0] == 3
    for row, each in zip(filled, things, strict=True):
        assert np.array_equal(row[: len(each)], each)
        assert (row["type"][len(each) :] == -1).all()
        assert (row["x"][len(each) :] > 1e5).all()
