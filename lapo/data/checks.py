"""Checks of a data set: it exists, it was rendered as configured, and its chunks are intact.

`python data_loader.py --check expert_data/bigfish` checks chunks and prints a table. It checks more than
training reads: the checksums of all arrays, and that rewards, returns, values and log-probabilities are one
finite number per frame.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lapo.command_line import Parser
from lapo.config import Config, resolve
from lapo.data.chunks import (
    KEYS,
    BadChunk,
    describe_other_files,
    list_chunks,
    open_chunk,
    read_chunk,
    read_header,
    read_npy,
    read_npy_header,
)
from lapo.errors import UserError
from lapo.games.make import can_be_played
from lapo.games.table import ACTIONS, GAMES, Visuals
from lapo.runs.files import reading

FLOATS = ("rewards", "ep_returns", "values", "logprobs")


def check_data(name: str, folder: Path) -> None:
    """Raise `UserError` unless `name` is a Procgen game or its data `folder` exists."""
    with reading(folder):
        missing = not folder.is_dir()
    if not can_be_played(name) and missing:
        raise UserError(
            f"'{name}' is neither a Procgen game nor a folder {folder}; the games are {', '.join(GAMES)},"
            f" and `python import_video.py --env {name}` makes such a folder from videos"
        )


def check_frames(name: str, folder: Path, visuals: Visuals) -> None:
    """Raise `UserError` unless `folder` holds data of `name`; those of a Procgen game must show `visuals`."""
    check_data(name, folder)
    if not can_be_played(name):
        return
    if not folder.is_dir():
        record = f"python record_expert.py --env {name} --visuals {visuals} --data-dir {folder.parent}"
        published = visuals == "full" and name in GAMES
        download = f" or download it with `bash setup_data.sh {name}`" if published else ""
        raise UserError(f"the data folder {folder} does not exist; make it with `{record}`{download}")
    if name not in GAMES:
        return
    path = folder / "dataset.json"
    try:
        with reading(path):
            # The published data have no such file.
            text = path.read_text(encoding="utf-8") if path.exists() else "{}"
        recorded = json.loads(text).get("visuals", "full")
    except (OSError, ValueError, AttributeError):
        raise UserError(f"{path} is damaged; record the data again, or delete this file") from None
    if recorded != visuals:
        raise UserError(
            f"{folder} was rendered with visuals {recorded}, but visuals is {visuals};"
            f" choose --visuals {recorded} or another --data_dir"
        )


def action_names(folder: Path) -> list[str] | None:
    """The names of the true actions in the data set `folder`, None if it was imported without any.

    Raises `UserError` if its record is damaged.
    """
    path = folder / "dataset.json"
    try:
        with reading(path):
            text = path.read_text(encoding="utf-8") if path.exists() else "{}"
        return json.loads(text).get("action_names")
    except (ValueError, AttributeError):
        raise UserError(f"{path} is damaged; make the data again, or delete this file") from None


def name_action(cfg: Config, action: int) -> str:
    """The name of a true action of the configured game, `action 3` if it has none."""
    names = list(ACTIONS) if cfg.env in GAMES else action_names(cfg.game_data) or []
    return names[action] if action < len(names) else f"action {action}"


# ---------------------------------------------------------------- chunks


@dataclass
class CheckResult:
    """Content of a chunk file; None for what is unknown or missing."""

    size: int
    """Bytes on disk."""
    frames: int | None = None
    cuts: int | None = None
    """Frames marked `done`."""
    actions: int | None = None
    """Number of different true actions."""
    fault: str | None = None
    """What is wrong with the content; None if nothing is."""
    read_error: str | None = None
    """Why the file could not be read; None if it could."""


def main() -> None:
    """Check the folders on the command line; exit with 2 unless all chunks are good."""
    parser = Parser(__doc__)
    parser.add_argument(
        "--check",
        nargs="+",
        type=Path,
        required=True,
        metavar="FOLDER",
        help="folders of games (with train and test) or of chunks, as seen from here or from the repository",
    )
    folders = parser.parse_args().check
    chunks = {folder: find_all_chunks(folder) for folder in folders}
    results = [result for folder, paths in chunks.items() for result in check_folder(folder, paths)]
    bad = sum(result.fault is not None for result in results)
    unread = sum(result.read_error is not None for result in results)
    frames = sum(result.frames for result in results if not (result.fault or result.read_error))
    size = sum(result.size for result in results) / 1e6
    verdict = f"{bad} bad" if bad or unread else "all good"
    verdict += f", {unread} could not be read" if unread else ""
    print(f"{len(results)} chunks, {size:,.1f} MB, {frames:,} frames in good ones: {verdict}")
    if bad or unread:
        sys.exit(2)


def find_all_chunks(folder: Path) -> list[Path]:
    """The chunks of a game's folder (those of `train` first) or of a folder of chunks.

    A relative `folder` is looked for in the working directory, then in the repository. Raises `UserError` if
    it is missing or cannot be read, or if it or one of its splits holds no chunk.
    """
    found = folder.expanduser()
    with reading(folder):
        if not found.is_dir():
            found = resolve(str(folder))
        if not found.is_dir():
            raise UserError(f"there is no folder {folder}, neither here nor in {resolve('.')}; name another")
        splits = [found / split for split in ("train", "test") if (found / split).is_dir()] or [found]
    chunks = {split: list_chunks(split) for split in splits}
    for split, paths in chunks.items():
        if not paths:
            others = describe_other_files(split)
            remedy = f", but {others}" if others else "; docs/data.md says how to get some"
            raise UserError(f"{split} holds no chunk (<number>.npz){remedy}")
    return [path for paths in chunks.values() for path in paths]


def check_folder(folder: Path, paths: list[Path]) -> list[CheckResult]:
    """Check the chunks `paths` of a folder and print a line for each."""
    names = ["/".join(path.parts[-2:]) for path in paths]
    width = max(len(name) for name in names)
    print(f"{folder}\n{'file':<{width}}  {'frames':>9}  {'cuts':>7}  {'actions':>7}  {'MB':>8}")
    results = []
    for path, name in zip(paths, names, strict=True):
        result = check_chunk(path)
        frames, cuts, actions = (
            "-" if count is None else f"{count:,}" for count in (result.frames, result.cuts, result.actions)
        )
        line = f"{name:<{width}}  {frames:>9}  {cuts:>7}  {actions:>7}  {result.size / 1e6:>8,.1f}"
        print(f"{line}  {result.fault or result.read_error or 'ok'}", flush=True)
        results.append(result)
    for split in dict.fromkeys(path.parent for path in paths):
        others = describe_other_files(split)
        if others:
            print(f"note: {split} also holds {others}")
    return results


def check_chunk(path: Path) -> CheckResult:
    """Read a whole chunk file. Errors are returned as `fault` or `read_error`, not raised."""
    result = CheckResult(0)
    try:
        with reading(path):
            result.size = path.stat().st_size
        result.frames = read_header(path)
        chunk = read_chunk(path)
        if "done" in chunk:
            result.cuts = int(np.count_nonzero(chunk["done"]))
        if "ta" in chunk:
            result.actions = len(np.unique(chunk["ta"][chunk["ta"] >= 0]))
        _check_other_arrays(path, result.frames)
    except UserError as error:
        message = str(error).removeprefix(str(path)).lstrip(": ")
        if isinstance(error, BadChunk):
            result.fault = message
        else:
            result.read_error = message
    return result


def _check_other_arrays(path: Path, frames: int) -> None:
    """Check the arrays that training ignores; of unknown ones only the checksum. Raises as `read_header`."""
    with open_chunk(path) as archive:
        for name in archive.namelist():
            key = name.removesuffix(".npy")
            if key in FLOATS:
                shape, dtype = read_npy_header(archive, key)[:2]
                if shape != (frames,) or dtype.kind not in "fiu":
                    raise BadChunk(f"{path}: `{key}` must be numbers ({frames},), found {dtype} {shape}")
                bad = np.count_nonzero(~np.isfinite(read_npy(archive, key)))
                if bad:
                    raise BadChunk(f"{path}: {bad:,} of the {frames:,} `{key}` are not finite")
            elif key not in KEYS:
                archive.read(name)  # verifies the checksum and the name
