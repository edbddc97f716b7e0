"""Chunks of frames on disk: finding, checking, reading and writing them.

A chunk is an npz file `<game>/<split>/<k>.npz` with `obs` (N, 64, 64, 3) uint8 and, optionally, `ta` (N,),
`done` (N,) and what else the published ones have. Knows nothing of tensors.
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
"""Threads that unpack chunks, at most, and decoded chunks in host memory; a published one has 0.4 GB."""
MAX_UNPACKING = 1032
"""How many bytes deflate makes of one at most: what claims more is no zip file of frames."""
# Level 4 packs frames twice as fast as zlib's default, into files about a quarter larger.
COMPRESSION = 4


class BadChunk(UserError):
    """A chunk file that is no good; one that merely could not be read is none."""


def find_chunks(folder: Path, limit: int | None = None) -> list[Path]:
    """The chunk files of a folder in order of their number, at most `limit`.

    Raises `UserError` if the folder is missing, cannot be read or holds no chunk.
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
        others = name_others(folder)
        if others:
            raise UserError(f"the data folder {folder} holds no chunk (<number>.npz), but {others}")
        raise UserError(f"the data folder {folder} holds no chunk (<number>.npz); make some with {remedy}")
    return chunks[:limit]


def say_limit(folder: Path, limit: int) -> None:
    """Print how many chunks of a split the configuration leaves out, if any."""
    total = len(find_chunks(folder))
    if total > limit:
        key = f"data.{folder.name}_chunks"
        print(f"{folder.name}: {total - limit} of its {total} chunks are left out, as {key} is {limit}")


def list_chunks(folder: Path) -> list[Path]:
    """The files `<number>.npz` of a folder in order of their number, perhaps none.

    Raises `UserError` if the folder cannot be read.
    """
    chunks = (path for path in _list(folder) if path.suffix == ".npz" and re.fullmatch("[0-9]+", path.stem))
    return sorted(chunks, key=lambda path: int(path.stem))


def name_others(folder: Path) -> str:
    """The npz files of a folder that are not named as chunks are, and what to do with them; "" if none."""
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
    """What a folder holds; nothing if it is not there."""
    with reading(folder):  # `glob` takes what may not be read for empty
        return [folder / name for name in os.listdir(folder)] if folder.is_dir() else []


def read_header(path: Path) -> int:
    """Number of frames of a chunk, from its headers alone.

    Raises `BadChunk` naming the file if it is not a chunk: not a readable npz, no `obs`, wrong shape or
    type, fewer than three frames. Raises `UserError` if something keeps it from being read.
    """
    with open_chunk(path) as archive:
        names = archive.namelist()
        if "obs.npy" not in names:
            raise BadChunk(f"{path} holds no array `obs`, found: {', '.join(sorted(names)) or 'nothing'}")
        for name in names:
            archive.open(name).close()  # compares the index's name with the one beside the data
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
    """The arrays `keys` of a chunk, those that it has, checksums verified.

    Raises as `read_header`, which has checked types and shapes before.
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
    """Every path, in order, with what gives its arrays or raises as `read_chunk` does; to be called once.

    Unpacking takes longer than anything else in loading, and runs beside Python: `readers` threads do it, by
    default `MAX_READERS`. No more than so many chunks are decoded or being decoded at a time, if the caller
    keeps none beyond its turn.
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

    With `skip_resets`, a window is left out when any of its frames is marked `done`: data sets differ in
    whether the mark sits on an episode's last frame or on the next one's first. (What an agent plays itself
    is marked in one way, see `OnlineDecoder.infer_latents`.)
    """
    starts = np.arange(num_frames - WINDOW + 1)
    if done is None or not skip_resets:
        return starts
    marked = np.convolve(done.astype(np.int64), np.ones(WINDOW, np.int64), mode="valid")
    return starts[marked == 0]


@contextmanager
def open_chunk(path: Path) -> Iterator[zipfile.ZipFile]:
    """The zip archive that a chunk is.

    Whatever a damaged file makes its readers raise becomes `BadChunk`; what keeps a file from being read,
    `UserError`.
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
    """Shape and type of an array of a chunk. Raises ValueError if the file cannot hold that many bytes."""
    with archive.open(f"{key}.npy") as file:
        version = np.lib.format.read_magic(file)
        read = (
            np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        )
        shape, _, dtype = read(file)
        expected = file.tell() + math.prod(shape) * dtype.itemsize
    member = archive.getinfo(f"{key}.npy")
    found = member.file_size
    if found != expected and not dtype.hasobject:  # objects are refused by their type later
        raise ValueError(f"`{key}` has {found} bytes instead of {expected}")
    stored = os.path.getsize(archive.filename)
    factor = 1 if member.compress_type == zipfile.ZIP_STORED else MAX_UNPACKING
    if found > factor * stored:  # before anybody makes room for them
        raise ValueError(f"`{key}` claims {found} bytes, too many for a file of {stored}")
    return shape, dtype


def read_npy(archive: zipfile.ZipFile, key: str) -> np.ndarray:
    """An array of a chunk, its checksum verified. Raises ValueError for pickled objects."""
    with archive.open(f"{key}.npy") as file:
        array = np.lib.format.read_array(file, allow_pickle=False)
        file.read(1)  # only a read at the end of the file compares the checksum
        return array


def chunks_holding(folder: Path, frames: int, skip_bad: bool = False) -> int:
    """How many of the folder's first chunks hold `frames` frames together; all of them if they hold fewer.

    With `skip_bad` a bad chunk counts as one without frames. The chunks are read in full then: what is behind
    a good header may be bad as well.
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
        except BadChunk:  # `Windows` names it
            if not skip_bad:
                raise
        else:
            held += size
    return count


def identify(cfg: Config, keys: tuple[str, ...] = ("obs", "done")) -> dict[str, str]:
    """Checksums of what `keys` of the configured game's chunks hold, by split: 16 hex digits each.

    From the CRCs in the chunks' zip directories: nothing more is read. A split that is not there is left out.
    """
    found = {}
    for split, limit in (("train", cfg.data.train_chunks), ("test", cfg.data.test_chunks)):
        digest = hashlib.blake2b(digest_size=8)
        paths = list_chunks(cfg.game_data / split)[:limit]
        for path in paths:
            try:
                with reading(path), zipfile.ZipFile(path) as archive:
                    members = {info.filename: (info.CRC, info.file_size) for info in archive.infolist()}
            except zipfile.BadZipFile:  # whoever reads it says what is wrong with it
                members = {}
            digest.update(repr([members.get(f"{key}.npy") for key in keys]).encode())
        if paths:
            found[f"{split} frames"] = digest.hexdigest()
    return found


def write_chunk(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write `arrays` as an npz file, atomically; equal arrays give equal bytes."""

    def write(part: Path) -> None:
        with zipfile.ZipFile(part, "w", zipfile.ZIP_DEFLATED, compresslevel=COMPRESSION) as archive:
            for name, array in arrays.items():
                # A member that is opened by its name carries a fixed date.
                with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                    np.lib.format.write_array(member, array, allow_pickle=False)

    atomic_write(path, write)
