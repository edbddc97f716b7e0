"""The table of games."""

import pytest

from lapo.errors import UserError
from lapo.games.make import relative_return
from lapo.games.table import GAMES, check_game
from lapo.games.vec_env import VecEnv


def test_games_are_procgens_in_the_papers_order() -> None:
    assert list(GAMES) == sorted(GAMES)
    assert len(GAMES) == 16
    assert relative_return("bigfish", GAMES["bigfish"].random_return) == 0
    assert relative_return("bigfish", GAMES["bigfish"].expert_return) == 1


def test_unknown_game_is_told_all_games() -> None:
    with pytest.raises(UserError, match=", ".join(GAMES)):
        check_game("pong")
    with pytest.raises(UserError, match="'pong'"):
        VecEnv("pong", 1, seed=0)
    with pytest.raises(UserError, match="out of range"):
        VecEnv("maze", 1, seed=2**31)
