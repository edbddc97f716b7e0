"""Planners of games with simple rules, which they model without a simulator.

Dimensions: N environments played, F entities of a level, P plans, T steps ahead, H, W the level's grid.
"""

import numpy as np

from lapo.experts.expert import DOWN, LEFT, NOOP, RIGHT, UP, Expert
from lapo.games.simulator_state import NEIGHBOURS, State, grid_distances, side_by_side


class MazeExpert(Expert):
    """Walks the shortest path to the cheese. Mazes are trees, so it is unique."""

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


class BigFishExpert(Expert):
    """Evaluates 81 plans, each one move followed by another, against the predicted motion of the other fish.

    Arrays have axes N, P (81), F (other fish), T (steps ahead), in this order; constant axes are left out.
    """

    FISH = 2
    SIZE = 20.0
    STEPS, FIRST_MOVE = 18, 6
    DISCOUNT = 0.97
    # Safety margins in cells, and values in units of eating one fish.
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
        values = self._values(agents, side_by_side([state.entities_of(self.FISH) for state in parsed]))
        values = values.reshape(-1, 9, 9).max(2)
        values[np.arange(len(states)), self._last] += self.HABIT
        self._last = values.argmax(1)
        return self._last.astype(np.int32)

    def forget(self) -> None:
        """See `Expert`."""
        self._last[:] = NOOP

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
        """Values (N, P) of the 81 plans for `agents` (N,) among `fish` (N, F)."""
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
        distance = np.maximum(gap_x[..., -1], 0) + np.maximum(gap_y[..., -1], 0)
        distance = np.minimum(distance + self.FAR * (bigger[..., 0] | leaving), self.FAR).min(2)
        crowding = np.maximum(self.NEAR - np.where(bigger, gap, self.NEAR).min(2), 0).mean(2)
        exposure = np.maximum(self.EDGE - np.minimum(x, self.SIZE - x), 0).mean(2)
        return value - self.PER_CELL * (distance + crowding + exposure)


class LeaperExpert(Expert):
    """Hops as soon as there is a safe path across. During a hop, actions have no effect."""

    MOVES = {UP: (0, 1), NOOP: (0, 0), LEFT: (-1, 0), RIGHT: (1, 0), DOWN: (0, -1)}  # noqa: RUF012

    actions = tuple(MOVES)

    def __init__(self, num_envs: int):
        """For any number of environments."""

    def act(self, states: list[bytes]) -> np.ndarray:
        """See `Expert`."""
        return np.array([self._act(State(state)) for state in states], np.int32)

    def _act(self, state: State) -> int:
        agent = state.agent
        if agent["vx"] != 0 or agent["vy"] != 0:
            return NOOP
        move = _Crossing(state).safe_move(float(agent["x"]), float(agent["y"]), 0)
        return NOOP if move is None else move


class _Crossing:
    """Depth-first search over hops and waits, among cars and logs that move at constant speed."""

    LOG, WATER, CAR, FINISH = 1, 3, 4, 5
    WIDTH = 9.0
    HOP = (0.4, 0.3, 0.2, 0.1, 0.0)
    STEPS, PLACES = 90, 500
    CAR_MARGIN, LOG_MARGIN = 0.08, 0.06

    def __init__(self, state: State):
        """From `state` on."""
        self._cars, self._logs = (
            [[float(thing[key]) for key in ("x", "y", "vx", "rx", "ry")] for thing in state.entities_of(kind)]
            for kind in (self.CAR, self.LOG)
        )
        self._water = set(np.flatnonzero((state.grid == self.WATER).any(axis=1)))
        self._finish = float(state.entities_of(self.FINISH)["y"][0])
        self._radius = float(state.agent["rx"])
        self._visited: set[tuple[int, int, int]] = set()

    def safe_move(self, x: float, y: float, t: int) -> int | None:
        """The first move of a safe path from `x`, `y`, `t` steps from now; None if there is none."""
        for move in LeaperExpert.MOVES:
            end = self._end(move, x, y, t)
            if end is None:
                continue
            x_end, y_end, t_end = end
            place = round(3 * x_end), int(y_end), t_end // 2
            if place in self._visited or len(self._visited) > self.PLACES:
                continue
            self._visited.add(place)
            across = abs(y_end - self._finish) < 0.6
            if across or t_end > self.STEPS or self.safe_move(x_end, y_end, t_end) is not None:
                return move
        return None

    def _end(self, move: int, x: float, y: float, t: int) -> tuple[float, float, int] | None:
        """Position and time at which `move` ends; None if the agent dies."""
        right, up = LeaperExpert.MOVES[move]
        for part in (0.0,) if move == NOOP else self.HOP:
            t += 1
            x, y = x + right * part, y + up * part
            if y < 0 or self._is_outside(x) or self._is_hit(x, y, t):
                return None
            drift = self._drift(x, y, t)
            x += drift or 0.0
        return None if int(y) in self._water and drift is None else (x, y, t)

    def _is_outside(self, x: float) -> bool:
        return abs(x - self.WIDTH / 2) > self.WIDTH / 2 - self._radius + 1e-3  # the edge is inside

    def _is_hit(self, x: float, y: float, t: int) -> bool:
        reach = self._radius + self.CAR_MARGIN
        return any(
            abs(car_x + v * t - x) < rx + reach and abs(car_y - y) < ry + reach
            for car_x, car_y, v, rx, ry in self._cars
        )

    def _drift(self, x: float, y: float, t: int) -> float | None:
        """Speed of the log at `x`, `y`; None if there is none."""
        for log_x, log_y, v, rx, ry in self._logs:
            if abs(log_x + v * t - x) < rx - self.LOG_MARGIN and abs(log_y - y) < ry:
                return v
        return None


class FruitBotExpert(Expert):
    """Collects fruit by dynamic programming over lanes.

    A tap to the side moves the bot by a fixed distance, most of it at once. So the positions where it can
    come to rest are L lanes around the one where it would now. Arrays have axes N, F, T, L, in this order.
    """

    WALL, BAD, FRUIT, PRESENT = 1, 4, 7, 12
    WIDTH, SPEED, PUSH, FRICTION = 10.0, 0.1391, 0.3825, 0.45
    STEPS, LANES = 56, 31
    # Value of a step of contact, and the distance at which contact begins.
    WORTH = {WALL: (-30.0, 0.3), BAD: (-1.5, 0.25), FRUIT: (1.0, -0.1), PRESENT: (10.0, -0.03)}  # noqa: RUF012
    OUTSIDE = -100.0
    TAP, DELAY = 0.01, 0.0005  # costs: an early tap is better than a late one

    actions = NOOP, LEFT, RIGHT

    def __init__(self, num_envs: int):
        """For any number of environments."""

    def act(self, states: list[bytes]) -> np.ndarray:
        """See `Expert`."""
        parsed = [State(state) for state in states]
        agents = np.stack([state.agent for state in parsed])
        ahead = [self._ahead(state) for state in parsed]
        lag = agents["vx"] * self.FRICTION / (1 - self.FRICTION)
        lanes = np.arange(self.LANES) - self.LANES // 2
        x = (agents["x"] + lag)[:, None] + lanes * self.PUSH / (1 - self.FRICTION)
        worth = self._worth(agents, x, side_by_side(ahead))

        value = np.zeros_like(x)
        for t in reversed(range(self.STEPS)):
            there = value + worth[:, t]
            moved = np.pad(there, ((0, 0), (1, 1)), constant_values=-np.inf) - self.TAP - self.DELAY * t
            choices = np.stack([there, moved[:, :-2], moved[:, 2:]])
            value = choices.max(0)
        return np.array(self.actions, np.int32)[choices[:, :, self.LANES // 2].argmax(0)]

    def _ahead(self, state: State) -> np.ndarray:
        entities = state.entities_of(*self.WORTH)
        distance = entities["y"] - state.agent["y"]
        return entities[(distance > -1) & (distance < self.SPEED * self.STEPS)]

    def _worth(self, agents: np.ndarray, x: np.ndarray, entities: np.ndarray) -> np.ndarray:
        """Values (N, T, L) of being at `x` (N, L) at each step, among `entities` (N, F)."""
        kinds = [entities["type"] == kind for kind in self.WORTH]
        worth, margin = (np.select(kinds, numbers) for numbers in zip(*self.WORTH.values(), strict=True))
        fruit, present = ((entities["type"] == kind)[..., None] for kind in (self.FRUIT, self.PRESENT))

        y = agents["y"][:, None] + self.SPEED * np.arange(1, self.STEPS + 1)
        gap = np.abs(y[:, None] - entities["y"][..., None])
        half_height = entities["ry"] + agents["ry"][:, None] + np.where(fruit[..., 0], 0, margin)
        beside = gap < half_height[..., None]
        # Fruit counts once, when closest; presents count once, when reached.
        beside &= ~fruit | (gap == gap.min(axis=2, keepdims=True))
        beside &= ~present | (beside.cumsum(axis=2) == 1)
        reach = entities["rx"] + agents["rx"][:, None] + margin
        level = np.abs(x[:, None] - entities["x"][..., None]) < reach[..., None]
        outside = np.abs(x - self.WIDTH / 2) > self.WIDTH / 2 - agents["rx"][:, None]
        contact = (beside * worth[..., None]).astype(np.float32)
        total = np.einsum("nft,nfl->ntl", contact, level.astype(np.float32))
        return total + self.OUTSIDE * outside[:, None]
