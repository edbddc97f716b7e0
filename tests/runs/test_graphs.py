"""CUDA graphs, tested on a CPU: reuse of inputs and outputs, and operations that graphs forbid.

That a recorded step computes what the step computes is checked on a card, by `make gpu`.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from lapo import decoding, stage1_idm_wm, stage2_bc, stage3_decode
from lapo.benchmarks.workloads import random_windows
from lapo.config import Config, load_config
from lapo.decoding import Fit, epochs
from lapo.experts.dagger import Dagger
from lapo.experts.registry import make_expert
from lapo.games.vec_env import VecEnv
from lapo.models import (
    infer_latents,
    make_acting_policy,
    make_decoder,
    make_idm,
    make_latent_policy,
    make_world_model,
    normalize,
    pixel_to_square,
    square_to_pixel,
)
from lapo.policies import sample
from lapo.ppo import Decision, PPOTrainer, Rollout, ppo_step, ppo_update
from lapo.probe import train_probe
from lapo.runs.compute import Compute, seed_everything
from lapo.runs.graphs import EAGER_CALLS, Replayed
from support import CPU, LAPO

TINY = (
    "--stage1.batch_size 4 --stage2.batch_size 4 --ppo.num_envs 3 --ppo.rollout_steps 4 --ppo.minibatches 2"
)


class FixedMemory:
    """Calls a function with its inputs and outputs in the same memory at every call, as a graph does."""

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
def test_training_allows_steps_that_overwrite_their_results(cfg, make):
    plain, fixed = make(cfg, CPU), make(cfg, Fixed(CPU.device, False, False))
    for step in range(4):
        torch.testing.assert_close(fixed.update(step), plain.update(step), rtol=0, atol=0)
    for mine, other in zip(fixed.params, plain.params, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=0)


def test_rollouts_allow_decisions_that_overwrite_each_other(cfg):
    """Decoder and PPO learn from the actions that were taken, not from the last ones."""
    found, expected = train_online(cfg, Fixed(CPU.device, False, False)), train_online(cfg, CPU)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


# ---------------------------------------------------------------- no waiting


class NoSync(TorchDispatchMode):
    """Refuses operators that synchronise with the device, because the host needs their results.

    `allowed` names those that may, once each: the function in lapo/ that calls it, and the operator.
    """

    def __init__(self, *allowed: tuple[str, str]):
        super().__init__()
        self.allowed = list(allowed)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = str(func).removeprefix("aten.").partition(".")[0]
        waits = name in ("_local_scalar_dense", "nonzero", "masked_select", "bincount", "equal")
        if name == "index":
            waits = any(x is not None and x.dtype == torch.bool for x in args[1])
        if waits:
            frame = sys._getframe()
            while frame and not frame.f_code.co_filename.startswith(f"{LAPO}/"):
                frame = frame.f_back
            found = (frame.f_code.co_name if frame else "", name)
            assert found in self.allowed, found
            self.allowed.remove(found)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: bool(x.any()),
        lambda x: x.long().abs().bincount(),
        lambda x: torch.equal(x, x + 1),
    ],
)
def test_a_synchronisation_is_noticed(wait):
    with pytest.raises(AssertionError, match=r"^\('', '\w+'\)"), NoSync():
        wait(torch.randn(5))


def test_an_allowed_synchronisation_may_happen_once():
    la, ta = torch.randn(8, 4), torch.arange(8) % 3
    cfg = load_config([]).probe
    with NoSync(*WAITS_OF_THE_PROBE):
        train_probe(la, ta, cfg, seed=0)
    with NoSync(*WAITS_OF_THE_PROBE):
        train_probe(la, ta, cfg, seed=0)
        with pytest.raises(AssertionError, match="fit_probe"):
            train_probe(la, ta, cfg, seed=0)


def one_hot_without_a_look(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU it looks at its input to check it, on a GPU it does not."""
    monkeypatch.setattr(F, "one_hot", lambda x, count: (x[..., None] == torch.arange(count)).long())


@pytest.mark.parametrize("make", [stage1, stage2])
def test_training_steps_do_not_synchronise(cfg, make, monkeypatch):
    one_hot_without_a_look(monkeypatch)
    trainer = make(cfg, CPU)
    trainer.update(0)  # the epoch's order is drawn on the host
    with NoSync():
        trainer.update(1)


def test_decisions_and_updates_of_ppo_do_not_synchronise(cfg):
    with online(cfg, CPU) as trainer:
        value = trainer.collect()
        with NoSync():
            trainer.decide(trainer.collector.frames)
            trainer.improve(1000, value)


WAITS_OF_THE_PROBE = (("fit_probe", "_local_scalar_dense"), ("train_probe", "bincount"))
"""Once per evaluation: how many actions there are, and how often the commonest one is taken."""
WAITS_OF_A_ROLLOUT = (("infer_latents", "index"), ("infer_latents", "index"))
"""Once per rollout: which windows lie inside an episode, and their actions."""


def test_the_decoder_is_trained_without_synchronising_and_its_latents_synchronise_once_per_rollout(cfg):
    with online(cfg, CPU) as trainer:
        trainer.collect()
        with NoSync(*WAITS_OF_A_ROLLOUT) as log:
            trainer.decoder.infer_latents(trainer.rollout)
        assert not log.allowed
        with NoSync():
            trainer.decoder.train()


def test_evaluation_synchronises_in_the_probe_alone(cfg, monkeypatch):
    one_hot_without_a_look(monkeypatch)
    trainer = stage1(cfg, CPU)
    with NoSync(*WAITS_OF_THE_PROBE) as log:
        trainer.evaluate(trainer.windows)
    assert not log.allowed
    policy = stage2(cfg, CPU)
    with NoSync():
        policy.evaluate(policy.windows, policy.la)


def test_latents_are_inferred_without_synchronising(cfg):
    windows, idm = random_windows(40, CPU.device), make_idm(cfg)
    with NoSync():
        infer_latents(idm, windows.iter_frames(windows.all()), CPU)


def test_fitting_labels_does_not_synchronise(cfg):
    """What the modes offline and bc call."""
    network, ta = torch.nn.Linear(4, 15), torch.arange(32) % 15
    x = torch.randn(32, 4)
    with NoSync():
        Fit(lambda batch: network(x[batch]), network, ta, cfg.offline.lr).step(torch.arange(8))


def test_dagger_trains_without_synchronising(workplace):
    cfg = workplace.config()
    policy = make_acting_policy(cfg, "bc", 15)
    with contextlib.closing(VecEnv("maze", cfg.dagger.num_envs, seed=0, num_threads=0)) as env:
        dagger = Dagger(cfg.dagger, CPU, env, lambda count: make_expert("maze", count), policy)
        dagger.collect()
        with NoSync():
            dagger.fit()


# ---------------------------------------------------------------- on one device


@dataclass(frozen=True)
class OnMeta(Compute):
    """Computes on the meta device: shapes without numbers, which cannot be mixed with CPU tensors."""

    def autocast(self) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()


META = OnMeta(torch.device("meta"), bf16=False, compile=False)


class OneDevice(NoSync):
    """Refuses copies between devices, too."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = super().__torch_dispatch__(func, types, args, kwargs)
        devices = {x.device.type for x in tree_flatten((args, kwargs, out))[0] if isinstance(x, Tensor)}
        assert len(devices) < 2, f"{func} between {devices}"
        return out


def on_meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, dtype=dtype, device="meta")


@pytest.fixture
def plain_sgd(monkeypatch):
    """In place of the fused optimisers, which exist for devices with numbers alone."""

    def make(kind: type, groups: list[dict], modules: Any, **options: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(groups, lr=0.1)

    for module in (stage1_idm_wm, stage2_bc, decoding):
        monkeypatch.setattr(module, "make_optimizer", make)


def learn_stage1(cfg: Config) -> Callable[[], Any]:
    networks = META.place(make_idm(cfg)), META.place(make_world_model(cfg))
    trainer = stage1_idm_wm.Trainer(cfg, META, random_windows(40, CPU.device), *networks)
    return lambda: trainer.learn(on_meta(4, 3, 64, 64, 3, dtype=torch.uint8))


def learn_stage2(cfg: Config) -> Callable[[], Any]:
    windows, policy = random_windows(40, CPU.device), META.place(make_latent_policy(cfg))
    trainer = stage2_bc.Trainer(cfg, META, windows, on_meta(38, cfg.vq.la_dim), policy)
    return lambda: trainer.learn(on_meta(4, 64, 64, 3, dtype=torch.uint8), on_meta(4, cfg.vq.la_dim))


def decide_and_learn(cfg: Config, mode: str) -> Callable[[], Any]:
    policy = META.place(make_acting_policy(cfg, mode, 15))
    rollout = Rollout(cfg.ppo.rollout_steps, cfg.ppo.num_envs, META.device, keep_frames=True)
    optimizer = torch.optim.SGD([p for p in policy.parameters() if p.requires_grad], lr=0.1)

    def learn() -> None:
        for step in range(cfg.ppo.rollout_steps):
            frames = on_meta(cfg.ppo.num_envs, 64, 64, 3, dtype=torch.uint8)
            with torch.no_grad():
                encoded = policy.encode(frames)
                logits, value = policy(*encoded)
            rollout.record(step, frames, Decision(encoded, *sample(logits), value))
        ppo_update(
            lambda ids: ppo_step(policy, optimizer, rollout, ids, cfg.ppo, META.autocast),
            rollout,
            value,
            cfg.ppo,
        )

    return learn


def learn_decoder(cfg: Config) -> Callable[[], Any]:
    """All of `OnlineDecoder.train` but the new decoder's weights, which are drawn on the CPU."""
    decoder, la, ta = (
        make_decoder(cfg, 15).to("meta"),
        on_meta(40, cfg.vq.la_dim),
        on_meta(40, dtype=torch.long),
    )
    batches = epochs(40, 2, cfg.decoder.batch_size, META.device)
    fit = Fit(lambda ids: decoder(la[ids]), decoder, ta, lr=0.1)
    return lambda: [fit.step(ids) for ids in batches]


def infer(cfg: Config) -> Callable[[], Any]:
    idm, batches = META.place(make_idm(cfg)), [on_meta(4, 3, 64, 64, 3, dtype=torch.uint8)]
    return lambda: infer_latents(idm, batches, META)


@pytest.mark.parametrize(
    "make",
    [
        learn_stage1,
        learn_stage2,
        partial(decide_and_learn, mode="online"),
        partial(decide_and_learn, mode="scratch"),
        learn_decoder,
        infer,
    ],
)
def test_whatever_computes_on_a_device_stays_there(cfg, plain_sgd, make):
    compute = make(cfg)
    with OneDevice():
        compute()


@pytest.mark.parametrize(
    "stray",
    [
        lambda x: x.float() + torch.zeros(3),  # made on the CPU
        lambda x: torch.zeros(3).to(x.device),  # and copied at every step
        lambda x: x.float().mul_(torch.tensor(2.0)),  # even a number: it would be copied
    ],
)
def test_a_stray_tensor_is_noticed(cfg, plain_sgd, monkeypatch, stray):
    compute = learn_stage2(cfg)
    monkeypatch.setattr(stage2_bc, "normalize", lambda frames: (stray(frames), normalize(frames))[1])
    with pytest.raises((AssertionError, RuntimeError), match=r"between|same device|on device"), OneDevice():
        compute()


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


def test_eager_calls_before_a_capture_share_one_stream(monkeypatch):
    class Stream:
        made = 0

        def __init__(self, device: int):
            Stream.made += 1

        def wait_stream(self, other: "Stream") -> None:
            pass

    default = Stream(0)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: default)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 77)
    for function in (Replayed(torch.neg), Replayed(torch.neg)):
        for _ in range(EAGER_CALLS):
            assert function(torch.ones(2)).tolist() == [-1, -1]
    assert Stream.made == 2  # the default one and another
