"""What an environment offers to those that play in it.

Dimensions: N environments · H, W, C frame
"""

from abc import ABC, abstractmethod

import numpy as np


class Env(ABC):
    """N copies of a game, stepped together.

    A new environment shows the first frames at once, and starts the next episode by itself when one ends, so
    there is no `reset`. Returned arrays are not overwritten later.

    Attributes
        num_envs           N
        num_actions        actions are 0 to num_actions - 1
        reference_returns  mean returns of the random policy and of an expert, which relative returns refer
                           to; None: there are none
    """

    num_envs: int
    num_actions: int
    reference_returns: tuple[float, float] | None = None

    @abstractmethod
    def observe(self) -> np.ndarray:
        """Current frames, uint8 (N, H, W, 3), square."""

    @abstractmethod
    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Take integer `actions` (N,).

        Returns frames as `observe` does, rewards, float32 (N,), and dones, bool (N,): whether the action
        ended the episode. The frame of a done environment is the first of its next episode.
        """

    def act(self, actions: np.ndarray) -> None:
        """Start a step and return at once, if the environment can; `result` waits for its end."""
        self._stepped = self.step(actions)

    def result(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What the step started by `act` led to, see `step`."""
        return self._stepped

    def get_state(self) -> list[bytes]:
        """Everything that frames, rewards and episode ends depend on, N strings.

        Without it ([]), a run that is resumed begins new episodes.
        """
        return []

    def set_state(self, states: list[bytes]) -> None:  # noqa: B027 - optional, as is `close`
        """Continue from what `get_state` returned, unless that was []."""

    def close(self) -> None:  # noqa: B027
        """Free what the environment holds."""
