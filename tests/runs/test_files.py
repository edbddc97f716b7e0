"""Files are whole or absent, and so are folders."""

import errno
import zipfile
import zlib
from pathlib import Path

import pytest

from lapo.errors import UserError
from lapo.runs.files import (
    atomic_folder,
    atomic_write,
    folder_lock,
    is_absent_or_empty,
    read_error_cause,
    reading,
)


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
    with pytest.raises(UserError, match=r"cannot write .*file \(.*\); the previous file is kept"):
        atomic_write(path, write, verify)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


# ---------------------------------------------------------------- folders


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def fill(partial: Path) -> None:
    for name in ("train/0.npz", "test/0.npz", "dataset.json"):
        (partial / name).parent.mkdir(exist_ok=True)
        (partial / name).touch()


FILLED = ["dataset.json", "test/0.npz", "train/0.npz"]


def test_vacant_is_what_holds_nothing_of_the_users(tmp_path):
    assert is_absent_or_empty(tmp_path / "absent")
    assert is_absent_or_empty(tmp_path)
    (tmp_path / ".DS_Store").touch()
    (tmp_path / "lost+found").mkdir()
    assert is_absent_or_empty(tmp_path)
    assert not is_absent_or_empty(tmp_path / ".DS_Store")
    (tmp_path / "train").mkdir()
    assert not is_absent_or_empty(tmp_path)


@pytest.mark.parametrize("there", [True, False])
def test_an_atomic_folder_appears_complete_and_leftovers_go(tmp_path, there):
    folder = tmp_path / "maze"
    leftovers = [tmp_path / ".maze.partial"]
    if there:
        folder.mkdir()
        leftovers.append(folder / ".partial")
    for leftover in leftovers:
        leftover.mkdir()
        (leftover / "half").touch()
    with atomic_folder(folder) as partial:
        fill(partial)
        assert is_absent_or_empty(folder)
        # Where a rename can put it in place: on the same disk, even if `folder` is a mount point.
        assert partial == (folder / ".partial" if there else tmp_path / ".maze.partial")
    assert names(tmp_path) == [f"maze/{name}" for name in FILLED]


def test_files_that_say_that_all_is_there_come_last(tmp_path, monkeypatch):
    moved, rename = [], Path.rename
    monkeypatch.setattr(Path, "rename", lambda path, to: moved.append(path.name) or rename(path, to))
    with atomic_folder(tmp_path) as partial:
        fill(partial)
    assert moved == ["test", "train", "dataset.json"]


@pytest.mark.parametrize("there", [True, False])
def test_what_fails_leaves_nothing(tmp_path, there):
    folder = tmp_path / "maze"
    if there:
        folder.mkdir()

    def interrupted() -> None:
        with atomic_folder(folder) as partial:
            fill(partial)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert names(tmp_path) == []
    assert folder.exists() == there


def test_what_others_put_there_meanwhile_is_not_mixed_with(tmp_path):
    folder = tmp_path / "maze"

    def disturbed() -> None:
        with atomic_folder(folder) as partial:
            fill(partial)
            (folder / "train").mkdir(parents=True)

    with pytest.raises(UserError, match=r"another program has written into .*maze meanwhile"):
        disturbed()
    assert names(tmp_path) == []


def test_links_to_one_folder_share_its_lock(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "maze")
    with folder_lock(tmp_path / "link", "recording"):
        assert names(tmp_path) == ["disk/.maze.lock"]
    assert names(tmp_path) == []


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
    assert read_error_cause(error) == reason
    with pytest.raises(UserError if reason else type(error)), reading(tmp_path):
        raise error


def test_a_mistake_that_was_told_already_is_not_told_again(tmp_path):
    mistake = UserError("not a chunk")
    mistake.__context__ = PermissionError(errno.EACCES, "x")
    with pytest.raises(UserError, match=r"^not a chunk$"), reading(tmp_path):
        raise mistake
