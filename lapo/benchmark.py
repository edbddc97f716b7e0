"""How fast the stages run here: `python benchmark.py --stage 1 --compare plain --json out.json`.

Options of its own; every key of the config is an option too, as in the stages (`--preset demo`):

    --stage 1|2|3|load   what to measure; without it, everything: load is reading chunks of frames
    --compare plain      also measure what the published code does, and give the ratio: fp32, not compiled,
                         contiguous images, the world model's first layer over all constant channels, stage 2
                         labelling at every visit with gradients into the IDM, stage 3 running the trunk
                         forwards and backwards in every epoch of PPO and labelling every step
    --repeats N          timed steps, of which the median one is shown (3)
    --frames N           frames to train on or to load (8192)
    --json FILE          also write the numbers to this file

No data and no earlier stage is needed: stages 1 and 2 see random frames, stage 3 and load play `--env`.
Weights are random, which changes no amount of work. What a run does once or now and then is spread over its
steps: in stage 1 the probe, in stage 2 the labels, in stage 3 labels and decoder, for data of the published
size. Times include waiting for the device after every part. FLOPs are those of convolutions and matrix
products, an addition and a multiplication counting as two, as the code at hand executes them. `cores` is how
many the process kept busy: on a CPU, fewer than its threads in stages 1 to 3 means that other work took the
rest, and then no number here is worth much.
"""

import argparse
import contextlib
import gc
import json
import resource
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import stage1_idm_wm
import stage2_bc
import stage3_decode
from acting import random_actor
from build import make_decoder, make_idm, make_latent_policy, make_world_model
from config import Config, load_config, to_dict
from data_loader import WINDOW, Windows, find_chunks
from decoding import OnlineDecoder
from errors import UserError, run_main
from files import atomic_write
from models import TwoPathPolicy, WorldModel, normalize, stack_frames
from probe import label
from procgen_env import ACTIONS, VecEnv, check_game
from record_expert import CHUNK_FRAMES, write_chunk
from runs import provenance
from tables import table
from training import Compute, seed_everything

STAGES = ("1", "2", "3", "load")
PROBE_WINDOWS = 64
"""The probe is timed on so few windows: its time is proportional to their number."""


@dataclass(frozen=True)
class Lap:
    """A part of a step that has just ended."""

    name: str
    share: float = 1.0
    """How often a step of a run does what was done here once."""
    env_seconds: float = 0.0
    """How long it waited for the environment."""
    env_share: float = 1.0
    """How often a step of a run waits so long."""


@dataclass(frozen=True)
class Workload:
    """Something to measure."""

    step: Callable[[int], Iterable[Lap]]
    """Makes the step of the given number, part by part."""
    samples: int
    """Samples of a step: windows, environment steps or frames."""


Make = Callable[[Compute], Workload]


def main() -> None:
    """Measure what the command line asks for."""
    args, rest = parse(sys.argv[1:])
    benchmark(args, load_config(rest, description=__doc__))


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise UserError(f"the command line: {message}")


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The options of this script, and the words of the command line that are not.

    Raises `UserError` for an impossible value.
    """
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("--stage", choices=STAGES)
    parser.add_argument("--compare", choices=["plain"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--frames", type=int, default=8192)
    parser.add_argument("--json", type=Path)
    args, rest = parser.parse_known_args(argv)
    for name, least in (("repeats", 1), ("frames", WINDOW)):
        if getattr(args, name) < least:
            raise UserError(f"--{name} is {getattr(args, name)}; there must be at least {least}")
    if args.json and not args.json.parent.is_dir():
        raise UserError(f"--json {args.json}: the folder {args.json.parent} does not exist; create it first")
    return args, rest


def benchmark(args: argparse.Namespace, cfg: Config) -> dict:
    """Measure, print tables and write the numbers where asked; returns them as plain data."""
    fast = Compute.from_config(cfg)
    plain = Compute(fast.device, bf16=False, compile=False)
    stages = [args.stage] if args.stage else STAGES
    if {"3", "load"} & set(stages):
        check_game(cfg.env)
    results = []
    for stage in stages:
        print(f"stage {stage}" if stage in "123" else stage, f"on {fast}", flush=True)
        with prepared(stage, cfg, args.frames, fast.device) as (make_fast, make_plain):
            result = {"stage": stage, "path": "lapo"} | measure(make_fast, fast, args.repeats, cfg.seed)
            results.append(result)
            if args.compare:
                other = {"stage": stage, "path": "plain"} | measure(make_plain, plain, args.repeats, cfg.seed)
                result["times_plain"] = other["seconds_per_step"] / result["seconds_per_step"]
                results.append(other)
    print(f"\n{rates_table(results)}\n\n{parts_table(results)}")
    report = {"config": to_dict(cfg), "provenance": provenance(), "results": results}
    if args.json:
        atomic_write(args.json, lambda path: path.write_text(json.dumps(report, indent=2) + "\n"))
        print(f"\nwritten to {args.json}")
    return report


# ---------------------------------------------------------------- measuring


def measure(make: Make, compute: Compute, repeats: int, seed: int) -> dict:
    """Rates, FLOPs, memory and the parts' shares of what `make` makes, as plain data.

    The time of a step is the median of `repeats`; steps that compile or fill caches come before them.
    """
    device = compute.device
    seed_everything(seed)
    # A compiled function hides what it computes.
    gflop = count_gflop(make(replace(compute, compile=False)).step(0))
    reset_peaks(device)
    workload = make(compute)
    for number in range(3 if compute.compile else 1):
        lap_seconds(workload.step(number), device)
    steps, rates = [], []
    started, worked = time.perf_counter(), time.process_time()
    for number in range(repeats):
        steps.append(lap_seconds(workload.step(number + 3), device))
        if any(gflop.values()):
            rates.append(matmul_gflop_per_s(compute))  # now and then: other work on the machine slows both
    cores = (time.process_time() - worked) / (time.perf_counter() - started)
    parts = sorted(steps, key=lambda step: sum(step.values()))[repeats // 2]
    seconds = sum(parts.values())
    result = {
        "device": str(compute),
        "samples_per_step": workload.samples,
        "seconds_per_step": seconds,
        "steps_per_s": 1 / seconds,
        "samples_per_s": workload.samples / seconds,
        "seconds": parts,
        "gflop": gflop,
        "cores": cores,
        "host_bytes": peak_host_bytes(),
        "device_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
    }
    if rates:
        result["gflop_per_s"] = sum(gflop.values()) / seconds
        result["matmul_gflop_per_s"] = statistics.median(rates)
        result["matmul_share"] = result["gflop_per_s"] / result["matmul_gflop_per_s"]
    return result


def now(device: torch.device) -> float:
    """Seconds of a steady clock, once `device` has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def lap_seconds(laps: Iterable[Lap], device: torch.device) -> dict[str, float]:
    """Seconds of a step by the name of its parts; `env` is the waiting for the environment."""
    seconds: dict[str, float] = defaultdict(float)
    start = now(device)
    for lap in laps:
        seconds[lap.name] += lap.share * (now(device) - start - lap.env_seconds)
        if lap.env_seconds:
            seconds["env"] += lap.env_share * lap.env_seconds
        start = now(device)
    return dict(seconds)


def count_gflop(laps: Iterable[Lap]) -> dict[str, float]:
    """10⁹ FLOPs of a step by the name of its parts: convolutions and matrix products, backward ones too."""
    gflop: dict[str, float] = defaultdict(float)
    counter, before = FlopCounterMode(display=False), 0
    with counter:
        for lap in laps:
            total = counter.get_total_flops()
            gflop[lap.name] += lap.share * (total - before) / 1e9
            before = total
    return dict(gflop)


def matmul_gflop_per_s(compute: Compute) -> float:
    """10⁹ FLOP/s of a large square matrix product in the precision of `compute`."""
    size = 8192 if compute.device.type == "cuda" else 2048
    dtype = torch.bfloat16 if compute.bf16 else torch.float32
    a, b = (torch.randn(size, size, device=compute.device).to(dtype) for _ in range(2))
    a @ b  # the first one also finds its memory
    start = now(compute.device)
    a @ b
    return 2 * size**3 / 1e9 / (now(compute.device) - start)


def reset_peaks(device: torch.device) -> None:
    """Let the highest memory use be that from now on; where the system cannot, it stays the process's."""
    gc.collect()  # trainers refer to themselves by way of their compiled functions
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_host_bytes() -> int:
    """Most memory that the process had since `reset_peaks`."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


# ---------------------------------------------------------------- what is measured


@contextlib.contextmanager
def prepared(stage: str, cfg: Config, frames: int, device: torch.device) -> Iterator[tuple[Make, Make]]:
    """What makes the stage's workload, ours and the plain one."""
    with contextlib.ExitStack() as stack:
        if stage in "12":
            windows = random_windows(frames, device)
            ours, plain = (stage1, plain_stage1) if stage == "1" else (stage2, plain_stage2)
            yield (
                (lambda compute: ours(cfg, compute, windows)),
                (lambda compute: plain(cfg, compute, windows)),
            )
        elif stage == "3":
            env = stack.enter_context(contextlib.closing(TimedEnv.of(cfg)))
            yield (
                (lambda compute: stage3(cfg, compute, env)),
                (lambda compute: plain_stage3(cfg, compute, env)),
            )
        else:
            folder = Path(stack.enter_context(TemporaryDirectory()))
            record_random_play(cfg, frames, folder / "0.npz")
            yield (
                (lambda compute: load(folder, frames, compute)),
                (lambda compute: plain_load(folder, frames)),
            )


def random_windows(frames: int, device: torch.device) -> Windows:
    """Windows of random frames with random actions."""
    rng = np.random.default_rng(0)
    obs = rng.integers(256, size=(frames, 64, 64, 3), dtype=np.uint8)
    with TemporaryDirectory() as folder:
        np.savez(Path(folder) / "0.npz", obs=obs, ta=rng.integers(len(ACTIONS), size=frames))
        return Windows(Path(folder), device=device)


def published(network: nn.Module, device: torch.device) -> nn.Module:
    """`network` on the device, computing on contiguous images; returns the network."""
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
            layer.register_forward_pre_hook(lambda layer, inputs: (inputs[0].contiguous(),))
    return network.to(device)


def stage1(cfg: Config, compute: Compute, windows: Windows) -> Workload:
    """Stage 1 as it is."""
    idm, world_model = compute.place(make_idm(cfg)), compute.place(make_world_model(cfg))
    return _stage1(cfg, compute, windows, idm, world_model)


def plain_stage1(cfg: Config, compute: Compute, windows: Windows) -> Workload:
    """The same steps with published networks."""
    world_model = WorldModel(cfg.vq.la_dim, cfg.model.wm_width, fold_action=False)
    networks = published(make_idm(cfg), compute.device), published(world_model, compute.device)
    return _stage1(cfg, compute, windows, *networks)


def _stage1(cfg: Config, compute: Compute, windows: Windows, *networks: nn.Module) -> Workload:
    probed = min(cfg.probe.windows, PROBE_WINDOWS, len(windows))
    wanted = min(cfg.probe.windows, cfg.data.test_chunks * CHUNK_FRAMES["test"])
    small = replace(cfg, probe=replace(cfg.probe, windows=probed))
    trainer = stage1_idm_wm.Trainer(small, compute, windows, *networks)

    def step(number: int) -> Iterator[Lap]:
        frames = trainer.load(number)
        yield Lap("load")
        trainer.backward(frames)
        yield Lap("forward/backward")
        trainer.apply(number)
        yield Lap("update")
        trainer.measure(windows)
        yield Lap("probe", share=wanted / probed / cfg.stage1.probe_every)

    return Workload(step, cfg.stage1.batch_size)


def stage2(cfg: Config, compute: Compute, windows: Windows) -> Workload:
    """Stage 2 as it is; each step bears its part of labelling every window once."""
    idm = compute.place(make_idm(cfg)).eval().requires_grad_(False)
    la = torch.randn(len(windows), cfg.vq.la_dim, device=compute.device)
    policy = compute.place(make_latent_policy(cfg))
    trainer = stage2_bc.Trainer(cfg, compute, windows, la, policy)
    size, steps = cfg.stage2.batch_size, cfg.stage2.steps
    labelled = sum(
        count * CHUNK_FRAMES[split]
        for split, count in (("train", cfg.data.train_chunks), ("test", cfg.data.test_chunks))
    )

    def step(number: int) -> Iterator[Lap]:
        batch = trainer.load(number)
        yield Lap("load")
        label(idm, windows, windows.batch(number, size, cfg.seed), compute)
        # A run shorter than an epoch is taken to have less data, which it sees once.
        yield Lap("label", share=min(1.0, labelled / (size * steps)))
        trainer.backward(*batch)
        yield Lap("forward/backward")
        trainer.apply(number)
        yield Lap("update")

    return Workload(step, size)


def plain_stage2(cfg: Config, compute: Compute, windows: Windows) -> Workload:
    """Every batch is labelled anew, and the loss back-propagates into the IDM, which nothing changes."""
    idm = published(make_idm(cfg), compute.device).eval()
    policy = published(make_latent_policy(cfg), compute.device)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=cfg.stage2.lr)

    def step(number: int) -> Iterator[Lap]:
        frames = windows.gather(windows.batch(number, cfg.stage2.batch_size, cfg.seed))
        yield Lap("load")
        loss = F.mse_loss(policy(normalize(frames[:, WINDOW - 2])), idm.label(stack_frames(frames)))
        optimizer.zero_grad()
        loss.backward()
        yield Lap("forward/backward")
        optimizer.step()
        yield Lap("update")

    return Workload(step, cfg.stage2.batch_size)


class TimedEnv(VecEnv):
    """An environment that knows how long it was waited for."""

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
    """The part of a PPO update that is timed, as a whole one takes long: it plays and learns a minibatch."""

    def __init__(self, cfg: Config):
        length = max(1, cfg.ppo.rollout_steps // cfg.ppo.minibatches)
        self.cfg = replace(cfg, ppo=replace(cfg.ppo, rollout_steps=length, minibatches=1, epochs=1))
        self.per_rollout = cfg.ppo.rollout_steps / length
        self.per_update = self.per_rollout * cfg.ppo.epochs
        # The policy also sees the observation after the last step, of a slice as of a rollout.
        self.forward_share = (cfg.ppo.rollout_steps + 1) / (length + 1)

    def policy(self, env: TimedEnv) -> Lap:
        """The lap that ends with the playing."""
        return Lap("policy", self.forward_share, env.take_waited(), self.per_rollout)


def stage3(cfg: Config, compute: Compute, env: TimedEnv) -> Workload:
    """Updates of stage 3's online mode as they are; a step is an update, extrapolated from a slice of it."""
    part = Slice(cfg)
    states = {
        "stage1": {"idm": make_idm(cfg).state_dict()},
        "stage2": {"policy": make_latent_policy(cfg).state_dict()},
    }
    trainer = stage3_decode.online_trainer(part.cfg, compute, states, env)
    decoder: OnlineDecoder = trainer.decoder
    updates, steps_per_update = stage3_decode.num_updates(cfg)
    trainings = stage3_decode.decoder_updates(cfg)
    # Rollouts are labelled until the last training, and a training takes all pairs of the updates so far.
    labelled, trained = max(trainings, default=0) / updates, sum(trainings) / updates

    def step(number: int) -> Iterator[Lap]:
        env.take_waited()
        last_value = trainer.collect()
        yield part.policy(env)
        trainer.improve(steps_per_update, last_value)
        yield Lap("update", share=part.per_update)
        if trainings:
            decoder.label(trainer.collector.frames)
            yield Lap("label", share=part.per_rollout * labelled)
            decoder.train()
            yield Lap("decoder", share=part.per_rollout * trained)
            decoder.la, decoder.ta = [], []

    return Workload(step, steps_per_update)


class PlainPolicy(TwoPathPolicy):
    """The acting policy of online decoding, all of whose layers run at every visit and get gradients."""

    def encode(self, frames: Tensor) -> tuple[Tensor, ...]:
        return (frames,)

    def forward(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        features = self.trunk(normalize(frames))
        return super().forward(features, self.decoder(self.sl_head(F.relu(self.sl_fc(features)))))


def plain_stage3(cfg: Config, compute: Compute, env: TimedEnv) -> Workload:
    """The same updates with a plain policy, every step labelled."""
    part = Slice(cfg)
    idm = published(make_idm(cfg), compute.device).eval()
    policy = PlainPolicy(make_latent_policy(cfg), make_decoder(cfg, len(ACTIONS)), len(ACTIONS))
    policy = published(policy, compute.device).requires_grad_(True)
    learning = [p for name in ("policy_head", "value_head", "fc") for p in getattr(policy, name).parameters()]
    trainer = stage3_decode.PPOTrainer(part.cfg, compute, env, policy, torch.optim.Adam(learning, lr=0.0))

    @torch.no_grad()
    def label_rollout() -> None:
        frames = trainer.rollout.encoded[0]  # (S, N, H, W, C)
        for t in range(len(frames)):  # one step's windows at a time; which frames they hold changes no time
            past = [frames[(t + offset) % len(frames)] for offset in range(WINDOW)]
            idm.label(stack_frames(torch.stack(past, 1)))

    def step(number: int) -> Iterator[Lap]:
        env.take_waited()
        last_value = trainer.collect()
        yield part.policy(env)
        label_rollout()
        yield Lap("label", share=part.per_rollout)
        trainer.improve(0, last_value)
        yield Lap("update", share=part.per_update)

    return Workload(step, cfg.ppo.num_envs * cfg.ppo.rollout_steps)


def record_random_play(cfg: Config, frames: int, path: Path) -> None:
    """A chunk of `frames` frames as `record_expert.py` writes it, but of random play."""
    envs = min(16, frames)
    steps = -(-frames // envs)
    obs, ta = np.empty((envs, steps, 64, 64, 3), np.uint8), np.empty((envs, steps), np.int64)
    done = np.empty((envs, steps), bool)
    act = random_actor(cfg.seed)
    with contextlib.closing(VecEnv(cfg.env, envs, seed=cfg.seed, visuals=cfg.visuals)) as env:
        frame = env.observe()
        for t in range(steps):
            obs[:, t], ta[:, t] = frame, act(frame)
            frame, _, done[:, t] = env.step(ta[:, t])
    arrays = {"obs": obs, "ta": ta, "done": done}
    write_chunk(path, {key: x.reshape(-1, *x.shape[2:])[:frames] for key, x in arrays.items()})


def load(folder: Path, frames: int, compute: Compute) -> Workload:
    """Reading the chunks of a folder; a step reads them all."""

    def step(number: int) -> Iterator[Lap]:
        Windows(folder, device=compute.device)
        yield Lap("load")

    return Workload(step, frames)


def plain_load(folder: Path, frames: int) -> Workload:
    """Reading all chunks into host memory, then joining them."""

    def step(number: int) -> Iterator[Lap]:
        chunks = [dict(np.load(path)) for path in find_chunks(folder)]
        torch.from_numpy(np.concatenate([chunk["obs"] for chunk in chunks]))
        yield Lap("load")

    return Workload(step, frames)


# ---------------------------------------------------------------- tables


def rates_table(results: list[dict]) -> str:
    """A row for each stage and path."""
    head = [
        "stage",
        "path",
        "steps/s",
        "samples/s",
        "MB/s",
        "GFLOP/s",
        "of matmul",
        "cores",
        "host GB",
        "device GB",
    ]
    rows = []
    for result in results:
        decoded = result["samples_per_s"] * 64 * 64 * 3 / 1e6
        flops = "gflop_per_s" in result
        rows.append(
            [
                result["stage"],
                result["path"],
                f"{result['steps_per_s']:.3g}",
                f"{result['samples_per_s']:,.0f}",
                f"{decoded:,.0f}" if result["stage"] == "load" else "",
                f"{result['gflop_per_s']:,.0f}" if flops else "",
                f"{result['matmul_share']:.0%}" if flops else "",
                f"{result['cores']:.1f}",
                f"{result['host_bytes'] / 1e9:.2f}",
                f"{result['device_bytes'] / 1e9:.2f}" if result["device_bytes"] else "",
                f"{result['times_plain']:.1f}×" if "times_plain" in result else "",
            ]
        )
    return table([*head, "of plain"], rows)


def parts_table(results: list[dict]) -> str:
    """A row for each part of a step: its share of the time, and its rate."""
    rows = []
    for result in results:
        for name, seconds in result["seconds"].items():
            gflop = result["gflop"].get(name, 0)
            rate = gflop / seconds
            rows.append(
                [
                    result["stage"],
                    result["path"],
                    name,
                    f"{seconds:.3g}",
                    f"{seconds / result['seconds_per_step']:.1%}",
                    f"{rate:,.0f}" if gflop else "",
                    f"{rate / result['matmul_gflop_per_s']:.0%}" if gflop else "",
                ]
            )
    return table(["stage", "path", "part", "s per step", "of the time", "GFLOP/s", "of matmul"], rows)


if __name__ == "__main__":
    run_main(main)
