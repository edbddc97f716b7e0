"""Files that are whole or absent, and used by one process at a time.

A crash or a full disk leaves no half file in the place of a good one.
"""

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


OF_CONTENT = errno.EINVAL, errno.EISDIR
"""Errors of the system that tell of what is there: damage that points to before a file's start, a folder."""
OF_MEMORY = "allocate memory", "not enough memory", "Error -4 while"
"""What torch and zlib say where others raise MemoryError."""


def read_obstacle(error: BaseException | None) -> str | None:
    """What kept a file from being read though it may be intact: permissions, memory, an I/O error and such.

    None if `error` tells of the file's content. zipfile hides some errors of the system behind its own: those
    that came before `error` count as well.
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
    """What keeps `path` from being read though it may be intact raises `UserError`; other errors pass."""
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


def is_vacant(folder: Path) -> bool:
    """Whether nothing is at `folder`, or a folder with nothing but what systems put there by themselves."""
    if not folder.exists():
        return True
    return folder.is_dir() and all(
        path.name[0] == "." or path.name == "lost+found" for path in folder.iterdir()
    )


@contextmanager
def filled_at_once(folder: Path) -> Iterator[Path]:
    """A temporary folder, whose contents are in the vacant `folder` when the context is left without error.

    `folder` may be a link or a mount point: what is there stays there. One process at a time: see `locked`.
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
        else:  # files last: they say that the folders are complete
            for path in sorted(partial.iterdir(), key=lambda path: (path.is_file(), path.name)):
                path.rename(folder / path.name)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def filling(folder: Path, what: str) -> Iterator[None]:
    """Lock what is at `folder`, or will be, against other processes that are `what` there.

    Raises `UserError` if there is one.
    """
    folder = folder.resolve()
    with writing(folder, "nothing was changed"):
        folder.parent.mkdir(parents=True, exist_ok=True)
    busy = f"another process is {what} into {folder}; wait for it, or choose another folder"
    with locked(folder.with_name(f".{folder.name}.lock"), busy):
        yield
