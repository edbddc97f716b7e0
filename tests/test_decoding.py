"""Decoders: when they are trained, on which pairs of latent and action, and how."""

import copy
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from lapo.config import DecoderConfig, load_config
from lapo.decoding import Fit, OnlineDecoder, epochs, training_updates
from lapo.models import Decoder
from support import CPU, image_numbers, numbered_frames


@pytest.fixture(scope="module")
def cfg() -> DecoderConfig:
    """The published settings."""
    return load_config([]).decoder


# ---------------------------------------------------------------- when


def test_at_full_length_the_decoder_is_trained_after_exactly_the_described_updates(cfg):
    """While 10,000 < env steps < 400,000, and below 50,000 or after every 20th update of 64·64 steps."""
    described = [
        update
        for update in range(1, 977 + 1)
        if 10_000 < 4096 * update < 400_000 and (4096 * update < 50_000 or update % 20 == 0)
    ]
    assert described == [*range(3, 13), 20, 40, 60, 80]
    assert training_updates(cfg, 977, 4096, 1.0) == described


def test_the_schedule_shrinks_in_proportion_with_a_shorter_run(cfg):
    # 2,500 < env steps < 100,000, and below 12,500 or after every fifth update.
    assert training_updates(cfg, 245, 4096, 0.25) == [1, 2, 3, 5, 10, 15, 20]


@given(envs=st.integers(1, 256), steps=st.integers(1, 128), length=st.integers(1, 8_000_000))
def test_no_run_trains_the_decoder_more_often_than_the_published_one(cfg, envs, steps, length):
    updates, scale = -(-length // (envs * steps)), min(1.0, length / 4_000_000)
    assert len(training_updates(cfg, updates, envs * steps, scale)) <= 14
    twice = replace(cfg, until=2 * cfg.until)  # to update 195: 100, 120, 140, 160, 180 as well
    assert len(training_updates(twice, updates, envs * steps, scale)) <= 19


def test_trainings_are_as_far_apart_in_a_short_run_of_short_updates(cfg):
    # Every 20 · 4,096 / 16 env steps are 5 updates of 1,024; before them, each.
    assert training_updates(cfg, 245, 1024, 1 / 16) == [1, 2, 3, 5, 10, 15, 20]
    demo = load_config(["--preset", "demo"])
    scale = demo.stage3.steps / 4_000_000
    assert training_updates(demo.decoder, 32, 1024, scale) == list(range(1, 16))


@given(envs=st.integers(1, 128), steps=st.integers(1, 128), length=st.integers(1, 4_000_000))
def test_even_in_a_short_run_the_decoder_is_trained(cfg, envs, steps, length):
    updates, scale = -(-length // (envs * steps)), length / 4_000_000
    chosen = training_updates(cfg, updates, envs * steps, scale)
    assert chosen
    assert chosen == sorted(set(chosen))
    assert chosen[0] >= 1
    assert chosen[-1] <= updates
    assert all(cfg.start * scale < update * envs * steps for update in chosen)
    assert all(update * envs * steps < cfg.until * scale for update in chosen[1:])


# ---------------------------------------------------------------- on what


class NumberIDM(nn.Module):
    """An IDM whose latent actions are the numbers of its input frames."""

    def infer_latents(self, window: Tensor) -> Tensor:
        return image_numbers(window)


class Play:
    """Random actions and episode ends; the frame of environment n at time t has number 1000 · n + t."""

    def __init__(self, length: int, envs: int, ends: float, seed: int = 0):
        rng = np.random.default_rng(seed)
        self.envs = envs
        self.actions = rng.integers(15, size=(length, envs))
        self.dones = rng.random((length, envs)) < ends

    def frames(self, time: int) -> Tensor:
        return torch.from_numpy(numbered_frames(1000 * np.arange(self.envs) + time))

    def rollout(self, start: int, end: int) -> SimpleNamespace:
        """Steps `start` to `end` - 1 as a rollout, with the frames after the last one."""
        return SimpleNamespace(
            frames=torch.stack([self.frames(time) for time in range(start, end + 1)]),
            actions=torch.from_numpy(self.actions[start:end]),
            dones=torch.from_numpy(self.dones[start:end]),
        )

    def pairs(self, end: int, context: int = 1) -> list[tuple[int, ...]]:
        """By loops: the numbers of the frames of each window inside an episode, and the action at o[t]."""
        found = []
        for n in range(self.envs):
            for t in range(context, end):
                if not any(self.dones[t - back, n] for back in range(context + 1)):
                    numbers = [1000 * n + time for time in range(t - context, t + 2)]
                    found.append((*numbers, self.actions[t, n]))
        return sorted(found)


def kept_pairs(decoder: OnlineDecoder) -> list[tuple[int, ...]]:
    la, ta = decoder.state_dict()["pairs"]
    return sorted((*map(int, row), int(action)) for row, action in zip(la.tolist(), ta, strict=True))


def online_decoder(cfg: DecoderConfig, updates: list[int], context: int = 1) -> OnlineDecoder:
    decoder = Decoder(context + 2, 15, tuple(cfg.hidden))
    return OnlineDecoder(decoder, NumberIDM(), cfg, CPU, updates, context)


@given(
    rollouts=st.lists(st.integers(1, 9), min_size=2, max_size=5),
    envs=st.integers(1, 4),
    ends=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    context=st.integers(0, 3),
)
def test_pairs_are_latents_of_windows_inside_an_episode_and_their_actions(cfg, rollouts, envs, ends, context):
    """Across the borders of rollouts of any length, and never across an episode's end."""
    play = Play(sum(rollouts), envs, ends)
    decoder = online_decoder(cfg, [99], context)
    time = 0
    for update, length in enumerate(rollouts, start=1):
        rollout = play.rollout(time, time + length)
        time += length
        assert decoder.learn(rollout, update) == {}
        if time > context:
            assert kept_pairs(decoder) == play.pairs(time, context)


def test_training_uses_all_pairs_so_far(cfg):
    play = Play(40, 3, 0.1)
    decoder = online_decoder(cfg, [2, 4])
    for update in range(1, 5):
        metrics = decoder.learn(play.rollout(10 * update - 10, 10 * update), update)
        if update in (2, 4):
            assert metrics["decoder_pairs"] == len(play.pairs(10 * update))
        else:
            assert not metrics


def test_no_latents_are_inferred_or_kept_after_the_last_training(cfg):
    play = Play(30, 3, 0.0)
    decoder = online_decoder(cfg, [2])
    for update in range(1, 4):
        decoder.learn(play.rollout(10 * update - 10, 10 * update), update)
    state = decoder.state_dict()
    assert not state["active"]
    assert not state["last_steps"]
    assert state["pairs"] == [None, None]


def test_a_decoder_that_is_never_trained_keeps_nothing(cfg):
    play = Play(10, 3, 0.0)
    decoder = online_decoder(cfg, [])
    assert decoder.learn(play.rollout(0, 10), 1) == {}
    assert not decoder.state_dict()["last_steps"]


def test_without_a_single_pair_the_decoder_stays_as_it_is(cfg):
    play = Play(10, 3, 1.0)
    decoder = online_decoder(cfg, [1, 2])
    before = copy.deepcopy(decoder.decoder.state_dict())
    assert decoder.learn(play.rollout(0, 10), 1) == {}
    torch.testing.assert_close(decoder.decoder.state_dict(), before, rtol=0, atol=0)


# ---------------------------------------------------------------- how


def smoothed_cross_entropy(logits: Tensor, ta: Tensor, smoothing: float) -> Tensor:
    logprobs = logits - logits.logsumexp(-1, keepdim=True)
    target = torch.full_like(logprobs, smoothing / logits.shape[-1])
    target[torch.arange(len(ta)), ta] += 1 - smoothing
    return -(target * logprobs).sum(-1).mean()


def test_training_equals_adam_on_smoothed_labels_from_a_new_initialisation(cfg):
    """Fewer pairs than a batch holds, so every epoch is one step whatever the order."""
    play = Play(12, 3, 0.1)
    decoder = online_decoder(cfg, [1, 2])
    rollout = play.rollout(0, 12)
    torch.manual_seed(7)
    metrics = decoder.learn(rollout, 1)

    torch.manual_seed(7)
    fresh = Decoder(3, 15, (192, 128, 64))
    rows = torch.tensor(np.array(play.pairs(12)))
    la, ta = rows[:, :3].float(), rows[:, 3]
    optimizer = torch.optim.Adam(fresh.parameters(), lr=1e-3)
    losses = []
    for _ in range(3):
        loss = smoothed_cross_entropy(fresh(la), ta, 0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    torch.testing.assert_close(decoder.decoder.state_dict(), fresh.state_dict(), rtol=1e-5, atol=1e-5)
    assert metrics["decoder_loss"].item() == pytest.approx(np.mean(losses), rel=1e-5)
    right = (fresh(la).argmax(-1) == ta).float().mean()
    assert metrics["decoder_acc"].item() == pytest.approx(right.item())


def test_every_training_starts_from_a_new_initialisation(cfg):
    play = Play(12, 3, 0.1)
    weights = []
    for scale in (1.0, 100.0):
        decoder = online_decoder(cfg, [1])
        with torch.no_grad():
            for param in decoder.decoder.parameters():
                param.mul_(scale)
        rollout = play.rollout(0, 12)
        torch.manual_seed(0)
        decoder.learn(rollout, 1)
        weights.append(decoder.decoder.state_dict())
    torch.testing.assert_close(*weights, rtol=0, atol=0)


def test_a_trained_decoders_weights_are_copied_to_the_frozen_policy_decoder(cfg):
    decoder = online_decoder(cfg, [1])
    acting = decoder.decoder.requires_grad_(False)
    before = copy.deepcopy(acting.state_dict())
    play = Play(12, 3, 0.1)
    decoder.learn(play.rollout(0, 12), 1)
    assert decoder.decoder is acting
    assert not torch.equal(acting[0].weight, before["0.weight"])
    assert not any(p.requires_grad for p in acting.parameters())
    assert all(p.grad is None for p in acting.parameters())


@pytest.mark.parametrize("interrupted_after", [1, 2, 3, 4, 5])
def test_a_resumed_decoder_equals_an_uninterrupted_one(cfg, interrupted_after, tmp_path):
    cfg = replace(cfg, hidden=[8], batch_size=16)
    play = Play(60, 2, 0.1)

    def learn(decoder: OnlineDecoder, first: int, last: int) -> None:
        for update in range(first, last + 1):
            rollout = play.rollout(10 * update - 10, 10 * update)
            torch.manual_seed(update)
            decoder.learn(rollout, update)

    whole = online_decoder(cfg, [2, 3, 5])
    learn(whole, 1, 6)
    interrupted = online_decoder(cfg, [2, 3, 5])
    learn(interrupted, 1, interrupted_after)
    torch.save(interrupted.state_dict(), tmp_path / "state.pt")
    resumed = online_decoder(cfg, [2, 3, 5])
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    resumed.decoder.load_state_dict(interrupted.decoder.state_dict())
    learn(resumed, interrupted_after + 1, 6)
    torch.testing.assert_close(resumed.decoder.state_dict(), whole.decoder.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(resumed.state_dict(), whole.state_dict(), rtol=0, atol=0)


@given(size=st.integers(1, 50), batch_size=st.integers(1, 60), count=st.integers(1, 3))
def test_epochs_are_permutations_in_batches(size, batch_size, count):
    batches = list(epochs(size, count, batch_size, torch.device("cpu")))
    row = torch.cat(batches).view(count, size)
    assert all(sorted(epoch.tolist()) == list(range(size)) for epoch in row)
    assert max(map(len, batches)) <= batch_size


def test_fit_trains_the_named_network_on_the_named_examples():
    torch.manual_seed(0)
    network, inputs, ta = nn.Linear(4, 3), torch.randn(10, 4), torch.randint(3, (10,))
    by_hand = copy.deepcopy(network)
    batches = [torch.tensor([0, 1, 2]), torch.tensor([3]), torch.tensor([9, 9])]
    fit = Fit(lambda ids: network(inputs[ids]), network, ta, lr=0.1)
    for ids in batches:
        fit.step(ids)
    loss = fit.loss
    optimizer = torch.optim.Adam(by_hand.parameters(), lr=0.1)
    losses = []
    for ids in batches:
        losses.append(F.cross_entropy(by_hand(inputs[ids]), ta[ids]))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    torch.testing.assert_close(network.state_dict(), by_hand.state_dict(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(loss, torch.stack(losses).mean(), rtol=1e-5, atol=1e-5)
