"""Acting policies: loading them from checkpoints, and sampling actions from logits. Needs no simulator.

Dimensions: N environments · A actions
"""

from pathlib import Path

import torch
from torch import Tensor

from lapo.errors import UserError
from lapo.models import make_acting_policy, restore
from lapo.runs.checkpoints import load_checkpoint, saved_config
from lapo.runs.compute import Compute


def load_policy_checkpoint(path: Path, command: str | None = None) -> dict:
    """Load the checkpoint of an acting policy: of stage 3, or of an expert. `command` produces it.

    Raises `UserError` as `load_checkpoint` does, and for a stage whose networks cannot act.
    """
    checkpoint = load_checkpoint(path, command)
    if not checkpoint["stage"].startswith(("stage3", "expert")):
        saved = checkpoint["config"]
        raise UserError(
            f"{path} is a checkpoint of {checkpoint['stage']}, which cannot act; train a policy that can with"
            f" `python stage3.py --env {saved['env']} --exp {saved['exp']} --seed {saved['seed']}`"
        )
    return checkpoint


def restore_policy(checkpoint: dict, compute: Compute) -> torch.nn.Module:
    """The network of a `load_policy_checkpoint`, frozen and in eval mode."""
    cfg = saved_config(checkpoint)
    weights = checkpoint["state"]["policy"]
    return restore(make_acting_policy(cfg, cfg.stage3.mode, count_actions(weights)), weights, compute)


def count_actions(weights: dict[str, Tensor]) -> int:
    """Number of actions of an acting policy: the size of its decoder's last layer or its policy head."""
    names = [name for name in weights if name.startswith("decoder.") or name == "policy_head.bias"]
    return len(weights[names[-1]])


def sample(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Sample from logits (N, A) by the Gumbel-max trick; returns actions (N,) and their log-probs (N,)."""
    logprobs = logits.log_softmax(-1)
    action = (logprobs - torch.empty_like(logprobs).exponential_().log()).argmax(-1)
    return action, logprobs.gather(-1, action[:, None]).squeeze(-1)
