"""Trained models for code of your own: what `import lapo` offers.

Dimensions
    T frames of a video · B batch · K steps of a rollout · H, W, C frame (64, 64, 3)
    N codebooks · L latent slots · D size of a latent action · A true actions (15)
"""

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lapo.acting import load_policy_checkpoint, network_actor, restore_policy
from lapo.bottleneck import Quantized
from lapo.config import load_config, resolve
from lapo.data.chunks import FRAME_SHAPE, WINDOW, window_starts
from lapo.data_loader import INFERENCE_BATCH
from lapo.errors import UserError
from lapo.models import (
    IDM,
    WorldModel,
    make_idm,
    make_world_model,
    restore,
    stack_frames,
    to_frames,
)
from lapo.runs.checkpoints import load_checkpoint, saved_config
from lapo.runs.compute import Compute

Array = np.ndarray | Tensor


class Latents(NamedTuple):
    """The latent actions of a video: entry t is the action between frames t and t+1."""

    la: Tensor
    """(T, D) before quantisation, fp32; NaN where not `valid`."""
    la_q: Tensor
    """(T, D) after it; NaN where not `valid`."""
    codes: Tensor
    """(T, N, L) int64, the chosen codes; -1 where not `valid`. Without a quantiser: (T, 0, 0)."""
    valid: Tensor
    """(T,) bool: False for the first and last frame, and where frames of two episodes would be mixed."""


class LatentActionModel:
    """The IDM and world model of stage 1, frozen and in eval mode. All methods accept NumPy and PyTorch."""

    def __init__(self, idm: IDM, world_model: WorldModel, compute: Compute):
        self.idm, self.world_model, self.compute = idm, world_model, compute

    @torch.no_grad()
    def infer(self, video: Array, done: Array | None = None) -> Latents:
        """The latent actions of a video (T, H, W, C) uint8, T at least 3.

        `done` (T,) bool marks where episodes end. As in training, a window of three frames with a mark is
        left out: data sets put the mark on the last frame of an episode or on the first one of the next.
        Raises `UserError` for another shape or type.
        """
        video = _expect_uint8(video, "video", (None, *FRAME_SHAPE))
        if len(video) < WINDOW:
            raise UserError(f"the video has {len(video)} frames; an action is inferred from {WINDOW}")
        if done is not None:
            done = np.asarray(done)
            if done.shape != (len(video),) or done.dtype != bool:
                raise UserError(f"done must be bool ({len(video)},), found {done.dtype} {done.shape}")
        windows = video.unfold(0, WINDOW, 1).movedim(-1, 1)  # (T-2, WINDOW, H, W, C), a view
        found = []
        for frames in windows.split(INFERENCE_BATCH):
            with self.compute.autocast():
                la = self.idm.infer_latents(stack_frames(frames.to(self.compute.device))).float()
            quantized = self.idm.quantize(la)
            found.append((la, quantized.la_q, quantized.indices))
        starts = torch.from_numpy(window_starts(done, len(video), skip_resets=True))
        valid = torch.zeros(len(video), dtype=torch.bool)
        valid[starts + 1] = True
        placed = []
        for x, missing in zip(
            map(torch.cat, zip(*found, strict=True)), (torch.nan, torch.nan, -1), strict=True
        ):
            whole = x.new_full((len(video), *x.shape[1:]), missing)
            whole[starts + 1] = x[starts]
            placed.append(whole)
        return Latents(*placed, valid.to(self.compute.device))

    @torch.no_grad()
    def quantize(self, la: Array) -> Quantized:
        """Latent actions `la` (B, D) → `la_q` (B, D) and `indices` (B, N, L), among others."""
        return self.idm.quantize(torch.as_tensor(la, dtype=torch.float32, device=self.compute.device))

    @torch.no_grad()
    def decode(self, codes: Array) -> Tensor:
        """Codes (B, N, L) → quantised latent actions (B, D).

        Raises `UserError` for codes that do not exist, and for a model without a quantiser.
        """
        wanted, num_codes = self.idm.vq.codes_shape, self.idm.vq.num_codes
        if not num_codes:
            raise UserError("this model has no codes: it was trained with vq.enabled false")
        codes = torch.as_tensor(codes, device=self.compute.device)
        if codes.is_floating_point() or codes.shape[1:] != wanted:
            raise UserError(f"codes must be integers (B, {wanted[0]}, {wanted[1]}), found {_kind(codes)}")
        if codes.numel() and not 0 <= codes.min() <= codes.max() < num_codes:
            raise UserError(f"codes must lie in 0..{num_codes - 1}, found {codes.min()}..{codes.max()}")
        return self.idm.vq.decode(codes.long())

    def predict(self, frames: Array, la_q: Array) -> Tensor:
        """The next frames (B, H, W, C) uint8 after `frames` (B, 2, H, W, C) uint8 = o[t-1], o[t].

        `la_q` (B, D) are the quantised latent actions. Raises `UserError` for another shape or type.
        """
        return self.rollout(frames, torch.as_tensor(la_q)[:, None])[:, 0]

    @torch.no_grad()
    def rollout(self, frames: Array, la_q: Array) -> Tensor:
        """Predictions (B, K, H, W, C) uint8 from `frames` (B, 2, H, W, C) uint8 under `la_q` (B, K, D).

        Every prediction is an input of the next one, without rounding in between. Raises `UserError` for
        another shape or type.
        """
        frames = _expect_uint8(frames, "frames", (None, 2, *FRAME_SHAPE)).to(self.compute.device)
        la_q = torch.as_tensor(la_q, dtype=torch.float32, device=self.compute.device)
        size = self.idm.head.out_features
        if la_q.dim() != 3 or la_q.shape[0] != len(frames) or la_q.shape[2] != size:
            raise UserError(f"la_q must be ({len(frames)}, K, {size}), found {tuple(la_q.shape)}")
        images, predicted = stack_frames(frames), []
        for action in la_q.unbind(1):
            with self.compute.autocast():
                predicted.append(self.world_model(images, action))
            images = torch.cat([images[:, 3:], predicted[-1]], 1)
        return to_frames(torch.stack(predicted, 1))


class ActingPolicy:
    """A policy of stage 3 or of train_expert.py, frozen and in eval mode."""

    def __init__(self, network: torch.nn.Module, compute: Compute):
        self.network, self.compute = network, compute

    @torch.no_grad()
    def logits(self, obs: Array) -> Tensor:
        """Observations (B, H, W, C) uint8 → logits (B, A). Raises `UserError` for another shape or type."""
        obs = _expect_uint8(obs, "obs", (None, *FRAME_SHAPE))
        with self.compute.autocast():
            return self.network.logits(obs.to(self.compute.device))

    def act(self, obs: Array, greedy: bool = False) -> np.ndarray:
        """Actions (B,) for observations (B, H, W, C) uint8, sampled or, if `greedy`, the most likely ones.

        Samples follow `torch.manual_seed`. Raises `UserError` for another shape or type.
        """
        obs = _expect_uint8(obs, "obs", (None, *FRAME_SHAPE))
        return network_actor(self.network, self.compute, greedy)(obs.numpy())


def load_stage1(path: str | Path, device: str = "auto") -> LatentActionModel:
    """The models of stage 1, finished or not, from the folder of a run or of its stage, or a checkpoint.

    A relative path starts in the working directory or, if it is not there, at the repository's root. The
    precision is that of the training. Raises `UserError` for a checkpoint that is missing or damaged, of
    another stage, or a device that is not there.
    """
    path = _checkpoint_path(path, "stage1")
    checkpoint = load_checkpoint(path, "python stage1.py")
    if checkpoint["stage"] != "stage1":
        raise UserError(
            f"{path} is a checkpoint of {checkpoint['stage']}, not of stage1; name the run's stage1"
        )
    cfg, state, compute = saved_config(checkpoint), checkpoint["state"], _compute(checkpoint, device)
    idm = restore(make_idm(cfg), state["idm"], compute)
    return LatentActionModel(idm, restore(make_world_model(cfg), state["world_model"], compute), compute)


def load_policy(path: str | Path, device: str = "auto") -> ActingPolicy:
    """An acting policy from the folder of a stage 3 or an expert, or a checkpoint; paths as `load_stage1`.

    Raises `UserError` for a checkpoint that is missing or damaged or cannot act, or a device that is not
    there.
    """
    checkpoint = load_policy_checkpoint(_checkpoint_path(path), "python stage3.py")
    compute = _compute(checkpoint, device)
    return ActingPolicy(restore_policy(checkpoint, compute), compute)


def _checkpoint_path(path: str | Path, stage: str = "") -> Path:
    """The checkpoint that `path` stands for: a file, a stage's folder, or with `stage` a run's folder."""
    path = Path(path).expanduser()
    path = path if path.exists() else resolve(str(path))
    if stage and (path / stage).is_dir():
        path /= stage
    return path / "checkpoint.pt" if path.suffix != ".pt" else path


def _compute(checkpoint: dict, device: str) -> Compute:
    precision = saved_config(checkpoint).precision
    return Compute.from_config(replace(load_config(["--device", device]), precision=precision, compile="off"))


def _expect_uint8(x: Any, name: str, shape: tuple[int | None, ...]) -> Tensor:
    """`x` as a tensor. Raises `UserError` unless it is uint8 and of `shape`, in which None is any size."""
    x = torch.as_tensor(x)
    fits = x.dim() == len(shape) and all(
        want in (None, size) for want, size in zip(shape, x.shape, strict=True)
    )
    if x.dtype != torch.uint8 or not fits:
        sizes = ", ".join("B" if size is None else str(size) for size in shape)
        raise UserError(f"{name} must be uint8 ({sizes}), found {_kind(x)}")
    return x


def _kind(x: Tensor) -> str:
    return f"{str(x.dtype).removeprefix('torch.')} {tuple(x.shape)}"
