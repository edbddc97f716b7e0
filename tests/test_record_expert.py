import argparse
import contextlib
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from lapo import record_expert
from lapo.data.checks import check_frames
from lapo.data.chunks import find_chunks, read_header, write_chunk
from lapo.errors import UserError
from lapo.experts.learned import make_player
from lapo.experts.recording import Chunk, Dataset, PolicyFile, play_chunk
from lapo.games.table import ACTIONS, GAMES
from lapo.games.vec_env import HELD_OUT_LEVELS, TRAIN_LEVELS
from lapo.models import make_acting_policy
from lapo.policies import load_policy_checkpoint
from lapo.record_expert import find_policy, parse, plan_chunks
from lapo.runs.compute import Compute
from lapo.runs.files import lock
from lapo.runs.run import Run
from support import INTERRUPTIONS, LAPO, PATIENCE, ROOT, Workplace, largest_file

SMALL = ("--frames", "300", "--test-frames", "4100")  # three chunks, of 300, 4,096 and 4 frames


def arguments(env: str, **options: object) -> argparse.Namespace:
    """The command line with these options."""
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    return parse(["--env", env, *words])


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
    stdout, stderr = process.communicate(timeout=PATIENCE)
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
    chunks = plan_chunks(arguments(env="maze", frames=70_000, test_frames=4_097, workers=1))
    assert [(chunk.name, chunk.frames) for chunk in chunks] == [
        ("train/0.npz", 32_768),
        ("train/1.npz", 32_768),
        ("train/2.npz", 4_464),
        ("test/0.npz", 4_096),
        ("test/1.npz", 3),
    ]
    others = plan_chunks(arguments(env="maze", frames=70_000, test_frames=4_097, workers=1, seed=1))
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
    check_replay(chunk, play_chunk(chunk))


def check_replay(chunk: Chunk, arrays: dict[str, np.ndarray]) -> None:
    """The actions recorded lead to the frames, rewards and ends recorded."""
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
    if chunk.policy is None:
        assert played["ep_returns"].max() > 0


def test_returns_are_counted_of_episodes_in_the_chunk_alone() -> None:
    """Of the last of 16 environments, 15 steps are cut off."""
    counted: list[float] = []
    arrays = play_chunk(Chunk("maze", 0, "train", 0, 16 * 1024 + 1), counted.extend)
    assert len(counted) == np.count_nonzero(arrays["ep_returns"])
    assert sum(counted) == arrays["ep_returns"].sum()


def test_values_are_the_discounted_rewards_to_come() -> None:
    arrays = play_chunk(Chunk("maze", 0, "train", 0, 300))
    value = 0.0
    for t in reversed(range(300)):
        value = arrays["rewards"][t] + (0.0 if arrays["done"][t] else 0.999 * value)
        assert arrays["values"][t] == pytest.approx(value)


def test_planners_are_certain_of_their_actions_unless_noise_explores() -> None:
    assert not play_chunk(Chunk("maze", 0, "train", 0, 100))["logprobs"].any()
    logprobs = play_chunk(Chunk("maze", 0, "train", 0, 400, noise=0.4))["logprobs"]
    assert logprobs.dtype == np.float32
    # Of four random actions, one is the planner's own.
    own, other = (np.isclose(logprobs, np.log(value), atol=1e-6) for value in (0.6 + 0.1, 0.1))
    assert (own | other).all()
    assert other.mean() == pytest.approx(0.3, abs=0.1)


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


@pytest.mark.parametrize("number", range(INTERRUPTIONS // 5))
def test_a_recording_stopped_at_random_moments_is_completed_byte_for_byte(
    recorded: Path, tmp_path: Path, number: int
) -> None:
    """Killed five times: soon after the start, while each of two chunks is written, and soon after that."""
    folder = tmp_path / "data"
    draw, killed = random.Random(number), []
    for name in ("dataset.json", "train/0.npz.part", "train/0.npz", "test/0.npz.part", "test/0.npz"):
        process = start(folder, "--env", "maze", *SMALL, "--workers", "1")
        while process.poll() is None and not (folder / "maze" / name).exists():
            time.sleep(0.001)
        if not name.endswith(".part"):
            time.sleep(draw.uniform(0, 0.5))
        process.kill()
        process.communicate(timeout=PATIENCE)  # returns once the worker too has closed its end
        killed.append(process.returncode == -signal.SIGKILL)
    assert any(killed)  # on a busy machine, one or the other may have finished before
    result = run(folder, "--env", "maze", *SMALL, "--workers", "2")
    assert result.returncode == 0, result.stderr
    (folder / "maze" / "lock").unlink(missing_ok=True)  # of one that was killed after the last chunk
    assert contents(folder) == contents(recorded)


@pytest.mark.slow
def test_ctrl_c_stops_with_one_line_and_keeps_finished_chunks(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    process = start_until_first_chunk(folder)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130
    assert stderr.splitlines()[-1] == "interrupted; the same command continues"
    assert "Traceback" not in stderr
    assert sorted(contents(folder)) == ["maze/dataset.json", "maze/train/0.npz"]


def test_more_frames_are_added_to_what_is_there(recorded: Path) -> None:
    dataset = Dataset(recorded / "maze", "maze", 0)
    plan = plan_chunks(arguments(env="maze", frames=300, test_frames=4100, workers=1))
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
    # The worker may have begun the next chunk before it is told to stop.
    assert contents(folder).keys() - {"maze/test/1.npz"} == {"maze/dataset.json", "maze/train/0.npz"}
    result = run(folder, "--env", "maze", *SMALL, "--workers", "1")
    assert result.returncode == 0, result.stderr
    assert contents(folder) == contents(recorded)


def test_a_relative_folder_is_that_of_the_config(tmp_path: Path, monkeypatch, call_main) -> None:
    """From wherever the script is called; chunks that lie there tell that it is the folder."""
    chunk = tmp_path / "repository" / "frames" / "maze" / "train" / "0.npz"
    chunk.parent.mkdir(parents=True)
    chunk.touch()
    monkeypatch.setattr(record_expert, "resolve", lambda path: tmp_path / "repository" / path)
    monkeypatch.chdir(tmp_path)
    status, _, err = call_main(
        record_expert.main, "--env", "maze", "--expert", "planner", "--data-dir", "frames"
    )
    assert status == 2
    assert f"{chunk.parents[1]} holds chunks that were not recorded here" in err


def test_other_data_are_never_overwritten(recorded: Path, tmp_path: Path) -> None:
    before = contents(recorded)
    assert "recorded with seed 0, not 1" in refusal(recorded, "--env", "maze", *SMALL, "--seed", "1")
    assert "visuals full, not plain" in refusal(
        recorded, "--env", "maze", *SMALL, "--visuals", "plain", "--expert", "planner"
    )
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
    plan = plan_chunks(arguments(env="maze", frames=300, test_frames=4100, workers=1))
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


def test_a_record_that_may_not_be_read_is_not_called_damaged(recorded: Path, monkeypatch) -> None:
    monkeypatch.setattr(Path, "read_text", Mock(side_effect=PermissionError(13, "Permission denied")))
    with pytest.raises(UserError, match=r"dataset\.json could not be read \(Permission denied\)"):
        Dataset(recorded / "maze", "maze", 0)
    with pytest.raises(UserError, match=r"dataset\.json could not be read \(Permission denied\)"):
        check_frames("maze", recorded / "maze", "full")


@pytest.mark.slow
def test_mistakes_on_the_command_line(tmp_path: Path) -> None:
    assert ", ".join(GAMES) in refusal(tmp_path, "--env", "pong")
    assert "absent.pt does not exist" in refusal(tmp_path, "--env", "maze", "--expert", "absent.pt")
    assert "--frames is 2" in refusal(tmp_path, "--env", "maze", "--frames", "2")
    assert "--workers is 0" in refusal(tmp_path, "--env", "maze", "--workers", "0")
    assert "--seed is -1" in refusal(tmp_path, "--env", "maze", "--seed", "-1")
    (tmp_path / "maze").write_text("a file where the folder should be")
    assert "cannot write to" in refusal(tmp_path, "--env", "maze", *SMALL)
    (tmp_path / "bigfish").mkdir()
    (tmp_path / "bigfish/dataset.json").write_text("{")
    assert "is damaged" in refusal(tmp_path, "--env", "bigfish", *SMALL)


# ------------------------------------------------------------------------------------ learned experts


def make_policy(folder: Path, *arguments: str) -> Path:
    """The checkpoint of a policy of stage 3, mode bc, for maze; it has learnt nothing."""
    workplace = Workplace(folder)
    cfg = workplace.config("--env", "maze", "--stage3.mode", "bc", *arguments)
    torch.manual_seed(cfg.seed)
    run = Run(cfg, "stage3_bc", (), Compute(torch.device("cpu"), bf16=False, compile=False))
    run.finish(
        {"policy": make_acting_policy(cfg, "bc", len(ACTIONS)).state_dict()},
        {"return_mean": 4.5, "episodes": 2},
    )
    return run.checkpoint_path


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> PolicyFile:
    """A learned expert for maze."""
    path = make_policy(tmp_path_factory.mktemp("policy"))
    return find_policy(arguments(env="maze", expert=str(path)))


def test_a_policy_is_recorded_with_the_probabilities_of_its_actions(policy: PolicyFile) -> None:
    noise = 0.4
    chunk = Chunk("maze", 0, "train", 0, 200, noise, policy=policy)
    arrays = play_chunk(chunk)
    check_replay(chunk, arrays)
    checkpoint = load_policy_checkpoint(policy.path)
    network = make_acting_policy(Workplace(policy.path.parents[5]).config(), "bc", len(ACTIONS))
    network.load_state_dict(checkpoint["state"]["policy"])
    with torch.no_grad():
        probs = network.logits(torch.from_numpy(arrays["obs"])).softmax(-1).numpy()
    chosen = (1 - noise) * probs[np.arange(200), arrays["ta"]] + noise / 15
    np.testing.assert_allclose(arrays["logprobs"], np.log(chosen), atol=1e-5)
    # Drawn as likely as that says: the counts differ from their expectation by four standard errors at most.
    expected = ((1 - noise) * probs + noise / 15).sum(0)
    counts = np.bincount(arrays["ta"], minlength=15)
    assert (np.abs(counts - expected) < 4 * np.sqrt(expected)).all()


def test_an_interrupted_recording_of_a_policy_is_completed_byte_for_byte(
    policy: PolicyFile, tmp_path: Path
) -> None:
    """The first chunk is of this process, the other one of a worker, and equal to one made here."""
    folder = tmp_path / "data"
    options = {"env": "maze", "frames": 300, "test_frames": 100, "workers": 1}
    chunks = plan_chunks(arguments(**options), policy)
    dataset = Dataset(folder / "maze", "maze", 0, policy=policy)
    for split in ("train", "test"):
        (folder / "maze" / split).mkdir(parents=True)
    arrays = {chunk.name: play_chunk(chunk) for chunk in chunks}
    for chunk in chunks:
        write_chunk(dataset.folder / chunk.name, arrays[chunk.name])
        returns = arrays[chunk.name]["ep_returns"]
        dataset.add(chunk, returns[arrays[chunk.name]["done"] & (returns > 0)])
    expected = contents(folder)
    (folder / "maze/test/0.npz").unlink()
    command = ["--env", "maze", "--frames", "300", "--test-frames", "100", "--workers", "1"]
    result = run(folder, *command, "--expert", str(policy.path))
    assert result.returncode == 0, result.stderr
    assert f"recording {policy}, 1 of 2 chunks are there already" in result.stdout
    found = contents(folder)
    assert found.keys() == expected.keys()
    assert all(found[name] == expected[name] for name in found if name.endswith(".npz"))

    record = json.loads((folder / "maze/dataset.json").read_text())
    assert record["expert"] == f"checkpoint.pt, sha256 {policy.fingerprint[:12]}"
    assert record["policy"] == json.loads(json.dumps(policy.description))
    assert record["policy"]["made"]["method"] == "stage 3, mode bc"
    assert record["policy"]["return_mean"] == 4.5
    assert record["versions"].keys() == {"procgen", "torch", "models.py"}
    with pytest.raises(UserError, match=r"recorded with expert checkpoint\.pt, sha256 \w+, not MazeExpert"):
        Dataset(folder / "maze", "maze", 0)


def test_a_policy_that_changes_meanwhile_is_refused(policy: PolicyFile) -> None:
    with pytest.raises(UserError, match=r"checkpoint\.pt has changed since the recording began"):
        make_player(policy.path, "0" * 64, 0.0, 0)


def test_the_policy_must_know_the_game_and_its_looks(policy: PolicyFile, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="for game maze, not coinrun; choose --env maze or another --ex"):
        find_policy(arguments(env="coinrun", expert=str(policy.path)))
    with pytest.raises(UserError, match="for visuals full, not plain; choose --visuals full or another"):
        find_policy(arguments(env="maze", visuals="plain", expert=str(policy.path)))
    with pytest.raises(UserError, match=r"absent\.pt does not exist"):
        find_policy(arguments(env="maze", expert=str(tmp_path / "absent.pt")))
    with pytest.raises(UserError, match="is damaged, or was not written by lapo"):
        find_policy(arguments(env="maze", expert=__file__))


def test_a_shipped_policy_is_the_default_where_it_knows_the_visuals(
    policy: PolicyFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(record_expert, "SHIPPED", tmp_path)
    assert find_policy(arguments(env="maze")) is None
    shutil.copy(policy.path, tmp_path / "maze.pt")
    assert str(find_policy(arguments(env="maze"))) == f"maze.pt, sha256 {policy.fingerprint[:12]}"
    assert find_policy(arguments(env="maze", expert="planner")) is None
    assert find_policy(arguments(env="maze", visuals="plain")) is None
    assert find_policy(arguments(env="coinrun")) is None
    shutil.copy(policy.path, tmp_path / "coinrun.pt")
    with pytest.raises(UserError, match="is a policy for game maze, not coinrun"):
        find_policy(arguments(env="coinrun"))


@pytest.mark.slow
def test_one_process_records_into_a_folder_at_a_time(tmp_path: Path) -> None:
    folder = tmp_path / "maze"
    folder.mkdir()
    with lock(folder / "lock", "busy"):
        message = refusal(tmp_path, "--env", "maze", *SMALL)
        assert message.startswith(f"error: another process is recording into {folder}; wait for it")
        assert contents(folder) == {"lock": b""}
    assert run(tmp_path, "--env", "maze", *SMALL, "--workers", "1").returncode == 0
    assert "lock" not in contents(folder)


@pytest.mark.slow
def test_planners_are_recorded_without_pytorch() -> None:
    code = """if True:
        import sys
        from lapo.record_expert import *
        policy = find_policy(parse(["--env", "maze", "--expert", "planner"]))
        dataset = Dataset(Path("/nowhere"), "maze", 0, policy=policy)
        play_chunk(Chunk("maze", 0, "train", 0, 30, noise=0.5))
        sys.exit("torch" in sys.modules)
    """
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_shipped_experts_are_small_and_play_their_game_by_default():
    shipped = sorted((ROOT / "expert_data" / "experts").glob("*.pt"))
    assert {path.stem for path in shipped} >= {"maze", "leaper"}
    for path in shipped:
        assert path.stat().st_size < 1.5e6
        policy = find_policy(arguments(path.stem, visuals="plain"))
        assert (policy.path, policy.description["game"], policy.description["visuals"]) == (
            path,
            path.stem,
            "plain",
        )
        assert policy.description["finished"]
        assert find_policy(arguments(path.stem)) is None  # full visuals: the planner
        arrays = play_chunk(Chunk(path.stem, 0, "test", 0, 64, visuals="plain", policy=policy))
        assert (arrays["logprobs"] < 0).any()
