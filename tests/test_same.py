"""same.py: what it takes for equal, and that it says what differs."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

import same


def run_folder(folder: Path, lines: list[dict], state: dict) -> Path:
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    torch.save({"state": state}, folder / "checkpoint.pt")
    return folder


LINES = [
    {"step": 1, "loss": 0.5, "seconds": 1.0},
    {"step": 2, "loss": 0.25, "vq_loss": 0.125, "seconds": 9.0},
]
STATE = {
    "idm": {"weight": torch.ones(3)},
    "order": {"windows": 7, "on the device": "all frames"},
    "pairs": [None],
}


def test_all_numbers_of_a_run_are_compared_but_the_time_taken(tmp_path):
    found = same.numbers(run_folder(tmp_path / "run", LINES, STATE))
    assert sorted(found) == [
        *("metrics 1.loss", "metrics 1.step", "metrics 2.loss", "metrics 2.step", "metrics 2.vq_loss"),
        *("state.idm.weight", "state.order.on the device", "state.order.windows"),
    ]
    assert found["metrics 2.vq_loss"] == 0.125
    assert {key: float(value) for key, value in same.first_losses(tmp_path / "run").items()} == {
        "loss": 0.5,
        "vq_loss": 0.125,
    }


@pytest.mark.parametrize(
    ("a", "b", "distance"),
    [
        (np.ones(4), np.ones(4), 0.0),
        (np.array([1.0, np.nan]), np.array([1.0, np.nan]), 0.0),
        (np.array([3.0, 4.0]), np.array([3.0, 0.0]), 0.8),
        (np.array(0.0), np.array(-0.0), np.finfo(float).eps),  # not the same bits
        (np.array(1.0), np.array(np.nan), math.inf),
        (np.ones(4), np.ones(5), math.inf),
        (np.ones(4), np.ones(4, np.float32), math.inf),
        (np.array("all frames"), np.array("some frames"), math.inf),
        (np.array("all frames"), np.array("all frames"), 0.0),
    ],
)
def test_distance(a, b, distance):
    assert same.distance(a, b) == pytest.approx(distance)


def test_one_bit_is_a_difference_unless_tolerated(capsys):
    base = {"loss": np.array(1.0), "old_name": np.array(2.0), "text": np.array("a")}
    here = {"loss": np.nextafter(np.array(1.0), 2), "new_name": np.array(2.0), "text": np.array("a")}
    assert same.agree("run", base, here) == (False, 2)
    assert capsys.readouterr().out.splitlines() == [
        "run: DIFFERENT, 2 compared, differing by 2.2e-16 at most",
        "    loss: 2.2e-16",
        "    only in one of the two (2): new_name, old_name",
    ]
    assert same.agree("run", base, here, 1e-9) == (True, 2)


def test_nothing_in_common_is_no_agreement():
    assert same.agree("run", {"a": np.array(1.0)}, {"b": np.array(1.0)}) == (False, 2)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["no-such-revision"], "error: there is no revision no-such-revision"),
        ([], "error: name a revision to compare with, as in: make same BASE=HEAD~1"),
    ],
)
def test_a_mistake_is_one_sentence(monkeypatch, capsys, arguments, sentence):
    monkeypatch.setattr("sys.argv", ["same.py", *arguments])
    with pytest.raises(SystemExit) as stop:
        same.main()
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith(sentence)


def test_a_chunk_is_cut_without_loss(tmp_path):
    arrays = {"obs": np.arange(50 * 6).reshape(50, 6), "ta": np.arange(50)}
    np.savez(tmp_path / "0.npz", **arrays)
    same.cut_chunks(tmp_path)
    parts = [np.load(tmp_path / f"{number}.npz") for number in range(3)]
    assert [len(part["ta"]) for part in parts] == [20, 20, 10]
    for key, whole in arrays.items():
        assert np.array_equal(np.concatenate([part[key] for part in parts]), whole)
