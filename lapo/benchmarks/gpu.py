"""Checks of the stages on a CUDA device: results, synchronisation in training loops, speed.

    make gpu                                    or: python -m lapo.benchmarks.gpu
    make gpu ARGS="--json gpu.json"             also write the numbers to a file
    make gpu ARGS=--dry                         small sizes on the CPU, to test the checks themselves

Frames and weights are random, so neither data nor earlier stages are needed. Each check prints a line. After
a failure the other checks still run. Exit status: 0 all passed, 1 one failed, 2 no CUDA device.
"""

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
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lapo import stage2_bc
from lapo.benchmarks import workloads
from lapo.benchmarks.gpu_speed import (
    CPU,
    DRY,
    Bench,
    inference_speed,
    minutes_per_game,
    stage1_speed,
    stage1_trainer,
    stage2_speed,
    stage3_speed,
)
from lapo.command_line import Parser
from lapo.config import ROOT, Config
from lapo.data.chunks import write_chunk
from lapo.data_loader import WHOLE, RollingWindows, Windows
from lapo.errors import UserError, run_main
from lapo.models import make_latent_policy
from lapo.runs.checkpoints import provenance
from lapo.runs.compute import Compute, seed_everything
from lapo.runs.files import check_json, write_json


class CheckError(Exception):
    """A check has failed."""


def expect(holds: bool, sentence: str) -> None:
    """Raise CheckError with `sentence` unless `holds`."""
    if not holds:
        raise CheckError(sentence)


def main() -> None:
    """Run the checks, print a line for each, and write the results if a file is given."""
    parser = Parser(__doc__)
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="only checks whose names begin with this")
    parser.add_argument(
        "--dry", action="store_true", help="small sizes on the CPU, to test the checks themselves"
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
    """Run `checks`; returns the names of those that failed.

    After every check the results are written to `file`. Results of other checks in it are kept.
    """
    started, failed = time.perf_counter(), []
    results = json.loads(file.read_text(encoding="utf-8")) if file and file.exists() else {}
    for name, function in checks.items():
        start = time.perf_counter()
        try:
            gc.collect()  # trainers contain reference cycles through their compiled functions
            torch.compiler.reset()
            found = function(bench)
        except Exception as error:  # the other checks are still informative
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
            with contextlib.suppress(KeyError, TypeError):  # if a rate is missing
                minutes = minutes_per_game(bench.full, results, path)
                print(f"minutes per game without loading, {path}: {minutes}")
    seconds = time.perf_counter() - started
    print(f"{len(failed)} of {len(checks)} failed{': ' * bool(failed)}{', '.join(failed)}; {seconds:.0f} s")
    return failed


# ---------------------------------------------------------------- equal results


def environment(bench: Bench) -> dict[str, Any]:
    """Versions and hardware. Fails without a compiler or Python.h."""
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


FRAME_SHAPE = 64, 64, 3


class CountedWindows(Windows):
    """Frames made on the device; the first bytes of each are its index."""

    window = 3

    def __init__(self, count: int, device: torch.device):
        self.shard, self.num_bad, self.unlabelled = WHOLE, 0, []
        self.frames = torch.zeros((count, *FRAME_SHAPE), dtype=torch.uint8, device=device)
        numbers = torch.arange(count, dtype=torch.int32, device=device)
        self.frames.view(count, -1)[:, :4] = numbers[:, None].view(torch.uint8)
        self.index(ROOT, [np.arange(count - self.window + 1)], [None], count, device)


def gather_large(bench: Bench) -> str:
    """Windows are gathered correctly from more than 2**31 bytes of frames."""
    free = 6e6 if bench.dry else min(0.6 * torch.cuda.mem_get_info()[0], 33e9)
    expect(bench.dry or free > 2**32, f"{free / 1e9:.1f} GB are available, too little for this check")
    count = int(free // np.prod(FRAME_SHAPE))
    windows = CountedWindows(count, bench.device)
    ids = torch.tensor([0, count // 2, count - windows.window], device=bench.device)
    frames = windows.gather(ids).flatten(2)[..., :4].contiguous()
    expected = ids[:, None] + torch.arange(windows.window, device=bench.device)
    expect(torch.equal(frames.view(torch.int32).squeeze(-1), expected.int()), "wrong frames were gathered")
    return f"{count:,} frames"


def same_as_cpu(bench: Bench) -> dict[str, float]:
    """Gradients of stage 1's first step equal those of the CPU in fp32."""
    expected = first_step(bench.compared, Compute(CPU, bf16=False, compile=False))
    found = {}
    for name, bf16, compiled, tolerance in (
        ("fp32", False, False, 1e-3),
        ("bf16 compiled", True, True, 0.1),
    ):
        got = first_step(bench.compared, bench.compute(bf16=bf16, compiled=compiled))
        found[name] = difference([got], [expected])
        expect(found[name] < tolerance, f"in {name}, the gradients differ by {found[name]:.1e}")
    return found


def first_step(cfg: Config, compute: Compute) -> Tensor:
    """All gradients of the first step on 64 random frames, in one vector."""
    trainer = stage1_trainer(cfg, compute, workloads.random_windows(64, compute.device))
    trainer.idm.vq.start = "published"  # "data" draws from the device's generator
    trainer.backward(trainer.load(0))
    return torch.cat([p.grad.float().flatten() for p in trainer.params])


def difference(found: Iterable[Tensor], expected: Iterable[Tensor]) -> float:
    """Largest distance |found - expected| / |expected| (2-norms) over pairs of tensors."""
    pairs = zip(found, expected, strict=True)
    return max(float((a.cpu() - b.cpu()).norm() / (b.cpu().norm() + 1e-12)) for a, b in pairs)


def rolling(bench: Bench) -> str:
    """Batches hold the right frames although pools of chunks are replaced while the device is busy.

    The work that keeps the device busy is captured as a CUDA graph while chunks are being copied.
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
            work(x)  # the gather is still queued when the next batch loads a pool
            wrong += (windows.gather(ids) != expected).any()
        expect(not wrong.item(), f"{wrong} of {batches} batches hold wrong frames")
    return f"{batches} batches"


def resumed(bench: Bench) -> dict[str, float]:
    """The next step of a resumed trainer equals that of the saved one, up to the noise of two equal runs."""
    with deterministic():
        compute, windows = bench.compute(bf16=False, compiled=False), bench.windows(64)
        trainer, again, other = (stage1_trainer(bench.compared, compute, windows) for _ in range(3))
        for each in (trainer, again):
            torch.manual_seed(0)  # the codebook is initialised with randomly chosen latents
            each.update(0)
        with TemporaryDirectory() as folder:
            path = Path(folder) / "state.pt"
            torch.save(trainer.state_dict(), path)
            other.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        devices = [each.optimizer.param_groups[0]["lr"].device for each in (trainer, other)]
        expect(devices[0] == devices[1], f"the learning rate lies on {devices[0]}, resumed on {devices[1]}")
        for each in (trainer, again, other):
            each.update(1)
    first, second, third = ([p.detach() for p in each.params] for each in (trainer, again, other))
    noise, found = difference(second, first), difference(third, first)
    expect(
        found <= 10 * noise + 1e-6,
        f"the weights differ by {found:.1e}, those of two equal runs by {noise:.1e}",
    )
    return {"difference of the weights": found, "of two runs": noise}


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    """Restrict cuDNN to deterministic algorithms."""
    torch.backends.cudnn.deterministic = True
    try:
        yield
    finally:
        torch.backends.cudnn.deterministic = False


def graphs_equal_eager(
    bench: Bench, train: Callable[[Bench, Compute], list[Tensor]], compiled: bool
) -> dict[str, float]:
    """Results of `train` are the same with CUDA graphs as without, up to the noise of two equal runs.

    `compiled`: compiled and in bf16; otherwise eager and in fp32.
    """
    with deterministic():
        first, again, replayed = (
            train(bench, bench.compute(bf16=compiled and not bench.dry, compiled=compiled, graphs=graphs))
            for graphs in (False, False, True)
        )
    noise, found = difference(again, first), difference(replayed, first)
    expect(
        found <= 10 * noise + 1e-6, f"results differ by {found:.1e}, those of two equal runs by {noise:.1e}"
    )
    return {"difference": found, "of two runs": noise}


def train_stage1(bench: Bench, compute: Compute) -> list[Tensor]:
    """Metrics, weights and buffers of stage 1 after a few steps."""
    torch.compiler.reset()
    trainer = stage1_trainer(bench.compared, compute, bench.windows(1000))
    metrics = [x.clone() for step in range(8) for x in trainer.update(step).values()]
    state = [*trainer.idm.state_dict().values(), *trainer.world_model.state_dict().values()]
    return [torch.stack(metrics), *(x.float() for x in state)]


def train_stage2(bench: Bench, compute: Compute) -> list[Tensor]:
    """Losses and weights of stage 2 after a few steps."""
    torch.compiler.reset()
    windows = bench.windows(1000)
    seed_everything(0)
    la = torch.randn(len(windows), bench.compared.vq.la_dim).to(bench.device)
    policy = compute.place(make_latent_policy(bench.compared))
    trainer = stage2_bc.Trainer(bench.compared, compute, windows, la, policy)
    losses = [trainer.update(step)["loss"].clone() for step in range(8)]
    return [torch.stack(losses), *(x.float() for x in policy.state_dict().values())]


def play(bench: Bench, compute: Compute) -> list[Tensor]:
    """Rollouts, weights and the decoder's pairs of two updates of online mode."""
    torch.compiler.reset()
    seed_everything(0)
    with contextlib.closing(workloads.TimedEnv.of(bench.compared)) as env:
        trainer = workloads.online_trainer(bench.compared, compute, env)
        rollouts = []
        for update in range(1, 3):
            trainer.improve(1024 * update, trainer.collect())  # at env steps where no learning rate is 0
            trainer.decoder.infer_latents(trainer.rollout)
            rollout = trainer.rollout
            stored = rollout.actions, rollout.logprobs, rollout.values, rollout.frames
            rollouts += [x.float().clone() for x in stored]
        weights = [p.detach() for p in trainer.policy.parameters()]
        return [*rollouts, *weights, *trainer.decoder.la, *(x.float() for x in trainer.decoder.ta)]


def collectives(bench: Bench) -> str:
    """Two processes of torchrun form a process group, all-reduce numbers on the CPU, and exit."""
    code = "from lapo.runs.ranks import all_max, distributed, shard\n"
    code += "with distributed():\n    assert all_max(shard().rank, 7) == (1, 7)\n"
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]
    run([*launcher, sys.executable, "-c", code])
    return "ok"


def run(words: list[str], stop_at: Path | None = None) -> str:
    """Run a Python command and return its output. SIGTERM stops it once the file `stop_at` exists."""
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
    expected = 128 + signal.SIGTERM if stop_at else 0
    expect(process.returncode == expected, "; ".join(lines)[-400:] or (out + errors)[-400:])
    return out


def real_run(bench: Bench) -> dict[str, Any]:
    """A short run: recording, the three stages, evaluation. Stage 1 is stopped and resumed."""
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
        train, test, steps, env_steps = (512, 256, 20, 64) if bench.dry else (16384, 4096, 1000, 8192)
        start = time.perf_counter()
        record = ["--env", "jumper", "--visuals", "plain", "--expert", "planner", "--noise", "0.2", *data]
        run(["lapo/record_expert.py", *record, "--frames", str(train), "--test-frames", str(test)])
        recorded = time.perf_counter()
        first = ["lapo/stage1.py", *options, "--stage1.steps", str(steps), "--stage1.log-every", "5"]
        # The part before the stop is not compiled, which would take a minute.
        stopped_at = Path(folder) / "demo/jumper/seed0/stage1/metrics.jsonl"
        run([*first, "--compile", "off"], stop_at=stopped_at)
        printed = run(first)
        expect("continues from step" in printed, f"stage 1 was not resumed: {printed}")
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


CHECKS: dict[str, Callable[[Bench], Any]] = {
    "environment": environment,
    "two processes": collectives,
    "frames beyond 2**31 bytes": gather_large,
    "the same as on the CPU": same_as_cpu,
    "a continued optimiser": resumed,
    "chunks take turns while training": rolling,
    "graphs in stage 1, eager": partial(graphs_equal_eager, train=train_stage1, compiled=False),
    "graphs in stage 2, eager": partial(graphs_equal_eager, train=train_stage2, compiled=False),
    "graphs in stage 3, eager": partial(graphs_equal_eager, train=play, compiled=False),
    "graphs in stage 1, compiled": partial(graphs_equal_eager, train=train_stage1, compiled=True),
    "graphs in stage 2, compiled": partial(graphs_equal_eager, train=train_stage2, compiled=True),
    "graphs in stage 3, compiled": partial(graphs_equal_eager, train=play, compiled=True),
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
