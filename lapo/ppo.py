"""Proximal policy optimisation (PPO, Schulman et al. 2017): loss, rollouts, training.

Dimensions
    S rollout steps · N environments · B minibatch · H, W, C frame · A actions

The policy is a module with two methods: `encode(obs) -> tuple of tensors (N, ...)`, which a rollout stores,
and `forward(*encoded) -> logits (N, A), value (N,)`.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from lapo.acting import evaluate_aside
from lapo.config import Config, PPOConfig
from lapo.decoding import OnlineDecoder
from lapo.errors import UserError, say
from lapo.frames import resize
from lapo.games.env import Env
from lapo.games.make import make_env
from lapo.games.vec_env import EpisodeTracker
from lapo.models import make_acting_policy
from lapo.policies import sample
from lapo.runs.compute import Compute, TransferBuffer
from lapo.runs.optim import make_optimizer
from lapo.runs.run import Run


class Rollout:
    """S steps of N environments, in tensors that are allocated once and reused by every rollout."""

    def __init__(self, num_steps: int, num_envs: int, device: torch.device, keep_frames: bool = False):
        """`keep_frames`: store the frames as well as their encodings."""
        self.keep_frames = keep_frames
        self.frames: Tensor | None = None  # (S+1, N, H, W, C) uint8; the last one is the obs after step S-1

        def zeros(dtype: torch.dtype) -> Tensor:
            return torch.zeros(num_steps, num_envs, dtype=dtype, device=device)

        self.encoded: list[Tensor] = []  # each (S, N, ...), allocated at the first step
        self.actions = zeros(torch.int64)
        self.logprobs = zeros(torch.float32)
        self.values = zeros(torch.float32)
        self.rewards = zeros(torch.float32)
        self.dones = zeros(torch.bool)  # whether the action of this step ended the episode
        self.advantages = zeros(torch.float32)  # computed, as `returns`, when the rollout is full
        self.returns = zeros(torch.float32)

    def record(self, step: int, frames: Tensor, decision: "Decision") -> None:
        """Store frames and decision of `step`. The collector stores `rewards` and `dones`."""
        if not self.encoded:
            self.encoded = [x.new_zeros(len(self.actions), *x.shape) for x in decision.encoded]
            if self.keep_frames:
                self.frames = frames.new_zeros(len(self.actions) + 1, *frames.shape)
        for stored, x in zip(self.encoded, decision.encoded, strict=True):
            stored[step] = x
        if self.frames is not None:
            self.frames[step] = frames
        self.actions[step], self.logprobs[step] = decision.action, decision.logprob
        self.values[step] = decision.value


class Decision(NamedTuple):
    """A policy's outputs for N frames."""

    encoded: tuple[Tensor, ...]
    """The frames' encodings, each (N, ...)."""
    action: Tensor
    """(N,) int64, sampled."""
    logprob: Tensor
    """(N,), the action's log-probability."""
    value: Tensor
    """(N,), the value estimate."""


def compute_gae(
    rewards: Tensor, dones: Tensor, values: Tensor, last_value: Tensor, gamma: float, gae_lambda: float
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (Schulman et al. 2016).

    `rewards` and `values` are (S, N) float. `dones` (S, N) bool tells whether step s ended its episode.
    `last_value` (N,) is the value of the observation after the last step. Returns advantages and returns
    (advantages + values), both (S, N).
    """
    nonterminal = (~dones).to(values.dtype)
    next_values = torch.cat([values[1:], last_value[None]])
    deltas = rewards + gamma * next_values * nonterminal - values
    decay = gamma * gae_lambda * nonterminal
    advantages = torch.empty_like(values)
    running = torch.zeros_like(last_value)
    for step in reversed(range(len(rewards))):
        running = torch.addcmul(deltas[step], decay[step], running)
        advantages[step] = running
    return advantages, advantages + values


def ppo_loss(
    logits: Tensor,
    value: Tensor,
    action: Tensor,
    old_logprob: Tensor,
    old_value: Tensor,
    advantage: Tensor,
    returns: Tensor,
    cfg: PPOConfig,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Clipped PPO loss of a minibatch (Schulman et al. 2017): logits (B, A), everything else (B,).

    Advantages are normalised over the minibatch. Like the policy's ratio, the change of the value is clipped.
    Returns the loss and detached metrics.
    """
    logprobs = logits.log_softmax(-1)
    log_ratio = logprobs.gather(-1, action[:, None]).squeeze(-1) - old_logprob
    ratio = log_ratio.exp()
    advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
    policy_loss = torch.max(-advantage * ratio, -advantage * ratio.clamp(1 - cfg.clip, 1 + cfg.clip)).mean()

    clipped_value = old_value + (value - old_value).clamp(-cfg.clip, cfg.clip)
    value_loss = 0.5 * torch.max((value - returns).square(), (clipped_value - returns).square()).mean()

    entropy = -(logprobs.exp() * logprobs).sum(-1).mean()
    loss = policy_loss - cfg.entropy_coef * entropy + cfg.value_coef * value_loss
    with torch.no_grad():
        metrics = {
            "policy_loss": policy_loss.detach(),
            "value_loss": value_loss.detach(),
            "entropy": entropy.detach(),
            "approx_kl": (ratio - 1 - log_ratio).mean(),
            "clip_fraction": ((ratio - 1).abs() > cfg.clip).float().mean(),
        }
    return loss, metrics


def minibatches(size: int, count: int, device: torch.device) -> Iterator[Tensor]:
    """A random permutation of `size` indices, split into `count` minibatches of nearly equal size."""
    yield from torch.randperm(size, device=device).tensor_split(count)


def ppo_step(
    policy: Callable[..., tuple[Tensor, Tensor]],
    optimizer: torch.optim.Optimizer,
    rollout: Rollout,
    ids: Tensor,
    cfg: PPOConfig,
    autocast: Callable[[], AbstractContextManager],
) -> dict[str, Tensor]:
    """One optimisation step of `policy` on the rollout's steps with indices `ids` (B,).

    Only the optimiser's parameters are clipped and updated. Returns metrics, on the device.
    """
    encoded = (x.flatten(0, 1)[ids] for x in rollout.encoded)
    with autocast():
        logits, value = policy(*encoded)
    stored = rollout.actions, rollout.logprobs, rollout.values, rollout.advantages, rollout.returns
    loss, metrics = ppo_loss(logits, value, *(x.flatten()[ids] for x in stored), cfg)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    params = [p for group in optimizer.param_groups for p in group["params"]]
    metrics["grad_norm"] = nn.utils.clip_grad_norm_(params, cfg.clip_norm)
    optimizer.step()
    return metrics


def ppo_update(
    step: Callable[[Tensor], dict[str, Tensor]], rollout: Rollout, last_value: Tensor, cfg: PPOConfig
) -> dict[str, Tensor]:
    """Train on a full rollout: `cfg.epochs` epochs of `cfg.minibatches` minibatches each.

    `step` trains on the minibatch with given indices, see `ppo_step`. `last_value` (N,) is the value of the
    observation after the last step. Returns metrics, averaged over all minibatches, on the device.
    """
    advantages, returns = compute_gae(
        rollout.rewards, rollout.dones, rollout.values, last_value, cfg.gamma, cfg.gae_lambda
    )
    rollout.advantages.copy_(advantages)
    rollout.returns.copy_(returns)
    sums: dict[str, Tensor] = {}
    for _ in range(cfg.epochs):
        for ids in minibatches(returns.numel(), cfg.minibatches, last_value.device):
            metrics = step(ids)
            before = list(sums.values()) or [torch.zeros_like(x) for x in metrics.values()]
            sums = dict(zip(metrics, torch._foreach_add(before, list(metrics.values())), strict=True))
    count = cfg.epochs * cfg.minibatches
    # Explained variance is 1 - Var(returns - values) / Var(returns). The constant avoids 0/0 without rewards.
    unexplained = (returns - rollout.values).var() / (returns.var() + 1e-8)
    return {key: x / count for key, x in sums.items()} | {"explained_variance": 1 - unexplained}


# ---------------------------------------------------------------- rollouts


class ReturnNormalizer:
    """Divides rewards by the running standard deviation of the discounted return, then clips them.

    This equals a clip after NormalizeReward of gym 0.23, which the published code uses.
    """

    def __init__(self, num_envs: int, *, gamma: float, clip: float = 10.0):
        """`gamma`: discount of the return; rewards are clipped to ±`clip`."""
        self.gamma, self.clip = gamma, clip
        self.returns = np.zeros(num_envs)
        # Moments of all discounted returns so far. The small initial count avoids 0/0 in the first variance.
        self.mean, self.var, self.count = 0.0, 1.0, 1e-4

    def __call__(self, rewards: np.ndarray, dones: np.ndarray) -> np.ndarray:
        """Raw `rewards` (N,) and `dones` (N,) of a step → scaled rewards, float32 (N,)."""
        self.returns = self.returns * self.gamma + rewards
        self._update_moments(self.returns)
        self.returns[dones] = 0.0
        scaled = rewards / math.sqrt(self.var + 1e-8)
        return np.clip(scaled, -self.clip, self.clip).astype(np.float32)

    def state_dict(self) -> dict[str, float | list[float]]:
        """All mutable state, as numbers."""
        moments = {"mean": self.mean, "var": self.var, "count": self.count}
        return {"returns": self.returns.tolist(), **moments}

    def load_state_dict(self, state: dict[str, float | list[float]]) -> None:
        """Restore `state_dict`."""
        self.returns = np.array(state["returns"])
        self.mean, self.var, self.count = state["mean"], state["var"], state["count"]

    def _update_moments(self, values: np.ndarray) -> None:
        # Merge the moments of two samples (Chan et al. 1983).
        total = self.count + len(values)
        delta = float(values.mean()) - self.mean
        squares = self.var * self.count + float(values.var()) * len(values)
        self.mean += delta * len(values) / total
        self.var = (squares + delta**2 * self.count * len(values) / total) / total
        self.count = total


RECENT_EPISODES = 100


class Collector:
    """Collects rollouts from N environments.

    Attributes
        frames   current obs (N, H, W, C) uint8 on the device, overwritten by the next step; averaged to
                 `image_size`
        recent   raw returns of the last 100 finished episodes
    """

    def __init__(self, env: Env, gamma: float, compute: Compute, image_size: int = 64):
        self.env, self.compute, self.image_size = env, compute, image_size
        self.normalize = ReturnNormalizer(env.num_envs, gamma=gamma)
        self.tracker = EpisodeTracker(env.num_envs)
        self.recent: deque[float] = deque(maxlen=RECENT_EPISODES)
        self.observations, self.actions = TransferBuffer(compute.device), TransferBuffer(compute.device)
        self.frames = self.observations.to_device(resize(env.observe(), image_size))

    def collect(self, decide: Callable[[Tensor], Decision], rollout: Rollout) -> None:
        """Fill `rollout` with steps of the policy `decide` (frames → decision)."""
        rewards, dones = [], []
        for step in range(len(rollout.actions)):
            decision = decide(self.frames)
            self.env.act(self.actions.to_host(decision.action))
            rollout.record(step, self.frames, decision)  # while the environments step
            obs, reward, done = self.env.result()
            self.recent.extend(self.tracker.update(reward, done)[0].tolist())
            rewards.append(self.normalize(reward, done))
            dones.append(done)
            # The buffer is free: the device copied the previous obs before it returned the actions.
            self.frames = self.observations.to_device(resize(obs, self.image_size))
        rollout.rewards.copy_(torch.from_numpy(np.stack(rewards)))
        rollout.dones.copy_(torch.from_numpy(np.stack(dones)))
        if rollout.frames is not None:
            rollout.frames[-1] = self.frames

    def state_dict(self) -> dict:
        """Everything that the next rollout depends on, including the simulator's state."""
        states = [torch.frombuffer(bytearray(state), dtype=torch.uint8) for state in self.env.get_state()]
        return {
            "env": states,
            "frames": self.frames,
            "normalize": self.normalize.state_dict(),
            "tracker": self.tracker.state_dict(),
            "recent": list(self.recent),
        }

    def load_state_dict(self, state: dict) -> None:
        """Restore `state_dict`. Where the environment could not save its state, new episodes begin."""
        self.normalize.load_state_dict(state["normalize"])
        if state["env"]:
            self.env.set_state([part.numpy().tobytes() for part in state["env"]])
            self.frames = self.observations.to_device(state["frames"].numpy())
            self.tracker.load_state_dict(state["tracker"])
        else:
            say("the environment does not save its state: new episodes begin")
            self.normalize.returns[:] = 0
        self.recent = deque(state["recent"], maxlen=RECENT_EPISODES)


# ---------------------------------------------------------------- training


def num_updates(cfg: Config) -> tuple[int, int]:
    """Number of PPO updates of a run, and env steps per update.

    The number of updates is rounded up, so a run may be slightly longer than configured. Raises `UserError`
    if a minibatch is too small to normalise its advantages.
    """
    steps_per_update = cfg.ppo.num_envs * cfg.ppo.rollout_steps
    if steps_per_update < 2 * cfg.ppo.minibatches:
        raise UserError(
            f"ppo.minibatches is {cfg.ppo.minibatches}, too many for an update's {steps_per_update} steps"
            " (ppo.num_envs · ppo.rollout_steps); a minibatch needs at least 2"
        )
    return math.ceil(cfg.stage3.steps / steps_per_update), steps_per_update


class PPOTrainer:
    """Trains a policy by PPO. An update consists of `collect`, `improve` and `decode`."""

    def __init__(
        self,
        cfg: Config,
        compute: Compute,
        env: Env,
        policy: nn.Module,
        optimizer: torch.optim.Optimizer,
        set_lrs: Callable[[int], None] = lambda env_steps: None,
        decoder: OnlineDecoder | None = None,
    ):
        self.cfg, self.compute, self.policy, self.optimizer = cfg.ppo, compute, policy, optimizer
        self.set_lrs, self.decoder = set_lrs, decoder
        self.collector = Collector(env, cfg.ppo.gamma, compute, cfg.data.image_size)
        self.rollout = Rollout(
            cfg.ppo.rollout_steps, cfg.ppo.num_envs, compute.device, keep_frames=decoder is not None
        )
        self.forward = compute.compiled(policy)
        self.decide, self.learn = compute.replayed(self._decide), compute.replayed(self._learn)

    def collect(self) -> Tensor:
        """Collect a rollout. Returns the value (N,) of the observation after its last step."""
        self.collector.collect(self.decide, self.rollout)
        return self._evaluate(self.collector.frames)[2]

    @torch.no_grad()
    def _evaluate(self, frames: Tensor) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
        """Frames (N, H, W, C) uint8 → their encodings, logits (N, A), value (N,)."""
        with self.compute.autocast():
            encoded = self.policy.encode(frames)
            return encoded, *self.policy(*encoded)

    def _decide(self, frames: Tensor) -> Decision:
        encoded, logits, value = self._evaluate(frames)
        return Decision(encoded, *sample(logits), value)

    def improve(self, env_steps: int, last_value: Tensor) -> dict[str, Tensor]:
        """Do a PPO update on the rollout; returns metrics.

        `env_steps`: env steps so far, for the learning rates; `last_value` (N,): as `collect` returned it.
        """
        self.set_lrs(env_steps)
        return ppo_update(self.learn, self.rollout, last_value, self.cfg)

    def _learn(self, ids: Tensor) -> dict[str, Tensor]:
        return ppo_step(self.forward, self.optimizer, self.rollout, ids, self.cfg, self.compute.autocast)

    def decode(self, update: int) -> dict[str, Tensor]:
        """Let the decoder, if there is one, learn from the rollout of `update` (from 1); returns metrics."""
        return self.decoder.learn(self.rollout, update) if self.decoder else {}

    def _parts(self) -> dict:
        parts = {"policy": self.policy, "optimizer": self.optimizer, "collector": self.collector}
        return parts | ({"decoder": self.decoder} if self.decoder else {})

    def state_dict(self) -> dict:
        """Everything that the next update depends on."""
        return {name: part.state_dict() for name, part in self._parts().items()}

    def load_state_dict(self, state: dict) -> None:
        """Restore `state_dict`."""
        for name, part in self._parts().items():
            part.load_state_dict(state[name])
        if self.decoder and not state["collector"]["env"]:
            self.decoder.last_steps = None  # no window may reach into the new episodes


def training_env(cfg: Config) -> Env:
    """The training environments."""
    return make_env(cfg.env, cfg.ppo.num_envs, seed=cfg.seed, visuals=cfg.visuals)


def evaluation_due(cfg: Config, update: int) -> bool:
    """Whether the policy is evaluated after `update` (from 1): the first at or past every `eval_every` steps.

    The last one is not: the evaluation of the finished run follows it.
    """
    updates, steps_per_update = num_updates(cfg)
    every, env_steps = cfg.stage3.eval_every, update * steps_per_update
    return every > 0 and update < updates and env_steps // every > (env_steps - steps_per_update) // every


def train_ppo(cfg: Config, run: Run, trainer: PPOTrainer) -> None:
    """Train for `cfg.stage3.steps` env steps; evaluate on held-out levels where `evaluation_due` says so.

    Evaluations leave no trace in the training. What they took is logged (`eval_seconds`) and printed.
    """
    updates, steps_per_update = num_updates(cfg)
    began, evaluations, eval_seconds = time.monotonic(), 0, 0.0
    if run.state:
        trainer.load_state_dict(run.state)
    recent = trainer.collector.recent
    options = {"save_every": cfg.stage3.save_every, "unit": "step", "scale": steps_per_update}
    for update in run.loop(updates, trainer.state_dict, **options):
        env_steps = (update + 1) * steps_per_update
        run.track(trainer.improve(env_steps, trainer.collect()))
        metrics = trainer.decode(update + 1)
        if recent:
            metrics["train_return"] = sum(recent) / len(recent)
        if evaluation_due(cfg, update + 1):
            start = time.monotonic()
            metrics |= evaluate_aside(trainer.policy, cfg, trainer.compute)
            metrics["eval_seconds"] = time.monotonic() - start
            evaluations, eval_seconds = evaluations + 1, eval_seconds + metrics["eval_seconds"]
        if (
            metrics.keys() - {"train_return"}
            or (update + 1) % cfg.stage3.log_every == 0
            or update + 1 == updates
        ):
            run.log(env_steps, metrics)
    trainer.collector.env.close()
    if evaluations:
        seconds = time.monotonic() - began
        print(
            f"{evaluations} evaluations on the way took {eval_seconds:.0f} of {seconds:.0f} s"
            f" ({eval_seconds / seconds:.0%})"
        )


def train_from_scratch(cfg: Config, compute: Compute, run: Run) -> nn.Module:
    """Train the acting policy's network by PPO from random weights, end to end; returns the policy."""
    env = training_env(cfg)
    policy = compute.place(make_acting_policy(cfg, "scratch", env.num_actions))
    groups = [{"params": list(policy.parameters()), "lr": cfg.ppo.scratch_lr}]
    optimizer = make_optimizer(torch.optim.Adam, groups, [policy])
    train_ppo(cfg, run, PPOTrainer(cfg, compute, env, policy, optimizer))
    return policy
