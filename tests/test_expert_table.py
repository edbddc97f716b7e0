"""expert_table.py: results of evaluate.py, kept and shown."""

import json
import shutil
from functools import partial
from pathlib import Path

import pytest

from lapo import expert_table, stage3_decode
from lapo.experts.registry import expert_name
from lapo.games.table import GAMES
from lapo.runs.checkpoints import load_checkpoint

RESULT = {
    "game": "maze",
    "policy": "planner",
    "checkpoint": None,
    "seed": 0,
    "greedy": False,
    "episodes": 128,
    "return_mean": 9.5,
    "return_stderr": 0.25,
    "relative_return": 0.917,
    "mean_length": 20.0,
    "steps_per_cpu_second": 1234.5,
}


@pytest.fixture
def call(tmp_path, call_main):
    """Runs expert_table.py on a file of its own; gives exit status, stdout and stderr."""
    return partial(call_main, expert_table.main, "--file", str(tmp_path / "kept.json"))


def write(path: Path, **changes: object) -> str:
    path.write_text(json.dumps(RESULT | changes))
    return str(path)


def line(table: str, game: str) -> list[str]:
    (found,) = (line for line in table.splitlines() if line.startswith(f"| {game} "))
    return [cell.strip() for cell in found.strip("|").split("|")]


def test_results_are_kept_game_by_game(call, tmp_path):
    expert = write(tmp_path / "a.json")
    random = write(tmp_path / "b.json", policy="random", return_mean=4.5)
    learned = write(tmp_path / "c.json", policy="scratch", checkpoint="some.pt", return_mean=9.0)
    other = write(tmp_path / "d.json", game="bigfish", return_mean=30.0)
    assert call("--add", expert, random)[0] == 0
    assert call("--add", learned, other)[0] == 0
    status, out, _ = call()
    assert status == 0
    assert [row.split("|")[1].strip() for row in out.splitlines()[2:]] == list(GAMES)
    assert line(out, "maze")[1:] == ["4.50 ± 0.25", "9.50 ± 0.25", "9.00 ± 0.25", "10.0", "0.92", "1,234"]
    assert line(out, "bigfish")[2] == "30.00 ± 0.25"
    assert line(out, "heist")[1:] == ["", "", "", "9.7", "", ""]


def test_single_episode_has_no_standard_error(call, tmp_path):
    _, out, _ = call("--add", write(tmp_path / "a.json", return_stderr=None))
    assert line(out, "maze")[2] == "9.50"


def test_newer_result_replaces_the_older(call, tmp_path):
    call("--add", write(tmp_path / "a.json"))
    _, out, _ = call("--add", write(tmp_path / "a.json", return_mean=9.75))
    assert line(out, "maze")[2] == "9.75 ± 0.25"


@pytest.mark.parametrize("content", ["", "[1]", '{"policy": "planner"}'])
def test_what_is_no_result_changes_nothing(call, tmp_path, content):
    call("--add", write(tmp_path / "a.json"))
    before = (tmp_path / "kept.json").read_bytes()
    (tmp_path / "b.json").write_text(content)
    status, out, err = call("--add", str(tmp_path / "a.json"), str(tmp_path / "b.json"))
    assert (status, out, len(err.splitlines())) == (2, "", 1)
    assert str(tmp_path / "b.json") in err
    assert (tmp_path / "kept.json").read_bytes() == before


def test_clones_stand_beside_the_expert_whose_frames_they_saw(call, workplace, tmp_path):
    cfg = workplace.config("--stage3.mode", "bc")
    record = {"train": {"frames": 80}, "expert": expert_name(workplace.GAME)}
    file = cfg.game_data / "dataset.json"
    file.write_text(json.dumps(record))
    stage3_decode.train(cfg)
    folder = str(workplace.run_dir("stage3_bc"))
    game = workplace.GAME
    for policy, mean in (("random", 1.0), ("planner", 3.0), ("scratch", 5.0)):
        assert call("--add", write(tmp_path / "a.json", game=game, policy=policy, return_mean=mean))[0] == 0
    assert call("--add-clones", folder)[0] == 0
    file.write_text(json.dumps(record | {"policy": {}}))
    status, out, _ = call("--add-clones", folder)
    assert status == 0
    metrics = load_checkpoint(workplace.run_dir("stage3_bc") / "checkpoint.pt")["metrics"]
    clone = metrics["return_mean"]
    rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in out.splitlines()[-2:]]
    for other in (
        {"source": "huggingface", "expert": "PPO", "train": {"frames": 80}},
        {"train": {"frames": 8}},
    ):
        file.write_text(json.dumps(other))
        status, _, err = call("--add-clones", folder)
        assert (status, "was not recorded by record_expert.py" in err) == (2, True)
    for row, (expert, mean) in zip(rows, (("planner", 3.0), ("learned", 5.0)), strict=True):
        assert row[:3] == [game, expert, f"{mean:.2f} ± 0.25"]
        assert row[3].startswith(f"{clone:.2f}")
        assert row[4] == f"{(clone - 1) / (mean - 1):.2f}"
        assert row[5] == f"{metrics['action_acc_test']:.0%}"
        assert row[6] == f"{metrics['majority_acc_test']:.0%}"


def test_what_is_no_clone_is_refused(call, workplace):
    stage3_decode.train(workplace.config("--stage3.mode", "bc"))
    status, _, err = call("--add-clones", str(workplace.run_dir("stage3_bc")))
    assert (status, "dataset.json cannot be read" in err) == (2, True)
    cfg = workplace.config("--stage3.mode", "bc", "--exp", "bare")
    shutil.rmtree(cfg.game_data / "test")
    stage3_decode.train(cfg)
    record = {"train": {"frames": 80}, "expert": expert_name(workplace.GAME)}
    (cfg.game_data / "dataset.json").write_text(json.dumps(record))
    status, _, err = call("--add-clones", str(workplace.run_dir("stage3_bc", "bare")))
    assert (status, "has no accuracy on held-out frames" in err) == (2, True)
    stage3_decode.train(workplace.config("--stage3.mode", "scratch"))
    status, _, err = call("--add-clones", str(workplace.run_dir("stage3_scratch")))
    assert (status, "is no finished stage 3 in mode bc" in err) == (2, True)
