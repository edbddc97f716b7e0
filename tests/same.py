"""Does this work tree compute what an earlier revision computed? `make same BASE=<revision>`

Both record the same frames, train all stages and modes on them for a few steps and play, by the same command
lines and with the same seeds, one after the other command, the two trees side by side. Compared is what the
commands leave behind (chunks, metrics.jsonl, checkpoint.pt), so that files may move and names may change:

    reference   small networks in fp32 on one thread: every number must be the same, bit for bit
    optimised   the same in bf16, chunks taking turns, codes from the data: the first losses of
                every run may differ by TOLERANCE, as sums in another order are rounded differently

What only one of the two has, a metric with a new name say, is listed and counted, not compared. Exit status:
0 the same, 1 not, 2 something else went wrong.
"""

import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

ROOT = Path(__file__).resolve().parent.parent
TOLERANCE = 0.02
MODES = "online", "offline", "scratch", "bc"
GAME = "bigfish"  # random play earns something within a few steps

SHORT = {
    "env": GAME,
    "device": "cpu",
    "compile": "off",
    "model": {"idm_scale": 1, "policy_scale": 1, "wm_width": 8},
    "stage1": {"steps": 4, "batch_size": 8, "probe_every": 2, "log_every": 1},
    "probe": {"windows": 256},
    "stage2": {"steps": 4, "batch_size": 8, "log_every": 1},
    "stage3": {"steps": 256, "log_every": 1},
    "ppo": {"num_envs": 8, "rollout_steps": 16, "minibatches": 4, "epochs": 2},
    "decoder": {"start": 0, "batch_size": 32, "epochs": 1},
    "offline": {"labels": 64, "steps": 4, "batch_size": 16},
    "eval": {"episodes": 4, "num_envs": 4},
    "data": {"pool_chunks": 1},
    "dagger": {"steps": 64, "num_envs": 4, "rollout_steps": 8, "updates": 2, "batch_size": 16, "buffer": 64},
}
PATHS = {
    "reference": ["--precision", "fp32"],
    "optimised": ["--precision", "bf16", "--resident", "never", "--vq.start", "data"],
}
RUNS = {
    "stage1": ["stage1.py"],
    "stage2": ["stage2.py"],
    **{f"stage3_{mode}": ["stage3.py", "--stage3.mode", mode] for mode in MODES},
    "expert": ["train_expert.py", "--teacher", "planner"],
}
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"}
ENVIRONMENT.pop("PYTHONSAFEPATH", None)  # with it, the code beside a script would not be found
CHUNK = 20
"""Frames of the chunks that the recorded one is cut into, so that a batch's windows come from several."""


class CommandError(Exception):
    """A command line that failed, and what it said."""


def main() -> None:
    """Compare the work tree that this file lies in with the revision that the command line names."""
    try:
        if len(sys.argv) != 2:
            raise CommandError("name a revision to compare with, as in: make same BASE=HEAD~1")
        with tempfile.TemporaryDirectory() as folder:
            different, alone = compare_with(sys.argv[1], Path(folder))
    except CommandError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print("NOT the same" if different else "the same" + f", but for {alone} that only one has" * bool(alone))
    sys.exit(different)


def compare_with(revision: str, folder: Path) -> tuple[bool, int]:
    """Whether this work tree computes something else than `revision`, and how much only one of them has.

    Works in `folder`. Raises CommandError.
    """
    base, results, config = folder / "base", folder / "results", folder / "short.yaml"
    check_out(revision, base)
    config.write_text(yaml.safe_dump(SHORT))
    different, alone = False, 0
    for path, options in PATHS.items():
        places = results / path / "base", results / path / "here"
        record, *learn = commands([*options, "--config", str(config), "--visuals", "plain"])
        run_both((base, ROOT), places, record)
        for place in places:
            cut_chunks(place / "data" / GAME / "train")
        for command in learn:
            run_both((base, ROOT), places, command)
        found = compare(path, *places)
        different, alone = different or found[0], alone + found[1]
    return different, alone


def check_out(revision: str, folder: Path) -> None:
    """Lay the files of a revision of this repository into `folder`."""
    folder.mkdir()
    archive = subprocess.run(["git", "-C", ROOT, "archive", revision], capture_output=True)
    if archive.returncode:
        raise CommandError(f"there is no revision {revision}: {archive.stderr.decode().strip()}")
    subprocess.run(["tar", "-x", "-C", folder], input=archive.stdout, check=True)


def commands(options: list[str]) -> Iterator[list[str]]:
    """The words of each command line after the interpreter's name, run from the folder for its results."""
    yield [
        *("record_expert.py", "--env", GAME, "--expert", "planner", "--visuals", "plain", "--noise", "0.2"),
        *("--frames", "600", "--test-frames", "300", "--workers", "1", "--data-dir", "{place}/data"),
    ]
    for words in RUNS.values():
        yield [*words, *options, "--data_dir", "{place}/data", "--results_dir", "{place}", "--exp", "same"]


def run_both(trees: tuple[Path, Path], places: tuple[Path, Path], command: list[str]) -> None:
    """`run` in both trees, side by side; waits for both, whichever fails."""
    with ThreadPoolExecutor() as pool:
        list(pool.map(run, trees, places, [command] * 2))


def run(tree: Path, place: Path, command: list[str]) -> None:
    """Run a command line of the code in `tree`, `{place}` in it standing for the folder of its results."""
    place.mkdir(parents=True, exist_ok=True)
    script, *words = (word.format(place=place) for word in command)
    done = subprocess.run(
        [sys.executable, tree / "lapo" / script, *words],
        cwd=place,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise CommandError(f"{tree}: {script} {' '.join(words)}\n{done.stderr}")


def compare(path: str, base: Path, here: Path) -> tuple[bool, int]:
    """Whether the results in two folders differ more than `path` allows, and how much only one has."""
    places, exact = (base, here), path == "reference"
    found = [agree(f"{path}, frames", *map(chunks, places))]
    for stage in RUNS:
        folders = (place / "same" / GAME / "seed0" / stage for place in places)
        if exact:
            found.append(agree(f"{path}, {stage}", *map(numbers, folders)))
        else:
            found.append(agree(f"{path}, {stage}", *map(first_losses, folders), TOLERANCE))
    return not all(same for same, _ in found), sum(alone for _, alone in found)


def cut_chunks(folder: Path) -> None:
    """Cut the one chunk of a folder into many of `CHUNK` frames."""
    with np.load(folder / "0.npz") as chunk:
        arrays = dict(chunk)
    for number, start in enumerate(range(0, len(arrays["obs"]), CHUNK)):
        np.savez(folder / f"{number}.npz", **{key: x[start : start + CHUNK] for key, x in arrays.items()})


def chunks(place: Path) -> dict[str, np.ndarray]:
    """All arrays of all recorded chunks."""
    arrays = {}
    for file in sorted((place / "data" / GAME).glob("*/*.npz")):
        with np.load(file) as chunk:
            arrays |= {f"{file.parent.name}/{file.stem}.{key}": chunk[key] for key in chunk.files}
    return arrays


def numbers(folder: Path) -> dict[str, np.ndarray]:
    """All that a run has learnt and measured: metrics by step and name, weights and other states by path."""
    state = torch.load(folder / "checkpoint.pt", weights_only=True)["state"]
    state.pop("origin", None)  # of an expert: which code made it
    found = {f"metrics {line['step']}.{key}": value for line in lines(folder) for key, value in line.items()}
    return {key: np.asarray(value) for key, value in {**found, **dict(leaves(state, "state"))}.items()}


def first_losses(folder: Path) -> dict[str, np.ndarray]:
    """The first value of every loss of a run."""
    found: dict[str, np.ndarray] = {}
    for line in lines(folder):
        for key, value in line.items():
            if "loss" in key:
                found.setdefault(key, np.asarray(value))
    return found


def lines(folder: Path) -> list[dict[str, float]]:
    """The lines of a run's metrics, without the time taken."""
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in found]


def leaves(values: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Tensors, numbers and strings in nested dicts, lists and tuples, by their path."""
    if isinstance(values, dict | list | tuple):
        for key, value in values.items() if isinstance(values, dict) else enumerate(values):
            yield from leaves(value, f"{path}.{key}")
    elif isinstance(values, torch.Tensor):
        yield path, values.numpy()
    elif values is not None:
        yield path, values


def agree(
    name: str, base: dict[str, np.ndarray], here: dict[str, np.ndarray], tolerance: float = 0.0
) -> tuple[bool, int]:
    """Whether what both have differs by `tolerance` at most, and how much only one has; prints both.

    Nothing in common is no agreement.
    """
    found = {key: distance(base[key], here[key]) for key in base.keys() & here.keys()}
    different = {key: found[key] for key in base if found.get(key, 0.0) > tolerance}
    alone = sorted(base.keys() ^ here.keys())
    largest = max(found.values(), default=math.inf)
    verdict = "DIFFERENT" if different or not found else "ok"
    print(f"{name}: {verdict}, {len(found)} compared, differing by {largest:.1e} at most", flush=True)
    for key, value in list(different.items())[:5]:
        print(f"    {key}: {value:.1e}")
    if alone:
        print(f"    only in one of the two ({len(alone)}): {', '.join(alone[:8])}")
    return verdict == "ok", len(alone)


def distance(a: np.ndarray, b: np.ndarray) -> float:
    """0 for equal arrays, bit for bit; else their difference, relative to the greater one's norm."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return math.inf
    if a.tobytes() == b.tobytes():
        return 0.0
    if a.dtype.kind not in "fiub":
        return math.inf
    a, b = a.astype(np.float64), b.astype(np.float64)
    scale = max(np.linalg.norm(a), np.linalg.norm(b))
    difference = float(np.linalg.norm(a - b) / max(scale, sys.float_info.min))
    return math.inf if math.isnan(difference) else max(difference, sys.float_info.epsilon)


if __name__ == "__main__":
    main()
