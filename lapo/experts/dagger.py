"""DAgger (Ross et al. 2011): distils an expert that reads the simulator's state into a policy on pixels.

In every round the policy plays, the expert labels each frame with its own action, and the policy is trained
on the latest frames. Unlike in behaviour cloning, the frames are those that the policy itself visits.

Dimensions: R rounds kept · S steps of a round · N environments · B batch · H, W, C frame · A actions
"""

import itertools
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lapo.config import DaggerConfig
from lapo.experts.expert import Expert
from lapo.frames import CHANNELS, resize
from lapo.games.env import Env
from lapo.games.vec_env import EpisodeTracker, num_cores
from lapo.models import Policy, image_size_of
from lapo.policies import sample
from lapo.ppo import RECENT_EPISODES
from lapo.runs.compute import Compute
from lapo.runs.optim import make_optimizer, piecewise_linear, set_lr

UNKNOWN = 255
"""Label of a frame that the expert was not asked about."""


class ParallelExpert(Expert):
    """Experts that plan in parallel, each for some of the N environments.

    A search spends most of its time in simulators, without Python's lock, so threads use all cores. The
    number of experts must not depend on the machine: sums over other groups of environments round otherwise.
    """

    SIZE = 16

    def __init__(self, make_expert: Callable[[int], Expert], num_envs: int):
        """`make_expert` makes an expert for a given number of environments."""
        bounds = np.linspace(0, num_envs, min(self.SIZE, num_envs) + 1).astype(int)
        self.slices = [slice(*bound) for bound in itertools.pairwise(bounds)]
        self.experts = [make_expert(part.stop - part.start) for part in self.slices]
        self.pool = ThreadPoolExecutor(num_cores())

    def act(self, states: list[bytes]) -> np.ndarray:
        """See `Expert`."""
        return self.act_for(states, np.ones(len(states), bool))

    def act_for(self, states: list[bytes], wanted: np.ndarray) -> np.ndarray:
        """Actions (N,) int32; `UNKNOWN` from experts none of whose environments is `wanted` (N,)."""

        def act(expert: Expert, part: slice) -> np.ndarray:
            if wanted[part].any():
                return expert.act(states[part])
            return np.full(part.stop - part.start, UNKNOWN, np.int32)

        return np.concatenate(list(self.pool.map(act, self.experts, self.slices)))

    def forget(self) -> None:
        """See `Expert`."""
        for expert in self.experts:
            expert.forget()


class Dagger:
    """Trains `policy` in rounds of `collect` and `fit`.

    Attributes
        count    rounds played; round k is stored at index k mod R
        frames   (R, S, N, H, W, C) uint8 on the device, the observations
        labels   (R, S, N) uint8 on the device, the expert's actions, or `UNKNOWN`
        actions  (R, S, N) uint8, the actions that were taken
        recent   raw returns of the last 100 finished episodes
    """

    def __init__(
        self,
        cfg: DaggerConfig,
        compute: Compute,
        env: Env,
        make_expert: Callable[[int], Expert],
        policy: Policy,
    ):
        """`make_expert` makes a teacher for a given number of environments."""
        self.cfg, self.compute, self.env, self.policy = cfg, compute, env, policy
        self.teacher = ParallelExpert(make_expert, env.num_envs)
        groups = [{"params": list(policy.parameters()), "lr": cfg.lr}]
        self.optimizer = make_optimizer(torch.optim.Adam, groups, [policy])
        self.loss_of = compute.compiled(self._loss_of)
        size = cfg.rounds_kept, cfg.rollout_steps, cfg.num_envs
        self.image_size = image_size_of(policy)
        frame = self.image_size, self.image_size, CHANNELS
        self.frames = torch.empty(*size, *frame, dtype=torch.uint8, device=compute.device)
        self.labels = torch.empty(*size, dtype=torch.uint8, device=compute.device)
        self.actions = torch.empty(*size, dtype=torch.uint8)
        self.starts: deque[list[bytes]] = deque(
            maxlen=cfg.rounds_kept
        )  # simulator states before the stored rounds
        self.tracker = EpisodeTracker(env.num_envs)
        self.recent: deque[float] = deque(maxlen=RECENT_EPISODES)
        self.count = 0

    @torch.no_grad()
    def collect(self) -> dict[str, Tensor]:
        """Play a round and store it; returns how often the policy's greedy action was the expert's.

        In a fraction of the steps, which decays from 1 to 0, the expert's action is taken instead of the
        policy's. The expert plans anew at every frame: a frame does not show a plan made some steps ago.
        It is asked about every `label_every`-th frame of an environment, and wherever its action is taken.
        """
        fraction = piecewise_linear(self.count / self.cfg.rounds, [(0.0, 1.0), (self.cfg.teacher_until, 0.0)])
        slot, agreed, every = self.count % self.cfg.rounds_kept, [], self.cfg.label_every
        states = self.env.get_state()
        self.starts.append(states)
        for step in range(self.cfg.rollout_steps):
            frames = self.frames[slot, step]
            self._observe(frames)
            with self.compute.autocast():
                logits = self.policy.logits(frames)
            instead = torch.rand(len(states)).numpy() < fraction
            due = (np.arange(len(states)) * every // len(states) + step) % every == 0
            self.teacher.forget()
            label = self.teacher.act_for(states, due | instead)  # runs concurrently with the policy on a GPU
            action = np.where(instead, label, sample(logits)[0].cpu().numpy()).astype(np.int32)
            self.actions[slot, step] = torch.from_numpy(action)
            self.labels[slot, step] = torch.from_numpy(label)
            agreed.append(logits.argmax(-1) == self.labels[slot, step])
            _, rewards, dones = self.env.step(action)
            self.recent.extend(self.tracker.update(rewards, dones)[0].tolist())
            states = self.env.get_state()
        self.count += 1
        known = self.labels[slot] != UNKNOWN
        return {"agreement": (torch.stack(agreed) & known).sum() / known.sum()}

    def fit(self) -> dict[str, Tensor]:
        """Do the round's optimisation steps on random stored frames; returns the mean loss."""
        done = (self.count - 1) / self.cfg.rounds
        set_lr(self.optimizer.param_groups[0], self.cfg.lr * (1 - done))
        filled = min(self.count, self.cfg.rounds_kept)
        frames, labels = self.frames[:filled].flatten(0, 2), self.labels[:filled].flatten()
        examples = torch.arange(len(labels), device=labels.device)
        if self.cfg.label_every > 1:
            examples = examples[labels != UNKNOWN]
        total = torch.zeros((), device=self.compute.device)
        for _ in range(self.cfg.updates):
            ids = examples[torch.randint(len(examples), (self.cfg.batch_size,), device=self.compute.device)]
            loss = self.loss_of(frames[ids], labels[ids].long())
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self.optimizer.step()
            total += loss.detach()
        return {"loss": total / self.cfg.updates}

    def _observe(self, frames: Tensor) -> None:
        """Copy the current observations, averaged to the policy's size, to `frames` (N, H, W, C)."""
        frames.copy_(torch.from_numpy(resize(self.env.observe(), self.image_size)))

    def _loss_of(self, frames: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy of the policy's actions at `frames` (B, H, W, C) to `labels` (B,)."""
        with self.compute.autocast():
            logits = self.policy.logits(frames)
        return F.cross_entropy(logits, labels)

    def state_dict(self) -> dict:
        """Everything that the next round depends on.

        Frames are not saved: replaying the actions from the state before the first stored round gives them.
        """
        filled = min(self.count, self.cfg.rounds_kept)
        start = [torch.frombuffer(bytearray(state), dtype=torch.uint8) for state in self.starts[0]]
        return {
            "policy": self.policy.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "count": self.count,
            "start": start,
            "actions": self.actions[:filled].clone(),
            "labels": self.labels[:filled].clone(),
            "tracker": self.tracker.state_dict(),
            "recent": list(self.recent),
        }

    def load_state_dict(self, state: dict) -> None:
        """Restore `state_dict`."""
        self.policy.load_state_dict(state["policy"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.tracker.load_state_dict(state["tracker"])
        self.recent = deque(state["recent"], maxlen=RECENT_EPISODES)
        self.count, filled = state["count"], len(state["actions"])
        self.actions[:filled], self.labels[:filled] = state["actions"], state["labels"]
        self.env.set_state([part.numpy().tobytes() for part in state["start"]])
        for number in range(self.count - filled, self.count):
            slot = number % self.cfg.rounds_kept
            self.starts.append(self.env.get_state())
            for frames, action in zip(self.frames[slot], self.actions[slot], strict=True):
                self._observe(frames)
                self.env.step(action.numpy().astype(np.int32))
