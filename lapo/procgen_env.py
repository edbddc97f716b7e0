"""Procgen: the table of games, the vector environment, and what is measured on it.

The only module that imports procgen. Dimensions: N environments, H = W = 64 pixels, C = 3 colours.
"""

import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Literal, Protocol

import numpy as np

from errors import UserError

ACTIONS = (
    *("LEFT-DOWN", "LEFT", "LEFT-UP", "DOWN", "NOOP", "UP", "RIGHT-DOWN", "RIGHT", "RIGHT-UP"),
    *("D", "A", "W", "S", "Q", "E"),
)
"""Names of the 15 actions, by index. Those a game has no use for act as NOOP."""

# Levels are seeded by int32 numbers, and a range is (first seed, how many). Procgen ignores the first seed
# when the number is 0: levels then come from all int32 seeds. So only finite ranges can be disjoint.
ALL_LEVELS = (0, 0)
TRAIN_LEVELS = (0, 100_000)
HELD_OUT_LEVELS = (1_000_000, 1_000_000)

Visuals = Literal["full", "plain"]
"""How Procgen draws: as in the paper, or without backgrounds and with one look for all levels.

Levels, rewards and movements stay the same, but where shapes come with the look: bigfish's fish, say.
"""


@dataclass(frozen=True)
class Game:
    """A game and its mean returns in easy mode, from the paper's code."""

    name: str
    random_return: float
    """Of the uniform random policy."""
    expert_return: float
    """Of the published expert data."""


GAMES = {
    game.name: game
    for game in (
        Game("bigfish", 0.8742888, 36.336166),
        Game("bossfight", 0.04618272, 11.634365),
        Game("caveflyer", 2.5970738, 9.183605),
        Game("chaser", 0.6632482, 9.955711),
        Game("climber", 2.2242901, 10.233627),
        Game("coinrun", 2.704834, 9.93251),
        Game("dodgeball", 0.612983, 13.486584),
        Game("fruitbot", -2.5330205, 29.925259),
        Game("heist", 3.0758767, 9.685265),
        Game("jumper", 3.4105318, 8.460201),
        Game("leaper", 2.5105245, 7.4082565),
        Game("maze", 4.2726293, 9.969294),
        Game("miner", 1.2513667, 11.892558),
        Game("ninja", 2.5599792, 9.474582),
        Game("plunder", 4.3207445, 11.460528),
        Game("starpilot", 1.5251881, 66.98625),
    )
}


def check_game(name: str) -> Game:
    """The game called `name`. Raises UserError, naming all the games, if there is none."""
    if name not in GAMES:
        raise UserError(f"'{name}' is not a Procgen game; choose one of {', '.join(GAMES)}")
    return GAMES[name]


def num_cores() -> int:
    """Processor cores that this process may use; a scheduler may have given us a few of the machine's."""
    if hasattr(os, "sched_getaffinity"):  # not on every system
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def check_data(name: str, folder: Path) -> None:
    """Raise UserError unless `name` is a Procgen game or, for other frames, `folder` holds its data."""
    if name not in GAMES and not folder.is_dir():
        raise UserError(
            f"'{name}' is neither a Procgen game nor a folder {folder}; the games are {', '.join(GAMES)},"
            f" and `python import_video.py --env {name}` makes such a folder from videos"
        )


def check_frames(name: str, folder: Path, visuals: Visuals) -> None:
    """Raise UserError unless `folder` holds data of `name` that show it, a Procgen game, with `visuals`."""
    check_data(name, folder)
    if name not in GAMES:
        return
    if not folder.is_dir():
        record = f"python record_expert.py --env {name} --visuals {visuals} --data-dir {folder.parent}"
        download = f" or download it with `bash setup_data.sh {name}`" if visuals == "full" else ""
        raise UserError(f"the data folder {folder} does not exist; make it with `{record}`{download}")
    path = folder / "dataset.json"
    try:
        recorded = json.loads(path.read_text()).get("visuals", "full")
    except FileNotFoundError:
        recorded = "full"  # downloaded: the published frames
    except (OSError, ValueError, AttributeError):
        raise UserError(f"{path} is damaged; record the data again, or delete this file") from None
    if recorded != visuals:
        raise UserError(
            f"{folder} shows the game with visuals {recorded}, but visuals is {visuals};"
            f" choose --visuals {recorded} or another --data_dir"
        )


def relative_return(name: str, mean_return: float) -> float:
    """Scale a return of game `name` so that the random policy has 0 and the published expert 1."""
    game = check_game(name)
    return (mean_return - game.random_return) / (game.expert_return - game.random_return)


def _procgen() -> ModuleType:
    """The simulator's package, imported when first needed: the other stages run without it."""
    import gym_notices.notices

    # procgen imports gym, and gym prints the notice listed here (that it is unmaintained) on every import.
    gym_notices.notices.notices.clear()
    import procgen

    return procgen


def simulator_version() -> str:
    """Version of Procgen."""
    return _procgen().__version__.strip()


class VecEnv:
    """N copies of one Procgen game in easy mode, stepped together.

    A new environment already shows the first frames, and an environment whose episode ends starts the next
    one by itself, so there is no `reset`. Everything that happens is a function of the arguments and the
    actions: two environments made alike and acted on alike show the same frames on any number of threads.
    All arrays returned are the caller's to keep.
    """

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
        check_game(game)
        if not 0 <= seed < 2**31:
            raise UserError(f"seed {seed} is out of range; choose one from 0 to {2**31 - 1}")
        start_level, num_levels = levels
        self.num_envs = num_envs
        self._stepping = False
        self._env = _procgen().ProcgenGym3Env(
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
        # cffi looks a C function up once, under a lock. Freed by the garbage collector in the middle of such
        # a look-up for another environment, this one would wait for ever had it to look up how to close.
        _ = self._env._c_lib.libenv_close

    def observe(self) -> np.ndarray:
        """Current frames, uint8 (N, 64, 64, 3). Waits for a step in progress."""
        return self.result()[0]

    def act(self, actions: np.ndarray) -> None:
        """Start one step with integer `actions` (N,) and return at once; `result` waits for its end."""
        self._env.act(actions)
        self._stepping = True

    def result(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What the step started by `act` led to; waits for its end.

        Returns frames, uint8 (N, 64, 64, 3), rewards, float32 (N,), and dones, bool (N,): whether the
        action ended the episode. The frame of a done environment is the first of its next episode.
        """
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


class ReturnNormalizer:
    """Divides rewards by the running standard deviation of the discounted return, and clips them.

    As NormalizeReward of gym 0.23, which the published code uses, followed by a clip.
    """

    def __init__(self, num_envs: int, *, gamma: float, clip: float = 10.0):
        """For `num_envs` environments, discount `gamma`; results lie within ±`clip`."""
        self.gamma, self.clip = gamma, clip
        self.returns = np.zeros(num_envs)
        # Moments of all returns seen so far; the small count keeps the first variance from being 0/0.
        self.mean, self.var, self.count = 0.0, 1.0, 1e-4

    def __call__(self, rewards: np.ndarray, dones: np.ndarray) -> np.ndarray:
        """Take in one step's raw `rewards` (N,) and `dones` (N,); return scaled rewards, float32 (N,)."""
        self.returns = self.returns * self.gamma + rewards
        self._update_moments(self.returns)
        self.returns[dones] = 0.0
        scaled = rewards / math.sqrt(self.var + 1e-8)
        return np.clip(scaled, -self.clip, self.clip).astype(np.float32)

    def state_dict(self) -> dict[str, float | list[float]]:
        """All that changes, as plain numbers."""
        moments = {"mean": self.mean, "var": self.var, "count": self.count}
        return {"returns": self.returns.tolist(), **moments}

    def load_state_dict(self, state: dict[str, float | list[float]]) -> None:
        """Continue from what `state_dict` gave."""
        self.returns = np.array(state["returns"])
        self.mean, self.var, self.count = state["mean"], state["var"], state["count"]

    def _update_moments(self, values: np.ndarray) -> None:
        # Chan et al.'s rule for merging the moments of two samples.
        total = self.count + len(values)
        delta = float(values.mean()) - self.mean
        squares = self.var * self.count + float(values.var()) * len(values)
        self.mean += delta * len(values) / total
        self.var = (squares + delta**2 * self.count * len(values) / total) / total
        self.count = total


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


@dataclass(frozen=True)
class Evaluation:
    """Raw returns and lengths (in steps) of complete episodes."""

    returns: np.ndarray
    lengths: np.ndarray
    speed: float = math.nan
    """Steps played, over all environments, per second of CPU time of all threads."""

    @property
    def episodes(self) -> int:
        """How many episodes were counted."""
        return self.returns.size

    @property
    def mean(self) -> float:
        """Mean return."""
        return float(self.returns.mean())

    @property
    def stderr(self) -> float:
        """Standard error of the mean return; NaN for a single episode."""
        if self.episodes < 2:
            return math.nan
        return float(self.returns.std(ddof=1)) / math.sqrt(self.episodes)


class SteppableEnv(Protocol):
    """What `play` needs of an environment; `VecEnv` is one."""

    num_envs: int

    def observe(self) -> np.ndarray:
        """Current frames (N, ...)."""

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Frames, rewards and dones after `actions`."""


def play(
    act: Callable[[np.ndarray], np.ndarray], env: SteppableEnv, episodes: int, *, sparing: bool = False
) -> Evaluation:
    """Play a new `env` and measure `episodes` complete episodes, rounded up to a multiple of N.

    `act` maps frames, uint8 (N, 64, 64, 3), to actions (N,). Every environment contributes its first
    `episodes / N` episodes: counting whichever end first would favour short ones. With `sparing`, for an
    `act` that knows nothing but the frames it is given, only those of environments that still contribute are
    given to it; the others idle. A few long episodes then cost what they take themselves.
    """
    per_env = -(-episodes // env.num_envs)
    returns = np.zeros((env.num_envs, per_env))
    lengths = np.zeros((env.num_envs, per_env), dtype=np.int64)
    counts = np.zeros(env.num_envs, dtype=np.int64)
    tracker = EpisodeTracker(env.num_envs)
    steps, start = 0, time.process_time()
    obs = env.observe()
    while (playing := counts < per_env).any():
        if sparing:
            actions = np.zeros(env.num_envs, np.int64)
            actions[playing] = act(obs[playing])
        else:
            actions = act(obs)
        obs, rewards, dones = env.step(actions)
        finished_returns, finished_lengths = tracker.update(rewards, dones)
        wanted = counts[dones] < per_env
        envs = np.flatnonzero(dones)[wanted]
        returns[envs, counts[envs]] = finished_returns[wanted]
        lengths[envs, counts[envs]] = finished_lengths[wanted]
        counts[envs] += 1
        steps += env.num_envs
    # The clock may stand still for the shortest of plays.
    return Evaluation(returns.ravel(), lengths.ravel(), steps / max(time.process_time() - start, 1e-6))
