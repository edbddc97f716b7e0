"""How fast the stages run here: `python benchmark.py --stage 1 --compare reference --json out.json`.

Every key of the config is an option too, as in the stages (`--preset demo`). No data and no earlier stage is
needed: stages 1 and 2 see random frames, stage 3 and load play `--env`, and weights are random.

The reference computes what the published code computes, in fp32 (without TF32): not compiled, contiguous
images, large freed blocks given back at once, the world model's first layer over all constant channels; in
stage 2 latents inferred at every visit, with gradients into the IDM; in stage 3 the trunk run forwards and
backwards in every epoch of PPO, and latents inferred at every step.

Work that is not part of every step is spread over the steps, for data of the published size: in stage 1 the
probe, in stage 2 the latents, in stage 3 latents and decoder. Every part of a step is timed. The times shown
are those of the median of `--repeats` steps.

On a GPU, a wait after every part would distort the time of a step. Stages 1 and 2 are therefore also timed as
they train, 100 steps between two waits, and the rates count these. `device ms` is the time per step until the
device has finished all of them, `host ms` the time until the calls of a step have returned from an idle
device; where both are equal, the host limits the speed. Stage 3 waits for the actions of every env step, as
the stage does; PPO's minibatches follow each other without a wait.

FLOPs are those of convolutions and matrix products; a multiplication and an addition are two. `of matmul` is
their rate as a fraction of the device's rate for large matrix products in the same precision. `cores` is how
many cores were busy. On a CPU, fewer than its threads means that other work took the rest: measure again.
"""

import argparse
import contextlib
import gc
import resource
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from lapo.benchmarks.workloads import STORED_BYTES, TRAINING, Part, Workload, check_reference_load, prepared
from lapo.command_line import Parser
from lapo.config import Config, parse_with_config, to_dict
from lapo.errors import UserError, run_main
from lapo.games.table import check_game
from lapo.reporting.tables import table
from lapo.runs.checkpoints import provenance
from lapo.runs.compute import Compute, keep_freed_memory, seed_everything
from lapo.runs.files import check_json, write_json
from lapo.runs.graphs import EAGER_CALLS

STAGES = ("1", "2", "3", "load")
STEPS = 100
"""Training steps between two waits for a GPU."""


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
        type=lambda word: "reference" if word == "plain" else word,  # its name in older versions
        choices=["reference"],
        help="also measure the reference, and give the speed-up",
    )
    parser.add_argument(
        "--repeats", type=int, default=3, help="timed steps, of which the median one is shown (3)"
    )
    parser.add_argument("--frames", type=int, default=8192, help="frames to train on or to load (8192)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers to this file")
    args, cfg = parse_with_config(parser, argv)
    for name, least in (("repeats", 1), ("frames", cfg.data.window)):
        if getattr(args, name) < least:
            raise UserError(f"--{name} is {getattr(args, name)}; there must be at least {least}")
    check_json(args.json)
    return args, cfg


def benchmark(args: argparse.Namespace, cfg: Config) -> dict:
    """Measure, print tables and write the numbers where asked; returns them as plain data."""
    made_by = provenance()  # now: what is committed meanwhile has not run
    optimised = Compute.from_config(cfg)
    computes = {"optimised": optimised}
    if args.compare:
        computes["reference"] = Compute(optimised.device, bf16=False, compile=False)
    stages = [args.stage] if args.stage else STAGES
    if {"3", "load"} & set(stages):
        check_game(cfg.env)
    if args.compare and "load" in stages:
        check_reference_load(args.frames)
    results = []
    for stage in stages:
        print(f"stage {stage}" if stage in "123" else stage, f"on {optimised}", flush=True)
        with prepared(stage, cfg, args.frames, optimised.device) as make:
            for path, compute in computes.items():
                keep = path == "optimised" and compute.device.type == "cpu"  # as `Compute` decides
                measured = measure(partial(make, path), compute, args.repeats, cfg.seed, keep)
                results.append({"stage": stage, "path": path} | measured)
        if args.compare:
            mine, reference = results[-2:]
            mine["speed_up"] = reference["seconds_per_step"] / mine["seconds_per_step"]
    report = {"config": to_dict(cfg), "provenance": made_by, "results": results}
    if args.json:  # first, for nobody may be reading any more what is printed
        write_json(args.json, report)
    print(f"\n{rates_table(results)}\n\n{parts_table(results)}")
    if args.json:
        print(f"\nwritten to {args.json}")
    return report


# ---------------------------------------------------------------- measuring


def measure(
    make: Callable[[Compute], Workload], compute: Compute, repeats: int, seed: int, keep_memory: bool = False
) -> dict:
    """Rates, FLOPs, memory and the times of the parts of what `make` makes, as plain data.

    `keep_memory`: the process keeps freed memory meanwhile, as it does in the stages on a CPU.
    Steps that compile, record CUDA graphs or fill caches come before the timed ones.
    """
    device = compute.device
    seed_everything(seed)
    # A compiled function hides what it computes.
    gflop = count_gflop(make(replace(compute, compile=False, graphs=False)).step(0))
    reset_peaks(device)
    keep_freed_memory(keep_memory)
    workload = make(compute)
    warm_up = EAGER_CALLS + 2 if compute.graphs else 3 if compute.compile else 1
    host = training = None
    if workload.update and asynchronous(device):
        host, training = training_seconds(workload.update, device, warm_up)
    for number in range(warm_up):
        part_seconds(workload.step(number), device)
    # Read now, as the matrix products below also need memory.
    device_bytes = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    steps, rates = [], []
    started, worked = time.perf_counter(), time.process_time()
    for number in range(repeats):
        steps.append(part_seconds(workload.step(number + 3), device))
        if any(gflop.values()):
            rates.append(matmul_gflop_per_s(compute))  # now and then: other work on the machine slows both
    cores = (time.process_time() - worked) / (time.perf_counter() - started)
    parts = sorted(steps, key=lambda step: sum(step.values()))[repeats // 2]
    seconds = sum(parts.values())
    if training is not None:
        seconds += training - sum(parts[name] for name in TRAINING)
    result = {
        "device": str(compute),
        "samples_per_step": workload.samples,
        "seconds_per_step": seconds,
        "host_seconds_per_step": host,
        "device_seconds_per_step": training,
        "steps_per_s": 1 / seconds,
        "samples_per_s": workload.samples / seconds,
        "seconds": parts,
        "gflop": gflop,
        "cores": cores,
        "host_bytes": peak_host_bytes(),
        "device_bytes": device_bytes,
    }
    if rates:
        result["gflop_per_s"] = sum(gflop.values()) / seconds
        result["matmul_gflop_per_s"] = statistics.median(rates)
        result["matmul_fraction"] = result["gflop_per_s"] / result["matmul_gflop_per_s"]
    return result


def training_seconds(update: Callable[[int], Any], device: torch.device, warm_up: int) -> tuple[float, float]:
    """Seconds until the calls of a training step have returned, and per step until the device has finished.

    The first is the median of steps given to an idle device, as calls wait for a device with much to do; the
    second is the mean of `STEPS` steps between two waits. `warm_up` steps come before.
    """
    for number in range(warm_up):
        update(number)
    host = []
    for number in range(10):
        start = now(device)
        update(number)
        host.append(time.perf_counter() - start)
    start = now(device)
    for number in range(STEPS):
        update(number)
    return statistics.median(host), (now(device) - start) / STEPS


def asynchronous(device: torch.device) -> bool:
    """Whether calls return before `device` has done their work."""
    return device.type == "cuda"


def now(device: torch.device) -> float:
    """Seconds of a steady clock, once `device` has done all it was given."""
    if asynchronous(device):
        torch.cuda.synchronize(device)
    return time.perf_counter()


def part_seconds(step: Iterable[Part], device: torch.device) -> dict[str, float]:
    """Seconds of a step by the name of its parts."""
    seconds: dict[str, float] = defaultdict(float)
    start = now(device)
    for part in step:
        elapsed = now(device) - start if part.seconds is None else part.seconds
        seconds[part.name] += part.per_step * elapsed
        start += elapsed
    return dict(seconds)


def count_gflop(step: Iterable[Part]) -> dict[str, float]:
    """10⁹ FLOPs of a step by the name of its parts: convolutions and matrix products, backward ones too."""
    gflop: dict[str, float] = defaultdict(float)
    counter, before = FlopCounterMode(display=False), 0
    with counter:
        for part in step:
            if part.seconds is not None:
                continue  # time spent outside the networks
            total = counter.get_total_flops()
            gflop[part.name] += part.per_step * (total - before) / 1e9
            before = total
    return dict(gflop)


def matmul_gflop_per_s(compute: Compute) -> float:
    """10⁹ FLOP/s of large square matrix products in the precision of `compute`."""
    size, count = (8192, 10) if asynchronous(compute.device) else (2048, 1)
    dtype = torch.bfloat16 if compute.bf16 else torch.float32
    a, b = (torch.randn(size, size, device=compute.device).to(dtype) for _ in range(2))
    a @ b  # the first one also finds its memory
    start = now(compute.device)
    for _ in range(count):
        a @ b
    return count * 2 * size**3 / 1e9 / (now(compute.device) - start)


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
    """A row for each stage and path, without the columns that are empty in all of them."""
    rows = []
    for result in results:
        decoded = result["samples_per_s"] * STORED_BYTES / 1e6
        rows.append(
            {
                "stage": result["stage"],
                "path": result["path"],
                "steps/s": f"{result['steps_per_s']:.3g}",
                "samples/s": f"{result['samples_per_s']:,.0f}",
                "MB/s": f"{decoded:,.0f}" if result["stage"] == "load" else "",
                "GFLOP/s": shown(result.get("gflop_per_s"), ",.0f"),
                "of matmul": shown(result.get("matmul_fraction"), ".0%"),
                "host ms": shown(result["host_seconds_per_step"], ".2f", 1e3),
                "device ms": shown(result["device_seconds_per_step"], ".2f", 1e3),
                "cores": f"{result['cores']:.1f}",
                "host GB": shown(result["host_bytes"], ".2f", 1e-9),
                "device GB": shown(result["device_bytes"], ".2f", 1e-9),
                "speed-up": shown(result.get("speed_up"), ".1f") + "×" * ("speed_up" in result),
            }
        )
    head = [column for column in rows[0] if any(row[column] for row in rows)]
    return table(head, [[row[column] for column in head] for row in rows])


def shown(value: float | None, form: str, scale: float = 1) -> str:
    """`value`, times `scale`, in the given format; empty for None."""
    return "" if value is None else format(scale * value, form)


def parts_table(results: list[dict]) -> str:
    """A row for each part of a step: its time, alone and relative to the sum of all, and its rate."""
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
                    f"{seconds / sum(result['seconds'].values()):.1%}",
                    f"{rate:,.0f}" if gflop else "",
                    f"{rate / result['matmul_gflop_per_s']:.0%}" if gflop else "",
                ]
            )
    return table(["stage", "path", "part", "s per step", "of the time", "GFLOP/s", "of matmul"], rows)


if __name__ == "__main__":
    run_main(main)
