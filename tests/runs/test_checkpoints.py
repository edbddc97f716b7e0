"""Checkpoints: what is read, what is refused, and how an earlier stage is found."""

import contextlib
import errno
import pickle
import random
import sys
import zipfile
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lapo.errors import UserError
from lapo.runs.checkpoints import FIELDS, FORMAT, load_checkpoint, load_stage
from support import Trap, Workplace, leaves, tiny_run


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A good checkpoint."""
    run = tiny_run(Workplace(tmp_path_factory.mktemp("good")))
    run.save({"weights": torch.arange(733.0), "moments": [torch.ones(3, dtype=torch.bfloat16)]})
    return run.checkpoint_path


def test_a_missing_checkpoint_names_the_command_that_produces_it(workplace, monkeypatch):
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "stage3.py",
            "--exp",
            "ma in",
            "--decoder.hidden",
            "64",
            "32",
            "--stage3.mode=online",
            "--preset",
            "demo",
        ],
    )
    path = workplace.run_dir("stage1") / "checkpoint.pt"
    with pytest.raises(UserError, match=r"checkpoint\.pt does not exist$"):
        load_checkpoint(path)
    with pytest.raises(UserError) as error:
        load_stage(workplace.config("--seed", "0"), "stage1", "stage1.py")
    assert f"{path} does not exist" in str(error.value)
    assert "`python stage1.py --exp 'ma in' --preset demo`" in str(error.value)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (MemoryError(), "too little memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to"), "too little memory"),
        (OSError(errno.EIO, "Input/output error"), "Input/output error"),
    ],
)
def test_what_keeps_a_checkpoint_from_being_read_is_not_called_damage(checkpoint, monkeypatch, error, reason):
    monkeypatch.setattr(torch, "load", Mock(side_effect=error))
    with pytest.raises(UserError) as refusal:
        load_checkpoint(checkpoint)
    assert str(refusal.value).startswith(f"{checkpoint} could not be read ({reason}); it may be intact")
    assert "delete" not in str(refusal.value)


def test_an_earlier_stage_with_other_visuals_is_refused(workplace):
    run = tiny_run(workplace)
    run.finish({})
    load_stage(run.cfg, "stage1", "stage1.py")
    with pytest.raises(UserError, match=r"with visuals full, but visuals is plain; choose --visuals full"):
        load_stage(workplace.config("--visuals", "plain"), "stage1", "stage1.py")


def test_an_unfinished_stage_names_the_command_that_resumes_it(workplace):
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
    with pytest.raises(UserError, match=r"checkpoint.pt is damaged, or was not written by lapo"):
        load_checkpoint(path)
    assert not (tmp_path / "executed").exists()


@pytest.mark.slow
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


@pytest.mark.slow
@settings(max_examples=200)
@given(data=st.data())
def test_a_forged_checkpoint_is_refused_or_read_correctly(checkpoint, tmp_path_factory, data):
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
            others = [x for x in (None, "x", 1.5, [], {}, torch.ones(2)) if type(x) is not type(changed[key])]
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
