"""What the optimisers do in the stages' own loops: which kind, on what, how fast; and what moves."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

from lapo import stage1_idm_wm, stage2_bc, stage3_decode, train_expert
from lapo.models import make_idm, make_world_model
from lapo.runs.checkpoints import load_checkpoint
from support import TINY, Workplace

ADAM = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0, "amsgrad": False, "maximize": False}
ADAMW = ADAM | {"weight_decay": 0.01}


@dataclass
class Training:
    """What one optimiser did."""

    optimizer: torch.optim.Optimizer
    before: list[Tensor]
    """Copies of all its parameters from before its first step."""
    lrs: list[list[float]] = field(default_factory=list)
    """Learning rates of all groups at each step."""
    norms: list[float] = field(default_factory=list)
    """Norm of all gradients at each step."""

    def params(self) -> list[Tensor]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def expect(self, kind: type[torch.optim.Optimizer], options: dict, size: int) -> None:
        """Check the kind of optimiser, and that all its `size` parameters have moved."""
        assert type(self.optimizer) is kind
        for group in self.optimizer.param_groups:
            assert {key: group[key] for key in options} == options
        assert len(self.before) == size
        for before, after in zip(self.before, self.params(), strict=True):
            assert not torch.equal(before, after), tuple(after.shape)


@pytest.fixture
def trainings() -> Iterator[list[Training]]:
    """What every optimiser does from now on, in the order of their first steps."""
    found: dict[torch.optim.Optimizer, Training] = {}
    result: list[Training] = []

    def note(optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        if optimizer not in found:
            found[optimizer] = Training(optimizer, [])
            found[optimizer].before = [p.detach().clone() for p in found[optimizer].params()]
            result.append(found[optimizer])
        found[optimizer].lrs.append([float(group["lr"]) for group in optimizer.param_groups])
        grads = torch.stack([p.grad.norm() for p in found[optimizer].params()])
        found[optimizer].norms.append(float(grads.norm()))

    handle = register_optimizer_step_pre_hook(note)
    yield result
    handle.remove()


def state(workplace: Workplace, stage: str, exp: str = "main") -> dict:
    return load_checkpoint(workplace.run_dir(stage, exp) / "checkpoint.pt")["state"]


def test_stage_1(workplace, trainings):
    """IDM and world model by one AdamW, each step at its own rate; the codes and BatchNorm move as well."""
    options = ("--stage1.lr_warmup", "25000", "--stage1.probe_every", "9", "--stage1.clip_norm", "0.01")
    cfg = workplace.config("--stage1.steps", "4", *options)
    stage1_idm_wm.train(cfg)
    torch.manual_seed(cfg.seed)
    networks = make_idm(cfg), make_world_model(cfg)  # as they were
    probe_before, training, probe_after = trainings
    training.expect(torch.optim.AdamW, ADAMW, sum(len(list(network.parameters())) for network in networks))
    # Warmed up after 25,000 · 4 / 50,000 steps; 0.01 would be reached at step 5.
    factors = [0.1, 0.55, 1.0, 1 - 0.99 / 3]
    assert training.lrs == [[pytest.approx(3e-4 * factor)] for factor in factors]
    assert training.norms == [pytest.approx(0.01, rel=1e-3)] * 4
    for probe in (probe_before, probe_after):
        probe.expect(torch.optim.AdamW, ADAMW, 6)
        assert probe.lrs == [[1e-3]] * len(probe.lrs)

    final = state(workplace, "stage1")
    for name, network in zip(("idm", "world_model"), networks, strict=True):
        buffers = dict(network.named_buffers()).keys() & final[name].keys()
        moving = {key for key in buffers if not key.endswith(("started", "num_batches_tracked"))}
        assert len(moving) == {"idm": 3, "world_model": 2 * 11}[name]
        for key in moving:
            assert not torch.equal(final[name][key], network.state_dict()[key]), key
        # One batch of statistics per step: measuring leaves them alone.
        assert all(x == 4 for key, x in final[name].items() if "num_batches" in key)


def test_stage_2(workplace, trainings):
    """The policy alone learns, by AdamW."""
    stage1_idm_wm.train(workplace.config("--stage1.steps", "1"))
    trainings.clear()
    stage2_bc.train(workplace.config("--stage2.steps", "4", "--stage2.lr_warmup", "30000"))
    (training,) = trainings
    training.expect(torch.optim.AdamW, ADAMW, 34)
    # Warmed up after 30,000 · 4 / 60,000 steps; 0 would be reached at step 5.
    assert training.lrs == [[pytest.approx(2e-4 * factor)] for factor in (0.01, 0.505, 1.0, 2 / 3)]
    for found, value in zip(state(workplace, "stage2")["policy"].values(), training.params(), strict=True):
        assert torch.equal(found, value)


RAMPS = (
    *("--ppo.policy_head.hold", "1000000", "--ppo.policy_head.peak_at", "2000000"),
    *("--ppo.value_head.hold", "500000", "--ppo.value_head.peak_at", "1500000"),
    *("--ppo.fc.hold", "2000000", "--ppo.fc.peak_at", "3000000"),
)


def test_online_mode(trained, trainings):
    """Heads and hidden layer by one Adam, each group at its own rate; every decoder by one of its own.

    An update learns at the rates of the env step that its rollout ends with.
    """
    trained.branch("ramps", "stage1", "stage2")
    clip = ("--ppo.clip_norm", "0.01")
    stage3_decode.train(trained.config("--exp", "ramps", "--stage3.mode", "online", *RAMPS, *clip))
    training, *decoders = trainings
    groups = training.optimizer.param_groups
    shapes = [[tuple(p.shape) for p in group["params"]] for group in groups]
    assert shapes == [[(15, 256), (15,)], [(1, 256), (1,)], [(256, 2048), (256,)]]
    training.expect(torch.optim.Adam, ADAM, 6)
    # Points scaled to 192 of 4 million env steps: hold until 48, 24, 96; peak at 96, 72, 144; 0 at 192.
    rates = {
        32: (0, 8 / 48, 0),
        64: (16 / 48, 40 / 48, 0),
        96: (1, 96 / 120, 0),
        128: (64 / 96, 64 / 120, 32 / 48),
        160: (32 / 96, 32 / 120, 32 / 48),
        192: (0, 0, 0),
    }
    expected = [
        [pytest.approx(1e-2 * peak * factor) for peak, factor in zip((0.25, 0.25, 0.1), factors, strict=True)]
        for factors in rates.values()
    ]
    assert training.lrs == [lrs for lrs in expected for _ in range(2 * 2)]  # epochs · minibatches
    assert training.norms == [pytest.approx(0.01, rel=1e-3)] * 6 * 4
    assert len(decoders) == 5  # the schedule of the tiny run ends before the last update
    for decoder in decoders:
        decoder.expect(torch.optim.Adam, ADAM, 4)
        assert decoder.lrs == [[pytest.approx(1e-3)]] * len(decoder.lrs)
    # What acts in the end is what was trained.
    policy = state(trained, "stage3_online", "ramps")["policy"]
    final = [*training.params(), *decoders[-1].params()]
    names = [
        f"{layer}.{kind}"
        for layer in ("policy_head", "value_head", "fc", "decoder.0", "decoder.2")
        for kind in ("weight", "bias")
    ]
    for name, value in zip(names, final, strict=True):
        assert torch.equal(policy[name], value), name


@pytest.mark.parametrize(
    ("mode", "size", "lr", "steps"),
    [("scratch", 36, 5e-4, 6 * 4), ("bc", 34, 1e-3, 20), ("offline", 4, 1e-3, 20)],
)
def test_other_modes_of_stage_3(trained, trainings, mode, size, lr, steps):
    """All layers, or the decoder of offline mode, by Adam at one rate."""
    trained.branch(f"loop-{mode}", "stage1", "stage2")
    stage3_decode.train(trained.config("--exp", f"loop-{mode}", "--stage3.mode", mode))
    (training,) = trainings
    training.expect(torch.optim.Adam, ADAM, size)
    assert training.lrs == [[pytest.approx(lr)]] * steps


def test_a_distilled_expert(workplace, trainings):
    """All layers by Adam; the rate falls from round to round and would be 0 after the last."""
    train_expert.train(workplace.config("--env", "bigfish", "--expert.teacher", "planner"))
    (training,) = trainings
    training.expect(torch.optim.Adam, ADAM, 34)
    rates = [1e-3 * (1 - number / 5) for number in range(5)]
    assert training.lrs == [[pytest.approx(lr)] for lr in rates for _ in range(TINY["dagger"]["updates"])]
