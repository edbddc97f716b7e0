"""The checks of `make gpu`, as far as a CPU can try them: that they run, and that they can fail."""

import json

import pytest
import torch

from lapo import stage1_idm_wm
from lapo.benchmarks import gpu
from lapo.benchmarks.gpu_speed import Bench
from support import ROOT

COMPILED_AS_EAGER = [name for name in gpu.CHECKS if "compiled" in name or "cudnn" in name]
"""In a dry run nothing is compiled: these checks do what others have done."""


@pytest.mark.slow
def test_all_checks_hold_in_a_dry_run(call_main, tmp_path):
    path, chosen = tmp_path / "gpu.json", [name for name in gpu.CHECKS if name not in COMPILED_AS_EAGER]
    status, out, err = call_main(gpu.main, "--dry", "--json", str(path), "--only", *chosen)
    assert status == 0, out + err
    *lines, last = out.splitlines()
    assert [line[7:].split(" (")[0] for line in lines if line.startswith("ok ")] == chosen
    assert last.startswith(f"0 of {len(chosen)} failed; ")
    results = json.loads(path.read_text())
    assert list(results) == chosen
    assert {result["verdict"] for result in results.values()} == {"ok"}
    assert results["stage 1, graphs"]["found"]["ms"] > 0
    assert -10 < results["a real run"]["found"]["return"] < 20


def test_the_results_of_a_card_are_those_of_all_checks_but_the_ones_that_had_no_time():
    results = json.loads((ROOT / "docs" / "gpu.json").read_text())
    assert gpu.CHECKS.keys() - results.keys() == {"a real run", "cudnn.benchmark in stage 1"}
    assert results.keys() - gpu.CHECKS.keys() == set()
    assert {result["verdict"] for result in results.values()} == {"ok"}


def test_only_what_is_named_is_checked(call_main, monkeypatch):
    monkeypatch.setattr(gpu, "CHECKS", {"one, a": lambda bench: "ok", "one, b": lambda bench: 1, "two": None})
    status, out, _ = call_main(gpu.main, "--dry", "--only", "one")
    assert status == 0
    assert [line[7:12] for line in out.splitlines()[:2]] == ["one, ", "one, "]
    status, out, err = call_main(gpu.main, "--dry", "--only", "three")
    assert (status, out) == (2, "")
    assert err == "error: --only three names no check; there are: one, a, one, b, two\n"


def test_without_a_cuda_device_there_is_nothing_to_check(call_main, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    status, out, err = call_main(gpu.main)
    assert (status, out) == (2, "")
    assert err == "error: PyTorch finds no CUDA device that it can use; --dry tests the checks on the CPU\n"


def test_a_check_that_fails_is_named_and_the_others_go_on(tmp_path, capsys):
    def fails(bench: Bench) -> None:
        raise RuntimeError("CUDA error: an illegal memory access")

    path, checks = tmp_path / "gpu.json", {"first": fails, "second": lambda bench: "fine"}
    assert gpu.run_checks(Bench.make(dry=True), checks, path) == ["first"]
    results = json.loads(path.read_text())
    assert [(x["verdict"], x["found"]) for x in results.values()] == [
        ("FAILED", "RuntimeError: CUDA error: an illegal memory access"),
        ("ok", "fine"),
    ]
    assert capsys.readouterr().out.splitlines()[-1].startswith("1 of 2 failed: first; ")


@pytest.mark.parametrize(
    ("check", "kind"), [(gpu.gather_large, gpu.CountedWindows), (gpu.rolling, gpu.RollingWindows)]
)
def test_wrong_frames_are_noticed(monkeypatch, check, kind):
    monkeypatch.setattr(kind, "gather", lambda self, ids: gpu.Windows.gather(self, ids.roll(1)))
    with pytest.raises(gpu.CheckError, match="wrong frames"):
        check(Bench.make(dry=True))


def test_other_gradients_are_noticed(monkeypatch):
    calls = []

    def first_step(cfg, compute):
        calls.append(compute)
        return torch.ones(3) * (1 if len(calls) == 1 else 1.01)

    monkeypatch.setattr(gpu, "first_step", first_step)
    with pytest.raises(gpu.CheckError, match=r"in fp32, the gradients differ by 1\.0e-02"):
        gpu.same_as_cpu(Bench.make(dry=True))


def test_a_learning_rate_that_moved_is_noticed(monkeypatch):
    load = stage1_idm_wm.Trainer.load_state_dict

    def forgets_the_optimiser(self, state):
        fresh = self.optimizer.state_dict()
        load(self, state)
        self.optimizer.load_state_dict(fresh)

    monkeypatch.setattr(stage1_idm_wm.Trainer, "load_state_dict", forgets_the_optimiser)
    with pytest.raises(gpu.CheckError, match="the weights differ"):
        gpu.resumed(Bench.make(dry=True))


def test_graphs_that_compute_something_else_are_noticed():
    def train(bench: Bench, compute: object) -> list[torch.Tensor]:
        calls.append(compute)
        return [torch.ones(3) + 1e-3 * (len(calls) == 3)]  # the third one has graphs

    calls = []
    with pytest.raises(
        gpu.CheckError, match=r"results differ by 1\.0e-03, those of two equal runs by 0\.0e\+00"
    ):
        gpu.graphs_equal_eager(Bench.make(dry=True), train, compiled=False)
