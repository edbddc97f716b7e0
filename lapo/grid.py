"""Grids of runs: the work of `launch.sh` beyond calling one stage after the other.

A run is all chosen stages of a game, a seed and a setting. `plan` checks a grid and prints its runs,
`estimate` says what a run takes, and this file as a script works through a queue: several runs at once, each
of them `launch.sh --task N` with its output in a file.
"""

import argparse
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from lapo.config import Config, load_config, resolve, to_dict
from lapo.data.checks import check_data
from lapo.data.chunks import list_chunks, read_header
from lapo.errors import STOP_SIGNALS, UserError, handle_signals, run_main, say
from lapo.games.table import GAMES
from lapo.games.vec_env import num_cores
from lapo.get_frames import commands, lacks_frames, note_request
from lapo.modes import MODES, check_modes
from lapo.runs.files import writing

OWN_OPTIONS = {"env": "name the games first", "exp": "--exp", "seed": "--seeds", "stage3.mode": "--modes"}
"""Keys that are not swept, and how a grid gets several of them."""


# ---------------------------------------------------------------- which runs


def sweep_settings(sweeps: list[str], exp: str) -> list[list[str]]:
    """The product of sweeps such as `stage1.lr=1e-4,3e-4`, as arguments of the stages; [[]] without any.

    Each setting has an experiment of its own, named after it: `<exp>-stage1.lr=1e-4`. Raises `UserError` for
    a sweep of another form, a key given twice, and keys that launch.sh has options for.
    """
    lists = []
    for sweep in sweeps:
        key, equals, values = sweep.partition("=")
        if not (key and equals and all(values.split(","))):
            raise UserError(f"--sweep is '{sweep}', but must be a key and values, as in: stage1.lr=1e-4,3e-4")
        key = key.replace("-", "_")
        if key in OWN_OPTIONS:
            raise UserError(f"--sweep {sweep}: for several of {key}: {OWN_OPTIONS[key]}")
        if key in [pairs[0][0] for pairs in lists]:
            raise UserError(f"--sweep {key} is given twice; list all its values in one")
        lists.append([(key, value) for value in dict.fromkeys(values.split(","))])
    settings = []
    for pairs in itertools.product(*lists):
        name = "-".join([exp, *(f"{key}={value}" for key, value in pairs)])
        options = [word for key, value in pairs for word in (f"--{key}", value)]
        settings.append(["--exp", name, *options] if pairs else [])
    return settings


def plan(
    games: str, seeds: str, modes: str, stages: str, data: str, listing: str, sweeps: str, *arguments: str
) -> None:
    """Check a grid and print a line per run: its name, log file, game, seed and options, tabs between them.

    The seed is - where the config's counts. Before the runs come a $, the game and the command for each game
    whose frames must be got. `arguments` are those of the stages; everything else are words with spaces
    between them, "" for launch.sh's default. With `listing`, runs are printed for people, with an `estimate`,
    instead. Raises `UserError` for mistakes.
    """
    base, option = list(arguments), ""
    for word in base:
        option = word if word.startswith("--") else option
        if option == "--preset" and word in GAMES:
            raise UserError(f"--preset {word}: this is a game; games are named before all options")
    check_modes(modes.split())
    settings = sweep_settings(sweeps.split(), load_config(base).exp)
    for setting in settings:
        for extra in [[], *(["--stage3.mode", mode] for mode in modes.split())]:
            load_config([*base, *setting, *extra])
    chosen = list(dict.fromkeys(load_config([*base, "--seed", seed]).seed for seed in seeds.split()))
    names = list(dict.fromkeys(games.split() or GAMES))
    configs: dict[tuple[str, Path], Config] = {}  # sweeps may change the folder, as preset=demo,small does
    for game, setting in itertools.product(names, settings):
        cfg = load_config([*base, *setting, "--env", game])
        configs.setdefault((game, cfg.game_data), cfg)
    for game, folder in configs if games.split() else ():
        check_data(game, folder)
    chosen_modes = (modes.split() or [load_config(base).stage3.mode]) if "3" in stages.split(",") else []
    if {"1", "2"} & set(stages.split(",")) or any("data" in MODES[mode].config_keys for mode in chosen_modes):
        lacking = [cfg for cfg in configs.values() if lacks_frames(cfg)]
        for cfg, command in zip(lacking, commands(lacking, data), strict=True):
            if not listing:
                note_request(cfg, data)
            print("$", cfg.env, command)
    total = Estimate()
    for game, setting, seed in itertools.product(names, settings, chosen or [None]):
        given = [] if seed is None else ["--seed", str(seed)]
        cfg = load_config([*base, *setting, "--env", game, *given])
        name = ", ".join([game, *(f"{pair[0][2:]} {pair[1]}" for pair in (given, setting[:2]) if pair)])
        if listing:
            found = estimate(cfg, stages.split(","), modes.split())
            total = total + found
            print(f"{name}{found}")
        else:
            number = "-" if seed is None else seed
            print(name, cfg.run_dir / "launch.log", game, number, " ".join(setting), sep="\t")
    if listing and str(total):
        say(
            f"all of them, one after the other{total}; hours from the latest run with such networks in"
            f" {load_config(base).results_dir}, or else at the published sizes as in docs/performance.md;"
            " gigabytes are those of the frames on the device"
        )


# ---------------------------------------------------------------- what they take

PUBLISHED_SECONDS = {
    "stage1": (9.9e-3, 1 / 0.41),
    "stage2": (2.5e-3, 1 / 0.912),
    "stage3_online": (1 / 14618, 1 / 348),
}
"""Seconds per step of the default configuration on an H100 and on two CPU cores: docs/performance.md."""
SIZES = {
    "stage1": ("model", "vq", "stage1.batch_size"),
    "stage2": ("model", "vq", "stage2.batch_size"),
    "stage3": (
        *(
            "model",
            "vq",
            "ppo.num_envs",
            "ppo.rollout_steps",
            "ppo.epochs",
            "decoder.hidden",
            "decoder.epochs",
        ),
        *("offline.batch_size", "relabel.batch_size"),
    ),
    "ilpo_trunk": ("model", "ilpo.num_actions", "ilpo.batch_size"),
}
"""Keys on which the duration of a step depends, beside those of `data`."""


@dataclass
class Estimate:
    """Hours and gigabytes of runs, as far as they are known."""

    hours: float = 0.0
    gigabytes: float = 0.0
    unknown: list[str] = field(default_factory=list)
    """Stages of which no duration is known."""

    def __add__(self, other: "Estimate") -> "Estimate":
        """Both, one after the other: frames of only one of them are loaded."""
        unknown = list(dict.fromkeys(self.unknown + other.unknown))
        return Estimate(self.hours + other.hours, max(self.gigabytes, other.gigabytes), unknown)

    def __str__(self) -> str:
        parts = [f"about {self.hours:.2g} h"] if self.hours else []
        if self.hours and self.unknown:
            parts[0] += f" without {', '.join(self.unknown)}"
        if self.gigabytes:
            parts.append(f"{self.gigabytes:.2g} GB")
        return f": {', '.join(parts)}" if parts else ""


def estimate(cfg: Config, stages: list[str], modes: list[str]) -> Estimate:
    """What a run of the `stages` ("1", "2", "3") takes, stage 3 in all `modes` or, without any, in `cfg`'s.

    A stage's duration is its steps times the seconds per step of the latest run in `results_dir` of that
    stage with the same sizes, whatever its length, game and machine; else those of `PUBLISHED_SECONDS` for
    the published sizes.
    """
    found = Estimate()
    names = [f"stage{stage}" for stage in stages if stage != "3"]
    for mode in (modes or [cfg.stage3.mode]) if "3" in stages else []:
        names += [stage for stage in MODES[mode].stages if stage not in SIZES] + [f"stage3_{mode}"]
    for name in names:
        seconds = measured_seconds(cfg, name) or published_seconds(cfg, name)
        if seconds is None:
            found.unknown.append(name)
        else:
            found.hours += cfg.total_steps(name) * seconds / 3600
    if {"1", "2"} & set(stages):
        found.gigabytes = num_frames(cfg) * cfg.data.image_size**2 * 3 / 1e9
    return found


def sizes(cfg: dict[str, Any], name: str) -> dict[str, Any]:
    """The part of a config, as nested dicts, on which the duration of a step of stage `name` depends."""
    found = {}
    for key in ("data.image_size", "data.context", *SIZES[name.split("_")[0] if name not in SIZES else name]):
        group, _, leaf = key.partition(".")
        found[key] = cfg.get(group, {}).get(leaf) if leaf else cfg.get(group)
    return found


def measured_seconds(cfg: Config, name: str) -> float | None:
    """Seconds per step of the latest run of stage `name` with such sizes; None if none has logged."""
    folder, wanted = resolve(cfg.results_dir), sizes(to_dict(cfg), name)
    files = [path for path in folder.glob(f"*/*/seed*/{name}/metrics.jsonl") if path.stat().st_size]
    for path in sorted(files, key=lambda path: path.stat().st_mtime, reverse=True):
        try:
            made_with = yaml.safe_load((path.parent / "config.yaml").read_text(encoding="utf-8"))
            last = json.loads(path.read_text(encoding="utf-8").splitlines()[-1])
            if sizes(made_with, name) == wanted and last["step"]:
                return last["seconds"] / last["step"]
        except (OSError, ValueError, KeyError, AttributeError, yaml.YAMLError):
            continue  # being written, or of an older version
    return None


def published_seconds(cfg: Config, name: str) -> float | None:
    """Seconds per step at the published sizes, on a GPU where there is one; None for other sizes."""
    if name not in PUBLISHED_SECONDS or sizes(to_dict(cfg), name) != sizes(to_dict(load_config([])), name):
        return None
    gpu = cfg.device.startswith("cuda") or (cfg.device == "auto" and shutil.which("nvidia-smi"))
    return PUBLISHED_SECONDS[name][0 if gpu else 1]


def num_frames(cfg: Config) -> int:
    """Number of frames that stages 1 and 2 load: of the game's chunks or, if it has none, of `record`."""
    total = 0
    for split, limit in (("train", cfg.data.train_chunks), ("test", cfg.data.test_chunks)):
        for path in list_chunks(cfg.game_data / split)[:limit] if (cfg.game_data / split).is_dir() else []:
            try:
                total += read_header(path)
            except UserError:
                continue  # the stages name bad chunks
    lacks = lacks_frames(cfg)
    return cfg.record.frames + cfg.record.test_frames if lacks else total


# ---------------------------------------------------------------- a queue


@dataclass
class Task:
    """A run in the queue."""

    number: int
    name: str
    log: Path
    slot: str = ""
    process: subprocess.Popen | None = None
    began: float = 0.0

    def start(self, slot: str, command: list[str], env: dict[str, str]) -> None:
        """Start the run; its output is added to `log`. Raises `UserError` if that cannot be written."""
        with writing(self.log, "the runs that have begun are stopped"):
            self.log.parent.mkdir(parents=True, exist_ok=True)
            log = self.log.open("ab")
        with log:
            self.process = subprocess.Popen(
                [*command, "--task", str(self.number)],
                env=os.environ | env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C reaches this process alone, which tells the runs
            )
        self.slot, self.began = slot, time.monotonic()

    def outcome(self) -> str:
        """How the run ended, in the words of its own summary where it got that far."""
        minutes = round((time.monotonic() - self.began) / 60)
        lines = []
        with suppress(OSError):  # deleted meanwhile
            lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        own = lines[-1] if lines else ""
        code = self.process.returncode
        found = f"failed, exit code {code}" if code else "finished"
        if own.startswith(f"  {self.name} "):
            found = own.removeprefix(f"  {self.name} ").strip().rpartition(" (")[0]
        return f"{found} ({minutes} min)"


class Queue:
    """Works through tasks, in each of the slots one at a time."""

    def __init__(self, tasks: list[Task], slots: list[str], command: list[str], gpus: bool):
        """`slots`: numbers of GPUs or, without `gpus`, of CPU jobs. `command` with `--task N` does a run."""
        self.waiting, self.slots, self.command, self.gpus = tasks, slots, command, gpus
        self.running: list[Task] = []
        self.stopped = 0

    def env(self, slot: str) -> dict[str, str]:
        """Environment variables of a run; a number of threads that the user has set stays."""
        threads = max(1, num_cores() // len(self.slots)) if self.gpus else 1
        gpu = {"CUDA_VISIBLE_DEVICES": slot} if self.gpus else {}
        return {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads)), **gpu}

    def work(self) -> Iterator[Task]:
        """Start tasks until all have ended or a signal came; yield each that ends."""
        free = list(self.slots)
        while self.running or (self.waiting and not self.stopped):
            while free and self.waiting and not self.stopped:
                task, slot = self.waiting.pop(0), free.pop(0)
                self.running.append(task)
                task.start(slot, self.command, self.env(slot))
                if self.stopped:  # meanwhile, when there was no process to be told
                    task.process.terminate()
                where = f" on GPU {slot}" if self.gpus else ""
                print(f"launch.sh: {task.name}: started{where}, output in {task.log}", flush=True)
            time.sleep(0.05)
            for task in [task for task in self.running if task.process.poll() is not None]:
                self.running.remove(task)
                free.append(task.slot)
                yield task

    def stop(self, number: int, frame: Any) -> None:
        """Handle a signal: stop all runs. A second Ctrl-C ends at once."""
        if number == self.stopped == signal.SIGINT:
            sys.exit(128 + number)
        if not self.stopped:
            self.stopped = number
            self.terminate()

    def terminate(self) -> None:
        """Tell all runs to save and stop."""
        for task in self.running:
            if task.process is not None and task.process.poll() is None:
                task.process.terminate()

    def close(self) -> None:
        """Stop whatever still runs, and wait for it: after an error, no run is left behind."""
        self.terminate()
        for task in self.running:
            if task.process is not None:
                task.process.wait()


def main() -> None:
    """Run the tasks on stdin, for launch.sh: number, name and log file in a line, tabs between them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--slots", required=True, help="numbers of GPUs or jobs, with commas between")
    parser.add_argument("--gpus", action="store_true", help="slots are GPUs")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    args = parser.parse_args()
    lines = (line.rstrip("\n").split("\t") for line in sys.stdin)
    tasks = [Task(int(number), name, Path(log)) for number, name, log in lines]
    queue = Queue(tasks, args.slots.split(","), args.command, args.gpus)
    handle_signals((*STOP_SIGNALS, signal.SIGINT), queue.stop)
    try:
        summary, failed = report(queue)
    finally:
        if not queue.stopped:  # else, the runs have been told; a second Ctrl-C does not wait for them
            queue.close()
    if queue.stopped:
        say(f"launch.sh: stopped by {signal.Signals(queue.stopped).name}; the same command continues")
        sys.exit(128 + queue.stopped)
    print("launch.sh: summary", *summary, sep="\n")
    sys.exit(int(failed))


def report(queue: Queue) -> tuple[list[str], bool]:
    """Work through the queue and print how runs end; returns a line for each, and whether any failed."""
    summary, failed = [], False
    for task in queue.work():
        outcome = task.outcome()
        summary.append(f"  {task.name:<10} {outcome}")
        bad = task.process.returncode != 0
        failed = failed or bad
        if not queue.stopped:
            see = f"; see {task.log}" if bad else ""
            print(
                f"launch.sh: {task.name}: {outcome}{see}", file=sys.stderr if bad else sys.stdout, flush=True
            )
    return summary, failed


if __name__ == "__main__":
    run_main(main)
