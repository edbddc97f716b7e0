"""Checks of a data set: does it exist, does it show the game as configured, are its chunks intact?

`python data_loader.py --check expert_data/bigfish` checks chunks and prints a table. More is checked than
training reads: the checksums of all arrays, and that rewards, returns, values and log-probabilities are
finite numbers, one per frame.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lapo.command_line import Parser
from lapo.config import resolve
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
from lapo.games.table import GAMES, Visuals
from lapo.runs.files import reading

FLOATS = ("rewards", "ep_returns", "values", "logprobs")
READ_SIZE = 1 << 20


def check_data(name: str, folder: Path) -> None:
    """Raise UserError unless `name` is a Procgen game or, for other frames, `folder` holds its data."""
    with reading(folder):
        missing = not folder.is_dir()
    if name not in GAMES and missing:
        raise UserError(
            f"'{name}' is neither a Procgen game nor a folder {folder}; the games are {', '.join(GAMES)},"
            f" and `python import_video.py --env {name}` makes such a folder from videos"
        )


def check_frames(name: str, folder: Path, visuals: Visuals) -> None:
    """Raise UserError unless `folder` holds data of `name` that show it, a Procgen game, with `visuals`."""
    check_data(name, folder)
    if name not in GAMES:
        return
    if not folder.is_dir():
        record = f"python record_expert.py --env {name} --visuals {visuals} --data-dir {folder.parent}"
        download = f" or download it with `bash setup_data.sh {name}`" if visuals == "full" else ""
        raise UserError(f"the data folder {folder} does not exist; make it with `{record}`{download}")
    path = folder / "dataset.json"
    try:
        with reading(path):
            text = (
                path.read_text(encoding="utf-8") if path.exists() else "{}"
            )  # downloaded: the published frames
        recorded = json.loads(text).get("visuals", "full")
    except (OSError, ValueError, AttributeError):
        raise UserError(f"{path} is damaged; record the data again, or delete this file") from None
    if recorded != visuals:
        raise UserError(
            f"{folder} shows the game with visuals {recorded}, but visuals is {visuals};"
            f" choose --visuals {recorded} or another --data_dir"
        )


# ---------------------------------------------------------------- chunks


@dataclass
class Checked:
    """Content of a chunk file; None for what is unknown or missing."""

    size: int
    """Bytes on disk."""
    frames: int | None = None
    cuts: int | None = None
    """Frames marked `done`."""
    actions: int | None = None
    """Different true actions."""
    fault: str | None = None
    """What is wrong with it; None if nothing is."""
    unread: str | None = None
    """Why it could not be read; None if it could."""


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
    chunks = {folder: find(folder) for folder in folders}
    found = [result for folder, paths in chunks.items() for result in check_folder(folder, paths)]
    bad = sum(result.fault is not None for result in found)
    unread = sum(result.unread is not None for result in found)
    frames = sum(result.frames for result in found if not (result.fault or result.unread))
    size = sum(result.size for result in found) / 1e6
    told = [f"{bad} bad"] if bad or unread else ["all good"]
    told += [f"{unread} could not be read"] if unread else []
    print(f"{len(found)} chunks, {size:,.1f} MB, {frames:,} frames in good ones: {', '.join(told)}")
    if bad or unread:
        sys.exit(2)


def find(folder: Path) -> list[Path]:
    """The chunks of a game's folder, training ones first, or of a folder of chunks.

    Raises `UserError` if the folder, or a split in it, is missing, cannot be read or holds none.
    """
    place = folder.expanduser()
    with reading(folder):
        if not place.is_dir():
            place = resolve(str(folder))
        if not place.is_dir():
            raise UserError(f"there is no folder {folder}, neither here nor in {resolve('.')}; name another")
        splits = [place / split for split in ("train", "test") if (place / split).is_dir()] or [place]
    chunks = {split: list_chunks(split) for split in splits}
    for split, paths in chunks.items():
        if not paths:
            others = describe_other_files(split)
            remedy = f", but {others}" if others else "; docs/data.md says how to get some"
            raise UserError(f"{split} holds no chunk (<number>.npz){remedy}")
    return [path for paths in chunks.values() for path in paths]


def check_folder(folder: Path, paths: list[Path]) -> list[Checked]:
    """Check the chunks of a folder, printing a line for each."""
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
        print(f"{line}  {result.fault or result.unread or 'ok'}", flush=True)
        results.append(result)
    for split in dict.fromkeys(path.parent for path in paths):
        others = describe_other_files(split)
        if others:
            print(f"note: {split} also holds {others}")
    return results


def check_chunk(path: Path) -> Checked:
    """Read all of a chunk file. Errors are returned as `fault` and `unread`, not raised."""
    result = Checked(0)
    try:
        with reading(path):
            result.size = path.stat().st_size
        result.frames = read_header(path)
        chunk = read_chunk(path)
        if "done" in chunk:
            result.cuts = int(np.count_nonzero(chunk["done"]))
        if "ta" in chunk:
            result.actions = len(np.unique(chunk["ta"]))
        _check_others(path, result.frames)
    except UserError as error:
        told = str(error).removeprefix(str(path)).lstrip(": ")
        if isinstance(error, BadChunk):
            result.fault = told
        else:
            result.unread = told
    return result


def _check_others(path: Path, frames: int) -> None:
    """Check the arrays that training ignores; of unknown ones, the checksum. Raises as `read_header`."""
    with open_chunk(path) as archive:
        for name in archive.namelist():
            key = name.removesuffix(".npy")
            if key in FLOATS:
                shape, dtype = read_npy_header(archive, key)
                if shape != (frames,) or dtype.kind not in "fiu":
                    raise BadChunk(f"{path}: `{key}` must be numbers ({frames},), found {dtype} {shape}")
                bad = np.count_nonzero(~np.isfinite(read_npy(archive, key)))
                if bad:
                    raise BadChunk(f"{path}: {bad:,} of the {frames:,} `{key}` are not finite")
            elif key not in KEYS:
                with archive.open(name) as member:
                    while member.read(READ_SIZE):  # to the end, where the checksum is compared
                        pass
