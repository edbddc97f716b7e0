"""The table of Procgen's games, their actions and reference returns. Imports no simulator.

A game that is added here needs a planner as well, see experts/registry.py.
"""

from dataclasses import dataclass
from typing import Literal

from lapo.errors import UserError

ACTIONS = (
    *("LEFT-DOWN", "LEFT", "LEFT-UP", "DOWN", "NOOP", "UP", "RIGHT-DOWN", "RIGHT", "RIGHT-UP"),
    *("D", "A", "W", "S", "Q", "E"),
)
"""Names of the 15 actions, by index. Actions without an effect in a game act as NOOP."""

Visuals = Literal["full", "plain"]
"""How Procgen draws: as in the paper, or without backgrounds and with one look for all levels.

Levels, rewards and dynamics are the same, except where an asset's shape matters, as bigfish's fish.
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
