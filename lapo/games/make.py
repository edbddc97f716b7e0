"""Making environments from their names: a Procgen game, or `module:function` for one's own.

The function is called as `make_env(num_envs=N, seed=0, held_out=False)` and returns an `Env`. With `held_out`
it should show levels that do not occur without.
"""

import hashlib
import importlib
import sys
from collections.abc import Callable
from contextlib import closing
from functools import cache
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from lapo.errors import UserError
from lapo.games.env import Env
from lapo.games.table import ACTIONS, GAMES, Visuals, check_game
from lapo.games.vec_env import ALL_LEVELS, HELD_OUT_LEVELS, TRAIN_LEVELS, VecEnv, simulator_version

LEVELS = {"all": ALL_LEVELS, "train": TRAIN_LEVELS, "held_out": HELD_OUT_LEVELS}
"""Ranges of Procgen's levels; those of the recorded frames and the held-out ones are disjoint."""


class EnvSpec(NamedTuple):
    """What all environments of a name have in common, see `Env`."""

    num_actions: int
    reference_returns: tuple[float, float] | None


def can_be_played(name: str) -> bool:
    """Whether `name` is that of an environment; otherwise, it is that of a folder of frames."""
    return name in GAMES or ":" in name


def check_env(name: str) -> None:
    """Raise UserError unless `name` can be played."""
    if ":" not in name:
        check_game(name)


def make_env(
    name: str,
    num_envs: int,
    *,
    seed: int,
    levels: Literal["all", "train", "held_out"] = "all",
    visuals: Visuals = "full",
    num_threads: int | None = None,
) -> Env:
    """`num_envs` environments called `name`.

    `visuals` and `num_threads` are for Procgen, see `VecEnv`. Raises UserError for an unknown name, and if
    the function of `module:function` does not return what `Env` describes.
    """
    if ":" not in name:
        return VecEnv(
            name, num_envs, seed=seed, levels=LEVELS[levels], visuals=visuals, num_threads=num_threads
        )
    env = find_function(name)(num_envs=num_envs, seed=seed, held_out=levels == "held_out")
    if not isinstance(env, Env):
        raise UserError(f"{name} returned {type(env).__name__}; it must return a lapo.games.env.Env")
    for key, wanted in (("num_envs", num_envs), ("num_actions", None)):
        found = getattr(env, key, None)
        if not isinstance(found, int | np.integer) or wanted not in (None, found):
            raise UserError(f"{name}: `{key}` must be {wanted or 'a number'}, found {found}")
    obs = np.asarray(env.observe())
    side = obs.shape[1] if obs.ndim == 4 else 0
    if obs.dtype != np.uint8 or obs.shape != (num_envs, side, side, 3):
        raise UserError(
            f"{name}: `observe` must return uint8 ({num_envs}, S, S, 3), found {obs.dtype} {obs.shape}"
        )
    return env


def find_function(name: str) -> Callable[..., Env]:
    """The function that `module:function` names.

    The module is found as in any Python program: installed, on PYTHONPATH, or in the repository's root.
    Raises UserError if one of the two does not exist.
    """
    module_name, _, function = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if not f"{module_name}.".startswith(f"{error.name}."):
            raise
        raise UserError(
            f"env {name}: there is no module '{module_name}'; put its folder on PYTHONPATH"
        ) from None
    if not callable(getattr(module, function, None)):
        raise UserError(f"env {name}: {module.__file__} has no function '{function}'")
    return getattr(module, function)


@cache
def env_spec(name: str) -> EnvSpec:
    """The `EnvSpec` of environments called `name`. A folder of frames counts as Procgen's actions."""
    if ":" not in name:
        game = GAMES.get(name)
        return EnvSpec(len(ACTIONS), game and (game.random_return, game.expert_return))
    with closing(make_env(name, 1, seed=0)) as env:
        return EnvSpec(env.num_actions, env.reference_returns)


def relative_return(name: str, mean_return: float) -> float | None:
    """Scale a return such that the random policy has 0 and the expert 1; None without reference returns."""
    reference = env_spec(name).reference_returns
    if reference is None:
        return None
    random_return, expert_return = reference
    return (mean_return - random_return) / (expert_return - random_return)


def env_version(name: str) -> dict[str, str]:
    """Version of Procgen, or a hash of the file that defines an environment of one's own."""
    if ":" not in name:
        return {"procgen": simulator_version()}
    find_function(name)
    source = Path(sys.modules[name.partition(":")[0]].__file__).read_bytes()
    return {"environment": hashlib.sha256(source).hexdigest()[:12]}
