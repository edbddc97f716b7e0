"""wandb goes online exactly if its own settings hold an API key for the server in use."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from support import PATIENCE, ROOT

KEY = "0" * 40
PLACE = "https://wandb.example.org"
START = """
import sys
from pathlib import Path
import wandb
from lapo.config import load_config
from lapo.errors import run_main
from lapo.runs.tracking import start_wandb

wandb.init = lambda mode, **options: print("mode", mode)
run_main(lambda: start_wandb(load_config(["--wandb", "online"]), "stage1", Path("."), None))
"""


def python(home: Path, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    """A process of somebody with this home: wandb remembers much as long as a process lives."""
    ours = {key: value for key, value in os.environ.items() if not key.startswith(("WANDB", "NETRC", "XDG"))}
    return subprocess.run(
        [sys.executable, *arguments],
        env=ours | {"HOME": str(home), "PYTHONPATH": str(ROOT)} | env,
        cwd=home,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )


@pytest.fixture(scope="module")
def homes(tmp_path_factory) -> dict[str, Path]:
    """Homes of people who are logged in nowhere, at wandb, and at a server of their own."""
    homes = {}
    for name, options in (("nobody", None), ("usual", []), ("own", ["--host", PLACE])):
        homes[name] = tmp_path_factory.mktemp(name)
        if options is not None:
            python(homes[name], *["-m", "wandb", "login", "--no-verify"], *options, KEY).check_returncode()
    return homes


@pytest.mark.slow
@pytest.mark.parametrize(
    ("home", "env", "mode"),
    [
        ("nobody", {}, "offline"),
        ("usual", {}, "online"),
        ("usual", {"WANDB_BASE_URL": PLACE}, "offline"),
        ("usual", {"WANDB_MODE": "offline"}, "online"),  # --wandb says otherwise
        ("own", {}, "online"),
        ("own", {"WANDB_BASE_URL": "https://elsewhere.example.org"}, "offline"),
        ("nobody", {"WANDB_API_KEY": KEY}, "online"),
    ],
)
def test_metrics_go_online_where_somebody_is_logged_in_at_the_server_in_force(homes, home, env, mode):
    done = python(homes[home], "-c", START, **env)
    assert done.returncode == 0, done.stderr
    notice = (
        "wandb: nobody is logged in here, so metrics are kept offline; `wandb login`, then `wandb sync`\n"
    )
    assert done.stdout == (notice if mode == "offline" else "") + f"mode {mode}\n"


@pytest.mark.slow
def test_an_invalid_key_is_named_and_an_invalid_address_is_refused(homes):
    done = python(homes["usual"], "-c", START, WANDB_API_KEY="abc")
    assert done.stdout.startswith("wandb: WANDB_API_KEY invalid: ")
    assert done.stdout.endswith("kept offline; `wandb login`, then `wandb sync`\nmode offline\n")
    done = python(homes["usual"], "-c", START, WANDB_BASE_URL="nowhere")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(
        "error: wandb cannot start (1 validation error for Settings base_url Input should be"
    )
    assert line.endswith("; fix that, or choose --wandb disabled")
