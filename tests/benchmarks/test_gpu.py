"""The checks of `make gpu`, as far as a CPU can try them: that they run, and that they can fail."""

import json

import pytest
import torch

from lapo.benchmarks import gpu
from lapo.benchmarks.gpu import Bench


@pytest.mark.slow
def test_all_checks_hold_in_a_dry_run(call_main, tmp_path):
    path = tmp_path / "gpu.json"
    status, out, err = call_main(gpu.main, "--dry", "--json", str(path))
    assert status == 0, out + err
    assert [line.split(" (")[0] for line in out.splitlines()[:-1]] == list(gpu.CHECKS)
    assert out.splitlines()[-1].startswith(f"0 of {len(gpu.CHECKS)} failed; ")
    results = json.loads(path.read_text())
    assert results.keys() == gpu.CHECKS.keys()
    assert results["stage 1"]["compiled"]["ms"] > 0


def test_without_a_cuda_device_there_is_nothing_to_check(call_main, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    status, out, err = call_main(gpu.main)
    assert (status, out) == (2, "")
    assert err == "error: PyTorch finds no CUDA device that it can use; --dry tries the checks on the CPU\n"


def test_a_check_that_fails_is_named_and_the_others_go_on(monkeypatch, capsys):
    def fails(bench: Bench) -> None:
        raise RuntimeError("CUDA error: an illegal memory access")

    monkeypatch.setattr(gpu, "CHECKS", {"first": fails, "second": lambda bench: "ok"})
    results, failed = gpu.check(Bench.make(dry=True))
    assert failed == ["first"]
    assert results == {"first": "FAILED RuntimeError: CUDA error: an illegal memory access", "second": "ok"}
    assert capsys.readouterr().out.splitlines()[-1].startswith("1 of 2 failed: first; ")


@pytest.mark.parametrize(
    ("check", "kind"), [(gpu.gather_far, gpu.CountedWindows), (gpu.rolling, gpu.RollingWindows)]
)
def test_wrong_frames_are_noticed(monkeypatch, check, kind):
    monkeypatch.setattr(kind, "gather", lambda self, ids: gpu.Windows.gather(self, ids.roll(1)))
    with pytest.raises(gpu.CheckError, match="other frames"):
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
    load = gpu.stage1_idm_wm.Trainer.load_state_dict

    def forgets_the_optimiser(self, state):
        fresh = self.optimizer.state_dict()
        load(self, state)
        self.optimizer.load_state_dict(fresh)

    monkeypatch.setattr(gpu.stage1_idm_wm.Trainer, "load_state_dict", forgets_the_optimiser)
    with pytest.raises(gpu.CheckError, match="the weights differ"):
        gpu.continued(Bench.make(dry=True))
