"""What every stage trains with: schedules, optimisers, seeds, devices and precision."""

import platform
import random
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lapo.config import Config, load_config
from lapo.errors import UserError
from lapo.models import make_idm, make_world_model, stack_frames
from lapo.runs import compute as training
from lapo.runs.compute import Compute, rng_state, seed_everything, set_rng_state, to_floats
from lapo.runs.optim import make_optimizer, piecewise_linear, ramp_schedule, set_lr, warmup_schedule
from support import ROOT

CPU = Compute(torch.device("cpu"), bf16=False, compile=False)


@pytest.fixture(scope="module")
def cfg() -> Config:
    """The published configuration."""
    return load_config([])


# ---------------------------------------------------------------- schedules


@pytest.mark.parametrize(
    ("x", "value"), [(-5, 1), (0, 1), (5, 2), (10, 3), (12, 2.5), (20, 0.5), (20.5, 0.5), (99, 0.5)]
)
def test_piecewise_linear_is_linear_between_its_points_and_constant_beyond(x, value):
    assert piecewise_linear(x, [(0, 1), (10, 3), (20, 0.5)]) == pytest.approx(value)


def test_learning_rate_of_stage_1_at_full_length(cfg):
    points = warmup_schedule(cfg.stage1, 50_000)
    lr = {step: cfg.stage1.lr * piecewise_linear(step, points) for step in (0, 25, 50, 50_001)}
    assert lr == pytest.approx({0: 3e-5, 25: 1.65e-4, 50: 3e-4, 50_001: 3e-6})
    middle = (50 + 50_001) / 2
    assert cfg.stage1.lr * piecewise_linear(middle, points) == pytest.approx(3e-4 * 1.01 / 2)


def test_learning_rate_of_stage_2_at_full_length(cfg):
    points = warmup_schedule(cfg.stage2, 60_000)
    lr = {step: cfg.stage2.lr * piecewise_linear(step, points) for step in (0, 500, 1000, 60_001)}
    assert lr == pytest.approx({0: 2e-6, 500: 1.01e-4, 1000: 2e-4, 60_001: 0})
    assert cfg.stage2.lr * piecewise_linear(30_500.5, points) == pytest.approx(1e-4)


# Env steps and learning rates: 0 until the first, the peak at the second, 0 at the end (spec: lr = 1e-2).
RAMPS = {
    "policy_head": (35_000, 50_000, 2.5e-3),
    "value_head": (25_000, 50_000, 2.5e-3),
    "fc": (50_000, 200_000, 1e-3),
}


@pytest.mark.parametrize("steps", [4_000_000, 1_000_000, 65_536])
@pytest.mark.parametrize("name", RAMPS)
def test_learning_rates_of_stage_3_at_full_length_and_in_proportion_below(cfg, name, steps):
    hold, peak_at, peak = RAMPS[name]
    hold, peak_at = hold * steps / 4_000_000, peak_at * steps / 4_000_000
    points = ramp_schedule(getattr(cfg.ppo, name), steps, 4_000_000)
    expected = {
        0: 0,
        hold: 0,
        (hold + peak_at) / 2: peak / 2,
        peak_at: peak,
        (peak_at + steps) / 2: peak / 2,
        steps: 0,
        steps + 4096: 0,
    }
    assert {x: cfg.ppo.lr * piecewise_linear(x, points) for x in expected} == pytest.approx(expected)


def test_runs_longer_than_published_keep_the_published_points(cfg):
    points = ramp_schedule(cfg.ppo.fc, 8_000_000, 4_000_000)
    assert points == [(50_000, 0), (200_000, 0.1), (8_000_000, 0)]
    points = warmup_schedule(replace(cfg.stage1, steps=200_000), 50_000)
    assert points == [(0, 0.1), (50, 1), (200_001, 0.01)]


def test_warm_up_shrinks_with_shorter_runs(cfg):
    points = warmup_schedule(replace(cfg.stage2, steps=6_000), 60_000)
    assert points == [(0, 0.01), (100, 1), (6_001, 0)]


# ---------------------------------------------------------------- optimisers


def group(*modules: nn.Module, lr: float = 0.1) -> dict:
    return {"params": [p for module in modules for p in module.parameters()], "lr": lr}


def test_optimiser_must_hold_exactly_the_trainable_parameters():
    a, b = nn.Linear(2, 2), nn.Linear(2, 2)
    make_optimizer(torch.optim.Adam, [group(a), group(b)], [a, b])
    for groups, modules in (
        ([group(a)], [a, b]),  # one is left out
        ([group(a, b)], [a]),  # one does not belong
    ):
        with pytest.raises(ValueError, match="the optimiser holds"):
            make_optimizer(torch.optim.Adam, groups, modules)
    b.requires_grad_(False)
    make_optimizer(torch.optim.Adam, [group(a)], [a, b])
    with pytest.raises(ValueError, match="the optimiser holds 4 parameters, 2 are trainable"):
        make_optimizer(torch.optim.Adam, [group(a, b)], [a, b])  # a frozen one


@pytest.mark.parametrize(("kind", "decay"), [(torch.optim.Adam, 0.0), (torch.optim.AdamW, 0.01)])
def test_optimiser_steps_equal_adams_formulae_under_changing_learning_rates(kind, decay):
    torch.manual_seed(0)
    layer = nn.Linear(3, 2, bias=False)
    weight = layer.weight.detach().clone()
    optimizer = make_optimizer(kind, [group(layer)], [layer])
    tensor = optimizer.param_groups[0]["lr"]
    mean, square = torch.zeros_like(weight), torch.zeros_like(weight)
    for step, lr in enumerate((0.1, 0.0, 0.02), start=1):
        set_lr(optimizer.param_groups[0], lr)
        layer.weight.grad = torch.randn_like(weight)
        mean = 0.9 * mean + 0.1 * layer.weight.grad
        square = 0.999 * square + 0.001 * layer.weight.grad**2
        optimizer.step()
        root = (square / (1 - 0.999**step)).sqrt() + 1e-8
        weight = weight * (1 - lr * decay) - lr * mean / (1 - 0.9**step) / root
        torch.testing.assert_close(layer.weight.detach(), weight, rtol=1e-5, atol=1e-5)
    assert optimizer.param_groups[0]["lr"] is tensor  # changed in place


def test_learning_rates_survive_saving_and_stay_settable():
    layer = nn.Linear(3, 2)
    optimizer = make_optimizer(torch.optim.Adam, [group(layer)], [layer])
    set_lr(optimizer.param_groups[0], 0.25)
    again = make_optimizer(torch.optim.Adam, [group(layer)], [layer])
    again.load_state_dict(optimizer.state_dict())
    assert again.param_groups[0]["lr"].item() == 0.25
    set_lr(again.param_groups[0], 0.5)
    before = layer.weight.detach().clone()
    layer(torch.ones(3)).sum().backward()
    again.step()
    torch.testing.assert_close(layer.weight.detach(), before - 0.5)


# ---------------------------------------------------------------- seeds


def draws() -> list[float]:
    return [random.random(), np.random.rand(), torch.rand(()).item()]  # noqa: NPY002 - as libraries do


def test_one_seed_gives_one_row_of_random_numbers():
    seed_everything(3)
    first = draws()
    seed_everything(3)
    assert draws() == first
    seed_everything(4)
    assert not set(draws()) & set(first)


def test_pytorchs_random_numbers_continue_from_a_saved_state():
    seed_everything(0)
    torch.rand(5)
    state = rng_state()
    expected = torch.rand(5)
    seed_everything(9)
    set_rng_state(state)
    assert torch.equal(torch.rand(5), expected)


# ---------------------------------------------------------------- device and precision


def compute(monkeypatch, *arguments: str, native_bf16: bool = False, cuda: bool = False) -> Compute:
    """What is chosen on a machine with or without native bf16 on its CPU and one CUDA device."""
    monkeypatch.setattr(training, "_has_bf16", lambda device: native_bf16)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: int(cuda))
    return Compute.from_config(load_config(list(arguments)))


def test_auto_chooses_the_device_precision_and_compilation_that_are_there(monkeypatch):
    assert compute(monkeypatch) == Compute(torch.device("cpu"), bf16=False, compile=False)
    assert compute(monkeypatch, native_bf16=True) == Compute(torch.device("cpu"), bf16=True, compile=False)
    gpu = compute(monkeypatch, native_bf16=True, cuda=True)
    assert gpu == Compute(torch.device("cuda"), bf16=True, compile=True)


def test_what_is_configured_is_what_is_chosen(monkeypatch):
    fp32 = compute(monkeypatch, "--precision", "fp32", "--device", "cpu", native_bf16=True, cuda=True)
    assert fp32 == Compute(torch.device("cpu"), bf16=False, compile=False)
    bf16 = compute(monkeypatch, "--precision", "bf16", "--compile", "on")
    assert bf16 == Compute(torch.device("cpu"), bf16=True, compile=True)
    eager = compute(monkeypatch, "--compile", "off", "--device", "cuda:0", cuda=True)
    assert eager == Compute(torch.device("cuda:0"), bf16=False, compile=False)


def test_a_device_that_is_not_there_is_named(monkeypatch):
    with pytest.raises(UserError, match="device cuda is not there: 0 CUDA devices; use cpu"):
        compute(monkeypatch, "--device", "cuda")
    with pytest.raises(UserError, match="device cuda:1 is not there: 1 CUDA devices"):
        compute(monkeypatch, "--device", "cuda:1", cuda=True)


def test_placed_convolutions_are_channels_last():
    conv = CPU.place(nn.Conv2d(8, 8, 3))
    assert conv.weight.is_contiguous(memory_format=torch.channels_last)


def test_one_step_of_stage_1_in_bf16_is_close_to_fp32():
    cfg = load_config(["--preset", "demo"])
    torch.manual_seed(0)
    idm, world_model = make_idm(cfg), make_world_model(cfg)
    images = stack_frames(torch.randint(256, (8, 3, 64, 64, 3), dtype=torch.uint8))
    results = []
    for bf16 in (False, True):
        with Compute(torch.device("cpu"), bf16, False).autocast():
            la = idm.label(images)
            predicted = world_model(images[:, :6], la)
        loss = F.mse_loss(predicted, images[:, 6:])
        idm.zero_grad(), world_model.zero_grad()
        loss.backward()
        results.append((la, predicted, loss, idm.fc.weight.grad.flatten().clone()))
        assert la.dtype == (torch.bfloat16 if bf16 else torch.float32)
        assert loss.dtype == predicted.dtype == torch.float32
    (*plain, plain_grad), (*mixed, mixed_grad) = results
    for exact, rounded in zip(plain, mixed, strict=True):
        assert (exact - rounded).norm() <= 0.03 * exact.norm()
    assert F.cosine_similarity(plain_grad, mixed_grad, 0) > 0.95


# ---------------------------------------------------------------- metrics


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries are left as they are")
def test_a_run_on_a_cpu_reuses_the_memory_of_freed_tensors():
    """Fresh pages are made at the first touch, which the system counts; in a process of its own."""
    script = f'''
import resource, sys
sys.path.insert(0, {str(ROOT)!r})
import torch
from lapo.config import load_config
from lapo.runs.compute import Compute, keep_freed_memory

def faults():
    """The fewest of three rounds: the system moves pages for reasons of its own, too."""
    counts = []
    for _ in range(3):
        torch.ones(16 << 20)  # 64 MB
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(10):
            torch.ones(16 << 20)
        counts.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    return min(counts)

usual = faults()
Compute.from_config(load_config(["--device", "cpu"]))
kept = faults()
keep_freed_memory(False)
print(usual, kept, faults())
'''
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    usual, kept, given_back = map(int, done.stdout.split())
    assert min(usual, given_back) >= 10 * 32  # 2 MB a page at most
    assert kept < min(usual, given_back) / 10


def test_metrics_become_numbers():
    assert to_floats({"a": torch.tensor(1.5), "b": 2.0, "c": torch.tensor(3)}) == {
        "a": 1.5,
        "b": 2.0,
        "c": 3.0,
    }
    assert to_floats({}) == {}
