"""Runs as plain data in results.json: tables and figures can be made again without the checkpoints."""

import json
import math
from collections.abc import Iterable
from dataclasses import replace
from functools import reduce
from pathlib import Path
from typing import Any

from lapo.config import resolve, to_dict
from lapo.errors import UserError
from lapo.reporting.grid import INPUTS, Grid, Policy, Stage1, StageRun, place, settings, stage1_settings
from lapo.runs.checkpoints import saved_config
from lapo.runs.files import reading
from lapo.sources import leaves, merge, nested

PLACE = "exp", "game", "seed"
LINE_KEYS = "step", "train_return", "eval_return_mean"
"""What is kept of metrics.jsonl: the points of learning curves."""


def to_records(grid: Grid) -> dict:
    """A grid's finished runs as plain data, see `read_records`.

    Configs are kept as their differences from the first one. The order does not depend on whether a run came
    from its folder or from a file.
    """
    policies, stage1 = sorted(grid.finished, key=place), sorted(grid.stage1, key=place)
    everything = [*(policy.stage for policy in policies), *(found.run for found in stage1)]
    base = config_of(everything[0]) if everything else {}

    def record(run: StageRun, *, results: bool = True) -> dict:
        values = config_of(run)
        changes = {key: value for key, value in values.items() if key not in base or base[key] != value}
        found = {"config": changes, "steps": run.steps, "seconds": run.seconds, "device": run.device}
        found |= {"weights": run.weights, "built_on": run.built_on}
        if results:
            lines = [line for line in run.lines if any(key in line for key in LINE_KEYS[1:])]
            found["metrics"] = without_nan(run.metrics)
            found["lines"] = [{key: line[key] for key in LINE_KEYS if key in line} for line in lines]
        return found

    return {
        "config": base,
        "policies": [
            {
                **{key: getattr(policy, key) for key in (*PLACE, "mode", "frames")},
                "built_on": policy.settings.get(INPUTS),
                "run": record(policy.stage),
                "earlier": {stage: record(run, results=False) for stage, run in policy.earlier.items()},
            }
            for policy in policies
        ],
        "stage1": [
            {key: getattr(found, key) for key in PLACE} | {"run": record(found.run)} for found in stage1
        ],
    }


def config_of(run: StageRun) -> dict[str, Any]:
    """A run's config as `group.key`, but for the folder, which is another one wherever the record is read."""
    return {key: value for key, value in leaves(to_dict(run.cfg)).items() if key != "results_dir"}


def with_runs_of(grid: Grid, path: Path, results_dir: str) -> Grid:
    """`grid` and those runs of an earlier results.json at `path` that it lacks, if there is one with runs.

    Raises `UserError` if this version cannot read these runs.
    """
    with reading(path):
        text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    try:
        if "runs" not in json.loads(text):
            return grid  # of an older version
    except ValueError:
        return grid
    try:
        earlier = read_records([path], results_dir)
    except UserError:
        raise UserError(
            f"{path} holds runs that this version of lapo cannot read; move it, or choose another --out"
        ) from None
    has = {place(found) for found in (*grid.finished, *grid.stage1)}
    return Grid(
        policies=[*grid.finished, *(found for found in earlier.policies if place(found) not in has)],
        stage1=[*grid.stage1, *(found for found in earlier.stage1 if place(found) not in has)],
    )


def without_nan(values: Any) -> Any:
    """Nested dicts and lists without entries that are NaN, which JSON does not know."""
    if isinstance(values, dict):
        return {
            key: without_nan(value)
            for key, value in values.items()
            if not (isinstance(value, float) and math.isnan(value))
        }
    return [without_nan(value) for value in values] if isinstance(values, list) else values


def read_records(paths: Iterable[Path], results_dir: str) -> Grid:
    """The runs in several results.json, as if they lay in `results_dir`; of the same run the last one counts.

    Raises `UserError` if a file is missing or holds no runs.
    """
    grid = Grid()
    for path in map(existing, paths):
        with reading(path):
            missing = not path.is_file()
        if missing:
            raise UserError(f"--with {path}: there is no such file; name a results.json")
        try:
            with reading(path):
                found = json.loads(path.read_text(encoding="utf-8"))["runs"]
            base = found["config"]
            grid.policies += [read_policy(record, base, results_dir) for record in found["policies"]]
            for record in found["stage1"]:
                run = read_run(record["run"], base, results_dir)
                grid.stage1.append(Stage1(*(record[key] for key in PLACE), run, stage1_settings(run)))
        except (ValueError, KeyError, TypeError, AttributeError):
            message = f"--with {path}: the file holds no runs; name a results.json of results.py"
            raise UserError(message) from None
    return grid


def existing(path: Path) -> Path:
    """A path as it is or, if it is relative and nothing is there, from the repository's root."""
    return path if path.exists() or not resolve(str(path)).exists() else resolve(str(path))


def read_policy(record: dict, base: dict, results_dir: str) -> Policy:
    """A policy of `to_records`; `base` is its first config."""
    stage = read_run(record["run"], base, results_dir)
    earlier = {name: read_run(found, base, results_dir) for name, found in record["earlier"].items()}
    chosen = settings(record["mode"], stage, earlier)
    if record["built_on"] is not None:
        chosen[INPUTS] = record["built_on"]
    where = (record[key] for key in (*PLACE, "mode"))
    return Policy(*where, stage, earlier, chosen, record["frames"])


def read_run(record: dict, base: dict, results_dir: str) -> StageRun:
    """A stage of `to_records`."""
    parts = (nested(key, value) for key, value in (base | record["config"]).items())
    values = reduce(lambda made, part: merge(made, part, "a record"), parts, {})
    return StageRun(
        cfg=replace(saved_config({"config": values}), results_dir=results_dir),
        metrics=record.get("metrics", {}),
        lines=record.get("lines", []),
        steps=record["steps"],
        finished=True,
        seconds=record["seconds"],
        device=record["device"],
        weights=record.get("weights", ""),
        built_on=record.get("built_on", {}),
    )
