"""The interface of experts, and an expert with random actions mixed in. Dimensions: N environments."""

import numpy as np

from lapo.games.table import ACTIONS

LEFT, LEFT_UP, DOWN, NOOP, UP, RIGHT, RIGHT_UP = (
    ACTIONS.index(name) for name in ("LEFT", "LEFT-UP", "DOWN", "NOOP", "UP", "RIGHT", "RIGHT-UP")
)


class Expert:
    """Plays N environments of one game, from the simulator's states."""

    actions: tuple[int, ...]
    """The actions that have an effect in the game."""

    def act(self, states: list[bytes]) -> np.ndarray:
        """Actions, int32 (N,), for N states as `VecEnv.get_state` gives them."""
        raise NotImplementedError

    def forget(self) -> None:
        """Drop plans and history: the next actions depend on the states alone."""

    def canonical_actions(self, states: list[bytes], actions: np.ndarray) -> np.ndarray:
        """The most preferred actions (N,) with the same effect as `actions` (N,) in `states`."""
        return actions


class NoisyExpert(Expert):
    """An expert with random actions mixed in.

    If the expert's action can be predicted from the frame, the world model needs no latent action. Random
    actions make latent actions informative. The published experts are stochastic policies, too.
    """

    def __init__(self, expert: Expert, fraction: float, seed: int):
        """Take a random action instead of that of `expert` in a `fraction` of the steps."""
        self.expert, self.fraction, self.actions = expert, fraction, expert.actions
        self._rng = np.random.default_rng(seed)

    def act(self, states: list[bytes]) -> np.ndarray:
        """See `Expert`."""
        return self.draw(states)[0]

    def draw(self, states: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
        """Actions, int32 (N,), and their probabilities (N,).

        The action taken is the canonical one among those with the same effect as the action drawn. So its
        probability is the sum over all actions that map to it: the expert's and some of the random ones.
        """
        actions = self.expert.act(states)
        random = self._rng.choice(self.actions, len(states)).astype(np.int32)
        chosen = np.where(self._rng.random(len(states)) < self.fraction, random, actions)
        taken = self.expert.canonical_actions(states, chosen)
        planned = taken == self.expert.canonical_actions(states, actions)
        matching = np.zeros(len(states), int)  # random draws that map to the action taken
        for action in set(self.actions):
            same = taken == self.expert.canonical_actions(states, np.full(len(states), action, np.int32))
            matching += self.actions.count(action) * same
        return taken, (1 - self.fraction) * planned + self.fraction * matching / len(self.actions)
