"""PPO against loops over single numbers, and rollouts in an environment of numbered frames."""

import contextlib
import copy
import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from lapo.config import PPOConfig, load_config
from lapo.models import Decoder, Policy, TwoPathPolicy
from lapo.policies import sample
from lapo.ppo import (
    RECENT_EPISODES,
    Collector,
    Decision,
    ReturnNormalizer,
    Rollout,
    compute_gae,
    minibatches,
    ppo_loss,
    ppo_step,
    ppo_update,
)
from lapo.runs.compute import Compute
from support import CountingEnv, read_numbers

EXACT = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(scope="module")
def cfg() -> PPOConfig:
    """The published settings."""
    return load_config([]).ppo


# ---------------------------------------------------------------- advantages


@given(
    steps=st.integers(1, 9),
    envs=st.integers(1, 4),
    gamma=st.floats(0, 1),
    lam=st.floats(0, 1),
    ends=st.floats(0, 1),
    seed=st.integers(0, 999),
)
def test_gae_equals_loops(steps, envs, gamma, lam, ends, seed):
    torch.manual_seed(seed)
    rewards, values, last = torch.randn(steps, envs), torch.randn(steps, envs), torch.randn(envs)
    dones = torch.rand(steps, envs) < ends
    expected = torch.zeros(steps, envs)
    for n in range(envs):
        for s in range(steps):
            # The sum of all later errors of the value, up to the end of the episode or the rollout.
            weight = 1.0
            for k in range(s, steps):
                after = 0.0 if dones[k, n] else float(last[n] if k + 1 == steps else values[k + 1, n])
                expected[s, n] += weight * (float(rewards[k, n]) + gamma * after - float(values[k, n]))
                if dones[k, n]:
                    break
                weight *= gamma * lam
    advantages, returns = compute_gae(rewards, dones, values, last, gamma, lam)
    torch.testing.assert_close(advantages, expected, **EXACT)
    torch.testing.assert_close(returns, expected + values, **EXACT)


# ---------------------------------------------------------------- loss


def loss_by_hand(
    logits: list[list[float]], value: list[float], rows: list[tuple], cfg: PPOConfig
) -> tuple[float, dict[str, float]]:
    """The clipped loss in Python floats; `rows` hold action, old log-prob., old value, advantage, return."""
    size = len(rows)
    advantages = [row[3] for row in rows]
    mean = sum(advantages) / size
    std = math.sqrt(sum((a - mean) ** 2 for a in advantages) / (size - 1))
    policy_loss = value_loss = entropy = kl = clipped = 0.0
    for scores, v, (action, old_logprob, old_value, advantage, target) in zip(
        logits, value, rows, strict=True
    ):
        norm = math.log(sum(math.exp(x) for x in scores))
        logprobs = [x - norm for x in scores]
        ratio = math.exp(logprobs[action] - old_logprob)
        a = (advantage - mean) / (std + 1e-8)
        policy_loss -= min(a * ratio, a * min(max(ratio, 1 - cfg.clip), 1 + cfg.clip))
        near = old_value + min(max(v - old_value, -cfg.clip), cfg.clip)
        value_loss += 0.5 * max((v - target) ** 2, (near - target) ** 2)
        entropy -= sum(math.exp(x) * x for x in logprobs)
        kl += ratio - 1 - math.log(ratio)
        clipped += abs(ratio - 1) > cfg.clip
    loss = policy_loss - cfg.entropy_coef * entropy + cfg.value_coef * value_loss
    sums = {
        "policy_loss": policy_loss,
        "value_loss": value_loss,
        "entropy": entropy,
        "approx_kl": kl,
        "clip_fraction": clipped,
    }
    return loss / size, {key: x / size for key, x in sums.items()}


def loss_example(size: int, actions: int, seed: int) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """Logits, values and rows of a minibatch in which about half of all ratios and values are clipped."""
    torch.manual_seed(seed)
    logits, value = torch.randn(size, actions), torch.randn(size)
    action = torch.randint(actions, (size,))
    old_logprob = logits.log_softmax(-1).gather(-1, action[:, None])[:, 0] + 0.3 * torch.randn(size)
    old_value = value + 0.3 * torch.randn(size)
    return logits, value, (action, old_logprob, old_value, 3 * torch.randn(size) + 1, torch.randn(size))


@given(size=st.integers(2, 9), actions=st.integers(2, 6), seed=st.integers(0, 999))
def test_ppo_loss_equals_the_loss_by_hand(cfg, size, actions, seed):
    cfg = replace(cfg, entropy_coef=0.1)  # large enough to matter at this tolerance
    logits, value, rows = loss_example(size, actions, seed)
    expected, numbers = loss_by_hand(
        logits.tolist(), value.tolist(), list(zip(*(x.tolist() for x in rows), strict=True)), cfg
    )
    loss, metrics = ppo_loss(logits, value, *rows, cfg)
    assert loss.item() == pytest.approx(expected, rel=1e-5, abs=1e-5)
    assert {key: x.item() for key, x in metrics.items()} == pytest.approx(numbers, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("seed", range(5))
def test_gradient_of_ppo_loss_equals_finite_differences_of_the_loss_by_hand(cfg, seed):
    cfg = replace(cfg, entropy_coef=0.1)
    logits, value, rows = loss_example(6, 4, seed)
    lists = [x.double().tolist() if x.is_floating_point() else x.tolist() for x in rows]
    examples = list(zip(*lists, strict=True))
    logits.requires_grad_(), value.requires_grad_()
    ppo_loss(logits, value, *rows, cfg)[0].backward()

    step = 1e-6
    for tensor in (logits, value):
        for index in np.ndindex(*tensor.shape):
            ends = []
            for sign in (1, -1):
                moved = {
                    "logits": logits.detach().double().clone(),
                    "value": value.detach().double().clone(),
                }
                moved["logits" if tensor is logits else "value"][index] += sign * step
                ends.append(loss_by_hand(moved["logits"].tolist(), moved["value"].tolist(), examples, cfg)[0])
            assert tensor.grad[index].item() == pytest.approx((ends[0] - ends[1]) / (2 * step), abs=1e-5)


def test_metrics_of_the_loss_carry_no_gradient(cfg):
    logits, value, rows = loss_example(4, 3, 0)
    _, metrics = ppo_loss(logits.requires_grad_(), value.requires_grad_(), *rows, cfg)
    assert not any(x.requires_grad for x in metrics.values())


# ---------------------------------------------------------------- sampling


@given(size=st.integers(1, 40), parts=st.integers(1, 8), seed=st.integers(0, 999))
def test_minibatches_are_a_permutation_in_nearly_equal_parts(size, parts, seed):
    torch.manual_seed(seed)
    batches = list(minibatches(size, parts, torch.device("cpu")))
    assert len(batches) == parts
    assert sorted(torch.cat(batches).tolist()) == list(range(size))
    assert max(map(len, batches)) - min(map(len, batches)) <= 1


def test_minibatches_are_shuffled_anew_each_time():
    torch.manual_seed(0)
    first, second = (torch.cat(list(minibatches(100, 4, torch.device("cpu")))) for _ in range(2))
    assert not torch.equal(first, second)


def test_sampled_actions_follow_the_softmax_of_the_logits():
    torch.manual_seed(0)
    logits = torch.tensor([[0.0, 1.0, -2.0, 3.0], [5.0, 5.0, -40.0, 5.0]])
    draws = 40_000
    action, logprob = sample(logits.repeat_interleave(draws, 0))
    probs = logits.softmax(-1)
    for row, picked in enumerate(action.view(2, draws)):
        frequency = picked.bincount(minlength=4) / draws
        spread = (probs[row] * (1 - probs[row]) / draws).sqrt()
        assert ((frequency - probs[row]).abs() <= 4 * spread + 1e-6).all()
    expected = logits.log_softmax(-1).repeat_interleave(draws, 0)[torch.arange(2 * draws), action]
    torch.testing.assert_close(logprob, expected, **EXACT)


# ---------------------------------------------------------------- update


class Linear(nn.Module):
    """A policy with a value over encoded observations (N, 3)."""

    def __init__(self, actions: int = 4):
        super().__init__()
        self.policy_head, self.value_head = nn.Linear(3, actions), nn.Linear(3, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.policy_head(x), self.value_head(x).squeeze(-1)


def full_rollout(policy: nn.Module, encoded: list[Tensor], seed: int = 0) -> tuple[Rollout, Tensor]:
    """A rollout of random rewards and ends over `encoded` (S, N, …) with the policy's own actions."""
    torch.manual_seed(seed)
    steps, envs = encoded[0].shape[:2]
    rollout = Rollout(steps, envs, torch.device("cpu"))
    with torch.no_grad():
        for step in range(steps):
            seen = tuple(x[step] for x in encoded)
            logits, value = policy(*seen)
            rollout.record(step, seen[0], Decision(seen, *sample(logits), value))
    rollout.rewards.normal_()
    rollout.dones.copy_(torch.rand(steps, envs) < 0.1)
    return rollout, torch.randn(envs)


def update(
    policy: Callable, optimizer: torch.optim.Optimizer, rollout: Rollout, last_value: Tensor, cfg: PPOConfig
) -> dict[str, Tensor]:
    """`ppo_update` of a policy in full precision."""

    def step(ids: Tensor) -> dict[str, Tensor]:
        return ppo_step(policy, optimizer, rollout, ids, cfg, contextlib.nullcontext)

    return ppo_update(step, rollout, last_value, cfg)


def test_one_update_equals_the_same_steps_by_hand(cfg):
    """One epoch in one minibatch: order does not matter, so every step can be repeated by hand."""
    cfg = replace(cfg, epochs=1, minibatches=1, clip_norm=0.05)
    torch.manual_seed(0)
    policy = Linear()
    rollout, last_value = full_rollout(policy, [torch.randn(6, 5, 3)])
    by_hand = copy.deepcopy(policy)
    metrics = update(policy, torch.optim.SGD(policy.parameters(), 1.0), rollout, last_value, cfg)

    advantages, returns = compute_gae(
        rollout.rewards, rollout.dones, rollout.values, last_value, cfg.gamma, cfg.gae_lambda
    )
    logits, value = by_hand(rollout.encoded[0].reshape(30, 3))
    rows = (rollout.actions, rollout.logprobs, rollout.values, advantages, returns)
    loss, expected = ppo_loss(logits, value, *(x.reshape(30) for x in rows), cfg)
    grads = torch.autograd.grad(loss, list(by_hand.parameters()))
    norm = math.sqrt(sum(g.square().sum().item() for g in grads))
    assert norm > cfg.clip_norm  # so that clipping is seen
    for after, before, grad in zip(policy.parameters(), by_hand.parameters(), grads, strict=True):
        torch.testing.assert_close(after, before - grad * cfg.clip_norm / norm, **EXACT)
    explained = 1 - np.var((returns - rollout.values).numpy()) / np.var(returns.numpy())
    assert not -0.1 < explained < 0.1  # so that the two variances are told apart
    expected |= {"grad_norm": torch.tensor(norm), "explained_variance": torch.tensor(explained)}
    torch.testing.assert_close(metrics, expected, check_dtype=False, **EXACT)


def test_update_trains_on_every_step_once_per_epoch(cfg):
    cfg = replace(cfg, epochs=3, minibatches=4)
    policy = Linear()
    encoded = torch.zeros(6, 5, 3)
    encoded[..., 0] = torch.arange(30).view(6, 5)
    rollout, last_value = full_rollout(policy, [encoded])
    shown = []

    def spy(x: Tensor) -> tuple[Tensor, Tensor]:
        shown.append(x[:, 0])
        return policy(x)

    update(spy, torch.optim.SGD(policy.parameters(), 1e-3), rollout, last_value, cfg)
    assert len(shown) == 12
    for epoch in range(3):
        assert sorted(torch.cat(shown[4 * epoch : 4 * epoch + 4]).tolist()) == list(range(30))


def test_update_changes_only_the_optimisers_parameters(cfg):
    torch.manual_seed(0)
    policy = TwoPathPolicy(Policy(8, 1), Decoder(8, 15, (6,)), 15)
    before = copy.deepcopy(policy.state_dict())
    trainable = [p for p in policy.parameters() if p.requires_grad]
    with torch.no_grad():
        encoded = policy.encode(torch.randint(256, (20, 64, 64, 3), dtype=torch.uint8))
    rollout, last_value = full_rollout(policy, [x.view(4, 5, -1) for x in encoded])
    metrics = update(policy, torch.optim.Adam(trainable, 1e-3), rollout, last_value, cfg)
    for key, value in policy.state_dict().items():
        learns = key.split(".")[0] in ("fc", "policy_head", "value_head")
        assert torch.equal(value, before[key]) != learns, key
    assert all(p.grad is None for p in policy.parameters() if not p.requires_grad)
    assert all(math.isfinite(x) for x in metrics.values())


def test_rollout_is_overwritten_in_place_by_the_next():
    rollout = Rollout(2, 3, torch.device("cpu"))
    for base in (0.0, 10.0):
        for step in range(2):
            x = torch.full((3, 4), base + step)
            rollout.record(step, x, Decision((x,), torch.full((3,), step), x[:, 0], -x[:, 0]))
        kept = rollout.encoded[0]
        torch.testing.assert_close(kept[:, 0, 0], torch.tensor([base, base + 1]))
        torch.testing.assert_close(rollout.values[:, 2], -torch.tensor([base, base + 1]))
    assert rollout.encoded[0] is kept


# ---------------------------------------------------------------- playing


def decide(frames: Tensor) -> Decision:
    """Encodes a frame as its number; the value is that number; four actions are equally likely."""
    numbers = torch.from_numpy(read_numbers(frames)).float()
    return Decision((numbers[:, None],), *sample(torch.zeros(len(numbers), 4)), numbers)


def test_collector_stores_frames_actions_rewards_and_dones_of_the_same_step():
    torch.manual_seed(0)
    env = CountingEnv(num_envs=3, episode=7)
    collector = Collector(env, 0.9, Compute(torch.device("cpu"), False, False))
    normalizer = ReturnNormalizer(3, gamma=0.9)
    rollout = Rollout(5, 3, torch.device("cpu"), keep_frames=True)
    finished, current = [], np.zeros(3)
    for start in (0, 5, 10):
        collector.collect(decide, rollout)
        times = start + np.arange(5)
        numbers = 1000 * np.arange(3) + times[:, None]
        actions = np.stack(env.actions[start:])
        dones = env.ends(times[:, None])
        np.testing.assert_array_equal(rollout.encoded[0][..., 0], numbers)
        np.testing.assert_array_equal(rollout.values, numbers)
        np.testing.assert_array_equal(rollout.actions, actions)
        np.testing.assert_array_equal(rollout.dones, dones)
        torch.testing.assert_close(rollout.logprobs, torch.full((5, 3), -math.log(4)))
        np.testing.assert_array_equal(read_numbers(collector.frames), 1000 * np.arange(3) + start + 5)
        np.testing.assert_array_equal(read_numbers(rollout.frames[-1]), read_numbers(collector.frames))
        for step in range(5):
            np.testing.assert_array_equal(read_numbers(rollout.frames[step]), numbers[step])
            reward = actions[step].astype(np.float32)
            np.testing.assert_array_equal(rollout.rewards[step], normalizer(reward, dones[step]))
            current += reward
            finished += current[dones[step]].tolist()
            current[dones[step]] = 0
    assert list(collector.recent) == finished
    assert collector.recent.maxlen == RECENT_EPISODES == 100
