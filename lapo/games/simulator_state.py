"""Parser of an environment's state, as `VecEnv.get_state` serialises it: a level's grid and entities.

Dimensions: F entities (everything that moves) · H, W grid of the level
"""

import math
import struct
from collections import deque
from functools import lru_cache

import numpy as np

ENTITY = np.dtype(
    [(name, "<f4") for name in ("x", "y", "vx", "vy", "rx", "ry")]
    + [(name, "<i4") for name in ("type", "image_type", "theme")]
    + [("unused", "V68"), ("health", "<f4"), ("unused_too", "V16")]
)
"""One entity: centre, velocity and half size in grid cells, then what it is (0: the agent)."""

# The fields of a state, in order, with their size in 4-byte words, or the kind of a field of variable size.
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
    """One environment's state, as `VecEnv.get_state` returns it."""

    def __init__(self, data: bytes):
        """Find the offsets of the fields of `data`."""
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
        """Seed of the level and number of steps played in it."""
        return self._int(self.at["level_seed"]), self._int(self.at["time"])

    @property
    def entities(self) -> np.ndarray:
        """All entities of the level, ENTITY (F,)."""
        offset = self.at["entities"]
        return np.frombuffer(self.data, ENTITY, self._int(offset - 4), offset)

    def entities_of(self, *types: int) -> np.ndarray:
        """The entities of some types, ENTITY (F,)."""
        entities = self.entities
        return entities[np.isin(entities["type"], types)]

    @property
    def agent(self) -> np.void:
        """The entity that the actions control."""
        entities = self.entities
        return entities[entities["type"] == 0][0]

    @property
    def grid(self) -> np.ndarray:
        """Content of each cell of the level, int32 (H, W); row 0 is at the bottom."""
        offset = self.at["grid"]
        width, height = struct.unpack_from("<2i", self.data, offset - 12)
        return np.frombuffer(self.data, "<i4", width * height, offset).reshape(height, width)

    def strip_rendering(self) -> bytes:
        """The state with the same dynamics up to the end of the episode, cheap to load and to render.

        Monochrome assets, no background, a view of one cell, and no random states that are only used for new
        levels.
        """
        data = bytearray(self.data)
        options = self.at["options"]
        struct.pack_into("<i", data, options + 8, 1)  # monochrome assets
        struct.pack_into("<i", data, options + 16, 0)  # backgrounds
        struct.pack_into("<f", data, self.at["visibility"], 1.0)
        for name in ("asset_rng", "level_rng"):  # the later one first, so that the other offset stays valid
            offset = self.at[name]
            data[offset - 4 : offset + self._int(offset - 4)] = bytes(4)
        return bytes(data)

    def _int(self, offset: int) -> int:
        return struct.unpack_from("<i", self.data, offset)[0]


def side_by_side(entities: list[np.ndarray]) -> np.ndarray:
    """The entities of N environments, ENTITY (N, F), padded with entities of type -1, far away."""
    filled = np.zeros((len(entities), max(1, *map(len, entities))), ENTITY)
    filled["x"], filled["type"] = 1e6, -1
    for row, each in zip(filled, entities, strict=True):
        row[: len(each)] = each
    return filled


# ---------------------------------------------------------------------------------------- paths on the grid

NEIGHBOURS = ((0, 1), (0, -1), (1, 0), (-1, 0))
"""Row and column steps to the cells right, left, above and below."""
CORNERS = ((1, 1), (1, -1), (-1, 1), (-1, -1))
"""The same to the diagonal cells."""
UNREACHABLE = 10_000


def grid_distances(free: np.ndarray, goals: np.ndarray) -> np.ndarray:
    """Steps from each cell of a grid to the nearest goal, over cells that are `free`, bool (H, W).

    `goals` are rows and columns (G, 2). The result (H + 2, W + 2) has a border around the grid; where no
    path leads, it is UNREACHABLE.
    """
    height, width = free.shape[0] + 2, free.shape[1] + 2
    is_free = np.pad(free, 1).ravel().tolist()
    distances = [UNREACHABLE] * (height * width)
    frontier = deque((int(row) + 1) * width + int(column) + 1 for row, column in goals)
    for cell in frontier:
        distances[cell] = 0
    while frontier:
        cell = frontier.popleft()
        further = distances[cell] + 1
        for step in (1, -1, width, -width):
            if is_free[cell + step] and distances[cell + step] > further:
                distances[cell + step] = further
                frontier.append(cell + step)
    return np.array(distances).reshape(height, width)


def cells(entities: np.ndarray) -> np.ndarray:
    """Rows and columns (F, 2) of the cells in which `entities` (F,) are."""
    return np.stack([entities["y"], entities["x"]], axis=1).astype(int)


def path_length(state: State, free: np.ndarray, goals: np.ndarray, corners: bool = False) -> float:
    """Length of the agent's path to the nearest of `goals` (G, 2), through centres of `free` cells (H, W).

    The path starts in the agent's cell or a neighbour of it, with `corners` also a diagonal one. At least
    UNREACHABLE where there is none.
    """
    distances = _known_distances(free.tobytes(), free.shape, np.asarray(goals, int).tobytes())
    # Cell k of the bordered grid has its centre at k.
    x, y = float(state.agent["x"]) + 0.5, float(state.agent["y"]) + 0.5
    row, column = round(y), round(x)
    around = NEIGHBOURS + CORNERS if corners else NEIGHBOURS
    return min(
        distances[row + up, column + right] + math.hypot(row + up - y, column + right - x)
        for up, right in ((0, 0), *around)
        if 0 <= row + up < len(distances) and 0 <= column + right < distances.shape[1]
    )


@lru_cache(maxsize=512)
def _known_distances(free: bytes, shape: tuple[int, int], goals: bytes) -> np.ndarray:
    """`grid_distances`, cached: they are the same in most states of a level."""
    return grid_distances(np.frombuffer(free, bool).reshape(shape), np.frombuffer(goals, int).reshape(-1, 2))
