"""Reading, verifying and comparing checkpoints, which hold only tensors, numbers and strings."""

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
"""Fields of every checkpoint, beside `format`. Newer ones also have `built_on`, `seconds`, `device`
and `checksum`."""
STAGE3_GROUPS = "stage3", "ppo", "decoder", "offline", "relabel", "ilpo", "eval"
"""Groups of the config that stages 1 and 2 do not read."""
NETWORKS = "idm", "world_model", "policy"
"""Entries of a stage's state that later stages use."""


def load_checkpoint(path: Path, command: str | None = None) -> dict:
    """Read a checkpoint: `stage`, `config`, `step`, `finished`, `metrics`, `state`, `provenance`.

    Raises `UserError` if it is missing, damaged, unreadable or of another format. For a missing one, the
    error names `command`, which produces it.
    """
    with reading(path):
        missing = not path.is_file()
    if missing:
        raise UserError(
            f"the checkpoint {path} does not exist" + (f"; make it with `{command}`" if command else "")
        )
    damaged = UserError(f"the checkpoint {path} is damaged, or was not written by lapo; delete it")
    try:
        with reading(path):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except Exception:  # damaged files make torch and zipfile raise almost anything
        raise damaged from None
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != FORMAT:
        found = checkpoint.get("format") if isinstance(checkpoint, dict) else type(checkpoint).__name__
        raise UserError(
            f"the checkpoint {path} has format {found!r}; this version of lapo reads format {FORMAT}"
        )
    # A checkpoint that a user loaded, changed and saved again may lack the checksum.
    if checkpoint.pop("checksum", None) not in (None, checksum(checkpoint)):
        raise damaged
    missing = [key for key in FIELDS if key not in checkpoint]
    if missing:
        raise UserError(f"the checkpoint {path} has no `{missing[0]}`; delete it")
    return checkpoint


def checksum(values: Any) -> str:
    """Checksum (16 hex digits) of nested dicts, lists and tuples of tensors, numbers and strings.

    It also covers keys, dtypes and shapes: after a bit flip in the file's directory torch may return
    uninitialised memory, and weights of another dtype would be converted silently.
    """
    digest = hashlib.blake2b(digest_size=8)
    for path, value in iter_leaves(values):
        if isinstance(value, Tensor):
            value = value.cpu().contiguous()
            digest.update(f"{path} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.reshape(-1).view(torch.uint8).numpy())
        else:
            digest.update(f"{path} {value!r}".encode())
    return digest.hexdigest()


def iter_leaves(values: Any, path: tuple = ()) -> Iterator[tuple[tuple, Any]]:
    """Yield (path of keys, leaf) of nested dicts, lists and tuples; empty ones are leaves."""
    if isinstance(values, dict | list | tuple) and values:
        for key, value in values.items() if isinstance(values, dict) else enumerate(values):
            yield from iter_leaves(value, (*path, key))
    else:
        yield path, values


# ---------------------------------------------------------------- earlier stages


def load_stages(cfg: Config, *stages: str) -> dict[str, dict]:
    """The finished checkpoints of earlier stages of the same experiment, game and seed, by stage.

    Raises `UserError` as `load_stage` does, and if the stages were not trained on one another.
    """
    checkpoints = {stage: load_stage(cfg, stage, f"{stage}.py") for stage in stages}
    weights = {stage: weights_checksum(checkpoint) for stage, checkpoint in checkpoints.items()}
    for stage, checkpoint in checkpoints.items():
        if others := changed_inputs(checkpoint, weights):
            folder = cfg.stage_dir(stage)
            raise UserError(
                f"{folder} was trained on another {others[0]} than {cfg.stage_dir(others[0])} holds now;"
                f" delete {folder} and run {stage}.py again, or restore the old {others[0]}"
            )
    return checkpoints


def load_stage(cfg: Config, stage: str, script: str) -> dict:
    """The finished checkpoint of one earlier stage.

    Raises `UserError` if it is missing or unfinished, or was trained on another game or visuals. The error
    names the command that produces it: `script` with the options of this process, which all stages share.
    """
    words, shared = ["python", script], True
    for word in sys.argv[1:]:
        if word.startswith("--"):
            shared = word[2:].split(".")[0] not in STAGE3_GROUPS
        words += [word] * shared
    command = shlex.join(words)
    path = cfg.stage_dir(stage) / "checkpoint.pt"
    with reading(path):
        missing = not path.exists()
    if missing:
        raise UserError(
            f"the checkpoint {path} does not exist; make it with `{command}`, or take that of another"
            " experiment with --stages_from EXP"
        )
    checkpoint = load_checkpoint(path)
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


def changed_inputs(checkpoint: dict, checksums: dict[str, str]) -> list[str]:
    """Names of inputs (stages, frames) that have changed since a checkpoint was trained on them.

    `checksums` are the inputs' present ones, by name. Older checkpoints store none, and count as unchanged.
    """
    built_on = checkpoint.get("built_on", {})
    return [name for name, found in checksums.items() if built_on.get(name, found) != found]


def weights_checksum(checkpoint: dict) -> str:
    """Checksum of the weights that later stages use."""
    return checksum({name: x for name, x in checkpoint["state"].items() if name in NETWORKS})


def saved_config(checkpoint: dict) -> Config:
    """The config that a checkpoint was trained with.

    Newer keys get today's defaults and removed keys are dropped, so checkpoints stay usable when keys change.
    """
    values = _overlay(to_dict(load_config([])), checkpoint["config"])
    return validate(values, source="the checkpoint's config")


def _overlay(values: dict, saved: dict) -> dict:
    """`values`, overwritten with `saved` key by key and group by group. Other keys of `saved` are dropped."""
    merged = {}
    for key, value in values.items():
        groups = isinstance(value, dict) and isinstance(saved.get(key), dict)
        merged[key] = _overlay(value, saved[key]) if groups else saved.get(key, value)
    return merged


def inherit(cfg: Config, checkpoint: dict, model_keys: tuple[str, ...]) -> Config:
    """`cfg` with the quantiser, windows and named sizes of an earlier stage's checkpoint; prints them."""
    saved = saved_config(checkpoint)
    model = replace(cfg.model, **{key: getattr(saved.model, key) for key in model_keys})
    data = replace(cfg.data, image_size=saved.data.image_size, context=saved.data.context)
    inherited = replace(cfg, model=model, vq=saved.vq, data=data)
    changes = diff(to_dict(cfg), to_dict(inherited))
    print(
        f"inherits {', '.join(model_keys)}, vq, image_size, context"
        + (f" ({'; '.join(changes)})" if changes else "")
    )
    return inherited


@functools.cache
def provenance() -> dict[str, str]:
    """Revision of the code, versions of Python and torch. Cached: a later commit is not what runs."""
    revision = "unknown"
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
        revision = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return {"revision": revision, "python": platform.python_version(), "torch": str(torch.__version__)}
