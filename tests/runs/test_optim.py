"""Schedules and optimisers."""

import inspect
from dataclasses import replace

import pytest
import torch
from torch import nn

from lapo.config import Config, load_config
from lapo.runs.optim import (
    CAPTURABLE_WARNING,
    make_optimizer,
    piecewise_linear,
    ramp_schedule,
    set_lr,
    warmup_schedule,
)


@pytest.fixture(scope="module")
def cfg() -> Config:
    """The published configuration."""
    return load_config([])


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


def test_the_warning_that_is_silenced_is_pytorchs():
    assert CAPTURABLE_WARNING in inspect.getsource(torch.optim.Optimizer)
