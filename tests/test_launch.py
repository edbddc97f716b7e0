"""launch.sh, with the real config and table of games, and stages that only note how they were called."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from procgen_env import GAMES

LAPO = Path(__file__).resolve().parent.parent / "lapo"
SCRIPTS = ("stage1_idm_wm", "stage2_bc", "stage3_decode")
STUB = """
import os, sys, time
from pathlib import Path

call = " ".join([Path(__file__).stem, *sys.argv[1:]])
with open(os.environ["CALLS"], "a") as calls:
    calls.write(call + "\\n")
if call.startswith(os.environ.get("SLOW", "none")):
    time.sleep(60)
sys.exit(7 if call.startswith(os.environ.get("FAILING", "none")) else 0)
"""


class Repo:
    """A copy of the repository's lapo/ whose stages are stubs."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.log = folder / "calls"
        shutil.copytree(LAPO, folder / "lapo", symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        for script in SCRIPTS:
            (folder / "lapo" / f"{script}.py").write_text(STUB)

    def start(self, *arguments: str, **env: str) -> subprocess.Popen[str]:
        """Start launch.sh as a shell would: as the leader of a process group, in some folder."""
        return subprocess.Popen(
            ["bash", str(self.folder / "lapo" / "launch.sh"), *arguments],
            env=os.environ | {"PYTHON": sys.executable, "CALLS": str(self.log)} | env,
            cwd=self.folder.parent,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def launch(self, *arguments: str, **env: str) -> tuple[int, str, str]:
        """Run launch.sh; its exit status, stdout and stderr."""
        process = self.start(*arguments, **env)
        out, err = process.communicate(timeout=60)
        return process.returncode, out, err

    def calls(self) -> list[str]:
        """The stages called since the last look, in order, with their arguments."""
        calls = self.log.read_text().splitlines() if self.log.exists() else []
        self.log.unlink(missing_ok=True)
        return calls


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


def test_own_frames_need_no_procgen_game(repo):
    (repo.folder / "expert_data" / "holiday").mkdir(parents=True)
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
        (["maze", "--env", "ninja"], "error: games are named first and without --env"),
        (["maze", "--modes", "online,ofline"], "'stage3.mode' is 'ofline': input should be 'online'"),
        (["maze", "--sead", "1"], "unknown key 'sead'; allowed here: env, exp, seed"),
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
    [(signal.SIGINT, os.killpg, 130), (signal.SIGTERM, os.kill, 143)],  # Ctrl-C reaches the whole group
)
def test_signal_stops_the_stage_and_everything_after_it(repo, number, send, status):
    process = repo.start("maze", "ninja", SLOW="stage2_bc")
    deadline = time.monotonic() + 30
    while not repo.log.exists() or "stage2_bc" not in repo.log.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    send(process.pid, number)
    out, err = process.communicate(timeout=10)  # ends once no stage holds the pipes any more
    assert process.returncode == status
    assert err.endswith(f"launch.sh: stopped by {number.name}; the same command continues\n")
    assert "summary" not in out
    assert len(repo.calls()) == 2


def test_help_shows_the_usage(repo):
    status, out, _ = repo.launch("--help")
    assert status == 0
    assert "bash launch.sh bigfish maze --seed 1" in out
    assert "set -euo" not in out
