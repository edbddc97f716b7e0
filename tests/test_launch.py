"""launch.sh and slurm.sh, with the real config and table of games, and stages that only note how they were
called."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml

from lapo.config import load_config, to_dict
from lapo.games.table import GAMES
from lapo.runs.checkpoints import load_checkpoint
from support import PATIENCE, numbered_frames, write_chunk

LAPO = Path(__file__).resolve().parent.parent / "lapo"
SCRIPTS = ("stage1_idm_wm", "stage2_bc", "stage3_decode")
STUB = """
import os, sys, time
from pathlib import Path

call = " ".join([Path(__file__).stem, *sys.argv[1:]])
with open(os.environ["CALLS"], "a") as calls:
    calls.write(call + "\\n")
if "SHOW" in os.environ:
    print(*(f"{name} {os.environ.get(name)}" for name in ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")))
if call.startswith(os.environ.get("SLOW", "none")):
    time.sleep(3600)
sys.exit(7 if call.startswith(os.environ.get("FAILING", "none")) else 0)
"""


# Stands in for a stage that saves when it is told to stop, and takes its time.
SAVING = """
import os, signal, sys, time

def save(number, frame):
    signal.signal(number, signal.SIG_IGN)
    time.sleep(0.5)
    print("saved", flush=True)
    sys.exit(143)

signal.signal(signal.SIGTERM, save)
print("trains", flush=True)
time.sleep(3600)
"""


class Repo:
    """A copy of the repository's lapo/ whose stages are stubs."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.log = folder / "calls"
        shutil.copytree(LAPO, folder / "lapo", symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        for script in (*SCRIPTS, "record_expert", "download_data"):
            (folder / "lapo" / f"{script}.py").write_text(STUB)
        for game in GAMES:
            self.add_frames(game)

    def add_frames(self, game: str) -> Path:
        """Let `game` have a chunk to train on; returns its folder."""
        folder = self.folder / "expert_data" / game
        (folder / "train").mkdir(parents=True)
        (folder / "train" / "0.npz").touch()
        return folder

    def start(self, *arguments: str, script: str = "launch.sh", **env: str) -> subprocess.Popen[str]:
        """Start launch.sh as a shell would: as the leader of a process group, in some folder."""
        return subprocess.Popen(
            ["bash", str(self.folder / "lapo" / script), *arguments],
            env=os.environ | {"PYTHON": sys.executable, "CALLS": str(self.log)} | env,
            cwd=self.folder.parent,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def launch(self, *arguments: str, script: str = "launch.sh", **env: str) -> tuple[int, str, str]:
        """Run launch.sh; its exit status, stdout and stderr."""
        process = self.start(*arguments, script=script, **env)
        out, err = process.communicate(timeout=PATIENCE)
        return process.returncode, out, err

    def calls(self) -> list[str]:
        """The stages called since the last look, in order, with their arguments."""
        calls = self.log.read_text().splitlines() if self.log.exists() else []
        self.log.unlink(missing_ok=True)
        return calls


def names(listed: str) -> list[str]:
    """The runs of a `--list`, without what they take."""
    return [line.partition(":")[0] for line in listed.splitlines()]


@pytest.fixture
def repo(tmp_path) -> Repo:
    return Repo(tmp_path / "repo")


def test_without_arguments_every_stage_of_every_game(repo):
    status, out, _ = repo.launch()
    assert status == 0
    assert repo.calls() == [f"{script} --env {game}" for game in GAMES for script in SCRIPTS]
    summary = out.split("summary\n")[1].splitlines()
    assert [line.split()[:2] for line in summary] == [[game, "finished"] for game in GAMES]


def test_games_stages_modes_and_arguments(repo):
    (repo.folder.parent / "sweep.yaml").write_text("stage1: {lr: 1e-4}")
    passed = "--seed 1 --config sweep.yaml --decoder.hidden 64 32"
    status, _, err = repo.launch(
        "--stages=1,3", "maze", "coinrun", "--modes", "online,bc", *passed.split(), "--wandb=disabled"
    )
    assert status == 0, err
    assert repo.calls() == [
        f"{call} {passed} --wandb=disabled{mode}".replace(" ", f" --env {game} ", 1)
        for game in ("maze", "coinrun")
        for call, mode in (
            ("stage1_idm_wm", ""),
            ("stage3_decode", " --stage3.mode online"),
            ("stage3_decode", " --stage3.mode bc"),
        )
    ]


def test_each_game_with_each_seed(repo):
    status, out, _ = repo.launch("maze", "ninja", "maze", "--seeds", "3,0,03", "--stages", "2", "--exp", "x")
    assert status == 0
    grid = [("maze", 3), ("maze", 0), ("ninja", 3), ("ninja", 0)]
    assert repo.calls() == [f"stage2_bc --env {game} --seed {seed} --exp x" for game, seed in grid]
    assert [f"  {game}, seed {seed} finished (0 min)" for game, seed in grid] == out.splitlines()[-4:]


def test_a_list_shows_the_runs_and_a_task_is_one_of_them(repo):
    grid = ["maze", "ninja", "--seeds=0,1", "--stages", "3"]
    status, out, _ = repo.launch(*grid, "--list")
    assert (status, names(out)) == (0, ["maze, seed 0", "maze, seed 1", "ninja, seed 0", "ninja, seed 1"])
    assert repo.calls() == []
    assert repo.launch(*grid, "--task", "2")[0] == 0
    assert repo.calls() == ["stage3_decode --env ninja --seed 0"]
    assert names(repo.launch("--list")[1]) == list(GAMES)


def test_games_without_frames_are_named_in_one_message(repo):
    for game in ("maze", "ninja", "heist", "bigfish", "miner"):
        shutil.rmtree(repo.folder / "expert_data" / game)
    status, out, err = repo.launch()
    assert (status, out, repo.calls()) == (2, "", [])
    assert err.count("error") == 1
    assert "there are no frames of bigfish, heist, maze and 2 more in" in err
    assert "--data record" in err
    assert repo.launch("maze", "--stages", "3")[0] == 0  # a mode that plays needs none
    assert repo.launch("coinrun")[0] == 0


def test_missing_frames_are_got_first_and_only_those(repo):
    shutil.copytree(LAPO.parent / "docs", repo.folder / "docs")
    shutil.copytree(LAPO.parent / "expert_data" / "experts", repo.folder / "expert_data" / "experts")
    folder = repo.folder / "expert_data"
    for game in ("jumper", "maze"):
        shutil.rmtree(folder / game)
    grid = ("coinrun", "maze", "jumper", "--data=record", "--stages=1", "--visuals", "plain")
    status, _, err = repo.launch(*grid, "--record.frames=1000", "--record.test_frames", "100")
    assert status == 0, err
    sizes = "--frames=1000 --test-frames=100 --visuals=plain"
    stage1 = "--visuals plain --record.frames=1000 --record.test_frames 100"
    assert repo.calls() == [
        f"stage1_idm_wm --env coinrun {stage1}",
        f"record_expert --env maze --expert {folder}/experts/maze.pt {sizes} --noise=0.0 --data-dir {folder}",
        f"stage1_idm_wm --env maze {stage1}",
        f"record_expert --env jumper --expert planner {sizes} --noise=0.2 --data-dir {folder}",
        f"stage1_idm_wm --env jumper {stage1}",
    ]
    assert "maze: records 1,100 frames of the learned expert, its actions sampled: about 1 min" in err
    assert "jumper: records 1,100 frames of the planner, 20% of its actions at random: about 1 min" in err
    assert repo.launch("maze", "--data", "published", "--stages", "2")[0] == 0
    assert repo.calls() == [f"download_data maze --data-dir {folder}", "stage2_bc --env maze"]
    assert repo.launch("maze", "--data", "huggingface", "--stages", "2")[0] == 0
    sizes = "--frames=2621440 --test-frames=65536"
    assert repo.calls()[0] == f"download_data maze --data-dir {folder} --source=huggingface {sizes}"


def test_a_sweep_over_presets_gets_the_frames_of_each(repo):
    shutil.copytree(LAPO.parent / "docs", repo.folder / "docs")
    status, _, err = repo.launch("jumper", "maze", "--sweep", "preset=demo,small", "--stages", "1")
    assert (status, repo.calls()) == (2, [])
    folder = repo.folder / "expert_data"
    assert err.startswith(f"error: there are no frames of jumper, maze in {folder}/demo; get them with")
    grid = "jumper", "--data=record", "--stages=1"
    assert repo.launch(*grid, "--sweep=preset=demo,small")[0] == 0
    recorded = [call.split() for call in repo.calls() if call.startswith("record_expert")]
    assert [words[-1] for words in recorded] == [f"{folder}/demo", f"{folder}/small"]
    assert repo.launch(*grid, "--sweep=stage1.lr=1e-4,3e-4", "--preset=demo", "--data_dir=elsewhere")[0] == 0
    assert [call.split()[0] for call in repo.calls()] == ["record_expert", "stage1_idm_wm", "stage1_idm_wm"]


def test_an_interrupted_recording_is_continued_and_not_trained_on(repo):
    shutil.copytree(LAPO.parent / "docs", repo.folder / "docs")
    shutil.rmtree(repo.folder / "expert_data" / "maze")
    sizes = "--record.frames=6", "--record.test_frames=4"
    grid = "maze", "--stages", "1", *sizes
    assert repo.launch(*grid, "--data", "record", FAILING="record")[0] == 1
    assert [call.split()[0] for call in repo.calls()] == ["record_expert"]
    folder = repo.folder / "expert_data" / "maze"
    write_chunk(folder / "train" / "0.npz", numbered_frames(np.arange(6)))
    status, _, err = repo.launch(*grid)  # the first chunk alone
    assert (status, repo.calls()) == (2, [])
    assert err.startswith("error: the frames of maze in ")
    assert "are incomplete; --data record or huggingface, as before, gets the others" in err
    assert repo.launch(*grid, "--data", "record")[0] == 0
    assert [call.split()[0] for call in repo.calls()] == ["record_expert", "stage1_idm_wm"]
    status, _, err = repo.launch(*grid, "--data", "record", "--seeds", "0,1", "--task", "1")
    assert (status, repo.calls()) == (2, [])
    assert "maze has no frames yet, or not all; get them before its tasks run: " in err
    write_chunk(folder / "test" / "0.npz", numbered_frames(np.arange(4)))
    for options in ((), ("--data", "record"), ("--task", "0")):
        assert repo.launch(*grid, *options)[0] == 0
        assert [call.split()[0] for call in repo.calls()] == ["stage1_idm_wm"]


def test_modes_that_read_frames_get_them_as_well(repo):
    shutil.rmtree(repo.folder / "expert_data" / "maze")
    status, _, err = repo.launch("maze", "--stages", "3", "--modes", "online,bc")
    assert status == 2
    assert "there are no frames of maze in" in err


def test_an_expert_of_other_visuals_is_not_the_default(repo):
    """As record_expert.py decides it: the planner then plays, with noise."""
    shutil.copytree(LAPO.parent / "docs", repo.folder / "docs")
    shutil.copytree(LAPO.parent / "expert_data" / "experts", repo.folder / "expert_data" / "experts")
    shutil.rmtree(repo.folder / "expert_data" / "maze")
    _, _, err = repo.launch("maze", "--data", "record", "--stages", "1")
    assert "frames of the planner, 20% of its actions at random" in err
    assert "--expert planner" in repo.calls()[0]


def test_a_game_whose_frames_cannot_be_got_is_reported_and_the_others_go_on(repo):
    shutil.rmtree(repo.folder / "expert_data" / "maze")
    status, out, _ = repo.launch("maze", "ninja", "--data", "published", "--stages", "1", FAILING="download")
    assert status == 1
    assert repo.calls()[1:] == ["stage1_idm_wm --env ninja"]
    summary = out.split("summary\n")[1].splitlines()
    assert summary[0].split(maxsplit=1) == ["maze", "failed to get frames, exit code 7 (0 min)"]
    assert summary[1].split()[:2] == ["ninja", "finished"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("maze --data other", "--data is 'other', but must be record"),
        ("maze --data published --visuals plain", "frames of published have visuals full, not plain"),
        ("holiday --data record", "--data record has no frames of holiday"),
    ],
)
def test_frames_that_nobody_has_are_refused(repo, arguments, message):
    shutil.rmtree(repo.folder / "expert_data" / "maze")
    (repo.folder / "expert_data" / "holiday").mkdir()
    status, _, err = repo.launch(*arguments.split())
    assert (status, repo.calls()) == (2, [])
    assert message in err


def test_own_frames_need_no_procgen_game(repo):
    repo.add_frames("holiday")
    status, out, _ = repo.launch("holiday", "--stages", "1,2")
    assert status == 0
    assert len(repo.calls()) == 2
    assert "holiday    finished" in out


def test_failing_game_does_not_stop_the_others_and_a_rerun_continues(repo):
    status, out, err = repo.launch("maze", "ninja", FAILING="stage2_bc --env maze")
    assert status == 1
    assert [call.split()[0] for call in repo.calls()] == [*SCRIPTS[:2], *SCRIPTS]
    assert err == "launch.sh: maze failed in stage 2, exit code 7\n"
    assert "maze       failed in stage 2, exit code 7" in out.split("summary\n")[1]
    assert "ninja      finished" in out.split("summary\n")[1]

    status, out, err = repo.launch("maze", "ninja")
    assert (status, err) == (0, "")
    assert len(repo.calls()) == 6


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["maze", "bigfsh"], "error: 'bigfsh' is neither a Procgen game nor a folder "),
        (["maze", "--stages", "1,4"], "error: --stages is '1,4', but must list some of 1,2,3"),
        (["maze", "--modes"], "error: --modes needs a list, as in: --stages 1,2 or --modes online,offline"),
        (["maze", "--seeds", "1,"], "error: --seeds is '1,', but must list some, as in: --seeds 0,1,2"),
        (["maze", "--seeds", "9999999999"], "'seed' is '9999999999'"),
        (["maze", "--seeds", "1", "--seed", "2"], "error: --seed and --seeds: give one of the two"),
        (["maze", "--seed=2", "--seeds=1"], "error: --seed and --seeds: give one of the two"),
        (
            ["maze", "--modes", "bc", "--stage3.mode", "online"],
            "error: --stage3.mode and --modes: give one of the two",
        ),
        (["maze", "--seeds", "1,2", "--task", "2"], "error: --task is 2, but there are 2 runs"),
        (["maze", "--task", "x"], "error: --task is 'x', but must be the number of a run"),
        (["maze", "--jobs", "0"], "error: --jobs is '0', but must be how many runs"),
        (["maze", "--gpus", "a"], "error: --gpus is 'a', but must list numbers of GPUs"),
        (["maze", "--gpus", "0", "--jobs", "1"], "error: --jobs and --gpus: give one of the two"),
        (["maze", "--sweep"], "error: --sweep is '', but must be a key and values"),
        (["maze", "--sweep", "stage1.lr"], "error: --sweep is 'stage1.lr', but must be a key and values"),
        (["maze", "--sweep=stage1.lr=1,,2"], "error: --sweep is 'stage1.lr=1,,2', but must be a key and"),
        (["maze", "--sweep", "stage1.lr=1", "--sweep", "stage1.lr=2"], "stage1.lr is given twice"),
        (["maze", "--sweep", "seed=1,2"], "error: --sweep seed=1,2: for several of seed: --seeds"),
        (["maze", "--sweep", "stage1.lr=1e-4,fast"], "'stage1.lr' is 'fast'"),
        (["maze", "--sweep", "stage1.lrs=1e-4"], "unknown option --stage1.lrs"),
        (["maze", "--env", "ninja"], "error: games are named first and without --env"),
        (["maze", "--modes", "online,ofline"], "error: --modes: 'ofline' is no mode; choose among bc, "),
        (["maze", "--sead", "1"], "unknown option --sead; did you mean --seed?"),
        (["maze", "--mode", "bc"], "error: unknown option --mode; did you mean --modes?"),
        (["maze", "--gpu=0"], "error: unknown option --gpu; did you mean --gpus?"),
        (["maze", "--sweeps=stage1.lr=1"], "error: unknown option --sweeps; did you mean --sweep?"),
        (
            ["--preset", "demo", "maze"],
            "error: --preset maze: this is a game; games are named before all",
        ),
        (["maze", "--vq.num_embs", "0"], "'vq.num_embs' is '0'"),
    ],
)
def test_mistake_is_found_before_anything_starts(repo, arguments, sentence):
    status, out, err = repo.launch(*arguments)
    assert status == 2
    assert sentence in err
    assert "Traceback" not in err
    assert out == ""
    assert repo.calls() == []


def test_interpreter_without_the_packages_is_one_sentence(repo, tmp_path):
    bare = tmp_path / "bare"
    bare.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S "$@"\n')
    bare.chmod(0o755)
    for python, sentence in ((str(bare), "has no module"), ("absent", "there is no interpreter absent")):
        status, _, err = repo.launch("maze", PYTHON=python)
        assert status == 2
        assert sentence in err
        assert "run 'make venv'" in err
        assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("number", "send", "status"),
    [
        (signal.SIGINT, os.killpg, 130),  # Ctrl-C reaches the whole group
        (signal.SIGTERM, os.kill, 143),
        (signal.SIGHUP, os.kill, 129),
        (signal.SIGUSR1, os.kill, 138),
    ],
)
def test_signal_stops_the_stage_and_everything_after_it(repo, number, send, status):
    process = repo.start("maze", "ninja", SLOW="stage2_bc")
    while not repo.log.exists() or "stage2_bc" not in repo.log.read_text():
        assert process.poll() is None
        time.sleep(0.02)
    send(process.pid, number)
    out, err = process.communicate(timeout=PATIENCE)  # ends once no stage holds the pipes any more
    assert process.returncode == status
    assert err.endswith(f"launch.sh: stopped by {number.name}; the same command continues\n")
    assert "summary" not in out
    assert len(repo.calls()) == 2


def test_a_stage_has_time_to_save_though_all_processes_are_told_to_stop_and_told_again(repo):
    for script in SCRIPTS:
        (repo.folder / "lapo" / f"{script}.py").write_text(SAVING)
    process = repo.start("maze")
    while process.stdout.readline() != "trains\n":
        pass
    os.killpg(process.pid, signal.SIGTERM)
    time.sleep(0.2)
    os.killpg(process.pid, signal.SIGTERM)
    out, err = process.communicate(timeout=PATIENCE)
    assert (process.returncode, out) == (143, "saved\n")
    assert err == "launch.sh: stopped by SIGTERM; the same command continues\n"


# ---------------------------------------------------------------- grids


def test_a_sweep_is_the_product_of_its_lists_each_setting_an_experiment(repo):
    sweeps = ("--sweep", "stage1.lr=1e-4,3e-4", "--sweep=vq.enabled=false")
    grid = ("maze", "--seeds=0,1", "--exp", "x", *sweeps, "--stages", "1")
    assert repo.launch(*grid)[0] == 0
    expected = [
        f"stage1_idm_wm --env maze --seed {seed} --exp x"
        f" --exp x-stage1.lr={lr}-vq.enabled=false --stage1.lr {lr} --vq.enabled false"
        for lr in ("1e-4", "3e-4")
        for seed in (0, 1)
    ]
    assert repo.calls() == expected
    listed = names(repo.launch(*grid, "--list")[1])
    assert listed[2] == "maze, seed 0, exp x-stage1.lr=3e-4-vq.enabled=false"
    assert repo.launch(*grid, "--task=2")[0] == 0
    assert repo.calls() == [expected[2]]


def log_of(repo: Repo, game: str, exp: str = "main") -> str:
    return (repo.folder / "exp_results" / exp / game / "seed0" / "launch.log").read_text()


def test_jobs_run_side_by_side_and_one_that_fails_stops_no_other(repo, monkeypatch):
    games = ("maze", "ninja", "coinrun", "heist")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    status, out, err = repo.launch(*games, "--jobs", "2", FAILING="stage2_bc --env ninja", SHOW="yes")
    assert status == 1
    assert len(repo.calls()) == 3 * 3 + 2
    log = repo.folder / "exp_results" / "main" / "ninja" / "seed0" / "launch.log"
    assert err == f"launch.sh: ninja: failed in stage 2, exit code 7 (0 min); see {log}\n"
    assert f"launch.sh: ninja: started, output in {log}\n" in out
    summary = out.split("summary\n")[1].splitlines()
    assert sorted(line.split("(")[0].split(maxsplit=1) for line in summary) == [
        ["coinrun", "finished "],
        ["heist", "finished "],
        ["maze", "finished "],
        ["ninja", "failed in stage 2, exit code 7 "],
    ]
    assert "OMP_NUM_THREADS 1 CUDA" in log_of(repo, "maze")
    assert "launch.sh: maze, stage 3" in log_of(repo, "maze")
    assert "launch.sh: maze, stage" not in out

    status, out, err = repo.launch(*games, "--jobs=2", "--exp", "again")
    assert (status, err) == (0, "")


def test_a_slow_run_takes_one_place_and_each_gpu_has_one_run(repo):
    games = ("maze", "ninja", "coinrun", "heist")
    process = repo.start(
        *games, "--gpus", "3,5", "--stages", "1", SLOW="stage1_idm_wm --env maze", SHOW="yes"
    )
    ended = [process.stdout.readline() for _ in range(4 + 3)]  # all but the end of maze
    assert [line.split(":")[1] for line in ended if "finished" in line] == [" ninja", " coinrun", " heist"]
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 143
    assert err == "launch.sh: stopped by SIGTERM; the same command continues\n"
    for game in games[1:]:
        assert "CUDA_VISIBLE_DEVICES 5" in log_of(repo, game)
    assert log_of(repo, "maze").endswith("launch.sh: stopped by SIGTERM; the same command continues\n")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_a_signal_stops_all_runs_of_a_queue_once_they_have_saved(repo, number):
    for script in SCRIPTS:
        (repo.folder / "lapo" / f"{script}.py").write_text(SAVING)
    process = repo.start("maze", "ninja", "heist", "--jobs", "2")
    logs = [repo.folder / f"exp_results/main/{game}/seed0/launch.log" for game in ("maze", "ninja")]
    while not all(log.exists() and "trains" in log.read_text() for log in logs):
        assert process.poll() is None
        time.sleep(0.02)
    os.killpg(process.pid, number)
    out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 128 + number
    assert err == f"launch.sh: stopped by {number.name}; the same command continues\n"
    assert "heist" not in out
    for log in logs:
        assert "saved\n" in log.read_text()


def test_a_log_that_cannot_be_written_stops_the_queue_and_leaves_no_run_behind(repo):
    """Here that of heist, which comes third, while maze is being trained."""
    folder = repo.folder / "exp_results" / "main"
    folder.mkdir(parents=True)
    (folder / "heist").write_text("a file, where the run's folder should be")
    log = folder / "maze" / "seed0" / "launch.log"
    waiting = f"""
import pathlib, sys, time

while "maze" not in sys.argv:
    if "trains" in pathlib.Path({str(log)!r}).read_text():
        sys.exit()
    time.sleep(0.02)
"""
    for script in SCRIPTS:
        (repo.folder / "lapo" / f"{script}.py").write_text(waiting + SAVING)
    status, _, err = repo.launch("maze", "ninja", "heist", "--jobs", "2")
    assert status == 2
    message = r"error: cannot write .*launch\.log \(.*\); the runs that have begun are stopped; .*\n"
    assert re.fullmatch(message, err)
    assert "saved\n" in log.read_text()  # its end was waited for


def test_a_log_that_is_deleted_meanwhile_is_no_failure(repo):
    for script in SCRIPTS:
        (repo.folder / "lapo" / f"{script}.py").write_text("import os, sys; os.remove(os.environ['LOG'])")
    log = repo.folder / "exp_results" / "main" / "maze" / "seed0" / "launch.log"
    status, out, err = repo.launch("maze", "--stages", "1", "--jobs", "1", LOG=str(log))
    assert (status, err) == (0, "")
    assert out.endswith("  maze       finished (0 min)\n")


def test_missing_frames_are_got_before_the_queue_starts(repo):
    shutil.rmtree(repo.folder / "expert_data" / "maze")
    grid = ("maze", "--seeds", "0,1", "--data", "published", "--stages", "1", "--jobs", "2")
    script = repo.folder / "lapo" / "download_data.py"
    chunk = repo.folder / "expert_data" / "maze" / "train" / "0.npz"
    make = f"os.makedirs({str(chunk.parent)!r}); open({str(chunk)!r}, 'w'); sys.exit"
    script.write_text(STUB.replace("sys.exit", make))
    status, _, err = repo.launch(*grid)
    assert (status, err) == (0, "")
    calls = repo.calls()
    assert calls[0].startswith("download_data maze")
    assert sorted(calls[1:]) == [f"stage1_idm_wm --env maze --seed {seed}" for seed in (0, 1)]


def test_a_list_says_what_runs_take_from_earlier_runs_of_the_same_sizes(repo):
    """Stage 1 took 0.36 s per step for other steps, seed and game; of offline mode nothing is known."""
    cfg = load_config(["--stage1.steps", "200"])
    small = replace(cfg, model=replace(cfg.model, wm_width=8))
    for exp, sizes, seconds in (("old", cfg, 72), ("small", small, 1)):
        folder = repo.folder / "exp_results" / exp / "heist" / "seed7" / "stage1"
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text(yaml.safe_dump(to_dict(sizes)))
        (folder / "metrics.jsonl").write_text(f'{{"step": 100}}\n{{"step": 200, "seconds": {seconds}}}\n')
    chunk = repo.folder / "expert_data" / "maze" / "train" / "0.npz"
    np.savez(chunk, obs=np.zeros((5000, 64, 64, 3), np.uint8))
    grid = ("maze", "--seeds", "0,1", "--stages", "1,3", "--modes", "offline", "--stage1.steps", "100000")
    status, out, err = repo.launch(*grid, "--list")
    assert status == 0
    known = "h without stage3_offline, 0.061 GB"
    assert out.splitlines() == [f"maze, seed {seed}: about 10 {known}" for seed in (0, 1)]
    assert err.startswith(f"all of them, one after the other: about 20 {known}; hours from")


def test_a_grid_on_a_tiny_config(workplace):
    """The real stages: one of the two learning rates is far too high."""
    command = ["bash", str(LAPO / "launch.sh"), workplace.GAME, "--config", str(workplace.config_file)]
    grid = [*command, "--stages", "1", "--sweep", "stage1.lr=1e-3,1e30", "--jobs", "2"]
    env = os.environ | {"PYTHON": sys.executable}
    done = subprocess.run(grid, env=env, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 1
    good, bad = (workplace.run_dir("stage1", f"main-stage1.lr={lr}") for lr in ("1e-3", "1e30"))
    assert load_checkpoint(good / "checkpoint.pt")["finished"]
    assert "exp main-stage1.lr=1e-3 finished" in done.stdout.replace("  ", " ")
    assert "exp main-stage1.lr=1e30: failed in stage 1, exit code 2" in done.stderr
    assert "try a lower learning rate" in (bad.parent / "launch.log").read_text()
    listed = subprocess.run([*grid, "--list"], env=env, capture_output=True, text=True, timeout=PATIENCE)
    assert len(listed.stdout.splitlines()) == 2
    again = subprocess.run([*grid, "--task", "0"], env=env, capture_output=True, text=True, timeout=PATIENCE)
    assert "finished already" in again.stdout


def test_the_example_of_a_wandb_sweep_is_a_command_that_stage_1_understands(tmp_path):
    sweep = yaml.safe_load((LAPO.parent / "docs" / "sweep.yaml").read_text())
    drawn = {"stage1.lr": 0.00031, "vq.num_embs": 128, "vq.normalize": True}
    assert drawn.keys() == sweep["parameters"].keys()
    command = []  # as wandb's agent builds it
    for word in sweep["command"]:
        command += [f"--{key}={value}" for key, value in drawn.items()] if word == "${args}" else [word]
    stub = tmp_path / "python"
    stub.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    stub.chmod(0o755)
    env = {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "WANDB_RUN_ID": "x7f3"}
    printed = subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout
    script, *words = printed.splitlines()
    assert (LAPO.parent / script).exists()
    cfg = load_config(words)
    assert (cfg.exp, cfg.wandb) == ("sweep-x7f3", "online")
    assert (cfg.stage1.lr, cfg.vq.num_embs, cfg.vq.normalize) == (0.00031, 128, True)


def test_help_shows_the_usage(repo):
    status, out, _ = repo.launch("--help")
    assert status == 0
    assert "bash launch.sh bigfish maze --seed 1" in out
    assert "set -euo" not in out


# ---------------------------------------------------------------- slurm.sh


@pytest.fixture
def cluster(repo, monkeypatch) -> Repo:
    """A repository, and a Slurm of which there are only two commands, which note how they were called."""
    bin_folder = repo.folder / "bin"
    bin_folder.mkdir()
    for name in ("sbatch", "scontrol"):
        tool = bin_folder / name
        tool.write_text(f'#!/bin/sh\nfor word in {name} "$@"; do echo "$word"; done >"$0.called"\n')
        tool.chmod(0o755)
    with (bin_folder / "sbatch").open("a") as sbatch:
        sbatch.write('exec cat >"$0.script"\n')
    monkeypatch.setenv("PATH", str(bin_folder), prepend=os.pathsep)
    monkeypatch.delenv("SLURM_ARRAY_TASK_ID", raising=False)
    repo.add_frames("holiday")
    return repo


def called(cluster: Repo, name: str) -> list[str]:
    path = cluster.folder / "bin" / f"{name}.called"
    return path.read_text().splitlines() if path.exists() else []


def test_a_grid_becomes_an_array_whose_script_runs_one_task_of_it(cluster):
    sweep = cluster.folder / "my sweep.yaml"
    sweep.write_text("exp: sweep")
    grid = ["maze", "holiday", "--seeds", "0,1", "--config", str(sweep)]
    status, out, err = cluster.launch("--gpus=1", "--time", "8:00:00", "--", *grid, script="slurm.sh")
    assert status == 0, err
    assert [line.split(None, 1) for line in names(out)] == [
        ["0", "maze, seed 0"],
        ["1", "maze, seed 1"],
        ["2", "holiday, seed 0"],
        ["3", "holiday, seed 1"],
    ]
    options = called(cluster, "sbatch")
    assert "--array=0-3" in options
    assert options[-3:] == ["--gpus=1", "--time", "8:00:00"]  # last, so that they overrule our own

    script = cluster.folder / "copy"  # as Slurm runs it: from elsewhere
    shutil.copy(cluster.folder / "bin" / "sbatch.script", script)
    for task, game, seed in ((1, "maze", 1), (2, "holiday", 0)):
        subprocess.run(["bash", script], env=job(cluster, task), cwd="/", check=True, capture_output=True)
        assert cluster.calls() == [f"{x} --env {game} --seed {seed} --config {sweep}" for x in SCRIPTS]


def job(cluster: Repo, task: int) -> dict[str, str]:
    """The environment of an array task."""
    return os.environ | {
        "CALLS": str(cluster.log),
        "SLURM_ARRAY_TASK_ID": str(task),
        "SLURM_JOB_ID": "17",
        "SLURM_CPUS_ON_NODE": "3",
        "PYTHON": sys.executable,
    }


def start_task(cluster: Repo, script: str) -> subprocess.Popen[str]:
    """A task whose stages are `script`, once the first of them trains."""
    for name in SCRIPTS:
        (cluster.folder / "lapo" / f"{name}.py").write_text(script)
    process = cluster.start("maze", "--seeds", "0,1", script="slurm.sh", **job(cluster, 1))
    while process.stdout.readline() != "trains\n":
        assert process.poll() is None
    return process


def test_a_task_told_to_stop_waits_for_its_stage_and_leaves_the_queue_to_slurm(cluster):
    process = start_task(cluster, SAVING)
    os.killpg(process.pid, signal.SIGTERM)  # as Slurm preempts and cancels: all processes of the job
    out, err = process.communicate(timeout=PATIENCE)
    assert (process.returncode, out) == (143, "saved\n")
    assert err == "launch.sh: stopped by SIGTERM; the same command continues\n"
    assert called(cluster, "scontrol") == []


@pytest.mark.parametrize(("age", "status"), [(100, 143), (0, 2)])
def test_a_task_whose_time_is_up_saves_and_goes_back_into_the_queue_if_it_had_time_at_all(
    cluster, age, status
):
    path = cluster.folder / "lapo" / "slurm.sh"
    path.write_text(path.read_text().replace("set -euo pipefail", f"set -euo pipefail; SECONDS={age}", 1))
    process = start_task(cluster, SAVING)
    process.send_signal(signal.SIGUSR1)  # as --signal=B:USR1: the script alone
    out, err = process.communicate(timeout=PATIENCE)
    assert (process.returncode, out) == (status, "saved\n")
    if age:
        assert "the time is up, so this task goes back into the queue" in err
        assert called(cluster, "scontrol") == ["scontrol", "requeue", "17"]
    else:
        assert err.endswith(
            "error: a time limit this short leaves no time to train; choose a longer --time\n"
        )
        assert called(cluster, "scontrol") == []


def test_a_task_that_fails_stays_failed_and_says_why(cluster):
    status, _, err = cluster.launch("maze", script="slurm.sh", **job(cluster, 0), FAILING="stage2_bc")
    assert (status, err) == (1, "launch.sh: maze failed in stage 2, exit code 7\n")
    status, _, err = cluster.launch("bigfsh", script="slurm.sh", **job(cluster, 0))
    assert status == 2
    assert err.startswith("error: 'bigfsh' is neither a Procgen game")
    assert called(cluster, "scontrol") == []


def test_a_task_uses_the_processors_of_its_job(cluster):
    (cluster.folder / "lapo" / "stage2_bc.py").write_text("import os; print(os.environ['OMP_NUM_THREADS'])")
    environment = job(cluster, 0) | {"OMP_NUM_THREADS": ""}
    status, out, err = cluster.launch("maze", "--stages", "2", script="slurm.sh", **environment)
    assert status == 0, err
    assert out.splitlines()[1] == "3"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["maze", "--seeds", "0,1"], "error: a -- must part sbatch's options from the runs"),
        (["--gpus=1", "--", "bigfsh"], "error: 'bigfsh' is neither a Procgen game nor a folder "),
        (["--", "maze", "--sead", "1"], "unknown option --sead; did you mean --seed?"),
    ],
)
def test_a_mistake_is_found_before_anything_is_submitted(cluster, arguments, sentence):
    status, out, err = cluster.launch(*arguments, script="slurm.sh")
    assert (status, out) == (2, "")
    assert sentence in err
    assert called(cluster, "sbatch") == []


@pytest.mark.parametrize("name", ["slurm.sh", "launch.sh"])
def test_a_script_given_to_sbatch_itself_says_what_to_do(cluster, name):
    """Slurm runs a copy in a folder of its own, as a task of an array where one was asked for."""
    copy = cluster.folder / "slurm_script"
    shutil.copy(cluster.folder / "lapo" / name, copy)
    for environment in (os.environ, job(cluster, 0)):
        done = subprocess.run(
            ["bash", str(copy), "--", "maze"], env=environment, capture_output=True, text=True
        )
        assert (done.returncode, done.stdout) == (2, "")
        (line,) = done.stderr.splitlines()
        assert line.startswith(f"error: {copy} is a copy of {name} without the repository; ")
        assert line.endswith(": bash slurm.sh --gpus=1 -- bigfish")
    assert called(cluster, "sbatch") == []


def test_a_machine_without_slurm_is_one_sentence(repo, monkeypatch):
    monkeypatch.delenv("SLURM_ARRAY_TASK_ID", raising=False)
    tools = repo.folder / "tools"
    tools.mkdir()
    for name in ("bash", "dirname"):
        (tools / name).symlink_to(shutil.which(name))
    status, _, err = repo.launch("--", "maze", script="slurm.sh", PATH=str(tools))
    assert status == 2
    assert err == "error: there is no sbatch here; submit from a machine of the cluster, or use launch.sh\n"
