"""Atomic writes and locks: files are complete or absent, and used by one process at a time."""

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
    """Let `write` make a file beside `path`, sync it to disk, `verify` it, then rename it to `path`.

    Raises `UserError` if the disk refuses; the previous file is then kept.
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
        if isinstance(error, RuntimeError):  # how torch reports a full disk, without saying so
            reason += f"; {shutil.disk_usage(path.parent).free / 1e6:,.1f} MB are free there"
        raise UserError(f"cannot write {path} ({reason}); what was there before is kept") from None
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


OF_CONTENT = errno.EINVAL, errno.EISDIR
"""System errors caused by the content: an offset before the file's start (damage), a folder."""
OF_MEMORY = "allocate memory", "not enough memory", "Error -4 while"
"""Messages of torch and zlib that stand for a MemoryError."""


def read_obstacle(error: BaseException | None) -> str | None:
    """Why an intact file could not be read (permissions, memory, an I/O error); None if it is damaged.

    zipfile wraps some system errors in its own, so the causes of `error` are examined, too.
    """
    while error is not None:
        if isinstance(error, OSError) and error.errno not in (None, *OF_CONTENT):
            return os.strerror(error.errno)
        if isinstance(error, MemoryError) or any(sign in str(error) for sign in OF_MEMORY):
            return "too little memory"
        error = error.__cause__ or error.__context__
    return None


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Errors other than a damaged `path` raise `UserError`, see `read_obstacle`; damage passes."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = read_obstacle(error)
        if reason is None:
            raise
        raise UserError(
            f"{path} could not be read ({reason}), which says nothing against what is in it;"
            " once that is mended, run the same command again"
        ) from None


@contextmanager
def writing(path: Path, kept: str) -> Iterator[None]:
    """OSErrors while writing `path` raise `UserError`, which also says what is `kept`."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot write {path} ({error}); {kept}; once that is mended, the same command continues"
        ) from None


def lock(path: Path, busy: str) -> IO:
    """Create and lock the file `path`, as long as the returned file is open.

    Raises `UserError` with the sentence `busy` if another process holds the lock, and if the disk refuses.
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
        file.close()  # the previous holder has just removed it: this is no longer the file at `path`


@contextmanager
def locked(path: Path, busy: str) -> Iterator[None]:
    """Hold a `lock` within the context, then remove its file."""
    with lock(path, busy):
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def is_vacant(folder: Path) -> bool:
    """Whether `folder` is absent or empty, apart from hidden files and lost+found."""
    if not folder.exists():
        return True
    return folder.is_dir() and all(
        path.name[0] == "." or path.name == "lost+found" for path in folder.iterdir()
    )


@contextmanager
def filled_at_once(folder: Path) -> Iterator[Path]:
    """A temporary folder whose contents are moved to the vacant `folder` if the context ends without error.

    `folder` may be a link or a mount point, which is kept. Call it in one process at a time, see `locked`.
    """
    folder = folder.resolve()
    beside, within = folder.with_name(f".{folder.name}.partial"), folder / ".partial"
    partial = within if folder.exists() else beside  # on the same disk
    try:
        for leftover in (beside, within):  # of a process that was killed
            shutil.rmtree(leftover, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        if not is_vacant(folder):
            raise UserError(f"another program has written into {folder} meanwhile; nothing was added to it")
        if partial == beside:
            partial.rename(folder)
        else:  # files last: they mark the folders as complete
            for path in sorted(partial.iterdir(), key=lambda path: (path.is_file(), path.name)):
                path.rename(folder / path.name)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def filling(folder: Path, what: str) -> Iterator[None]:
    """Hold a lock on `folder`, which need not exist yet, while doing `what`.

    Raises `UserError` if another process holds it.
    """
    folder = folder.resolve()
    with writing(folder, "nothing was changed"):
        folder.parent.mkdir(parents=True, exist_ok=True)
    busy = f"another process is {what} into {folder}; wait for it, or choose another folder"
    with locked(folder.with_name(f".{folder.name}.lock"), busy):
        yield
