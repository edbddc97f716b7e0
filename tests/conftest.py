"""Fixtures of all tests, and how they are run."""

import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from lapo import stage1_idm_wm, stage2_bc
from lapo.errors import run_main
from lapo.reporting import aggregate
from many_runs import Runs
from support import Workplace

settings.register_profile("suite", deadline=None, derandomize=True, max_examples=30)
settings.load_profile("suite")

# Tiny networks run fastest on one thread, and then sum in the same order here and in the scripts' processes.
torch.set_num_threads(1)


TRAINING = {
    *(
        "workplace",
        "trained",
        "finished",
        "recorded",
        "policy",
        "distilled",
        "measured",
        "server",
        "clones",
        "repo",
    ),
}
"""Fixtures that train, record, or start processes: whatever uses them is left out by `make quick`."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what takes long by the fixtures that it uses; a few tests mark themselves."""
    for item in items:
        if TRAINING & set(item.fixturenames):
            item.add_marker("slow")


if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # As in a script's background: the scripts under test would inherit that, and be deaf to Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call_main(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """Calls a script's `main` with command-line arguments; gives exit status, stdout and stderr."""

    def call(main: Callable[[], None], *arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["script.py", *arguments])
        status = 0
        try:
            run_main(main)
        except SystemExit as stop:
            status = stop.code
        return status, *capsys.readouterr()

    return call


@pytest.fixture
def workplace(tmp_path: Path) -> Workplace:
    """A fresh folder with data and a tiny configuration."""
    return Workplace(tmp_path)


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    """A workplace in which stages 1 and 2 are done."""
    workplace = Workplace(tmp_path_factory.mktemp("trained"))
    stage1_idm_wm.train(workplace.config())
    stage2_bc.train(workplace.config())
    return workplace


@pytest.fixture
def runs(tmp_path, monkeypatch) -> Runs:
    """A folder for runs of whole experiments."""
    monkeypatch.setattr(aggregate, "RESAMPLES", 199)  # fast; the intervals have tests of their own
    return Runs(tmp_path)
