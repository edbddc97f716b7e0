"""The workloads of benchmark.py: the steps of the stages, and those of the reference, the published code.

A step consists of parts, each ended by a `Lap`. Frames and weights are random: no data, no earlier stage.
"""

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lapo import stage1_idm_wm, stage2_bc, stage3_decode
from lapo.acting import random_actor
from lapo.config import Config
from lapo.data.chunks import CHUNK_FRAMES, FRAME_SHAPE, WINDOW, find_chunks, write_chunk
from lapo.data_loader import RollingWindows, Windows, stays_resident
from lapo.decoding import OnlineDecoder
from lapo.errors import UserError
from lapo.games.table import ACTIONS
from lapo.games.vec_env import VecEnv
from lapo.models import (
    TwoPathPolicy,
    WorldModel,
    infer_latents,
    make_decoder,
    make_idm,
    make_latent_policy,
    make_world_model,
    normalize,
    stack_frames,
)
from lapo.ppo import PPOTrainer, num_updates
from lapo.probe import train_probe, wm_subset, world_model_loss
from lapo.runs.compute import Compute, free_bytes

PROBE_WINDOWS = 64
"""The probe is timed on so few windows: its time is proportional to their number."""


@dataclass(frozen=True)
class Lap:
    """The end of a part of a step."""

    name: str
    per_step: float = 1.0
    """How often a training step does this part, on average over a run."""
    env_seconds: float = 0.0
    """Seconds of the part spent waiting for the environment."""
    env_per_step: float = 1.0
    """How often a training step waits that long."""


@dataclass(frozen=True)
class Workload:
    """Steps to measure."""

    step: Callable[[int], Iterable[Lap]]
    """Makes the step of the given number, part by part."""
    samples: int
    """Samples of a step: windows, environment steps or frames."""
    update: Callable[[int], Any] | None = None
    """Makes the same training step in one call, as the stage does (on a GPU, by a CUDA graph)."""


Make = Callable[[Compute], Workload]


@contextlib.contextmanager
def prepared(stage: str, cfg: Config, frames: int, device: torch.device) -> Iterator[tuple[Make, Make]]:
    """Constructors of the stage's workload, optimised and reference."""
    with contextlib.ExitStack() as stack:
        if stage in "12":
            windows = random_windows(frames, device)
            ours, reference = (stage1, reference_stage1) if stage == "1" else (stage2, reference_stage2)
            yield (
                (lambda compute: ours(cfg, compute, windows)),
                (lambda compute: reference(cfg, compute, windows)),
            )
        elif stage == "3":
            env = stack.enter_context(contextlib.closing(TimedEnv.of(cfg)))
            yield (
                (lambda compute: stage3(cfg, compute, env)),
                (lambda compute: reference_stage3(cfg, compute, env)),
            )
        else:
            folder = Path(stack.enter_context(TemporaryDirectory()))
            loaded = record_random_play(cfg, frames, folder)
            resident = stays_resident(folder, device, None, cfg.resident)
            yield (
                (lambda compute: load(cfg, compute, folder, loaded, resident)),
                (lambda compute: reference_load(folder, loaded)),
            )


def published_frames(cfg: Config) -> int:
    """Frames of the published chunks in use: the windows whose latents stage 2 infers."""
    chunks = {"train": cfg.data.train_chunks, "test": cfg.data.test_chunks}
    return sum(count * CHUNK_FRAMES[split] for split, count in chunks.items())


def random_windows(frames: int, device: torch.device) -> Windows:
    """Windows of random frames with random actions."""
    rng = np.random.default_rng(0)
    obs = rng.integers(256, size=(frames, 64, 64, 3), dtype=np.uint8)
    with TemporaryDirectory() as folder:
        np.savez(Path(folder) / "0.npz", obs=obs, ta=rng.integers(len(ACTIONS), size=frames))
        return Windows(Path(folder), device=device)


def contiguous(network: nn.Module, device: torch.device) -> nn.Module:
    """`network` on the device, its convolutions on contiguous images, as published; returns the network."""
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
            layer.register_forward_pre_hook(lambda layer, inputs: (inputs[0].contiguous(),))
    return network.to(device)


def stage1_networks(cfg: Config, compute: Compute) -> tuple[nn.Module, nn.Module]:
    """IDM and world model of stage 1."""
    return compute.place(make_idm(cfg)), compute.place(make_world_model(cfg))


def reference_stage1_networks(cfg: Config, compute: Compute) -> tuple[nn.Module, nn.Module]:
    """The same networks as the reference computes them; the same weights for the same seed."""
    idm = make_idm(cfg)
    world_model = WorldModel(cfg.vq.la_dim, cfg.model.wm_width, fold_action=False)
    return contiguous(idm, compute.device), contiguous(world_model, compute.device)


def stage1(cfg: Config, compute: Compute, windows: Windows) -> Workload:
    """Stage 1."""
    return _stage1(cfg, compute, windows, *stage1_networks(cfg, compute))


def reference_stage1(cfg: Config, compute: Compute, windows: Windows) -> Workload:
    """Stage 1 of the reference: its networks."""
    return _stage1(cfg, compute, windows, *reference_stage1_networks(cfg, compute))


def _stage1(cfg: Config, compute: Compute, windows: Windows, *networks: nn.Module) -> Workload:
    ids = windows.evenly_spaced(min(cfg.probe.windows, PROBE_WINDOWS))
    ta, probed = windows.actions(ids), min(cfg.probe.windows, cfg.data.test_chunks * CHUNK_FRAMES["test"])
    per_window = 1 / len(ids) / cfg.stage1.probe_every
    trainer = stage1_idm_wm.Trainer(cfg, compute, windows, *networks)

    def step(number: int) -> Iterator[Lap]:
        trainer.set_lr(number)
        frames = trainer.load(number)
        yield Lap("load")
        trainer.backward(frames)
        yield Lap("forward/backward")
        trainer.apply()
        yield Lap("update")
        la = infer_latents(networks[0], windows.iter_frames(ids), compute)
        train_probe(la, ta, cfg.probe, cfg.seed)
        yield Lap("probe", per_step=probed * per_window)
        world_model_loss(*networks, windows, ids, la, compute)
        yield Lap("probe", per_step=len(range(probed)[wm_subset(probed)]) * per_window)

    return Workload(step, cfg.stage1.batch_size, trainer.update)


def stage2(cfg: Config, compute: Compute, windows: Windows) -> Workload:
    """Stage 2; each step bears its part of inferring the latents of every window once."""
    idm = compute.place(make_idm(cfg)).eval().requires_grad_(False)
    la = torch.randn(len(windows), cfg.vq.la_dim, device=compute.device)
    policy = compute.place(make_latent_policy(cfg))
    trainer = stage2_bc.Trainer(cfg, compute, windows, la, policy)
    size, steps = cfg.stage2.batch_size, cfg.stage2.steps
    inferred = published_frames(cfg)

    def step(number: int) -> Iterator[Lap]:
        trainer.set_lr(number)
        batch = trainer.load(number)
        yield Lap("load")
        infer_latents(idm, windows.iter_frames(windows.batch(number, size, cfg.seed)), compute)
        # A run shorter than an epoch is assumed to have less data, which it sees once.
        yield Lap("infer latents", per_step=min(1.0, inferred / (size * steps)))
        trainer.backward(*batch)
        yield Lap("forward/backward")
        trainer.apply()
        yield Lap("update")

    return Workload(step, size, trainer.update)


def reference_stage2(cfg: Config, compute: Compute, windows: Windows) -> Workload:
    """Stage 2 of the reference: latents are inferred at every visit, with gradients into the frozen IDM."""
    idm = contiguous(make_idm(cfg), compute.device).eval()
    policy = contiguous(make_latent_policy(cfg), compute.device)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=cfg.stage2.lr)

    def step(number: int) -> Iterator[Lap]:
        frames = windows.gather(windows.batch(number, cfg.stage2.batch_size, cfg.seed))
        yield Lap("load")
        loss = F.mse_loss(policy(normalize(frames[:, WINDOW - 2])), idm.infer_latents(stack_frames(frames)))
        optimizer.zero_grad()
        loss.backward()
        yield Lap("forward/backward")
        optimizer.step()
        yield Lap("update")

    return Workload(step, cfg.stage2.batch_size)


class TimedEnv(VecEnv):
    """An environment that measures how long its callers waited for it."""

    waited = 0.0

    @classmethod
    def of(cls, cfg: Config) -> "TimedEnv":
        """The environments of stage 3."""
        return cls(cfg.env, cfg.ppo.num_envs, seed=cfg.seed, visuals=cfg.visuals)

    def act(self, actions: np.ndarray) -> None:
        start = time.perf_counter()
        super().act(actions)
        self.waited += time.perf_counter() - start

    def result(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        start = time.perf_counter()
        result = super().result()
        self.waited += time.perf_counter() - start
        return result

    def take_waited(self) -> float:
        """Seconds waited since the last call."""
        waited, self.waited = self.waited, 0.0
        return waited


class Slice:
    """A short PPO update to time in place of a whole one: one minibatch is collected and learnt from.

    `per_rollout`, `per_update` and `forwards` say how often a whole update does what the slice does once:
    steps of the rollout, minibatches, and forward passes of the policy.
    """

    def __init__(self, cfg: Config):
        length = max(1, cfg.ppo.rollout_steps // cfg.ppo.minibatches)
        self.cfg = replace(cfg, ppo=replace(cfg.ppo, rollout_steps=length, minibatches=1, epochs=1))
        self.per_rollout = cfg.ppo.rollout_steps / length
        self.per_update = self.per_rollout * cfg.ppo.epochs
        # The policy also sees the observation after the last step, of a slice as of a rollout.
        self.forwards = (cfg.ppo.rollout_steps + 1) / (length + 1)

    def policy(self, env: TimedEnv) -> Lap:
        """The lap that ends with the playing."""
        return Lap("policy", self.forwards, env.take_waited(), self.per_rollout)


def stage3(cfg: Config, compute: Compute, env: TimedEnv) -> Workload:
    """Updates of stage 3's online mode; a step is an update, extrapolated from a `Slice` of it."""
    part = Slice(cfg)
    states = {
        "stage1": {"idm": make_idm(cfg).state_dict()},
        "stage2": {"policy": make_latent_policy(cfg).state_dict()},
    }
    trainer = stage3_decode.online_trainer(part.cfg, compute, states, env)
    decoder: OnlineDecoder = trainer.decoder
    updates, steps_per_update = num_updates(cfg)
    trainings = stage3_decode.decoder_updates(cfg)
    # Latents are inferred until the decoder's last training, which takes the pairs of all updates so far.
    inferred, trained = max(trainings, default=0) / updates, sum(trainings) / updates

    def step(number: int) -> Iterator[Lap]:
        env.take_waited()
        last_value = trainer.collect()
        yield part.policy(env)
        trainer.improve(steps_per_update, last_value)
        yield Lap("update", per_step=part.per_update)
        if trainings:
            decoder.infer_latents(trainer.rollout)
            yield Lap("infer latents", per_step=part.per_rollout * inferred)
            decoder.train()
            yield Lap("decoder", per_step=part.per_rollout * trained)
            decoder.la, decoder.ta = [], []

    return Workload(step, steps_per_update)


class ReferencePolicy(TwoPathPolicy):
    """The acting policy of online mode, all layers of which run at every visit and get gradients."""

    def encode(self, frames: Tensor) -> tuple[Tensor, ...]:
        return (frames,)

    def forward(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        features = self.trunk(normalize(frames))
        return super().forward(features, self.decoder(self.sl_head(F.relu(self.sl_fc(features)))))


def reference_stage3(cfg: Config, compute: Compute, env: TimedEnv) -> Workload:
    """Stage 3 of the reference: `ReferencePolicy`, and latents inferred at every step."""
    part = Slice(cfg)
    idm = contiguous(make_idm(cfg), compute.device).eval()
    policy = ReferencePolicy(make_latent_policy(cfg), make_decoder(cfg, len(ACTIONS)), len(ACTIONS))
    policy = contiguous(policy, compute.device).requires_grad_(True)
    learning = [p for name in ("policy_head", "value_head", "fc") for p in getattr(policy, name).parameters()]
    trainer = PPOTrainer(part.cfg, compute, env, policy, torch.optim.Adam(learning, lr=0.0))

    @torch.no_grad()
    def infer_rollout() -> None:
        frames = trainer.rollout.encoded[0]  # (S, N, H, W, C)
        for t in range(len(frames)):  # one step's windows at a time; which frames they hold changes no time
            past = [frames[(t + offset) % len(frames)] for offset in range(WINDOW)]
            idm.infer_latents(stack_frames(torch.stack(past, 1)))

    def step(number: int) -> Iterator[Lap]:
        env.take_waited()
        last_value = trainer.collect()
        yield part.policy(env)
        infer_rollout()
        yield Lap("infer latents", per_step=part.per_rollout)
        trainer.improve(0, last_value)
        yield Lap("update", per_step=part.per_update)

    return Workload(step, cfg.ppo.num_envs * cfg.ppo.rollout_steps)


def record_random_play(cfg: Config, frames: int, folder: Path) -> int:
    """Chunks of about `frames` frames in all as `record_expert.py` writes them, but of random play.

    All of them are the same file. Returns how many frames there are.
    """
    count = -(-frames // CHUNK_FRAMES["train"])
    size = -(-frames // count)
    envs = min(16, size)
    steps = -(-size // envs)
    obs, ta = np.empty((envs, steps, 64, 64, 3), np.uint8), np.empty((envs, steps), np.int64)
    done = np.empty((envs, steps), bool)
    act = random_actor(cfg.seed)
    with contextlib.closing(VecEnv(cfg.env, envs, seed=cfg.seed, visuals=cfg.visuals)) as env:
        frame = env.observe()
        for t in range(steps):
            obs[:, t], ta[:, t] = frame, act(frame)
            frame, _, done[:, t] = env.step(ta[:, t])
    arrays = {"obs": obs, "ta": ta, "done": done}
    write_chunk(folder / "0.npz", {key: x.reshape(-1, *x.shape[2:])[:size] for key, x in arrays.items()})
    for number in range(1, count):
        (folder / f"{number}.npz").hardlink_to(folder / "0.npz")
    return count * size


def load(cfg: Config, compute: Compute, folder: Path, frames: int, resident: bool) -> Workload:
    """Bringing all frames to the device; where they cannot all be resident, gathering every window once."""

    def step(number: int) -> Iterator[Lap]:
        if resident:
            Windows(folder, device=compute.device)
        else:
            windows = RollingWindows(folder, device=compute.device, pool_chunks=cfg.data.pool_chunks)
            for part in windows.iter_batches(windows.all(), cfg.stage1.batch_size):
                windows.gather(part)
        yield Lap("load")

    return Workload(step, frames)


def reference_load(folder: Path, frames: int) -> Workload:
    """Reading all chunks into host memory, then joining them."""

    def step(number: int) -> Iterator[Lap]:
        chunks = [dict(np.load(path, allow_pickle=False)) for path in find_chunks(folder)]
        torch.from_numpy(np.concatenate([chunk["obs"] for chunk in chunks]))
        yield Lap("load")

    return Workload(step, frames)


def check_reference_load(frames: int) -> None:
    """Raise `UserError` if host memory is too small for `reference_load`."""
    needed, free = 2 * frames * math.prod(FRAME_SHAPE), free_bytes(torch.device("cpu"))
    if free is not None and needed > free:
        raise UserError(
            f"loading {frames:,} frames as the reference does needs {needed / 1e9:.1f} GB of host memory,"
            f" {free / 1e9:.1f} GB are free; choose fewer --frames, or leave out --compare"
        )
