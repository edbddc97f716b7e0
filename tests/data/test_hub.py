"""The hub's data set as chunks, from a server on loopback: contents, resuming, refusals, command lines."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest

import hub as served
from lapo import download_data
from lapo.data import hub
from lapo.data.checks import check_chunk
from lapo.errors import UserError
from support import PATIENCE, ROOT, read_numbers

FRAMES = {"train": 95, "test": 13}
SIZES = {"train": 30, "test": 5}
"""Frames of a chunk in these tests."""


@pytest.fixture
def server(tmp_path) -> Iterator[served.Hub]:
    """A hub with 130 training rows of maze and 40 test rows, as images."""
    source = served.Hub(tmp_path / "served")
    source.add("maze", "train", [40, 23, 27, 40])
    source.add("maze", "test", [20, 20], first=500, layout=served.images, end="done")
    with served.serve(source):
        yield source


@pytest.fixture(autouse=True)
def ours(server, tmp_path, monkeypatch) -> None:
    """The library asks the server alone, without a cache or a token of the user's; chunks are small."""
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(hub, "CHUNK_FRAMES", SIZES)


def set_up(folder: Path, revision: str = served.COMMIT, **frames: int) -> None:
    hub.set_up("maze", folder, FRAMES | frames, revision)


def contents(folder: Path) -> dict[str, bytes]:
    """The files of a folder, hidden ones included."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def read_split(folder: Path, split: str) -> dict[str, np.ndarray]:
    """The arrays of all chunks of a split, one after another."""
    paths = sorted((folder / "maze" / split).glob("*.npz"), key=lambda path: int(path.stem))
    assert [path.stem for path in paths] == [str(number) for number in range(len(paths))]
    assert [check_chunk(path).fault for path in paths] == [None] * len(paths)
    chunks = [np.load(path) for path in paths]
    return {key: np.concatenate([chunk[key] for chunk in chunks]) for key in chunks[0].files}


def record_of(folder: Path) -> dict:
    return json.loads((folder / "maze" / "dataset.json").read_text())


def refusal(folder: Path, revision: str = served.COMMIT, **frames: int) -> str:
    with pytest.raises(UserError) as error:
        set_up(folder, revision, **frames)
    assert "\n" not in str(error.value)
    return str(error.value)


# ---------------------------------------------------------------- contents


def test_rows_are_in_order_across_files_and_chunks(tmp_path, server):
    set_up(tmp_path)
    for split, first, lengths in (("train", 0, [30, 30, 30, 5]), ("test", 500, [5, 5, 3])):
        arrays = read_split(tmp_path, split)
        numbers = np.arange(first, first + FRAMES[split])
        assert read_numbers(arrays["obs"]).tolist() == numbers.tolist()
        assert np.array_equal(arrays["ta"], numbers % 15)
        assert np.array_equal(arrays["rewards"], numbers % 7)
        assert np.array_equal(arrays["done"], (numbers % 10 == 9) | (numbers % 25 == 24))
        sizes = [np.load(tmp_path / f"maze/{split}/{n}.npz")["ta"].size for n in range(len(lengths))]
        assert sizes == lengths

        returns, total = [], 0.0
        for number, end in zip(numbers, arrays["done"], strict=True):  # episodes go on across chunks
            total += number % 7
            returns.append(total if end else 0.0)
            total = 0.0 if end else total
        assert np.array_equal(arrays["ep_returns"], returns)
        ended = np.array(returns)[arrays["done"]]
        summary = record_of(tmp_path)[split]
        assert (summary["frames"], summary["episodes"]) == (FRAMES[split], ended.size)
        assert summary["mean_return"] == pytest.approx(ended.mean())
        error = ended.std(ddof=1) / ended.size**0.5 if ended.size > 1 else None
        assert summary["standard_error"] == (error and pytest.approx(error))


def test_only_needed_files_are_fetched_and_none_is_left(tmp_path, server):
    set_up(tmp_path, train=60)
    assert server.fetched == [
        *("maze/train-00000-of-00004.parquet", "maze/train-00001-of-00004.parquet"),
        "maze/test-00000-of-00002.parquet",
    ]
    assert {path for path in contents(tmp_path / "maze") if "npz" not in path} == {"dataset.json"}
    assert not (tmp_path / "maze" / hub.DOWNLOADS).exists()


def test_one_file_lies_on_the_disk_beside_those_with_open_rows(tmp_path, server):
    there = []
    server.on_fetch = lambda name: there.append(
        {int(path.name[6:11]) for path in (tmp_path / "maze").rglob("train-*.parquet")}
    )
    set_up(tmp_path, train=130)
    # While file 1 comes, rows 30 to 39 of file 0 wait for it; the chunk before may still be written.
    assert all(files <= {number - 1, number - 2} for number, files in enumerate(there[:4]))
    assert 0 not in there[3]


def test_a_file_that_ends_with_a_chunk_is_removed_with_it(tmp_path, server):
    shutil.rmtree(server.folder)
    server.add("maze", "train", [30, 30, 30, 30])
    server.add("maze", "test", [20])
    there = []
    server.on_fetch = lambda name: there.append(
        len(list((tmp_path / "maze").rglob("train-0000[01]*.parquet")))
    )
    set_up(tmp_path, train=120)
    assert there[2] == 1  # of the first two, whose second chunk may still be written


def test_what_a_killed_download_left_is_removed(tmp_path, server):
    left = tmp_path / "maze" / hub.DOWNLOADS / ".cache" / "x.1234.incomplete"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"half a file")
    there = []
    server.on_fetch = lambda name: there.append(left.exists())
    set_up(tmp_path)
    assert set(there) == {False}


def test_dataset_json_says_where_the_frames_come_from(tmp_path, server):
    set_up(tmp_path, "main")
    record = record_of(tmp_path)
    assert record["source"] == "huggingface"
    assert record["repository"] == served.REPOSITORY
    assert (record["revision"], record["requested_revision"]) == (served.COMMIT, "main")
    assert record["licence"] == "apache-2.0"
    assert list(record["files"]) == list(dict.fromkeys(server.fetched))
    for name, file in record["files"].items():
        described = server.describe(server.folder / name)
        assert (file["bytes"], file["sha256"]) == (described["size"], described["lfs"]["oid"])


def test_a_revision_with_fewer_rows_is_used_up(tmp_path, server, capsys):
    set_up(tmp_path, train=1000)
    assert "maze train: 130 frames, of 1,000 asked for: the revision has no more" in capsys.readouterr().out
    assert read_numbers(read_split(tmp_path, "train")["obs"]).tolist() == list(range(130))
    server.fetched.clear()
    server.status = 500
    set_up(tmp_path, train=1000)
    assert "nothing to do" in capsys.readouterr().out


@pytest.mark.parametrize(("rows", "kept"), [([30, 31], 60), ([30, 30], 60), ([30, 33], 63)])
def test_rows_that_make_no_window_are_left_out_at_the_end(tmp_path, server, rows, kept):
    shutil.rmtree(server.folder)
    server.add("maze", "train", rows)
    server.add("maze", "test", [20])
    for _ in range(2):
        set_up(tmp_path, train=1000)
        assert read_numbers(read_split(tmp_path, "train")["obs"]).tolist() == list(range(kept))


def test_files_of_earlier_uploads_are_ignored(tmp_path, server, capsys):
    server.add("maze", "train", [50, 50], first=7000)  # complete, but fewer files
    stale = server.folder / "maze" / "train-00003-of-00009.parquet"
    shutil.copy(server.folder / "maze" / "train-00000-of-00004.parquet", stale)
    set_up(tmp_path)
    assert read_numbers(read_split(tmp_path, "train")["obs"]).tolist() == list(range(95))
    assert "ignored 3 files of train of other uploads than that of 4 files" in capsys.readouterr().out


def test_a_list_of_files_with_a_gap_is_refused(tmp_path, server):
    (server.folder / "maze" / "train-00002-of-00004.parquet").unlink()
    message = refusal(tmp_path)
    assert "no complete list of files maze/train-<k>-of-<n>.parquet, found 3 of 4" in message
    assert server.fetched == []


@pytest.mark.parametrize("counted", [True, False])
def test_the_size_is_said_before_anything_is_fetched(tmp_path, server, capsys, monkeypatch, counted):
    if counted:
        splits = [{"name": "train", "num_examples": 130}, {"name": "test", "num_examples": 40}]
        server.card["dataset_info"] = [{"config_name": "maze", "splits": splits}]
    monkeypatch.setattr(hub, "hf_hub_download", lambda *_, **__: pytest.fail("fetched"))
    monkeypatch.setattr(served.Hub, "describe", enlarged)
    monkeypatch.setattr(hub.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(0, 0, 1 << 50))
    with pytest.raises(pytest.fail.Exception, match="fetched"):
        set_up(tmp_path)
    said = capsys.readouterr().out
    train = "about 3 of 4 files of train (9.00 GB)" if counted else "at most 4 of 4 files of train (12.00 GB)"
    test = "about 1 of 2 files of test (3.00 GB)" if counted else "at most 2 of 2 files of test (6.00 GB)"
    assert f"maze: downloading {train} and {test} of {served.REPOSITORY}, revision {served.COMMIT}" in said


def enlarged(self: served.Hub, file: Path) -> dict:
    lfs = {"oid": "0" * 64, "size": 3 * 10**9, "pointerSize": 130}
    path = file.relative_to(self.folder).as_posix()
    return {"type": "file", "oid": "0" * 40, "size": 3 * 10**9, "path": path, "lfs": lfs}


# ---------------------------------------------------------------- resuming


class Killed(BaseException):
    """Stands for a signal that ends the process."""


POINTS = {"write_json": 13, "write_chunk": 7, "hf_hub_download": 5}
"""What a run calls, and how often in these tests."""


@pytest.mark.parametrize("name", POINTS)
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_a_run_killed_anywhere_continues_without_fetching_a_file_again(
    tmp_path, server, monkeypatch, name, after
):
    set_up(tmp_path / "whole")
    expected, fetched = contents(tmp_path / "whole"), Counter(server.fetched)
    original, calls = getattr(hub, name), 0

    def killed(*args: object, **options: object) -> object:
        nonlocal calls
        calls += 1
        done = original(*args, **options) if after or calls != stop else None
        if calls == stop:
            raise Killed
        return done

    monkeypatch.setattr(hub, name, killed)
    calls, stop = 0, -1
    set_up(tmp_path / "counted")
    assert calls == POINTS[name]
    for stop in range(1, POINTS[name] + 1):
        server.fetched.clear()
        calls, folder = 0, tmp_path / f"{stop}"
        with pytest.raises(Killed):
            set_up(folder)
        calls = 1000
        set_up(folder)
        assert contents(folder) == expected
        assert Counter(server.fetched) == fetched


@pytest.mark.slow
def test_a_killed_process_continues(tmp_path, server):
    """SIGKILL while the third training file is on its way: only that one is fetched again."""
    set_up(tmp_path / "whole")
    fetched = Counter(server.fetched)
    server.fetched.clear()
    code = f"from lapo.data import hub; hub.CHUNK_FRAMES.update({SIZES}); " + (
        f"from pathlib import Path; hub.set_up('maze', Path({str(tmp_path / 'data')!r}), {FRAMES}, 'main')"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        env=os.environ | {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "home")},
        stderr=subprocess.DEVNULL,
        cwd=ROOT,
    )
    third = "maze/train-00002-of-00004.parquet"
    server.on_fetch = lambda name: process.send_signal(signal.SIGKILL) if name == third else None
    assert process.wait(timeout=PATIENCE) == -signal.SIGKILL
    server.on_fetch = lambda name: None
    assert record_of(tmp_path / "data")["chunks"]
    set_up(tmp_path / "data", "main")
    assert Counter(server.fetched) == fetched + Counter([third])
    for split in FRAMES:
        for number in range(4 if split == "train" else 3):
            name = f"maze/{split}/{number}.npz"
            assert (tmp_path / "data" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_more_frames_are_added_and_a_deleted_chunk_is_made_again(tmp_path, server):
    set_up(tmp_path / "whole", train=90)
    set_up(tmp_path / "data", train=30)
    server.fetched.clear()
    set_up(tmp_path / "data", train=90)
    assert [name for name in server.fetched if "test" in name] == []
    assert read_split(tmp_path / "data", "train").keys() == read_split(tmp_path / "whole", "train").keys()
    chunk = "maze/train/1.npz"
    (tmp_path / "data" / chunk).unlink()
    set_up(tmp_path / "data", train=90)
    wanted, found = contents(tmp_path / "whole"), contents(tmp_path / "data")
    assert {name: data for name, data in found.items() if "npz" in name} == {
        name: data for name, data in wanted.items() if "npz" in name
    }
    message = refusal(tmp_path / "data", train=90, test=20)
    assert "holds 13 test frames, whose last chunk is shorter than the others" in message


def test_a_branch_that_moves_does_not_change_a_folder(tmp_path, server):
    set_up(tmp_path, "main", train=30)
    asked = []
    answer = server.answer
    server.answer = lambda path: asked.append(path) or answer(path)
    set_up(tmp_path, "main", train=60)
    assert any(path.endswith(f"/revision/{served.COMMIT}") for path in asked)
    assert not any(path.endswith("/revision/main") for path in asked)
    set_up(tmp_path, served.COMMIT, train=60)
    before = contents(tmp_path)
    assert f"was begun with revision {served.COMMIT}, not {hub.REVISION}" in refusal(tmp_path, hub.REVISION)
    assert contents(tmp_path) == before


def test_another_revision_may_be_chosen_before_the_first_chunk(tmp_path, server):
    path = server.folder / "maze" / "train-00000-of-00004.parquet"
    good = path.read_bytes()
    path.write_bytes(good[:-100])
    assert "is not an intact parquet file" in refusal(tmp_path)
    path.write_bytes(good)
    server.commit = served.COMMIT[::-1]
    set_up(tmp_path, server.commit)
    assert record_of(tmp_path)["revision"] == server.commit
    assert read_numbers(read_split(tmp_path, "train")["obs"]).tolist() == list(range(95))


# ---------------------------------------------------------------- refusals


def test_a_file_that_arrives_damaged_is_fetched_again_by_the_next_run(tmp_path, server):
    server.damage.add("maze/train-00001-of-00004.parquet")
    message = refusal(tmp_path)
    assert "maze/train-00001-of-00004.parquet arrived damaged: its sha256 is " in message
    server.damage.clear()
    set_up(tmp_path)
    assert Counter(server.fetched)["maze/train-00001-of-00004.parquet"] == 2
    assert Counter(server.fetched)["maze/train-00000-of-00004.parquet"] == 1
    assert read_numbers(read_split(tmp_path, "train")["obs"]).tolist() == list(range(95))


@pytest.mark.parametrize("status", [401, 403])
def test_refused_access_is_one_sentence(tmp_path, server, status):
    server.status = status
    message = refusal(tmp_path)
    assert "the hub refuses access" in message
    assert "`hf auth login` or set HF_TOKEN" in message
    assert contents(tmp_path) == contents(server.folder.parent)
    assert not (tmp_path / "maze").exists()


def test_no_network_is_one_sentence(tmp_path, server, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    message = refusal(tmp_path)
    assert "cannot get revision" in message
    assert "the hub cannot be reached (ConnectError: " in message
    assert "check the network" in message


def test_an_unknown_revision_or_game_is_one_sentence(tmp_path, server):
    message = refusal(tmp_path, "nowhere")
    assert message == (
        f"cannot get revision nowhere of {served.REPOSITORY}: there is no such revision;"
        " choose another --revision"
    )
    with pytest.raises(UserError, match=r"folder ninja of .* it is not there; choose another --revision"):
        hub.set_up("ninja", tmp_path, FRAMES, served.COMMIT)


def test_a_full_disk_is_one_sentence(tmp_path, server, monkeypatch):
    set_up(tmp_path, train=30)
    with monkeypatch.context() as patch:
        patch.setattr(hub.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 99, 1))
        assert "make room, or choose another --data-dir; the finished chunks are kept" in refusal(
            tmp_path, train=90
        )

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for name in ("hf_hub_download", "write_chunk"):
        with monkeypatch.context() as patch:
            if name == "write_chunk":
                patch.setattr(np.lib.format, "write_array", full)
            else:
                patch.setattr(hub, name, full)
            assert os.strerror(errno.ENOSPC) in refusal(tmp_path, train=90)
    set_up(tmp_path, train=90)
    assert read_numbers(read_split(tmp_path, "train")["obs"]).tolist() == list(range(90))


@pytest.mark.parametrize("there", ["train/0.npz", "dataset.json", "notes.txt"])
def test_other_data_are_left_alone(tmp_path, server, there):
    path = tmp_path / "maze" / there
    path.parent.mkdir(parents=True)
    path.write_text('{"game": "maze"}')
    before = contents(tmp_path)
    assert "already holds other data; move it away, or choose another --data-dir" in refusal(tmp_path)
    assert contents(tmp_path) == before
    assert server.fetched == []


@pytest.mark.parametrize("damage", ["{", "[]", '{"source": "huggingface"}'])
def test_a_damaged_record_is_one_sentence(tmp_path, damage):
    set_up(tmp_path)
    (tmp_path / "maze" / "dataset.json").write_text(damage)
    assert "dataset.json is damaged; delete" in refusal(tmp_path)


# ---------------------------------------------------------------- command lines


def run(*words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(ROOT / "setup_data.sh"), *words]
    env = os.environ | {"PYTHON": sys.executable} | variables
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=PATIENCE)


@pytest.mark.slow
def test_the_command_line_sets_up_games_from_the_hub(tmp_path, server):
    server.add("ninja", "train", [60], layout=served.images)
    words = ["--source", "huggingface", "maze", "ninja", "--revision", "main", "--frames", "50"]
    words += ["--test-frames", "20", "--data-dir", str(tmp_path)]
    done = run(*words, HF_ENDPOINT=server.url, HF_HOME=str(tmp_path / "home"))
    assert done.returncode == 2
    (error,) = (line for line in done.stderr.splitlines() if "error" in line)
    assert error.startswith("error: ninja: revision ")
    assert "Traceback" not in done.stderr
    assert "relative returns refer to the experts of the published frames" in done.stdout
    assert done.stdout.endswith("1 of 2 games could not be set up: ninja\n")
    assert read_numbers(read_split(tmp_path, "train")["obs"]).tolist() == list(range(50))
    assert read_numbers(read_split(tmp_path, "test")["obs"]).tolist() == list(range(500, 520))

    published = run("maze", "--data-dir", str(tmp_path))
    assert published.returncode == 0
    assert "--source huggingface continues if it was interrupted" in published.stdout


@pytest.mark.slow
def test_missing_packages_are_one_sentence(tmp_path):
    (tmp_path / "pyarrow.py").write_text("raise ModuleNotFoundError(name='pyarrow')")
    done = run("--source", "huggingface", "maze", "--data-dir", str(tmp_path), PYTHONPATH=str(tmp_path))
    assert done.returncode == 2
    assert done.stderr == (
        "error: --source huggingface needs the package pyarrow; install it with"
        f" `pip install -e '{ROOT}[huggingface]'`\n"
    )


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--frames", "100"], "--frames needs --source huggingface"),
        (["--revision", "main"], "--revision needs --source huggingface"),
        (["--source", "huggingface", "--frames", "2"], "--frames is 2; there must be at least 3"),
        (["--source", "huggingface", "--test-frames", "0"], "--test-frames is 0; there must be at least 3"),
    ],
)
def test_options_that_do_not_fit_are_refused(tmp_path, monkeypatch, words, complaint):
    monkeypatch.setattr(
        sys, "argv", ["download_data.py", "maze", *words, "--data-dir", str(tmp_path / "data")]
    )
    with pytest.raises(UserError, match=complaint):
        download_data.main()
    assert not (tmp_path / "data").exists()
