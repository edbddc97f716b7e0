"""Playing with a policy of ours, and judging it.

Dimensions: N environments · H, W, C frame · A actions
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from build import make_acting_policy
from config import EvalConfig, load_config, to_dict, validate
from errors import UserError
from experts import Expert
from ppo import sample
from procgen_env import ACTIONS, HELD_OUT_LEVELS, Evaluation, VecEnv, Visuals, play
from runs import load_checkpoint
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


def load_policy(path: Path, command: str | None = None) -> dict:
    """The checkpoint of a policy that acts, of stage 3 or an expert; `command` is what makes a missing one.

    Raises `UserError` as `load_checkpoint`, and for a stage whose networks cannot act.
    """
    checkpoint = load_checkpoint(path, command)
    if not checkpoint["stage"].startswith(("stage3", "expert")):
        saved = checkpoint["config"]
        raise UserError(
            f"{path} is a checkpoint of {checkpoint['stage']}, which cannot act; make one that can with"
            f" `python stage3.py --env {saved['env']} --exp {saved['exp']} --seed {saved['seed']}`"
        )
    return checkpoint


def restore_network(checkpoint: dict) -> torch.nn.Module:
    """The network of a checkpoint that `load_policy` gave, ready to act on the CPU."""
    saved = checkpoint["config"]
    # Only what shapes the network is taken from there: experts are kept for long, and other keys come and go.
    values = to_dict(load_config([]))
    values |= {group: values[group] | saved[group] for group in ("model", "vq", "decoder")}
    cfg = validate(values, source="the checkpoint's config")
    network = make_acting_policy(cfg, saved["stage3"]["mode"])
    network.load_state_dict(checkpoint["state"]["policy"])
    return network.eval()


def checkpoint_actor(checkpoint: dict, compute: Compute, greedy: bool) -> Act:
    """The policy of a checkpoint that `load_policy` gave, see `network_actor`."""
    return network_actor(compute.place(restore_network(checkpoint)), compute, greedy)


def steps_played(checkpoint: dict) -> int | None:
    """Environment steps that a policy has learnt from so far; None if it learnt from recorded frames."""
    saved = checkpoint["config"]
    if saved["stage3"]["mode"] in ("online", "scratch"):
        group = saved["ppo"]
    elif checkpoint["stage"] == "expert":
        group = saved["dagger"]
    else:
        return None
    return checkpoint["step"] * group["num_envs"] * group["rollout_steps"]


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
