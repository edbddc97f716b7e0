"""Runs: what they save, log and refuse, and how they stop."""

import contextlib
import errno
import json
import multiprocessing
import resource
import signal
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import yaml

import lapo.runs.run
from lapo import stage1_idm_wm
from lapo.config import diff, to_dict
from lapo.errors import UserError
from lapo.reporting.summary import StageOutput
from lapo.runs.checkpoints import FORMAT, load_checkpoint
from lapo.runs.run import MAX_LOSS, Run
from lapo.runs.tracking import NoTracking
from support import CPU, PATIENCE, largest_file, logged, result, tiny_run


def test_a_save_that_the_disk_refuses_keeps_the_previous_checkpoint(workplace):
    run = tiny_run(workplace)
    run.step = 1
    run.save({"weights": torch.ones(100)})
    run.step = 2
    with (
        largest_file(1_000_000),
        pytest.raises(UserError, match=r"cannot write .*; the previous file is kept"),
    ):
        run.save({"weights": torch.ones(1_000_000)})
    checkpoint = load_checkpoint(run.checkpoint_path)
    assert checkpoint["step"] == 1
    assert torch.equal(checkpoint["state"]["weights"], torch.ones(100))
    assert not list(run.dir.glob("*.part"))


@pytest.mark.usefixtures("capsys")  # keeps in memory what would go to a file of limited size
def test_a_configuration_that_the_disk_refuses_keeps_the_previous_one(workplace):
    path = tiny_run(workplace).dir / "config.yaml"
    before = path.read_bytes()
    with largest_file(100), pytest.raises(UserError, match=r"cannot write .*config\.yaml .* is kept"):
        tiny_run(workplace, "--stage2.steps", "5")
    assert path.read_bytes() == before
    assert {each.name for each in path.parent.iterdir()} == {"config.yaml", "lock"}


def test_a_place_for_results_that_is_none_is_named(workplace):
    workplace.results.write_text("a file")
    with pytest.raises(
        UserError, match=rf"^cannot write {workplace.run_dir('stage1')} .*nothing was changed"
    ):
        tiny_run(workplace)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("log", r"cannot write .*metrics\.jsonl .* the last good checkpoint, .*checkpoint\.pt, is kept"),
        (
            "save",
            r"cannot write .*checkpoint\.pt .*; [\d.,]+ MB are free there\); the previous file is kept",
        ),
    ],
)
def test_a_run_on_a_full_disk_can_be_resumed_once_there_is_room(trained, monkeypatch, method, message):
    """The disk is full as the line, or the checkpoint, of step 6 is written; that of step 3 stays."""
    exp = f"full-{method}"
    folder = trained.run_dir("stage1", exp)
    write = getattr(Run, method)

    def write_while_full(run: Run, *arguments: Any) -> None:
        full = (method == "save" and run.step == 6) or (method == "log" and arguments[0] == 6)
        room = run.metrics_path.stat().st_size + 10 if full else resource.RLIM_INFINITY
        with largest_file(room):
            write(run, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Run, method, write_while_full)
        with pytest.raises(UserError, match=message):
            stage1_idm_wm.train(trained.config("--exp", exp))
    assert load_checkpoint(folder / "checkpoint.pt")["step"] == 3
    names = {"checkpoint.pt", "config.yaml", "lock", "metrics.jsonl"}
    assert {path.name for path in folder.iterdir()} == names

    stage1_idm_wm.train(trained.config("--exp", exp))
    assert result(folder) == result(trained.run_dir("stage1"))


def test_metrics_are_averages_since_the_last_line(workplace):
    run = tiny_run(workplace)
    for value in (1.0, 2.0, 6.0):
        run.track({"loss": torch.tensor(value), "plain": value})
    run.log(3, {"extra": torch.tensor(7)})
    run.track({"loss": torch.tensor(5.0)})
    run.log(4)
    assert logged(run.dir) == [{"step": 3, "loss": 3.0, "plain": 3.0, "extra": 7.0}, {"step": 4, "loss": 5.0}]
    assert run.metrics == {"loss": 5.0, "plain": 3.0, "extra": 7.0}


def test_a_run_of_an_older_version_goes_on_with_the_explained_variance(workplace):
    """It tracked one minus that."""
    run = tiny_run(workplace)
    for value in (0.25, 0.5):
        run.track({"unexplained_variance": value})
    run.save({})
    run._lock.close()
    resumed = tiny_run(workplace)
    resumed.track({"explained_variance": 0.5})
    resumed.log(3)
    assert logged(run.dir) == [{"step": 3, "explained_variance": pytest.approx((0.75 + 0.5 + 0.5) / 3)}]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_metric_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(workplace, value):
    run = tiny_run(workplace)
    run.track({"wm_loss": torch.tensor(value)})
    with pytest.raises(UserError, match=f"stage1: wm_loss is {value} at step 7; nothing was saved yet"):
        run.log(7)
    run = tiny_run(workplace)
    run.save({"weights": torch.ones(1)})
    before = run.checkpoint_path.read_bytes()
    run.track({"wm_loss": torch.tensor(value)})
    with pytest.raises(UserError, match=r"at step 8; the last good checkpoint, .*checkpoint.pt, is kept"):
        run.log(8)
    with pytest.raises(UserError, match=r"net\.weights holds values that are not finite"):
        run.save({"net": {"weights": torch.tensor([1.0, value])}})
    assert run.checkpoint_path.read_bytes() == before


@pytest.mark.parametrize("key", ["wm_loss", "grad_norm"])
def test_a_diverged_metric_stops_the_run_and_keeps_the_checkpoint(workplace, key):
    run = tiny_run(workplace)
    run.track({key: torch.tensor(0.9 * MAX_LOSS), "explained_variance": 1e9})
    run.log(6)
    run.save({"weights": torch.ones(1)})
    before = run.checkpoint_path.read_bytes()
    run.track({key: torch.tensor(2 * MAX_LOSS)})
    with pytest.raises(
        UserError, match=rf"stage1: {key} is 2e\+06 at step 8; the last good checkpoint, .*kept"
    ):
        run.log(8)
    run.step = 7
    with pytest.raises(UserError, match=rf"{key} is 2e\+06 at step 7"):  # though no line was due yet
        run.save({"weights": torch.ones(1)})
    assert run.checkpoint_path.read_bytes() == before


def test_diverged_training_stops_at_the_next_line(workplace):
    schedule = ["--stage1.lr", "1", "--stage1.log_every", "1", "--stage1.save_every", "1"]
    with pytest.raises(
        UserError,
        match=r"stage1: loss is \S+e\+\d+ and \w+_loss is .* at step \d; .* try a lower learning rate",
    ):
        stage1_idm_wm.train(workplace.config(*schedule))
    assert all(abs(line.get("loss", 0)) < MAX_LOSS for line in logged(workplace.run_dir("stage1")))


def test_all_diverged_metrics_are_named(workplace):
    run = tiny_run(workplace)
    run.track({"loss": torch.tensor(2e7), "wm_loss": 0.1, "vq_loss": 2e7})
    with pytest.raises(UserError, match=r"^stage1: loss is 2e\+07 and vq_loss is 2e\+07 at step 7;"):
        run.log(7)


def test_a_resumed_run_is_the_same_run_to_wandb(workplace, monkeypatch):
    """Also where it was continued without wandb in between."""
    asked, tracking = [], NoTracking()
    monkeypatch.setattr(
        "lapo.runs.run.start_wandb", lambda cfg, stage, folder, id: asked.append(id) or tracking
    )
    for number in ("abc123", None, "abc123"):
        tracking.id = number
        tiny_run(workplace).save({})
    tiny_run(workplace)
    assert asked == [None, "abc123", "abc123", "abc123"]


def test_lines_written_after_the_last_checkpoint_are_dropped_when_a_run_continues(workplace):
    run = tiny_run(workplace)
    for step in (2, 4):
        run.track({"loss": torch.tensor(1.0)})
        run.log(step)
    run.step = 4
    run.save({})
    run.log(6, {"loss": 0.5})
    with run.metrics_path.open("a") as file:
        file.write('{"step": 8, "lo')  # torn by a power cut
    again = tiny_run(workplace)
    assert again.step == 4
    assert [line["step"] for line in logged(run.dir)] == [2, 4]


def test_a_run_killed_before_its_first_checkpoint_starts_anew(workplace):
    tiny_run(workplace).log(2, {"loss": 0.5})
    again = tiny_run(workplace)
    assert again.step == 0
    assert again.state is None
    assert logged(again.dir) == []


def test_a_lock_that_the_disk_refuses_is_named(workplace):
    (workplace.run_dir("stage1") / "lock").mkdir(parents=True)
    with pytest.raises(UserError, match=r"^cannot write .*stage1/lock .*; nothing was changed"):
        tiny_run(workplace)


def test_a_run_is_for_one_process_at_a_time(workplace):
    ours, theirs = multiprocessing.Pipe()

    def work() -> None:
        run = tiny_run(workplace)
        theirs.send("started")
        theirs.recv()
        run.finish({})

    other = multiprocessing.get_context("fork").Process(target=work)
    other.start()
    assert ours.recv() == "started"
    with pytest.raises(UserError, match=r"another process trains .*stage1; wait for it"):
        tiny_run(workplace)
    ours.send("go on")
    other.join(30)
    assert other.exitcode == 0
    assert tiny_run(workplace).finished


def test_the_resolved_configuration_lies_beside_the_run(workplace):
    run = tiny_run(workplace, "--stage1.lr", "0.125")
    saved = yaml.safe_load((run.dir / "config.yaml").read_text())
    assert saved == to_dict(run.cfg)
    assert saved["stage1"]["lr"] == 0.125


def test_a_checkpoint_is_plain_data_with_its_provenance(workplace):
    run = tiny_run(workplace)
    run.save({"weights": torch.ones(2)})
    checkpoint = torch.load(run.checkpoint_path, weights_only=True)
    assert checkpoint["format"] == FORMAT
    assert checkpoint["stage"] == "stage1"
    assert checkpoint["config"] == to_dict(run.cfg)
    assert checkpoint["provenance"].keys() == {"revision", "python", "torch"}
    assert checkpoint["device"] == str(CPU)


def test_loop_saves_at_its_interval_and_overdue_by_the_clock(workplace):
    saved = []
    for minutes in ("1000", "1e-9"):
        run = tiny_run(workplace, "--save_minutes", minutes, "--exp", f"every{minutes}")
        steps = []
        for step in run.loop(7, lambda run=run: {"at": run.step}, save_every=3, unit="step"):
            if run.checkpoint_path.exists():
                steps.append(load_checkpoint(run.checkpoint_path)["state"]["at"])
            assert step == run.step
        saved.append(sorted(set(steps)))
    assert saved == [[3, 6], [1, 2, 3, 4, 5, 6]]


def test_a_run_that_may_not_be_read_is_one_sentence(workplace, monkeypatch):
    run = tiny_run(workplace)
    run.log(1)
    refused = PermissionError(errno.EACCES, "Permission denied")
    for method, name in (("exists", "checkpoint.pt"), ("read_text", "metrics.jsonl")):
        with monkeypatch.context() as patch:
            patch.setattr(Path, method, Mock(side_effect=refused))
            with pytest.raises(UserError, match=rf"{name} could not be read \(Permission denied\)"):
                Run(run.cfg, "stage1", ("model", "stage1"), CPU)


def test_seconds_are_those_of_all_processes(workplace, monkeypatch):
    """Work of a killed process after its last checkpoint is repeated, so it is not counted."""
    clock = SimpleNamespace(now=0.0, monotonic=lambda: clock.now)
    monkeypatch.setattr(lapo.runs.run, "time", clock)
    sessions = [(100, {1: 10, 2: 12}, 13), (1000, {3: 15}, 15), (3000, {4: 9}, None), (50, {4: 1}, 2)]
    for start, logged_at, saved_at in sessions:
        clock.now = start
        run = tiny_run(workplace)
        for step, seconds in logged_at.items():
            clock.now = start + seconds
            run.log(step)
        if saved_at:
            clock.now = start + saved_at
            run.save({})
    lines = [json.loads(line) for line in run.metrics_path.read_text().splitlines()]
    assert [(line["step"], line["seconds"]) for line in lines] == [(1, 10), (2, 12), (3, 28), (4, 29)]
    assert StageOutput.read(run.dir).progress()["seconds"] == 30  # the last checkpoint came a second later


def test_a_checkpoint_without_seconds_is_resumed(workplace):
    run = tiny_run(workplace)
    run.save({})
    checkpoint = load_checkpoint(run.checkpoint_path)
    del checkpoint["seconds"]
    torch.save(checkpoint, run.checkpoint_path)
    tiny_run(workplace).log(1)
    assert json.loads(run.metrics_path.read_text())["seconds"] < PATIENCE


STOPPED_BY = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)


def test_loop_gives_signals_back_when_it_ends(workplace):
    handlers = [signal.getsignal(number) for number in STOPPED_BY]
    for _ in tiny_run(workplace).loop(2, dict, save_every=9, unit="step"):
        assert not {signal.getsignal(number) for number in STOPPED_BY} & set(handlers)
    assert [signal.getsignal(number) for number in STOPPED_BY] == handlers


def test_a_hangup_that_is_ignored_stays_so(workplace):
    """`nohup` wants that; all else still stops the run."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        run = tiny_run(workplace)
        for step in run.loop(3, dict, save_every=9, unit="step"):
            if step == 1:
                signal.raise_signal(signal.SIGHUP)
        assert run.step == 3
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_run_may_train_in_a_thread(workplace):
    """As in notebooks and Ray; signals are the main thread's affair there."""
    handlers = [signal.getsignal(number) for number in STOPPED_BY]
    run, seen = tiny_run(workplace), []

    def work() -> None:
        for _ in run.loop(3, dict, save_every=9, unit="step"):
            seen.append([signal.getsignal(number) for number in STOPPED_BY])

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [handlers] * 3
    assert load_checkpoint(run.checkpoint_path)["step"] == 3


@pytest.mark.parametrize("number", STOPPED_BY)
def test_a_signal_lets_the_step_end_saves_and_exits(workplace, capsys, number):
    run = tiny_run(workplace)
    finished = []

    def work() -> None:
        for step in run.loop(9, lambda: {"finished": finished}, save_every=100, unit="step"):
            if step == 4:
                signal.raise_signal(number)
            finished.append(step)

    with pytest.raises(SystemExit) as stop:
        work()
    assert stop.value.code == 128 + number
    checkpoint = load_checkpoint(run.checkpoint_path)
    assert (checkpoint["step"], checkpoint["finished"]) == (5, False)
    assert checkpoint["state"] == {"finished": [0, 1, 2, 3, 4]}
    assert "stopped at step 5; the same command continues\n" in capsys.readouterr().err


@pytest.mark.parametrize(("unit", "at"), [("step", "1,280"), ("window", "5")])
def test_messages_count_env_steps_as_the_config_does(workplace, capsys, unit, at):
    def work() -> None:
        for step in tiny_run(workplace).loop(9, dict, save_every=100, unit=unit, scale=256):
            assert step == len(steps)
            steps.append(step)
            if step == 4:
                signal.raise_signal(signal.SIGTERM)

    steps = []
    with pytest.raises(SystemExit):
        work()
    assert f"stopped at step {at};" in capsys.readouterr().err
    work()
    assert len(steps) == 9
    assert f"continues from step {at}\n" in capsys.readouterr().out


def test_a_run_whose_terminal_has_gone_saves_and_exits(workplace, monkeypatch):
    """What is written there fails with EIO, as on a terminal that was closed."""

    class Gone:
        def write(self, text: str) -> None:
            raise OSError(errno.EIO, "Input/output error")

        flush = isatty = lambda self: False

    run = tiny_run(workplace)
    monkeypatch.setattr("sys.stderr", Gone())
    steps = run.loop(9, dict, save_every=100, unit="step")
    assert [next(steps), next(steps)] == [0, 1]
    signal.raise_signal(signal.SIGHUP)
    with pytest.raises(SystemExit) as stop:
        next(steps)
    assert stop.value.code == 129
    assert load_checkpoint(run.checkpoint_path)["step"] == 2


def test_a_second_sigterm_is_ignored_and_a_second_ctrl_c_exits_at_once(workplace):
    for number, finished in ((signal.SIGTERM, True), (signal.SIGINT, False)):
        run = tiny_run(workplace, "--exp", number.name)
        steps = run.loop(9, dict, save_every=100, unit="step")
        next(steps)
        signal.raise_signal(number)
        with contextlib.suppress(SystemExit):
            signal.raise_signal(number)
            next(steps)
        steps.close()
        assert run.checkpoint_path.exists() == finished


def test_diff_names_every_changed_leaf():
    old = {"a": 1, "b": {"c": [1, 2], "d": 2}, "gone": 3}
    new = {"a": 1, "b": {"c": [1], "d": 2.5}, "new": None}
    assert diff(old, new) == ["b.c: [1, 2] → [1]", "b.d: 2 → 2.5", "gone: 3 → None"]


# Many saves; a run interrupted so often makes between none and two of them before the next interruption.
