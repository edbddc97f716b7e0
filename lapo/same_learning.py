"""Does the optimised path learn the same? `python same_learning.py --preset demo --env jumper`

Trains stage 1 by the reference and the optimised path, from the same weights and on the same batches, with a
few seeds. The reference computes what the published code computes: fp32, not compiled, contiguous images, the
world model's first layer over all constant channels. The optimised path is what `stage1.py` does with this
config. No run's folder is touched.

Every key of the config is an option too, as in the stages (`--stage1.steps 1000`).
"""

import argparse
import gc
import json
import math
import statistics
from collections import deque
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

from lapo.benchmarks.workloads import Networks, reference_stage1_networks, stage1_networks
from lapo.command_line import Parser
from lapo.config import Config, diff, parse_with_config, to_dict
from lapo.data.checks import check_data, check_frames
from lapo.data_loader import Windows, read_splits
from lapo.errors import UserError, run_main
from lapo.reporting.tables import table
from lapo.runs.checkpoints import provenance
from lapo.runs.compute import Compute, seed_everything, to_floats
from lapo.runs.files import check_json, write_json
from lapo.stage1_idm_wm import Trainer

LAST = 100
"""Steps at the end whose training loss is averaged."""
CONFIG_KEYS = "env", "visuals", "precision", "data", "model", "vq", "stage1", "probe"
"""Of the configuration, what all runs in a file must share."""
METRICS = "wm_loss", "wm_loss_test", "probe_acc_test"

OLD_PATHS = {"plain": "reference", "fast": "optimised"}
"""What files of older versions call the paths."""

NETWORKS: dict[str, Networks] = {"reference": reference_stage1_networks, "optimised": stage1_networks}


def main() -> None:
    """Compare as the command line asks."""
    compare(*parse())


def parse(argv: list[str] | None = None) -> tuple[argparse.Namespace, Config]:
    """The options of this script, and the config.

    Raises `UserError` for an impossible value.
    """
    parser = Parser(__doc__)
    parser.add_argument(
        "--seeds", type=int, default=3, metavar="N", help="how many seeds, from --seed on (3)"
    )
    parser.add_argument(
        "--json",
        type=Path,
        metavar="FILE",
        help="also write the numbers to this file, after every run; the same command continues there",
    )
    args, cfg = parse_with_config(parser, argv)
    if args.seeds < 1:
        raise UserError(f"--seeds is {args.seeds}; there must be at least 1")
    check_json(args.json)
    return args, cfg


def compare(args: argparse.Namespace, cfg: Config) -> dict:
    """Train all runs, print the tables and write the numbers where asked; returns them as plain data.

    Finished runs in the file are not made again. Raises `UserError` if it is of another configuration, or if
    a metric is not finite.
    """
    optimised = Compute.from_config(cfg)
    reference = Compute(optimised.device, bf16=False, compile=False)
    computes = {"reference": reference, "optimised": optimised}
    check_data(cfg.env, cfg.game_data)
    check_frames(cfg.env, cfg.game_data, cfg.visuals)
    report = read(args.json, cfg)
    splits = read_splits(cfg, optimised.device)
    runs = {(run["seed"], run["path"]): run for run in report["runs"]}
    compared = [(seed, path) for seed in range(cfg.seed, cfg.seed + args.seeds) for path in computes]
    for seed, path in compared:
        if (seed, path) not in runs:
            print(f"{path}, seed {seed}, on {computes[path]}", flush=True)
            learnt = learn(replace(cfg, seed=seed), computes[path], NETWORKS[path], *splits)
            run = {"seed": seed, "path": path, "device": str(computes[path])} | learnt
            runs[seed, path] = run
            report["runs"].append(run)
            if args.json:
                write_json(args.json, report)
    shown = [runs[key] for key in compared]
    print(f"\n{runs_table(shown)}\n\n{summary_table(shown)}")
    if args.json:
        print(f"\nthe numbers are in {args.json}")
    return report


def read(path: Path | None, cfg: Config) -> dict:
    """What the file holds, or a report without runs. Raises `UserError` for a file not of this comparison."""
    config = {key: value for key, value in to_dict(cfg).items() if key in CONFIG_KEYS}
    config = json.loads(json.dumps(config))  # lists for tuples, as in a file
    if not (path and path.exists()):
        return {"config": config, "provenance": provenance(), "runs": []}
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        changes = diff(report["config"], config)
        for run in report["runs"]:
            run["path"] = OLD_PATHS.get(run["path"], run["path"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"--json {path} holds no results of this script; name another file") from None
    if changes:
        raise UserError(f"--json {path} has other settings ({'; '.join(changes)}); name another file")
    return report


def learn(cfg: Config, compute: Compute, networks: Networks, windows: Windows, held_out: Windows) -> dict:
    """Train stage 1 with `cfg.seed`; returns its metrics.

    Raises `UserError` if a metric is not finite.
    """
    gc.collect()  # the previous trainer refers to itself through its compiled functions
    if compute.compile:
        torch.compiler.reset()  # after a few trainers it would stop compiling
    seed_everything(cfg.seed)
    trainer = Trainer(cfg, compute, windows, *networks(cfg, compute))
    losses = deque(maxlen=LAST)
    for step in tqdm(range(cfg.stage1.steps), mininterval=10):
        losses.append(trainer.update(step)["wm_loss"])
    learnt = to_floats({"wm_loss": torch.stack(list(losses)).mean()} | trainer.measure(held_out))
    for key, value in learnt.items():
        if not math.isfinite(value):
            raise UserError(f"{key} is {value} with seed {cfg.seed} on {compute}; try a lower --stage1.lr")
    return learnt


def runs_table(runs: list[dict]) -> str:
    """A row for each run."""
    rows = []
    for run in runs:
        values = (shown(run, key) for key in METRICS)
        rows.append([str(run["seed"]), run["path"], run["device"], *values])
    return table(["seed", "path", "device", *METRICS], rows)


def shown(run: dict, key: str) -> str:
    """A metric with four significant digits; empty for a probe without true actions."""
    return f"{run[key]:.4g}" if key in run else ""


def summary_table(runs: list[dict]) -> str:
    """A row for each metric: the mean of the optimised runs, and the range of the reference's."""
    rows = []
    for key in METRICS:
        reference, optimised = (
            [run[key] for run in runs if run["path"] == path and key in run] for path in NETWORKS
        )
        if reference:
            mean, low, high = statistics.mean(optimised), min(reference), max(reference)
            inside = "" if len(reference) < 2 else "yes" if low <= mean <= high else "no"
            rows.append(
                [key, f"{statistics.mean(reference):.4g}", f"{low:.4g} to {high:.4g}", f"{mean:.4g}", inside]
            )
    return table(["metric", "reference: mean", "reference: range", "optimised: mean", "inside"], rows)


if __name__ == "__main__":
    run_main(main)
