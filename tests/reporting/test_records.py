"""Tables and figures of runs whose checkpoints are elsewhere."""

import json
import math
import shutil
from pathlib import Path

import pytest

from lapo import results
from lapo.reporting import records
from lapo.runs.checkpoints import load_checkpoint, weights_checksum
from lapo.runs.files import write_json
from many_runs import learned, missing, row


@pytest.fixture
def recorded(runs) -> Path:
    """Two games with and without sweeps, as results.json has them, the checkpoints of which are gone."""
    sweep = [{"labels": 64, "draw": draw, "return_mean": 1.0 + draw} for draw in (0, 1)]
    lines = [(2000, {"train_return": 3.0, "loss": 1.0, "eval_return_mean": 8.0})]
    for game in ("heist", "maze"):
        runs.write("a", game, 0, "stage1", learned(0.25, 0.5), options=["--stage1.lr", "0.125"])
        runs.write("a", game, 0, "stage2", {})
        runs.policy("a", game, 0, "offline", 5.0, sweep=sweep, stderr=math.nan)
        runs.policy("a", game, 0, "online", 7.0, lines=lines, options=["--ppo.gamma", "0.5"])
    runs.write("a", "maze", 0, "stage3_no_sl", {"return_mean": 5.0}, built_on={"stage1": "another"})
    path = runs.folder / "results.json"
    write_json(path, runs.compare("--exp", "a"))
    return path


def test_results_can_be_made_again_without_checkpoints(runs, recorded):
    before, text = runs.compare("--exp", "a"), runs.text
    held = json.loads(recorded.read_text(), parse_constant=pytest.fail)  # NaN is no JSON
    assert "results_dir" not in json.dumps(held["runs"])
    shutil.rmtree(runs.folder / "a")
    after = runs.compare("--exp", "a", "--with", str(recorded))
    assert after.keys() == before.keys()
    for key in before.keys() - {"missing"}:
        assert after[key] == before[key], key
    assert after["stage1"][0]["means"]["error"] == 0.5
    assert runs.text.partition("## What is missing")[0] == text.partition("## What is missing")[0]


def test_recorded_runs_and_those_on_disk_are_one_grid(runs, recorded):
    shutil.rmtree(runs.folder / "a")
    runs.stages("a", "maze", 1, "--stage1.lr", "0.125")
    runs.policy("a", "maze", 1, "online", 9.0, options=["--ppo.gamma", "0.5"])
    runs.write("a", "maze", 0, "stage3_offline")  # trained again here, not to the end
    runs.policy("a", "heist", 0, "offline", 2.0)  # finished here: this counts
    found = runs.compare("--exp", "a", "--with", str(recorded), "--modes", "online,offline")
    assert row(found, game="maze", mode="online")["returns"] == [7, 9]
    assert row(found, game="maze", labels=64)["return_mean"] == 1.5
    assert row(found, game="heist", mode="offline")["return_mean"] == 2
    assert missing(found) == {
        ("maze", 1, "stage3_offline"): "missing",
        **{
            ("heist", 1, stage): "missing"
            for stage in ("stage1", "stage2", "stage3_offline", "stage3_online")
        },
    }


def test_runs_from_a_file_and_from_folders_are_recorded_in_one_order(runs, recorded, call_main):
    shutil.rmtree(runs.folder / "a")
    for mode in ("bc", "scratch"):
        runs.policy("a", "maze", 0, mode, 2.0)
    path, here = runs.folder / "a" / "results.json", ["--exp", "a", "--results_dir", str(runs.folder)]
    assert call_main(results.main, *here, "--with", str(recorded))[0] == 0
    before = path.read_bytes()
    shutil.rmtree(runs.folder / "a" / "maze")
    assert call_main(results.main, *here, "--with", str(path))[0] == 0
    assert path.read_bytes() == before


def test_unfinished_runs_are_not_recorded(runs):
    runs.policy("a", "maze", 0, "scratch", 5.0)
    runs.write("a", "maze", 1, "stage3_scratch", lines=[(1000, {"train_return": 4.0})])
    assert [policy["seed"] for policy in runs.compare("--exp", "a")["runs"]["policies"]] == [0]


def test_a_run_that_was_not_evaluated_replaces_no_record(runs, recorded):
    (runs.folder / "a" / "maze" / "seed0" / "stage3_online" / "checkpoint.pt").unlink()
    runs.write("a", "maze", 0, "stage3_online", {})
    assert row(runs.compare("--exp", "a", "--with", str(recorded)), game="maze", mode="online")["seeds"] == [
        0
    ]


def test_writing_results_loses_no_run_that_they_hold(runs, recorded, call_main):
    """Of a checkpoint that has been deleted, a mode that is left out, another experiment."""
    path, here = runs.folder / "a" / "results.json", ["--results_dir", str(runs.folder)]
    shutil.copy(recorded, path)
    places = [
        ("heist", "offline"),
        ("heist", "online"),
        ("maze", "no_sl"),
        ("maze", "offline"),
        ("maze", "online"),
    ]
    shutil.rmtree(runs.folder / "a" / "heist")
    runs.policy("a", "maze", 0, "no_sl", 9.0)
    status, _, err = call_main(results.main, "--exp", "a", "--modes", "no_sl", *here)
    assert status == 0, err
    found = json.loads(path.read_text())
    assert [row["return_mean"] for row in found["rows"]] == [9.0]
    policies = found["runs"]["policies"]
    assert sorted((policy["game"], policy["mode"]) for policy in policies) == places
    assert {policy["run"]["metrics"]["return_mean"] for policy in policies if policy["mode"] == "no_sl"} == {
        9.0
    }
    assert (
        row(runs.compare("--exp", "a", "--with", str(path)), game="heist", mode="online")["return_mean"] == 7
    )


def test_runs_that_cannot_be_read_are_not_overwritten(runs, recorded, call_main):
    """As those of a mode that a fork has added."""
    path = runs.folder / "a" / "results.json"
    text = recorded.read_text().replace('"mode": "online"', '"mode": "mine"')
    path.write_text(text)
    status, _, err = call_main(results.main, "--exp", "a", "--results_dir", str(runs.folder))
    assert status == 2
    assert f"{path} holds runs that this version of lapo cannot read; move it, or" in err
    assert path.read_text() == text
    for harmless in ('{"rows": []}', "cut sho"):
        path.write_text(harmless)
        assert call_main(results.main, "--exp", "a", "--results_dir", str(runs.folder))[0] == 0


def test_stages_that_have_gone_are_those_of_the_record(runs):
    """While their policy is still there: its settings and the time of its stages are in the file."""
    for name, lr in (("stage1", "0.125"), ("stage2", "0.25")):
        runs.write("a", "maze", 0, name, {}, options=[f"--{name}.lr", lr], took=50)
    stage1 = load_checkpoint(runs.folder / "a" / "maze" / "seed0" / "stage1" / "checkpoint.pt")
    built_on = {"stage1": weights_checksum(stage1)}
    runs.write("a", "maze", 0, "stage3_offline", {"return_mean": 5.0}, built_on=built_on)
    path = runs.folder / "results.json"
    before = runs.compare("--exp", "a")
    write_json(path, before)
    shutil.rmtree(runs.folder / "a" / "maze" / "seed0" / "stage1")
    after = runs.compare("--exp", "a", "--with", str(path))
    assert after["rows"] == before["rows"]
    assert row(after, mode="offline")["seconds_before_stage_3"] == 100
    assert after["commands"] == before["commands"]


def test_a_file_is_also_found_from_the_repository(runs, recorded, monkeypatch, tmp_path_factory):
    monkeypatch.setattr(records, "resolve", lambda path: runs.folder / path)
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    shutil.rmtree(runs.folder / "a")
    assert runs.compare("--exp", "a", "--with", recorded.name)["rows"]


def test_records_of_other_experiments_are_left_out(runs, recorded, capsys):
    runs.policy("b", "maze", 0, "bc", 5.0)
    found = runs.compare("--exp", "b", "--with", str(recorded))
    assert [row["experiments"] for row in found["rows"]] == [["b"]]
    assert "--with: left out are the runs of a; add them with --exp" in capsys.readouterr().out


@pytest.mark.parametrize(
    "text", [None, "", "[]", '{"rows": []}', '{"runs": {"config": {}, "policies": [{}]}}']
)
def test_a_file_without_runs_is_refused(runs, tmp_path, call_main, text):
    runs.policy("a", "maze", 0, "bc", 5.0)
    path = tmp_path / "other.json"
    if text is not None:
        path.write_text(text)
    words = ["--exp", "a", "--results_dir", str(runs.folder), "--with", str(path)]
    status, _, err = call_main(results.main, *words)
    assert status == 2
    assert f"--with {path}: " in err
    assert "results.json" in err
