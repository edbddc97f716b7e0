"""The workloads of benchmark.py: the steps of the stages, and those of the reference, the published code.

A step is an iterator over its parts: it does the work of a part, then yields the `Part`. Frames and weights
are random, so neither data nor an earlier stage is needed.
"""

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lapo import stage1_idm_wm, stage2_bc, stage3_decode
from lapo.acting import random_actor
from lapo.config import Config
from lapo.data.chunks import CHUNK_FRAMES, find_chunks, write_chunk
from lapo.data.windows import loader_options
from lapo.data_loader import RollingWindows, Windows, stays_resident
from lapo.errors import UserError
from lapo.frames import CHANNELS
from lapo.games.table import ACTIONS
from lapo.games.vec_env import VecEnv
from lapo.models import (
    TwoPathPolicy,
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

STORED_BYTES = 64 * 64 * CHANNELS
"""Of a frame of Procgen."""
PROBE_WINDOWS = 64
"""The probe is timed on so few windows: its time is proportional to their number."""


class Part(NamedTuple):
    """A part of a step, which has just been done."""

    name: str
    per_step: float = 1.0
    """How often a training step does this part, on average over a run."""
    seconds: float | None = None
    """How long it took, if the step measured that itself; None: the time since the part before."""


TRAINING = ("load", "forward/backward", "update")
"""The parts that `Workload.update` does."""


@dataclass(frozen=True)
class Workload:
    """Steps to measure."""

    step: Callable[[int], Iterable[Part]]
    """Does the step of the given number, part by part."""
    samples: int
    """Samples of a step: windows, env steps or frames."""
    update: Callable[[int], Any] | None = None
    """Does a training step of stage 1 or 2 in one call, as the stage does (by a CUDA graph, if on)."""


@contextlib.contextmanager
def prepared(
    stage: str, cfg: Config, frames: int, device: torch.device
) -> Iterator[Callable[[str, Compute], Workload]]:
    """A function of path and compute that makes the stage's workload; all use the same frames and envs."""
    with contextlib.ExitStack() as stack:
        if stage in "12":
            given = (random_windows(frames, device, cfg.data.image_size, cfg.data.context),)
        elif stage == "3":
            given = (stack.enter_context(contextlib.closing(TimedEnv.of(cfg))),)
        else:
            folder = Path(stack.enter_context(TemporaryDirectory()))
            recorded = record_random_play(cfg, frames, folder)
            given = (
                folder,
                recorded,
                stays_resident(folder, device, None, cfg.resident, image_size=cfg.data.image_size),
            )
        yield lambda path, compute: WORKLOADS[stage][path](cfg, compute, *given)


def published_frames(cfg: Config) -> int:
    """Frames of the published chunks in use: the windows whose latents stage 2 infers."""
    chunks = {"train": cfg.data.train_chunks, "test": cfg.data.test_chunks}
    return sum(count * CHUNK_FRAMES[split] for split, count in chunks.items())


def random_windows(frames: int, device: torch.device, image_size: int = 64, context: int = 1) -> Windows:
    """Windows of random frames with random actions."""
    rng = np.random.default_rng(0)
    obs = rng.integers(256, size=(frames, image_size, image_size, CHANNELS), dtype=np.uint8)
    with TemporaryDirectory() as folder:
        np.savez(Path(folder) / "0.npz", obs=obs, ta=rng.integers(len(ACTIONS), size=frames))
        return Windows(Path(folder), device=device, image_size=image_size, context=context)


def within_epoch(update: Callable[[int], Any], windows: Windows, batch_size: int) -> Callable[[int], Any]:
    """`update` on batches of the first epoch alone: copying the order of another one waits for the device."""
    batches = max(1, len(windows) // batch_size)
    return lambda number: update(number % batches)


def contiguous(network: nn.Module, device: torch.device) -> nn.Module:
    """`network` on the device, its convolutions on contiguous images, as published; returns the network."""
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
            layer.register_forward_pre_hook(lambda layer, inputs: (inputs[0].contiguous(),))
    return network.to(device)


Networks = Callable[[Config, Compute], tuple[nn.Module, nn.Module]]


def stage1_networks(cfg: Config, compute: Compute) -> tuple[nn.Module, nn.Module]:
    """IDM and world model of stage 1."""
    return compute.place(make_idm(cfg)), compute.place(make_world_model(cfg))


def reference_stage1_networks(cfg: Config, compute: Compute) -> tuple[nn.Module, nn.Module]:
    """The same networks as the reference computes them; the same weights for the same seed."""
    idm = make_idm(cfg)
    world_model = make_world_model(cfg, fold_action=False)
    return contiguous(idm, compute.device), contiguous(world_model, compute.device)


def stage1(
    cfg: Config, compute: Compute, windows: Windows, make_networks: Networks = stage1_networks
) -> Workload:
    """Stage 1; each step bears its part of the probe."""
    ids = windows.evenly_spaced(min(cfg.probe.windows, PROBE_WINDOWS))
    ta, probed = windows.actions(ids), min(cfg.probe.windows, cfg.data.test_chunks * CHUNK_FRAMES["test"])
    per_window = 1 / len(ids) / cfg.stage1.probe_every
    networks = make_networks(cfg, compute)
    trainer = stage1_idm_wm.Trainer(cfg, compute, windows, *networks)

    def step(number: int) -> Iterator[Part]:
        trainer.set_lr(number)
        frames = trainer.load(number)
        yield Part("load")
        trainer.backward(frames)
        yield Part("forward/backward")
        trainer.apply()
        yield Part("update")
        la = infer_latents(networks[0], windows.iter_frames(ids), compute)
        train_probe(la, ta, cfg.probe, cfg.seed)
        yield Part("probe", probed * per_window)
        world_model_loss(*networks, windows, ids, la, compute)
        yield Part("probe", len(range(probed)[wm_subset(probed)]) * per_window)

    size = cfg.stage1.batch_size
    return Workload(step, size, within_epoch(trainer.update, windows, size))


def stage2(cfg: Config, compute: Compute, windows: Windows) -> Workload:
    """Stage 2; each step bears its part of inferring the latents of every window once."""
    idm = compute.place(make_idm(cfg)).eval().requires_grad_(False)
    la = torch.randn(len(windows), cfg.vq.la_dim, device=compute.device)
    policy = compute.place(make_latent_policy(cfg))
    trainer = stage2_bc.Trainer(cfg, compute, windows, la, policy)
    size, steps = cfg.stage2.batch_size, cfg.stage2.steps
    inferred = published_frames(cfg)

    def step(number: int) -> Iterator[Part]:
        trainer.set_lr(number)
        batch = trainer.load(number)
        yield Part("load")
        infer_latents(idm, windows.iter_frames(windows.batch(number, size, cfg.seed)), compute)
        # A run shorter than an epoch is assumed to have less data, which it sees once.
        yield Part("infer latents", min(1.0, inferred / (size * steps)))
        trainer.backward(*batch)
        yield Part("forward/backward")
        trainer.apply()
        yield Part("update")

    return Workload(step, size, within_epoch(trainer.update, windows, size))


def reference_stage2(cfg: Config, compute: Compute, windows: Windows) -> Workload:
    """Stage 2 of the reference: latents are inferred at every visit, with gradients into the frozen IDM."""
    idm = contiguous(make_idm(cfg), compute.device).eval()
    policy = contiguous(make_latent_policy(cfg), compute.device)
    optimizer, size = torch.optim.AdamW(policy.parameters(), lr=cfg.stage2.lr), cfg.stage2.batch_size

    def step(number: int) -> Iterator[Part]:
        frames = windows.gather(windows.batch(number, size, cfg.seed))
        yield Part("load")
        loss = F.mse_loss(policy(normalize(frames[:, -2])), idm.infer_latents(stack_frames(frames)))
        optimizer.zero_grad()
        loss.backward()
        yield Part("forward/backward")
        optimizer.step()
        yield Part("update")

    return Workload(step, size, within_epoch(lambda number: list(step(number)), windows, size))


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


def short_update(cfg: Config, device: torch.device) -> tuple[Config, float]:
    """`cfg` with short PPO updates, and how many of their rollouts are as long as one of `cfg`.

    On a CPU a whole update takes long. A short one collects a single minibatch and trains on it once. Updates
    stay whole on a GPU, so that minibatches follow each other without a wait.
    """
    if device.type == "cuda":
        return cfg, 1.0
    length = max(1, cfg.ppo.rollout_steps // cfg.ppo.minibatches)
    short = replace(cfg.ppo, rollout_steps=length, minibatches=1, epochs=1)
    return replace(cfg, ppo=short), cfg.ppo.rollout_steps / length


def online_trainer(cfg: Config, compute: Compute, env: VecEnv) -> PPOTrainer:
    """A trainer of online mode, with random weights."""
    states = {
        "stage1": {"idm": make_idm(cfg).state_dict()},
        "stage2": {"policy": make_latent_policy(cfg).state_dict()},
    }
    return stage3_decode.online_trainer(cfg, compute, states, env)


def update_parts(cfg: Config, trainer: PPOTrainer, env: TimedEnv, rollouts: float) -> Iterator[Part]:
    """Do an update of the trainer, part by part; `rollouts` of its rollouts are as long as one of `cfg`."""
    whole, short = cfg.ppo, trainer.cfg
    env.take_waited()
    last_value = trainer.collect()
    yield Part("env", rollouts, env.take_waited())
    # The policy also sees the obs after the last step, in a short rollout as in a whole one.
    yield Part("policy", (whole.rollout_steps + 1) / (short.rollout_steps + 1))
    trainer.improve(whole.num_envs * whole.rollout_steps, last_value)
    yield Part("update", rollouts * whole.epochs / short.epochs)


def stage3(cfg: Config, compute: Compute, env: TimedEnv) -> Workload:
    """Updates of stage 3's online mode; on a CPU extrapolated from short ones."""
    short, rollouts = short_update(cfg, compute.device)
    trainer = online_trainer(short, compute, env)
    decoder = trainer.decoder
    updates, steps_per_update = num_updates(cfg)
    trainings = stage3_decode.decoder_updates(cfg)
    # Latents are inferred until the decoder's last training, which takes the pairs of all updates so far.
    inferred, trained = max(trainings, default=0) / updates, sum(trainings) / updates

    def step(number: int) -> Iterator[Part]:
        yield from update_parts(cfg, trainer, env, rollouts)
        if trainings:
            decoder.infer_latents(trainer.rollout)
            yield Part("infer latents", rollouts * inferred)
            decoder.train()
            yield Part("decoder", rollouts * trained)
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
    short, rollouts = short_update(cfg, compute.device)
    idm = contiguous(make_idm(cfg), compute.device).eval()
    policy = ReferencePolicy(make_latent_policy(cfg), make_decoder(cfg, len(ACTIONS)), len(ACTIONS))
    policy = contiguous(policy, compute.device).requires_grad_(True)
    learning = [p for name in ("policy_head", "value_head", "fc") for p in getattr(policy, name).parameters()]
    trainer = PPOTrainer(short, compute, env, policy, torch.optim.Adam(learning, lr=0.0))

    @torch.no_grad()
    def infer_rollout() -> None:
        frames = trainer.rollout.encoded[0]  # (S, N, H, W, C)
        for t in range(len(frames)):  # one step's windows at a time; which frames they hold changes no time
            past = [frames[(t + offset) % len(frames)] for offset in range(idm.window)]
            idm.infer_latents(stack_frames(torch.stack(past, 1)))

    def step(number: int) -> Iterator[Part]:
        yield from update_parts(cfg, trainer, env, rollouts)
        infer_rollout()
        yield Part("infer latents", rollouts)

    return Workload(step, cfg.ppo.num_envs * cfg.ppo.rollout_steps)


def record_random_play(cfg: Config, frames: int, folder: Path) -> int:
    """Chunks of about `frames` frames in all as `record_expert.py` writes them, but of random play.

    All of them are the same file. Returns how many frames there are.
    """
    count = -(-frames // CHUNK_FRAMES["train"])
    size = -(-frames // count)
    envs = min(16, size)
    steps = -(-size // envs)
    ta = np.empty((envs, steps), np.int64)
    done = np.empty((envs, steps), bool)
    act = random_actor(cfg.seed)
    with contextlib.closing(VecEnv(cfg.env, envs, seed=cfg.seed, visuals=cfg.visuals)) as env:
        frame = env.observe()
        obs = np.empty((envs, steps, *frame.shape[1:]), np.uint8)
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

    def step(number: int) -> Iterator[Part]:
        if resident:
            Windows(folder, device=compute.device, **loader_options(cfg))
        else:
            windows = RollingWindows(
                folder, device=compute.device, pool_chunks=cfg.data.pool_chunks, **loader_options(cfg)
            )
            for part in windows.iter_batches(windows.all(), cfg.stage1.batch_size):
                windows.gather(part)
        yield Part("load")

    return Workload(step, frames)


def reference_load(cfg: Config, compute: Compute, folder: Path, frames: int, resident: bool) -> Workload:
    """Reading all chunks into host memory, then joining them, whatever fits on the device."""

    def step(number: int) -> Iterator[Part]:
        chunks = [dict(np.load(path, allow_pickle=False)) for path in find_chunks(folder)]
        torch.from_numpy(np.concatenate([chunk["obs"] for chunk in chunks]))
        yield Part("load")

    return Workload(step, frames)


def check_reference_load(frames: int) -> None:
    """Raise `UserError` if host memory is too small for `reference_load`."""
    needed, free = 2 * frames * STORED_BYTES, free_bytes(torch.device("cpu"))
    if free is not None and needed > free:
        raise UserError(
            f"loading {frames:,} frames as the reference does needs {needed / 1e9:.1f} GB of host memory,"
            f" {free / 1e9:.1f} GB are free; choose fewer --frames, or leave out --compare"
        )


WORKLOADS: dict[str, dict[str, Callable[..., Workload]]] = {
    "1": {"optimised": stage1, "reference": partial(stage1, make_networks=reference_stage1_networks)},
    "2": {"optimised": stage2, "reference": reference_stage2},
    "3": {"optimised": stage3, "reference": reference_stage3},
    "load": {"optimised": load, "reference": reference_load},
}
