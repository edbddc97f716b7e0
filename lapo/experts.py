"""Experts that need no training: they plan on the simulator's serialised state.

Dimensions: N environments played, F entities (things that move), H, W the level's grid.
"""

import struct
from collections import deque
from collections.abc import Callable
from typing import Protocol

import numpy as np

from errors import UserError
from procgen_env import ACTIONS, check_game

LEFT, DOWN, NOOP, UP, RIGHT = (ACTIONS.index(name) for name in ("LEFT", "DOWN", "NOOP", "UP", "RIGHT"))

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


EXPERTS: dict[str, Callable[[int], Expert]] = {"maze": MazeExpert}
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
