"""What the tests share: numbered frames, chunks on disk, a tiny configuration, real command lines."""

import contextlib
import hashlib
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from lapo.config import Config, load_config
from lapo.runs.checkpoints import load_checkpoint
from lapo.runs.compute import Compute
from lapo.runs.run import Run

ROOT = Path(__file__).resolve().parent.parent
LAPO = ROOT / "lapo"
CPU = Compute(torch.device("cpu"), bf16=False, compile=False)
INTERRUPTIONS = int(os.environ.get("LAPO_INTERRUPTIONS", "5"))
"""How often a run is stopped by SIGKILL; by SIGTERM, half as often. `make soak` asks for more."""
PATIENCE = 600
"""Seconds after which a process is taken to hang: far more than it needs, as other work may hold it up."""


def numbered_frames(numbers: np.ndarray) -> np.ndarray:
    """Frames (..., 64, 64, 3) uint8 whose first pixel spells their number (below 2**24)."""
    numbers = np.asarray(numbers)
    frames = np.zeros((*numbers.shape, 64, 64, 3), np.uint8)
    for channel in range(3):
        frames[..., 0, 0, channel] = numbers >> (8 * channel) & 255
    return frames


def read_numbers(frames: torch.Tensor | np.ndarray) -> np.ndarray:
    """The numbers (...) that frames (..., 64, 64, 3) of `numbered_frames` spell."""
    pixels = np.asarray(frames)[..., 0, 0, :].astype(np.int64)
    return pixels @ (256 ** np.arange(3))


def image_numbers(images: torch.Tensor) -> torch.Tensor:
    """The numbers (B, T) of T frames as networks see them, side by side on the channels: (B, 3·T, 64, 64)."""
    pixels = ((images[:, :, 0, 0] + 0.5) * 255).round().unflatten(1, (-1, 3))
    return pixels @ torch.tensor([1.0, 256.0, 65536.0])


class CountingEnv:
    """Frames that count the steps of each environment, from 1000 · environment on.

    An action is rewarded by its own number. Episodes end at different times in different environments.
    """

    num_actions = 15

    def __init__(self, num_envs: int, episode: int):
        self.num_envs, self.episode = num_envs, episode
        self.time = 0
        self.actions: list[np.ndarray] = []

    def observe(self) -> np.ndarray:
        return numbered_frames(1000 * np.arange(self.num_envs) + self.time)

    def act(self, actions: np.ndarray) -> None:
        self.actions.append(actions)

    def result(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        dones = self.ends(self.time)
        self.time += 1
        return self.observe(), self.actions[-1].astype(np.float32), dones

    def ends(self, time: int | np.ndarray) -> np.ndarray:
        """Whether the actions at `time`, any shape (..., 1) or a number, end the episodes: (..., N)."""
        return (time + 1 + np.arange(self.num_envs)) % self.episode == 0

    def get_state(self) -> list[bytes]:
        return [b"counted"] * self.num_envs

    def close(self) -> None:
        pass


def write_chunk(path: Path, obs: np.ndarray, **arrays: np.ndarray) -> Path:
    """A chunk file with `obs` and whatever else is given."""
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, obs=obs, **arrays)
    return path


def write_game(folder: Path, *, frames: int = 40, chunks: int = 2) -> None:
    """`train` and `test` chunks of random frames, with every key of the published ones."""
    rng = np.random.default_rng(0)
    for name in (*(f"train/{k}" for k in range(chunks)), "test/0"):
        obs = rng.integers(256, size=(frames, 64, 64, 3), dtype=np.uint8)
        done = np.zeros(frames, bool)
        done[frames // 2] = True
        floats = {
            key: rng.normal(size=frames).astype(np.float32)
            for key in ("rewards", "ep_returns", "values", "logprobs")
        }
        write_chunk(folder / f"{name}.npz", obs, ta=rng.integers(15, size=frames), done=done, **floats)


@contextlib.contextmanager
def largest_file(size: int) -> Iterator[None]:
    """The system refuses to let any file grow beyond `size` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def save_half(main: Callable[[], None]) -> None:
    """Run `main` in a process of its own, which stands still in the middle of its first save."""

    def save(checkpoint: dict, path: Path) -> None:
        path.write_bytes(b"half a checkpoint")
        time.sleep(3600)

    torch.save = save
    main()


class Trap:
    """Leaves a folder `mark` behind when it is unpickled."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return (os.mkdir, (str(self.mark),))


class Workplace:
    """A folder with the data of a game, a config file of a tiny run, and what runs make of them."""

    GAME = "bossfight"  # its episodes are short

    def __init__(self, folder: Path):
        self.folder = folder
        self.data = folder / "data"
        self.results = folder / "results"
        self.config_file = folder / "tiny.yaml"
        self.config_file.write_text(yaml.safe_dump(TINY | self._places()))
        write_game(self.data / self.GAME)

    def _places(self) -> dict[str, str]:
        return {"env": self.GAME, "data_dir": str(self.data), "results_dir": str(self.results)}

    def config(self, *arguments: str) -> Config:
        """The configuration of the tiny run, changed by command-line `arguments`."""
        return load_config(["--config", str(self.config_file), *arguments])

    def run(self, script: str, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
        """A script's real command line on the tiny configuration, from another working directory."""
        process = self.start(script, *arguments, **env)
        stdout, stderr = process.communicate(timeout=PATIENCE)
        return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)

    def start(self, script: str, *arguments: str, **env: str) -> subprocess.Popen[str]:
        """Like `run`, without waiting."""
        return subprocess.Popen(
            [sys.executable, str(LAPO / script), "--config", str(self.config_file), *arguments],
            env=os.environ | {"OMP_NUM_THREADS": "1"} | env,
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run_dir(self, stage: str, exp: str = "main") -> Path:
        """Folder of a stage's run."""
        return self.results / exp / self.GAME / "seed0" / stage

    def branch(self, exp: str, *stages: str) -> None:
        """Let experiment `exp` build on the named stages of experiment `main`."""
        for stage in stages:
            self.run_dir(stage, exp).parent.mkdir(parents=True, exist_ok=True)
            self.run_dir(stage, exp).symlink_to(self.run_dir(stage))


TINY = {
    "device": "cpu",
    "precision": "fp32",
    "model": {"idm_scale": 1, "policy_scale": 1, "wm_width": 2},
    "vq": {"num_latents": 2, "num_embs": 8, "emb_dim": 4},
    "stage1": {"steps": 8, "batch_size": 4, "probe_every": 4, "log_every": 2, "save_every": 3},
    "stage2": {"steps": 8, "batch_size": 4, "log_every": 2, "save_every": 3},
    "stage3": {"steps": 192, "log_every": 1, "save_every": 2},
    "ppo": {"num_envs": 4, "rollout_steps": 8, "minibatches": 2, "epochs": 2},
    "decoder": {
        "hidden": [8],
        "batch_size": 16,
        "epochs": 1,
        "until": 4_000_000,
        "every_update_until": 4_000_000,
    },
    "offline": {"labels": 32, "steps": 20, "batch_size": 16},
    "relabel": {"idm_steps": 6, "policy_steps": 14, "batch_size": 16, "save_every": 5},
    "ilpo": {"num_actions": 3, "steps": 8, "batch_size": 4, "log_every": 2, "save_every": 3},
    "expert": {"steps": 192, "log_every": 1, "save_every": 1},
    "dagger": {
        "steps": 160,
        "num_envs": 4,
        "rollout_steps": 8,
        "label_every": 1,
        "teacher_until": 0.5,
        "buffer": 64,
        "updates": 2,
        "batch_size": 8,
    },
    "eval": {"episodes": 2, "num_envs": 2},
}


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Bytes and time of change of all files below a folder."""
    return {
        str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file()
    }


def leaves(values: Any, key: str = "") -> dict[str, Any]:
    """All that nested dicts, lists and tuples hold, by its path; tensors by a checksum of their bytes."""
    if isinstance(values, torch.Tensor):
        content = values.reshape(-1).view(torch.uint8).numpy().tobytes()
        return {key: (values.dtype, values.shape, hashlib.sha256(content).hexdigest())}
    if isinstance(values, dict):
        values = list(values.items())
    elif isinstance(values, list | tuple):
        values = list(enumerate(values))
    else:
        return {key: values}
    return {path: leaf for name, value in values for path, leaf in leaves(value, f"{key}.{name}").items()}


def logged(folder: Path) -> list[dict]:
    """Lines of metrics.jsonl, without the time they took."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key != "seconds"} for line in lines]


def result(folder: Path) -> dict[str, Any]:
    """A run's checkpoint but for what made it and how long that took, and its lines of metrics."""
    checkpoint = load_checkpoint(folder / "checkpoint.pt")
    del checkpoint["provenance"], checkpoint["config"]["exp"], checkpoint["seconds"], checkpoint["device"]
    return leaves({"checkpoint": checkpoint, "metrics": logged(folder)})


def tiny_run(workplace: Workplace, *arguments: str) -> Run:
    """A run of the workplace's configuration in which nothing has been trained."""
    return Run(workplace.config(*arguments), "stage1", ("model", "stage1"), CPU)
