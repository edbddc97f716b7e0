"""Fills PPO's rollouts by playing, and carries what goes on from one rollout to the next.

Dimensions: S rollout steps · N environments · H, W, C frame
"""

from collections import deque
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from ppo import Rollout, sample
from procgen_env import EpisodeTracker, ReturnNormalizer, VecEnv
from training import Compute

RECENT_EPISODES = 100

Watch = Callable[[Tensor, Tensor, Tensor], None]


class Collector:
    """Plays N environments of a game with a policy that learns meanwhile.

    Attributes
        frames   (N, H, W, C) uint8 on the device: what the policy sees next
        recent   raw returns of the last 100 finished episodes
    """

    def __init__(self, env: VecEnv, gamma: float, compute: Compute):
        self.env, self.compute = env, compute
        self.normalize = ReturnNormalizer(env.num_envs, gamma=gamma)
        self.tracker = EpisodeTracker(env.num_envs)
        self.recent: deque[float] = deque(maxlen=RECENT_EPISODES)
        self.frames = self._upload(env.observe())

    @torch.no_grad()
    def collect(self, policy: nn.Module, rollout: Rollout, watch: Watch | None = None) -> Tensor:
        """Fill `rollout`; `watch` sees each step's frames, actions (N,) and dones (N,).

        Returns the value (N,) of the observation after the last step.
        """
        rewards, dones = [], []
        for step in range(len(rollout.actions)):
            with self.compute.autocast():
                encoded = policy.encode(self.frames)
                logits, value = policy(*encoded)
            action, logprob = sample(logits)
            self.env.act(action.cpu().numpy())
            rollout.record(step, encoded, action, logprob, value)
            obs, reward, done = self.env.result()
            self.recent.extend(self.tracker.update(reward, done)[0].tolist())
            rewards.append(self.normalize(reward, done))
            dones.append(done)
            if watch:
                watch(self.frames, action, torch.from_numpy(done).to(action.device))
            self.frames = self._upload(obs)
        rollout.rewards.copy_(torch.from_numpy(np.stack(rewards)))
        rollout.dones.copy_(torch.from_numpy(np.stack(dones)))
        with self.compute.autocast():
            return policy(*policy.encode(self.frames))[1]

    def _upload(self, obs: np.ndarray) -> Tensor:
        return torch.from_numpy(obs).to(self.compute.device)

    def state_dict(self) -> dict:
        """Everything the next rollout depends on, the simulator's state included, as plain data."""
        states = [torch.frombuffer(bytearray(state), dtype=torch.uint8) for state in self.env.get_state()]
        return {
            "env": states,
            "frames": self.frames,
            "normalize": self.normalize.state_dict(),
            "tracker": self.tracker.state_dict(),
            "recent": list(self.recent),
        }

    def load_state_dict(self, state: dict) -> None:
        """Continue from what `state_dict` gave."""
        self.env.set_state([part.numpy().tobytes() for part in state["env"]])
        self.frames = state["frames"].to(self.compute.device)
        self.normalize.load_state_dict(state["normalize"])
        self.tracker.load_state_dict(state["tracker"])
        self.recent = deque(state["recent"], maxlen=RECENT_EPISODES)
