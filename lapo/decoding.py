"""Training of the decoder, latent action → true action: `Fit` on labels, `OnlineDecoder` beside PPO.

Dimensions: S rollout steps · N environments · M pairs · T frames of a window (3) · H, W, C frame · A actions
"""

import math
from collections.abc import Callable, Iterable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lapo.config import PUBLISHED_UPDATE_STEPS, DecoderConfig
from lapo.models import IDM, Decoder, infer_latents
from lapo.runs.compute import Compute
from lapo.runs.optim import make_optimizer

INFERENCE_BATCH = 512


class Steps(Protocol):
    """S steps of N environments; `ppo.Rollout` is one."""

    frames: Tensor
    """(S+1, N, H, W, C) uint8; the last one is the obs after the last step."""
    actions: Tensor
    """(S, N) int64, taken at the first S of these frames."""
    dones: Tensor
    """(S, N) bool: whether the action ended the episode."""


class Fit:
    """Trains `network` with Adam and cross-entropy to predict true actions `ta` (M,), a `step` per batch.

    `predict` maps indices (B,) of examples to logits (B, A).
    """

    def __init__(
        self,
        predict: Callable[[Tensor], Tensor],
        network: nn.Module,
        ta: Tensor,
        lr: float,
        label_smoothing: float = 0.0,
    ):
        self.predict, self.network, self.ta, self.label_smoothing = predict, network, ta, label_smoothing
        groups = [{"params": list(network.parameters()), "lr": lr}]
        self.optimizer = make_optimizer(torch.optim.Adam, groups, [network])
        self.total, self.count = torch.zeros((), device=ta.device), 0

    def step(self, ids: Tensor) -> None:
        """Do an optimisation step on the examples `ids` (B,)."""
        logits = self.predict(ids).float()
        loss = F.cross_entropy(logits, self.ta[ids], label_smoothing=self.label_smoothing)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        self.total, self.count = self.total + loss.detach(), self.count + 1

    @property
    def loss(self) -> Tensor:
        """Mean loss of all steps, a scalar."""
        return self.total / self.count

    def state_dict(self) -> dict:
        """All mutable state except the network's."""
        return {"optimizer": self.optimizer.state_dict(), "total": self.total, "count": self.count}

    def load_state_dict(self, state: dict) -> None:
        """Restore `state_dict`."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.total, self.count = state["total"].to(self.total.device), state["count"]


def epochs(size: int, count: int, batch_size: int, device: torch.device) -> Iterable[Tensor]:
    """Batches of indices of `count` epochs over `size` examples, reshuffled in each epoch."""
    for _ in range(count):
        yield from torch.randperm(size, device=device).split(batch_size)


def training_updates(cfg: DecoderConfig, updates: int, steps_per_update: int, scale: float) -> list[int]:
    """Which of `updates` PPO updates (counted from 1) are followed by training the decoder.

    `cfg` gives the schedule for the published number of env steps and updates of the published size; `scale`
    shrinks it for shorter runs. The decoder is trained after the first update at or past each of its points:
    at least once, and never more often than in the published run.
    """
    published = range(cfg.start // PUBLISHED_UPDATE_STEPS + 1, math.ceil(cfg.until / PUBLISHED_UPDATE_STEPS))
    early = cfg.every_update_until / PUBLISHED_UPDATE_STEPS
    points = [number for number in published if number < early or number % cfg.every == 0]
    # The small number keeps 3.0000000001 updates from becoming 4.
    due = {math.ceil(x * PUBLISHED_UPDATE_STEPS * scale / steps_per_update - 1e-9) for x in points}
    started = [update for update in range(1, updates + 1) if update * steps_per_update > cfg.start * scale]
    in_time = [update for update in started if update * steps_per_update < cfg.until * scale]
    return [update for update in in_time if update in due] or started[:1]


class OnlineDecoder:
    """Trains the decoder of online mode on the agent's own steps.

    After every PPO update, `learn` infers the latent actions of the rollout's windows. Windows across an
    episode's end are left out. After the given `updates` (see `training_updates`), it trains a new decoder on
    all pairs (la, ta) so far and copies its weights to the policy's `decoder`. After the last of these
    updates, no more pairs are collected.
    """

    def __init__(
        self,
        decoder: Decoder,
        idm: IDM,
        cfg: DecoderConfig,
        compute: Compute,
        updates: list[int],
        context: int = 1,
    ):
        self.decoder, self.idm, self.cfg, self.compute, self.updates = decoder, idm, cfg, compute, updates
        self.context = context
        # The last `context` steps so far: frames (K, N, H, W, C), actions (K, N), dones (K, N).
        self.last_steps: tuple[Tensor, Tensor, Tensor] | None = None
        self.la: list[Tensor] = []
        self.ta: list[Tensor] = []
        self.active = bool(updates)

    def learn(self, rollout: Steps, update: int) -> dict[str, Tensor]:
        """Infer the rollout's latents; train the decoder after `update` (from 1) if due; returns metrics."""
        if not self.active:
            return {}
        self.infer_latents(rollout)
        metrics = self.train() if update in self.updates else {}
        if update >= self.updates[-1]:
            self.active = False
            self.last_steps, self.la, self.ta = None, [], []
        return metrics

    @torch.no_grad()
    def infer_latents(self, rollout: Steps) -> None:
        """Add the rollout's pairs (la, ta), and keep its last steps for the next rollout's first windows."""
        context, size = self.context, self.context + 2
        steps = rollout.frames[:-1], rollout.actions, rollout.dones
        if self.last_steps:
            steps = tuple(torch.cat(pair) for pair in zip(self.last_steps, steps, strict=True))
        frames = torch.cat([steps[0], rollout.frames[-1:]])  # (S+1, N, H, W, C); S counts kept steps, too
        actions, dones = steps[1:]
        # The rollout's buffers are reused.
        self.last_steps = tuple(x[max(0, len(x) - context) :].clone() for x in steps)
        if len(frames) < size:
            return
        # A window's action was taken at its last frame but one. No episode may end with the action of that
        # frame or an earlier one. One may end with the last frame's (data sets differ, see `window_starts`).
        windows = frames.unfold(0, size, 1).movedim(-1, 2)  # (S+2-T, N, T, H, W, C)
        valid = ~dones.unfold(0, size - 1, 1).any(-1)
        windows, ta = windows[valid], actions[context:][valid]
        self.la.append(infer_latents(self.idm, windows.split(INFERENCE_BATCH), self.compute))
        self.ta.append(ta)

    def train(self) -> dict[str, Tensor]:
        """Train a new decoder on all pairs and copy its weights to the policy's; returns metrics."""
        la, ta = torch.cat(self.la), torch.cat(self.ta)
        self.la, self.ta = [la], [ta]
        if not len(ta):
            return {}
        cfg = self.cfg
        new = Decoder(la.shape[1], self.decoder[-1].out_features, tuple(cfg.hidden)).to(la.device)
        fit = Fit(lambda ids: new(la[ids]), new, ta, cfg.lr, cfg.label_smoothing)
        for ids in epochs(len(ta), cfg.epochs, cfg.batch_size, la.device):
            fit.step(ids)
        self.decoder.load_state_dict(new.state_dict())
        with torch.no_grad():
            accuracy = (new(la).argmax(-1) == ta).float().mean()
        return {"decoder_loss": fit.loss, "decoder_acc": accuracy, "decoder_pairs": float(len(ta))}

    def state_dict(self) -> dict:
        """All mutable state."""
        pairs = [torch.cat(x) if x else None for x in (self.la, self.ta)]
        steps = list(self.last_steps) if self.last_steps else None
        return {"active": self.active, "last_steps": steps, "pairs": pairs}

    def load_state_dict(self, state: dict) -> None:
        """Restore `state_dict`."""
        device = self.compute.device
        self.active = state["active"]
        steps = state.get("last_steps")
        if state.get("steps"):  # older versions had a single step, without its first axis
            steps = [x[None] for x in state["steps"][0]]
        self.last_steps = steps and tuple(x.to(device) for x in steps)
        self.la, self.ta = ([] if x is None else [x.to(device)] for x in state["pairs"])
