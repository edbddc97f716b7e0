"""The planner of each game, and the objectives of the search. Planners need no training.

They read the simulator's serialised state. record_expert.py decides whether the planner or a learned expert
is recorded. Dimensions: N environments · G goals
"""

import hashlib
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from lapo.experts import expert, planners, search
from lapo.experts.expert import DOWN, LEFT, LEFT_UP, NOOP, RIGHT, RIGHT_UP, UP, Expert
from lapo.experts.planners import BigFishExpert, FruitBotExpert, LeaperExpert, MazeExpert
from lapo.experts.search import SearchSettings, Segments, SimulatorSearch
from lapo.games import simulator_state
from lapo.games.simulator_state import UNREACHABLE, State, cells, path_length
from lapo.games.table import ACTIONS, check_game

FIRE = ACTIONS.index("D")
CROSS = RIGHT, LEFT, UP, DOWN
MOVES = NOOP, *CROSS, LEFT_UP, RIGHT_UP, ACTIONS.index("LEFT-DOWN"), ACTIONS.index("RIGHT-DOWN")
NO_JUMP = {LEFT_UP: LEFT, UP: NOOP, RIGHT_UP: RIGHT}
"""Where jumping is impossible, as in the air, actions with UP act as those without."""

# --------------------------------------------------------------------- progress: the value of a state

FREE = 100
"""Content of an empty cell, in every game."""


def closeness(kind: int, worth: float, corners: bool = False) -> Callable[[State], float]:
    """Progress of minus `worth` per cell of the path to the nearest entity of a `kind`."""

    def progress(state: State) -> float:
        entities = state.entities_of(kind)
        if not len(entities):
            return 0.0
        return -worth * path_length(state, state.grid == FREE, cells(entities), corners)

    return progress


def further_right(state: State) -> float:
    """Progress in coinrun."""
    return 0.1 * float(state.agent["x"])


def boss_weakened(state: State) -> float:
    """Progress in bossfight."""
    return -0.2 * float(state.entities_of(2)["health"].sum())


def orbs_eaten(state: State) -> float:
    """Progress in chaser: fewer orbs, or closer to the next."""
    orbs = np.argwhere(state.grid == 1002)
    return -0.1 * len(orbs) - 0.01 * path_length(state, state.grid != 5, orbs)


def door_reached(state: State) -> float:
    """Progress in dodgeball: closer to somebody to hit or, after the last one, to the door."""
    wall, enemy, door, open_door = 1, 4, 5, 7
    agent, enemies = state.agent, state.entities_of(enemy)
    free = np.ones(state.grid.shape, bool)
    rows, columns = np.indices(free.shape) + 0.5
    for thing in state.entities_of(wall):
        beside = np.abs(columns - thing["x"]) < thing["rx"] + agent["rx"]
        free &= ~(beside & (np.abs(rows - thing["y"]) < thing["ry"] + agent["ry"]))
    if len(enemies):
        return -0.02 * min(path_length(state, free, cells(enemies)), 50.0)
    return -0.1 * path_length(state, free, cells(state.entities_of(door, open_door)))


def exit_unlocked(state: State) -> float:
    """Progress in heist: fewer keys left, and closer to the exit or, while locked, to the next key."""
    lock, key, way_out, wall = 1, 2, 9, 51
    keys, locks = state.entities_of(key), state.entities_of(lock)
    free = state.grid != wall
    free[tuple(cells(locks[np.isin(locks["theme"], keys["theme"])]).T)] = False
    distance = path_length(state, free, cells(state.entities_of(way_out)))
    if distance >= UNREACHABLE:
        distance = path_length(state, free, cells(keys))
    return -5.0 * len(keys) - 0.05 * distance


def diamonds_mined(state: State) -> float:
    """Progress in miner: closer to the next diamond or, after the last one, to the exit."""
    boulders, diamonds, way_out = (1, 3), (2, 4), 6
    goals = np.argwhere(np.isin(state.grid, diamonds))
    if not len(goals):
        goals = cells(state.entities_of(way_out))
    distance = path_length(state, ~np.isin(state.grid, boulders), goals)
    if distance >= UNREACHABLE:  # boulders can be pushed, and fall
        distance = 20 + path_length(state, np.ones(state.grid.shape, bool), goals)
    return -0.05 * distance


# ---------------------------------------------------------------------------------------- the planners

PLANNERS: dict[str, Callable[[int], Expert]] = {
    "bigfish": BigFishExpert,
    "fruitbot": FruitBotExpert,
    "leaper": LeaperExpert,
    "maze": MazeExpert,
}
"""Planners of single games, called with the number of environments."""


def _run_and_jump() -> tuple[Segments, ...]:
    """Plans for coinrun: run, and jump only when necessary, as late as possible."""
    jumps = [((RIGHT, wait), (RIGHT_UP, 1), (RIGHT, 1)) for wait in (12, 10, 8, 6, 4, 3, 2, 1, 0)]
    step_back = [((LEFT, back), (RIGHT, back // 2), (RIGHT_UP, 1), (RIGHT, 1)) for back in (3, 8)]
    return (((RIGHT, 1),), *jumps, ((RIGHT_UP, 1),), *step_back)


def _leap() -> tuple[Segments, ...]:
    """Plans for jumper: walk, jump, or one after the other."""
    straight = [((action, 1),) for action in (LEFT, RIGHT, LEFT_UP, RIGHT_UP, UP)]
    turns = (UP, LEFT), (UP, RIGHT), (LEFT, LEFT_UP), (RIGHT, RIGHT_UP)
    return (*straight, *(((before, wait), (after, 1)) for wait in (1, 4) for before, after in turns))


SEARCHES = {
    "bossfight": SearchSettings(actions=(FIRE,) * 4 + MOVES, progress=boss_weakened),
    "caveflyer": SearchSettings(
        actions=(UP, LEFT_UP, RIGHT_UP, LEFT, RIGHT, NOOP, FIRE), progress=closeness(1, 0.1)
    ),
    "chaser": SearchSettings(actions=CROSS, progress=orbs_eaten, commit=4, tolerance=0.005),
    "climber": SearchSettings(
        actions=(RIGHT, LEFT, RIGHT_UP, LEFT_UP, UP), progress=closeness(1, 0.2), simpler=NO_JUMP
    ),
    "coinrun": SearchSettings(
        actions=(RIGHT, RIGHT, RIGHT_UP, RIGHT_UP, LEFT),
        progress=further_right,
        plans=_run_and_jump(),
        steps=28,
        random_plans=6,
        rounds=0,
        simpler=NO_JUMP,
    ),
    "dodgeball": SearchSettings(actions=MOVES + (FIRE,) * 3, progress=door_reached, commit=5, tolerance=0.01),
    "heist": SearchSettings(actions=CROSS, progress=exit_unlocked),
    "jumper": SearchSettings(
        actions=(LEFT, RIGHT, LEFT_UP, RIGHT_UP, UP),
        progress=closeness(1, 0.3, corners=True),
        plans=_leap(),
        steps=18,
        random_plans=4,
        rounds=0,
        tolerance=0.1,
        simpler=NO_JUMP,
    ),
    "miner": SearchSettings(actions=(*CROSS, NOOP), progress=diamonds_mined, segment=(1, 6)),
    "ninja": SearchSettings(actions=(RIGHT, RIGHT_UP, UP, LEFT, LEFT_UP, FIRE), progress=closeness(1, 0.2)),
    "plunder": SearchSettings(actions=(NOOP, LEFT, RIGHT, FIRE)),
    "starpilot": SearchSettings(actions=MOVES + (FIRE,) * 4),
}
"""Settings of the search in all other games."""


def find_expert(game: str) -> Callable[[int], Expert]:
    """A constructor of experts, called with the number of environments. Raises UserError for other games."""
    check_game(game)
    return PLANNERS.get(game) or partial(SimulatorSearch, game, SEARCHES[game])


def make_expert(game: str, num_envs: int) -> Expert:
    """The planner for `num_envs` environments of `game`; raises as `find_expert`."""
    return find_expert(game)(num_envs)


def expert_name(game: str) -> str:
    """Class name of the planner of `game`; raises as `find_expert`."""
    expert = find_expert(game)
    return SimulatorSearch.__name__ if isinstance(expert, partial) else expert.__name__


def source_hash() -> str:
    """Hash (12 hex digits) of the planners' source code."""
    modules = expert, planners, search, simulator_state
    files = (__file__, *(module.__file__ for module in modules))
    source = b"".join(Path(file).read_bytes() for file in files)
    return hashlib.sha256(source).hexdigest()[:12]
