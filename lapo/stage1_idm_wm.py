"""Stage 1: learn, from frames alone, an inverse dynamics model (IDM) and a world model around a bottleneck.

The IDM sees o[t-1], o[t], o[t+1] and says what happened between the last two, in a few discrete codes; the
world model predicts o[t+1] from o[t-1], o[t] and these codes. What the codes must carry, then, is the action.
True actions, where the data has them, only measure how well that worked (see probe.py).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from build import make_idm, make_world_model
from config import Config, load_config
from data_loader import Windows
from errors import run_main
from models import stack_frames
from probe import label, train_probe, world_model_loss
from procgen_env import check_data
from runs import Run
from training import Compute, make_optimizer, piecewise_linear, seed_everything, set_lr, warmup_schedule

STAGE = "stage1"
PUBLISHED_STEPS = 50_000


def main() -> None:
    """Train stage 1 as the command line says."""
    train(load_config(description=__doc__))


def train(cfg: Config) -> None:
    """Train IDM and world model; the result lies in the run's checkpoint."""
    compute = Compute.from_config(cfg)
    check_data(cfg.env, cfg.game_data)
    seed_everything(cfg.seed)
    run = Run(cfg, STAGE, ("data", "model", "vq", "stage1", "probe"), compute)
    if run.finished:
        run.report()
        return

    # ---- data
    windows, held_out = Windows.splits(cfg, compute.device)

    # ---- model and optimiser
    idm = compute.place(make_idm(cfg))
    world_model = compute.place(make_world_model(cfg))
    networks = (idm, world_model)
    params = [p for network in networks for p in network.parameters()]
    optimizer = make_optimizer(torch.optim.AdamW, [{"params": params, "lr": cfg.stage1.lr}], networks)
    schedule = warmup_schedule(cfg.stage1, PUBLISHED_STEPS)
    if run.state:
        idm.load_state_dict(run.state["idm"])
        world_model.load_state_dict(run.state["world_model"])
        optimizer.load_state_dict(run.state["optimizer"])

    def state() -> dict:
        return {
            "idm": idm.state_dict(),
            "world_model": world_model.state_dict(),
            "optimizer": optimizer.state_dict(),
        }

    # ---- one step
    @compute.compiled
    def losses(frames: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        with compute.autocast():
            images = stack_frames(frames)
            _, quantized = idm(images)
            predicted = world_model(images[:, :6], quantized.la_q)
        wm_loss = F.mse_loss(predicted, images[:, 6:])
        loss = wm_loss + quantized.loss
        return loss, {
            "loss": loss.detach(),
            "wm_loss": wm_loss.detach(),
            "vq_loss": quantized.loss.detach(),
            "perplexity": quantized.perplexity,
        }

    def update(step: int) -> dict[str, Tensor]:
        set_lr(optimizer.param_groups[0], cfg.stage1.lr * piecewise_linear(step, schedule))
        loss, metrics = losses(windows.gather(windows.batch(step, cfg.stage1.batch_size, cfg.seed)))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        metrics["grad_norm"] = torch.nn.utils.clip_grad_norm_(params, cfg.stage1.clip_norm)
        optimizer.step()
        return metrics

    def measure() -> dict[str, Tensor]:
        ids = held_out.spread(cfg.probe.windows)
        metrics = world_model_loss(idm, world_model, held_out, ids, compute)
        if held_out.ta is not None:
            la = label(idm, held_out, ids, compute)
            metrics |= train_probe(la, held_out.actions(ids), cfg.probe, cfg.seed)
        return metrics

    # ---- loop
    if run.step == 0:
        # The untrained IDM's features are the control: the state alone tells much of what an expert does.
        run.log(0, {f"untrained_{key}": value for key, value in measure().items()})
    options = {"save_every": cfg.stage1.save_every, "unit": "window", "scale": cfg.stage1.batch_size}
    for step in run.loop(cfg.stage1.steps, state, **options):
        run.track(update(step))
        done = step + 1
        last = done == cfg.stage1.steps
        measured = measure() if last or done % cfg.stage1.probe_every == 0 else {}
        if measured or done % cfg.stage1.log_every == 0:
            run.log(done, measured)
    run.finish(state())


if __name__ == "__main__":
    run_main(main)
