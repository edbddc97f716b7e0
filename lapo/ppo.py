"""Proximal policy optimisation (Schulman et al. 2017): tensors in, tensors out.

Dimensions
    S rollout steps · N environments · B minibatch · A actions

The policy is any module with `encode(obs) -> tuple of tensors (N, ...)`, what a rollout keeps of the
observations, and `forward(*encoded) -> logits (N, A), value (N,)`.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from config import PPOConfig


class Rollout:
    """S steps of N environments, in tensors allocated once and overwritten by every rollout."""

    def __init__(self, num_steps: int, num_envs: int, device: torch.device):
        def zeros(dtype: torch.dtype) -> Tensor:
            return torch.zeros(num_steps, num_envs, dtype=dtype, device=device)

        self.encoded: list[Tensor] = []  # each (S, N, ...), allocated when its shape is known
        self.actions = zeros(torch.int64)
        self.logprobs = zeros(torch.float32)
        self.values = zeros(torch.float32)
        self.rewards = zeros(torch.float32)
        self.dones = zeros(torch.bool)  # the action of this step ended the episode

    def record(
        self, step: int, encoded: tuple[Tensor, ...], action: Tensor, logprob: Tensor, value: Tensor
    ) -> None:
        """Keep what the policy saw and did at `step`; the environment's answer goes to `rewards`, `dones`."""
        if not self.encoded:
            self.encoded = [x.new_zeros(len(self.actions), *x.shape) for x in encoded]
        for kept, x in zip(self.encoded, encoded, strict=True):
            kept[step] = x
        self.actions[step], self.logprobs[step], self.values[step] = action, logprob, value


def sample(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Draw actions (N,) from logits (N, A) by the Gumbel-max trick; also their log-probabilities (N,)."""
    logprobs = logits.log_softmax(-1)
    action = (logprobs - torch.empty_like(logprobs).exponential_().log()).argmax(-1)
    return action, logprobs.gather(-1, action[:, None]).squeeze(-1)


def compute_gae(
    rewards: Tensor, dones: Tensor, values: Tensor, last_value: Tensor, gamma: float, gae_lambda: float
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (Schulman et al. 2016).

    `rewards`, `values` (S, N) float; `dones` (S, N) bool, whether step s ended its episode, so that nothing
    after it counts; `last_value` (N,), the value of the observation after the last step.
    Returns advantages and returns (advantages + values), both (S, N).
    """
    alive = (~dones).to(values.dtype)
    next_values = torch.cat([values[1:], last_value[None]])
    deltas = rewards + gamma * next_values * alive - values
    decay = gamma * gae_lambda * alive
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
    """Clipped PPO loss of a minibatch: logits (B, A), everything else (B,).

    Advantages are normalised here, over the minibatch; the value's change is clipped like the policy's ratio.
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
    """A random permutation of `size` indices in `count` nearly equal parts."""
    yield from torch.randperm(size, device=device).tensor_split(count)


def ppo_update(
    policy: Callable[..., tuple[Tensor, Tensor]],
    optimizer: torch.optim.Optimizer,
    rollout: Rollout,
    last_value: Tensor,
    cfg: PPOConfig,
    autocast: Callable[[], AbstractContextManager],
) -> dict[str, Tensor]:
    """Improve `policy` (encoded observations → logits, value) on a full rollout.

    Makes `cfg.epochs` passes in `cfg.minibatches` minibatches each.

    `last_value` (N,) is the value of the observation after the last step. Only what the optimiser holds is
    clipped and changed. Returns metrics averaged over all minibatches, still on the device.
    """
    advantages, returns = compute_gae(
        rollout.rewards, rollout.dones, rollout.values, last_value, cfg.gamma, cfg.gae_lambda
    )
    rows = [x.flatten(0, 1) for x in (rollout.actions, rollout.logprobs, rollout.values, advantages, returns)]
    encoded = [x.flatten(0, 1) for x in rollout.encoded]
    params = [p for group in optimizer.param_groups for p in group["params"]]
    sums: dict[str, Tensor] = {}
    for _ in range(cfg.epochs):
        for ids in minibatches(rows[0].numel(), cfg.minibatches, last_value.device):
            with autocast():
                logits, value = policy(*(x[ids] for x in encoded))
            loss, metrics = ppo_loss(logits, value, *(x[ids] for x in rows), cfg)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            metrics["grad_norm"] = nn.utils.clip_grad_norm_(params, cfg.clip_norm)
            optimizer.step()
            sums = {key: sums.get(key, 0) + x for key, x in metrics.items()}
    count = cfg.epochs * cfg.minibatches
    # Before the first reward the returns hardly vary; the tiny term keeps the share finite.
    unexplained = (returns - rollout.values).var() / (returns.var() + 1e-8)
    return {key: x / count for key, x in sums.items()} | {"unexplained_variance": unexplained}
