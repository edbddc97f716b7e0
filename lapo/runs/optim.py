"""Optimisers and learning-rate schedules."""

import warnings
from collections.abc import Iterable

import numpy as np
import torch
from torch import nn

from lapo.config import Ramp, SupervisedConfig

# Steps before a graph's capture are eager, of which every optimiser would warn once.
CAPTURABLE_WARNING = "This instance was constructed with capturable=True"
warnings.filterwarnings("ignore", CAPTURABLE_WARNING, UserWarning)


def piecewise_linear(x: float, points: list[tuple[float, float]]) -> float:
    """Linear interpolation of `points` (x, y) at `x`, constant beyond the ends; their x must ascend."""
    xs, ys = zip(*points, strict=True)
    return float(np.interp(x, xs, ys))


def warmup_schedule(cfg: SupervisedConfig, published_steps: int) -> list[tuple[float, float]]:
    """Points (step, lr factor) of stages 1 and 2. Runs shorter than published have a shorter warm-up."""
    warmup = cfg.lr_warmup * min(1.0, cfg.steps / published_steps)
    return [(0, cfg.lr_start), (warmup, 1.0), (cfg.steps + 1, cfg.lr_end)]


def ramp_schedule(ramp: Ramp, total_steps: int, published_steps: int) -> list[tuple[float, float]]:
    """Points (env step, lr factor) of a stage-3 schedule. They shrink in runs shorter than published."""
    scale = min(1.0, total_steps / published_steps)
    return [(ramp.hold * scale, 0.0), (ramp.peak_at * scale, ramp.peak), (total_steps, 0.0)]


def make_optimizer(
    kind: type[torch.optim.Optimizer], groups: list[dict], modules: Iterable[nn.Module], **options
) -> torch.optim.Optimizer:
    """A fused optimiser over parameter `groups`. Learning rates are tensors: set them with `set_lr`.

    Raises ValueError unless the groups hold exactly the trainable parameters of `modules`. This finds a
    network that was not frozen, or one that was left out.
    """
    trainable = {p for module in modules for p in module.parameters() if p.requires_grad}
    given = [p for group in groups for p in group["params"]]
    if len(given) != len(trainable) or set(given) != trainable:
        raise ValueError(f"the optimiser holds {len(given)} parameters, {len(trainable)} are trainable")
    device = given[0].device
    groups = [group | {"lr": torch.tensor(float(group["lr"]), device=device)} for group in groups]
    # Capturable: a CUDA graph may contain the step, see graphs.py.
    optimizer = kind(groups, fused=True, capturable=device.type == "cuda", **options)
    optimizer.register_load_state_dict_post_hook(_move_groups)
    return optimizer


def _move_groups(optimizer: torch.optim.Optimizer) -> None:
    """Adapt loaded groups to the device of their parameters, which may differ from the checkpoint's."""
    for group in optimizer.param_groups:
        device = group["params"][0].device
        group["lr"] = group["lr"].to(device)
        group["capturable"] = device.type == "cuda"


def set_lr(group: dict, lr: float) -> None:
    """Set a parameter group's learning rate in place, because compiled steps read this tensor."""
    group["lr"].fill_(lr)
