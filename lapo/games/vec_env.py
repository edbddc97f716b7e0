"""Procgen's environments: N copies of a game, stepped together.

The only module that imports procgen. Dimensions: N environments, H = W = 64 pixels, C = 3 colours.
"""

import os
from types import ModuleType

import numpy as np

from lapo.errors import UserError
from lapo.games.env import Env
from lapo.games.table import ACTIONS, Visuals, check_game

# Levels are seeded by int32 numbers, and a range is (first seed, how many). Procgen ignores the first seed
# when the number is 0: levels then come from all int32 seeds. So only finite ranges can be disjoint.
ALL_LEVELS = (0, 0)
TRAIN_LEVELS = (0, 100_000)
HELD_OUT_LEVELS = (1_000_000, 1_000_000)


def num_cores() -> int:
    """Processor cores that this process may use; a scheduler may allow only some of the machine's."""
    if hasattr(os, "sched_getaffinity"):  # not on every system
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _procgen() -> ModuleType:
    """The simulator's package, imported when first needed: stages 1 and 2 run without it.

    Raises UserError where it is not installed.
    """
    try:
        import gym_notices.notices

        # procgen imports gym, and gym prints the notice listed here (that it is unmaintained) every time.
        gym_notices.notices.notices.clear()
        import procgen
    except ModuleNotFoundError as error:
        raise UserError(
            f"Procgen, which playing needs, is not installed (there is no module '{error.name}');"
            " `pip install -e '.[procgen]'` in the repository's root installs it"
        ) from None
    return procgen


def simulator_version() -> str:
    """Version of Procgen."""
    return _procgen().__version__.strip()


class VecEnv(Env):
    """N copies of one Procgen game in easy mode, stepped together.

    Frames are a function of the constructor's arguments and the actions, on any number of threads.
    """

    num_actions = len(ACTIONS)

    def __init__(
        self,
        game: str,
        num_envs: int,
        *,
        seed: int,
        levels: tuple[int, int] = ALL_LEVELS,
        visuals: Visuals = "full",
        num_threads: int | None = None,
    ):
        """Make `num_envs` environments of `game`.

        `seed` (0 to 2**31 - 1) draws the sequence of levels of every environment from the range `levels`.
        `num_threads` step the environments in the background; 0 steps them inside `act`, which costs the
        least work per step; the default is one thread per core that we may use. Raises UserError for an
        unknown game or a seed out of range.
        """
        known = check_game(game)
        self.reference_returns = known.random_return, known.expert_return
        if not 0 <= seed < 2**31:
            raise UserError(f"seed {seed} is out of range; choose one from 0 to {2**31 - 1}")
        start_level, num_levels = levels
        self.num_envs = num_envs
        self._stepping = False
        procgen = _procgen()
        try:
            self._env = procgen.ProcgenGym3Env(
                num=num_envs,
                env_name=game,
                distribution_mode="easy",
                start_level=start_level,
                num_levels=num_levels,
                use_backgrounds=visuals == "full",
                restrict_themes=visuals == "plain",
                rand_seed=seed,
                num_threads=min(num_envs, num_cores()) if num_threads is None else num_threads,
            )
        except OSError as error:  # the simulator's library lacks another one
            library = next((word for word in str(error).split() if ".so" in word and "/" not in word), "")
            raise UserError(
                f"Procgen's simulator cannot be loaded: {library.rstrip(':')} is missing, a library of the"
                " system (libGL.so.1 is in Debian's and Ubuntu's package libgl1)"
            ) from None
        # cffi looks a C function up once, under a lock. Freed by the garbage collector in the middle of such
        # a look-up for another environment, this one would wait for ever had it to look up how to close.
        _ = self._env._c_lib.libenv_close

    def observe(self) -> np.ndarray:
        """Current frames, uint8 (N, 64, 64, 3). Waits for a step in progress."""
        return self.result()[0]

    def act(self, actions: np.ndarray) -> None:
        """See `Env`."""
        self._env.act(actions)
        self._stepping = True

    def result(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """See `Env`."""
        rewards, obs, firsts = self._env.observe()
        self._stepping = False
        return obs["rgb"], rewards, firsts

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """`act`, then `result`."""
        self.act(actions)
        return self.result()

    def level_seeds(self) -> np.ndarray:
        """Seeds of the levels being played, int (N,)."""
        return np.array([info["level_seed"] for info in self._env.get_info()])

    def get_state(self) -> list[bytes]:
        """The simulator's state of every environment (N strings). Waits for a step in progress."""
        self._wait()
        return self._env.get_state()

    def set_state(self, states: list[bytes]) -> None:
        """Continue every environment from one of N `states` of the same game.

        Frames, rewards, episode ends and later levels then follow as they would have in the environment
        that the state was taken from; `observe` shows that environment's frame.
        """
        self._wait()
        self._env.set_state(states)

    def close(self) -> None:
        """Free the simulator."""
        self._env.close()
        # cffi views the simulator's arrays. Left to the garbage collector, an array's memory may be cleared
        # before the view of it, and then the view's own clearing crashes the interpreter.
        vars(self._env).clear()

    def __del__(self) -> None:
        if hasattr(self, "_env"):
            self.close()

    def _wait(self) -> None:
        # The simulator itself does not guard its states against a step in progress.
        if self._stepping:
            self.result()


class EpisodeTracker:
    """Adds up raw returns and lengths of the episodes of N environments."""

    def __init__(self, num_envs: int):
        """For `num_envs` environments at the start of an episode."""
        self.returns = np.zeros(num_envs)
        self.lengths = np.zeros(num_envs, dtype=np.int64)

    def update(self, rewards: np.ndarray, dones: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Take in one step's raw `rewards` (N,) and `dones` (N,).

        Gives return, float64, and length in steps, int64, of each episode that ended with this step: one
        entry per environment in `np.flatnonzero(dones)`, in that order.
        """
        self.returns += rewards
        self.lengths += 1
        finished = self.returns[dones], self.lengths[dones]
        self.returns[dones] = 0.0
        self.lengths[dones] = 0
        return finished

    def state_dict(self) -> dict[str, list]:
        """All that changes, as plain numbers."""
        return {"returns": self.returns.tolist(), "lengths": self.lengths.tolist()}

    def load_state_dict(self, state: dict[str, list]) -> None:
        """Continue from what `state_dict` gave."""
        self.returns = np.array(state["returns"])
        self.lengths = np.array(state["lengths"], dtype=np.int64)
