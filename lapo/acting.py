"""Acting with trained policies, and evaluating them on held-out levels.

Dimensions: N environments · H, W, C frame · A actions
"""

import math
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass

import numpy as np
import torch

from lapo.config import Config, EvalConfig
from lapo.frames import resize
from lapo.games.env import Env
from lapo.games.make import can_be_played, make_env, relative_return
from lapo.games.table import ACTIONS, Visuals
from lapo.games.vec_env import EpisodeTracker
from lapo.modes import MODES
from lapo.policies import restore_policy, sample
from lapo.runs.checkpoints import saved_config
from lapo.runs.compute import Compute, rng_state, set_rng_state

Act = Callable[[np.ndarray], np.ndarray]


def random_actor(seed: int, num_actions: int = len(ACTIONS)) -> Act:
    """Uniform random actions: frames (N, H, W, C) → actions (N,)."""
    generator = np.random.default_rng(seed)
    return lambda frames: generator.integers(num_actions, size=len(frames))


def network_actor(network: torch.nn.Module, compute: Compute, greedy: bool, image_size: int = 64) -> Act:
    """Act by a network's `logits`: sample actions or, if `greedy`, take the most likely ones.

    Larger frames are averaged to the network's `image_size`.
    """

    @torch.inference_mode()
    def act(frames: np.ndarray) -> np.ndarray:
        frames = resize(frames, image_size)
        with compute.autocast():
            logits = network.logits(torch.from_numpy(frames).to(compute.device))
        action = logits.argmax(-1) if greedy else sample(logits)[0]
        return action.cpu().numpy()

    return act


def checkpoint_actor(checkpoint: dict, compute: Compute, greedy: bool) -> Act:
    """Act by the policy of a `load_policy_checkpoint`, see `network_actor`."""
    image_size = saved_config(checkpoint).data.image_size
    return network_actor(restore_policy(checkpoint, compute), compute, greedy, image_size)


def steps_played(checkpoint: dict) -> int | None:
    """Env steps that a policy was trained for; None if it was trained on recorded frames."""
    saved = checkpoint["config"]
    if MODES[saved["stage3"]["mode"]].plays:
        group = saved["ppo"]
    elif checkpoint["stage"] == "expert":
        group = saved["dagger"]
    else:
        return None
    return checkpoint["step"] * group["num_envs"] * group["rollout_steps"]


@dataclass(frozen=True)
class Evaluation:
    """Raw returns and lengths (in steps) of complete episodes."""

    returns: np.ndarray
    lengths: np.ndarray
    speed: float = math.nan
    """Env steps per second of CPU time of all threads."""

    @property
    def episodes(self) -> int:
        """Number of episodes."""
        return self.returns.size

    @property
    def mean(self) -> float:
        """Mean return."""
        return float(self.returns.mean())

    @property
    def stderr(self) -> float:
        """Standard error of the mean return; NaN for a single episode."""
        if self.episodes < 2:
            return math.nan
        return float(self.returns.std(ddof=1)) / math.sqrt(self.episodes)


def play(
    act: Callable[[np.ndarray], np.ndarray], env: Env, episodes: int, *, skip_finished: bool = False
) -> Evaluation:
    """Play `episodes` complete episodes, rounded up to a multiple of N, in a new `env`.

    `act` maps frames (N, H, W, C) uint8 to actions (N,). Every environment contributes its first
    `episodes / N` episodes: counting whichever episodes end first would favour short ones. With
    `skip_finished`, `act` only gets the frames of environments that still contribute; the others take action
    0. This saves time when few long episodes remain, but needs an `act` without a state per environment.
    """
    per_env = -(-episodes // env.num_envs)
    returns = np.zeros((env.num_envs, per_env))
    lengths = np.zeros((env.num_envs, per_env), dtype=np.int64)
    counts = np.zeros(env.num_envs, dtype=np.int64)
    tracker = EpisodeTracker(env.num_envs)
    steps, start = 0, time.process_time()
    obs = env.observe()
    while (playing := counts < per_env).any():
        if skip_finished:
            actions = np.zeros(env.num_envs, np.int64)
            actions[playing] = act(obs[playing])
        else:
            actions = act(obs)
        obs, rewards, dones = env.step(actions)
        finished_returns, finished_lengths = tracker.update(rewards, dones)
        counted = counts[dones] < per_env
        envs = np.flatnonzero(dones)[counted]
        returns[envs, counts[envs]] = finished_returns[counted]
        lengths[envs, counts[envs]] = finished_lengths[counted]
        counts[envs] += 1
        steps += env.num_envs
    # Very short play may take less than the clock's resolution.
    return Evaluation(returns.ravel(), lengths.ravel(), steps / max(time.process_time() - start, 1e-6))


def held_out_env(name: str, visuals: Visuals, cfg: EvalConfig, seed: int) -> Env:
    """`num_eval_envs(cfg)` environments on the held-out levels, which no recorded data contains."""
    return make_env(name, num_eval_envs(cfg), seed=seed, levels="held_out", visuals=visuals)


def num_eval_envs(cfg: EvalConfig) -> int:
    """Number of environments for evaluation."""
    return min(cfg.num_envs, cfg.episodes)


def evaluate_actor(act: Act, game: str, visuals: Visuals, cfg: EvalConfig, seed: int) -> Evaluation:
    """Returns and lengths of `cfg.episodes` episodes of `game` on held-out levels."""
    with closing(held_out_env(game, visuals, cfg, seed)) as env:
        return play(act, env, cfg.episodes, skip_finished=True)


def evaluate_policy(policy: torch.nn.Module, cfg: Config, compute: Compute) -> dict[str, float]:
    """Evaluate a policy on held-out levels; returns metrics, {} if `cfg.env` cannot be played."""
    if not can_be_played(cfg.env):
        return {}
    act = network_actor(policy.eval(), compute, cfg.eval.greedy, cfg.data.image_size)
    evaluation = evaluate_actor(act, cfg.env, cfg.visuals, cfg.eval, cfg.seed)
    metrics = {"return_mean": evaluation.mean, "return_stderr": evaluation.stderr}
    relative = relative_return(cfg.env, evaluation.mean)
    if relative is not None:
        metrics["relative_return"] = relative
    return metrics | {"episodes": evaluation.episodes}


def evaluate_aside(policy: torch.nn.Module, cfg: Config, compute: Compute) -> dict[str, float]:
    """Evaluate a policy that is still being trained: `evaluate_policy` without a trace in the training.

    The random state is that of the seed meanwhile, so all evaluations of a run draw the same numbers; it is
    restored afterwards, and so are the modules' modes. Returns the metrics `eval_return_mean` and, for two
    episodes or more, `eval_return_stderr`.
    """
    rng, modes = rng_state(compute.device), {module: module.training for module in policy.modules()}
    torch.manual_seed(cfg.seed)
    try:
        metrics = evaluate_policy(policy, cfg, compute)
    finally:
        set_rng_state(rng, compute.device)
        for module, mode in modes.items():
            module.training = mode
    kept = {f"eval_{key}": metrics[key] for key in ("return_mean", "return_stderr")}
    return {key: value for key, value in kept.items() if not math.isnan(value)}
