"""The modes of stage 3 and what distinguishes them.

Their training functions are in stage3_decode.py. A new mode is an entry here and a function there.
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Mode:
    """A way of training an acting policy."""

    title: str
    """Name in tables and figures."""
    color: str
    """Colour of its curves and bars; LAPO's modes are blue."""
    config_keys: tuple[str, ...]
    """Keys and groups of the config that its results depend on, beside those of every mode."""
    network: Literal["policy", "actor-critic", "decoded", "two-path"]
    """The network that acts, see `models.make_acting_policy`."""
    needs_latents: bool
    """Whether it uses stages 1 and 2."""
    plays: bool
    """Whether it is trained on rewards in the game; otherwise, on labelled frames."""


MODES = {
    "bc": Mode("behaviour cloning", "#e0a03c", ("data", "offline", "eval"), "policy", False, False),
    "scratch": Mode("PPO from scratch", "#c8553d", ("ppo", "eval"), "actor-critic", False, True),
    "offline": Mode(
        *("LAPO offline", "#7fb2e5", ("data", "offline", "vq", "decoder", "eval"), "decoded", True, False)
    ),
    "online": Mode(
        "LAPO online", "#1f5fa8", ("ppo", "vq", "decoder", "eval", "data.context"), "two-path", True, True
    ),
}
"""In the order in which tables and figures show them."""
