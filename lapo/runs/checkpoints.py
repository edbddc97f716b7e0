"""Checkpoints: plain data (tensors, numbers, strings), verified; `load_stages` finds the earlier stages'."""

import contextlib
import functools
import hashlib
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lapo.config import ROOT, Config, diff, load_config, to_dict, validate
from lapo.errors import UserError
from lapo.runs.files import reading

FORMAT = 3
FIELDS = (
    *("stage", "config", "step", "finished", "metrics", "state", "sums", "count", "logged", "rng"),
    *("wandb_id", "provenance"),
)
"""What a checkpoint of any age holds beside its format; newer ones also have `built_on` and `checksum`."""
STAGE3_GROUPS = "stage3", "ppo", "decoder", "offline", "eval"
"""Groups of the config that no earlier stage reads."""
NETWORKS = "idm", "world_model", "policy"
"""The parts of a stage's state that later stages build on."""


def load_checkpoint(path: Path, command: str | None = None) -> dict:
    """Read a checkpoint: `stage`, `config`, `step`, `finished`, `metrics`, `state`, `provenance`.

    `command` is what makes the checkpoint, for the message when it is missing. Raises `UserError` if it is
    missing, damaged or of another format, or if something keeps it from being read.
    """
    with reading(path):
        missing = not path.is_file()
    if missing:
        raise UserError(
            f"the checkpoint {path} does not exist" + (f"; make it with `{command}`" if command else "")
        )
    damaged = UserError(f"the checkpoint {path} cannot be read: damaged, or not one of ours; delete it")
    try:
        with reading(path):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except Exception:  # whatever the readers raise for a damaged file
        raise damaged from None
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != FORMAT:
        found = checkpoint.get("format") if isinstance(checkpoint, dict) else type(checkpoint).__name__
        raise UserError(
            f"the checkpoint {path} has format {found!r}; this version of lapo reads format {FORMAT}"
        )
    # Whoever loads a checkpoint, changes it and saves it again leaves the checksum out.
    if checkpoint.pop("checksum", None) not in (None, checksum(checkpoint)):
        raise damaged
    missing = [key for key in FIELDS if key not in checkpoint]
    if missing:
        raise UserError(f"the checkpoint {path} has no `{missing[0]}`; delete it")
    return checkpoint


def checksum(values: Any) -> str:
    """16 hex digits that tell nested dicts, lists and tuples of tensors, numbers and strings from all others.

    Names, types and shapes count as well: a flipped attribute of a member of the file lets torch return
    memory that it never wrote, and weights of another type would be converted in silence.
    """
    digest = hashlib.blake2b(digest_size=8)
    for path, value in leaves(values):
        if isinstance(value, Tensor):
            value = value.cpu().contiguous()
            digest.update(f"{path} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.reshape(-1).view(torch.uint8).numpy())
        else:
            digest.update(f"{path} {value!r}".encode())
    return digest.hexdigest()


def leaves(values: Any, path: tuple = ()) -> Iterator[tuple[tuple, Any]]:
    """What is neither dict, list nor tuple in nested ones, and empty ones of these, by the keys to it."""
    if isinstance(values, dict | list | tuple) and values:
        for key, value in values.items() if isinstance(values, dict) else enumerate(values):
            yield from leaves(value, (*path, key))
    else:
        yield path, values


# ---------------------------------------------------------------- earlier stages


def load_stages(cfg: Config, *stages: str) -> dict[str, dict]:
    """The finished checkpoints of earlier stages of the same experiment, game and seed, by stage.

    Raises `UserError` as `load_stage`, and if one was built on other weights than another one holds.
    """
    checkpoints = {stage: load_stage(cfg, stage, f"{stage}.py") for stage in stages}
    weights = {stage: weights_of(checkpoint) for stage, checkpoint in checkpoints.items()}
    for stage, checkpoint in checkpoints.items():
        if others := stale(checkpoint, weights):
            folder = cfg.run_dir / stage
            raise UserError(
                f"{folder} was built on another {others[0]} than {cfg.run_dir / others[0]} holds now;"
                f" delete {folder} and run {stage}.py again, or put the old {others[0]} back"
            )
    return checkpoints


def load_stage(cfg: Config, stage: str, script: str) -> dict:
    """The finished checkpoint of one earlier stage.

    Raises `UserError` naming the command that makes it, if it is missing or unfinished: `script` with this
    process's own options, as every stage takes the same. Also if it was trained on another game or look.
    """
    words, reads = ["python", script], True
    for word in sys.argv[1:]:
        if word.startswith("--"):
            reads = word[2:].split(".")[0] not in STAGE3_GROUPS
        words += [word] * reads
    command = shlex.join(words)
    path = cfg.run_dir / stage / "checkpoint.pt"
    checkpoint = load_checkpoint(path, command)
    if not checkpoint["finished"]:
        raise UserError(f"{path} is unfinished, at step {checkpoint['step']:,}; continue it with `{command}`")
    for key in ("env", "visuals"):
        trained, wanted = checkpoint["config"][key], getattr(cfg, key)
        if trained != wanted:
            raise UserError(
                f"{path} was trained with {key} {trained}, but {key} is {wanted}; choose --{key} {trained}"
            )
    print(f"{stage}: {path}")
    return checkpoint


def stale(checkpoint: dict, weights: dict[str, str]) -> list[str]:
    """The stages in `weights`, checksums by name, that are not those which a checkpoint was built on.

    What a checkpoint does not say is taken to be right.
    """
    built_on = checkpoint.get("built_on", {})
    return [name for name, found in weights.items() if built_on.get(name, found) != found]


def weights_of(checkpoint: dict) -> str:
    """Checksum of the weights that later stages build on."""
    return checksum({name: x for name, x in checkpoint["state"].items() if name in NETWORKS})


def saved_config(checkpoint: dict) -> Config:
    """The configuration that a checkpoint was made with.

    Keys that did not exist then have today's defaults, and those that no longer exist are left out, so that a
    new key makes no checkpoint unusable.
    """
    values = _lay_over(to_dict(load_config([])), checkpoint["config"])
    return validate(values, source="the checkpoint's config")


def _lay_over(values: dict, saved: dict) -> dict:
    """`values`, with those of its keys replaced that are in `saved`, group by group."""
    merged = {}
    for key, value in values.items():
        groups = isinstance(value, dict) and isinstance(saved.get(key), dict)
        merged[key] = _lay_over(value, saved[key]) if groups else saved.get(key, value)
    return merged


def inherit(cfg: Config, checkpoint: dict, model_keys: tuple[str, ...]) -> Config:
    """`cfg` with the bottleneck and the named sizes of an earlier stage's checkpoint; prints what changes."""
    saved = saved_config(checkpoint)
    model = replace(cfg.model, **{key: getattr(saved.model, key) for key in model_keys})
    inherited = replace(cfg, model=model, vq=saved.vq)
    changes = diff(to_dict(cfg), to_dict(inherited))
    print(f"inherits {', '.join(model_keys)}, vq" + (f" ({'; '.join(changes)})" if changes else ""))
    return inherited


@functools.cache
def provenance() -> dict[str, str]:
    """Versions of what makes a checkpoint, as they are when first asked for: later commits have not run."""
    revision = "unknown"
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
        revision = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return {"revision": revision, "python": platform.python_version(), "torch": str(torch.__version__)}
