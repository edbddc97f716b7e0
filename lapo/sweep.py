"""Sweeps over the number of labels, in the modes of stage 3 that learn from labelled frames.

After its own training, a run trains on every number of labels in `offline.sweep`, on `offline.draws` draws
each. The results are its metric `sweep`, a list of dicts. A training on the first draw equals, bit for bit, a
run with as many labels and no sweep: the same labels, initial weights, batches and evaluation.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
from torch import nn

from lapo.acting import evaluate_policy
from lapo.config import Config
from lapo.data_loader import Shared
from lapo.imitation import labelled
from lapo.runs.compute import Compute, seed_everything, to_floats
from lapo.runs.run import Run


class Training:
    """One training of a sweep. It has what the modes use of a `Run`, and counts its steps from 0.

    Attributes
        stage    that of the run
        state    its state in the run's checkpoint; None if it was not begun
        metrics  what it logged
    """

    def __init__(self, run: Run, start: int, state: dict | None, final: dict):
        """`start`: the run's steps before this training; `final`: what every checkpoint holds, too."""
        self.run, self.start, self.final = run, start, final
        self.stage, self.state, self.metrics = run.stage, state, {}

    def loop(self, total: int, state: Callable[[], dict], *, save_every: int, unit: str) -> Iterator[int]:
        """See `Run.loop`."""

        def whole() -> dict:
            return self.final | {"training": state()}

        for step in self.run.loop(self.start + total, whole, save_every=save_every, unit=unit):
            yield step - self.start

    def log(self, step: int, metrics: dict[str, Any]) -> None:
        """Keep `metrics`."""
        self.metrics |= to_floats(metrics)


def check_labels(cfg: Config, compute: Compute, shared: Shared) -> None:
    """Raise `UserError` before anything is trained if the data has too few labels for the sweep."""
    numbers = [cfg.offline.labels, *cfg.offline.sweep]
    labels = 0 if 0 in numbers else max(numbers)  # 0: all, which takes the most memory
    if labels != cfg.offline.labels:
        labelled(at(cfg, labels), compute, shared)


def at(cfg: Config, labels: int, draw: int = 0) -> Config:
    """The config of a training: with as many labels, and with another seed for every draw but the first."""
    seed = int(np.random.SeedSequence((cfg.seed, draw)).generate_state(1)[0]) if draw else cfg.seed
    return replace(cfg, seed=seed, offline=replace(cfg.offline, labels=labels))


def in_sweep(cfg: Config, run: Run) -> bool:
    """Whether a resumed run has finished its own training and begun the next one."""
    return bool(run.state) and "training" in run.state


def train_sweep(
    train: Callable[..., nn.Module],
    cfg: Config,
    compute: Compute,
    run: Run,
    earlier: dict,
    shared: Shared,
    final: dict,
) -> None:
    """Do all trainings of the sweep, and set the run's metric `sweep`.

    `train` is the mode's function, `final` the state of the run's own training, which has been evaluated. The
    results hold `labels`, whether these are `all` that there are because the sweep says so, `draw` (from 0)
    and the metrics of a run. A resumed run goes on with the training that it was at.
    """
    trainings = cfg.offline.trainings
    steps, resumed = cfg.total_steps(run.stage) // len(trainings), run.step
    results = run.metrics.setdefault("sweep", [])
    if not results and cfg.offline.labels in cfg.offline.sweep:
        own = {key: value for key, value in run.metrics.items() if key != "sweep"}
        results.append({"labels": cfg.offline.labels, "draw": 0} | own)
    for number, (labels, draw) in enumerate(trainings[1:], 1):
        start = number * steps
        if start + steps < resumed:
            continue
        state = run.state["training"] if start < resumed else None
        chosen = at(cfg, labels, draw)
        seed_everything(chosen.seed)
        training = Training(run, start, state, final)
        policy = train(chosen, compute, training, earlier, shared)
        result = training.metrics | evaluate_policy(policy, cfg, compute)
        count = {"labels": labels}
        if not labels:
            count = {"labels": len(labelled(chosen, compute, shared)[1]), "all": True}
        results.append(count | {"draw": draw} | result)
        print(described(results[-1]))
    results.sort(key=lambda result: (result["labels"], result["draw"]))


def described(result: dict) -> str:
    """A result in one line."""
    text = f"{result['labels']:,} labels, draw {result['draw']}"
    if "return_mean" in result:
        text += f", return {result['return_mean']:.2f} ± {result['return_stderr']:.2f}"
    if "action_acc_test" in result:
        text += f", action accuracy {result['action_acc_test']:.3f}"
    return text
