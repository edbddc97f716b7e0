"""Chunks of frames on disk: finding, validating, reading and writing them.

A chunk is an npz file `<game>/<split>/<k>.npz` with `obs` (N, S, S, 3) uint8 and, optionally, `ta` (N,)
integer true actions (-1: unknown), `done` (N,) bool, and the other arrays of the published chunks. S is 64 in
Procgen's, and a power of two in others. This module needs NumPy only.

Dimensions
    N frames of a chunk · M windows of a chunk · T frames of a window
"""

import hashlib
import math
import os
import re
import zipfile
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lapo.config import Config
from lapo.errors import UserError
from lapo.frames import CHANNELS, SIZES, resize
from lapo.runs.files import atomic_write, reading

KEYS = ("obs", "ta", "done")
"""The arrays that training reads."""
MIN_FRAMES = 3
"""Of the chunks that are made here: a window of the published length."""
CHUNK_FRAMES = {"train": 32_768, "test": 4_096}
"""Frames of a full chunk, as in the published data."""
MAX_ACTIONS = 256
UNKNOWN = -1
"""The true action of a frame that has no label."""
MAX_READERS = 4
"""Threads that decompress chunks, and so the most decoded chunks in host memory (0.4 GB each)."""
# Level 4 compresses frames twice as fast as zlib's default, into files about a quarter larger.
COMPRESSION = 4
READ_SIZE = 1 << 18
NPY_HEADER = {"descr": "'([^']+)'", "fortran_order": "(True|False)", "shape": r"\(([\d, ]*)\)"}
"""Patterns of the fields of an npy header; none of our arrays has a structured dtype."""


class BadChunk(UserError):
    """A damaged or malformed chunk file. A file that cannot be read for another reason is a `UserError`."""


def find_chunks(folder: Path, limit: int | None = None) -> list[Path]:
    """The first `limit` chunk files of a folder, by number.

    Raises `UserError` if the folder is missing, unreadable or holds no chunk.
    """
    game = folder.parent
    remedy = (
        f"`python record_expert.py --env {game.name} --data-dir {game.parent}`"
        f" or `bash setup_data.sh {game.name}`"
    )
    with reading(folder):
        missing, beside = not folder.is_dir(), game.is_dir()
    misplaced = list_chunks(game) if missing and beside else []
    if misplaced:
        raise UserError(
            f"the data folder {folder} does not exist, but {game} itself holds {misplaced[0].name};"
            f" move the chunks of this split into {folder}"
        )
    if missing:
        raise UserError(f"the data folder {folder} does not exist; make it with {remedy}")
    chunks = list_chunks(folder)
    if not chunks:
        others = describe_other_files(folder)
        if others:
            raise UserError(f"the data folder {folder} holds no chunk (<number>.npz), but {others}")
        raise UserError(f"the data folder {folder} holds no chunk (<number>.npz); make some with {remedy}")
    return chunks[:limit]


def print_chunk_limit(folder: Path, limit: int) -> None:
    """Print how many chunks of a split exceed the config's `limit` and are not used, if any."""
    total = len(find_chunks(folder))
    if total > limit:
        key = f"data.{folder.name}_chunks"
        print(f"{folder.name}: {total - limit} of its {total} chunks are not used, as {key} is {limit}")


def list_chunks(folder: Path) -> list[Path]:
    """The files `<number>.npz` of a folder, by number; there may be none.

    Raises `UserError` if the folder cannot be read.
    """
    chunks = (path for path in _list(folder) if path.suffix == ".npz" and re.fullmatch("[0-9]+", path.stem))
    return sorted(chunks, key=lambda path: int(path.stem))


def describe_other_files(folder: Path) -> str:
    """The npz files of a folder that are not named as chunks, with a remedy; "" if there are none."""
    chunks = list_chunks(folder)
    others = sorted(
        path.name
        for path in _list(folder)
        if path.suffix.lower() == ".npz" and path not in chunks and not path.name.startswith(".")
    )
    if not others:
        return ""
    more = f" and {len(others) - 3} more" if len(others) > 3 else ""
    return f"{', '.join(others[:3])}{more} (ignored); rename what holds frames to <number>.npz"


def _list(folder: Path) -> list[Path]:
    """The contents of a folder; [] if it does not exist."""
    with reading(folder):  # `glob` returns nothing for a folder without permission
        return [folder / name for name in os.listdir(folder)] if folder.is_dir() else []


def read_header(path: Path, image_size: int | None = None, window: int = 2) -> int:
    """Number of frames N of a chunk, after validating the headers of its arrays.

    Raises `BadChunk` if the file is not a readable npz, lacks `obs`, has an array of a wrong shape or dtype,
    frames that cannot be averaged to `image_size`, or fewer of them than a `window` has. Raises `UserError`
    if it cannot be read for another reason.
    """
    with open_chunk(path) as archive:
        names = archive.namelist()
        if "obs.npy" not in names:
            raise BadChunk(f"{path} holds no array `obs`, found: {', '.join(sorted(names)) or 'nothing'}")
        for (
            name
        ) in names:  # compares the names in the zip directory and beside the data: `done` must not get lost
            archive.open(name).close()
        headers = {key: read_npy_header(archive, key)[:2] for key in KEYS if f"{key}.npy" in names}
    shape, dtype = headers.pop("obs")
    is_frames = len(shape) == 4 and shape[1] == shape[2] in SIZES and shape[3] == CHANNELS
    if dtype != np.uint8 or not is_frames or shape[1] < (image_size or 0):
        side = image_size or 64
        remedy = f"; choose --data.image_size {shape[1]}" if is_frames and dtype == np.uint8 else ""
        raise BadChunk(
            f"{path}: `obs` must be uint8 (N, {side}, {side}, {CHANNELS}), found {dtype} {shape}{remedy}"
        )
    if shape[0] < window:
        raise BadChunk(f"{path} holds {shape[0]} frames; a chunk needs at least {window}")
    kinds = {"ta": ("iu", "integers"), "done": ("b", "bool")}
    for key, (key_shape, key_dtype) in headers.items():
        kind, kind_name = kinds[key]
        if key_shape != shape[:1] or key_dtype.kind not in kind:
            raise BadChunk(
                f"{path}: `{key}` must be {kind_name} ({shape[0]},), found {key_dtype} {key_shape}"
            )
    return shape[0]


def read_chunk(
    path: Path, keys: tuple[str, ...] = KEYS, image_size: int | None = None
) -> dict[str, np.ndarray]:
    """The arrays `keys` of a chunk, without those that it lacks. Their checksums are verified.

    Frames are averaged to `image_size`. Call `read_header` first: it validates shapes and dtypes. Raises the
    same errors.
    """
    with open_chunk(path) as archive:
        names = archive.namelist()
        chunk = {key: read_npy(archive, key) for key in keys if f"{key}.npy" in names}
    ta = chunk.get("ta")
    if ta is not None and not (ta.min() >= UNKNOWN and ta.max() < MAX_ACTIONS):
        raise BadChunk(
            f"{path}: `ta` must lie in 0..{MAX_ACTIONS - 1}, found {ta.min()}..{ta.max()}"
            f" ({UNKNOWN}: unknown)"
        )
    if image_size and "obs" in chunk:
        chunk["obs"] = resize(chunk["obs"], image_size)
    return chunk


def read_ahead(
    paths: Sequence[Path],
    keys: tuple[str, ...] = KEYS,
    image_size: int | None = None,
    readers: int | None = None,
) -> Iterator[tuple[Path, Callable[[], dict[str, np.ndarray]]]]:
    """Yield each path, in order, with a function that returns its arrays or raises as `read_chunk`.

    Decompression dominates the loading time and releases Python's lock, so `readers` threads (default:
    `MAX_READERS`) read ahead. Call each function once and free its arrays before the next iteration; then
    at most `readers` chunks are decoded at a time.
    """
    readers = readers or MAX_READERS
    with ThreadPoolExecutor(readers, "read-ahead") as executor:
        # Each future lies in a list of its own, from which it is popped: a future keeps its result alive.
        pending: deque[tuple[Path, list[Future]]] = deque()
        try:
            for number, path in enumerate(paths):
                if number >= readers:
                    first, future = pending.popleft()
                    yield first, lambda future=future: future.pop().result()
                pending.append((path, [executor.submit(read_chunk, path, keys, image_size)]))
            for path, future in pending:
                yield path, lambda future=future: future.pop().result()
        finally:
            executor.shutdown(cancel_futures=True)


def window_starts(done: np.ndarray | None, num_frames: int, skip_resets: bool, window: int) -> np.ndarray:
    """Index of the first frame of every window of T = `window` frames of a chunk; `done` is (N,) bool.

    Returns (M,) int64. With `skip_resets`, windows that contain a frame marked `done` are skipped, wherever
    in the window: some data sets mark the last frame of an episode, others the first frame of the next one.
    (In rollouts `done` always belongs to the last action, see `OnlineDecoder.infer_latents`.)
    """
    starts = np.arange(num_frames - window + 1)
    if done is None or not skip_resets:
        return starts
    marked = np.convolve(done.astype(np.int64), np.ones(window, np.int64), mode="valid")
    return starts[marked == 0]


@contextmanager
def open_chunk(path: Path) -> Iterator[zipfile.ZipFile]:
    """Open a chunk's zip archive.

    Any exception that a damaged file causes becomes `BadChunk`; other read errors become `UserError`.
    """
    try:
        with reading(path), zipfile.ZipFile(path) as archive:
            yield archive
    except UserError:
        raise
    except Exception as error:
        what = " ".join(f"{type(error).__name__}: {error}".split())
        raise BadChunk(f"{path} is not a readable npz file ({what}); delete it and make it again") from None


class NpyHeader(NamedTuple):
    """Header of an array in an npz file."""

    shape: tuple[int, ...]
    dtype: np.dtype
    order: str
    """Memory layout: "C" or "F"."""
    size: int
    """Bytes of the header itself."""


def read_npy_header(archive: zipfile.ZipFile, key: str) -> NpyHeader:
    """Header of the array `key` of a chunk.

    Raises ValueError if it is malformed, of a structured dtype, or disagrees with the size in bytes.

    NumPy parses headers with `ast.literal_eval`, which sometimes fails in threads before Python 3.11.8
    (https://github.com/python/cpython/issues/106905). Intact chunks would be called bad.
    """
    with archive.open(f"{key}.npy") as file:
        magic, version = file.read(6), file.read(2)
        length = int.from_bytes(file.read(2 if version == b"\1\0" else 4), "little")
        text = file.read(length).decode("latin1")
        fields = [re.search(f"'{name}': *{pattern}", text) for name, pattern in NPY_HEADER.items()]
        if magic != b"\x93NUMPY" or not all(fields):
            raise ValueError(f"`{key}` has no npy header of a plain array")
        descr, fortran, shape = (field[1] for field in fields)
        sizes, dtype = tuple(map(int, re.findall(r"\d+", shape))), np.dtype(descr)
        header = NpyHeader(sizes, dtype, "F" if fortran == "True" else "C", file.tell())
    found = archive.getinfo(f"{key}.npy").file_size - header.size
    if found != math.prod(sizes) * dtype.itemsize and not dtype.hasobject:  # refused below, by their dtype
        raise ValueError(f"`{key}` has {found} bytes, its header says {dtype} {sizes}")
    return header


def read_npy(archive: zipfile.ZipFile, key: str) -> np.ndarray:
    """The array `key` of a chunk, with verified checksum.

    Raises ValueError as `read_npy_header`, before memory is allocated, and for Python objects: nothing is
    unpickled.
    """
    header = read_npy_header(archive, key)
    if header.dtype.hasobject:
        raise ValueError(f"`{key}` holds Python objects")
    array = np.empty(math.prod(header.shape), header.dtype)
    rest = memoryview(array.view(np.uint8))
    with archive.open(f"{key}.npy") as file:
        file.read(header.size)
        while block := file.read(READ_SIZE):  # to the end, where zipfile compares the checksum
            rest[: len(block)] = block
            rest = rest[len(block) :]
    return array.reshape(header.shape, order=header.order)


def num_chunks_for(folder: Path, frames: int, skip_bad: bool = False) -> int:
    """How many of the folder's first chunks together hold `frames` frames; all of them if they hold fewer.

    With `skip_bad`, bad chunks count as empty. Chunks are then read in full, because a bad chunk may have an
    intact header.
    """
    held, count = 0, 0
    for path in find_chunks(folder):
        if held >= frames:
            break
        count += 1
        try:
            size = read_header(path)
            if skip_bad:
                read_chunk(path)
        except BadChunk:  # `Windows` prints it
            if not skip_bad:
                raise
        else:
            held += size
    return count


def data_checksums(cfg: Config, keys: tuple[str, ...] = ("obs", "done")) -> dict[str, str]:
    """Checksum (16 hex digits) of the arrays `keys` of the configured game's chunks, per split.

    It is computed from the CRCs in the zip directories, without reading the arrays. A missing split has no
    entry.
    """
    found = {}
    for split, limit in (("train", cfg.data.train_chunks), ("test", cfg.data.test_chunks)):
        digest = hashlib.blake2b(digest_size=8)
        paths = list_chunks(cfg.game_data / split)[:limit]
        for path in paths:
            try:
                with reading(path), zipfile.ZipFile(path) as archive:
                    members = {info.filename: (info.CRC, info.file_size) for info in archive.infolist()}
            except zipfile.BadZipFile:  # `Windows` raises or prints it
                members = {}
            digest.update(repr([members.get(f"{key}.npy") for key in keys]).encode())
        if paths:
            found[f"{split} frames"] = digest.hexdigest()
    return found


def summarize_episodes(chunks: Sequence[dict[str, float]]) -> dict[str, float | None]:
    """Frames and complete episodes of recorded chunks, their mean return and its standard error.

    A chunk is described by `frames`, `episodes`, and the sum and sum of squares of its episodes' returns.
    """
    frames, episodes, total, squares = (
        sum(chunk[key] for chunk in chunks)
        for key in ("frames", "episodes", "return_sum", "return_square_sum")
    )
    mean = total / episodes if episodes else None
    error = None
    if episodes > 1:
        variance = max(squares - total**2 / episodes, 0.0) / (episodes - 1)
        error = math.sqrt(variance / episodes)
    return {"frames": frames, "episodes": episodes, "mean_return": mean, "standard_error": error}


def write_chunk(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write `arrays` as an npz file, atomically. Equal arrays give equal bytes."""

    def write(part: Path) -> None:
        with zipfile.ZipFile(part, "w", zipfile.ZIP_DEFLATED, compresslevel=COMPRESSION) as archive:
            for name, array in arrays.items():
                # A member opened by name has a fixed date.
                with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                    np.lib.format.write_array(member, array, allow_pickle=False)

    atomic_write(path, write)
