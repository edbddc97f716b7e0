"""What an expert is, and one that now and then does something else. Dimensions: N environments played."""

import numpy as np

from lapo.games.table import ACTIONS

LEFT, LEFT_UP, DOWN, NOOP, UP, RIGHT, RIGHT_UP = (
    ACTIONS.index(name) for name in ("LEFT", "LEFT-UP", "DOWN", "NOOP", "UP", "RIGHT", "RIGHT-UP")
)


class Expert:
    """Plays N environments of one game."""

    actions: tuple[int, ...]
    """The actions that matter in the game."""

    def act(self, states: list[bytes]) -> np.ndarray:
        """Actions, int32 (N,), for N states as `VecEnv.get_state` gives them."""
        raise NotImplementedError

    def forget(self) -> None:
        """Forget what was planned and done: the next actions depend on nothing but the states."""

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
        return self.draw(states)[0]

    def draw(self, states: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
        """Actions, int32 (N,), and how probable each was, (N,).

        What is taken is the simplest action with the effect of the one that was drawn. So an action is as
        probable as all those together that it stands for: the expert's, and some of those drawn at random.
        """
        actions = self.expert.act(states)
        random = self._rng.choice(self.actions, len(states)).astype(np.int32)
        chosen = np.where(self._rng.random(len(states)) < self.share, random, actions)
        taken = self.expert.simplest(states, chosen)
        planned = taken == self.expert.simplest(states, actions)
        ways = np.zeros(len(states), int)  # in which random leads to what was taken
        for action in set(self.actions):
            same = taken == self.expert.simplest(states, np.full(len(states), action, np.int32))
            ways += self.actions.count(action) * same
        return taken, (1 - self.share) * planned + self.share * ways / len(self.actions)
