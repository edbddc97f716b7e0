"""How fast the stages run here: `python benchmark.py --stage 1 --compare plain --json out.json`.

Every key of the config is an option too, as in the stages (`--preset demo`). `--compare plain` measures what
the published code does as well: fp32, not compiled, contiguous images, large freed blocks given back at once,
the world model's first layer over all constant channels; stage 2 inferring latents at every visit, with
gradients into the IDM; stage 3 running the trunk forwards and backwards in every epoch of PPO and inferring
latents at every step. All 80 published chunks are `--frames 2621440`; the chunks that are loaded are links to
one file, so the disk's speed plays no part.

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
import resource
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from lapo.benchmarks.workloads import Lap, Make, check_plain_load, prepared
from lapo.command_line import Parser
from lapo.config import Config, parse_with_config, to_dict
from lapo.data.chunks import WINDOW
from lapo.errors import UserError, run_main
from lapo.games.table import check_game
from lapo.reporting.tables import table
from lapo.runs.checkpoints import provenance
from lapo.runs.compute import Compute, keep_freed_memory, seed_everything
from lapo.runs.files import check_json, write_json

STAGES = ("1", "2", "3", "load")


def main() -> None:
    """Measure what the command line asks for."""
    benchmark(*parse())


def parse(argv: list[str] | None = None) -> tuple[argparse.Namespace, Config]:
    """The options of this script, and the config.

    Raises `UserError` for an impossible value.
    """
    parser = Parser(__doc__)
    parser.add_argument(
        "--stage",
        choices=STAGES,
        help="what to measure; without it, everything (load: reading chunks of frames)",
    )
    parser.add_argument(
        "--compare",
        choices=["plain"],
        help="also measure what the published code computes, and give the ratio",
    )
    parser.add_argument(
        "--repeats", type=int, default=3, help="timed steps, of which the median one is shown (3)"
    )
    parser.add_argument("--frames", type=int, default=8192, help="frames to train on or to load (8192)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers to this file")
    args, cfg = parse_with_config(parser, argv)
    for name, least in (("repeats", 1), ("frames", WINDOW)):
        if getattr(args, name) < least:
            raise UserError(f"--{name} is {getattr(args, name)}; there must be at least {least}")
    check_json(args.json)
    return args, cfg


def benchmark(args: argparse.Namespace, cfg: Config) -> dict:
    """Measure, print tables and write the numbers where asked; returns them as plain data."""
    made_by = provenance()  # now: what is committed meanwhile has not run
    fast = Compute.from_config(cfg)
    plain = Compute(fast.device, bf16=False, compile=False)
    stages = [args.stage] if args.stage else STAGES
    if {"3", "load"} & set(stages):
        check_game(cfg.env)
    if args.compare and "load" in stages:
        check_plain_load(args.frames)
    results = []
    for stage in stages:
        print(f"stage {stage}" if stage in "123" else stage, f"on {fast}", flush=True)
        with prepared(stage, cfg, args.frames, fast.device) as (make_fast, make_plain):
            keep = fast.device.type == "cpu"  # as `Compute` decides
            result = {"stage": stage, "path": "lapo"} | measure(make_fast, fast, args.repeats, cfg.seed, keep)
            results.append(result)
            if args.compare:
                other = {"stage": stage, "path": "plain"} | measure(make_plain, plain, args.repeats, cfg.seed)
                result["times_plain"] = other["seconds_per_step"] / result["seconds_per_step"]
                results.append(other)
    report = {"config": to_dict(cfg), "provenance": made_by, "results": results}
    if args.json:  # first, for nobody may be reading any more what is printed
        write_json(args.json, report)
    print(f"\n{rates_table(results)}\n\n{parts_table(results)}")
    if args.json:
        print(f"\nwritten to {args.json}")
    return report


# ---------------------------------------------------------------- measuring


def measure(make: Make, compute: Compute, repeats: int, seed: int, keep_memory: bool = False) -> dict:
    """Rates, FLOPs, memory and the parts' shares of what `make` makes, as plain data.

    `keep_memory`: the process keeps freed memory meanwhile, as it does in the stages on a CPU.
    The time of a step is the median of `repeats`; steps that compile or fill caches come before them.
    """
    device = compute.device
    seed_everything(seed)
    # A compiled function hides what it computes.
    gflop = count_gflop(make(replace(compute, compile=False)).step(0))
    reset_peaks(device)
    keep_freed_memory(keep_memory)
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
    keep_freed_memory(False)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_host_bytes() -> int:
    """Most memory that the process had since `reset_peaks`."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


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
