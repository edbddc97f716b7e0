"""CUDA graphs, as far as a CPU can tell: what becomes of inputs and outputs, and what graphs forbid.

That a recorded step computes what the step computes is checked on a card, by `make gpu`.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from lapo import stage1_idm_wm, stage2_bc, stage3_decode
from lapo.benchmarks.workloads import random_windows
from lapo.config import Config
from lapo.games.vec_env import VecEnv
from lapo.models import make_idm, make_latent_policy, make_world_model, pixel_to_square, square_to_pixel
from lapo.ppo import PPOTrainer
from lapo.runs.compute import Compute, seed_everything
from support import CPU

TINY = (
    "--stage1.batch_size 4 --stage2.batch_size 4 --ppo.num_envs 3 --ppo.rollout_steps 4 --ppo.minibatches 2"
)


class FixedMemory:
    """Calls a function, its inputs and outputs in the same memory at every call, as those of a graph."""

    def __init__(self, function: Callable[..., Any]):
        self.function, self.inputs, self.outputs = function, {}, {}

    def __call__(self, *inputs: Tensor) -> Any:
        shapes = tuple(x.shape for x in inputs)
        mine = self.inputs.setdefault(shapes, [x.clone() for x in inputs])
        for kept, x in zip(mine, inputs, strict=True):
            kept.copy_(x)
        found = self.function(*mine)
        kept = self.outputs.setdefault(shapes, tree_map(torch.clone, found))
        return tree_map(lambda there, new: there.copy_(new), kept, found)


@dataclass(frozen=True)
class Fixed(Compute):
    """Computes with `FixedMemory` where a GPU has graphs."""

    def replayed(self, function: Callable) -> Callable:
        return FixedMemory(function)


@pytest.fixture
def cfg(workplace) -> Config:
    """Tiny networks and batches."""
    return workplace.config(*TINY.split())


def stage1(cfg: Config, compute: Compute) -> stage1_idm_wm.Trainer:
    seed_everything(0)
    return stage1_idm_wm.Trainer(
        cfg, compute, random_windows(40, CPU.device), make_idm(cfg), make_world_model(cfg)
    )


def stage2(cfg: Config, compute: Compute) -> stage2_bc.Trainer:
    seed_everything(0)
    windows = random_windows(40, CPU.device)
    la = torch.randn(len(windows), cfg.vq.la_dim)
    return stage2_bc.Trainer(cfg, compute, windows, la, make_latent_policy(cfg))


@contextlib.contextmanager
def online(cfg: Config, compute: Compute) -> Iterator[PPOTrainer]:
    seed_everything(0)
    states = {
        "stage1": {"idm": make_idm(cfg).state_dict()},
        "stage2": {"policy": make_latent_policy(cfg).state_dict()},
    }
    with contextlib.closing(VecEnv("jumper", cfg.ppo.num_envs, seed=0, num_threads=0)) as env:
        yield stage3_decode.online_trainer(cfg, compute, states, env)


def train_online(cfg: Config, compute: Compute) -> list[Any]:
    with online(cfg, compute) as trainer:
        metrics = []
        for update in range(1, 4):
            metrics.append(trainer.improve(1000 * update, trainer.collect()))
            trainer.decoder.infer_latents(trainer.rollout)
        return [metrics, trainer.policy.state_dict(), trainer.decoder.la, trainer.decoder.ta]


@pytest.mark.parametrize("make", [stage1, stage2])
def test_training_survives_that_its_steps_overwrite_their_results(cfg, make):
    plain, fixed = make(cfg, CPU), make(cfg, Fixed(CPU.device, False, False))
    for step in range(4):
        torch.testing.assert_close(fixed.update(step), plain.update(step), rtol=0, atol=0)
    for mine, other in zip(fixed.params, plain.params, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=0)


def test_playing_survives_that_decisions_overwrite_each_other(cfg):
    """Decoder and PPO learn from the actions that were taken, not from the last ones."""
    found, expected = train_online(cfg, Fixed(CPU.device, False, False)), train_online(cfg, CPU)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


# ---------------------------------------------------------------- no waiting


class NoWaiting(TorchDispatchMode):
    """Refuses operators that would wait for a device: their results decide on the host what comes next."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = str(func)
        waits = name.startswith(("aten._local_scalar_dense", "aten.nonzero", "aten.masked_select"))
        if name.startswith("aten.index."):
            waits = any(x is not None and x.dtype == torch.bool for x in args[1])
        assert not waits, name
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "wait", [lambda x: x.sum().item(), lambda x: x[x > 0], lambda x: x.nonzero(), lambda x: bool(x.any())]
)
def test_what_waits_is_noticed(wait):
    with pytest.raises(AssertionError, match="aten"), NoWaiting():
        wait(torch.randn(5))


@pytest.mark.parametrize("make", [stage1, stage2])
def test_steps_of_training_do_not_wait(cfg, make, monkeypatch):
    # On a CPU it looks at its input to check it, on a GPU it does not.
    monkeypatch.setattr(F, "one_hot", lambda x, count: (x[..., None] == torch.arange(count)).long())
    trainer = make(cfg, CPU)
    trainer.update(0)  # the epoch's order is drawn on the host
    with NoWaiting():
        trainer.update(1)


def test_decisions_and_updates_of_ppo_do_not_wait(cfg):
    with online(cfg, CPU) as trainer:
        value = trainer.collect()
        with NoWaiting():
            trainer.decide(trainer.collector.frames)
            trainer.improve(1000, value)


# ---------------------------------------------------------------- compiled


@pytest.mark.slow
def test_steps_are_one_graph_and_are_compiled_once(cfg, monkeypatch):
    """Whatever the step and the learning rate."""

    def compiled(self: Compute, function: Callable) -> Callable:
        return torch.compile(function, fullgraph=True, backend="aot_eager")

    monkeypatch.setattr(Compute, "compiled", compiled)
    torch.compiler.reset()
    trainers = [stage1(cfg, CPU), stage2(cfg, CPU)]
    for trainer in trainers:
        trainer.update(0)
        trainer.update(1)
    with online(cfg, CPU) as trainer:
        trainer.improve(1000, trainer.collect())
        with torch._dynamo.config.patch(error_on_recompile=True):
            trainer.improve(2000, trainer.collect())
            for each in trainers:
                for step in range(2, 5):
                    each.update(step)


def test_compiled_steps_take_equal_forms_of_two_convolutions(cfg):
    network = make_world_model(cfg)
    first, last = network.up[0].conv, network.bottleneck
    x, y = torch.randn(5, first.in_channels, 1, 1), torch.randn(5, last.in_channels, 2, 2)
    torch.testing.assert_close(pixel_to_square(x, first), first(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(square_to_pixel(y, last), last(y), rtol=1e-4, atol=1e-5)
