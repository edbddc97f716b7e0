"""Experts that need no training: they plan on the simulator's serialised state.

Dimensions: N environments played, F entities (things that move), H, W the level's grid, P plans, T steps.
"""

import struct
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from errors import UserError
from procgen_env import ACTIONS, VecEnv, check_game

LEFT, LEFT_UP, DOWN, NOOP, UP, RIGHT, RIGHT_UP = (
    ACTIONS.index(name) for name in ("LEFT", "LEFT-UP", "DOWN", "NOOP", "UP", "RIGHT", "RIGHT-UP")
)
NO_JUMP = {LEFT_UP: LEFT, UP: NOOP, RIGHT_UP: RIGHT}
"""Who cannot jump, in the air say, moves as without UP."""
MOTION = ("x", "y", "vx", "vy")

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


class Expert:
    """Plays N environments of one game."""

    actions: tuple[int, ...]
    """The actions that matter in the game."""

    def act(self, states: list[bytes]) -> np.ndarray:
        """Actions, int32 (N,), for N states as `VecEnv.get_state` gives them."""
        raise NotImplementedError

    def replan(self, envs: np.ndarray) -> None:
        """Give up what was planned for environments `envs`, bool (N,): something else was done there."""

    def simplest(self, states: list[bytes], actions: np.ndarray) -> np.ndarray:
        """The simplest actions (N,) that have the same effect as `actions` (N,) in `states`."""
        return actions


class Explorer(Expert):
    """An expert who now and then does something else.

    Where an expert's action can be foreseen from the state, a world model needs nobody to tell it: unforeseen
    actions are what makes latent ones informative. The published experts are stochastic policies, too.
    """

    def __init__(self, expert: Expert, share: float, seed: int):
        """Take an action at random in a `share` of the steps that `expert` plays."""
        self.expert, self.share, self.actions = expert, share, expert.actions
        self._rng = np.random.default_rng(seed)

    def act(self, states: list[bytes]) -> np.ndarray:
        """See `Expert`."""
        actions = self.expert.act(states)
        random = self._rng.choice(self.actions, len(states)).astype(np.int32)
        chosen = np.where(self._rng.random(len(states)) < self.share, random, actions)
        return self.expert.simplest(states, chosen)


class MazeExpert(Expert):
    """Walks the shortest way to the cheese; the mazes are trees, so there is only one."""

    CHEESE, WALL = 2, 51
    actions = RIGHT, LEFT, UP, DOWN

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
            grid = state.grid
            distances = grid_distances(grid != self.WALL, np.argwhere(grid == self.CHEESE))
            known = self._distances[env] = level, distances
        row, column = int(state.agent["y"]) + 1, int(state.agent["x"]) + 1
        ways = zip(self.actions, NEIGHBOURS, strict=True)
        return min(ways, key=lambda way: known[1][row + way[1][0], column + way[1][1]])[0]


NEIGHBOURS = ((0, 1), (0, -1), (1, 0), (-1, 0))
"""Row and column steps to the cells right, left, above and below."""
NO_WAY = 10_000


def grid_distances(free: np.ndarray, goals: np.ndarray) -> np.ndarray:
    """Steps from each cell of a grid to the nearest goal, over cells that are `free`, bool (H, W).

    `goals` are rows and columns (G, 2). The result (H + 2, W + 2) has a border around the grid, and NO_WAY
    wherever there is none.
    """
    free = np.pad(free, 1)
    distances = np.full(free.shape, NO_WAY)
    frontier = deque((int(row) + 1, int(column) + 1) for row, column in goals)
    for cell in frontier:
        distances[cell] = 0
    while frontier:
        row, column = frontier.popleft()
        for up, right in NEIGHBOURS:
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
    simpler: dict[int, int]
    """Actions, and simpler ones that often have the same effect."""


@dataclass(frozen=True)
class _Course:
    """A plan being carried out: its level, the time of its first action, its actions (T,)."""

    level: int
    start: int
    actions: np.ndarray


class SimulatorSearch(Expert):
    """Plays any game by trying plans in copies of the simulator.

    The best plan may be best by a hair, and another one a step later; who learns from single frames cannot
    follow that. So the search takes the most preferred of all plans that are nearly best.
    """

    DISCOUNT = 0.99
    DEATH = 20.0

    def __init__(self, settings: SearchSettings, num_envs: int):
        """For `num_envs` environments of the game."""
        self.settings, self.actions = settings, settings.random_actions
        num_plans = len(settings.plans) + 1 + settings.random_plans
        self._simulator = VecEnv(settings.game, num_plans, seed=0, num_threads=0)
        self._pairs = VecEnv(settings.game, 2 * num_envs, seed=0, num_threads=0)
        self._courses = [_Course(-1, 0, settings.plans[0])] * num_envs

    def act(self, states: list[bytes]) -> np.ndarray:
        """See `Expert`."""
        actions = [self._act(env, State(state)) for env, state in enumerate(states)]
        return self.simplest(states, np.array(actions, np.int32))

    def replan(self, envs: np.ndarray) -> None:
        """See `Expert`."""
        for env in np.flatnonzero(envs):
            self._courses[env] = replace(self._courses[env], level=-1)

    def simplest(self, states: list[bytes], actions: np.ndarray) -> np.ndarray:
        """See `Expert`; both actions are tried in the simulator."""
        simpler = np.array([self.settings.simpler.get(int(action), action) for action in actions], np.int32)
        if (simpler == actions).all():
            return actions
        looks = [State(state).without_looks() for state in states]
        self._pairs.set_state(looks + looks)
        self._pairs.step(np.concatenate([actions, simpler]))
        ends = [State(state).agent[list(MOTION)].tobytes() for state in self._pairs.get_state()]
        same = [ends[env] == ends[env + len(states)] for env in range(len(states))]
        return np.where(same, simpler, actions)

    def _act(self, env: int, state: State) -> int:
        level, time = state.episode
        course = self._courses[env]
        elapsed = time - course.start
        if level != course.level or not 0 <= elapsed < self.settings.commit:
            rest = course.actions[elapsed:] if level == course.level and elapsed > 0 else course.actions[:0]
            course = self._courses[env] = _Course(level, time, self._search(state, rest))
            elapsed = 0
        return int(course.actions[elapsed])

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
            simpler=NO_JUMP,
        )
        super().__init__(settings, num_envs)


class JumperExpert(SimulatorSearch):
    """Jumps through the caves to the carrot."""

    CARROT, FREE = 1, 100

    def __init__(self, num_envs: int):
        """For `num_envs` environments."""
        straight = [((action, 1),) for action in (LEFT, RIGHT, LEFT_UP, RIGHT_UP, UP)]
        leaps = [
            ((before, wait), (after, 1))
            for wait in (1, 4)
            for before, after in ((UP, LEFT), (UP, RIGHT), (LEFT, LEFT_UP), (RIGHT, RIGHT_UP))
        ]
        settings = SearchSettings(
            game="jumper",
            plans=np.stack([_plan(18, *stretches) for stretches in straight + leaps]),
            random_plans=4,
            random_actions=(LEFT, RIGHT, LEFT_UP, RIGHT_UP, UP),
            commit=8,
            progress=self._progress,
            tolerance=0.1,
            simpler=NO_JUMP,
        )
        super().__init__(settings, num_envs)
        self._distances: dict[int, np.ndarray] = {}

    def _progress(self, state: State) -> float:
        """Closeness to the carrot, along the way there."""
        level, _ = state.episode
        if level not in self._distances:
            while len(self._distances) > 100:
                self._distances.pop(next(iter(self._distances)))
            entities = state.entities
            carrot = entities[entities["type"] == self.CARROT][0]
            goal = np.array([[int(carrot["y"]), int(carrot["x"])]])
            self._distances[level] = grid_distances(state.grid == self.FREE, goal)
        # The way leads through the centre of a near cell; cell k of the bordered grid has its centre at k.
        x, y = float(state.agent["x"]) + 0.5, float(state.agent["y"]) + 0.5
        near = np.s_[round(y) - 1 : round(y) + 2, round(x) - 1 : round(x) + 2]
        rows, columns = np.mgrid[near]
        return -0.3 * float((self._distances[level][near] + np.hypot(rows - y, columns - x)).min())


class BigFishExpert(Expert):
    """Compares 81 ways to swim, each one move and then another, with how the other fish will have moved.

    Arrays have axes N, P (81), F (other fish), T (steps ahead), in this order, left out where constant.
    """

    FISH = 2
    SIZE = 20.0
    STEPS, FIRST_MOVE = 18, 6
    DISCOUNT = 0.97
    # Safety distances, and what counts beside eating (1) and being eaten, in fish.
    BERTH, REACH = 0.25, -0.03
    PER_CELL, FAR = 0.02, 40.0
    NEAR, EDGE = 1.5, 4.5
    HABIT = 0.02

    actions = tuple(range(9))

    def __init__(self, num_envs: int):
        """For `num_envs` environments."""
        first, second = np.divmod(np.arange(81), 9)
        self._time = np.arange(1, self.STEPS + 1, dtype=np.float32)
        moves = np.where(self._time <= self.FIRST_MOVE, first[:, None], second[:, None])
        self._push_x, self._push_y = moves // 3 - 1.0, moves % 3 - 1.0
        self._last = np.full(num_envs, NOOP)

    def act(self, states: list[bytes]) -> np.ndarray:
        """See `Expert`."""
        parsed = [State(state) for state in states]
        self._last[[state.episode[1] == 0 for state in parsed]] = NOOP
        agents = np.stack([state.agent for state in parsed])
        values = self._values(agents, self._other_fish([state.entities for state in parsed]))
        values = values.reshape(-1, 9, 9).max(2)
        values[np.arange(len(states)), self._last] += self.HABIT
        self._last = values.argmax(1)
        return self._last.astype(np.int32)

    def _other_fish(self, entities: list[np.ndarray]) -> np.ndarray:
        """The fish of every environment, ENTITY (N, F); far away where there are fewer."""
        shoals = [each[each["type"] == self.FISH] for each in entities]
        fish = np.zeros((len(shoals), max(1, *map(len, shoals))), ENTITY)
        fish["x"] = 1e6
        for row, shoal in zip(fish, shoals, strict=True):
            row[: len(shoal)] = shoal
        return fish

    def _swim(self, x: np.ndarray, v: np.ndarray, radius: np.ndarray, push: np.ndarray) -> np.ndarray:
        """Coordinate (N, P, T) of agents at `x` with velocity `v` (N,) who push (P, T)."""
        x, v, radius = x[:, None], v[:, None], radius[:, None]
        path = np.empty((len(x), *push.shape), np.float32)
        for t in range(self.STEPS):
            v = 0.9 * (0.5 * v + 0.25 * push[:, t])
            x = np.clip(x + v, radius, self.SIZE - radius)
            path[:, :, t] = x
        return path

    def _values(self, agents: np.ndarray, fish: np.ndarray) -> np.ndarray:
        """What each of the 81 ways (N, P) is worth to `agents` (N,) among `fish` (N, F)."""
        x = self._swim(agents["x"], agents["vx"], agents["rx"], self._push_x)
        y = self._swim(agents["y"], agents["vy"], agents["ry"], self._push_y)
        discount = self.DISCOUNT**self._time

        bigger = fish["rx"] > agents["rx"][:, None]
        margin = np.where(bigger, self.BERTH, self.REACH)
        fish_x = (fish["x"][..., None] + fish["vx"][..., None] * self._time)[:, None]
        reach_x = (fish["rx"] + agents["rx"][:, None] + margin)[:, None, :, None]
        reach_y = (fish["ry"] + agents["ry"][:, None] + margin)[:, None, :, None]
        gap_x = np.abs(x[:, :, None] - fish_x) - reach_x
        gap_y = np.abs(y[:, :, None] - fish["y"][:, None, :, None]) - reach_y
        gap = np.maximum(gap_x, gap_y)
        bigger = bigger[:, None, :, None]

        eaten = np.logical_or.accumulate(((gap < 0) & bigger).any(2), axis=2)
        meals = ((gap < 0) & ~bigger & ~eaten[:, :, None]) * discount
        value = meals.max(3).sum(2) - 50 * (eaten * discount).mean(2) - 5 * eaten[..., -1]

        # To end close to the next meal, away from bigger fish, and from edges where they appear suddenly.
        leaving = (fish_x[..., -1] < 1) | (fish_x[..., -1] > self.SIZE - 1)
        way = np.maximum(gap_x[..., -1], 0) + np.maximum(gap_y[..., -1], 0)
        way = np.minimum(way + self.FAR * (bigger[..., 0] | leaving), self.FAR).min(2)
        crowding = np.maximum(self.NEAR - np.where(bigger, gap, self.NEAR).min(2), 0).mean(2)
        exposure = np.maximum(self.EDGE - np.minimum(x, self.SIZE - x), 0).mean(2)
        return value - self.PER_CELL * (way + crowding + exposure)


EXPERTS: dict[str, Callable[[int], Expert]] = {
    "bigfish": BigFishExpert,
    "coinrun": CoinRunExpert,
    "jumper": JumperExpert,
    "maze": MazeExpert,
}
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
