"""Stage 2: a latent policy, trained by behaviour cloning of the latent actions that stage 1's IDM infers.

The IDM infers `la`, the latent action before quantisation, from o[t-1], o[t], o[t+1]. The policy predicts it
from o[t] alone. The IDM is frozen, so the latents of all windows are inferred once, before training.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from lapo.config import PUBLISHED_STEPS, Config, load_config
from lapo.data.checks import check_data, check_frames
from lapo.data.chunks import data_checksums
from lapo.data_loader import Windows, read_splits
from lapo.errors import run_main
from lapo.games.make import can_be_played
from lapo.models import Policy, infer_latents, make_idm, make_latent_policy, normalize, restore
from lapo.runs.checkpoints import inherit, load_stages, weights_checksum
from lapo.runs.compute import Compute, seed_everything
from lapo.runs.optim import make_optimizer, piecewise_linear, set_lr, warmup_schedule
from lapo.runs.ranks import average, distributed, is_main, per_rank_batch
from lapo.runs.run import Run

STAGE = "stage2"


def main() -> None:
    """Train stage 2, as configured on the command line."""
    with distributed():
        train(load_config(description=__doc__))


def train(cfg: Config) -> None:
    """Train the latent policy, and write the run's checkpoint."""
    compute = Compute.from_config(cfg)
    check_data(cfg.env, cfg.game_data)
    stage1 = load_stages(cfg, "stage1")["stage1"]
    cfg = inherit(cfg, stage1, ("idm_scale",))
    seed_everything(cfg.seed)
    built_on = {"stage1": weights_checksum(stage1)} | data_checksums(cfg)
    run = Run(cfg, STAGE, ("data", "model", "vq", "stage2"), compute, built_on)
    if run.finished:
        run.print_result()
        return

    # ---- data, with the latents that the frozen IDM infers
    idm = restore(make_idm(cfg), stage1["state"]["idm"], compute)
    check_frames(cfg.env, cfg.game_data, cfg.visuals)
    windows, held_out = read_splits(cfg, compute.device)
    la = infer_latents(idm, windows.iter_frames(windows.all()), compute)
    la_test = infer_latents(idm, held_out.iter_frames(held_out.all()), compute)

    # ---- model and optimiser
    trainer = Trainer(cfg, compute, windows, la, compute.place(make_latent_policy(cfg)))
    if run.state:
        trainer.load_state_dict(run.state)

    # ---- loop
    options = {"save_every": cfg.stage2.save_every, "unit": "window", "scale": cfg.stage2.batch_size}
    for step in run.loop(cfg.stage2.steps, trainer.state_dict, **options):
        run.track(trainer.update(step))
        done = step + 1
        results = trainer.evaluate(held_out, la_test) if done == cfg.stage2.steps else {}
        if results or done % cfg.stage2.log_every == 0:
            run.log(done, results)
    run.finish(trainer.state_dict())
    if windows.ta is None and is_main() and not can_be_played(cfg.env):
        print(
            f"The frames of {cfg.env} have no true actions. A few hundred of them, from a key log or labelled"
            " by hand, show what the latent actions mean, and turn this policy into one that chooses among"
            " them: import the clips with `import_video.py --actions FILE`, then run `report.py` and"
            " `stage3.py --stage3.mode offline`; see docs/data.md"
        )


class Trainer:
    """Trains the latent policy to predict the latent actions `la` (M, la_dim) of all windows.

    A training step is `set_lr`, `load`, `backward`, `apply`.
    """

    def __init__(self, cfg: Config, compute: Compute, windows: Windows, la: Tensor, policy: Policy):
        self.cfg, self.compute, self.windows, self.la, self.policy = cfg, compute, windows, la, policy
        self.params = list(policy.parameters())
        self.batch_size = per_rank_batch(cfg.stage2.batch_size)
        groups = [{"params": self.params, "lr": cfg.stage2.lr}]
        self.optimizer = make_optimizer(torch.optim.AdamW, groups, [policy])
        self.schedule = warmup_schedule(cfg.stage2, PUBLISHED_STEPS[STAGE])
        self.loss = compute.compiled(self._loss)
        self.learn = compute.replayed(self._learn)

    def update(self, step: int) -> dict[str, Tensor]:
        """Do training step `step`; returns metrics, which the next step overwrites."""
        self.set_lr(step)
        return self.learn(*self.load(step))

    def set_lr(self, step: int) -> None:
        """Set the learning rate of training step `step`."""
        factor = piecewise_linear(step, self.schedule)
        set_lr(self.optimizer.param_groups[0], self.cfg.stage2.lr * factor)

    def load(self, step: int) -> tuple[Tensor, Tensor]:
        """The batch of training step `step`: frames o[t] (B, H, W, C) uint8, latent actions (B, la_dim)."""
        ids = self.windows.batch(step, self.batch_size, self.cfg.seed)
        return self.windows.current_frames(ids), self.la[ids]

    def backward(self, frames: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Compute loss and gradients on a batch of `load`; returns metrics, averaged over ranks."""
        loss = self.loss(frames, target)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        metrics = {"loss": loss.detach()}
        average([p.grad for p in self.params] + list(metrics.values()))
        return metrics

    def apply(self) -> None:
        """Update the weights."""
        self.optimizer.step()

    @torch.no_grad()
    def evaluate(self, held_out: Windows, la_test: Tensor) -> dict[str, Tensor]:
        """Evaluate on the held-out windows; `la_test` (M, la_dim) are their latent actions."""
        batches = held_out.iter_batches(held_out.all())
        # The uncompiled loss: a new batch size would be compiled anew.
        errors = [self._loss(held_out.current_frames(ids), la_test[ids]) * len(ids) for ids in batches]
        constant = self.la.mean(0)
        average([constant])
        # Baseline: the mean latent action, the best prediction that ignores the frame.
        return {
            "loss_test": torch.stack(errors).sum() / len(held_out),
            "constant_loss_test": F.mse_loss(constant.expand_as(la_test), la_test),
        }

    def _learn(self, frames: Tensor, target: Tensor) -> dict[str, Tensor]:
        metrics = self.backward(frames, target)
        self.apply()
        return metrics

    def _loss(self, frames: Tensor, target: Tensor) -> Tensor:
        with self.compute.autocast():
            predicted = self.policy(normalize(frames))
        return F.mse_loss(predicted, target)

    def state_dict(self) -> dict:
        """Everything that the next step depends on."""
        parts = {"policy": self.policy.state_dict(), "optimizer": self.optimizer.state_dict()}
        return parts | {"order": self.windows.data_order}

    def load_state_dict(self, state: dict) -> None:
        """Restore `state_dict`. Raises `UserError` if the order of the batches has changed."""
        self.windows.check_data_order(state["order"])
        self.policy.load_state_dict(state["policy"])
        self.optimizer.load_state_dict(state["optimizer"])


if __name__ == "__main__":
    run_main(main)
