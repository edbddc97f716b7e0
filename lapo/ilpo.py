"""ILPO (Edwards, Sahni, Schroecker and Isbell, ICML 2019): pretraining of the trunk of mode ilpo.

A policy chooses among Z discrete latent actions from o[t], and a generator predicts the change to o[t+1]
under each of them. Unlike in the original, which maps latent actions to true ones, PPO on the policy's frozen
trunk follows, as in LAPO's baseline. That trunk is of stage 2's kind, the generator of the world model's.

Dimensions: B batch · Z latent actions · C, H, W image
"""

import torch
from torch import Tensor

from lapo.config import Config
from lapo.data.checks import check_data, check_frames
from lapo.data.chunks import data_checksums
from lapo.data_loader import read_splits
from lapo.models import Generator, make_ilpo_policy, normalize
from lapo.runs.compute import Compute, seed_everything
from lapo.runs.optim import make_optimizer
from lapo.runs.run import Run

STAGE = "ilpo_trunk"


def ilpo_loss(logits: Tensor, changes: Tensor, change: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """ILPO's loss, and its two parts, detached.

    `logits` (B, Z) of the policy, `changes` (B, Z, C, H, W) of the generator, the true `change` (B, C, H, W).
    Both parts are squared errors, summed over pixels and averaged over the batch: of the latent action that
    predicts best, and of the mean prediction under the policy. The latter trains the policy alone.
    """
    best = (changes - change[:, None]).square().sum((2, 3, 4)).min(1).values.mean()
    weights = logits.float().softmax(-1)[..., None, None, None]
    expected = (weights * changes.detach()).sum(1)
    mixed = (expected - change).square().sum((1, 2, 3)).mean()
    return best + mixed, {"generator_loss": best.detach(), "policy_loss": mixed.detach()}


def train_trunk(cfg: Config, compute: Compute) -> None:
    """Train policy and generator on frames, in a run of its own, and write its checkpoint."""
    check_data(cfg.env, cfg.game_data)
    seed_everything(cfg.seed)
    run = Run(cfg, STAGE, ("data", "model", "ilpo"), compute, data_checksums(cfg))
    if run.finished:
        return
    check_frames(cfg.env, cfg.game_data, cfg.visuals)
    windows, _ = read_splits(cfg, compute.device)
    policy = compute.place(make_ilpo_policy(cfg))
    generator = compute.place(Generator(cfg.ilpo.num_actions, cfg.model.wm_width, cfg.data.image_size))
    params = [*policy.parameters(), *generator.parameters()]
    groups = [{"params": params, "lr": cfg.ilpo.lr, "betas": (0.5, 0.999)}]
    optimizer = make_optimizer(torch.optim.Adam, groups, [policy, generator])
    parts = {"policy": policy, "generator": generator, "optimizer": optimizer}
    if run.state:
        windows.check_data_order(run.state["order"])
        for name, part in parts.items():
            part.load_state_dict(run.state[name])

    @compute.compiled
    def loss_of(frames: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        images, following = normalize(frames).unbind(1)
        with compute.autocast():
            logits, changes = policy(images), generator(images)
        return ilpo_loss(logits, changes, following - images)

    def state() -> dict:
        return {name: part.state_dict() for name, part in parts.items()} | {"order": windows.data_order}

    options = {"save_every": cfg.ilpo.save_every, "unit": "window", "scale": cfg.ilpo.batch_size}
    for step in run.loop(cfg.ilpo.steps, state, **options):
        frames = windows.gather(windows.batch(step, cfg.ilpo.batch_size, cfg.seed))
        loss, metrics = loss_of(frames[:, -2:])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        run.track(metrics)
        if (step + 1) % cfg.ilpo.log_every == 0 or step + 1 == cfg.ilpo.steps:
            run.log(step + 1)
    run.finish(state())
