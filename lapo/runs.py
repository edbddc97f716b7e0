"""A run of one stage: its folder, checkpoints, metrics, and how it stops and continues.

A run lives in `<results_dir>/<exp>/<env>/seed<k>/<stage>/`:

    config.yaml      the resolved configuration
    checkpoint.pt    plain data (tensors, numbers, strings), see `load_checkpoint`
    metrics.jsonl    one line per log interval, `step` first
    lock             until the run is finished: held by the process that is at work

The same command again continues from the checkpoint, and does nothing once the run is finished.
"""

import contextlib
import json
import math
import os
import platform
import shlex
import signal
import subprocess
import sys
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from tqdm import tqdm

from config import ROOT, Config, diff, to_dict
from errors import UserError
from files import atomic_write, lock, writing
from ranks import by_torchrun, expect_same, greatest, is_first
from tracking import NoTracking, start_wandb
from training import Compute, rng_state, set_rng_state, to_floats

FORMAT = 3
FIELDS = {
    "stage": str,
    "config": dict,
    "step": int,
    "finished": bool,
    "metrics": dict,
    "state": dict,
    "sums": dict,
    "count": int,
    "logged": int,
    "rng": dict,
    "wandb_id": str | None,
    "provenance": dict,
}
"""What a checkpoint holds beside its format."""
EXPLODED = 1e6
"""No healthy loss or gradient norm comes near: frames lie in ±0.5 and rewards are normalised, so that losses
are of order one, and of order ten while codes that the published quantiser's start threw far away return."""


def load_checkpoint(path: Path, command: str | None = None) -> dict:
    """Read a checkpoint: `stage`, `config`, `step`, `finished`, `metrics`, `state`, `provenance`.

    `command` is what makes the checkpoint, for the message when it is missing. Raises `UserError` if it is
    missing, unreadable or of another format.
    """
    if not path.is_file():
        raise UserError(
            f"the checkpoint {path} does not exist" + (f"; make it with `{command}`" if command else "")
        )
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip() is not None  # torch does not compare the checksums
        checkpoint = None if damaged else torch.load(path, map_location="cpu", weights_only=True)
        # Whoever loads a checkpoint, changes it and saves it again leaves them out.
        if isinstance(checkpoint, dict) and "fingerprints" in checkpoint:
            damaged = checkpoint.pop("fingerprints") != _fingerprints(checkpoint)
    except Exception:  # whatever the readers raise for a damaged file
        damaged = True
    if damaged:
        raise UserError(f"the checkpoint {path} cannot be read: damaged, or not one of ours; delete it")
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != FORMAT:
        found = checkpoint.get("format") if isinstance(checkpoint, dict) else type(checkpoint).__name__
        raise UserError(
            f"the checkpoint {path} has format {found!r}; this version of lapo reads format {FORMAT}"
        )
    for key, kind in FIELDS.items():
        if key not in checkpoint or not isinstance(checkpoint[key], kind):
            found = type(checkpoint[key]).__name__ if key in checkpoint else "nothing"
            raise UserError(f"the checkpoint {path} has no valid `{key}`: found {found}; delete it")
    return checkpoint


def load_stage(cfg: Config, stage: str, script: str) -> dict:
    """The finished checkpoint of an earlier stage of the same experiment, game and seed.

    Raises `UserError` naming the command that makes it, if it is missing or unfinished: `script` with this
    process's own options, as every stage takes the same.
    """
    command = shlex.join(["python", script, *sys.argv[1:]])
    path = cfg.run_dir / stage / "checkpoint.pt"
    checkpoint = load_checkpoint(path, command)
    if not checkpoint["finished"]:
        raise UserError(f"{path} is unfinished, at step {checkpoint['step']:,}; continue it with `{command}`")
    visuals = checkpoint["config"]["visuals"]
    if visuals != cfg.visuals:
        raise UserError(
            f"{path} was trained with visuals {visuals}, but visuals is {cfg.visuals};"
            f" choose --visuals {visuals}"
        )
    print(f"{stage}: {path}")
    return checkpoint


class Run:
    """One run of a stage, new or continued.

    `reads` names the config keys and groups the stage's numbers depend on: a continued run must have the
    same. `device` and `data_dir` may change.

    Attributes
        step      steps done (of whatever the stage counts)
        finished  whether there is nothing left to do
        metrics   the latest value of every metric logged so far
        state     what `loop` saved last, or None in a new run
    """

    def __init__(self, cfg: Config, stage: str, reads: tuple[str, ...], compute: Compute):
        self.cfg, self.stage = cfg, stage
        self.dir = cfg.run_dir / stage
        self.checkpoint_path = self.dir / "checkpoint.pt"
        self.metrics_path = self.dir / "metrics.jsonl"
        self.step, self.finished, self.metrics, self.state = 0, False, {}, None
        self._reads = ("env", "seed", "visuals", "precision", *reads)
        self._wandb_id: str | None = None
        self._stop_signal = 0
        self._rng: dict | None = None
        self._sums: dict[str, Tensor | float] = {}
        self._count = 0
        self._logged = -1  # step of the last line of metrics; the stage's unit, not always that of `step`
        self._started = self._saved = time.monotonic()
        print(f"{stage} of {cfg.env}, seed {cfg.seed}, on {compute}\n{self.dir}")
        if self.checkpoint_path.exists():
            self._continue()
        expect_same(
            self.step, "the run's processes see different checkpoints; results_dir must be shared by all"
        )
        with writing(self.dir, "nothing was changed"):
            self.dir.mkdir(parents=True, exist_ok=True)
        self._wandb = NoTracking()
        if not self.finished and is_first():
            self._keep_others_out()
            atomic_write(
                self.dir / "config.yaml",
                lambda path: path.write_text(yaml.safe_dump(to_dict(cfg), sort_keys=False)),
            )
            self._trim_metrics()
            self._wandb = start_wandb(cfg, stage, self.dir, self._wandb_id)
            self._wandb_id = self._wandb.id

    def _keep_others_out(self) -> None:
        """Hold the run's lock as long as this process lives. Raises `UserError` if another process has it."""
        self._lock = lock(
            self.dir / "lock",
            f"another process is at work on {self.dir}; wait for it, or choose another --exp",
        )

    def _continue(self) -> None:
        checkpoint = load_checkpoint(self.checkpoint_path)
        changes = diff({key: checkpoint["config"].get(key) for key in self._reads}, self._relevant())
        if changes:
            raise UserError(
                f"{self.dir} was made with other settings ({'; '.join(changes)});"
                f" choose another --exp, or delete {self.dir}"
            )
        self.step, self.finished = checkpoint["step"], checkpoint["finished"]
        self.metrics, self.state = checkpoint["metrics"], checkpoint["state"]
        self._sums, self._count, self._logged = (checkpoint[key] for key in ("sums", "count", "logged"))
        self._wandb_id = checkpoint["wandb_id"]
        if self.finished:
            print(f"finished already, at step {self.step:,}")
        else:
            self._rng = checkpoint["rng"]
            print(f"continues from step {self.step:,}")

    def _relevant(self) -> dict:
        values = to_dict(self.cfg)
        return {key: values[key] for key in self._reads}

    def _trim_metrics(self) -> None:
        """Drop lines that a killed run wrote after its last checkpoint: they will be written again."""
        if not self.metrics_path.exists():
            return
        kept = []
        for line in self.metrics_path.read_text().splitlines():
            with contextlib.suppress(ValueError):
                if json.loads(line)["step"] <= self._logged:
                    kept.append(line + "\n")
        atomic_write(self.metrics_path, lambda path: path.write_text("".join(kept)))

    def loop(
        self, total: int, state: Callable[[], dict], *, save_every: int, unit: str, scale: int = 1
    ) -> Iterator[int]:
        """Yield the steps still to do, with progress, checkpoints, and an orderly stop on SIGTERM or SIGINT.

        A checkpoint follows the last step too, for whatever the stage measures afterwards may take long.

        `state` gives what a continued run needs, as plain data; random states are added. Progress is shown in
        `unit`s, `scale` per step. Raises SystemExit with 143 or 130 after a signal, having saved.
        """
        handlers = {
            number: signal.signal(number, self._on_signal) for number in (signal.SIGTERM, signal.SIGINT)
        }
        bar = tqdm(
            total=total * scale,
            initial=self.step * scale,
            unit=unit,
            desc=self.stage,
            mininterval=1 if sys.stderr.isatty() else 60,  # a log needs no line a second
            unit_scale=True,
            disable=not is_first(),
        )
        if self._rng:
            set_rng_state(self._rng)
        try:
            while self.step < total:
                yield self.step
                self.step += 1
                bar.update(scale)
                overdue = time.monotonic() - self._saved > 60 * self.cfg.save_minutes
                stop, overdue = greatest(self._stop_signal, overdue)
                if stop or self.step == total or self.step % save_every == 0 or overdue:
                    self.save(state())
                if stop:
                    bar.close()
                    if is_first():
                        print(f"stopped at step {self.step:,}; the same command continues", file=sys.stderr)
                    sys.exit(128 + stop)
        finally:
            bar.close()
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, frame: Any) -> None:
        # Ctrl-C twice: do not wait for the step's end. Schedulers repeat SIGTERM, and torchrun any signal.
        if number == self._stop_signal == signal.SIGINT and not by_torchrun():
            sys.exit(128 + number)
        self._stop_signal = number

    def save(self, state: dict) -> None:
        """Write the checkpoint of the current step; the previous one stays until this one was read back.

        Of several processes, the first one writes, and the others wait for it.
        """
        floats = ((name, x) for name, x in _tensors(state) if x.is_floating_point())
        bad = next((name for name, x in floats if not x.isfinite().all()), None)
        if bad:
            raise self._diverged(f"{bad} holds values that are not finite", self.step)
        self._means(self.step)  # what has exploded since the last line must not cost the good checkpoint
        if is_first():
            self._write(state)
        greatest()
        self._saved = time.monotonic()

    def _write(self, state: dict) -> None:
        checkpoint = {
            "format": FORMAT,
            "stage": self.stage,
            "config": to_dict(self.cfg),
            "step": self.step,
            "finished": self.finished,
            "metrics": self.metrics,
            "state": state,
            "sums": to_floats(self._sums),
            "count": self._count,
            "logged": self._logged,
            "rng": rng_state(),
            "wandb_id": self._wandb_id,
            "provenance": provenance(),
        }
        checkpoint["fingerprints"] = _fingerprints(checkpoint)
        with writing(self.metrics_path, self._kept()), self.metrics_path.open("a") as file:
            os.fsync(file.fileno())
        atomic_write(self.checkpoint_path, lambda path: torch.save(checkpoint, path), verify=load_checkpoint)

    def finish(self, state: dict, result: dict[str, float] | None = None) -> None:
        """Write the last checkpoint, `result` (numbers) among its metrics, and say where it is."""
        self.finished = True
        self.metrics |= result or {}
        self.save(state)
        self._wandb.finish()
        if is_first():
            (self.dir / "lock").unlink(missing_ok=True)
        self.report()

    def report(self) -> None:
        """Print the latest metrics and where they lie."""
        for key, value in self.metrics.items():
            print(f"  {key:<28} {value:.4g}" if isinstance(value, float) else f"  {key:<28} {value}")
        print(f"{self.stage} done: {self.checkpoint_path}")

    def track(self, metrics: dict[str, Tensor | float]) -> None:
        """Add one step's scalars to the averages of the next `log`, without waiting for the device."""
        for key, value in metrics.items():
            self._sums[key] = self._sums.get(key, 0.0) + value
        self._count += 1

    def log(self, step: int, extra: dict[str, Any] | None = None) -> None:
        """Write one line for `step`: averages of what was tracked since the last one, and `extra` metrics.

        Raises `UserError` when one is not finite, a loss or gradient norm has exploded, or the disk refuses.
        """
        values = self._means(step) | to_floats(extra or {})
        self._sums, self._count = {}, 0
        bad = {key: value for key, value in values.items() if not math.isfinite(value)}
        if bad:
            raise self._diverged(_listed(bad), step)
        line = {"step": step, **values, "seconds": round(time.monotonic() - self._started, 1)}
        if is_first():
            with writing(self.metrics_path, self._kept()), self.metrics_path.open("a") as file:
                file.write(json.dumps(line) + "\n")
        self._wandb.log(line, step=step)
        self.metrics |= values
        self._logged = step

    def _means(self, step: int) -> dict[str, float]:
        """Averages of what was tracked since the last line.

        Raises `UserError` when a loss or gradient norm among them has exploded.
        """
        means = {key: value / self._count for key, value in to_floats(self._sums).items()}
        # Others may be huge in good health, such as the unexplained variance before the first reward.
        watched = {key: value for key, value in means.items() if key.endswith(("loss", "grad_norm"))}
        bad = {key: value for key, value in watched.items() if not abs(value) < EXPLODED}
        if bad:
            raise self._diverged(_listed(bad), step)
        return means

    def _diverged(self, what: str, step: int) -> UserError:
        return UserError(f"{self.stage}: {what} at step {step:,}; {self._kept()}; try a lower learning rate")

    def _kept(self) -> str:
        if not self.checkpoint_path.exists():
            return "nothing was saved yet"
        return f"the last good checkpoint, {self.checkpoint_path}, is kept"


def _listed(metrics: dict[str, float]) -> str:
    return " and ".join(f"{key} is {value:.3g}" for key, value in metrics.items())


def _tensors(values: Any, key: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors in nested dicts, lists and tuples, by their path."""
    if isinstance(values, Tensor):
        yield key, values
    elif isinstance(values, dict | list | tuple):
        for name, value in values.items() if isinstance(values, dict) else enumerate(values):
            yield from _tensors(value, f"{key}.{name}".lstrip("."))


def _fingerprints(checkpoint: dict) -> dict[str, str]:
    """Type, shape and checksum of all tensors, by their path.

    The checksums of the zip file alone do not tell: a flipped attribute of a member lets torch return memory
    that it never wrote, and weights of another type would be converted in silence.
    """

    def checksum(x: Tensor) -> int:
        return zlib.crc32(x.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())

    return {name: f"{x.dtype} {tuple(x.shape)} {checksum(x):08x}" for name, x in _tensors(checkpoint)}


def provenance() -> dict[str, str]:
    """Versions of what made a checkpoint."""
    revision = "unknown"
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
        revision = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return {"revision": revision, "python": platform.python_version(), "torch": str(torch.__version__)}
