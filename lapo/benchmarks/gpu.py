"""What a CUDA device makes of the stages: are they right, do they wait for nothing, how fast are they?

    make gpu                                    or: python -m lapo.benchmarks.gpu
    make gpu ARGS="--json gpu.json"             also write the numbers to a file
    make gpu ARGS=--dry                         small sizes on the CPU, to try the checks themselves

No data and no earlier stage is needed: frames and weights are random. A line per check says what was found;
one that fails does not end the others. Exit status: 0 all held, 1 one did not, 2 there is nothing to check.
"""

import argparse
import contextlib
import gc
import os
import shutil
import subprocess
import sys
import sysconfig
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lapo import stage1_idm_wm, stage2_bc, stage3_decode
from lapo.benchmarks import workloads
from lapo.config import ROOT, Config, load_config
from lapo.data.chunks import FRAME_SHAPE, WINDOW, write_chunk
from lapo.data_loader import WHOLE, RollingWindows, Windows
from lapo.errors import Parser, UserError, run_main
from lapo.models import infer_latents, make_idm, make_latent_policy
from lapo.runs.compute import Compute, seed_everything
from lapo.runs.files import check_json, write_json

CPU = torch.device("cpu")
DRY = "--stage1.batch_size 4 --stage2.batch_size 4 --ppo.num_envs 4 --ppo.rollout_steps 8 --ppo.minibatches 2"


@dataclass(frozen=True)
class Bench:
    """Where the checks run, and on which sizes."""

    dry: bool
    device: torch.device
    demo: Config
    """Small networks, for what is compared."""
    full: Config
    """The published sizes, for what is timed; small ones in a dry run."""

    @classmethod
    def make(cls, dry: bool) -> "Bench":
        """On the first CUDA device or, `dry`, on the CPU. Raises `UserError` if there is none."""
        if not (dry or torch.cuda.is_available()):
            raise UserError("PyTorch finds no CUDA device that it can use; --dry tries the checks on the CPU")
        demo = ["--preset", "demo", "--env", "jumper"]
        full = load_config([*demo, *DRY.split()] if dry else ["--env", "jumper"])
        return cls(dry, CPU if dry else torch.device("cuda:0"), load_config(demo), full)

    def windows(self, frames: int, dry_frames: int = 64) -> Windows:
        """Windows of random frames on the device."""
        return workloads.random_windows(dry_frames if self.dry else frames, self.device)

    def wait(self) -> None:
        """Wait until the device has done all it was given."""
        if not self.dry:
            torch.cuda.synchronize()

    @contextlib.contextmanager
    def no_waiting(self) -> Iterator[None]:
        """Any operation that waits for the device raises RuntimeError."""
        if self.dry:
            yield
            return
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")


@dataclass(frozen=True)
class Variant(Compute):
    """A way to compile training steps; one that leaves out a part of a step is refused."""

    options: dict[str, Any] = field(default_factory=dict)

    def compiled(self, function: Callable) -> Callable:
        return torch.compile(function, fullgraph=True, **self.options) if self.compile else function


class CheckError(Exception):
    """Something was found not to be as it should."""


def expect(holds: bool, sentence: str) -> None:
    """Raise CheckError with `sentence` unless it `holds`."""
    if not holds:
        raise CheckError(sentence)


def main() -> None:
    """Run all checks, print a line for each and write the results where asked."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    parser.add_argument(
        "--dry", action="store_true", help="small sizes on the CPU, to try the checks themselves"
    )
    args = parser.parse_args()
    check_json(args.json)
    _, failed = check(Bench.make(args.dry), args.json)
    if failed:
        sys.exit(1)


def check(bench: Bench, file: Path | None = None) -> tuple[dict[str, Any], list[str]]:
    """The results of all checks by name, as plain data, and the names of those that failed.

    Whatever is known is written to `file` after every check.
    """
    started, results, failed = time.perf_counter(), {}, []
    for name, function in CHECKS.items():
        start = time.perf_counter()
        try:
            gc.collect()  # trainers refer to themselves by way of their compiled functions
            torch.compiler.reset()
            results[name] = function(bench)
        except Exception as error:  # whatever it is, the other checks still tell something
            traceback.print_exc()
            results[name] = f"FAILED {type(error).__name__}: {' '.join(str(error).split())[:300]}"
            failed.append(name)
        print(f"{name} ({time.perf_counter() - start:.1f} s): {results[name]}", flush=True)
        if file:
            write_json(file, results)
    if not (bench.dry or {"stage 1", "stage 2", "stage 3"} & set(failed)):
        results["minutes per game"] = minutes_per_game(bench.full, results)
        print(f"minutes per game, without loading: {results['minutes per game']}")
        if file:
            write_json(file, results)
    seconds = round(time.perf_counter() - started)
    print(f"{len(failed)} of {len(CHECKS)} failed{': ' * bool(failed)}{', '.join(failed)}; {seconds} s")
    return results, failed


# ---------------------------------------------------------------- right


def environment(bench: Bench) -> dict[str, Any]:
    """What is there. Fails where there is nothing to compile with."""
    found: dict[str, Any] = {
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "compiler": os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang"),
        "Python.h": (Path(sysconfig.get_paths()["include"]) / "Python.h").exists(),
        "cores": len(os.sched_getaffinity(0)),
    }
    if bench.dry:
        return found
    found |= {
        "device": torch.cuda.get_device_name(),
        "free GB": round(torch.cuda.mem_get_info()[0] / 1e9, 1),
        "TF32 in convolutions": torch.backends.cudnn.allow_tf32,
        "TF32 in matrix products": torch.backends.cuda.matmul.allow_tf32,
    }
    expect(found["compiler"] is not None, "torch.compile needs a C compiler")
    expect(found["Python.h"], "torch.compile needs Python.h")
    return found


class CountedWindows(Windows):
    """Windows of frames whose first bytes spell their number, made on the device."""

    def __init__(self, count: int, device: torch.device):
        self.share, self.num_bad, self.unlabelled = WHOLE, 0, []
        self.frames = torch.zeros((count, *FRAME_SHAPE), dtype=torch.uint8, device=device)
        numbers = torch.arange(count, dtype=torch.int32, device=device)
        self.frames.view(count, -1)[:, :4] = numbers[:, None].view(torch.uint8)
        self.index(ROOT, [np.arange(count - WINDOW + 1)], [None], count, device)


def gather_far(bench: Bench) -> str:
    """Frames are gathered from beyond 2**31 bytes."""
    free = 6e6 if bench.dry else min(0.6 * torch.cuda.mem_get_info()[0], 33e9)
    expect(bench.dry or free > 2**32, f"{free / 1e9:.1f} GB may be used, too little to get there")
    count = int(free // np.prod(FRAME_SHAPE))
    windows = CountedWindows(count, bench.device)
    ids = torch.tensor([0, count // 2, count - WINDOW], device=bench.device)
    frames = windows.gather(ids).flatten(2)[..., :4].contiguous()
    expected = ids[:, None] + torch.arange(WINDOW, device=bench.device)
    expect(torch.equal(frames.view(torch.int32).squeeze(-1), expected.int()), "other frames were gathered")
    return f"{count:,} frames"


def same_as_cpu(bench: Bench) -> dict[str, float]:
    """The gradients of a step of stage 1 are those of the CPU in fp32."""
    places = torch.backends.cudnn, torch.backends.cuda.matmul
    before = [place.allow_tf32 for place in places]
    for place in places:
        place.allow_tf32 = False
    try:
        expected = first_step(bench.demo, Compute(CPU, bf16=False, compile=False))
        found = {}
        for name, bf16, compiled, tolerance in (
            ("fp32", False, False, 1e-3),
            ("fp32 compiled", False, True, 1e-3),
            ("bf16", True, False, 0.1),
            ("bf16 compiled", True, True, 0.1),
        ):
            got = first_step(bench.demo, Compute(bench.device, bf16, compiled and not bench.dry))
            found[name] = difference([got], [expected])
            expect(found[name] < tolerance, f"in {name}, the gradients differ by {found[name]:.1e}")
        return found
    finally:
        for place, allowed in zip(places, before, strict=True):
            place.allow_tf32 = allowed


def first_step(cfg: Config, compute: Compute) -> Tensor:
    """All gradients of the first step on 64 random frames, in one vector."""
    trainer = stage1_trainer(cfg, compute, workloads.random_windows(64, compute.device))
    trainer.idm.vq.start = "published"  # the other one draws from the device's generator
    trainer.backward(trainer.load(0))
    return torch.cat([p.grad.float().flatten() for p in trainer.params])


def difference(found: Iterable[Tensor], expected: Iterable[Tensor]) -> float:
    """The greatest difference of two tensors, relative to the norm of the expected one."""
    pairs = zip(found, expected, strict=True)
    return max(float((a.cpu() - b.cpu()).norm() / (b.cpu().norm() + 1e-12)) for a, b in pairs)


def stage1_trainer(cfg: Config, compute: Compute, windows: Windows) -> stage1_idm_wm.Trainer:
    """What trains stage 1, from the same weights every time."""
    seed_everything(0)
    return stage1_idm_wm.Trainer(cfg, compute, windows, *workloads.stage1_networks(cfg, compute))


def rolling(bench: Bench) -> str:
    """Pools of chunks are exchanged under a busy device: every batch holds the frames that it should."""
    with TemporaryDirectory() as name:
        folder, rng = Path(name), np.random.default_rng(0)
        for number in range(6):
            size = (60 if bench.dry else 3000, *FRAME_SHAPE)
            write_chunk(folder / f"{number}.npz", {"obs": rng.integers(256, size=size, dtype=np.uint8)})
        truth = Windows(folder, device=CPU)
        windows = RollingWindows(folder, device=bench.device, pool_chunks=2)
        busy = torch.randn(512, 512, device=bench.device)
        wrong = torch.zeros((), dtype=torch.int64, device=bench.device)
        batches = 2 * len(windows) // 32
        for step in range(batches):
            ids = windows.batch(step, 32, 0)
            expected = truth.gather(ids.cpu()).to(bench.device)
            for _ in range(20):  # the gather is still to be done when the next batch fetches a pool
                busy = (busy @ busy).clamp(-1, 1)
            wrong += (windows.gather(ids) != expected).any()
        expect(not wrong.item(), f"{wrong} of {batches} batches hold other frames")
    return f"{batches} batches"


def continued(bench: Bench) -> dict[str, float]:
    """A trainer continued from its saved state makes the step that the first one makes."""
    compute, windows = Compute(bench.device, bf16=False, compile=False), bench.windows(64)
    trainer, other = (stage1_trainer(bench.demo, compute, windows) for _ in range(2))
    trainer.update(0)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "state.pt"
        torch.save(trainer.state_dict(), path)
        other.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    places = [each.optimizer.param_groups[0]["lr"].device for each in (trainer, other)]
    expect(places[0] == places[1], f"the learning rate lies on {places[0]}, once continued on {places[1]}")
    for each in (trainer, other):
        each.update(1)
    weights = [[p.detach() for p in each.params] for each in (other, trainer)]
    found = difference(*weights)
    expect(found < 1e-4, f"the weights differ by {found:.1e}")
    return {"difference of the weights": found}


def collectives(bench: Bench) -> str:
    """Two processes meet and part, as torchrun starts them; they compute on the CPU."""
    code = "from lapo.runs.ranks import greatest, joined, share\n"
    code += "with joined():\n    assert greatest(share().rank, 7) == (1, 7)\n"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launcher, "--no-python", sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    errors = [line for line in done.stderr.splitlines() if "Error" in line]
    expect(done.returncode == 0, "; ".join(errors) or done.stderr)
    return "ok"


# ---------------------------------------------------------------- fast


def stage1_speed(bench: Bench) -> dict[str, dict]:
    """Steps of stage 1, eager and compiled in several ways."""
    windows = bench.windows(20_000)

    def timed(count: int, **options: Any) -> dict:
        return speed(bench, lambda compute: stage1_trainer(bench.full, compute, windows), count, **options)

    return {
        "eager": timed(50, compiled=False),
        "compiled": timed(200),
        "compiled, cudnn.benchmark": timed(200, benchmark=True),
        "reduce-overhead": timed(200, mode="reduce-overhead"),
    }


def stage2_speed(bench: Bench) -> dict[str, Any]:
    """Windows labelled by the IDM, and steps of stage 2."""
    cfg, windows, compute = bench.full, bench.windows(20_000), Compute(bench.device, True, False)
    idm = compute.place(make_idm(cfg)).eval()
    ids = windows.all()
    infer_latents(idm, windows.iter_frames(ids[:512]), compute)
    bench.wait()
    start = time.perf_counter()
    infer_latents(idm, windows.iter_frames(ids), compute)
    bench.wait()
    labelled = round(len(windows) / (time.perf_counter() - start))
    la = torch.randn(len(windows), cfg.vq.la_dim, device=bench.device)

    def trainer(compute: Compute) -> stage2_bc.Trainer:
        return stage2_bc.Trainer(cfg, compute, windows, la, compute.place(make_latent_policy(cfg)))

    return {
        "windows labelled/s": labelled,
        "compiled": speed(bench, trainer, 200),
        "reduce-overhead": speed(bench, trainer, 200, mode="reduce-overhead"),
    }


def speed(
    bench: Bench,
    make: Callable[[Compute], stage1_idm_wm.Trainer | stage2_bc.Trainer],
    count: int,
    *,
    compiled: bool = True,
    mode: str | None = None,
    benchmark: bool = False,
) -> dict[str, Any]:
    """Milliseconds per step, of them the host's, over `count` steps between two waits; memory and kernels.

    Fails if a step waits for the device, or compiles anew after the first five.
    """
    if bench.dry:
        count, compiled = 2, False
    gc.collect()
    torch.compiler.reset()
    if not bench.dry:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    torch.backends.cudnn.benchmark = benchmark
    try:
        start = time.perf_counter()
        trainer = make(Variant(bench.device, bf16=True, compile=compiled, options={"mode": mode}))
        trainer.update(0)
        trainer.update(1)
        bench.wait()
        first = time.perf_counter() - start
        with bench.no_waiting():
            for step in range(2, 5):  # the epoch's order is on the device by now
                trainer.update(step)
        torch._dynamo.config.error_on_recompile = compiled
        bench.wait()
        start = time.perf_counter()
        for step in range(5, 5 + count):
            trainer.update(step)
        host = time.perf_counter() - start
        bench.wait()
        seconds = time.perf_counter() - start
        return {
            "ms": round(1e3 * seconds / count, 3),
            "host ms": round(1e3 * host / count, 3),
            "first two steps s": round(first, 1),
            "peak GB": 0 if bench.dry else round(torch.cuda.max_memory_allocated() / 1e9, 2),
            "kernels": kernels(bench, lambda: trainer.update(5 + count)),
        }
    finally:
        torch._dynamo.config.error_on_recompile = False
        torch.backends.cudnn.benchmark = False


def kernels(bench: Bench, step: Callable[[], Any]) -> dict[str, Any]:
    """How many kernels a step launches, and those that take longest: name, launches, milliseconds.

    In a dry run, the operators of the CPU in their place.
    """
    activities = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[activities.CPU if bench.dry else activities.CUDA]) as profile:
        step()
        bench.wait()
    kind = torch.autograd.DeviceType.CPU if bench.dry else torch.autograd.DeviceType.CUDA
    rows = [row for row in profile.key_averages() if row.device_type == kind]  # not the calls of the runtime
    times = [row.self_cpu_time_total if bench.dry else row.self_device_time_total for row in rows]
    longest = sorted(zip(times, rows, strict=True), key=lambda pair: -pair[0])[:8]
    return {
        "launches": sum(row.count for row in rows),
        "longest": [(row.key[:48], row.count, round(time / 1e3, 3)) for time, row in longest],
    }


def stage3_speed(bench: Bench) -> dict[str, float]:
    """Updates of stage 3's online mode, of which the third is shown."""
    cfg, compute = bench.full, Compute(bench.device, bf16=True, compile=not bench.dry)
    states = {
        "stage1": {"idm": make_idm(cfg).state_dict()},
        "stage2": {"policy": make_latent_policy(cfg).state_dict()},
    }
    with contextlib.closing(workloads.TimedEnv.of(cfg)) as env:
        trainer = stage3_decode.online_trainer(cfg, compute, states, env)
        steps = cfg.ppo.rollout_steps
        for update in range(1, 4):
            env.take_waited()
            bench.wait()
            begun = time.perf_counter()
            value = trainer.collect()
            bench.wait()
            played = time.perf_counter()
            with bench.no_waiting() if update == 3 else contextlib.nullcontext():  # the first one compiles
                trainer.improve(update * steps * cfg.ppo.num_envs, value)
            host = time.perf_counter() - played
            bench.wait()
            learnt = time.perf_counter()
        waited = env.take_waited()
        kept = torch.stack([actions for _, actions, _ in trainer.decoder.steps[-steps:]])
        expect(torch.equal(kept, trainer.rollout.actions), "the decoder's actions are not those played")
        trainer.decoder.label(trainer.collector.frames)
        trainer.decoder.train()
        bench.wait()
        decoded = time.perf_counter()
    return {
        "ms per env step": round(1e3 * (played - begun) / steps, 3),
        "of it the game": round(1e3 * waited / steps, 3),
        "env steps/s": round(cfg.ppo.num_envs * steps / (learnt - begun)),
        "update ms": round(1e3 * (learnt - played), 2),
        "its host ms": round(1e3 * host, 2),
        "label and decoder ms": round(1e3 * (decoded - learnt), 1),
    }


def minutes_per_game(cfg: Config, results: dict[str, Any]) -> dict[str, float]:
    """Minutes that a game takes at these rates, as configured and compiled; loading left out."""
    first, second, third = (results[name] for name in ("stage 1", "stage 2", "stage 3"))
    labelled = workloads.published_frames(cfg) / second["windows labelled/s"]
    seconds = {
        "stage 1": cfg.stage1.steps * first["compiled"]["ms"] / 1e3,
        "stage 2": cfg.stage2.steps * second["compiled"]["ms"] / 1e3 + labelled,
        "stage 3": cfg.stage3.steps / third["env steps/s"],
        "compiling": sum(stage["compiled"]["first two steps s"] for stage in (first, second)),
    }
    return {name: round(value / 60, 2) for name, value in (seconds | {"all": sum(seconds.values())}).items()}


CHECKS: dict[str, Callable[[Bench], Any]] = {
    "environment": environment,
    "frames beyond 2**31 bytes": gather_far,
    "the same as on the CPU": same_as_cpu,
    "stage 1": stage1_speed,
    "stage 2": stage2_speed,
    "stage 3": stage3_speed,
    "chunks take turns while training": rolling,
    "a continued optimiser": continued,
    "two processes": collectives,
}

if __name__ == "__main__":
    run_main(main)
