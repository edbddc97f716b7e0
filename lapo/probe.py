"""Evaluation of stage 1: a probe that predicts true from latent actions, and the world model's error.

Dimensions: M windows · B batch · A actions. The probe is an MLP of its own; no gradient reaches the model.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lapo.config import ProbeConfig
from lapo.data_loader import Windows
from lapo.models import IDM, WorldModel, stack_frames
from lapo.runs.compute import Compute

WM_WINDOWS = 16384
"""Upper bound on the windows on which the world model is evaluated; its mean error needs no more."""


def wm_subset(count: int) -> slice:
    """The windows, of `count`, on which the world model is evaluated: every k-th."""
    return slice(None, None, -(-count // WM_WINDOWS))


@torch.no_grad()
def world_model_loss(
    idm: IDM, world_model: WorldModel, windows: Windows, ids: Tensor, la: Tensor, compute: Compute
) -> dict[str, Tensor]:
    """Mean squared error of predicting o[t+1] on windows `ids` (M,), with all networks in eval mode.

    `ids` must ascend, see `Windows.iter_batches`; `la` (M, la_dim) are the windows' latent actions. Returns
    `wm_loss_test` of the world model, and `copy_loss_test` of the baseline that predicts o[t].
    """
    training = idm.training, world_model.training
    idm.eval(), world_model.eval()
    model_error, copy_error, start = 0.0, 0.0, 0
    for part in windows.iter_batches(ids):
        frames = stack_frames(windows.gather(part))
        with compute.autocast():
            la_q = idm.quantize(la[start : start + len(part)]).la_q
            predicted = world_model(frames[:, :6], la_q)
        model_error = model_error + F.mse_loss(predicted, frames[:, 6:]) * len(part)
        copy_error = copy_error + F.mse_loss(frames[:, 3:6], frames[:, 6:]) * len(part)
        start += len(part)
    idm.train(training[0]), world_model.train(training[1])
    return {"wm_loss_test": model_error / len(ids), "copy_loss_test": copy_error / len(ids)}


def train_probe(la: Tensor, ta: Tensor, cfg: ProbeConfig, seed: int) -> dict[str, Tensor]:
    """Train an MLP la → ta on the first half of the windows and evaluate it on both halves.

    `la` (M, la_dim), `ta` (M,) int64, in the order of the data, so that neighbouring frames are in one half.
    Latents are standardised: those of an untrained IDM are tiny, and the scale must not matter. The probe has
    a random generator of its own, so that evaluation does not change the training.

    Returns `probe_acc`, `probe_loss` (training half), `probe_acc_test`, `probe_loss_test`, and
    `majority_acc_test`, the accuracy of the commonest action. Empty for fewer than two windows.
    """
    half = len(la) // 2
    if not half:
        return {}
    num_actions = int(ta.max()) + 1
    std = la[:half].std(0, correction=0)
    # Dimensions that are nearly constant in the training half are left out: scaled, they could be huge.
    scale = torch.where(std > 1e-3 * std.max(), 1 / std, torch.zeros_like(std))
    la = (la - la[:half].mean(0)) * scale
    with torch.random.fork_rng(devices=[la.device] if la.device.type == "cuda" else []):
        torch.manual_seed(seed)
        mlp = nn.Sequential(
            *(nn.Linear(la.shape[1], cfg.hidden), nn.ReLU(), nn.Linear(cfg.hidden, cfg.hidden), nn.ReLU()),
            nn.Linear(cfg.hidden, num_actions),
        ).to(la.device)
        optimizer = torch.optim.AdamW(mlp.parameters(), fused=True)
        for _ in range(cfg.epochs):
            for ids in torch.randperm(half, device=la.device).split(cfg.batch_size):
                optimizer.zero_grad()
                F.cross_entropy(mlp(la[ids]), ta[ids]).backward()
                optimizer.step()
    metrics = {}
    with torch.no_grad():
        for suffix, part in (("", slice(0, half)), ("_test", slice(half, None))):
            logits = mlp(la[part])
            metrics[f"probe_acc{suffix}"] = (logits.argmax(-1) == ta[part]).float().mean()
            metrics[f"probe_loss{suffix}"] = F.cross_entropy(logits, ta[part])
    metrics["majority_acc_test"] = ta[half:].bincount().max() / (len(ta) - half)
    return metrics
