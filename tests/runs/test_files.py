"""Files are whole or absent."""

import errno
import zipfile
import zlib
from pathlib import Path

import pytest

from lapo.errors import UserError
from lapo.runs.files import atomic_write, hindrance, reading


def test_atomic_write_replaces_the_file_once_it_is_whole(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def write(part: Path) -> None:
        assert path.read_text() == "old"
        part.write_text("new")

    atomic_write(path, write, verify=lambda part: part.read_text() == "new" or pytest.fail("not yet there"))
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def full_disk(part: Path) -> None:
    part.write_text("half of")
    raise OSError(28, "No space left on device")


def unreadable(part: Path) -> None:
    raise UserError(f"{part} is damaged")


@pytest.mark.parametrize(
    ("write", "verify"), [(full_disk, None), (lambda part: part.write_text("new"), unreadable)]
)
def test_a_failed_write_keeps_what_was_there(tmp_path, write, verify):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(UserError, match=r"cannot write .*file \(.*\); what was there before is kept"):
        atomic_write(path, write, verify)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def hidden(reason: OSError) -> Exception:
    """What zipfile makes of an error of the system while it looks for its directory."""
    try:
        try:
            raise reason
        except OSError:
            raise zipfile.BadZipFile("File is not a zip file")  # noqa: B904
    except zipfile.BadZipFile as error:
        return error


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (PermissionError(errno.EACCES, "x"), "Permission denied"),
        (FileNotFoundError(errno.ENOENT, "x"), "No such file or directory"),
        (OSError(errno.EMFILE, "x"), "Too many open files"),
        (hidden(OSError(errno.EIO, "x")), "Input/output error"),
        (MemoryError(), "too little memory"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "too little memory"),
        (zlib.error("Error -4 while decompressing data"), "too little memory"),
        (zlib.error("Error -3 while decompressing data: invalid block type"), None),
        (hidden(OSError(errno.EINVAL, "Invalid argument")), None),
        (IsADirectoryError(errno.EISDIR, "Is a directory"), None),
        (OSError("Invalid data stream"), None),
        (ValueError("x"), None),
    ],
)
def test_what_keeps_a_file_from_being_read_is_told_from_damage(error, reason, tmp_path):
    assert hindrance(error) == reason
    with pytest.raises(UserError if reason else type(error)), reading(tmp_path):
        raise error


def test_a_mistake_that_was_told_already_is_not_told_again(tmp_path):
    mistake = UserError("not a chunk")
    mistake.__context__ = PermissionError(errno.EACCES, "x")
    with pytest.raises(UserError, match=r"^not a chunk$"), reading(tmp_path):
        raise mistake
