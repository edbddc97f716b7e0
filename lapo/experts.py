"""Experts that need no training: they plan on the simulator's serialised state.

Dimensions: N environments played, F entities (things that move), H, W the level's grid, P plans, T steps.
"""

import struct
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from errors import UserError
from procgen_env import ACTIONS, VecEnv, check_game

LEFT, DOWN, UP, RIGHT, RIGHT_UP = (
    ACTIONS.index(name) for name in ("LEFT", "DOWN", "UP", "RIGHT", "RIGHT-UP")
)

# ------------------------------------------------------------------------------- the simulator's state

ENTITY = np.dtype(
    [(name, "<f4") for name in ("x", "y", "vx", "vy", "rx", "ry")]
    + [(name, "<i4") for name in ("type", "image_type", "theme")]
    + [("unused", "V88")]
)
"""One thing in a level: centre, velocity and half size in grid cells, then what it is (0: the agent)."""

# The parts of a state, in order: a number counts 4-byte words; a name tells how a part gives its own length.
_LAYOUT = (
    ("version", 1),
    ("game", "text"),
    ("options", 17),
    ("level_rng_seeded", 1),
    ("level_rng", "text"),
    ("rng_seeded", 1),
    ("rng", "text"),
    ("last_step", 5),
    ("level_seed", 1),
    ("progress", 7),
    ("time", 1),
    ("waiting", 1),
    ("grid_size", 1),
    ("entities", "entities"),
    ("drawing", 4),
    ("agent", 15),
    ("asset_rng_seeded", 1),
    ("asset_rng", "text"),
    ("world", 7),
    ("visibility", 2),
    ("grid", "grid"),
)


class State:
    """Reads one environment's state as `VecEnv.get_state` gives it."""

    def __init__(self, data: bytes):
        """Find where the parts of `data` lie."""
        self.data = data
        self.at: dict[str, int] = {}
        offset = 0
        for name, kind in _LAYOUT:
            if kind == "text":
                offset += 4
                length = self._int(offset - 4)
            elif kind == "entities":
                offset += 4
                length = self._int(offset - 4) * ENTITY.itemsize
            elif kind == "grid":
                offset += 12
                length = self._int(offset - 4) * 4
            else:
                length = 4 * kind
            self.at[name] = offset
            offset += length

    @property
    def episode(self) -> tuple[int, int]:
        """Seed of the level and steps played in it."""
        return self._int(self.at["level_seed"]), self._int(self.at["time"])

    @property
    def entities(self) -> np.ndarray:
        """All things in the level, ENTITY (F,)."""
        offset = self.at["entities"]
        return np.frombuffer(self.data, ENTITY, self._int(offset - 4), offset)

    @property
    def agent(self) -> np.void:
        """The entity that the actions move."""
        entities = self.entities
        return entities[entities["type"] == 0][0]

    @property
    def grid(self) -> np.ndarray:
        """What fills each cell of the level, int32 (H, W); row 0 is at the bottom."""
        offset = self.at["grid"]
        width, height = struct.unpack_from("<2i", self.data, offset - 12)
        return np.frombuffer(self.data, "<i4", width * height, offset).reshape(height, width)

    def without_looks(self) -> bytes:
        """A state that plays on alike up to the end of the episode, but is cheap to load and to draw.

        Colours for pictures, no background, a view of one cell; without the random numbers that only make
        new levels.
        """
        data = bytearray(self.data)
        options = self.at["options"]
        struct.pack_into("<i", data, options + 8, 1)  # monochrome assets
        struct.pack_into("<i", data, options + 16, 0)  # backgrounds
        struct.pack_into("<f", data, self.at["visibility"], 1.0)
        for name in ("asset_rng", "level_rng"):  # the later one first, so that offsets hold
            offset = self.at[name]
            data[offset - 4 : offset + self._int(offset - 4)] = bytes(4)
        return bytes(data)

    def _int(self, offset: int) -> int:
        return struct.unpack_from("<i", self.data, offset)[0]


# ----------------------------------------------------------------------------------------- the experts


class Expert(Protocol):
    """Plays N environments of one game."""

    def act(self, states: list[bytes]) -> np.ndarray:
        """Actions, int32 (N,), for N states as `VecEnv.get_state` gives them."""


class MazeExpert:
    """Walks the shortest way to the cheese; the mazes are trees, so there is only one."""

    CHEESE, WALL = 2, 51
    MOVES = ((RIGHT, 0, 1), (LEFT, 0, -1), (UP, 1, 0), (DOWN, -1, 0))

    def __init__(self, num_envs: int):
        """For `num_envs` environments."""
        self._distances: list[tuple[int, np.ndarray] | None] = [None] * num_envs

    def act(self, states: list[bytes]) -> np.ndarray:
        """See `Expert`."""
        return np.array([self._act(env, State(state)) for env, state in enumerate(states)], np.int32)

    def _act(self, env: int, state: State) -> int:
        level, time = state.episode
        known = self._distances[env]
        if known is None or known[0] != level or time == 0:
            known = self._distances[env] = level, self._distances_to_cheese(state.grid)
        row, column = int(state.agent["y"]) + 1, int(state.agent["x"]) + 1
        return min(self.MOVES, key=lambda move: known[1][row + move[1], column + move[2]])[0]

    def _distances_to_cheese(self, grid: np.ndarray) -> np.ndarray:
        """Steps from each cell of `grid` and of a border around it; a huge number where there is no way."""
        free = np.pad(grid != self.WALL, 1)
        distances = np.full(free.shape, np.iinfo(np.int32).max)
        frontier = deque((row + 1, column + 1) for row, column in np.argwhere(grid == self.CHEESE))
        for cell in frontier:
            distances[cell] = 0
        while frontier:
            row, column = frontier.popleft()
            for _, up, right in self.MOVES:
                cell = row + up, column + right
                if free[cell] and distances[cell] > distances[row, column] + 1:
                    distances[cell] = distances[row, column] + 1
                    frontier.append(cell)
        return distances


@dataclass(frozen=True)
class SearchSettings:
    """What `SimulatorSearch` tries in a game, and what it strives for."""

    game: str
    plans: np.ndarray
    """Actions of the plans tried every time, int32 (P, T), the most preferred first."""
    random_plans: int
    """Further plans, made of random stretches of `random_actions`."""
    random_actions: tuple[int, ...]
    commit: int
    """Steps taken before the next search."""
    progress: Callable[[State], float]
    """What having got to a state alive is worth, in units of reward."""
    tolerance: float
    """How much worse than the best a preferred plan may be."""
    simplest: Callable[[State, int], int]
    """The simplest action that has the same effect as the given one."""


@dataclass(frozen=True)
class _Course:
    """A plan being carried out: its level, the time of its first action, its actions (T,)."""

    level: int
    start: int
    actions: np.ndarray


class SimulatorSearch:
    """Plays any game by trying plans in copies of the simulator.

    The best plan may be best by a hair, and another one a step later; who learns from single frames cannot
    follow that. So the search takes the most preferred of all plans that are nearly best.
    """

    DISCOUNT = 0.99
    DEATH = 20.0

    def __init__(self, settings: SearchSettings, num_envs: int):
        """For `num_envs` environments of the game."""
        self.settings = settings
        num_plans = len(settings.plans) + 1 + settings.random_plans
        self._simulator = VecEnv(settings.game, num_plans, seed=0, num_threads=0)
        self._courses = [_Course(-1, 0, settings.plans[0])] * num_envs

    def act(self, states: list[bytes]) -> np.ndarray:
        """See `Expert`."""
        return np.array([self._act(env, State(state)) for env, state in enumerate(states)], np.int32)

    def _act(self, env: int, state: State) -> int:
        level, time = state.episode
        course = self._courses[env]
        elapsed = time - course.start
        if level != course.level or not 0 <= elapsed < self.settings.commit:
            rest = course.actions[elapsed:] if level == course.level and elapsed > 0 else course.actions[:0]
            course = self._courses[env] = _Course(level, time, self._search(state, rest))
            elapsed = 0
        return self.settings.simplest(state, course.actions[elapsed])

    def _search(self, state: State, rest: np.ndarray) -> np.ndarray:
        """The actions (T,) to take from `state`, where `rest` (at most T) is left of the last plan."""
        plans = self.settings.plans
        steps = plans.shape[1]
        rest = np.concatenate([rest, np.full(steps - len(rest), rest[-1] if len(rest) else plans[0, 0])])
        rng = np.random.default_rng(state.episode)
        actions = rng.choice(self.settings.random_actions, (self.settings.random_plans, steps))
        random = np.repeat(actions, rng.integers(2, 9, steps), axis=1)[:, :steps]
        plans = np.concatenate([plans, rest[None], random])
        scores = self._scores(state, plans)
        return plans[np.argmax(scores >= scores.max() - self.settings.tolerance)]

    def _scores(self, state: State, plans: np.ndarray) -> np.ndarray:
        """Rewards, progress and death (P,) that `plans` (P, T) lead to."""
        progress = self.settings.progress
        self._simulator.set_state([state.without_looks()] * len(plans))
        scores, alive = np.zeros(len(plans)), np.ones(len(plans), bool)
        for t, actions in enumerate(plans.T):
            _, rewards, dones = self._simulator.step(actions)
            scores[alive] += rewards[alive] * self.DISCOUNT**t
            # To die later is better: a later search may find a way out.
            scores[alive & dones & (rewards <= 0)] -= self.DEATH * self.DISCOUNT**t
            alive &= ~dones
            if not alive.any():
                return scores
        ends = self._simulator.get_state()
        for plan in np.flatnonzero(alive):
            scores[plan] += progress(State(ends[plan])) - progress(state)
        return scores


def _plan(steps: int, *stretches: tuple[int, int]) -> np.ndarray:
    """Actions (`steps`,): each (action, length) in turn, the last one to the end."""
    actions = [action for action, length in stretches for _ in range(length)]
    return np.array((actions + [actions[-1]] * steps)[:steps], np.int32)


class CoinRunExpert(SimulatorSearch):
    """Runs to the right and jumps only when it must, as late as it can."""

    def __init__(self, num_envs: int):
        """For `num_envs` environments."""
        jumps = [((RIGHT, wait), (RIGHT_UP, 1), (RIGHT, 1)) for wait in (12, 10, 8, 6, 4, 3, 2, 1, 0)]
        step_back = [((LEFT, back), (RIGHT, back // 2), (RIGHT_UP, 1), (RIGHT, 1)) for back in (3, 8)]
        plans = [((RIGHT, 1),), *jumps, ((RIGHT_UP, 1),), *step_back]
        settings = SearchSettings(
            game="coinrun",
            plans=np.stack([_plan(28, *stretches) for stretches in plans]),
            random_plans=6,
            random_actions=(RIGHT, RIGHT, RIGHT_UP, RIGHT_UP, LEFT),
            commit=8,
            progress=lambda state: 0.1 * float(state.agent["x"]),
            tolerance=0.05,
            simplest=self._simplest,
        )
        super().__init__(settings, num_envs)

    @staticmethod
    def _simplest(state: State, action: int) -> int:
        """Who is in the air cannot jump."""
        in_the_air = state.agent["vy"] != 0
        return RIGHT if action == RIGHT_UP and in_the_air else int(action)


EXPERTS: dict[str, Callable[[int], Expert]] = {"coinrun": CoinRunExpert, "maze": MazeExpert}
"""What plays each game: called with the number of environments."""


def find_expert(game: str) -> Callable[[int], Expert]:
    """What makes an expert for a number of environments of `game`.

    Raises UserError if there is no such game, or no expert for it.
    """
    check_game(game)
    if game not in EXPERTS:
        raise UserError(f"there is no expert for {game} yet; there is one for {', '.join(EXPERTS)}")
    return EXPERTS[game]


def make_expert(game: str, num_envs: int) -> Expert:
    """The expert for `num_envs` environments of `game`; raises as `find_expert`."""
    return find_expert(game)(num_envs)
