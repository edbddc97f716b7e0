"""Files that are whole or absent, and used by one process at a time.

A crash or a full disk leaves no half file in the place of a good one.
"""

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from lapo.errors import UserError


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


def write_json(path: Path, data: Any) -> None:
    """Put plain data in place as `atomic_write` does."""
    text = json.dumps(data, indent=2) + "\n"
    atomic_write(path, lambda part: part.write_text(text, encoding="utf-8"))


def check_json(path: Path | None) -> None:
    """Raise `UserError` now if results for the option `--json` could not be written to `path` later."""
    if path is None:
        return
    if not path.parent.is_dir():
        raise UserError(f"--json {path}: the folder {path.parent} does not exist; create it first")
    if path.is_dir():
        raise UserError(f"--json {path} is a folder; name a file in it")
    if not os.access(path.parent, os.W_OK):
        raise UserError(f"--json {path}: the folder {path.parent} cannot be written to; name another")


@contextmanager
def writing(path: Path, kept: str) -> Iterator[None]:
    """A disk that refuses what is done to `path` raises `UserError`, which also says what is `kept`."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot write {path} ({error}); {kept}; once that is mended, the same command continues"
        ) from None


def lock(path: Path, busy: str) -> IO:
    """Make the file `path` and keep it locked as long as the returned file is open.

    Raises `UserError` with the sentence `busy` if another process has it locked, and if the disk refuses.
    """
    while True:
        with writing(path, "nothing was changed"):
            file = path.open("w")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.close()
            raise UserError(busy) from None
        except OSError:
            return file  # a filesystem without locks
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        file.close()  # who had it locked has just removed it: this is no longer the file at `path`


@contextmanager
def locked(path: Path, busy: str) -> Iterator[None]:
    """Like `lock`, until the context is left; then the file is gone."""
    with lock(path, busy):
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
