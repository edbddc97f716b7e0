"""Chunks of frames on disk: finding, checking, reading and writing them.

A chunk is an npz file `<game>/<split>/<k>.npz` with `obs` (N, 64, 64, 3) uint8 and, optionally, `ta` (N,),
`done` (N,) and the other arrays of the published chunks. NumPy only.
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

import numpy as np

from lapo.config import Config
from lapo.errors import UserError
from lapo.runs.files import atomic_write, reading

KEYS = ("obs", "ta", "done")
"""The arrays that training reads."""
WINDOW = 3
"""Frames of a window: a chunk has at least one window."""
FRAME_SHAPE = (64, 64, 3)
CHUNK_FRAMES = {"train": 32_768, "test": 4_096}
"""Frames of a full chunk, as in the published data."""
MAX_ACTIONS = 256
MAX_READERS = 4
"""Upper bound on threads that unpack chunks, and on decoded chunks in host memory (0.4 GB each)."""
# Level 4 packs frames twice as fast as zlib's default, into files about a quarter larger.
COMPRESSION = 4


class BadChunk(UserError):
    """A damaged or malformed chunk file. Files that cannot be read for other reasons raise `UserError`."""


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
            f" move what is to be in {folder.name} there"
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
    """Print how many chunks of a split the config leaves out, if any."""
    total = len(find_chunks(folder))
    if total > limit:
        key = f"data.{folder.name}_chunks"
        print(f"{folder.name}: {total - limit} of its {total} chunks are left out, as {key} is {limit}")


def list_chunks(folder: Path) -> list[Path]:
    """The files `<number>.npz` of a folder, by number; there may be none.

    Raises `UserError` if the folder cannot be read.
    """
    chunks = (path for path in _list(folder) if path.suffix == ".npz" and re.fullmatch("[0-9]+", path.stem))
    return sorted(chunks, key=lambda path: int(path.stem))


def describe_other_files(folder: Path) -> str:
    """The npz files of a folder whose names are not those of chunks, with a remedy; "" if there are none."""
    chunks = list_chunks(folder)
    others = sorted(
        path.name
        for path in _list(folder)
        if path.suffix.lower() == ".npz" and path not in chunks and not path.name.startswith(".")
    )
    if not others:
        return ""
    more = f" and {len(others) - 3} more" if len(others) > 3 else ""
    return f"{', '.join(others[:3])}{more}, which nobody reads; rename to <number>.npz what holds frames"


def _list(folder: Path) -> list[Path]:
    """The contents of a folder; [] if it does not exist."""
    with reading(folder):  # `glob` returns nothing for a folder without permission
        return [folder / name for name in os.listdir(folder)] if folder.is_dir() else []


def read_header(path: Path) -> int:
    """Number of frames of a chunk, from the headers of its arrays.

    Raises `BadChunk` if the file is not a readable npz, lacks `obs`, has arrays of a wrong shape or dtype, or
    fewer than three frames. Raises `UserError` if it cannot be read for another reason.
    """
    with open_chunk(path) as archive:
        names = archive.namelist()
        if "obs.npy" not in names:
            raise BadChunk(f"{path} holds no array `obs`, found: {', '.join(sorted(names)) or 'nothing'}")
        for name in names:
            archive.open(name).close()  # compares the names in the zip directory and beside the data
        headers = {key: read_npy_header(archive, key) for key in KEYS if f"{key}.npy" in names}
    shape, dtype = headers.pop("obs")
    if dtype != np.uint8 or len(shape) != 4 or shape[1:] != FRAME_SHAPE:
        raise BadChunk(f"{path}: `obs` must be uint8 (N, 64, 64, 3), found {dtype} {shape}")
    if shape[0] < WINDOW:
        raise BadChunk(f"{path} holds {shape[0]} frames; a chunk needs at least {WINDOW}")
    kinds = {"ta": ("iu", "integers"), "done": ("b", "bool")}
    for key, (key_shape, key_dtype) in headers.items():
        kind, kind_name = kinds[key]
        if key_shape != shape[:1] or key_dtype.kind not in kind:
            raise BadChunk(
                f"{path}: `{key}` must be {kind_name} ({shape[0]},), found {key_dtype} {key_shape}"
            )
    return shape[0]


def read_chunk(path: Path, keys: tuple[str, ...] = KEYS) -> dict[str, np.ndarray]:
    """Those of the arrays `keys` that a chunk has, with verified checksums.

    Raises as `read_header`, which must have checked shapes and dtypes before.
    """
    with open_chunk(path) as archive:
        names = archive.namelist()
        chunk = {key: read_npy(archive, key) for key in keys if f"{key}.npy" in names}
    ta = chunk.get("ta")
    if ta is not None and not (ta.min() >= 0 and ta.max() < MAX_ACTIONS):
        raise BadChunk(f"{path}: `ta` must lie in 0..{MAX_ACTIONS - 1}, found {ta.min()}..{ta.max()}")
    return chunk


def read_ahead(
    paths: Sequence[Path], keys: tuple[str, ...] = KEYS, readers: int | None = None
) -> Iterator[tuple[Path, Callable[[], dict[str, np.ndarray]]]]:
    """Yield each path, in order, with a function that returns its arrays or raises as `read_chunk`.

    Call the function once. Unpacking dominates the loading time and releases Python's lock, so `readers`
    threads (`MAX_READERS` by default) read ahead. At most as many chunks are decoded at a time, if the caller
    frees each before the next.
    """
    readers = readers or MAX_READERS
    with ThreadPoolExecutor(readers, "read-ahead") as pool:
        coming: deque[tuple[Path, list[Future]]] = deque()
        try:
            for number, path in enumerate(paths):
                if number >= readers:
                    first, box = coming.popleft()
                    yield first, lambda box=box: box.pop().result()
                coming.append((path, [pool.submit(read_chunk, path, keys)]))
            for path, box in coming:
                yield path, lambda box=box: box.pop().result()
        finally:
            pool.shutdown(cancel_futures=True)


def window_starts(done: np.ndarray | None, num_frames: int, skip_resets: bool) -> np.ndarray:
    """Indices of the first frames of a chunk's windows, (M,) int64.

    With `skip_resets`, windows with any frame marked `done` are left out: data sets differ in whether the
    mark is on the last frame of an episode or on the first of the next one. (In rollouts it always belongs to
    the last action, see `OnlineDecoder.infer_latents`.)
    """
    starts = np.arange(num_frames - WINDOW + 1)
    if done is None or not skip_resets:
        return starts
    marked = np.convolve(done.astype(np.int64), np.ones(WINDOW, np.int64), mode="valid")
    return starts[marked == 0]


@contextmanager
def open_chunk(path: Path) -> Iterator[zipfile.ZipFile]:
    """Open a chunk's zip archive.

    Whatever zipfile and NumPy raise for a damaged file becomes `BadChunk`; other read errors `UserError`.
    """
    try:
        with reading(path), zipfile.ZipFile(path) as archive:
            yield archive
    except UserError:
        raise
    except Exception as error:
        what = " ".join(f"{type(error).__name__}: {error}".split())
        raise BadChunk(f"{path} is not a readable npz file ({what}); delete it and make it again") from None


def read_npy_header(archive: zipfile.ZipFile, key: str) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and dtype of an array of a chunk. Raises ValueError if they do not match its size in bytes."""
    with archive.open(f"{key}.npy") as file:
        version = np.lib.format.read_magic(file)
        read = (
            np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        )
        shape, _, dtype = read(file)
        expected = file.tell() + math.prod(shape) * dtype.itemsize
    member = archive.getinfo(f"{key}.npy")
    found = member.file_size
    if found != expected and not dtype.hasobject:  # object arrays are refused later, by their dtype
        raise ValueError(f"`{key}` has {found} bytes instead of {expected}")
    return shape, dtype


def read_npy(archive: zipfile.ZipFile, key: str) -> np.ndarray:
    """An array of a chunk, with verified checksum. Raises ValueError for pickled objects."""
    with archive.open(f"{key}.npy") as file:
        array = np.lib.format.read_array(file, allow_pickle=False)
        file.read(1)  # the checksum is compared at the end of the file only
        return array


def num_chunks_for(folder: Path, frames: int, skip_bad: bool = False) -> int:
    """How many of the folder's first chunks together hold `frames` frames; all if they hold fewer.

    With `skip_bad`, bad chunks count as empty. Chunks are then read in full, as the header may be intact.
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
        except BadChunk:  # reported by `Windows`
            if not skip_bad:
                raise
        else:
            held += size
    return count


def data_checksums(cfg: Config, keys: tuple[str, ...] = ("obs", "done")) -> dict[str, str]:
    """Checksum (16 hex digits) per split of the arrays `keys` of the configured game's chunks.

    It is computed from the CRCs in the zip directories, without reading the arrays. Missing splits are left
    out.
    """
    found = {}
    for split, limit in (("train", cfg.data.train_chunks), ("test", cfg.data.test_chunks)):
        digest = hashlib.blake2b(digest_size=8)
        paths = list_chunks(cfg.game_data / split)[:limit]
        for path in paths:
            try:
                with reading(path), zipfile.ZipFile(path) as archive:
                    members = {info.filename: (info.CRC, info.file_size) for info in archive.infolist()}
            except zipfile.BadZipFile:  # reported by the reader
                members = {}
            digest.update(repr([members.get(f"{key}.npy") for key in keys]).encode())
        if paths:
            found[f"{split} frames"] = digest.hexdigest()
    return found


def write_chunk(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write `arrays` as an npz file, atomically. Equal arrays give equal bytes."""

    def write(part: Path) -> None:
        with zipfile.ZipFile(part, "w", zipfile.ZIP_DEFLATED, compresslevel=COMPRESSION) as archive:
            for name, array in arrays.items():
                # A member opened by name has a fixed date.
                with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                    np.lib.format.write_array(member, array, allow_pickle=False)

    atomic_write(path, write)
