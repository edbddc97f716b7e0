import contextlib
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from chunks import find_chunks, read_header, write_chunk
from conftest import LAPO, largest_file
from errors import UserError
from procgen_env import GAMES, HELD_OUT_LEVELS, TRAIN_LEVELS
from record_expert import Arguments, Chunk, Dataset, plan_chunks, play_chunk

SMALL = ("--frames", "300", "--test-frames", "4100")  # three chunks, of 300, 4,096 and 4 frames


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    """The recorder's real command line, from another working directory."""
    return subprocess.Popen(
        [sys.executable, str(LAPO / "record_expert.py"), "--data-dir", str(folder), *arguments],
        cwd=folder.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    process = start(folder, *arguments)
    stdout, stderr = process.communicate(timeout=120)
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def refusal(folder: Path, *arguments: str) -> str:
    """The one line that a refused command prints."""
    result = run(folder, *arguments)
    assert result.returncode == 2
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    return result.stderr


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small data set of maze, recorded by the real command."""
    folder = tmp_path_factory.mktemp("recorded") / "data"
    result = run(folder, "--env", "maze", *SMALL, "--workers", "2")
    assert result.returncode == 0, result.stderr
    assert "train: 300 frames" in result.stdout
    assert "mean return 10.00 ± 0.00" in result.stdout
    return folder


def test_plan_covers_all_frames_with_seeds_of_their_own() -> None:
    chunks = plan_chunks(Arguments(env="maze", frames=70_000, test_frames=4_097, workers=1))
    assert [(chunk.name, chunk.frames) for chunk in chunks] == [
        ("train/0.npz", 32_768),
        ("train/1.npz", 32_768),
        ("train/2.npz", 4_464),
        ("test/0.npz", 4_096),
        ("test/1.npz", 3),
    ]
    others = plan_chunks(Arguments(env="maze", frames=70_000, test_frames=4_097, workers=1, seed=1))
    seeds = {chunk.simulator_seed for chunk in (*chunks, *others, Chunk("bigfish", 0, "train", 0, 9))}
    assert len(seeds) == 11


@pytest.mark.parametrize(
    "chunk",
    [
        Chunk("maze", 3, "train", 1, 2100),
        Chunk("coinrun", 0, "test", 0, 150),
        Chunk("jumper", 0, "test", 0, 150, noise=0.3, visuals="plain"),
        Chunk("leaper", 0, "test", 0, 300),
        Chunk("ninja", 0, "test", 0, 150),
    ],
)
def test_recorded_actions_lead_to_the_recorded_frames(chunk: Chunk) -> None:
    arrays = play_chunk(chunk)
    assert all(len(array) == chunk.frames for array in arrays.values())
    env = chunk.make_env()
    start, number = TRAIN_LEVELS if chunk.split == "train" else HELD_OUT_LEVELS
    steps = -(-chunk.frames // chunk.num_envs)
    played = {key: array.reshape(chunk.num_envs, steps, *array.shape[1:]) for key, array in arrays.items()}
    returns = np.zeros(chunk.num_envs)
    obs = env.observe()
    for t in range(steps):
        seeds = env.level_seeds()
        assert ((start <= seeds) & (seeds < start + number)).all()
        np.testing.assert_array_equal(played["obs"][:, t], obs)
        obs, rewards, dones = env.step(played["ta"][:, t])
        np.testing.assert_array_equal(played["rewards"][:, t], rewards)
        # Where the recording stops there is a cut too.
        np.testing.assert_array_equal(played["done"][:, t], dones | (t == steps - 1))
        returns += rewards
        np.testing.assert_array_equal(played["ep_returns"][:, t], np.where(dones, returns, 0))
        returns[dones] = 0
    assert played["ep_returns"].max() > 0


def test_values_are_the_discounted_rewards_to_come() -> None:
    arrays = play_chunk(Chunk("maze", 0, "train", 0, 300))
    value = 0.0
    for t in reversed(range(300)):
        value = arrays["rewards"][t] + (0.0 if arrays["done"][t] else 0.999 * value)
        assert arrays["values"][t] == pytest.approx(value)


def test_format_is_the_published_one(recorded: Path) -> None:
    assert sorted(contents(recorded / "maze")) == [
        "dataset.json",
        "test/0.npz",
        "test/1.npz",
        "train/0.npz",
    ]
    with np.load(recorded / "maze/test/0.npz", allow_pickle=False) as chunk:
        found = {key: (chunk[key].shape, chunk[key].dtype) for key in chunk.files}
    floats = dict.fromkeys(("rewards", "ep_returns", "values", "logprobs"), ((4096,), np.float32))
    assert found == floats | {
        "obs": ((4096, 64, 64, 3), np.uint8),
        "ta": ((4096,), np.int64),
        "done": ((4096,), bool),
    }
    assert [read_header(path) for path in find_chunks(recorded / "maze/test")] == [4096, 4]


def test_record_says_how_the_data_were_made(recorded: Path) -> None:
    record = json.loads((recorded / "maze/dataset.json").read_text())
    assert (record["game"], record["expert"], record["seed"]) == ("maze", "MazeExpert", 0)
    assert record["levels"] == {"train": list(TRAIN_LEVELS), "test": list(HELD_OUT_LEVELS)}
    assert record["test"]["frames"] == 4100
    assert record["test"]["mean_return"] == 10.0
    returns = np.concatenate([np.load(path)["ep_returns"] for path in find_chunks(recorded / "maze/test")])
    assert record["test"]["episodes"] == np.count_nonzero(returns)
    assert record["versions"]["procgen"]


def test_rerun_makes_what_is_missing_and_keeps_the_rest(recorded: Path, tmp_path: Path) -> None:
    expected = contents(recorded)
    folder = tmp_path / "data"
    shutil.copytree(recorded, folder)
    (folder / "maze/test/0.npz").unlink()
    kept = (folder / "maze/train/0.npz").stat().st_mtime_ns
    result = run(folder, "--env", "maze", *SMALL, "--workers", "1")
    assert result.returncode == 0, result.stderr
    assert "2 of 3 chunks are there" in result.stdout
    assert (folder / "maze/train/0.npz").stat().st_mtime_ns == kept
    assert contents(folder) == expected
    result = run(folder, "--env", "maze", *SMALL)
    assert "3 of 3 chunks are there" in result.stdout


def start_until_first_chunk(folder: Path) -> subprocess.Popen[str]:
    process = start(folder, "--env", "maze", *SMALL, "--workers", "1")
    while not (folder / "maze/train/0.npz").exists():
        assert process.poll() is None
        time.sleep(0.01)
    return process


def test_killed_recording_is_completed_byte_for_byte(recorded: Path, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    process = start_until_first_chunk(folder)
    process.kill()
    process.communicate(timeout=30)  # returns once the worker too has closed its end
    result = run(folder, "--env", "maze", *SMALL, "--workers", "2")
    assert result.returncode == 0, result.stderr
    assert contents(folder) == contents(recorded)


def test_ctrl_c_stops_with_one_line_and_keeps_finished_chunks(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    process = start_until_first_chunk(folder)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 130
    assert stderr.splitlines()[-1] == "interrupted; the same command continues"
    assert "Traceback" not in stderr
    assert sorted(contents(folder)) == ["maze/dataset.json", "maze/train/0.npz"]


def test_more_frames_are_added_to_what_is_there(recorded: Path) -> None:
    dataset = Dataset(recorded / "maze", "maze", 0)
    plan = plan_chunks(Arguments(env="maze", frames=300, test_frames=4100, workers=1))
    assert dataset.unfinished(plan) == []
    more = Chunk("maze", 0, "train", 1, 32_768)
    assert dataset.unfinished([*plan, more]) == [more]


def test_equal_arrays_give_equal_files(tmp_path: Path) -> None:
    arrays = {"obs": np.arange(100_000).reshape(10, -1), "done": np.ones(10, bool)}
    for name in ("a.npz", "b.npz"):
        write_chunk(tmp_path / name, arrays)
        time.sleep(0.01)
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    with np.load(tmp_path / "a.npz") as read:
        assert all(np.array_equal(read[key], arrays[key]) for key in arrays)


def test_failed_write_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "0.npz"
    path.write_bytes(b"before")
    with contextlib.suppress(ValueError):
        write_chunk(path, {"obs": np.array([object()])})
    assert contents(tmp_path) == {"0.npz": b"before"}


def test_a_chunk_that_the_disk_refuses_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "0.npz"
    path.write_bytes(b"before")
    noise = np.random.default_rng(0).integers(256, size=100_000, dtype=np.uint8)
    with largest_file(50_000), pytest.raises(UserError, match=r"cannot write .*0\.npz .*File too large"):
        write_chunk(path, {"obs": noise})
    assert contents(tmp_path) == {"0.npz": b"before"}


def test_a_recording_on_a_full_disk_is_completed_once_there_is_room(recorded: Path, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    size = (recorded / "maze/test/0.npz").stat().st_size
    with largest_file(size // 2):
        result = run(folder, "--env", "maze", *SMALL, "--workers", "1")
    assert result.returncode == 2
    last = result.stderr.splitlines()[-1]
    assert last.startswith(f"error: cannot write {folder / 'maze/test/0.npz'} (")
    assert "Traceback" not in result.stderr
    assert sorted(contents(folder)) == ["maze/dataset.json", "maze/train/0.npz"]
    result = run(folder, "--env", "maze", *SMALL, "--workers", "1")
    assert result.returncode == 0, result.stderr
    assert contents(folder) == contents(recorded)


def test_other_data_are_never_overwritten(recorded: Path, tmp_path: Path) -> None:
    before = contents(recorded)
    assert "recorded with seed 0, not 1" in refusal(recorded, "--env", "maze", *SMALL, "--seed", "1")
    assert "visuals full, not plain" in refusal(recorded, "--env", "maze", *SMALL, "--visuals", "plain")
    assert "has 300 frames where 400" in refusal(
        recorded, "--env", "maze", "--frames", "400", "--test-frames", "4100"
    )
    assert contents(recorded) == before

    foreign = tmp_path / "data"
    (foreign / "maze/train").mkdir(parents=True)
    (foreign / "maze/train/0.npz").write_bytes(b"downloaded")
    assert "not recorded here" in refusal(foreign, "--env", "maze", *SMALL)
    assert contents(foreign) == {"maze/train/0.npz": b"downloaded"}


def test_data_of_another_expert_are_complete_but_not_continued(recorded: Path, tmp_path: Path) -> None:
    shutil.copytree(recorded, tmp_path, dirs_exist_ok=True)
    file = tmp_path / "maze/dataset.json"
    record = json.loads(file.read_text())
    record["versions"]["experts"] = "older"
    file.write_text(json.dumps(record))
    dataset = Dataset(tmp_path / "maze", "maze", 0)
    plan = plan_chunks(Arguments(env="maze", frames=300, test_frames=4100, workers=1))
    assert dataset.unfinished(plan) == []
    with pytest.raises(UserError, match="another version"):
        dataset.unfinished([*plan, Chunk("maze", 0, "train", 1, 32_768)])


def test_data_from_before_noise_and_visuals_are_continued(recorded: Path, tmp_path: Path) -> None:
    shutil.copytree(recorded, tmp_path, dirs_exist_ok=True)
    file = tmp_path / "maze/dataset.json"
    record = json.loads(file.read_text())
    del record["noise"], record["visuals"]
    file.write_text(json.dumps(record))
    assert Dataset(tmp_path / "maze", "maze", 0).chunks == record["chunks"]
    with pytest.raises(UserError, match=r"noise 0.0, not 0.2"):
        Dataset(tmp_path / "maze", "maze", 0, noise=0.2)


def test_mistakes_on_the_command_line(tmp_path: Path) -> None:
    assert ", ".join(GAMES) in refusal(tmp_path, "--env", "pong")
    assert "--frames is 2" in refusal(tmp_path, "--env", "maze", "--frames", "2")
    assert "--workers is 0" in refusal(tmp_path, "--env", "maze", "--workers", "0")
    assert "--seed is -1" in refusal(tmp_path, "--env", "maze", "--seed", "-1")
    (tmp_path / "maze").write_text("a file where the folder should be")
    assert "cannot write to" in refusal(tmp_path, "--env", "maze", *SMALL)
    (tmp_path / "bigfish").mkdir()
    (tmp_path / "bigfish/dataset.json").write_text("{")
    assert "is damaged" in refusal(tmp_path, "--env", "bigfish", *SMALL)
