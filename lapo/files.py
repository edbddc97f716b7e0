"""Files that are whole or absent: a crash or a full disk leaves no half file in the place of a good one."""

import os
import shutil
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from errors import UserError

CHUNK_FRAMES = {"train": 32_768, "test": 4_096}
"""Frames of a full chunk, as in the published data."""
# Level 4 packs frames twice as fast as zlib's default, into files about a quarter larger.
COMPRESSION = 4


def atomic_write(
    path: Path, write: Callable[[Path], Any], verify: Callable[[Path], Any] | None = None
) -> None:
    """Let `write` make a file beside `path`, force it to disk, `verify` it, and only then put it in place.

    Raises `UserError` when the disk refuses; the file that was there stays as it was.
    """
    part = path.with_name(path.name + ".part")
    try:
        write(part)
        with part.open("rb") as file:
            os.fsync(file.fileno())
        if verify:
            verify(part)
        os.replace(part, path)
    except (OSError, RuntimeError, UserError) as error:
        reason = str(error)
        if isinstance(error, RuntimeError):  # torch's way to report a full disk, which does not say so
            reason += f"; {shutil.disk_usage(path.parent).free / 1e6:,.1f} MB are free there"
        raise UserError(f"cannot write {path} ({reason}); what was there before is kept") from None
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def writing(path: Path, kept: str) -> Iterator[None]:
    """A disk that refuses what is done to `path` raises `UserError`, which also says what is `kept`."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot write {path} ({error}); {kept}; once that is mended, the same command continues"
        ) from None


def write_chunk(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write `arrays` as an npz file, atomically; equal arrays give equal bytes."""

    def write(part: Path) -> None:
        with zipfile.ZipFile(part, "w", zipfile.ZIP_DEFLATED, compresslevel=COMPRESSION) as archive:
            for name, array in arrays.items():
                # A member that is opened by its name carries a fixed date.
                with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                    np.lib.format.write_array(member, array, allow_pickle=False)

    atomic_write(path, write)
