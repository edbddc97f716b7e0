"""The changes that docs/extending.md shows, made to a copy of the code as written."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from support import LAPO, ROOT, Workplace

PAGE = ROOT / "docs" / "extending.md"


@pytest.fixture(scope="module")
def extended(tmp_path_factory) -> Path:
    """A copy of lapo/ with all changes of the page."""
    folder = tmp_path_factory.mktemp("extended")
    shutil.copytree(LAPO, folder / "lapo", ignore=shutil.ignore_patterns("__pycache__"))
    for change in re.findall(r"```diff\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL):
        subprocess.run(["git", "apply", "-"], input=change, text=True, cwd=folder, check=True)
    return folder / "lapo"


def run(script: Path, place: Workplace, *arguments: str) -> str:
    command = [sys.executable, str(script), "--config", str(place.config_file), *arguments]
    process = subprocess.run(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


def test_the_page_s_mode_trains_is_reported_and_plays(extended, trained):
    run(extended / "stage3.py", trained, "--stage3.mode", "finetune")
    report = run(extended / "report.py", trained)
    assert re.search(r"LAPO finetuned +\| frames, 32 labels +\| \S+ ± ", report)
    options = ("--env", trained.GAME, "--policy", "finetune", "--results-dir", str(trained.results))
    command = [sys.executable, str(extended / "evaluate.py"), *options, "--episodes=2", "--num-envs=2"]
    played = subprocess.run(command, capture_output=True, text=True)
    assert "finetune policy" in played.stdout, played.stderr


def test_the_page_s_bottleneck_trains(extended, workplace):
    assert "vq_loss                      0\n" in run(extended / "stage1.py", workplace, "--vq.kind", "noise")
