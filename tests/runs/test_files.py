"""Files are whole or absent."""

from pathlib import Path

import pytest

from lapo.errors import UserError
from lapo.runs.files import atomic_write


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
