"""Atomic writes and locks: a file is complete or absent, and one process at a time writes it."""

import contextlib
import errno
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
    """Call `write` on a temporary file, sync it to disk, call `verify` on it, then rename it to `path`.

    Raises `UserError` if writing or verifying fails; the previous file is then kept.
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
        if isinstance(error, RuntimeError):  # torch's error for a full disk does not name the cause
            reason += f"; {shutil.disk_usage(path.parent).free / 1e6:,.1f} MB are free there"
        raise UserError(f"cannot write {path} ({reason}); the previous file is kept") from None
    finally:
        part.unlink(missing_ok=True)


def write_json(path: Path, data: Any) -> None:
    """Write `data` as JSON, atomically."""
    text = json.dumps(data, indent=2) + "\n"
    atomic_write(path, lambda part: part.write_text(text, encoding="utf-8"))


def check_json(path: Path | None) -> None:
    """Raise `UserError` if the results of the option `--json` cannot be written to `path`."""
    if path is None:
        return
    if not path.parent.is_dir():
        raise UserError(f"--json {path}: the folder {path.parent} does not exist; create it first")
    if path.is_dir():
        raise UserError(f"--json {path} is a folder; name a file in it")
    if not os.access(path.parent, os.W_OK):
        raise UserError(f"--json {path}: the folder {path.parent} cannot be written to; name another")


DAMAGE_ERRNOS = errno.EINVAL, errno.EISDIR
"""System errors that the content causes: a damaged offset, which points before the file's start; a folder."""
OUT_OF_MEMORY = "allocate memory", "not enough memory", "Error -4 while"
"""Parts of the messages of torch and zlib for lack of memory."""


def read_error_cause(error: BaseException | None) -> str | None:
    """What prevented reading (permissions, memory, an I/O error); None if `error` means damaged content.

    zipfile hides some system errors behind its own, so the whole chain of causes is searched.
    """
    while error is not None:
        if isinstance(error, OSError) and error.errno not in (None, *DAMAGE_ERRNOS):
            return os.strerror(error.errno)
        if isinstance(error, MemoryError) or any(part in str(error) for part in OUT_OF_MEMORY):
            return "too little memory"
        error = error.__cause__ or error.__context__
    return None


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn an error in reading `path` into `UserError`, unless it means damage: see `read_error_cause`."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = read_error_cause(error)
        if reason is None:
            raise
        raise UserError(
            f"{path} could not be read ({reason}); it may be intact: remove the cause and run the same"
            " command again"
        ) from None


@contextmanager
def writing(path: Path, kept: str) -> Iterator[None]:
    """Turn an OSError in writing `path` into `UserError`; its message says with `kept` what remains."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot write {path} ({error}); {kept}; remove the cause, then the same command continues"
        ) from None


def lock(path: Path, busy: str) -> IO:
    """Create and lock the file `path`. The lock is held while the returned file is open.

    Raises `UserError` with the message `busy` if another process holds the lock, and if `path` cannot be
    created.
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
            return file  # the filesystem has no locks
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        file.close()  # the previous holder has removed `path` after it was opened here: try again


@contextmanager
def locked(path: Path, busy: str) -> Iterator[None]:
    """Hold a `lock` in the context, then remove its file."""
    with lock(path, busy):
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def is_absent_or_empty(folder: Path) -> bool:
    """Whether `folder` is absent, or empty but for hidden files and lost+found."""
    if not folder.exists():
        return True
    return folder.is_dir() and all(
        path.name[0] == "." or path.name == "lost+found" for path in folder.iterdir()
    )


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder; move its contents to `folder` if the context ends without an error.

    `folder` must be absent or empty. A link or a mount point is kept. Hold a `folder_lock` meanwhile. Raises
    `UserError` if another program has written into `folder` meanwhile.
    """
    folder = folder.resolve()
    beside, within = folder.with_name(f".{folder.name}.partial"), folder / ".partial"
    partial = within if folder.exists() else beside  # on the disk of `folder`, so that a rename suffices
    try:
        for leftover in (beside, within):  # from a process that was killed
            shutil.rmtree(leftover, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        if not is_absent_or_empty(folder):
            raise UserError(f"another program has written into {folder} meanwhile; nothing was added to it")
        if partial == beside:
            partial.rename(folder)
        else:  # files last: dataset.json marks the data as complete
            for path in sorted(partial.iterdir(), key=lambda path: (path.is_file(), path.name)):
                path.rename(folder / path.name)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def folder_lock(folder: Path, doing: str) -> Iterator[None]:
    """Hold a lock on `folder`, which need not exist. `doing` names the work to other processes: "importing".

    Raises `UserError` if another process holds the lock.
    """
    folder = folder.resolve()
    with writing(folder, "nothing was changed"):
        folder.parent.mkdir(parents=True, exist_ok=True)
    busy = f"another process is {doing} into {folder}; wait for it, or choose another folder"
    with locked(folder.with_name(f".{folder.name}.lock"), busy):
        yield
