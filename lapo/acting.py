"""Playing with a policy of ours, and judging it.

Dimensions: N environments · H, W, C frame · A actions
"""

from collections.abc import Callable

import numpy as np
import torch

from build import make_acting_policy
from config import Config, EvalConfig, validate
from experts import Expert
from ppo import sample
from procgen_env import ACTIONS, HELD_OUT_LEVELS, Evaluation, VecEnv, Visuals, play
from training import Compute

Act = Callable[[np.ndarray], np.ndarray]


def random_actor(seed: int) -> Act:
    """Uniform random actions: frames (N, H, W, C) → actions (N,)."""
    generator = np.random.default_rng(seed)
    return lambda frames: generator.integers(len(ACTIONS), size=len(frames))


def network_actor(network: torch.nn.Module, compute: Compute, greedy: bool) -> Act:
    """Actions of a network with `logits`: sampled from its distribution or, if `greedy`, the most likely."""

    @torch.inference_mode()
    def act(frames: np.ndarray) -> np.ndarray:
        with compute.autocast():
            logits = network.logits(torch.from_numpy(frames).to(compute.device))
        action = logits.argmax(-1) if greedy else sample(logits)[0]
        return action.cpu().numpy()

    return act


def checkpoint_actor(checkpoint: dict, compute: Compute, greedy: bool) -> Act:
    """The policy of a stage-3 checkpoint, see `network_actor`."""
    cfg: Config = validate(checkpoint["config"], source="the checkpoint's config")
    network = compute.place(make_acting_policy(cfg, cfg.stage3.mode))
    network.load_state_dict(checkpoint["state"]["policy"])
    return network_actor(network.eval(), compute, greedy)


def judge(player: Act | Expert, game: str, visuals: Visuals, cfg: EvalConfig, seed: int) -> Evaluation:
    """Play `cfg.episodes` episodes of `game` on levels that no recorded data shows.

    An expert must be one for `num_judged(cfg)` environments.
    """
    env = VecEnv(game, num_judged(cfg), seed=seed, levels=HELD_OUT_LEVELS, visuals=visuals)
    try:
        if isinstance(player, Expert):
            return play(lambda frames: player.act(env.get_state()), env, cfg.episodes)
        return play(player, env, cfg.episodes, sparing=True)
    finally:
        env.close()


def num_judged(cfg: EvalConfig) -> int:
    """Environments that `judge` plays in."""
    return min(cfg.num_envs, cfg.episodes)
