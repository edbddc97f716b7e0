"""A planner for any game: random search over action sequences in copies of the simulator.

Dimensions: N environments · P plans · T steps
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from lapo.experts.expert import Expert
from lapo.games.simulator_state import State
from lapo.games.vec_env import VecEnv

MOTION = ("x", "y", "vx", "vy")
Segments = tuple[tuple[int, int], ...]
"""A plan as (action, length) segments; the last action is repeated to the end."""


@dataclass(frozen=True)
class SearchSettings:
    """Actions, objective and budget of `SimulatorSearch` in a game."""

    actions: tuple[int, ...]
    """Actions that have an effect, the most preferred first; repeated ones are sampled more often."""
    progress: Callable[[State], float] | None = None
    """Value of reaching a state alive, in units of reward; None: 0."""
    steps: int = 32
    """How far a plan stripped ahead."""
    commit: int = 8
    """Steps that are carried out before the next search."""
    segment: tuple[int, int] = (2, 8)
    """Shortest and longest segment of one action in random plans."""
    plans: tuple[Segments, ...] = ()
    """Plans that are tried in every search, the most preferred first, before holding each single action."""
    random_plans: int = 10
    """Further plans, made of random segments of `actions`."""
    variations: int = 8
    """Plans per round of variations, which follow the best plan so far up to a random step."""
    rounds: int = 1
    """Rounds of variations; there are more while the best plan ends in death."""
    tolerance: float = 0.05
    """How much worse than the best plan a preferred one may be."""
    simpler: dict[int, int] = field(default_factory=dict)
    """Maps actions to simpler ones that often have the same effect."""


@dataclass(frozen=True)
class _Plan:
    """The plan being carried out: its level, the time step of its first action, its actions (T,)."""

    level: int
    start: int
    actions: np.ndarray


class SimulatorSearch(Expert):
    """Plays any game by evaluating plans in copies of the simulator.

    Which plan is best by a small margin may change at every step, and a policy on single frames cannot
    imitate that. So the search takes the most preferred of all plans within `tolerance` of the best.
    """

    DISCOUNT = 0.99
    DEATH = 20.0  # its cost in units of reward: more than any reward that it could buy
    LAST_ROUND = 6  # upper bound on rounds that look for a plan without death

    def __init__(self, game: str, settings: SearchSettings, num_envs: int):
        """`num_envs`: environments of `game` to play."""
        self.settings, self.actions = settings, settings.actions
        plans = dict.fromkeys([*settings.plans, *(((action, 1),) for action in settings.actions)])
        self._plans = np.stack([_plan(settings.steps, plan) for plan in plans])
        self._first = self._simulators(game, len(self._plans) + 1 + settings.random_plans)
        self._second = self._simulators(game, settings.variations)
        self._pairs = self._simulators(game, 2 * num_envs)
        self._current = [_Plan(-1, 0, self._plans[0])] * num_envs

    @staticmethod
    def _simulators(game: str, number: int) -> VecEnv:
        return VecEnv(game, number, seed=0, num_threads=0)

    def act(self, states: list[bytes]) -> np.ndarray:
        """See `Expert`."""
        actions = [self._act(env, State(state)) for env, state in enumerate(states)]
        return self.canonical_actions(states, np.array(actions, np.int32))

    def forget(self) -> None:
        """See `Expert`."""
        self._current = [_Plan(-1, 0, self._plans[0])] * len(self._current)

    def canonical_actions(self, states: list[bytes], actions: np.ndarray) -> np.ndarray:
        """See `Expert`; both actions are simulated and their effects compared."""
        simpler = np.array([self.settings.simpler.get(int(action), action) for action in actions], np.int32)
        if (simpler == actions).all():
            return actions
        stripped = [State(state).strip_rendering() for state in states]
        self._pairs.set_state(stripped + stripped)
        self._pairs.step(np.concatenate([actions, simpler]))
        ends = [State(state).agent[list(MOTION)].tobytes() for state in self._pairs.get_state()]
        same = [ends[env] == ends[env + len(states)] for env in range(len(states))]
        return np.where(same, simpler, actions)

    def _act(self, env: int, state: State) -> int:
        level, time = state.episode
        plan = self._current[env]
        elapsed = time - plan.start
        if level != plan.level or not 0 <= elapsed < self.settings.commit:
            rest = plan.actions[elapsed:] if level == plan.level and elapsed > 0 else plan.actions[:0]
            plan = self._current[env] = _Plan(level, time, self._search(state, rest))
            elapsed = 0
        return int(plan.actions[elapsed])

    def _search(self, state: State, rest: np.ndarray) -> np.ndarray:
        """The best actions (T,) from `state`; `rest` (at most T) is the remainder of the previous plan."""
        steps = self.settings.steps
        last = rest[-1] if len(rest) else self._plans[0, 0]
        rest = np.concatenate([rest, np.full(steps - len(rest), last)])
        rng = np.random.default_rng(state.episode)
        plans = np.concatenate([self._plans, rest[None], self._random_plans(rng, self.settings.random_plans)])
        scores, dead = self._try(self._first, state, plans)
        rounds = 0
        while rounds < self.settings.rounds or (dead[scores.argmax()] and rounds < self.LAST_ROUND):
            rounds += 1
            tails = self._random_plans(rng, self.settings.variations)
            starts = rng.integers(steps, size=(len(tails), 1))
            varied = np.where(np.arange(steps) < starts, plans[scores.argmax()], tails)
            results = self._try(self._second, state, varied)
            plans, scores, dead = (
                np.concatenate(pair) for pair in zip((plans, scores, dead), (varied, *results), strict=True)
            )
        return plans[np.argmax(scores >= scores.max() - self.settings.tolerance)]

    def _random_plans(self, rng: np.random.Generator, number: int) -> np.ndarray:
        """Plans (`number`, T) of random segments."""
        steps = self.settings.steps
        shortest, longest = self.settings.segment
        actions = rng.choice(self.settings.actions, (number, steps))
        return np.repeat(actions, rng.integers(shortest, longest + 1, steps), axis=1)[:, :steps]

    def _try(self, simulator: VecEnv, state: State, plans: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Simulate `plans` (P, T); returns scores (P,), of rewards, progress and deaths, and deaths (P,)."""
        simulator.set_state([state.strip_rendering()] * len(plans))
        scores, alive, dead = np.zeros(len(plans)), np.ones(len(plans), bool), np.zeros(len(plans), bool)
        for t, actions in enumerate(plans.T):
            _, rewards, dones = simulator.step(actions)
            scores[alive] += rewards[alive] * self.DISCOUNT**t
            died = alive & dones & (rewards <= 0)
            # A later death costs less: a later search may avoid it.
            scores[died] -= self.DEATH * self.DISCOUNT**t
            dead |= died
            alive &= ~dones
            if not alive.any():
                break
        if self.settings.progress and alive.any():
            ends = simulator.get_state()
            before = self.settings.progress(state)
            for plan in np.flatnonzero(alive):
                scores[plan] += self.settings.progress(State(ends[plan])) - before
        return scores, dead


def _plan(steps: int, segments: Segments) -> np.ndarray:
    """Actions (`steps`,) of a plan."""
    actions = [action for action, length in segments for _ in range(length)]
    return np.array((actions + [actions[-1]] * steps)[:steps], np.int32)
