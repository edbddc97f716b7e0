"""Decoders from latent to true actions: `fit`, and `OnlineDecoder`, which learns from an agent's own steps.

Dimensions: S rollout steps · N environments · M pairs · T frames of a window (3) · H, W, C frame · A actions
"""

from collections.abc import Callable, Iterable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lapo.config import DecoderConfig
from lapo.data.chunks import WINDOW
from lapo.models import IDM, Decoder, infer_latents
from lapo.runs.compute import Compute
from lapo.runs.optim import make_optimizer

INFERENCE_BATCH = 512


class Steps(Protocol):
    """What is needed of S steps that N environments played; `ppo.Rollout` is one."""

    frames: Tensor
    """(S+1, N, H, W, C) uint8, that were seen; the last ones after the last step."""
    actions: Tensor
    """(S, N) int64, that were taken at them."""
    dones: Tensor
    """(S, N) bool: whether they ended the episode."""


def fit(
    predict: Callable[[Tensor], Tensor],
    network: nn.Module,
    ta: Tensor,
    batches: Iterable[Tensor],
    *,
    lr: float,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Train `network` to predict true actions `ta` (M,) with Adam; returns the mean loss, a scalar tensor.

    `predict` maps indices (B,) of examples to logits (B, A); `batches` says which examples, step by step.
    """
    optimizer = make_optimizer(
        torch.optim.Adam, [{"params": list(network.parameters()), "lr": lr}], [network]
    )
    total, count = torch.zeros((), device=ta.device), 0
    for ids in batches:
        loss = F.cross_entropy(predict(ids).float(), ta[ids], label_smoothing=label_smoothing)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        total, count = total + loss.detach(), count + 1
    return total / count


def epochs(size: int, count: int, batch_size: int, device: torch.device) -> Iterable[Tensor]:
    """Indices of `count` passes over `size` examples, shuffled anew each time, in batches."""
    for _ in range(count):
        yield from torch.randperm(size, device=device).split(batch_size)


def training_updates(cfg: DecoderConfig, updates: int, steps_per_update: int, scale: float) -> list[int]:
    """The PPO updates (from 1) of a run of `updates` after which the decoder is trained.

    The schedule of `cfg` is given in env steps of a run of the published length, `scale` shrinks it. However
    short the run, the decoder is trained at least once.
    """
    every = max(1, round(cfg.every * scale))
    chosen = []
    for update in range(1, updates + 1):
        env_steps = update * steps_per_update
        early = env_steps < cfg.every_update_until * scale
        due = env_steps < cfg.until * scale and (early or update % every == 0)
        if env_steps > cfg.start * scale and (due or not chosen):
            chosen.append(update)
    return chosen


class OnlineDecoder:
    """Learns the decoder of online mode from the agent's own steps.

    After every PPO update `learn` lets the IDM infer the latent actions of the rollout's windows and, after
    the `updates` named (see `training_updates`), trains a new decoder on all pairs so far and hands its
    weights to the policy's `decoder`. Windows that span an episode's end are left out. After the last
    training nothing is kept or inferred.
    """

    def __init__(self, decoder: Decoder, idm: IDM, cfg: DecoderConfig, compute: Compute, updates: list[int]):
        self.decoder, self.idm, self.cfg, self.compute, self.updates = decoder, idm, cfg, compute, updates
        # What the next windows need of the past: frames (N, H, W, C), actions (N,), dones (N,) of a step.
        self.past: tuple[Tensor, Tensor, Tensor] | None = None
        self.la: list[Tensor] = []
        self.ta: list[Tensor] = []
        self.active = bool(updates)

    def learn(self, rollout: Steps, update: int) -> dict[str, Tensor]:
        """Label the rollout's windows and train the decoder if it is time; returns metrics.

        `update`: how many updates are done.
        """
        if not self.active:
            return {}
        self.infer_latents(rollout)
        metrics = self.train() if update in self.updates else {}
        if update >= self.updates[-1]:
            self.active = False
            self.past, self.la, self.ta = None, [], []
        return metrics

    @torch.no_grad()
    def infer_latents(self, rollout: Steps) -> None:
        """Turn the rollout's steps into pairs. The last step stays: the past of the next rollout's first."""
        steps = rollout.frames[:-1], rollout.actions, rollout.dones
        past = [[x[None]] for x in self.past] if self.past else [[], [], []]
        self.past = tuple(x[-1].clone() for x in steps)  # the next rollout overwrites its own
        seen = torch.cat([*past[0], rollout.frames])  # (S+1, N, H, W, C), where S counts the past as well
        actions, dones = (torch.cat([*before, x]) for before, x in zip(past[1:], steps[1:], strict=True))
        if len(seen) < WINDOW:
            return
        # Window s holds frames s to s+2, its action was taken at s+1. Steps s and s+1 may not end an episode;
        # s+2 may: our marks stand where the action was taken, recorded ones perhaps not, see `window_starts`.
        windows = seen.unfold(0, WINDOW, 1).movedim(-1, 2)  # (S-1, N, T, H, W, C)
        valid = ~(dones[:-1] | dones[1:])
        windows, ta = windows[valid], actions[1:][valid]
        self.la.append(infer_latents(self.idm, windows.split(INFERENCE_BATCH), self.compute))
        self.ta.append(ta)

    def train(self) -> dict[str, Tensor]:
        """Fit a new decoder to all pairs and hand its weights over; returns metrics, none without a pair."""
        la, ta = torch.cat(self.la), torch.cat(self.ta)
        self.la, self.ta = [la], [ta]
        if not len(ta):
            return {}
        cfg = self.cfg
        fresh = Decoder(la.shape[1], self.decoder[-1].out_features, tuple(cfg.hidden)).to(la.device)
        batches = epochs(len(ta), cfg.epochs, cfg.batch_size, la.device)
        options = {"lr": cfg.lr, "label_smoothing": cfg.label_smoothing}
        loss = fit(lambda ids: fresh(la[ids]), fresh, ta, batches, **options)
        self.decoder.load_state_dict(fresh.state_dict())
        with torch.no_grad():
            accuracy = (fresh(la).argmax(-1) == ta).float().mean()
        return {"decoder_loss": loss, "decoder_acc": accuracy, "decoder_pairs": float(len(ta))}

    def state_dict(self) -> dict:
        """All that changes, as plain data."""
        pairs = [torch.cat(x) if x else None for x in (self.la, self.ta)]
        steps = [list(self.past)] if self.past else []
        return {"active": self.active, "steps": steps, "pairs": pairs}

    def load_state_dict(self, state: dict) -> None:
        """Continue from what `state_dict` gave."""
        device = self.compute.device
        self.active = state["active"]
        self.past = next((tuple(x.to(device) for x in step) for step in state["steps"]), None)
        self.la, self.ta = ([] if x is None else [x.to(device)] for x in state["pairs"])
