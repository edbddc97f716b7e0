"""Speed of training steps on a CUDA device, and the settings of the checks in gpu.py."""

import contextlib
import gc
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from lapo import stage1_idm_wm, stage2_bc
from lapo.benchmarks import workloads
from lapo.config import Config, load_config
from lapo.data_loader import Windows
from lapo.errors import UserError
from lapo.models import infer_latents, make_idm, make_latent_policy
from lapo.runs.compute import Compute, seed_everything

CPU = torch.device("cpu")
DRY = "--stage1.batch_size 4 --stage2.batch_size 4 --ppo.num_envs 4 --ppo.rollout_steps 8 --ppo.minibatches 2"


@dataclass(frozen=True)
class Bench:
    """Device and sizes of the checks."""

    dry: bool
    device: torch.device
    compared: Config
    """Small networks, for comparisons with the CPU and between runs."""
    full: Config
    """The published sizes, for timings; small ones in a dry run."""

    @classmethod
    def make(cls, dry: bool) -> "Bench":
        """Use the first CUDA device or, if `dry`, the CPU. Raises `UserError` if there is no CUDA device."""
        if not (dry or torch.cuda.is_available()):
            raise UserError("PyTorch finds no CUDA device that it can use; --dry tests the checks on the CPU")
        # As the published ones but for size; normalised latents magnify bf16's errors in batches this small.
        published = "--data.image_size 64 --model.wm_width 8 --vq.normalize false"
        small = ["--preset", "demo", "--env", "jumper", *published.split()]
        if dry:
            return cls(dry, CPU, load_config([*small, *DRY.split()]), load_config([*small, *DRY.split()]))
        return cls(dry, torch.device("cuda:0"), load_config(small), load_config(["--env", "jumper"]))

    def compute(self, *, bf16: bool = True, compiled: bool = True, graphs: bool = False) -> Compute:
        """The `Compute` of a check. A dry run is neither compiled nor uses CUDA graphs."""
        return Compute(self.device, bf16, compiled and not self.dry, graphs and not self.dry)

    def windows(self, frames: int, dry_frames: int = 64) -> Windows:
        """Windows of random frames on the device."""
        return workloads.random_windows(dry_frames if self.dry else frames, self.device)

    def synchronize(self) -> None:
        """Synchronise with the device."""
        if not self.dry:
            torch.cuda.synchronize()

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Raise RuntimeError in operations that synchronise with the device."""
        if self.dry:
            yield
            return
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")


def stage1_trainer(cfg: Config, compute: Compute, windows: Windows) -> stage1_idm_wm.Trainer:
    """A trainer of stage 1, with the same initial weights every time."""
    seed_everything(0)
    return stage1_idm_wm.Trainer(cfg, compute, windows, *workloads.stage1_networks(cfg, compute))


def stage1_speed(bench: Bench, **options: bool) -> dict[str, Any]:
    """Speed of stage 1."""
    windows = bench.windows(20_000)
    return speed(bench, lambda compute: stage1_trainer(bench.full, compute, windows), **options)


def stage2_speed(bench: Bench, **options: bool) -> dict[str, Any]:
    """Speed of stage 2."""
    cfg, windows = bench.full, bench.windows(20_000)
    la = torch.randn(len(windows), cfg.vq.la_dim, device=bench.device)

    def trainer(compute: Compute) -> stage2_bc.Trainer:
        return stage2_bc.Trainer(cfg, compute, windows, la, compute.place(make_latent_policy(cfg)))

    return speed(bench, trainer, **options)


def inference_speed(bench: Bench) -> dict[str, int]:
    """Windows per second whose latents the IDM infers."""
    windows, compute = bench.windows(20_000), bench.compute(compiled=False)
    idm = compute.place(make_idm(bench.full)).eval()
    ids = windows.all()
    infer_latents(idm, windows.iter_frames(ids[:512]), compute)
    bench.synchronize()
    start = time.perf_counter()
    infer_latents(idm, windows.iter_frames(ids), compute)
    bench.synchronize()
    return {"windows/s": round(len(windows) / (time.perf_counter() - start))}


def speed(
    bench: Bench,
    make: Callable[[Compute], stage1_idm_wm.Trainer | stage2_bc.Trainer],
    *,
    compiled: bool = True,
    graphs: bool = False,
    benchmark: bool = False,
) -> dict[str, Any]:
    """Time per step (`ms`) and the host's time to launch it (`host ms`); peak memory; kernels of a step.

    Many steps are timed between two synchronisations. Raises RuntimeError if a step synchronises, or is
    recompiled after the first five.
    """
    count = 2 if bench.dry else 100
    gc.collect()
    torch.compiler.reset()
    if not bench.dry:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    torch.backends.cudnn.benchmark = benchmark
    try:
        start = time.perf_counter()
        trainer = make(bench.compute(compiled=compiled, graphs=graphs))
        for step in range(5):  # the fourth one captures the graph
            trainer.update(step)
        bench.synchronize()
        first = time.perf_counter() - start
        with bench.no_sync():
            for step in range(5, 8):  # the epoch's permutation is on the device already
                trainer.update(step)
        torch._dynamo.config.error_on_recompile = compiled
        bench.synchronize()
        start = time.perf_counter()
        for step in range(8, 8 + count):
            trainer.update(step)
        host = time.perf_counter() - start
        bench.synchronize()
        seconds = time.perf_counter() - start
        return {
            "ms": round(1e3 * seconds / count, 3),
            "host ms": round(1e3 * host / count, 3),
            "first five steps s": round(first, 1),
            "peak GB": 0 if bench.dry else round(torch.cuda.max_memory_allocated() / 1e9, 2),
            **kernels(bench, lambda: trainer.update(8 + count)),
        }
    finally:
        torch._dynamo.config.error_on_recompile = False
        torch.backends.cudnn.benchmark = False


def kernels(bench: Bench, step: Callable[[], Any]) -> dict[str, float]:
    """Number of kernels of a step, and their time on the device (in a dry run: CPU operators)."""
    activities = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[activities.CPU if bench.dry else activities.CUDA]) as profile:
        step()
        bench.synchronize()
    kind = torch.autograd.DeviceType.CPU if bench.dry else torch.autograd.DeviceType.CUDA
    rows = [row for row in profile.key_averages() if row.device_type == kind]  # leaves out CUDA runtime calls
    busy = sum(row.self_cpu_time_total if bench.dry else row.self_device_time_total for row in rows)
    return {"kernels": sum(row.count for row in rows), "device busy ms": round(busy / 1e3, 3)}


def stage3_speed(bench: Bench, graphs: bool) -> dict[str, float]:
    """Milliseconds of each part of an update of online mode: the fourth one, after warm-up."""
    torch.compiler.reset()
    cfg = bench.full
    with contextlib.closing(workloads.TimedEnv.of(cfg)) as env:
        trainer = workloads.online_trainer(cfg, bench.compute(graphs=graphs), env)
        steps = cfg.ppo.rollout_steps
        for update in range(1, 5):
            env.take_waited()
            bench.synchronize()
            begun = time.perf_counter()
            value = trainer.collect()
            bench.synchronize()
            played = time.perf_counter()
            with bench.no_sync() if update == 4 else contextlib.nullcontext():  # the first one compiles
                trainer.improve(update * steps * cfg.ppo.num_envs, value)
            host = time.perf_counter() - played
            bench.synchronize()
            learnt = time.perf_counter()
        waited = env.take_waited()
        trainer.decoder.infer_latents(trainer.rollout)
        bench.synchronize()
        inferred_at = time.perf_counter()
        trainer.decoder.train()
        bench.synchronize()
        decoded = time.perf_counter()
        deciding = kernels(bench, lambda: trainer.decide(trainer.collector.frames))
        ids = torch.arange(steps * cfg.ppo.num_envs // cfg.ppo.minibatches, device=bench.device)
        learning = kernels(bench, lambda: trainer.learn(ids))
    return {
        "ms per env step": round(1e3 * (played - begun) / steps, 3),
        "of it the game": round(1e3 * waited / steps, 3),
        "env steps/s": round(cfg.ppo.num_envs * steps / (learnt - begun)),
        "update ms": round(1e3 * (learnt - played), 2),
        "its host ms": round(1e3 * host, 2),
        "latents ms": round(1e3 * (inferred_at - learnt), 1),
        "decoder ms": round(1e3 * (decoded - inferred_at), 1),
        **{f"{key}, a decision": value for key, value in deciding.items()},
        **{f"{key}, a minibatch": value for key, value in learning.items()},
    }


def minutes_per_game(cfg: Config, results: dict[str, Any], path: str) -> dict[str, float]:
    """Minutes per game at the measured rates of `path` (`compiled` or `graphs`), without loading."""
    first, second, third = (results[f"stage {number}, {path}"]["found"] for number in (1, 2, 3))
    inferred = workloads.published_frames(cfg) / results["latents inferred"]["found"]["windows/s"]
    seconds = {
        "stage 1": cfg.stage1.steps * first["ms"] / 1e3,
        "stage 2": cfg.stage2.steps * second["ms"] / 1e3 + inferred,
        "stage 3": cfg.stage3.steps / third["env steps/s"],
        "compiling": sum(stage["first five steps s"] for stage in (first, second)),
    }
    return {name: round(value / 60, 2) for name, value in (seconds | {"all": sum(seconds.values())}).items()}
