"""Runs: what they save, what they refuse, and that a stopped one continues as if nothing had happened."""

import contextlib
import hashlib
import json
import multiprocessing
import os
import pickle
import random
import resource
import shutil
import signal
import sys
import time
import zipfile
from functools import partial
from multiprocessing import forkserver
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from lapo import stage1_idm_wm, stage2_bc, stage3_decode
from lapo.config import diff, to_dict
from lapo.errors import UserError, run_main
from lapo.runs.checkpoints import FIELDS, FORMAT, load_checkpoint, load_stage
from lapo.runs.compute import Compute
from lapo.runs.files import atomic_write
from lapo.runs.run import EXPLODED, Run
from lapo.runs.tracking import NoTracking
from support import INTERRUPTIONS, PATIENCE, ROOT, Trap, Workplace, largest_file, save_half

CPU = Compute(torch.device("cpu"), bf16=False, compile=False)


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Bytes and time of change of all files below a folder."""
    return {
        str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file()
    }


def leaves(values: Any, key: str = "") -> dict[str, Any]:
    """All that nested dicts, lists and tuples hold, by its path; tensors by a checksum of their bytes."""
    if isinstance(values, torch.Tensor):
        content = values.reshape(-1).view(torch.uint8).numpy().tobytes()
        return {key: (values.dtype, values.shape, hashlib.sha256(content).hexdigest())}
    if isinstance(values, dict):
        values = list(values.items())
    elif isinstance(values, list | tuple):
        values = list(enumerate(values))
    else:
        return {key: values}
    return {path: leaf for name, value in values for path, leaf in leaves(value, f"{key}.{name}").items()}


# ---------------------------------------------------------------- files


def test_atomic_write_replaces_the_file_once_it_is_whole(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def write(part: Path) -> None:
        assert path.read_text() == "old"
        part.write_text("new")

    atomic_write(path, write, verify=lambda part: part.read_text() == "new" or pytest.fail("not yet there"))
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def full_disk(part: Path) -> None:
    part.write_text("half of")
    raise OSError(28, "No space left on device")


def unreadable(part: Path) -> None:
    raise UserError(f"{part} is damaged")


@pytest.mark.parametrize(
    ("write", "verify"), [(full_disk, None), (lambda part: part.write_text("new"), unreadable)]
)
def test_a_failed_write_keeps_what_was_there(tmp_path, write, verify):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(UserError, match=r"cannot write .*file \(.*\); what was there before is kept"):
        atomic_write(path, write, verify)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


# ---------------------------------------------------------------- one run


def tiny_run(workplace: Workplace, *arguments: str) -> Run:
    return Run(workplace.config(*arguments), "stage1", ("model", "stage1"), CPU)


def logged(folder: Path) -> list[dict]:
    """Lines of metrics.jsonl, without the time they took."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key != "seconds"} for line in lines]


def result(folder: Path) -> dict[str, Any]:
    """A run's checkpoint but for what made it, and its lines of metrics."""
    checkpoint = load_checkpoint(folder / "checkpoint.pt")
    del checkpoint["provenance"], checkpoint["config"]["exp"]
    return leaves({"checkpoint": checkpoint, "metrics": logged(folder)})


def test_a_save_that_the_disk_refuses_keeps_the_previous_checkpoint(workplace):
    run = tiny_run(workplace)
    run.step = 1
    run.save({"weights": torch.ones(100)})
    run.step = 2
    with (
        largest_file(1_000_000),
        pytest.raises(UserError, match=r"cannot write .*; what was there before is kept"),
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
            r"cannot write .*checkpoint\.pt .*; [\d.,]+ MB are free there\); what was there before is kept",
        ),
    ],
)
def test_a_run_on_a_full_disk_ends_as_any_other_once_there_is_room(trained, monkeypatch, method, message):
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
def test_what_explodes_stops_the_run_and_keeps_the_checkpoint(workplace, key):
    run = tiny_run(workplace)
    run.track({key: torch.tensor(0.9 * EXPLODED), "unexplained_variance": 1e9})
    run.log(6)
    run.save({"weights": torch.ones(1)})
    before = run.checkpoint_path.read_bytes()
    run.track({key: torch.tensor(2 * EXPLODED)})
    with pytest.raises(
        UserError, match=rf"stage1: {key} is 2e\+06 at step 8; the last good checkpoint, .*kept"
    ):
        run.log(8)
    run.step = 7
    with pytest.raises(UserError, match=rf"{key} is 2e\+06 at step 7"):  # though no line was due yet
        run.save({"weights": torch.ones(1)})
    assert run.checkpoint_path.read_bytes() == before


def test_training_that_explodes_stops_at_the_next_line(workplace):
    schedule = ["--stage1.lr", "1", "--stage1.log_every", "1", "--stage1.save_every", "1"]
    with pytest.raises(
        UserError,
        match=r"stage1: loss is \S+e\+\d+ and \w+_loss is .* at step \d; .* try a lower learning rate",
    ):
        stage1_idm_wm.train(workplace.config(*schedule))
    assert all(abs(line.get("loss", 0)) < EXPLODED for line in logged(workplace.run_dir("stage1")))


def test_all_terms_that_are_no_good_are_named(workplace):
    run = tiny_run(workplace)
    run.track({"loss": torch.tensor(2e7), "wm_loss": 0.1, "vq_loss": 2e7})
    with pytest.raises(UserError, match=r"^stage1: loss is 2e\+07 and vq_loss is 2e\+07 at step 7;"):
        run.log(7)


def test_a_continued_run_is_the_same_run_to_wandb(workplace, monkeypatch):
    asked, tracking = [], NoTracking()
    tracking.id = "abc123"
    monkeypatch.setattr(
        "lapo.runs.run.start_wandb", lambda cfg, stage, folder, id: asked.append(id) or tracking
    )
    tiny_run(workplace).save({})
    tiny_run(workplace)
    assert asked == [None, "abc123"]


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
    with pytest.raises(UserError, match=r"another process is at work on .*stage1; wait for it"):
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


def test_loop_gives_signals_back_when_it_ends(workplace):
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    for _ in tiny_run(workplace).loop(2, dict, save_every=9, unit="step"):
        assert signal.getsignal(signal.SIGTERM) not in handlers
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == handlers


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_lets_the_step_end_saves_and_exits(workplace, capsys, number, code):
    run = tiny_run(workplace)
    finished = []

    def work() -> None:
        for step in run.loop(9, lambda: {"finished": finished}, save_every=100, unit="step"):
            if step == 4:
                signal.raise_signal(number)
            finished.append(step)

    with pytest.raises(SystemExit) as stop:
        work()
    assert stop.value.code == code
    checkpoint = load_checkpoint(run.checkpoint_path)
    assert (checkpoint["step"], checkpoint["finished"]) == (5, False)
    assert checkpoint["state"] == {"finished": [0, 1, 2, 3, 4]}
    assert "stopped at step 5; the same command continues\n" in capsys.readouterr().err


def test_sigterm_again_leaves_the_step_its_time_and_ctrl_c_again_does_not(workplace):
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


# ---------------------------------------------------------------- checkpoints that are no good


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A good checkpoint."""
    run = tiny_run(Workplace(tmp_path_factory.mktemp("good")))
    run.save({"weights": torch.arange(733.0), "moments": [torch.ones(3, dtype=torch.bfloat16)]})
    return run.checkpoint_path


def test_a_missing_checkpoint_names_the_command_that_makes_it(workplace, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["stage2.py", "--exp", "ma in", "--preset", "demo"])
    path = workplace.run_dir("stage1") / "checkpoint.pt"
    with pytest.raises(UserError, match=r"checkpoint\.pt does not exist$"):
        load_checkpoint(path)
    with pytest.raises(UserError) as error:
        load_stage(workplace.config("--seed", "0"), "stage1", "stage1.py")
    assert f"{path} does not exist" in str(error.value)
    assert "`python stage1.py --exp 'ma in' --preset demo`" in str(error.value)


def test_an_earlier_stage_that_saw_the_game_otherwise_is_refused(workplace):
    run = tiny_run(workplace)
    run.finish({})
    load_stage(run.cfg, "stage1", "stage1.py")
    with pytest.raises(UserError, match=r"with visuals full, but visuals is plain; choose --visuals full"):
        load_stage(workplace.config("--visuals", "plain"), "stage1", "stage1.py")


def test_an_unfinished_stage_names_the_command_that_continues_it(workplace):
    run = tiny_run(workplace)
    run.step = 3
    run.save({})
    with pytest.raises(UserError, match=r"is unfinished, at step 3; continue it with `python stage1.py"):
        load_stage(run.cfg, "stage1", "stage1.py")


def test_a_checkpoint_of_another_format_is_refused(tmp_path):
    for saved, found in (({"format": 99}, "99"), ({"weights": 1}, "None"), ([1, 2], "'list'")):
        torch.save(saved, tmp_path / "checkpoint.pt")
        with pytest.raises(
            UserError, match=f"has format {found}; this version of lapo reads format {FORMAT}"
        ):
            load_checkpoint(tmp_path / "checkpoint.pt")


@pytest.mark.parametrize("save", [torch.save, lambda trap, path: path.write_bytes(pickle.dumps(trap))])
def test_code_in_a_checkpoint_is_not_executed(tmp_path, save):
    path = tmp_path / "checkpoint.pt"
    save(Trap(tmp_path / "executed"), path)
    with pytest.raises(UserError, match=r"checkpoint.pt cannot be read: damaged, or not one of ours"):
        load_checkpoint(path)
    assert not (tmp_path / "executed").exists()


def test_a_damaged_checkpoint_is_refused_or_read_correctly(checkpoint, tmp_path):
    whole, content = load_checkpoint(checkpoint), checkpoint.read_bytes()
    draw = random.Random(0)
    refused = 0
    for _ in range(300):
        damaged = bytearray(content)
        if draw.random() < 0.2:
            damaged = damaged[: draw.randrange(len(damaged))]
        else:
            for _ in range(draw.choice([1, 1, 5])):
                damaged[draw.randrange(len(damaged))] ^= draw.randrange(1, 256)
        path = tmp_path / "checkpoint.pt"
        path.write_bytes(damaged)
        try:
            read = load_checkpoint(path)
        except UserError:
            refused += 1
        else:
            assert leaves(read) == leaves(whole)
    assert refused > 100


def rewrite_pickle(path: Path, old: bytes, new: bytes) -> None:
    """Replace all `old` by `new` in what a checkpoint says of its tensors, leaving an intact zip file."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content.replace(old, new) if name.endswith("data.pkl") else content)


def as_pickled(number: int) -> bytes:
    return pickle.dumps(number, 2)[2:-1]  # without the frame of a pickle of its own


@settings(max_examples=200)
@given(data=st.data())
def test_a_checkpoint_that_lies_is_refused_or_read_correctly(checkpoint, tmp_path_factory, data):
    """Objects, missing fields, wrong types and huge tensors in an intact file; nothing is executed."""
    folder = tmp_path_factory.getbasetemp() / "lies"
    folder.mkdir(exist_ok=True)
    path, mark = folder / "checkpoint.pt", folder / "executed"
    whole, changed = load_checkpoint(checkpoint), torch.load(checkpoint)
    key = data.draw(st.sampled_from([*FIELDS]))
    kind = data.draw(st.sampled_from(["object", "missing", "field", "tensor", "storage", "size", "pickle"]))
    match kind:
        case "object":
            thing = data.draw(st.sampled_from([Trap(mark), Path(), np.float64(1), whole.keys, random.Random]))
            holder = data.draw(st.sampled_from([changed, changed["state"], changed["metrics"]]))
            holder[data.draw(st.sampled_from([key, "weights"]))] = thing
        case "missing":
            del changed[key]
        case "field":
            others = [x for x in (None, "x", 1.5, [], {}, torch.ones(2)) if not isinstance(x, FIELDS[key])]
            changed[key] = data.draw(st.sampled_from(others))
        case "tensor":
            dtype = data.draw(st.sampled_from([torch.float64, torch.float16, torch.int32, torch.bool]))
            weights = whole["state"]["weights"]
            others = [weights.to(dtype), weights[:-1], weights[None], weights[::2]]
            changed["state"]["weights"] = data.draw(st.sampled_from(others))
    torch.save(changed, path)
    match kind:
        case "storage":
            names = [b"Float", b"BFloat16", b"Byte", b"Int", b"Double", b"Half", b"ComplexFloat"]
            old, new = data.draw(st.sampled_from(names[:3])), data.draw(st.sampled_from(names))
            rewrite_pickle(path, b"torch\n%bStorage\n" % old, b"torch\n%bStorage\n" % new)
        case "size":
            sizes = [-1, 0, 1, 732, 734, 2**16, 2**31, 10**12, 2**62, 2**64]
            parts = [as_pickled(733) + b"t", as_pickled(733) + b"\x85"]  # of the storage, of the tensor
            chosen = data.draw(st.lists(st.sampled_from(parts), min_size=1, unique=True))
            size = data.draw(st.sampled_from(sizes))
            for part in chosen:
                rewrite_pickle(path, part, as_pickled(size) + part[-1:])
        case "pickle":
            path.write_bytes(pickle.dumps(changed | {key: Trap(mark)}))
    read, message = None, ""
    try:
        read = load_checkpoint(path)
    except UserError as error:
        message = str(error)
    assert not mark.exists()
    assert read or (message.startswith(f"the checkpoint {path} ") and "\n" not in message)
    if read:
        assert leaves(read) == leaves(whole)


def test_a_member_marked_as_a_folder_is_not_memory_that_was_never_written(checkpoint, tmp_path):
    """Torch's zip reader takes such a member for read and leaves its buffer as it was."""
    whole, path = load_checkpoint(checkpoint), tmp_path / "checkpoint.pt"
    with zipfile.ZipFile(checkpoint) as archive:
        directory, members = archive.start_dir, archive.infolist()
    content = bytearray(checkpoint.read_bytes())
    entry = directory
    for member in members:
        content[entry + 38] ^= 0x10
        path.write_bytes(content)
        with contextlib.suppress(UserError):
            assert leaves(load_checkpoint(path)) == leaves(whole), member.filename
        content[entry + 38] ^= 0x10
        entry = content.index(b"PK", entry + 46)
    assert entry > directory


# ---------------------------------------------------------------- stages that are stopped


STAGES = {
    "stage1": (stage1_idm_wm, []),
    "stage2": (stage2_bc, []),
    "stage3_online": (stage3_decode, ["--stage3.mode", "online"]),
    "stage3_scratch": (stage3_decode, ["--stage3.mode", "scratch"]),
}


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_a_finished_run_says_so_and_changes_nothing(trained, capsys, stage):
    before = contents(trained.results)
    STAGES[stage][0].train(trained.config())
    out = capsys.readouterr().out
    assert "finished already, at step 8\n" in out
    assert out.endswith(f"{stage} done: {trained.run_dir(stage) / 'checkpoint.pt'}\n")
    assert contents(trained.results) == before


@pytest.mark.parametrize(
    ("stage", "change", "line"),
    [
        ("stage1", ["--stage1.lr", "0.5"], "stage1.lr: 0.0003 → 0.5"),
        ("stage1", ["--vq.start", "data"], "vq.start: published → data"),
        ("stage1", ["--data.skip_resets", "false"], "data.skip_resets: True → False"),
        ("stage2", ["--stage2.steps", "9"], "stage2.steps: 8 → 9"),
        ("stage2", ["--precision", "bf16"], "precision: fp32 → bf16"),
    ],
)
def test_a_run_with_other_settings_is_refused_with_the_difference_and_two_ways_out(
    trained, stage, change, line
):
    before = contents(trained.results)
    folder = trained.run_dir(stage)
    with pytest.raises(UserError) as error:
        STAGES[stage][0].train(trained.config(*change))
    message = f"{folder} was made with other settings ({line}); choose another --exp, or delete {folder}"
    assert str(error.value) == message
    assert contents(trained.results) == before


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_a_finished_run_needs_no_data_any_more(trained, tmp_path, capsys, stage):
    STAGES[stage][0].train(trained.config("--data_dir", str(tmp_path / "gone")))
    assert "finished already" in capsys.readouterr().out


def test_settings_that_a_stage_does_not_read_and_the_place_of_the_data_may_change(trained, tmp_path, capsys):
    shutil.copytree(trained.data, tmp_path / "moved")
    arguments = ["--data_dir", str(tmp_path / "moved"), "--stage3.steps", "5", "--device", "auto"]
    stage1_idm_wm.train(trained.config(*arguments))
    assert "finished already" in capsys.readouterr().out


@pytest.fixture(scope="module")
def server() -> multiprocessing.context.BaseContext:
    """Makes processes that have everything imported, so that many can be started and killed."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["preloaded"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests")]))
        patch.setenv("OMP_NUM_THREADS", "1")
        forkserver.ensure_running()
    process = context.Process(target=abs, args=(0,))
    process.start()
    process.join()  # now the server has imported what there is to import
    return context


# Many saves; a run interrupted so often makes between none and two of them before the next interruption.
LONGER = [
    *(f"--stage1.steps={4 * INTERRUPTIONS}", "--stage1.save_every=2"),
    *(f"--stage2.steps={4 * INTERRUPTIONS}", "--stage2.save_every=2"),
    *(f"--stage3.steps={64 * INTERRUPTIONS}", "--stage3.save_every=1"),
]
SAVE = "checkpoint.pt.part"
"""The file that is there during a save, and stays if the process is killed then."""


class Command:
    """A stage's command as experiment `exp`, run in processes of its own until it has finished."""

    def __init__(self, workplace: Workplace, stage: str, exp: str):
        module, arguments = STAGES[stage]
        self.main = partial(module.train, workplace.config("--exp", exp, *LONGER, *arguments))
        self.folder = workplace.run_dir(stage, exp)
        workplace.branch(exp, *(earlier for earlier in ("stage1", "stage2") if earlier < stage))

    def run(
        self,
        server: multiprocessing.context.BaseContext,
        stop: str = "",
        times: int = 0,
        duration: float = 0.0,
    ) -> tuple[list[int], int]:
        """Run again and again; the first `times` processes are stopped by `kill` or `terminate`: during a
        save, soon after one, or soon after the start of a run that takes `duration` seconds.

        A process that is killed during a save waits for it; any other may have finished before it is stopped,
        where the machine is busy. Returns the exit codes, and how many saves were broken off.
        """
        moments = random.Random(self.folder.name)
        files = [SAVE, "config.yaml", SAVE, "checkpoint.pt"]  # every start writes the configuration
        codes, broken = [], 0
        while 0 not in codes:
            before = self.written()
            file = files[len(codes) % len(files)] if len(codes) < times else None
            main = partial(save_half, self.main) if file == SAVE and stop == "kill" else self.main
            process = server.Process(target=run_main, args=(main,))
            process.start()
            if file:
                while process.is_alive() and self.written().get(file) in (None, before.get(file)):
                    time.sleep(0.001)
                if file != SAVE:
                    process.join(moments.uniform(0, duration / (2 * INTERRUPTIONS)))
                getattr(process, stop)()
            process.join(PATIENCE)
            assert process.exitcode is not None, "it takes too long"
            codes.append(process.exitcode)
            broken += self.written().get(SAVE) not in (None, before.get(SAVE))
        return codes, broken

    def written(self) -> dict[str, int]:
        """When each of the run's files was put in place."""
        with contextlib.suppress(FileNotFoundError):  # of a temporary file, between the listing and the look
            return {path.name: path.stat().st_mtime_ns for path in self.folder.glob("*")}
        return self.written()

    def result(self) -> dict[str, Any]:
        """See the function of this name."""
        return result(self.folder)


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_stopped_at_random_moments_ends_as_an_uninterrupted_one(trained, server, stage):
    """Bit for bit: all tensors of the final checkpoint, and all lines of metrics."""
    whole = Command(trained, stage, f"{stage}-whole")
    started = time.monotonic()
    assert whole.run(server) == ([0], 0)
    duration = time.monotonic() - started

    for stop, code, times in (
        ("kill", -signal.SIGKILL, INTERRUPTIONS),
        ("terminate", 128 + signal.SIGTERM, INTERRUPTIONS // 2 + 1),
    ):
        command = Command(trained, stage, f"{stage}-{stop}")
        codes, broken = command.run(server, stop, times, duration)
        print(f"{stage}: {len(codes) - 1} times {stop}, {broken} of them during a save")
        assert set(codes[:-1]) == {code}
        assert (broken > 0) == (stop == "kill")
        assert command.result() == whole.result()


@pytest.mark.parametrize("mode", ["bc", "scratch"])
def test_a_run_stopped_while_it_is_judged_ends_as_an_uninterrupted_one(trained, monkeypatch, mode):
    arguments = ["--stage3.mode", mode, "--stage3.steps", "64"]
    whole, stopped = f"judged-{mode}", f"stopped-{mode}"
    stage3_decode.train(trained.config("--exp", whole, *arguments))
    with monkeypatch.context() as patch:
        patch.setattr(stage3_decode, "score", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            stage3_decode.train(trained.config("--exp", stopped, *arguments))
    stage3_decode.train(trained.config("--exp", stopped, *arguments))
    stage = f"stage3_{mode}"
    assert result(trained.run_dir(stage, stopped)) == result(trained.run_dir(stage, whole))
