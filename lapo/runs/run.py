"""A run of one stage: folder, checkpoints, metrics, stopping and resuming.

A run lives in `<results_dir>/<exp>/<env>/seed<k>/<stage>/`:

    config.yaml      the resolved config
    checkpoint.pt    tensors, numbers and strings, see `load_checkpoint`
    metrics.jsonl    one line per log interval, `step` first
    lock             held by the process that trains the run, removed when the run is finished

The same command resumes from the checkpoint. For a finished run it does nothing.
"""

import contextlib
import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
import yaml
from torch import Tensor
from tqdm import tqdm

from lapo.config import Config, diff, to_dict
from lapo.errors import STOP_SIGNALS, UserError, handle_signals, say
from lapo.runs.checkpoints import (
    FORMAT,
    changed_inputs,
    checksum,
    iter_leaves,
    load_checkpoint,
    provenance,
    saved_config,
)
from lapo.runs.compute import Compute, rng_state, set_rng_state, to_floats
from lapo.runs.files import atomic_write, lock, reading, writing
from lapo.runs.ranks import all_max, check_equal, is_main, under_torchrun
from lapo.runs.tracking import NoTracking, start_wandb

FREE_KEYS = "log_every", "save_every", "eval_every"
"""Keys of the config's groups on which no result depends: a resumed run may change them."""
MAX_LOSS = 1e6
"""A run with a greater loss or gradient norm has diverged. Frames lie in ±0.5 and rewards are normalised, so
losses are of order 1. The published initialisation of the codebook raises them to order 10 at first."""


class Run:
    """One run of a stage, new or resumed.

    `config_keys` are the config's groups (`data`) and keys (`data.context`) that the results depend on. A
    resumed or finished run must have the same values. `built_on` holds the checksums of its other inputs by
    name: earlier stages (see `checkpoints.weights_checksum`) and frames. They must be the same, too. Paths
    and `device` may change. `precision` is saved as resolved, so a bf16 run does not resume in fp32 where
    `auto` means fp32.

    Raises `UserError` if the run exists with other settings or inputs, if another process trains it, or if
    its folder cannot be written.

    Attributes
        step      steps done: training steps or, in PPO, updates
        finished  whether training and evaluation are done
        metrics   latest value of every metric logged so far
        state     the stage's state in the checkpoint; None in a new run
    """

    def __init__(
        self,
        cfg: Config,
        stage: str,
        config_keys: tuple[str, ...],
        compute: Compute,
        built_on: dict[str, str] | None = None,
    ):
        self.precision_is_auto = cfg.precision == "auto"
        self.cfg, self.stage = replace(cfg, precision="bf16" if compute.bf16 else "fp32"), stage
        self.device, self.built_on, self.provenance = compute.device, built_on or {}, provenance()
        self._hardware = str(compute)
        self.dir = cfg.run_dir / stage
        self.checkpoint_path = self.dir / "checkpoint.pt"
        self.metrics_path = self.dir / "metrics.jsonl"
        self.step, self.finished, self.metrics, self.state = 0, False, {}, None
        self._config_keys = ("env", "seed", "visuals", "precision", *config_keys)
        self._wandb_id: str | None = None
        self._stop_signal = 0
        self._rng: dict | None = None
        self._sums: dict[str, Tensor | float] = {}
        self._count = 0
        self._logged = -1  # `step` of the last logged line (env steps in stage 3)
        self._started = self._saved = time.monotonic()
        print(f"{stage} of {cfg.env}, seed {cfg.seed}, on {compute}\n{self.dir}")
        with reading(self.checkpoint_path):
            saved = self.checkpoint_path.exists()
        if saved:
            self._resume()
        check_equal(
            self.step, "the run's processes see different checkpoints; results_dir must be shared by all"
        )
        with writing(self.dir, "nothing was changed"):
            self.dir.mkdir(parents=True, exist_ok=True)
        self._wandb = NoTracking()
        if not self.finished and is_main():
            self._acquire_lock()
            atomic_write(
                self.dir / "config.yaml",
                lambda path: path.write_text(
                    yaml.safe_dump(to_dict(self.cfg), sort_keys=False), encoding="utf-8"
                ),
            )
            self._trim_metrics()
            self._wandb = start_wandb(self.cfg, stage, self.dir, self._wandb_id)
            self._wandb_id = self._wandb.id or self._wandb_id  # kept while the run is resumed without wandb

    def _acquire_lock(self) -> None:
        """Lock the run while this process lives. Raises `UserError` if another process holds the lock."""
        self._lock = lock(
            self.dir / "lock",
            f"another process trains {self.dir}; wait for it, or choose another --exp",
        )

    def _resume(self) -> None:
        checkpoint = load_checkpoint(self.checkpoint_path)
        saved = saved_config(checkpoint)
        if saved.precision == "auto" or (checkpoint["finished"] and self.precision_is_auto):
            saved = replace(saved, precision=self.cfg.precision)
        changes = diff(self._relevant(saved), self._relevant(self.cfg))
        if changes:
            raise UserError(
                f"{self.dir} was trained with other settings ({'; '.join(changes)});"
                f" choose another --exp, or delete {self.dir}"
            )
        if changed := changed_inputs(checkpoint, self.built_on):
            raise UserError(
                f"{self.dir} was trained before {' and '.join(changed)} changed;"
                f" restore the old ones, choose another --exp, or delete {self.dir} to train it again"
            )
        self.step, self.finished = checkpoint["step"], checkpoint["finished"]
        self.metrics, self.state = checkpoint["metrics"], checkpoint["state"]
        self._sums, self._count, self._logged = (checkpoint[key] for key in ("sums", "count", "logged"))
        if "unexplained_variance" in self._sums:  # what older versions tracked
            self._sums["explained_variance"] = self._count - self._sums.pop("unexplained_variance")
        self._wandb_id = checkpoint["wandb_id"]
        self._started -= checkpoint.get("seconds", 0.0)  # of earlier processes; older checkpoints lack it
        if self.finished:
            print("finished already")
        else:
            self._rng = checkpoint["rng"]

    def _relevant(self, cfg: Config) -> dict:
        """The part of a config that must not change."""
        values, everything = {}, to_dict(cfg)
        for key in self._config_keys:
            group, _, name = key.partition(".")
            values[key] = everything[group][name] if name else everything[group]
        for group in values.values():
            for key in FREE_KEYS if isinstance(group, dict) else ():
                group.pop(key, None)
        return values

    def _trim_metrics(self) -> None:
        """Drop the lines that a killed run logged after its last checkpoint; they will be logged again."""
        if not self.metrics_path.exists():
            return
        with reading(self.metrics_path):
            lines = self.metrics_path.read_text(encoding="utf-8").splitlines()
        kept = []
        for line in lines:
            with contextlib.suppress(ValueError):
                if json.loads(line)["step"] <= self._logged:
                    kept.append(line + "\n")
        atomic_write(self.metrics_path, lambda path: path.write_text("".join(kept), encoding="utf-8"))

    def loop(
        self, total: int, state: Callable[[], dict], *, save_every: int, unit: str, scale: int = 1
    ) -> Iterator[int]:
        """Yield the remaining steps; show progress, write checkpoints, save and exit on a signal.

        `state` returns what a resumed run needs; random states are added. A checkpoint is written every
        `save_every` steps, every `save_minutes`, and after the last step, as evaluation may take long.
        Progress is shown in `unit`s, `scale` per step. If these are env steps ("step"), messages count
        them, as the config does. After a signal (`STOP_SIGNALS` or Ctrl-C, in the main thread only), the step
        is completed, the state saved and SystemExit raised with 128 + the signal.
        """
        counted = scale if unit == "step" else 1
        if self._rng:
            print(f"continues from step {self.step * counted:,}")
            set_rng_state(self._rng, self.device)
            self._rng = None  # a later loop of this process goes on from where this one ended
        handlers = handle_signals((*STOP_SIGNALS, signal.SIGINT), self._on_signal)
        bar = tqdm(
            total=total * scale,
            initial=self.step * scale,
            unit=unit,
            desc=self.stage,
            mininterval=1 if sys.stderr.isatty() else 60,  # fewer lines in log files
            unit_scale=True,
            disable=not is_main(),
        )
        try:
            while self.step < total:
                yield self.step
                self.step += 1
                bar.update(scale)
                overdue = time.monotonic() - self._saved > 60 * self.cfg.save_minutes
                stop, overdue = all_max(self._stop_signal, overdue)
                if stop or self.step == total or self.step % save_every == 0 or overdue:
                    self.save(state())
                if stop:
                    bar.close()
                    if is_main():
                        say(f"stopped at step {self.step * counted:,}; the same command continues")
                    sys.exit(128 + stop)
        finally:
            bar.close()
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, frame: Any) -> None:
        # A second Ctrl-C exits at once. Repeated signals of schedulers and of torchrun are ignored.
        if number == self._stop_signal == signal.SIGINT and not under_torchrun():
            sys.exit(128 + number)
        self._stop_signal = number

    def save(self, state: dict) -> None:
        """Write the checkpoint of the current step. It replaces the previous one once it has been verified.

        Rank 0 writes, the other ranks wait. Raises `UserError` if the state is not finite, a metric has
        diverged or the file cannot be written.
        """
        tensors = (
            (path, x) for path, x in iter_leaves(state) if isinstance(x, Tensor) and x.is_floating_point()
        )
        bad = next((path for path, x in tensors if not x.isfinite().all()), None)
        if bad:
            raise self._diverged(f"{'.'.join(map(str, bad))} holds values that are not finite", self.step)
        self._means(self.step)  # raises if the run has diverged, and so keeps the last good checkpoint
        if is_main():
            self._write(state)
        all_max()
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
            "seconds": time.monotonic() - self._started,
            "rng": rng_state(self.device),
            "wandb_id": self._wandb_id,
            "provenance": self.provenance,
            "device": self._hardware,
            "built_on": self.built_on,
        }
        checkpoint["checksum"] = checksum(checkpoint)
        with (
            writing(self.metrics_path, self._remaining()),
            self.metrics_path.open("a", encoding="utf-8") as file,
        ):
            os.fsync(file.fileno())
        atomic_write(self.checkpoint_path, lambda path: torch.save(checkpoint, path), verify=load_checkpoint)

    def finish(self, state: dict, result: dict[str, float] | None = None) -> None:
        """Write the final checkpoint, with `result` added to its metrics, and print the metrics."""
        self.finished = True
        self.metrics |= result or {}
        self.save(state)
        self._wandb.finish()
        if is_main():
            (self.dir / "lock").unlink(missing_ok=True)
        self.print_result()

    def print_result(self) -> None:
        """Print the latest metrics and the path of the checkpoint."""
        for key, value in self.metrics.items():
            value = f"{len(value)} results" if isinstance(value, list) else value
            print(f"  {key:<28} {value:.4g}" if isinstance(value, float) else f"  {key:<28} {value}")
        print(f"{self.stage} done: {self.checkpoint_path}")

    def track(self, metrics: dict[str, Tensor | float]) -> None:
        """Add a step's scalars to the averages that `log` writes next. This never waits for the device."""
        for key, value in metrics.items():
            self._sums[key] = self._sums.get(key, 0.0) + value
        self._count += 1

    def log(self, step: int, extra: dict[str, Any] | None = None) -> None:
        """Log one line for `step`: averages of the scalars tracked since the last line, and `extra` metrics.

        Raises `UserError` if a metric is not finite, a loss or gradient norm exceeds `MAX_LOSS`, or the file
        cannot be written.
        """
        values = self._means(step) | to_floats(extra or {})
        self._sums, self._count = {}, 0
        bad = {key: value for key, value in values.items() if not math.isfinite(value)}
        if bad:
            raise self._diverged(_format(bad), step)
        line = {"step": step, **values, "seconds": round(time.monotonic() - self._started, 1)}
        if is_main():
            with (
                writing(self.metrics_path, self._remaining()),
                self.metrics_path.open("a", encoding="utf-8") as file,
            ):
                file.write(json.dumps(line) + "\n")
        self._wandb.log(line, step=step)
        self.metrics |= values
        self._logged = step

    def _means(self, step: int) -> dict[str, float]:
        """Averages of the scalars tracked since the last line.

        Raises `UserError` if a loss or gradient norm exceeds `MAX_LOSS`.
        """
        means = {key: value / self._count for key, value in to_floats(self._sums).items()}
        # Other metrics may be huge in a healthy run, such as explained variance before the first reward.
        watched = {key: value for key, value in means.items() if key.endswith(("loss", "grad_norm"))}
        bad = {key: value for key, value in watched.items() if not abs(value) < MAX_LOSS}
        if bad:
            raise self._diverged(_format(bad), step)
        return means

    def _diverged(self, what: str, step: int) -> UserError:
        return UserError(
            f"{self.stage}: {what} at step {step:,}; {self._remaining()}; try a lower learning rate"
        )

    def _remaining(self) -> str:
        if not self.checkpoint_path.exists():
            return "nothing was saved yet"
        return f"the last good checkpoint, {self.checkpoint_path}, is kept"


def _format(metrics: dict[str, float]) -> str:
    return " and ".join(f"{key} is {value:.3g}" for key, value in metrics.items())
