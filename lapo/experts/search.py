"""A search that plays any game: it tries plans in copies of the simulator.

Dimensions: N environments played, P plans, T steps.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from lapo.experts.expert import Expert
from lapo.games.simulator_state import State
from lapo.games.vec_env import VecEnv

MOTION = ("x", "y", "vx", "vy")
Stretches = tuple[tuple[int, int], ...]
"""A plan: each (action, length) in turn, the last one to the end."""


@dataclass(frozen=True)
class SearchSettings:
    """What `SimulatorSearch` tries in a game, and what it strives for."""

    actions: tuple[int, ...]
    """Actions that matter, the most preferred first; those named twice are tried more often."""
    progress: Callable[[State], float] | None = None
    """What having got to a state alive is worth, in units of reward; without it, nothing."""
    steps: int = 32
    """How far a plan looks ahead."""
    commit: int = 8
    """Steps taken before the next search."""
    stretch: tuple[int, int] = (2, 8)
    """Shortest and longest stretch of one action in random plans."""
    plans: tuple[Stretches, ...] = ()
    """Plans tried every time, the most preferred first, before that of holding each action."""
    random_plans: int = 10
    """Further plans, made of random stretches of `actions`."""
    variations: int = 8
    """Plans tried in a further round, which leave the best one so far at some step."""
    rounds: int = 1
    """Rounds of variations; as long as the best plan ends in death, there are more."""
    tolerance: float = 0.05
    """How much worse than the best a preferred plan may be."""
    simpler: dict[int, int] = field(default_factory=dict)
    """Actions, and simpler ones that often have the same effect."""


@dataclass(frozen=True)
class _Plan:
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
    DEATH = 20.0  # what it costs, in units of reward: more than anything that can be had at its price
    LAST_ROUND = 6  # of looking for a plan that survives

    def __init__(self, game: str, settings: SearchSettings, num_envs: int):
        """For `num_envs` environments of `game`."""
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
        """See `Expert`; both actions are tried in the simulator."""
        simpler = np.array([self.settings.simpler.get(int(action), action) for action in actions], np.int32)
        if (simpler == actions).all():
            return actions
        looks = [State(state).strip_rendering() for state in states]
        self._pairs.set_state(looks + looks)
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
        """The actions (T,) to take from `state`, where `rest` (at most T) is left of the last plan."""
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
        """Plans (`number`, T) of random stretches."""
        steps = self.settings.steps
        shortest, longest = self.settings.stretch
        actions = rng.choice(self.settings.actions, (number, steps))
        return np.repeat(actions, rng.integers(shortest, longest + 1, steps), axis=1)[:, :steps]

    def _try(self, simulator: VecEnv, state: State, plans: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Score `plans` (P, T) by rewards, progress and death; returns scores (P,) and deaths, bool (P,)."""
        simulator.set_state([state.strip_rendering()] * len(plans))
        scores, alive, dead = np.zeros(len(plans)), np.ones(len(plans), bool), np.zeros(len(plans), bool)
        for t, actions in enumerate(plans.T):
            _, rewards, dones = simulator.step(actions)
            scores[alive] += rewards[alive] * self.DISCOUNT**t
            died = alive & dones & (rewards <= 0)
            # To die later is better: a later search may find a way out.
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


def _plan(steps: int, stretches: Stretches) -> np.ndarray:
    """Actions (`steps`,) of a plan."""
    actions = [action for action, length in stretches for _ in range(length)]
    return np.array((actions + [actions[-1]] * steps)[:steps], np.int32)
