"""Sweeps over the number of labels: what a run trains beside its own policy, alone and when stopped."""

import json
import os
import signal
import subprocess
import sys

import pytest
import torch

from lapo import imitation, stage3_decode, sweep
from lapo.data_loader import Shared, Windows
from lapo.decoding import Fit
from lapo.errors import UserError
from lapo.runs.checkpoints import load_checkpoint
from support import CPU, LAPO, PATIENCE, Workplace, result

SWEEP = "--offline.sweep", "16,8", "--offline.draws", "2"


@pytest.fixture(autouse=True)
def quick_evaluation(monkeypatch):
    """What depends on weights and random numbers as an evaluation does, without playing."""

    def evaluate(policy, cfg, compute) -> dict[str, float]:
        first = next(policy.parameters()).detach().double().sum()
        return {"return_mean": float(first + torch.rand(1)), "return_stderr": 0.5, "episodes": cfg.seed}

    for module in (stage3_decode, sweep):
        monkeypatch.setattr(module, "evaluate_policy", evaluate)


def train(place: Workplace, exp: str, mode: str, *options: str) -> dict:
    """Train a mode on the stages of experiment `main`; returns its checkpoint."""
    words = "--exp", exp, "--stages_from", "main", "--stage3.mode", mode, *options
    stage3_decode.train(place.config(*words))
    return load_checkpoint(place.run_dir(f"stage3_{mode}", exp) / "checkpoint.pt")


@pytest.mark.parametrize("mode", ["offline", "bc", "idm_labelling", "lapo_plus"])
def test_first_draws_equal_runs_of_their_own_bit_for_bit(trained, monkeypatch, mode):
    """In weights, metrics and returns; and so does the run's own training."""
    policies, evaluate = [], sweep.evaluate_policy

    def keeping(policy, *arguments):
        policies.append({key: x.clone() for key, x in policy.state_dict().items()})
        return evaluate(policy, *arguments)

    monkeypatch.setattr(sweep, "evaluate_policy", keeping)
    whole = train(trained, f"{mode}-sweep", mode, *SWEEP)
    results = whole["metrics"].pop("sweep")
    assert [(found["labels"], found["draw"]) for found in results] == [(8, 0), (8, 1), (16, 0), (16, 1)]

    own = train(trained, f"{mode}-own", mode)
    assert whole["metrics"] == own["metrics"]
    assert_equal(whole["state"]["policy"], own["state"]["policy"])
    for labels, trained_policy, found in ((16, policies[0], results[2]), (8, policies[2], results[0])):
        alone = train(trained, f"{mode}-{labels}", mode, "--offline.labels", str(labels))
        assert_equal(trained_policy, alone["state"]["policy"])
        assert found == {"labels": labels, "draw": 0} | alone["metrics"]
    # Other draws have other labels and other weights.
    for first, second in ((0, 1), (2, 3)):
        assert any(not torch.equal(x, policies[second][key]) for key, x in policies[first].items())


def assert_equal(ours: dict, theirs: dict) -> None:
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        assert torch.equal(value, theirs[key]), key


def test_draws_are_of_different_labels_and_all_of_them_are_in_0(trained):
    cfg, shared = trained.config("--stage3.mode", "bc"), Shared()
    drawn = [imitation.labelled(sweep.at(cfg, 16, draw), CPU, shared)[1].tolist() for draw in (0, 1, 2)]
    assert len({tuple(sorted(ids)) for ids in drawn}) == 3
    windows, everything, _ = imitation.labelled(sweep.at(cfg, 0), CPU, shared)
    assert sorted(everything.tolist()) == list(range(len(windows))) == list(range(70))
    metrics = train(trained, "all", "offline", "--offline.sweep", "0")["metrics"]
    assert [(found["labels"], found["all"]) for found in metrics["sweep"]] == [(70, True)]


@pytest.mark.parametrize("mode", ["offline", "lapo_plus"])
def test_frames_are_read_and_labelled_once(trained, monkeypatch, mode):
    """The smallest and largest numbers of labels need as many chunks here as the run's own."""
    read, inferred, original, infer = [], [], Windows.__init__, imitation.infer_latents

    def reading(self, folder, **options):
        read.append(folder.name)
        original(self, folder, **options)

    def inferring(idm, batches, compute):
        la = infer(idm, batches, compute)
        inferred.append(len(la))
        return la

    monkeypatch.setattr(Windows, "__init__", reading)
    monkeypatch.setattr(imitation, "infer_latents", inferring)
    train(trained, f"{mode}-read", mode, "--offline.sweep", "24", "--offline.draws", "3")
    splits = ["test", "train"] if mode == "lapo_plus" else []
    assert sorted(read) == sorted(["train", "test", *splits])
    assert inferred.count(70) == (mode == "lapo_plus")


def test_the_run_s_own_number_is_not_trained_again(trained, monkeypatch):
    steps, original = [], Fit.step
    monkeypatch.setattr(Fit, "step", lambda *arguments: steps.append(original(*arguments)))
    metrics = train(trained, "own-number", "offline", "--offline.sweep", "32", "--offline.draws", "2")[
        "metrics"
    ]
    assert len(steps) == 2 * 20
    first, second = metrics["sweep"]
    assert first == {"labels": 32, "draw": 0} | {k: x for k, x in metrics.items() if k != "sweep"}
    assert second["draw"] == 1


@pytest.mark.parametrize(
    ("mode", "where", "count"),
    [
        ("offline", "step", 10),  # in the run's own training
        ("offline", "step", 40),  # in the last step of the sweep's first
        ("bc", "step", 70),  # in its third
        ("lapo_plus", "step", 60),
        ("idm_labelling", "step", 43),
        ("offline", "evaluate", 1),
        ("offline", "evaluate", 3),
    ],
)
def test_a_stopped_sweep_ends_as_an_uninterrupted_one(trained, monkeypatch, mode, where, count):
    """Stopped in a training, or killed in an evaluation; what is finished is not done again."""
    train(trained, f"{mode}-{where}-{count}-whole", mode, *SWEEP)
    owner, name = (Fit, "step") if where == "step" else (sweep, "evaluate_policy")
    calls, original = [], getattr(owner, name)

    def stopping(*arguments):
        calls.append(None)
        if len(calls) == count:
            if where == "evaluate":
                raise KeyboardInterrupt
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*arguments)

    monkeypatch.setattr(owner, name, stopping)
    exp = f"{mode}-{where}-{count}"
    with pytest.raises((SystemExit, KeyboardInterrupt)):
        train(trained, exp, mode, *SWEEP)
    assert len(calls) == count
    train(trained, exp, mode, *SWEEP)
    total = 5 * (34 if mode == "lapo_plus" else 20) if where == "step" else 4 + 1
    assert len(calls) == total
    stage = f"stage3_{mode}"
    assert result(trained.run_dir(stage, exp)) == result(trained.run_dir(stage, f"{exp}-whole"))


def test_too_many_labels_are_refused_before_anything_is_trained(trained):
    with pytest.raises(UserError, match=r"offline\.sweep is 71, but .* has 70 windows; lower it"):
        train(trained, "too-many", "offline", "--offline.sweep", "8,71")
    assert not (trained.run_dir("stage3_offline", "too-many") / "checkpoint.pt").exists()


@pytest.mark.parametrize(("numbers", "first"), [("8,24", 24), ("0,24", 0), ("8", None)])
def test_the_training_of_most_labels_is_tried_first(trained, monkeypatch, numbers, first):
    """0 is all of them."""
    asked = []
    monkeypatch.setattr(sweep, "labelled", lambda cfg, *_: asked.append(cfg.offline.labels))
    cfg = trained.config("--offline.labels", "16", "--offline.sweep", numbers)
    sweep.check_labels(cfg, CPU, Shared())
    assert asked == ([] if first is None else [first])


def test_the_real_command_and_what_reads_its_results(trained):
    options = "--exp", "command", "--stages_from", "main"
    done = trained.run("stage3.py", *options, "--stage3.mode", "offline", *SWEEP)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("test: 40 frames") == 1
    assert "8 labels, draw 1, return " in done.stdout
    assert "  sweep                        4 results\n" in done.stdout
    out = trained.folder / "compared"
    words = "--exp", "command", "--results_dir", str(trained.results), "--out", str(out)
    command = [sys.executable, str(LAPO / "results.py"), *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    rows = json.loads((out / "results.json").read_text())["rows"]
    assert [row["labels"] for row in rows] == [8, 16, 32]
    done = trained.run("report.py", *options)
    assert done.returncode == 0, done.stderr
    assert "LAPO offline" in done.stdout
