"""Runs as plain data in results.json: tables and figures can be made again without the checkpoints."""

import json
import math
from dataclasses import replace
from functools import reduce
from pathlib import Path
from typing import Any

from lapo.config import to_dict
from lapo.errors import UserError
from lapo.reporting.grid import INPUTS, Policy, StageRun, settings
from lapo.runs.checkpoints import saved_config
from lapo.runs.files import reading
from lapo.sources import leaves, merge, nested

LINE_KEYS = "step", "train_return", "eval_return_mean"
"""What is kept of metrics.jsonl: the points of learning curves."""


def to_records(policies: list[Policy]) -> dict:
    """Policies as plain data. Configs are kept as what distinguishes them from the first one's."""
    base = leaves(to_dict(policies[0].stage.cfg)) if policies else {}

    def record(run: StageRun) -> dict:
        values = leaves(to_dict(run.cfg))
        return {
            "config": {key: value for key, value in values.items() if key not in base or base[key] != value},
            "steps": run.steps,
            "seconds": run.seconds,
            "device": run.device,
        }

    return {
        "config": base,
        "policies": [
            {
                **{key: getattr(policy, key) for key in ("exp", "game", "seed", "mode", "frames")},
                "built_on": policy.settings.get(INPUTS),
                "run": record(policy.stage)
                | {
                    "finished": policy.stage.finished,
                    "metrics": without_nan(policy.stage.metrics),
                    "lines": [
                        {key: line[key] for key in LINE_KEYS if key in line}
                        for line in policy.stage.lines
                        if any(key in line for key in LINE_KEYS[1:])
                    ],
                },
                "earlier": {stage: record(run) for stage, run in policy.earlier.items()},
            }
            for policy in policies
        ],
    }


def without_nan(values: Any) -> Any:
    """Nested dicts and lists without entries that are NaN, which JSON does not know."""
    if isinstance(values, dict):
        return {key: without_nan(value) for key, value in values.items() if not is_nan(value)}
    return [without_nan(value) for value in values] if isinstance(values, list) else values


def is_nan(value: Any) -> bool:
    """Whether a value is the number NaN."""
    return isinstance(value, float) and math.isnan(value)


def read_records(path: Path, results_dir: str) -> list[Policy]:
    """The policies in a results.json, as if their runs lay in `results_dir`.

    Raises `UserError` if the file is missing or holds no runs.
    """
    with reading(path):
        missing = not path.is_file()
    if missing:
        raise UserError(f"--with {path}: there is no such file; name a results.json")
    try:
        with reading(path):
            found = json.loads(path.read_text(encoding="utf-8"))["runs"]
        return [policy_of(record, found["config"], results_dir) for record in found["policies"]]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"--with {path}: the file holds no runs; name a results.json of results.py") from None


def policy_of(record: dict, base: dict, results_dir: str) -> Policy:
    """One policy of `to_records`."""

    def run(found: dict) -> StageRun:
        parts = (nested(key, value) for key, value in (base | found["config"]).items())
        values = reduce(lambda made, part: merge(made, part, "a record"), parts, {})
        return StageRun(
            cfg=replace(saved_config({"config": values}), results_dir=results_dir),
            metrics=found.get("metrics", {}),
            lines=found.get("lines", []),
            steps=found["steps"],
            finished=found.get("finished", True),
            seconds=found["seconds"],
            device=found["device"],
            weights="",
            built_on={},
        )

    stage = run(record["run"])
    earlier = {name: run(each) for name, each in record["earlier"].items()}
    chosen = settings(record["mode"], stage, earlier)
    if record["built_on"] is not None:
        chosen[INPUTS] = record["built_on"]
    place = (record[key] for key in ("exp", "game", "seed", "mode"))
    return Policy(*place, stage, earlier, chosen, record["frames"])
