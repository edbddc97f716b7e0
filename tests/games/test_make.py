"""Environments from their names, of Procgen and of one's own."""

import functools
import hashlib
import sys
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from lapo.errors import UserError
from lapo.games.env import Env
from lapo.games.make import (
    LEVELS,
    can_be_played,
    check_env,
    env_spec,
    env_version,
    find_function,
    make_env,
    relative_return,
)
from lapo.games.table import GAMES
from lapo.games.vec_env import VecEnv


class Still(Env):
    """Grey frames, in which nothing happens."""

    num_actions = 3

    def __init__(self, num_envs: int, seed: int = 0, held_out: bool = False):
        self.num_envs, self.arguments = num_envs, (seed, held_out)

    def observe(self) -> np.ndarray:
        return np.zeros((self.num_envs, 8, 8, 3), np.uint8)

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return self.observe(), actions.astype(np.float32), actions == 2


class Rewarding(Still):
    reference_returns = 1.0, 3.0


class Oblong(Still):
    """Its frames are wider than high."""

    def observe(self) -> np.ndarray:
        return np.zeros((self.num_envs, 8, 16, 3), np.uint8)


class Blind(Still):
    def observe(self) -> np.ndarray:
        return np.zeros((self.num_envs, 8, 8))


class Nameless(Still):
    num_actions = None


def one_too_many(num_envs: int, seed: int, held_out: bool) -> Still:
    return Still(num_envs + 1)


def nothing(num_envs: int, seed: int, held_out: bool) -> None:
    pass


@pytest.fixture
def here(monkeypatch) -> str:
    """Name of this module, as a user's is found."""
    monkeypatch.setitem(sys.modules, "my_module", sys.modules[__name__])
    return "my_module"


def test_a_function_of_ones_own_gets_number_seed_and_whether_levels_are_held_out(here):
    env = make_env(f"{here}:Still", 5, seed=7, levels="held_out")
    assert (env.num_envs, env.arguments) == (5, (7, True))
    for levels in ("all", "train"):
        assert make_env(f"{here}:Still", 5, seed=7, levels=levels).arguments == (7, False)


def test_act_and_result_are_a_step_by_default(here):
    env = make_env(f"{here}:Still", 3, seed=0)
    env.act(np.array([0, 1, 2]))
    frames, rewards, dones = env.result()
    assert (frames.shape, rewards.tolist(), dones.tolist()) == ((3, 8, 8, 3), [0, 1, 2], [False, False, True])
    assert env.get_state() == []


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("missing", "has no function 'missing'"),
        ("GAMES", "has no function 'GAMES'"),
        ("nothing", "returned NoneType; it must return a lapo.games.env.Env"),
        ("one_too_many", "`num_envs` must be 2, found 3"),
        ("Nameless", "`num_actions` must be a number, found None"),
        ("Oblong", r"`observe` must return uint8 \(2, S, S, 3\), found uint8 \(2, 8, 16, 3\)"),
        ("Blind", r"`observe` must return uint8 \(2, S, S, 3\), found float64 \(2, 8, 8\)"),
    ],
)
def test_what_is_no_environment_is_named(here, function, message):
    with pytest.raises(UserError, match=message):
        make_env(f"{here}:{function}", 2, seed=0)


def test_a_missing_module_is_named_and_a_broken_one_shows_its_own_error(tmp_path: Path, monkeypatch):
    with pytest.raises(UserError, match="there is no module 'not_there'; put its folder on PYTHONPATH"):
        find_function("not_there:make_env")
    with pytest.raises(UserError, match=r"there is no module 'not_there\.envs'; put its folder on"):
        find_function("not_there.envs:make_env")
    (tmp_path / "broken_module.py").write_text("import not_there_either\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="not_there_either"):
        find_function("broken_module:make_env")


def test_the_version_of_an_environment_is_a_hash_of_its_module(here, monkeypatch):
    """Whatever can be called; the file counts."""
    monkeypatch.setattr(sys.modules[__name__], "partly", functools.partial(Still), raising=False)
    expected = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12]
    for function in ("Still", "partly"):
        assert env_version(f"{here}:{function}") == {"environment": expected}


def test_relative_returns_need_reference_returns(here):
    assert relative_return(f"{here}:Rewarding", 2.0) == 0.5
    assert relative_return(f"{here}:Still", 2.0) is None
    assert relative_return("a_folder", 2.0) is None
    game = GAMES["maze"]
    assert relative_return("maze", game.random_return) == 0
    assert relative_return("maze", game.expert_return) == 1


def test_the_number_of_actions_is_the_environments(here):
    assert env_spec(f"{here}:Still").num_actions == 3
    assert env_spec("maze").num_actions == env_spec("a_folder").num_actions == 15


def test_names_are_those_of_games_functions_or_folders(here):
    assert can_be_played("maze")
    assert can_be_played(f"{here}:Still")
    assert not can_be_played("a_folder")
    with pytest.raises(UserError, match="'a_folder' is not a Procgen game"):
        check_env("a_folder")
    check_env(f"{here}:Still")


def test_an_environment_s_version_is_its_file_s(here, tmp_path: Path, monkeypatch):
    assert set(env_version("maze")) == {"procgen"}
    monkeypatch.syspath_prepend(tmp_path)
    versions = set()
    for number in range(2):
        (tmp_path / f"numbered_{number}.py").write_text(f"def make_env():\n    return {number}\n")
        versions.add(env_version(f"numbered_{number}:make_env")["environment"])
    assert len(versions) == 2


def test_procgen_s_levels_are_those_of_the_purpose():
    with closing(make_env("maze", 4, seed=0, levels="held_out")) as env:
        assert isinstance(env, VecEnv)
        first, count = LEVELS["held_out"]
        assert ((first <= env.level_seeds()) & (env.level_seeds() < first + count)).all()
        assert env.num_actions == 15
        assert env.reference_returns == (GAMES["maze"].random_return, GAMES["maze"].expert_return)
    with closing(make_env("maze", 4, seed=0, levels="train")) as env:
        assert (env.level_seeds() < sum(LEVELS["train"])).all()
