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
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
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
from lapo.ppo import PPOTrainer
from lapo.runs.checkpoints import provenance
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
        if dry:
            return cls(dry, CPU, load_config([*demo, *DRY.split()]), load_config([*demo, *DRY.split()]))
        return cls(dry, torch.device("cuda:0"), load_config(demo), load_config(["--env", "jumper"]))

    def compute(self, *, bf16: bool = True, compiled: bool = True, graphs: bool = False) -> Compute:
        """How tensors are computed; in a dry run nothing is compiled and there are no CUDA graphs."""
        return Compute(self.device, bf16, compiled and not self.dry, graphs and not self.dry)

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


class CheckError(Exception):
    """Something was found not to be as it should."""


def expect(holds: bool, sentence: str) -> None:
    """Raise CheckError with `sentence` unless it `holds`."""
    if not holds:
        raise CheckError(sentence)


def main() -> None:
    """Run the checks, print a line for each and write the results where asked."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="only checks whose names begin like this")
    parser.add_argument(
        "--dry", action="store_true", help="small sizes on the CPU, to try the checks themselves"
    )
    args = parser.parse_args()
    check_json(args.json)
    checks = {
        name: check for name, check in CHECKS.items() if not args.only or name.startswith(tuple(args.only))
    }
    if not checks:
        raise UserError(f"--only {' '.join(args.only)} names no check; there are: {', '.join(CHECKS)}")
    if run_checks(Bench.make(args.dry), checks, args.json):
        sys.exit(1)


def run_checks(
    bench: Bench, checks: dict[str, Callable[["Bench"], Any]], file: Path | None = None
) -> list[str]:
    """Run `checks` by name; returns the names of those that failed.

    Whatever is known is written to `file` after every check, over what it holds of the same check.
    """
    started, failed = time.perf_counter(), []
    results = json.loads(file.read_text(encoding="utf-8")) if file and file.exists() else {}
    for name, function in checks.items():
        start = time.perf_counter()
        try:
            gc.collect()  # trainers refer to themselves by way of their compiled functions
            torch.compiler.reset()
            found = function(bench)
        except Exception as error:  # whatever it is, the other checks still tell something
            traceback.print_exc()
            found = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            failed.append(name)
        seconds, verdict = time.perf_counter() - start, "FAILED" if name in failed else "ok"
        print(f"{verdict:<7}{name} ({seconds:.1f} s): {found}", flush=True)
        results[name] = {"verdict": verdict, "found": found, "seconds": round(seconds, 1)} | provenance()
        if file:
            write_json(file, results)
    if not bench.dry:
        for path in ("compiled", "graphs"):
            with contextlib.suppress(KeyError, TypeError):  # where a rate is missing
                minutes = minutes_per_game(bench.full, results, path)
                print(f"minutes per game without loading, {path}: {minutes}")
    seconds = time.perf_counter() - started
    print(f"{len(failed)} of {len(checks)} failed{': ' * bool(failed)}{', '.join(failed)}; {seconds:.0f} s")
    return failed


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
    expected = first_step(bench.demo, Compute(CPU, bf16=False, compile=False))
    found = {}
    for name, bf16, compiled, tolerance in (
        ("fp32", False, False, 1e-3),
        ("bf16 compiled", True, True, 0.1),
    ):
        got = first_step(bench.demo, bench.compute(bf16=bf16, compiled=compiled))
        found[name] = difference([got], [expected])
        expect(found[name] < tolerance, f"in {name}, the gradients differ by {found[name]:.1e}")
    return found


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
    """Pools of chunks are exchanged under a busy device: every batch holds the frames that it should.

    The work that keeps it busy is recorded as a CUDA graph while chunks are on their way.
    """

    def many_products(x: Tensor) -> Tensor:
        for _ in range(20):
            x = (x @ x).clamp(-1, 1)
        return x

    work = bench.compute(graphs=True).replayed(many_products)
    with TemporaryDirectory() as name:
        folder, rng = Path(name), np.random.default_rng(0)
        for number in range(6):
            size = (60 if bench.dry else 3000, *FRAME_SHAPE)
            write_chunk(folder / f"{number}.npz", {"obs": rng.integers(256, size=size, dtype=np.uint8)})
        truth = Windows(folder, device=CPU)
        windows = RollingWindows(folder, device=bench.device, pool_chunks=2)
        x = torch.randn(512, 512, device=bench.device)
        wrong = torch.zeros((), dtype=torch.int64, device=bench.device)
        batches = 2 * len(windows) // 32
        for step in range(batches):
            ids = windows.batch(step, 32, 0)
            expected = truth.gather(ids.cpu()).to(bench.device)
            work(x)  # the gather is still to be done when the next batch fetches a pool
            wrong += (windows.gather(ids) != expected).any()
        expect(not wrong.item(), f"{wrong} of {batches} batches hold other frames")
    return f"{batches} batches"


def continued(bench: Bench) -> dict[str, float]:
    """A trainer continued from its saved state makes the step that the first one makes, as one begun anew."""
    with deterministic():
        compute, windows = bench.compute(bf16=False, compiled=False), bench.windows(64)
        trainer, again, other = (stage1_trainer(bench.demo, compute, windows) for _ in range(3))
        for each in (trainer, again):
            torch.manual_seed(0)  # the codebook starts from latents drawn at random
            each.update(0)
        with TemporaryDirectory() as folder:
            path = Path(folder) / "state.pt"
            torch.save(trainer.state_dict(), path)
            other.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        places = [each.optimizer.param_groups[0]["lr"].device for each in (trainer, other)]
        expect(
            places[0] == places[1], f"the learning rate lies on {places[0]}, once continued on {places[1]}"
        )
        for each in (trainer, again, other):
            each.update(1)
    first, second, third = ([p.detach() for p in each.params] for each in (trainer, again, other))
    noise, found = difference(second, first), difference(third, first)
    expect(found <= 10 * noise + 1e-6, f"the weights differ by {found:.1e}, those of two runs by {noise:.1e}")
    return {"difference of the weights": found, "of two runs": noise}


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    """cuDNN takes algorithms that give equal results to equal inputs."""
    torch.backends.cudnn.deterministic = True
    try:
        yield
    finally:
        torch.backends.cudnn.deterministic = False


def graphs_do_the_same(
    bench: Bench, train: Callable[[Bench, Compute], list[Tensor]], compiled: bool
) -> dict[str, float]:
    """What `train` computes by CUDA graphs is what it computes without, up to what two runs differ by.

    Compiled and in bf16, or neither.
    """
    with deterministic():
        first, again, replayed = (
            train(bench, bench.compute(bf16=compiled and not bench.dry, compiled=compiled, graphs=graphs))
            for graphs in (False, False, True)
        )
    noise, found = difference(again, first), difference(replayed, first)
    expect(found <= 10 * noise + 1e-6, f"they differ by {found:.1e}, two runs by {noise:.1e}")
    return {"difference": found, "of two runs": noise}


def train_stage1(bench: Bench, compute: Compute) -> list[Tensor]:
    """All weights and statistics of stage 1 after a few steps, and their metrics."""
    torch.compiler.reset()
    trainer = stage1_trainer(bench.demo, compute, bench.windows(1000))
    metrics = [x.clone() for step in range(8) for x in trainer.update(step).values()]
    state = [*trainer.idm.state_dict().values(), *trainer.world_model.state_dict().values()]
    return [torch.stack(metrics), *(x.float() for x in state)]


def train_stage2(bench: Bench, compute: Compute) -> list[Tensor]:
    """All weights of stage 2 after a few steps, and its losses."""
    torch.compiler.reset()
    windows = bench.windows(1000)
    seed_everything(0)
    la = torch.randn(len(windows), bench.demo.vq.la_dim).to(bench.device)
    policy = compute.place(make_latent_policy(bench.demo))
    trainer = stage2_bc.Trainer(bench.demo, compute, windows, la, policy)
    losses = [trainer.update(step)["loss"].clone() for step in range(8)]
    return [torch.stack(losses), *(x.float() for x in policy.state_dict().values())]


def play(bench: Bench, compute: Compute) -> list[Tensor]:
    """Two updates of online mode: what was done in them and what the decoder learnt from."""
    torch.compiler.reset()
    seed_everything(0)
    with contextlib.closing(workloads.TimedEnv.of(bench.demo)) as env:
        trainer = online_trainer(bench.demo, compute, env)
        played = []
        for update in range(1, 3):
            trainer.improve(1024 * update, trainer.collect())  # where all learning rates are high
            trainer.decoder.label(trainer.rollout)
            rollout = trainer.rollout
            seen = rollout.actions, rollout.logprobs, rollout.values, rollout.frames
            played += [x.float().clone() for x in seen]
        learnt = [p.detach() for p in trainer.policy.parameters()]
        return [*played, *learnt, *trainer.decoder.la, *(x.float() for x in trainer.decoder.ta)]


def online_trainer(cfg: Config, compute: Compute, env: workloads.TimedEnv) -> PPOTrainer:
    """What trains in online mode, on random weights."""
    states = {
        "stage1": {"idm": make_idm(cfg).state_dict()},
        "stage2": {"policy": make_latent_policy(cfg).state_dict()},
    }
    return stage3_decode.online_trainer(cfg, compute, states, env)


def collectives(bench: Bench) -> str:
    """Two processes meet, compare numbers on the CPU and part, as torchrun starts them."""
    code = "from lapo.runs.ranks import greatest, joined, share\n"
    code += "with joined():\n    assert greatest(share().rank, 7) == (1, 7)\n"
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]
    run([*launcher, sys.executable, "-c", code])
    return "ok"


def run(words: list[str], stop_at: Path | None = None) -> str:
    """What a Python command prints. Once the file `stop_at` is there, SIGTERM tells it to stop."""
    process = subprocess.Popen(
        [sys.executable, *words],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    if stop_at:
        while not stop_at.exists() and process.poll() is None:
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
    out, errors = process.communicate(timeout=300)
    lines = [line for line in errors.splitlines() if "rror" in line]
    wanted = 128 + signal.SIGTERM if stop_at else 0
    expect(process.returncode == wanted, "; ".join(lines)[-400:] or (out + errors)[-400:])
    return out


def real_run(bench: Bench) -> dict[str, Any]:
    """Frames are recorded, the stages train on them, stopped once and continued, and the policy plays."""
    with TemporaryDirectory() as folder:
        data = ["--data-dir", f"{folder}/data"]
        options = [
            "--env",
            "jumper",
            "--preset",
            "demo",
            *data,
            "--results-dir",
            folder,
            "--eval.episodes",
            "64",
        ]
        if bench.dry:
            options += ["--device", "cpu", *DRY.split(), "--probe.windows", "64", "--eval.episodes", "4"]
        else:
            options += ["--compile", "graphs"]
        train, test, steps, env_steps = (512, 256, 20, 64) if bench.dry else (16384, 4096, 3000, 32768)
        start = time.perf_counter()
        record = ["--env", "jumper", "--visuals", "plain", "--expert", "planner", "--noise", "0.2", *data]
        run(["lapo/record_expert.py", *record, "--frames", str(train), "--test-frames", str(test)])
        recorded = time.perf_counter()
        first = ["lapo/stage1.py", *options, "--stage1.steps", str(steps), "--stage1.log-every", "5"]
        run(first, stop_at=Path(folder) / "demo/jumper/seed0/stage1/metrics.jsonl")
        printed = run(first)
        expect("continues from step" in printed, f"stage 1 began anew: {printed}")
        run(["lapo/stage2.py", *options, "--stage2.steps", str(steps)])
        printed = run(
            ["lapo/stage3.py", *options, "--stage3.mode", "online", "--stage3.steps", str(env_steps)]
        )
        numbers = dict(re.findall(r"^  (\w+) +(\S+)$", printed, re.MULTILINE))
        return {
            "frames recorded/s": round((train + test) / (recorded - start)),
            "seconds of the stages": round(time.perf_counter() - recorded, 1),
            "return": float(numbers["return_mean"]),
        }


# ---------------------------------------------------------------- fast


def stage1_speed(bench: Bench, **options: bool) -> dict[str, Any]:
    """Steps of stage 1."""
    windows = bench.windows(20_000)
    return speed(bench, lambda compute: stage1_trainer(bench.full, compute, windows), **options)


def stage2_speed(bench: Bench, **options: bool) -> dict[str, Any]:
    """Steps of stage 2."""
    cfg, windows = bench.full, bench.windows(20_000)
    la = torch.randn(len(windows), cfg.vq.la_dim, device=bench.device)

    def trainer(compute: Compute) -> stage2_bc.Trainer:
        return stage2_bc.Trainer(cfg, compute, windows, la, compute.place(make_latent_policy(cfg)))

    return speed(bench, trainer, **options)


def inference_speed(bench: Bench) -> dict[str, int]:
    """Windows whose latent actions the IDM infers."""
    windows, compute = bench.windows(20_000), bench.compute(compiled=False)
    idm = compute.place(make_idm(bench.full)).eval()
    ids = windows.all()
    infer_latents(idm, windows.iter_frames(ids[:512]), compute)
    bench.wait()
    start = time.perf_counter()
    infer_latents(idm, windows.iter_frames(ids), compute)
    bench.wait()
    return {"windows/s": round(len(windows) / (time.perf_counter() - start))}


def speed(
    bench: Bench,
    make: Callable[[Compute], stage1_idm_wm.Trainer | stage2_bc.Trainer],
    *,
    compiled: bool = True,
    graphs: bool = False,
    benchmark: bool = False,
) -> dict[str, Any]:
    """Milliseconds per step, of them the host's, over many steps between two waits; memory and kernels.

    Fails if a step waits for the device, or compiles anew after the first five.
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
        for step in range(5):  # a graph is recorded in the fourth
            trainer.update(step)
        bench.wait()
        first = time.perf_counter() - start
        with bench.no_waiting():
            for step in range(5, 8):  # the epoch's order is on the device by now
                trainer.update(step)
        torch._dynamo.config.error_on_recompile = compiled
        bench.wait()
        start = time.perf_counter()
        for step in range(8, 8 + count):
            trainer.update(step)
        host = time.perf_counter() - start
        bench.wait()
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
    """How many kernels a step launches, and how long the device works on them.

    In a dry run, the operators of the CPU in their place.
    """
    activities = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[activities.CPU if bench.dry else activities.CUDA]) as profile:
        step()
        bench.wait()
    kind = torch.autograd.DeviceType.CPU if bench.dry else torch.autograd.DeviceType.CUDA
    rows = [row for row in profile.key_averages() if row.device_type == kind]  # not the calls of the runtime
    busy = sum(row.self_cpu_time_total if bench.dry else row.self_device_time_total for row in rows)
    return {"kernels": sum(row.count for row in rows), "device busy ms": round(busy / 1e3, 3)}


def stage3_speed(bench: Bench, graphs: bool) -> dict[str, float]:
    """Milliseconds of an update of stage 3's online mode and of its parts: the last one of four."""
    torch.compiler.reset()
    cfg = bench.full
    with contextlib.closing(workloads.TimedEnv.of(cfg)) as env:
        trainer = online_trainer(cfg, bench.compute(graphs=graphs), env)
        steps = cfg.ppo.rollout_steps
        for update in range(1, 5):
            env.take_waited()
            bench.wait()
            begun = time.perf_counter()
            value = trainer.collect()
            bench.wait()
            played = time.perf_counter()
            with bench.no_waiting() if update == 4 else contextlib.nullcontext():  # the first one compiles
                trainer.improve(update * steps * cfg.ppo.num_envs, value)
            host = time.perf_counter() - played
            bench.wait()
            learnt = time.perf_counter()
        waited = env.take_waited()
        trainer.decoder.label(trainer.rollout)
        bench.wait()
        labelled = time.perf_counter()
        trainer.decoder.train()
        bench.wait()
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
        "latents ms": round(1e3 * (labelled - learnt), 1),
        "decoder ms": round(1e3 * (decoded - labelled), 1),
        **{f"{key}, a decision": value for key, value in deciding.items()},
        **{f"{key}, a minibatch": value for key, value in learning.items()},
    }


def minutes_per_game(cfg: Config, results: dict[str, Any], path: str) -> dict[str, float]:
    """Minutes that a game takes at the rates of `path`, as configured; loading left out."""
    first, second, third = (results[f"stage {number}, {path}"]["found"] for number in (1, 2, 3))
    inferred = workloads.published_frames(cfg) / results["latents inferred"]["found"]["windows/s"]
    seconds = {
        "stage 1": cfg.stage1.steps * first["ms"] / 1e3,
        "stage 2": cfg.stage2.steps * second["ms"] / 1e3 + inferred,
        "stage 3": cfg.stage3.steps / third["env steps/s"],
        "compiling": sum(stage["first five steps s"] for stage in (first, second)),
    }
    return {name: round(value / 60, 2) for name, value in (seconds | {"all": sum(seconds.values())}).items()}


CHECKS: dict[str, Callable[[Bench], Any]] = {
    "environment": environment,
    "two processes": collectives,
    "frames beyond 2**31 bytes": gather_far,
    "the same as on the CPU": same_as_cpu,
    "a continued optimiser": continued,
    "chunks take turns while training": rolling,
    "graphs in stage 1, eager": partial(graphs_do_the_same, train=train_stage1, compiled=False),
    "graphs in stage 2, eager": partial(graphs_do_the_same, train=train_stage2, compiled=False),
    "graphs in stage 3, eager": partial(graphs_do_the_same, train=play, compiled=False),
    "graphs in stage 1, compiled": partial(graphs_do_the_same, train=train_stage1, compiled=True),
    "graphs in stage 2, compiled": partial(graphs_do_the_same, train=train_stage2, compiled=True),
    "graphs in stage 3, compiled": partial(graphs_do_the_same, train=play, compiled=True),
    "stage 3, compiled": partial(stage3_speed, graphs=False),
    "stage 3, graphs": partial(stage3_speed, graphs=True),
    "latents inferred": inference_speed,
    "stage 2, eager": partial(stage2_speed, compiled=False),
    "stage 2, compiled": stage2_speed,
    "stage 2, graphs": partial(stage2_speed, graphs=True),
    "stage 1, eager": partial(stage1_speed, compiled=False),
    "stage 1, compiled": stage1_speed,
    "stage 1, graphs": partial(stage1_speed, graphs=True),
    "a real run": real_run,
    "cudnn.benchmark in stage 1": partial(stage1_speed, graphs=True, benchmark=True),
}

if __name__ == "__main__":
    run_main(main)
