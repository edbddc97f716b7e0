"""The modes of stage 3 and what distinguishes them.

Their training functions are in stage3_decode.py and imitation.py. A new mode is an entry here and a function
there.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from lapo.errors import UserError


@dataclass(frozen=True)
class Mode:
    """A way of training an acting policy."""

    title: str
    """Name in tables and figures."""
    color: str
    """Colour of its curves and bars; LAPO's modes are blue."""
    config_keys: tuple[str, ...]
    """Keys and groups of the config that its results depend on, beside those of every mode."""
    network: Literal["policy", "actor-critic", "decoded", "two-path", "frozen-trunk"]
    """The network that acts, see `models.make_acting_policy`."""
    stages: tuple[str, ...]
    """The stages that it builds on."""
    learns_from: tuple[Literal["frames", "labels", "rewards"], ...]
    """Frames of the expert, true actions of some of them, rewards of the game; stages included."""

    @property
    def plays(self) -> bool:
        """Whether it is trained in the game."""
        return "rewards" in self.learns_from


BOTH = "stage1", "stage2"
LABELS = "data", "offline", "eval"
RL = (
    *("ppo.num_envs", "ppo.rollout_steps", "ppo.minibatches", "ppo.epochs", "ppo.gamma", "ppo.gae_lambda"),
    *("ppo.clip", "ppo.entropy_coef", "ppo.value_coef", "ppo.clip_norm", "eval"),
)
"""PPO, but for its learning rates."""
HEADS = (*RL, "ppo.lr", "ppo.policy_head", "ppo.value_head", "ppo.fc")
"""PPO of the heads on a frozen trunk."""
LATENT_SIZE = "vq.kind", "vq.num_codebooks", "vq.num_latents", "vq.emb_dim", "vq.levels"
"""What `VQConfig.la_dim` depends on."""

MODES = {
    "bc": Mode("behaviour cloning", "#e0a03c", LABELS, "policy", (), ("labels",)),
    "idm_labelling": Mode(
        *("IDM labelling", "#a9772a"),
        (*LABELS, "relabel", "model.idm_scale", *LATENT_SIZE, "decoder.hidden"),
        *("policy", ()),
        learns_from=("frames", "labels"),
    ),
    "scratch": Mode("PPO from scratch", "#c8553d", (*RL, "ppo.scratch_lr"), "actor-critic", (), ("rewards",)),
    "ilpo": Mode(
        *("ILPO", "#8a8a3c", (*HEADS, "data", "ilpo", "model.wm_width"), "frozen-trunk", ("ilpo_trunk",)),
        learns_from=("frames", "rewards"),
    ),
    "offline": Mode(
        *("LAPO offline", "#7fb2e5", (*LABELS, "vq", "decoder"), "decoded", BOTH),
        learns_from=("frames", "labels"),
    ),
    "lapo_plus": Mode(
        *("LAPO+", "#4a90c2", (*LABELS, "relabel", "vq", "decoder"), "policy", ("stage1",)),
        learns_from=("frames", "labels"),
    ),
    "no_sl": Mode(
        *("LAPO without SL", "#5b7fa6", (*HEADS, "vq"), "frozen-trunk", ("stage2",)),
        learns_from=("frames", "rewards"),
    ),
    "online": Mode(
        *("LAPO online", "#1f5fa8", (*HEADS, "vq", "decoder", "data.context"), "two-path", BOTH),
        learns_from=("frames", "rewards"),
    ),
}
"""In the order in which tables and figures show them."""
COMPARISONS = "idm_labelling", "ilpo", "lapo_plus", "no_sl"
"""Modes that a run's report names only if the run has them."""


def check_modes(names: Iterable[str]) -> None:
    """Raise `UserError` if one of the names in `--modes` is no mode's."""
    for name in names:
        if name not in MODES:
            raise UserError(f"--modes: '{name}' is no mode; choose among {', '.join(MODES)}")
