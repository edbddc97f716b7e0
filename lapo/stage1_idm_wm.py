"""Stage 1: an inverse dynamics model (IDM) and a world model, trained on frames alone.

The IDM maps o[t-1], o[t], o[t+1] to a latent action `la`, which is quantised to a few discrete codes, `la_q`.
The world model predicts o[t+1] from o[t-1], o[t] and `la_q`. The codes must carry whatever the past does not
predict: the action. True actions, if the data has them, are only used for evaluation (see probe.py).
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm

from lapo.config import PUBLISHED_STEPS, Config, load_config
from lapo.data.checks import check_data, check_frames
from lapo.data.chunks import data_checksums
from lapo.data_loader import Windows, read_splits
from lapo.errors import run_main, say
from lapo.models import IDM, WorldModel, infer_latents, make_idm, make_world_model, split_window, stack_frames
from lapo.probe import find_failures, train_probe, wm_subset, world_model_loss
from lapo.runs.compute import Compute, seed_everything
from lapo.runs.optim import make_optimizer, piecewise_linear, set_lr, warmup_schedule
from lapo.runs.ranks import average, distributed, per_rank_batch
from lapo.runs.run import Run
from lapo.steering import measure_steering

STAGE = "stage1"


def main() -> None:
    """Train stage 1, as configured on the command line."""
    with distributed():
        train(load_config(description=__doc__))


def train(cfg: Config) -> None:
    """Train IDM and world model, and write the run's checkpoint."""
    compute = Compute.from_config(cfg)
    check_data(cfg.env, cfg.game_data)
    seed_everything(cfg.seed)
    run = Run(cfg, STAGE, ("data", "model", "vq", "stage1", "probe"), compute, data_checksums(cfg))
    if run.finished:
        run.print_result()
        return

    # ---- data
    check_frames(cfg.env, cfg.game_data, cfg.visuals)
    windows, held_out = read_splits(cfg, compute.device)

    # ---- model and optimiser
    idm, world_model = compute.place(make_idm(cfg)), compute.place(make_world_model(cfg))
    trainer = Trainer(cfg, compute, windows, idm, world_model)
    if run.state:
        trainer.load_state_dict(run.state)

    # ---- loop
    if run.step == 0:
        # Baseline: an untrained IDM. Many of an expert's actions can be predicted from the frames alone.
        run.log(0, {f"untrained_{key}": value for key, value in trainer.evaluate(held_out).items()})
    options = {"save_every": cfg.stage1.save_every, "unit": "window", "scale": cfg.stage1.batch_size}
    for step in run.loop(cfg.stage1.steps, trainer.state_dict, **options):
        run.track(trainer.update(step))
        done = step + 1
        last = done == cfg.stage1.steps
        results = {}
        if last or done % cfg.stage1.probe_every == 0:
            results = trainer.evaluate(held_out, steering=last)
        if results or done % cfg.stage1.log_every == 0:
            run.log(done, results)
    run.finish(trainer.state_dict())
    for failure in find_failures(run.metrics, cfg.vq):
        say(f"warning: {failure}")


class Trainer:
    """Trains IDM and world model jointly. A training step is `set_lr`, `load`, `backward`, `apply`."""

    def __init__(self, cfg: Config, compute: Compute, windows: Windows, idm: IDM, world_model: WorldModel):
        self.cfg, self.compute, self.windows = cfg, compute, windows
        self.idm, self.world_model = idm, world_model
        networks = (idm, world_model)
        self.params = [p for network in networks for p in network.parameters()]
        # BatchNorm's running statistics: computed per rank, averaged over ranks in `backward`.
        norms = [m for x in networks for m in x.modules() if isinstance(m, BatchNorm)]
        self.statistics = [x for norm in norms for x in (norm.running_mean, norm.running_var)]
        self.batch_size = per_rank_batch(cfg.stage1.batch_size)
        groups = [{"params": self.params, "lr": cfg.stage1.lr}]
        self.optimizer = make_optimizer(torch.optim.AdamW, groups, networks)
        self.schedule = warmup_schedule(cfg.stage1, PUBLISHED_STEPS[STAGE])
        self.losses = compute.compiled(self._losses)
        self.learn = compute.replayed(self._learn)

    def update(self, step: int) -> dict[str, Tensor]:
        """Do training step `step`; returns metrics, which the next step overwrites."""
        self.set_lr(step)
        return self.learn(self.load(step))

    def set_lr(self, step: int) -> None:
        """Set the learning rate of training step `step`."""
        factor = piecewise_linear(step, self.schedule)
        set_lr(self.optimizer.param_groups[0], self.cfg.stage1.lr * factor)

    def load(self, step: int) -> Tensor:
        """The batch of training step `step`: windows (B, T, H, W, C) uint8."""
        return self.windows.gather(self.windows.batch(step, self.batch_size, self.cfg.seed))

    def backward(self, frames: Tensor) -> dict[str, Tensor]:
        """Compute losses and gradients on windows (B, T, H, W, C); returns metrics, averaged over ranks."""
        loss, metrics = self.losses(frames)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        average([p.grad for p in self.params] + self.statistics + list(metrics.values()))
        return metrics

    def apply(self) -> dict[str, Tensor]:
        """Clip the gradients and update the weights; returns the gradient norm."""
        norm = torch.nn.utils.clip_grad_norm_(self.params, self.cfg.stage1.clip_norm)
        self.optimizer.step()
        return {"grad_norm": norm}

    def evaluate(self, held_out: Windows, steering: bool = False) -> dict[str, Tensor | float]:
        """Evaluate on held-out windows: world-model error and, if there are true actions, probe accuracy.

        With `steering`, also measure how well latent actions steer the world model, see steering.py.
        """
        ids = held_out.evenly_spaced(self.cfg.probe.windows)
        la = infer_latents(self.idm, held_out.iter_frames(ids), self.compute)
        subset = wm_subset(len(ids))
        metrics = world_model_loss(
            self.idm, self.world_model, held_out, ids[subset], la[subset], self.compute
        )
        if held_out.ta is not None:
            if held_out.has_gaps:
                ids = held_out.evenly_spaced(self.cfg.probe.windows, held_out.labelled())
                la = infer_latents(self.idm, held_out.iter_frames(ids), self.compute)
            metrics |= train_probe(la, held_out.actions(ids), self.cfg.probe, self.cfg.seed)
        if steering:
            probed = None if held_out.ta is None else (ids, la)
            networks = self.idm, self.world_model
            metrics |= measure_steering(
                *networks, held_out, self.compute, self.cfg.probe, self.cfg.seed, probed
            )
        return metrics

    def _learn(self, frames: Tensor) -> dict[str, Tensor]:
        return self.backward(frames) | self.apply()

    def _losses(self, frames: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        with self.compute.autocast():
            images = stack_frames(frames)  # (B, T·C, H, W)
            past, following = split_window(images)
            _, quantized = self.idm(images)
            predicted = self.world_model(past, quantized.la_q)
        wm_loss = F.mse_loss(predicted, following)
        loss = wm_loss + quantized.loss
        return loss, {
            "loss": loss.detach(),
            "wm_loss": wm_loss.detach(),
            "vq_loss": quantized.loss.detach(),
            "perplexity": quantized.perplexity,
        }

    def _parts(self) -> dict[str, torch.nn.Module | torch.optim.Optimizer]:
        return {"idm": self.idm, "world_model": self.world_model, "optimizer": self.optimizer}

    def state_dict(self) -> dict:
        """Everything that the next step depends on."""
        parts = {name: part.state_dict() for name, part in self._parts().items()}
        return parts | {"order": self.windows.data_order}

    def load_state_dict(self, state: dict) -> None:
        """Restore `state_dict`. Raises `UserError` if the order of the batches has changed."""
        self.windows.check_data_order(state["order"])
        for name, part in self._parts().items():
            part.load_state_dict(state[name])


if __name__ == "__main__":
    run_main(main)
