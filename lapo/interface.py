"""Trained models for code of your own: what `import lapo` offers.

Dimensions
    T frames of a video · P frames that the world model sees (2) · B batch · K steps of a rollout
    H, W, C frame (64, 64, 3), or as `data.image_size` says · S side of a larger one
    N codebooks · L latent slots · D size of a latent action · A true actions (15)
"""

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lapo.bottleneck import Quantized
from lapo.config import ROOT, Config, resolve, to_dict, validate
from lapo.data.chunks import window_starts
from lapo.data_loader import INFERENCE_BATCH
from lapo.errors import UserError
from lapo.frames import CHANNELS, resize
from lapo.games.table import ACTIONS, GAMES
from lapo.models import (
    IDM,
    WorldModel,
    infer_latents,
    make_idm,
    make_world_model,
    restore,
    stack_frames,
    to_frames,
)
from lapo.policies import load_policy_checkpoint, restore_policy, sample
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
    """(T,) bool: False for the first P - 1 frames and the last one, and where episodes would be mixed."""


class LatentActionModel:
    """The IDM and world model of stage 1, frozen and in eval mode.

    All methods accept NumPy and PyTorch, return tensors on the model's device, work through long inputs in
    batches, and raise `UserError` for another shape or type than they name. They were trained on frames of
    `frame_shape` (H, W, C), and predict such; square ones of a multiple of it are averaged to it. The IDM
    sees `window` of them, P + 1.
    """

    def __init__(self, idm: IDM, world_model: WorldModel, compute: Compute, image_size: int = 64):
        self.idm, self.world_model, self.compute = idm, world_model, compute
        self.la_dim, self.window = idm.head.out_features, idm.window
        self.frame_shape = image_size, image_size, CHANNELS

    @torch.no_grad()
    def infer(self, video: Array, done: Array | None = None) -> Latents:
        """The latent actions of a video (T, H, W, C) uint8, T at least `window` (3).

        `done` (T,) bool marks where episodes end. As in training, entry t is not valid if a frame of its
        window, as published t-1 to t+1, is marked: data sets mark the last frame of an episode or the first
        one of the next.
        """
        video = _frames(video, "video", "T", size=self.frame_shape[0])
        if len(video) < self.window:
            raise UserError(f"the video has {len(video)} frames; an action is inferred from {self.window}")
        if done is not None:
            done = _tensor(done, "done", "bool", len(video)).cpu().numpy()
        starts = torch.from_numpy(window_starts(done, len(video), True, self.window))
        windows = (video[ids[:, None] + torch.arange(self.window)] for ids in starts.split(INFERENCE_BATCH))
        la = infer_latents(self.idm, (frames.to(self.compute.device) for frames in windows), self.compute)
        quantized = [self.idm.quantize(part) for part in la.split(INFERENCE_BATCH)]
        la_q, codes = (torch.cat([getattr(q, name) for q in quantized]) for name in ("la_q", "indices"))
        current = starts.to(self.compute.device) + self.window - 2

        def by_frame(x: Tensor, missing: float) -> Tensor:
            return x.new_full((len(video), *x.shape[1:]), missing).index_copy_(0, current, x)

        valid = by_frame(torch.ones_like(current, dtype=torch.bool), False)
        return Latents(by_frame(la, torch.nan), by_frame(la_q, torch.nan), by_frame(codes, -1), valid)

    @torch.no_grad()
    def quantize(self, la: Array) -> Quantized:
        """Latent actions `la` (B, D) → `la_q` (B, D) and `indices` (B, N, L), among others."""
        return self.idm.quantize(self._latents(la, "la", "B", self.la_dim))

    @torch.no_grad()
    def decode(self, codes: Array) -> Tensor:
        """Codes (B, N, L) → quantised latent actions (B, D).

        Raises `UserError` also for codes that do not exist, and for a model without a quantiser.
        """
        num_codes = self.idm.vq.num_codes
        if not num_codes:
            raise UserError("this model has no codes: it was trained with vq.enabled false")
        codes = _tensor(codes, "codes", "integer", "B", *self.idm.vq.codes_shape).long()
        if codes.numel() and not 0 <= codes.min() <= codes.max() < num_codes:
            raise UserError(f"codes must lie in 0..{num_codes - 1}, found {codes.min()}..{codes.max()}")
        return self.idm.vq.decode(codes.to(self.compute.device))

    def predict(self, frames: Array, la_q: Array) -> Tensor:
        """The next frames (B, H, W, C) uint8 after `frames` (B, P, H, W, C) uint8, the last of which is o[t].

        `la_q` (B, D) are the quantised latent actions of o[t].
        """
        frames = _frames(frames, "frames", "B", self.window - 1, size=self.frame_shape[0])
        la_q = self._latents(la_q, "la_q", len(frames), self.la_dim)
        return self.rollout(frames, la_q[:, None])[:, 0]

    @torch.no_grad()
    def rollout(self, frames: Array, la_q: Array) -> Tensor:
        """Predictions (B, K, H, W, C) uint8 from `frames` (B, P, H, W, C) uint8 under `la_q` (B, K, D).

        With `la_q` (K, D), all B starts get the same latent actions. Every prediction is an input of
        the next one, without rounding in between.
        """
        frames = _frames(frames, "frames", "B", self.window - 1, size=self.frame_shape[0])
        shared = getattr(la_q, "ndim", None) == 2
        la_q = self._latents(la_q, "la_q", *(() if shared else (len(frames),)), "K", self.la_dim)
        la_q = la_q.expand(len(frames), -1, -1)
        predicted = torch.empty(*la_q.shape[:2], *self.frame_shape, dtype=torch.uint8, device=la_q.device)
        for starts, actions, out in zip(
            *(x.split(INFERENCE_BATCH) for x in (frames, la_q, predicted)), strict=True
        ):
            images = stack_frames(starts.to(la_q.device))
            for step, action in enumerate(actions.unbind(1)):
                with self.compute.autocast():
                    image = self.world_model(images, action)
                images = torch.cat([images[:, CHANNELS:], image], 1)
                out[:, step] = to_frames(image)
        return predicted

    def _latents(self, x: Any, name: str, *shape: int | str) -> Tensor:
        la = _tensor(x, name, "float", *shape).to(self.compute.device, torch.float32)
        if la.isnan().any():
            raise UserError(f"{name} has NaN, as `infer` returns where not `valid`; leave these entries out")
        return la


class ActingPolicy:
    """A policy of stage 3 or of train_expert.py, frozen and in eval mode.

    Both methods accept NumPy and PyTorch, and raise `UserError` for another shape or type than they name.
    The policy was trained on observations of `frame_shape` (H, W, C); square ones of a multiple of it are
    averaged to it. `actions` (A) are the names of its actions, None for an environment of one's own.
    """

    def __init__(
        self,
        network: torch.nn.Module,
        compute: Compute,
        image_size: int = 64,
        actions: list[str] | None = None,
    ):
        self.network, self.compute, self.actions = network, compute, actions
        self.frame_shape = image_size, image_size, CHANNELS

    @torch.no_grad()
    def logits(self, obs: Array) -> Tensor:
        """Observations (B, H, W, C) uint8 → logits (B, A), on the policy's device."""
        obs = _frames(obs, "obs", "B", size=self.frame_shape[0])
        with self.compute.autocast():
            parts = obs.split(INFERENCE_BATCH)
            return torch.cat([self.network.logits(part.to(self.compute.device)) for part in parts])

    def act(self, obs: Array, greedy: bool = False) -> np.ndarray:
        """Actions (B,) int64 for observations (B, H, W, C) uint8.

        They are sampled, as `torch.manual_seed` says, or, if `greedy`, the most likely ones.
        """
        logits = self.logits(obs)
        return (logits.argmax(-1) if greedy else sample(logits)[0]).cpu().numpy()


def load_stage1(path: str | Path, device: str = "auto") -> LatentActionModel:
    """The models of a finished stage 1, from the folder of its run, its own folder, or its checkpoint.

    A relative path starts in the working directory or, if it is not there, at the repository's root. `device`
    is "auto" (CUDA where there is one), "cpu", "cuda" or "cuda:1". The precision is that of the training; as
    there, TF32 is turned off in this process. Raises `UserError` for a checkpoint that is missing, damaged,
    unfinished or of another stage, or a device that is not there.
    """
    path = _checkpoint_path(path, "stage1")
    checkpoint = load_checkpoint(path, "python stage1.py")
    if checkpoint["stage"] != "stage1":
        raise UserError(
            f"{path} is a checkpoint of {checkpoint['stage']}, not of stage1; name the run's stage1"
        )
    cfg, compute = _prepare(path, checkpoint, device)
    idm = restore(make_idm(cfg), checkpoint["state"]["idm"], compute)
    world_model = restore(make_world_model(cfg), checkpoint["state"]["world_model"], compute)
    return LatentActionModel(idm, world_model, compute, cfg.data.image_size)


def load_policy(path: str | Path, device: str = "auto") -> ActingPolicy:
    """A finished policy, from the folder of a stage 3 or of an expert, or its checkpoint.

    Arguments are those of `load_stage1`. Raises `UserError` for a checkpoint that is missing, damaged,
    unfinished or cannot act, for a run's folder, or a device that is not there.
    """
    path = _checkpoint_path(path)
    checkpoint = load_policy_checkpoint(path, "python stage3.py")
    cfg, compute = _prepare(path, checkpoint, device)
    names = list(ACTIONS) if cfg.env in GAMES else checkpoint["state"].get("actions")
    return ActingPolicy(restore_policy(checkpoint, compute), compute, cfg.data.image_size, names)


def _checkpoint_path(path: str | Path, stage: str = "") -> Path:
    """The checkpoint that `path` names: a file, the folder that it lies in, or with `stage` a run's folder.

    Raises `UserError` if `path` does not exist, and for a run's folder without `stage`.
    """
    places = Path(path).expanduser(), resolve(str(path))
    found = next((place for place in places if place.exists()), None)
    if found is None:
        raise UserError(
            f"{path} does not exist, neither in the working directory nor in {ROOT}; train it first"
        )
    if found.is_file():
        return found
    if not (found / "checkpoint.pt").exists():
        files = [file for kind in ("stage3_*", "expert") for file in found.glob(f"{kind}/checkpoint.pt")]
        policies = sorted(file.parent.name for file in files)
        if stage and found.name != stage:
            found /= stage
        elif policies:
            raise UserError(
                f"{found} is the folder of a run; name one of its policies: {', '.join(policies)}"
            )
    return found / "checkpoint.pt"


def _prepare(path: Path, checkpoint: dict, device: str) -> tuple[Config, Compute]:
    """Config and compute of a checkpoint's networks. Raises `UserError` if it is unfinished."""
    if not checkpoint["finished"]:
        raise UserError(
            f"{path} is unfinished, at step {checkpoint['step']:,}; run the command that began it again"
        )
    cfg = saved_config(checkpoint)
    chosen = validate(to_dict(cfg) | {"device": str(device)}, source="the arguments")
    return cfg, Compute.from_config(replace(chosen, compile="off"))


def _frames(x: Any, name: str, *shape: int | str, size: int) -> Tensor:
    """`x` (*shape, S, S, C) uint8 as a tensor (*shape, size, size, C), averaged if S is a multiple of `size`.

    Raises `UserError` as `_tensor` does.
    """
    x = _as_tensor(x)
    found = x.shape[-2] if isinstance(x, Tensor) and x.ndim > 2 else size
    side = max(found // size, 1) * size
    x = _tensor(x, name, "uint8", *shape, side, side, CHANNELS)
    if side == size:
        return x
    small = resize(x.flatten(0, -4).cpu().numpy(), size)
    return torch.from_numpy(small).unflatten(0, x.shape[:-3])


def _as_tensor(x: Any) -> Any:
    """An array or a list as a tensor where that is possible, anything else as it is."""
    try:
        if isinstance(x, list | tuple):
            x = np.asarray(x)
        if isinstance(x, np.ndarray):
            # PyTorch lacks negative strides, and warns of read-only arrays, which are only read here.
            x = x if min(x.strides, default=0) >= 0 else x.copy()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)
                x = torch.from_numpy(x)
    except (TypeError, ValueError):  # a ragged list, or a dtype that PyTorch lacks
        pass
    return x


def _tensor(x: Any, name: str, kind: str, *shape: int | str) -> Tensor:
    """`x` as a tensor, from an array or a list.

    Raises `UserError` unless it is of `kind` (uint8, bool, integer or float) and of `shape`, in which a
    letter stands for any size.
    """
    x = _as_tensor(x)
    if isinstance(x, Tensor) and len(x.shape) == len(shape):
        of_kind = {
            "uint8": x.dtype == torch.uint8,
            "bool": x.dtype == torch.bool,
            "integer": not (x.is_floating_point() or x.is_complex() or x.dtype == torch.bool),
            "float": x.is_floating_point(),
        }
        fits = all(isinstance(want, str) or want == size for want, size in zip(shape, x.shape, strict=True))
        if fits and of_kind[kind]:
            return x
    found = f"{x.dtype} {tuple(x.shape)}".removeprefix("torch.") if hasattr(x, "dtype") else type(x).__name__
    expected = ", ".join(map(str, shape)) + "," * (len(shape) == 1)
    raise UserError(f"{name} must be {kind} ({expected}), found {found}")
