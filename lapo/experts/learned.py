"""Learned experts: policies from checkpoints, as `record_expert.py` plays them.

A module of its own because the recorder does not import PyTorch while planners play.
Dimensions: N environments · H, W, C frame · A actions
"""

import functools
import hashlib
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from lapo import models
from lapo.acting import steps_played
from lapo.errors import UserError
from lapo.frames import resize
from lapo.policies import count_actions, load_policy_checkpoint, restore_policy, sample
from lapo.runs.compute import Compute

CPU = Compute(torch.device("cpu"), bf16=False, compile=False)

Player = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
"""Frames (N, H, W, C) → actions (N,) and their log-probabilities (N,)."""


def fingerprint(path: Path) -> str:
    """SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def describe_policy(path: Path) -> dict:
    """Game, training and returns of a policy, from its checkpoint.

    Raises `UserError` as `load_policy_checkpoint` does.
    """
    checkpoint = load_policy_checkpoint(path, "python train_expert.py")
    saved, metrics = checkpoint["config"], checkpoint["metrics"]
    evaluated = {key: metrics.get(key) for key in ("return_mean", "return_stderr", "episodes")}
    made = {"method": f"stage 3, mode {saved['stage3']['mode']}"} | checkpoint["state"].get("origin", {})
    return {
        "game": saved["env"],
        "visuals": saved["visuals"],
        "made": made | checkpoint["provenance"],
        "env_steps": steps_played(checkpoint),
        "finished": checkpoint["finished"],
        **{key: None if value is None or math.isnan(value) else value for key, value in evaluated.items()},
        "config": saved,
    }


def versions() -> dict[str, str]:
    """Versions of the code that turns a policy's weights into actions."""
    return {"torch": str(torch.__version__), "models.py": fingerprint(Path(models.__file__))[:12]}


def make_player(path: Path, expected: str, noise: float, seed: int) -> Player:
    """A player that samples, seeded by `seed`, from the policy in `path`, whose fingerprint is `expected`.

    In a fraction `noise` of the steps it takes a uniformly random action instead; log-probabilities are those
    of the mixture. Actions are a function of the arguments and the frames: computed in fp32 on one thread, as
    the last bit of sums on several threads may differ between runs.
    """
    torch.set_num_threads(1)
    network = _read(path, expected)
    image_size = models.image_size_of(network)
    torch.manual_seed(seed)  # after the network was built, which draws random numbers
    num_actions = count_actions(network.state_dict())
    log_keep, log_other = torch.tensor([1 - noise, noise / num_actions]).log()

    @torch.inference_mode()
    def act(frames: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        logprobs = network.logits(torch.from_numpy(resize(frames, image_size))).log_softmax(-1)
        action, _ = sample(logprobs)
        other, instead = torch.randint(num_actions, action.shape), torch.rand(action.shape) < noise
        action = torch.where(instead, other, action)
        chosen = logprobs.gather(-1, action[:, None]).squeeze(-1)
        return action.numpy(), torch.logaddexp(log_keep + chosen, log_other).numpy()

    return act


@functools.lru_cache(maxsize=1)
def _read(path: Path, expected: str) -> torch.nn.Module:
    if fingerprint(path) != expected:
        raise UserError(f"{path} has changed since the recording began; put it back, or record its new state")
    return restore_policy(load_policy_checkpoint(path), CPU)
