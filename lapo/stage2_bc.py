"""Stage 2: learn a latent policy, by behaviour cloning of the latent actions that stage 1's IDM infers.

The policy sees o[t] alone and predicts `la`, the latent action before quantisation that the IDM infers from
o[t-1], o[t], o[t+1]. The IDM is frozen, so every window is labelled once, up front.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from build import inherit, make_idm, make_latent_policy
from config import Config, load_config
from data_loader import Windows
from errors import run_main
from models import normalize
from probe import INFERENCE_BATCH, label
from procgen_env import check_data
from runs import Run, load_stage
from training import Compute, make_optimizer, piecewise_linear, seed_everything, set_lr, warmup_schedule

STAGE = "stage2"
PUBLISHED_STEPS = 60_000


def main() -> None:
    """Train stage 2 as the command line says."""
    train(load_config(description=__doc__))


def train(cfg: Config) -> None:
    """Train the latent policy; the result lies in the run's checkpoint."""
    compute = Compute.from_config(cfg)
    check_data(cfg.env, cfg.game_data)
    stage1 = load_stage(cfg, "stage1", "stage1.py")
    cfg = inherit(cfg, stage1, ("idm_scale",))
    seed_everything(cfg.seed)
    run = Run(cfg, STAGE, ("data", "model", "vq", "stage2"), compute)
    if run.finished:
        run.report()
        return

    # ---- data, labelled by the frozen IDM
    idm = compute.place(make_idm(cfg))
    idm.load_state_dict(stage1["state"]["idm"])
    idm.eval().requires_grad_(False)
    windows, held_out = Windows.splits(cfg, compute.device)
    la = label(idm, windows, windows.all(), compute)
    la_test = label(idm, held_out, held_out.all(), compute)

    # ---- model and optimiser
    policy = compute.place(make_latent_policy(cfg))
    groups = [{"params": list(policy.parameters()), "lr": cfg.stage2.lr}]
    optimizer = make_optimizer(torch.optim.AdamW, groups, [policy])
    schedule = warmup_schedule(cfg.stage2, PUBLISHED_STEPS)
    if run.state:
        policy.load_state_dict(run.state["policy"])
        optimizer.load_state_dict(run.state["optimizer"])

    def state() -> dict:
        return {"policy": policy.state_dict(), "optimizer": optimizer.state_dict()}

    # ---- one step
    @compute.compiled
    def loss_of(frames: Tensor, target: Tensor) -> Tensor:
        with compute.autocast():
            predicted = policy(normalize(frames))
        return F.mse_loss(predicted.float(), target)

    def update(step: int) -> dict[str, Tensor]:
        set_lr(optimizer.param_groups[0], cfg.stage2.lr * piecewise_linear(step, schedule))
        ids = windows.batch(step, cfg.stage2.batch_size, cfg.seed)
        loss = loss_of(windows.middle_frames(ids), la[ids])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return {"loss": loss.detach()}

    @torch.no_grad()
    def measure() -> dict[str, Tensor]:
        parts = held_out.all().split(INFERENCE_BATCH)
        errors = [loss_of(held_out.middle_frames(ids), la_test[ids]) * len(ids) for ids in parts]
        # The error of always predicting the mean latent action: what a policy that sees nothing reaches.
        return {
            "loss_test": torch.stack(errors).sum() / len(held_out),
            "constant_loss_test": F.mse_loss(la.mean(0).expand_as(la_test), la_test),
        }

    # ---- loop
    options = {"save_every": cfg.stage2.save_every, "unit": "window", "scale": cfg.stage2.batch_size}
    for step in run.loop(cfg.stage2.steps, state, **options):
        run.track(update(step))
        done = step + 1
        measured = measure() if done == cfg.stage2.steps else {}
        if measured or done % cfg.stage2.log_every == 0:
            run.log(done, measured)
    run.finish(state())


if __name__ == "__main__":
    run_main(main)
