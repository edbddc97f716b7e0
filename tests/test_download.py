"""setup_data.sh and download_data.py: real command lines, local zips, a stub in the place of gdown."""

import inspect
import io
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import gdown
import pytest

from lapo import download_data
from lapo.errors import UserError
from lapo.games.table import GAMES
from support import PATIENCE

ROOT = Path(__file__).resolve().parent.parent


def chunk(name: str) -> bytes:
    """A small chunk: an uncompressed zip."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as opened:
        opened.writestr("obs.npy", name * 500)
    return file.getvalue()


CHUNKS = {f"bigfish/{name}.npz": chunk(name) for name in ("train/0", "train/1", "train/2", "test/0")}
STUB = """
import json, os, shutil
from gdown.exceptions import DownloadError

def download(**kwargs):
    with open(os.environ["CALLS"], "a") as calls:
        calls.write(json.dumps(kwargs) + "\\n")
    if "ARCHIVE" not in os.environ:
        raise DownloadError("Too many users have viewed\\n\\n\\tor downloaded this file recently.")
    shutil.copy(os.environ["ARCHIVE"], kwargs["output"])
"""


class Drive:
    """A data folder, and a gdown that hands out `archive` or, without one, refuses."""

    def __init__(self, folder: Path):
        self.data = folder / "data"
        self.data.mkdir()
        self.archive: Path | None = None
        self.log = folder / "calls"
        self.stub = folder / "stub"
        (self.stub / "gdown").mkdir(parents=True)
        (self.stub / "gdown" / "__init__.py").write_text(STUB)
        (self.stub / "gdown" / "exceptions.py").write_text("class DownloadError(Exception): pass\n")

    def set_up(self, *games: str) -> subprocess.CompletedProcess[str]:
        env = os.environ | {"PYTHON": sys.executable, "PYTHONPATH": str(self.stub), "CALLS": str(self.log)}
        if self.archive:
            env["ARCHIVE"] = str(self.archive)
        command = ["bash", str(ROOT / "setup_data.sh"), *games, "--data-dir", str(self.data)]
        return subprocess.run(command, env=env, capture_output=True, text=True, timeout=PATIENCE)

    def calls(self) -> list[dict]:
        return [json.loads(line) for line in self.log.read_text().splitlines()] if self.log.exists() else []


@pytest.fixture
def drive(tmp_path) -> Drive:
    return Drive(tmp_path)


def write_zip(path: Path, members: dict[str, bytes] = CHUNKS) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_download_unpacks_removes_the_archive_and_is_not_repeated(drive, tmp_path):
    members = {"bigfish/": b"", **CHUNKS, "bigfish/.DS_Store": b"no chunk", "bigfish/train/../9.npz": b""}
    drive.archive = write_zip(tmp_path / "published.zip", members)
    (drive.data / "bigfish.zipabcd1234.part").write_bytes(b"of a download that broke off")
    (drive.data / ".bigfish.partial").mkdir()
    (drive.data / ".bigfish.partial" / "of a run that was killed").write_bytes(b"")

    first = drive.set_up("bigfish")
    assert first.returncode == 0, first.stderr
    assert "3 train and 1 test chunks are now in" in first.stdout
    assert "ignored 2 files" in first.stdout
    assert files(drive.data) == CHUNKS
    (call,) = drive.calls()
    assert call["id"] == download_data.ARCHIVES["bigfish"]
    assert call["resume"] is True
    inspect.signature(gdown.download).bind(**call)  # the real gdown takes these arguments

    again = drive.set_up("bigfish")
    assert again.returncode == 0
    assert "nothing to do" in again.stdout
    assert len(drive.calls()) == 1


@pytest.mark.parametrize(
    ("there", "complaint"),
    [
        ({"train/0.npz": chunk("train/0")}, "it has no test/<number>.npz"),
        ({"test/0.npz": chunk("test/0"), "train/notes.txt": b""}, "it has no train/<number>.npz"),
        (
            {"train/0.npz": chunk("0"), "train/1.npz": chunk("1")[:-9], "test/0.npz": chunk("0")},
            "incomplete train/1.npz",
        ),
        (
            {"train/0.npz": chunk("0"), "train/2.npz": chunk("2"), "test/0.npz": chunk("0")},
            "it has 2 chunks in train, but their numbers go up to 2",
        ),
        ({"bigfish/train/0.npz": chunk("0")}, "it has no train/<number>.npz"),
    ],
)
def test_an_incomplete_game_is_an_error(tmp_path, capsys, there, complaint):
    for name, content in there.items():
        path = tmp_path / "bigfish" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    with pytest.raises(UserError) as error:
        download_data.set_up("bigfish", tmp_path)
    assert f"{tmp_path / 'bigfish'} is not complete: it " in str(error.value)
    assert complaint in str(error.value)
    assert "move it away or delete it, and run the command again" in str(error.value)
    assert files(tmp_path / "bigfish") == there


@pytest.mark.parametrize("link", [True, False])
def test_a_folder_with_nothing_of_the_users_is_filled(tmp_path, link):
    folder = tmp_path / "data" / "bigfish"
    disk = tmp_path / "disk" if link else folder
    disk.mkdir(parents=True)
    (disk / ".DS_Store").write_bytes(b"")
    if link:
        folder.parent.mkdir()
        folder.symlink_to(disk)
    write_zip(folder.with_suffix(".zip"))
    download_data.set_up("bigfish", folder.parent)
    assert files(disk) == {".DS_Store": b""} | {name[8:]: content for name, content in CHUNKS.items()}
    assert [path.name for path in folder.parent.iterdir()] == ["bigfish"]


def test_one_process_sets_up_a_game_at_a_time(tmp_path, monkeypatch):
    write_zip(tmp_path / "bigfish.zip")
    locked = []

    def look(archive: Path, game: str) -> None:
        locked.append((tmp_path / ".bigfish.lock").exists())
        raise UserError("enough")

    monkeypatch.setattr(download_data, "unpack", look)
    with pytest.raises(UserError, match="enough"):
        download_data.set_up("bigfish", tmp_path)
    assert locked == [True]
    assert [path.name for path in tmp_path.iterdir()] == ["bigfish.zip"]


def test_refusal_says_what_to_do_by_hand_and_the_other_games_go_on(drive):
    write_zip(drive.data / "bigfish.zip")
    result = drive.set_up("maze", "bigfish")
    assert result.returncode == 2
    (error,) = (line for line in result.stderr.splitlines() if line.startswith("error: "))
    for part in (
        "maze: the download failed (Too many users have viewed or downloaded this file recently.)",
        f"https://drive.google.com/file/d/{download_data.ARCHIVES['maze']}/view",
        f"https://drive.google.com/drive/folders/{download_data.FOLDER}",
        f"save the zip as {drive.data / 'maze.zip'}",
        "download other experts' frames with --source huggingface",
    ):
        assert part in error
    assert result.stdout.endswith("1 of 2 games could not be set up: maze\n")
    assert files(drive.data) == CHUNKS  # from the zip that lay there, without a download
    assert len(drive.calls()) == 1


def truncated(path: Path) -> None:
    write_zip(path)
    path.write_bytes(path.read_bytes()[:-30])


def damaged(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in CHUNKS.items():
            archive.writestr(name, content)
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)


def too_large(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in CHUNKS.items():
            archive.writestr(name, content)
        archive.infolist()[0].file_size = 10**15


def web_page(path: Path) -> None:
    path.write_text("<html>Sign in</html>")


def holding(*names: str) -> Callable[[Path], Path]:
    return lambda path: write_zip(path, dict.fromkeys(names, b"frames"))


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (truncated, "bigfish.zip is not the intact archive"),
        (damaged, "(Bad CRC-32 for file 'bigfish/train/0.npz')"),
        (web_page, "(File is not a zip file)"),
        (holding("maze/train/0.npz", "maze/test/0.npz"), "no bigfish/train/<number>.npz"),
        (holding("bigfish/train/0.npz"), "no bigfish/test/<number>.npz"),
        (too_large, "unpacks to 1000000.0 GB, but the disk has"),
    ],
)
def test_bad_archive_leaves_everything_as_it_was(drive, make, complaint):
    make(drive.data / "bigfish.zip")
    before = files(drive.data.parent)
    result = drive.set_up("bigfish")
    assert result.returncode == 2
    (error,) = (line for line in result.stderr.splitlines() if "error" in line)
    assert error.startswith(f"error: bigfish: {drive.data / 'bigfish.zip'} ")
    assert complaint in error
    assert "run the command again" in error
    assert files(drive.data.parent) == before
    assert [path.name for path in drive.data.iterdir()] == ["bigfish.zip"]


@pytest.mark.parametrize("games", [[], ["bigfsh"]])
def test_unknown_game_is_one_sentence_with_the_games(drive, games):
    result = drive.set_up(*games)
    assert result.returncode == 2
    (error,) = result.stderr.splitlines()
    assert ", ".join(GAMES) in error
    assert drive.calls() == []


def test_missing_environment_is_one_sentence(tmp_path):
    script = shutil.copy(ROOT / "setup_data.sh", tmp_path)
    env = {key: value for key, value in os.environ.items() if key != "PYTHON"}
    result = subprocess.run(["bash", script, "all"], env=env, capture_output=True, text=True)
    assert result.returncode == 2
    (error,) = result.stderr.splitlines()
    assert error == f"error: there is no {tmp_path}/.venv/bin/python; run 'make venv' in {tmp_path} first"


def test_every_game_has_an_archive():
    assert list(download_data.ARCHIVES) == list(GAMES)
