"""The check of a data folder: `python data_loader.py --check`."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lapo import config
from lapo.data.checks import check_chunk, check_folder, find_all_chunks
from lapo.errors import UserError
from support import LAPO, PATIENCE, ROOT, numbered_frames, write_chunk, write_game


def run_check(*folders: str | Path, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """The real command line."""
    command = [sys.executable, str(LAPO / "data_loader.py"), "--check", *map(str, folders)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=PATIENCE)


def cells(result: subprocess.CompletedProcess[str]) -> list[list[str]]:
    """The lines that were printed, in words."""
    return [line.split() for line in result.stdout.splitlines()]


def flip(path: Path, key: str) -> None:
    """Change a bit of an array's content."""
    content = bytearray(path.read_bytes())
    content[content.find(f"{key}.npy".encode()) + 300] ^= 1
    path.write_bytes(content)


@pytest.mark.slow
def test_good_data_are_shown_as_a_table(tmp_path):
    write_game(tmp_path / "maze", frames=40, chunks=2)
    write_chunk(tmp_path / "mine" / "7.npz", numbered_frames(np.arange(1500)))
    done = run_check("maze", tmp_path / "mine", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    with np.load(tmp_path / "maze/train/0.npz") as chunk:
        actions = len(set(chunk["ta"].tolist()))
    lines = cells(done)
    assert lines[:2] == [["maze"], ["file", "frames", "cuts", "actions", "MB"]]
    assert lines[2] == ["train/0.npz", "40", "1", str(actions), "0.5", "ok"]
    assert [line[0] for line in lines[2:5]] == ["train/0.npz", "train/1.npz", "test/0.npz"]
    assert lines[5] == [str(tmp_path / "mine")]
    assert lines[7] == ["mine/7.npz", "1,500", "-", "-", "18.4", "ok"]
    assert done.stdout.endswith("\n4 chunks, 19.9 MB, 1,620 frames in good ones: all good\n")


@pytest.mark.slow
def test_every_bad_chunk_is_told_with_its_fault(tmp_path):
    write_game(tmp_path, frames=40, chunks=3)
    np.savez(tmp_path / "train/0.npz", ta=np.zeros(5))
    flip(tmp_path / "train/2.npz", "obs")
    done = run_check(tmp_path)
    assert done.returncode == 2
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert lines[2].split()[1:4] == ["-", "-", "-"]
    assert lines[2].endswith("  holds no array `obs`, found: ta.npy")
    assert lines[3].endswith("  ok")
    assert lines[4].endswith("delete it and make it again")
    assert lines[-1].endswith(" 80 frames in good ones: 2 bad")


def others(**arrays: np.ndarray) -> dict[str, np.ndarray]:
    return {"rewards": np.zeros(40, np.float32), "notes": np.zeros(3)} | arrays


FAULTS = {
    "": others(),
    "1 of the 40 `rewards` are not finite": others(rewards=np.where(np.arange(40) == 7, np.nan, 0.5)),
    "2 of the 40 `values` are not finite": others(values=np.where(np.arange(40) < 2, -np.inf, 0)),
    "`ep_returns` must be numbers (40,), found float64 (39,)": others(ep_returns=np.zeros(39)),
    "`logprobs` must be numbers (40,), found <U1 (40,)": others(logprobs=np.full(40, "a")),
    "`values` must be numbers (40,), found object (40,)": others(values=np.full(40, None)),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_training_does_not_read_is_checked_too(fault, tmp_path):
    path = write_chunk(tmp_path / "0.npz", numbered_frames(np.arange(40)), **FAULTS[fault])
    assert (check_chunk(path).fault or "") == fault


@pytest.mark.parametrize("key", ["rewards", "notes"])
def test_checksums_of_all_arrays_are_compared(key, tmp_path):
    arrays = others(notes=np.zeros(40), last=np.zeros(40))
    path = write_chunk(tmp_path / "0.npz", numbered_frames(np.arange(40)), **arrays)
    flip(path, key)
    assert "is not a readable npz file (BadZipFile: Bad CRC-32" in check_chunk(path).fault


def test_an_array_whose_name_is_damaged_is_not_taken_for_absent(tmp_path):
    path = write_chunk(tmp_path / "0.npz", numbered_frames(np.arange(40)), done=np.zeros(40, bool))
    content, entry = path.read_bytes().rsplit(b"done.npy", 1)
    path.write_bytes(content + b"dome.npy" + entry)
    assert "is not a readable npz file (BadZipFile: File name in directory" in check_chunk(path).fault


def test_a_file_that_is_none_is_bad(tmp_path):
    (tmp_path / "1.npz").mkdir()
    assert "is not a readable npz file" in check_chunk(tmp_path / "1.npz").fault


@pytest.mark.slow
def test_what_could_not_be_read_is_not_called_bad(tmp_path):
    write_chunk(tmp_path / "0.npz", numbered_frames(np.arange(40)))
    (tmp_path / "1.npz").symlink_to(tmp_path / "a disk that is not mounted")
    (tmp_path / "2.npz").symlink_to(tmp_path / "2.npz")
    done = run_check(tmp_path)
    assert (done.returncode, done.stderr) == (2, "")
    lines = done.stdout.splitlines()
    for line, reason in ((3, "No such file or directory"), (4, "Too many levels of symbolic links")):
        assert f"  could not be read ({reason}); it may be intact: remove the cause" in lines[line]
    assert "delete" not in done.stdout
    assert lines[-1] == "3 chunks, 0.5 MB, 40 frames in good ones: 0 bad, 2 could not be read"


def test_files_that_only_look_like_chunks_are_named(tmp_path, capsys):
    write_game(tmp_path, frames=10, chunks=1)
    for name in ("traj_1.npz", "2.NPZ", "._0.npz", "notes.txt", "1.npz.part"):
        (tmp_path / "train" / name).touch()
    found = check_folder(tmp_path, find_all_chunks(tmp_path))
    told = f"{tmp_path / 'train'} also holds 2.NPZ, traj_1.npz (ignored); rename what holds frames"
    assert capsys.readouterr().out.count("note: ") == 1
    check_folder(tmp_path, find_all_chunks(tmp_path))
    assert f"\nnote: {told} to <number>.npz\n" in capsys.readouterr().out
    assert [result.fault for result in found] == [None, None]


@pytest.mark.slow
def test_folders_without_chunks_get_one_sentence(tmp_path, monkeypatch):
    done = run_check("nowhere", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    sentence = f"there is no folder nowhere, neither here nor in {ROOT}; name another"
    assert done.stderr == f"error: {sentence}\n"

    monkeypatch.chdir(tmp_path)
    (tmp_path / "maze" / "train").mkdir(parents=True)
    (tmp_path / "empty").mkdir()
    for name, place in (("empty", "empty"), ("maze", "maze/train")):
        with pytest.raises(UserError, match=rf"^{place} holds no chunk \(<number>\.npz\); docs/data\.md"):
            find_all_chunks(Path(name))
    (tmp_path / "empty" / "episode_0.npz").touch()
    with pytest.raises(UserError, match=r"holds no chunk .*, but episode_0\.npz \(ignored\); rename"):
        find_all_chunks(Path("empty"))


def test_a_relative_folder_is_looked_for_here_and_then_in_the_repository(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(config, "ROOT", tmp_path / "repository")
    write_chunk(tmp_path / "repository" / "both" / "0.npz", numbered_frames(np.arange(3)))
    assert find_all_chunks(Path("both")) == [tmp_path / "repository" / "both" / "0.npz"]
    write_chunk(tmp_path / "both" / "1.npz", numbered_frames(np.arange(3)))
    assert find_all_chunks(Path("both")) == [Path("both") / "1.npz"]
