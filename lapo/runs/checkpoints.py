"""Checkpoints: plain data (tensors, numbers, strings), verified; `load_stage` finds an earlier stage's."""

import contextlib
import platform
import shlex
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lapo.config import ROOT, Config, ModelConfig, VQConfig, diff, to_dict, validate
from lapo.errors import UserError
from lapo.runs.files import reading

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
    try:
        with reading(path):
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip() is not None  # torch does not compare the checksums
            checkpoint = None if damaged else torch.load(path, map_location="cpu", weights_only=True)
        # Whoever loads a checkpoint, changes it and saves it again leaves them out.
        if isinstance(checkpoint, dict) and "fingerprints" in checkpoint:
            damaged = checkpoint.pop("fingerprints") != fingerprints(checkpoint)
    except UserError:
        raise
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


def inherit(cfg: Config, checkpoint: dict, model_keys: tuple[str, ...]) -> Config:
    """`cfg` with the bottleneck and the named sizes of an earlier stage's checkpoint; prints what changes."""
    saved = checkpoint["config"]
    model = to_dict(cfg.model) | {key: saved["model"][key] for key in model_keys}
    changes = diff({"model": to_dict(cfg.model), "vq": to_dict(cfg.vq)}, {"model": model, "vq": saved["vq"]})
    print(f"inherits {', '.join(model_keys)}, vq" + (f" ({'; '.join(changes)})" if changes else ""))
    return replace(cfg, model=validate(model, ModelConfig), vq=validate(saved["vq"], VQConfig))


def tensors_of(values: Any, key: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors in nested dicts, lists and tuples, by their path."""
    if isinstance(values, Tensor):
        yield key, values
    elif isinstance(values, dict | list | tuple):
        for name, value in values.items() if isinstance(values, dict) else enumerate(values):
            yield from tensors_of(value, f"{key}.{name}".lstrip("."))


def fingerprints(checkpoint: dict) -> dict[str, str]:
    """Type, shape and checksum of all tensors, by their path.

    The checksums of the zip file alone do not tell: a flipped attribute of a member lets torch return memory
    that it never wrote, and weights of another type would be converted in silence.
    """

    def checksum(x: Tensor) -> int:
        return zlib.crc32(x.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())

    return {name: f"{x.dtype} {tuple(x.shape)} {checksum(x):08x}" for name, x in tensors_of(checkpoint)}


def provenance() -> dict[str, str]:
    """Versions of what made a checkpoint."""
    revision = "unknown"
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
        revision = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return {"revision": revision, "python": platform.python_version(), "torch": str(torch.__version__)}
