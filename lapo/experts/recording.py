"""A recorded data set: its chunks, how they are played, and which are finished.

A chunk holds E environments one after another, T frames of each:
    obs         (E·T, H, W, C) uint8
    ta          (E·T,) int64, the action taken at this obs
    done        (E·T,) bool, whether the action ended the episode, or the recording ends here
    rewards     (E·T,) float32, of the action
    ep_returns  (E·T,) float32, return of the episode that the action ended, else 0
    values      (E·T,) float32, discounted sum of rewards to the end of the episode or recording
    logprobs    (E·T,) float32, of the action: 0 for planners, which are deterministic, without `--noise`
"""

import json
import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from lapo.config import ROOT
from lapo.data.chunks import summarize_episodes
from lapo.errors import UserError
from lapo.experts import registry as experts
from lapo.experts.expert import NoisyExpert
from lapo.games.env import Env
from lapo.games.make import LEVELS, env_version, make_env
from lapo.games.table import GAMES, Visuals
from lapo.games.vec_env import EpisodeTracker
from lapo.runs.files import reading, write_json

SPLITS = {"train": "train", "test": "held_out"}
"""The levels of each split, see `make_env`."""
DISCOUNT = 0.999
SHIPPED = ROOT / "expert_data" / "experts"
"""Where the learned experts of the games lie that have one, as <game>.pt."""


@dataclass(frozen=True)
class PolicyFile:
    """The checkpoint of a learned expert."""

    path: Path
    fingerprint: str
    description: dict = field(compare=False)
    """See `learned.describe_policy`."""
    versions: dict[str, str] = field(compare=False)
    """See `learned.versions`."""

    def __str__(self) -> str:
        return f"{self.path.name}, sha256 {self.fingerprint[:12]}"


@dataclass(frozen=True)
class Chunk:
    """One file of a data set."""

    game: str
    seed: int
    split: str
    number: int
    frames: int
    noise: float = 0.0
    visuals: Visuals = "full"
    policy: PolicyFile | None = None
    """The learned expert that plays; None: the planner."""

    @property
    def name(self) -> str:
        """Path within the game's folder."""
        return f"{self.split}/{self.number}.npz"

    @property
    def num_envs(self) -> int:
        """Environments in the chunk; few, so that most episodes are complete."""
        return min(max(self.frames // 1024, 1), 16)

    @property
    def simulator_seed(self) -> int:
        """Seed of the environments, different for every chunk."""
        names = list(GAMES)
        game = names.index(self.game) if self.game in names else zlib.crc32(self.game.encode())
        key = (self.seed, game, list(SPLITS).index(self.split), self.number)
        return int(np.random.SeedSequence(key).generate_state(1)[0]) % 2**31

    def make_env(self) -> Env:
        """New environments; the recorded actions reproduce the recorded frames in them."""
        return make_env(
            self.game,
            self.num_envs,
            seed=self.simulator_seed,
            levels=SPLITS[self.split],
            visuals=self.visuals,
            num_threads=0,
        )

    def make_player(self, env: Env) -> Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]:
        """The expert at `env`: frames (E, H, W, C) → actions (E,) and their log-probabilities (E,)."""
        if self.policy:
            from lapo.experts.learned import make_player

            return make_player(self.policy.path, self.policy.fingerprint, self.noise, self.simulator_seed)
        expert = experts.make_expert(self.game, self.num_envs)
        if not self.noise:
            certain = np.zeros(self.num_envs, np.float32)
            return lambda frames: (expert.act(env.get_state()), certain)
        noisy = NoisyExpert(expert, self.noise, self.simulator_seed)

        def act(frames: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            actions, probability = noisy.draw(env.get_state())
            return actions, np.log(probability)

        return act


def play_chunk(
    chunk: Chunk, on_returns: Callable[[np.ndarray], None] = lambda returns: None
) -> dict[str, np.ndarray]:
    """Let the expert play `chunk`; returns its arrays by name.

    `on_returns` is called after every step with the returns of the episodes that ended in it, in frames of
    the chunk: the last environment plays a few steps more if their number does not divide the frames.
    """
    shape = chunk.num_envs, math.ceil(chunk.frames / chunk.num_envs)
    ta = np.zeros(shape, np.int64)
    done = np.zeros(shape, bool)
    rewards, ep_returns, values, logprobs = (np.zeros(shape, np.float32) for _ in range(4))

    env = chunk.make_env()
    act = chunk.make_player(env)
    tracker = EpisodeTracker(chunk.num_envs)
    frame = env.observe()
    obs = np.empty((*shape, *frame.shape[1:]), np.uint8)
    for t in range(shape[1]):
        obs[:, t] = frame
        ta[:, t], logprobs[:, t] = act(frame)
        frame, rewards[:, t], done[:, t] = env.step(ta[:, t])
        returns, _ = tracker.update(rewards[:, t], done[:, t])
        ep_returns[done[:, t], t] = returns
        on_returns(returns[np.flatnonzero(done[:, t]) * shape[1] + t < chunk.frames])
    env.close()

    done[:, -1] = True
    value = np.zeros(chunk.num_envs)
    for t in reversed(range(shape[1])):
        value = rewards[:, t] + DISCOUNT * value * ~done[:, t]
        values[:, t] = value
    arrays = {
        "obs": obs,
        "ta": ta,
        "done": done,
        "rewards": rewards,
        "ep_returns": ep_returns,
        "values": values,
        "logprobs": logprobs,
    }
    arrays = {name: array.reshape(-1, *array.shape[2:])[: chunk.frames] for name, array in arrays.items()}
    arrays["done"][-1] = True
    return arrays


class Dataset:
    """A game's folder with its `dataset.json`, which says how chunks were made and which are finished."""

    def __init__(
        self,
        folder: Path,
        game: str,
        seed: int,
        noise: float = 0.0,
        visuals: Visuals = "full",
        policy: PolicyFile | None = None,
    ):
        """Open the data set in `folder`, or begin one.

        Raises UserError for an unknown game, and if the folder holds chunks that were made otherwise.
        """
        self.folder, self.file = folder, folder / "dataset.json"
        self.settings = {
            "game": game,
            "expert": str(policy) if policy else experts.expert_name(game),
            "seed": seed,
            "noise": noise,
            "visuals": visuals,
            "levels": {split: list(LEVELS[levels]) for split, levels in SPLITS.items()},
        }
        self.policy = policy.description if policy else None
        code = policy.versions if policy else {"experts": experts.source_hash()}
        self.versions = env_version(game) | code
        self.way_out = f"delete {folder} or choose another --data-dir"
        self.chunks: dict[str, dict[str, float]] = {}
        if self.file.exists():
            self._read()
        elif any(folder.glob("*/*.npz")):
            raise UserError(f"{folder} holds chunks that were not recorded here; {self.way_out}")

    def _read(self) -> None:
        try:
            with reading(self.file):
                text = self.file.read_text(encoding="utf-8")
            record = {"noise": 0.0, "visuals": "full"} | json.loads(text)
            found = {key: record[key] for key in self.settings}
            self.recorded_versions, self.chunks = record["versions"], record["chunks"]
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{self.file} is damaged; {self.way_out}") from None
        for key, value in self.settings.items():
            if found[key] != value:
                raise UserError(
                    f"{self.folder} was recorded with {key} {found[key]}, not {value}; {self.way_out}"
                )

    def unfinished(self, chunks: list[Chunk]) -> list[Chunk]:
        """Those of `chunks` that are still to be recorded.

        Raises UserError if a finished chunk has another length, or if the code has changed since it was made.
        """
        rest = []
        for chunk in chunks:
            finished = self.chunks.get(chunk.name)
            if finished is None or not (self.folder / chunk.name).exists():
                rest.append(chunk)
            elif finished["frames"] != chunk.frames:
                raise UserError(
                    f"{self.folder / chunk.name} has {finished['frames']:,} frames where {chunk.frames:,} "
                    f"are asked for; {self.way_out}"
                )
        if rest and self.chunks and self.recorded_versions != self.versions:
            raise UserError(
                f"{self.folder} was begun with another version of the expert or the game; {self.way_out}"
            )
        return rest

    def add(self, chunk: Chunk, returns: np.ndarray) -> None:
        """Mark `chunk` as finished; `returns` are those of its complete episodes."""
        self.chunks[chunk.name] = {
            "frames": chunk.frames,
            "environments": chunk.num_envs,
            "simulator_seed": chunk.simulator_seed,
            "episodes": returns.size,
            "return_sum": float(returns.sum()),
            "return_square_sum": float(np.square(returns).sum()),
        }
        self.save()

    def save(self) -> None:
        """Write `dataset.json`, which must exist before the first chunk: it marks the folder as ours."""
        in_order = sorted(self.chunks, key=lambda name: (name.startswith("test"), int(Path(name).stem)))
        record = {
            **self.settings,
            "versions": self.versions,
            **{split: self.summary(split) for split in SPLITS},
            **({"policy": self.policy} if self.policy else {}),
            "chunks": {name: self.chunks[name] for name in in_order},
        }
        write_json(self.file, record)

    def summary(self, split: str) -> dict[str, float | None]:
        """Frames and complete episodes of a split, their mean return and its standard error."""
        return summarize_episodes([chunk for name, chunk in self.chunks.items() if name.startswith(split)])
