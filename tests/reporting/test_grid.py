"""What there is of experiments on disk, what is missing and what is stale."""

import shutil

from lapo.config import load_config
from lapo.reporting.commands import commands
from lapo.runs.checkpoints import load_checkpoint, weights_checksum
from many_runs import missing, row


def test_what_stage_1_was_trained_with_counts_not_what_stage_3_was_called_with(runs):
    """Stage 3 alone was started with the preset's defaults."""
    stage1 = ["--model.wm_width", "12", "--data.train_chunks", "3", "--data_dir", "elsewhere"]
    for stage in ("stage1", "stage2"):
        runs.write("base", "maze", 0, stage, {}, options=stage1)
    for mode in ("no_sl", "offline"):
        runs.policy("a", "maze", 0, mode, 5.0, options=["--stages_from", "base"])
    found = {policy.mode: policy.settings for policy in runs.grid("a").policies}
    no_sl, offline = found["no_sl"], found["offline"]
    assert offline["model.wm_width"] == no_sl["model.wm_width"] == "12"
    assert (no_sl["data.train_chunks"], no_sl["data_dir"]) == ("3", "elsewhere")
    chunks, folder = load_config(["--preset", "demo"]).data.train_chunks, runs.folder / "no data"
    assert offline["data.train_chunks"] == f"3, labels {chunks}"
    assert offline["data_dir"] == f"elsewhere, labels {folder}"


def test_what_is_missing_is_named(runs):
    for game, seed in (("heist", 0), ("maze", 0), ("maze", 1)):
        runs.stages("a", game, seed)
        runs.policy("a", game, seed, "scratch", 5.0)
    runs.policy("a", "maze", 0, "offline", 6.0)
    runs.write("a", "maze", 1, "stage3_offline")
    (runs.folder / "a" / "maze" / "seed1" / "stage3_scratch" / "checkpoint.pt").write_bytes(b"nothing")
    found = runs.compare("--exp", "a")
    assert missing(found) == {
        ("heist", 0, "stage3_offline"): "missing",
        ("heist", 1, "stage1"): "missing",
        ("heist", 1, "stage2"): "missing",
        ("heist", 1, "stage3_scratch"): "missing",
        ("heist", 1, "stage3_offline"): "missing",
        ("maze", 1, "stage3_offline"): "unfinished",
        ("maze", 1, "stage3_scratch"): "damaged",
    }
    text = runs.text
    assert "- a: 3 of 8 policies (2 games × 2 seeds × 2 modes), **not complete**" in text
    # three draws of labels with 500 steps each
    assert "a, maze, seed 1, stage3_offline: unfinished, at step 7 of 1,500" in text
    assert "checkpoint.pt is damaged" in text


def test_a_complete_grid_lacks_nothing(runs):
    runs.stages("a", "maze", 0)
    runs.policy("a", "maze", 0, "online", 5.0)
    assert runs.compare("--exp", "a")["missing"] == []
    assert "- a: 1 of 1 policies (1 game × 1 seed × 1 mode), complete" in runs.text
    assert "## What is missing\n\nNothing." in runs.text


def test_what_was_asked_for_is_expected(runs):
    runs.policy("a", "maze", 0, "bc", 5.0)
    runs.policy("a", "maze", 0, "scratch", 5.0)
    found = runs.compare("--exp", "a", "--env", "maze,heist", "--seeds", "0,2", "--modes", "bc")
    assert [row["mode"] for row in found["rows"]] == ["bc"]
    assert missing(found).keys() == {
        (game, seed, "stage3_bc") for game, seed in (("maze", 2), ("heist", 0), ("heist", 2))
    }


def test_games_of_other_experiments_are_named(runs):
    runs.policy("a", "maze", 0, "bc", 5.0)
    runs.policy("b", "maze", 0, "bc", 5.0)
    runs.policy("b", "heist", 0, "bc", 5.0)
    runs.compare("--exp", "a", "b")
    assert "- a: no run of heist" in runs.text


def test_policies_of_other_stages_than_those_on_disk_are_named(runs):
    runs.stages("a", "maze", 0)
    result = {"return_mean": 5.0, "return_stderr": 0.1}
    runs.write("a", "maze", 0, "stage3_offline", result, built_on={"stage1": "another"})
    found = runs.compare("--exp", "a")
    assert missing(found) == {("maze", 0, "stage3_offline"): "stale"}
    assert "trained on another stage1 than is there now" in runs.text
    assert row(found, mode="offline")["return_mean"] == 5  # still shown
    assert found["experiments"]["a"]["finished"] == 0
    assert "0 of 1 policies (1 game × 1 seed × 1 mode), **not complete**" in runs.text


def test_stale_policies_are_no_seeds_of_the_others(runs):
    """And do not stand under the settings of stages that they were not trained on."""
    result = {"return_mean": 5.0, "return_stderr": 0.1}
    for seed, built_on in enumerate(({}, {"stage1": "another"})):
        runs.stages("a", "maze", seed, "--stage1.lr", "0.125")
        runs.write("a", "maze", seed, "stage3_offline", result, built_on=built_on)
    runs.write("a", "maze", 2, "stage3_offline", result)  # whose stages have gone
    found = runs.compare("--exp", "a")
    assert [(row["seeds"], row["values"]) for row in found["rows"]] == [
        ([0, 2], {"built on": ""}),
        ([1], {"built on": "another stage1"}),
    ]
    assert "LAPO offline, built on another stage1" in runs.text
    settings = [policy.settings.get("stage1.lr") for policy in runs.grid("a").policies]
    assert settings == ["0.125", None, None]


def test_a_stage_2_of_another_stage_1_makes_its_policies_stale(runs):
    """Mode no_sl needs stage 2 alone, but what is said of its stage 1 must be true."""
    runs.write("a", "maze", 0, "stage1", {})
    runs.write("a", "maze", 0, "stage2", {}, built_on={"stage1": "another"})
    runs.policy("a", "maze", 0, "no_sl", 5.0)
    assert missing(runs.compare("--exp", "a")) == {("maze", 0, "stage3_no_sl"): "stale"}


def test_a_policy_of_another_stage_2_has_nothing_of_the_new_stage_1(runs):
    runs.stages("a", "maze", 0, "--stage1.lr", "0.125")
    result = {"return_mean": 5.0, "return_stderr": 0.1}
    runs.write("a", "maze", 0, "stage3_no_sl", result, built_on={"stage2": "another"})
    (policy,) = runs.grid("a").policies
    assert policy.stale
    assert policy.earlier == {}
    assert not {"stage1.lr", "stage2.lr", "data_dir"} & policy.settings.keys()


def test_the_frames_that_labels_came_from_count_without_stage_1(runs):
    for seed, folder in enumerate(("X", "Y")):
        runs.policy("a", "maze", seed, "offline", 5.0, options=["--data_dir", folder])
    assert [row["values"] for row in runs.compare("--exp", "a")["rows"]] == [
        {"data_dir": "X"},
        {"data_dir": "Y"},
    ]


def test_a_policy_on_the_trunk_that_is_there_is_not_stale(runs):
    trunk = runs.write("a", "maze", 0, "ilpo_trunk", {})
    weights = weights_checksum(load_checkpoint(trunk.checkpoint_path))
    result = {"return_mean": 5.0, "return_stderr": 0.1}
    for seed, found in enumerate((weights, "another")):
        runs.write("a", "maze", seed, "ilpo_trunk", {}) if seed else None
        runs.write("a", "maze", seed, "stage3_ilpo", result, built_on={"ilpo_trunk": found})
    assert missing(runs.compare("--exp", "a")) == {("maze", 1, "stage3_ilpo"): "stale"}


def test_a_renamed_experiment_has_its_own_stages(runs):
    """Also where another one has its old name by now."""
    runs.stages("old", "maze", 0, "--stage1.lr", "0.125")
    runs.policy("old", "maze", 0, "offline", 5.0)
    (runs.folder / "old").rename(runs.folder / "new")
    runs.stages("old", "maze", 0, "--stage1.lr", "0.25")
    grid = runs.grid("new")
    assert grid.policies[0].settings["stage1.lr"] == "0.125"
    assert "--exp new" in commands(grid)[0]


def test_deleted_stages_below_a_finished_policy_are_missing(runs):
    runs.stages("a", "maze", 0)
    runs.policy("a", "maze", 0, "offline", 5.0)
    stage1 = runs.folder / "a" / "maze" / "seed0" / "stage1"
    (stage1 / "checkpoint.pt").unlink()
    assert missing(runs.compare("--exp", "a")) == {("maze", 0, "stage1"): "missing"}
    assert "a, maze, seed 0, stage1: missing: its folder has no checkpoint" in runs.text
    shutil.rmtree(stage1)
    assert missing(runs.compare("--exp", "a")) == {("maze", 0, "stage1"): "missing"}
    assert "a, maze, seed 0, stage1: missing\n" in runs.text


def test_stages_of_another_experiment_are_not_missing(runs):
    runs.stages("base", "maze", 0, "--stage1.lr", "0.125")
    runs.policy("a", "maze", 0, "offline", 5.0, options=["--stages_from", "base"])
    grid = runs.grid("a")
    assert grid.missing == []
    assert grid.policies[0].settings["stage1.lr"] == "0.125"


def test_before_the_first_policy_there_is_a_report_as_well(runs):
    runs.write("a", "maze", 0, "stage1", lines=[(5, {"loss": 1.0})])
    found = runs.compare("--exp", "a")
    assert missing(found)["maze", 0, "stage1"] == "unfinished"
    assert "No policy has been trained to the end" in runs.text
