"""Evaluation of stage 1: a probe that predicts true actions from latent actions; the world model's error.

Dimensions: M windows. The probe is a separate MLP: no gradient reaches the models.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lapo.config import ProbeConfig, VQConfig
from lapo.data_loader import Windows
from lapo.frames import CHANNELS
from lapo.models import IDM, WorldModel, eval_mode, split_window, stack_frames
from lapo.runs.compute import Compute

WM_WINDOWS = 16384
"""The world model is evaluated on at most this many windows: enough for a precise mean error."""


COLLAPSED = 1.1
"""Perplexity of a collapsed bottleneck, relative to one code per slot; healthy runs have far more."""


def wm_subset(count: int) -> slice:
    """Which of `count` windows the world model is evaluated on: every k-th."""
    return slice(None, None, -(-count // WM_WINDOWS))


def find_failures(metrics: dict[str, float], vq: VQConfig) -> list[str]:
    """Signs in the metrics of a finished stage 1 that it failed, each in a sentence with a remedy.

    A codebook has collapsed if no slot chooses among several codes: the perplexity is then that of all slots
    on one code (1 per codebook) or of each slot on its own (`num_latents`). The probe must beat both what the
    actions' frequencies and an untrained IDM tell.
    """
    found = []
    fixed = vq.num_codebooks * vq.num_latents
    perplexity = metrics.get("perplexity", math.inf)
    # Few codes per slot can be in good use at such a perplexity.
    if vq.enabled and perplexity < min(COLLAPSED * fixed, vq.num_codes / 2):
        found.append(
            f"the bottleneck has collapsed: its perplexity is {perplexity:.1f}, and {fixed} if every slot"
            " always takes one code; try --vq.normalize true, --vq.start data or a lower --stage1.lr"
        )
    controls = [metrics.get(key) for key in ("majority_acc_test", "untrained_probe_acc_test")]
    if "probe_acc_test" in metrics and None not in controls and metrics["probe_acc_test"] <= max(controls):
        found.append(
            f"latent actions tell no more of the true ones ({metrics['probe_acc_test']:.1%}) than the"
            f" commonest action ({controls[0]:.1%}) or an untrained IDM ({controls[1]:.1%}); record with"
            " --noise 0.2, use more frames or steps, or larger frames if the agent is small"
        )
    return found


@torch.no_grad()
def world_model_loss(
    idm: IDM, world_model: WorldModel, windows: Windows, ids: Tensor, la: Tensor, compute: Compute
) -> dict[str, Tensor]:
    """Mean squared error of predicting o[t+1] on windows `ids` (M,), with all networks in eval mode.

    `ids` must ascend, see `Windows.iter_batches`. `la` (M, la_dim) are the windows' latent actions before
    quantisation. Returns `wm_loss_test` of the world model, and `copy_loss_test` of a baseline that predicts
    o[t].
    """
    model_error, copy_error, start = 0.0, 0.0, 0
    with eval_mode(idm, world_model):
        for batch in windows.iter_batches(ids):
            past, following = split_window(stack_frames(windows.gather(batch)))
            with compute.autocast():
                la_q = idm.quantize(la[start : start + len(batch)]).la_q
                predicted = world_model(past, la_q)
            model_error = model_error + F.mse_loss(predicted, following) * len(batch)
            copy_error = copy_error + F.mse_loss(past[:, -CHANNELS:], following) * len(batch)
            start += len(batch)
    return {"wm_loss_test": model_error / len(ids), "copy_loss_test": copy_error / len(ids)}


class Probe(nn.Module):
    """An MLP la → ta that standardises its input: latents of an untrained IDM are tiny."""

    def __init__(self, la: Tensor, num_actions: int, hidden: int):
        """Standardise as the latents `la` (M, la_dim) need it."""
        super().__init__()
        std = la.std(0, correction=0)
        # Dimensions that are nearly constant in `la` are set to 0: division could make them huge.
        self.scale = torch.where(std > 1e-3 * std.max(), 1 / std, torch.zeros_like(std))
        self.mean = la.mean(0)
        self.mlp = nn.Sequential(
            *(nn.Linear(la.shape[1], hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU()),
            nn.Linear(hidden, num_actions),
        ).to(la.device)

    def forward(self, la: Tensor) -> Tensor:
        """Latent actions (B, la_dim) → logits (B, A)."""
        return self.mlp((la - self.mean) * self.scale)


@torch.enable_grad()
def fit_probe(la: Tensor, ta: Tensor, cfg: ProbeConfig, seed: int) -> Probe:
    """Train a probe on the first half of the latents `la` (M, la_dim) and actions `ta` (M,) int64.

    `la` and `ta` are in the order of the data, so neighbouring frames lie in one half. The probe has its own
    random generator, so evaluation does not change training.
    """
    half = len(la) // 2
    num_actions = int(ta.max()) + 1
    with torch.random.fork_rng(devices=[la.device] if la.device.type == "cuda" else []):
        torch.manual_seed(seed)
        probe = Probe(la[:half], num_actions, cfg.hidden)
        optimizer = torch.optim.AdamW(probe.parameters(), fused=True)
        for _ in range(cfg.epochs):
            for ids in torch.randperm(half, device=la.device).split(cfg.batch_size):
                optimizer.zero_grad()
                F.cross_entropy(probe(la[ids]), ta[ids]).backward()
                optimizer.step()
    return probe


def train_probe(la: Tensor, ta: Tensor, cfg: ProbeConfig, seed: int) -> dict[str, Tensor]:
    """Train a probe on the first half of the windows, see `fit_probe`, and evaluate it on both halves.

    Returns `probe_acc` and `probe_loss` (training half), `probe_acc_test` and `probe_loss_test` (other half),
    and `majority_acc_test`, the accuracy of the commonest action on the other half. Returns {} for fewer than
    two windows.
    """
    half = len(la) // 2
    if not half:
        return {}
    probe, metrics = fit_probe(la, ta, cfg, seed), {}
    with torch.no_grad():
        for suffix, ids in (("", slice(0, half)), ("_test", slice(half, None))):
            logits = probe(la[ids])
            metrics[f"probe_acc{suffix}"] = (logits.argmax(-1) == ta[ids]).float().mean()
            metrics[f"probe_loss{suffix}"] = F.cross_entropy(logits, ta[ids])
    metrics["majority_acc_test"] = ta[half:].bincount().max() / (len(ta) - half)
    return metrics
