"""The curves of two papers, digitised; docs/paper_results.json says how they were read off.

Keys are modes of stage 3; `no_sl_no_vq` is the mode no_sl after stages 1 and 2 without a quantiser.
"""

import json
from functools import cache

from lapo.config import ROOT

PAPER, LAPO_PLUS = "paper", "LAPO+"
FILES = {
    PAPER: ROOT / "docs" / "paper_results.json",
    LAPO_PLUS: ROOT / "docs" / "lapo_plus_results.json",
}
EXTRA_TITLES = {
    "no_sl": "online without SL",
    "no_sl_no_vq": "online without SL and VQ",
    "ilpo": "ILPO",
    "idm_labelling": "IDM labelling",
    "lapo_plus": "LAPO+",
}
"""Names of methods that are no mode here."""

Curves = dict[str, tuple[list[int], list[float]]]
"""Points of a curve, x and y, by method."""


@cache
def read(paper: str) -> dict:
    """The content of one of `FILES`."""
    return json.loads(FILES[paper].read_text(encoding="utf-8"))


def online(game: str | None) -> Curves:
    """The paper's returns over env steps in a game; over all games, relative returns, if `game` is None."""
    found = read(PAPER)
    return split(found["online_aggregate"] if game is None else found["online"].get(game), "steps")


def offline(paper: str, game: str | None) -> Curves:
    """A paper's returns over the number of labels in a game, or relative ones over all games."""
    found = read(paper)
    return split(found["offline_aggregate"] if game is None else found.get("offline", {}).get(game), "labels")


def split(group: dict[str, list] | None, x: str) -> Curves:
    """The curves of a group of the files, which share their `x`."""
    return {key: (group[x], values) for key, values in group.items() if key != x} if group else {}


def final(mode: str, game: str, labels: int | None, *, quantised: bool = True) -> float | None:
    """The paper's return of a mode in a game: after 4M env steps, or with as many labels; None if unknown.

    Not `quantised`: after stages 1 and 2 without a quantiser.
    """
    curves = online(game) if labels is None else offline(PAPER, game)
    if not quantised:
        mode += "_no_vq"
    if mode not in curves:
        return None
    x, values = curves[mode]
    return values[-1] if labels is None else dict(zip(x, values, strict=True)).get(labels)
