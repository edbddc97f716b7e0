"""Record an expert's play as chunks of frames: `python record_expert.py --env bigfish --frames 131072`.

Writes `<data_dir>/<game>/{train,test}/<k>.npz` in the published format, and `dataset.json` beside them,
which says how they were made. The same command again continues an interrupted recording: a chunk is a
function of the game, the expert, the seed, its split, its number and its length alone, so the files come out
the same.

The expert is a planner (`--expert planner`) or any policy of ours (`--expert checkpoint.pt`, of
train_expert.py or stage 3), whose actions are drawn from its probabilities.

A chunk holds E environments one after another, T frames of each:
    obs         (E·T, 64, 64, 3) uint8, what was seen
    ta          (E·T,) int64, the action taken there
    done        (E·T,) bool, whether the action ended the episode, or the recording stops here
    rewards     (E·T,) float32, what the action earned
    ep_returns  (E·T,) float32, return of the episode that the action ended, else 0
    values      (E·T,) float32, discounted rewards up to the end of the episode or of the recording
    logprobs    (E·T,) float32, of the action; 0: planners are deterministic (but for `--noise`)
"""

import contextlib
import json
import math
import multiprocessing
import os
import queue
import signal
import threading
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, CancelledError, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import tyro
from tqdm import tqdm

import experts
from chunks import CHUNK_FRAMES, write_chunk
from config import ROOT
from errors import UserError, run_main
from files import atomic_write
from procgen_env import (
    GAMES,
    HELD_OUT_LEVELS,
    TRAIN_LEVELS,
    EpisodeTracker,
    VecEnv,
    Visuals,
    check_game,
    num_cores,
    simulator_version,
)

LEVELS = {"train": TRAIN_LEVELS, "test": HELD_OUT_LEVELS}
SHIPPED = ROOT / "expert_data" / "experts"
"""Where the learned experts of the games lie that have one, as <game>.pt."""
MIN_FRAMES = 3  # one window of the data loader
DISCOUNT = 0.999


@dataclass
class Arguments:
    """Record an expert's play, to learn from. Run again, the same command continues where it was."""

    env: str
    """Game to record."""
    frames: int = 131_072
    """Frames to train on, in chunks of 32,768."""
    test_frames: int = 8_192
    """Frames to test on, from levels of their own, in chunks of 4,096."""
    expert: str | None = None
    """planner, or the checkpoint of a policy that plays; without it, expert_data/experts/<game>.pt where
    there is one that knows the visuals, else the planner."""
    seed: int = 0
    """Draws the levels; another seed makes another data set."""
    noise: float = 0.0
    """Share of the steps in which a random action is taken instead of the expert's."""
    visuals: Visuals = "full"
    """How the game is drawn; plain: no backgrounds, one look for all levels."""
    workers: int = field(default_factory=num_cores)
    """Processes; each records one chunk at a time, in about 0.6 GB of memory (a policy takes more)."""
    data_dir: Path = ROOT / "expert_data"
    """Where the folder of the game lies."""


@dataclass(frozen=True)
class PolicyFile:
    """A learned expert."""

    path: Path
    fingerprint: str
    provenance: dict = field(compare=False)
    """What its checkpoint says of it."""
    versions: dict[str, str] = field(compare=False)
    """Of the code that makes it act."""

    def __str__(self) -> str:
        return f"{self.path.name}, sha256 {self.fingerprint[:12]}"


def find_policy(args: Arguments) -> PolicyFile | None:
    """The learned expert to record, None if the planner plays.

    Raises UserError for a checkpoint that is missing, damaged or cannot act, or of another game or visuals.
    """
    check_game(args.env)
    path = Path(args.expert).expanduser().resolve() if args.expert else SHIPPED / f"{args.env}.pt"
    if args.expert == "planner" or not (args.expert or path.exists()):
        return None
    import learned  # and with it PyTorch, which planners do without

    provenance = learned.provenance(path)
    for key, wanted in (("game", args.env), ("visuals", args.visuals)):
        found = provenance[key]
        if found != wanted:
            if key == "visuals" and not args.expert:
                return None
            option = {"game": "--env", "visuals": "--visuals"}[key]
            raise UserError(
                f"{path} is a policy for {key} {found}, not {wanted};"
                f" choose {option} {found} or another --expert"
            )
    return PolicyFile(path, learned.fingerprint(path), provenance, learned.versions())


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
    """Who plays; None: the planner."""

    @property
    def name(self) -> str:
        """Path within the game's folder."""
        return f"{self.split}/{self.number}.npz"

    @property
    def num_envs(self) -> int:
        """Environments recorded; few, so that most episodes are seen to their end."""
        return min(max(self.frames // 1024, 1), 16)

    @property
    def simulator_seed(self) -> int:
        """Seed of the environments, a different one for every chunk."""
        key = (self.seed, list(GAMES).index(self.game), list(LEVELS).index(self.split), self.number)
        return int(np.random.SeedSequence(key).generate_state(1)[0]) % 2**31

    def make_env(self) -> VecEnv:
        """New environments, in which the recorded actions lead to the recorded frames."""
        return VecEnv(
            self.game,
            self.num_envs,
            seed=self.simulator_seed,
            levels=LEVELS[self.split],
            visuals=self.visuals,
            num_threads=0,
        )

    def make_player(self, env: VecEnv) -> Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]:
        """The expert at `env`: frames (E, 64, 64, 3) → actions (E,) and their log-probabilities (E,)."""
        if self.policy:
            from learned import make_player

            return make_player(self.policy.path, self.policy.fingerprint, self.noise, self.simulator_seed)
        expert = experts.make_expert(self.game, self.num_envs)
        if self.noise:
            expert = experts.Explorer(expert, self.noise, self.simulator_seed)
        certain = np.zeros(self.num_envs, np.float32)
        return lambda frames: (expert.act(env.get_state()), certain)


def plan_chunks(args: Arguments, policy: PolicyFile | None = None) -> list[Chunk]:
    """All chunks of a data set, of which the last of a split may be shorter than the others.

    Raises UserError for numbers that make no data set.
    """
    if args.workers < 1:
        raise UserError(f"--workers is {args.workers}; there must be at least 1")
    if not 0 <= args.seed < 2**31:
        raise UserError(f"--seed is {args.seed}; choose one from 0 to {2**31 - 1}")
    if not 0 <= args.noise <= 1:
        raise UserError(f"--noise is {args.noise}; choose a share from 0 to 1")
    chunks = []
    for option, split, frames in (
        ("--frames", "train", args.frames),
        ("--test-frames", "test", args.test_frames),
    ):
        if frames < MIN_FRAMES:
            raise UserError(f"{option} is {frames}; there must be at least {MIN_FRAMES}")
        size = CHUNK_FRAMES[split]
        for number in range(math.ceil(frames / size)):
            length = min(max(frames - number * size, MIN_FRAMES), size)
            settings = args.env, args.seed, split, number, length, args.noise, args.visuals, policy
            chunks.append(Chunk(*settings))
    return chunks


# ---------------------------------------------------------------------------------------- one chunk


def play_chunk(
    chunk: Chunk, report: Callable[[np.ndarray], None] = lambda returns: None
) -> dict[str, np.ndarray]:
    """Let the expert play `chunk`, and return its arrays by name.

    `report` is called after every step with the returns of the episodes that ended with it.
    """
    shape = chunk.num_envs, math.ceil(chunk.frames / chunk.num_envs)
    obs = np.empty((*shape, 64, 64, 3), np.uint8)
    ta = np.zeros(shape, np.int64)
    done = np.zeros(shape, bool)
    rewards, ep_returns, values, logprobs = (np.zeros(shape, np.float32) for _ in range(4))

    env = chunk.make_env()
    act = chunk.make_player(env)
    tracker = EpisodeTracker(chunk.num_envs)
    frame = env.observe()
    for t in range(shape[1]):
        obs[:, t] = frame
        ta[:, t], logprobs[:, t] = act(frame)
        frame, rewards[:, t], done[:, t] = env.step(ta[:, t])
        returns, _ = tracker.update(rewards[:, t], done[:, t])
        ep_returns[done[:, t], t] = returns
        report(returns)
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


# ------------------------------------------------------------------------------------- the data set


class Dataset:
    """The folder of a game with its `dataset.json`: how the chunks were made, and which are finished."""

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

        Raises UserError if there is no such game, or if the folder holds chunks made otherwise.
        """
        self.folder, self.file = folder, folder / "dataset.json"
        self.settings = {
            "game": game,
            "expert": str(policy) if policy else experts.expert_name(game),
            "seed": seed,
            "noise": noise,
            "visuals": visuals,
            "levels": {split: list(levels) for split, levels in LEVELS.items()},
        }
        self.provenance = policy.provenance if policy else None
        code = policy.versions if policy else {"experts": experts.source_hash()}
        self.versions = {"procgen": simulator_version(), **code}
        self.way_out = f"delete {folder} or choose another --data-dir"
        self.chunks: dict[str, dict[str, float]] = {}
        if self.file.exists():
            self._read()
        elif any(folder.glob("*/*.npz")):
            raise UserError(f"{folder} holds chunks that were not recorded here; {self.way_out}")

    def _read(self) -> None:
        try:
            record = {"noise": 0.0, "visuals": "full"} | json.loads(self.file.read_text())
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
        """Those of `chunks` still to be recorded.

        Raises UserError if a finished one has another length, or if the rest would come from other code.
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
                f"{self.folder} was begun with another version of the expert or of Procgen; {self.way_out}"
            )
        return rest

    def add(self, chunk: Chunk, returns: np.ndarray) -> None:
        """Note that `chunk` is finished; `returns` are those of its complete episodes."""
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
        """Write `dataset.json`. It must be there before the first chunk, as the mark that chunks are ours."""
        in_order = sorted(self.chunks, key=lambda name: (name.startswith("test"), int(Path(name).stem)))
        record = {
            **self.settings,
            "versions": self.versions,
            **{split: self.summary(split) for split in LEVELS},
            **({"policy": self.provenance} if self.provenance else {}),
            "chunks": {name: self.chunks[name] for name in in_order},
        }
        atomic_write(self.file, lambda path: path.write_text(json.dumps(record, indent=2) + "\n"))

    def summary(self, split: str) -> dict[str, float | None]:
        """Frames, complete episodes and their mean return and its standard error in one split."""
        chunks = [chunk for name, chunk in self.chunks.items() if name.startswith(split)]
        frames, episodes, total, squares = (
            sum(chunk[key] for chunk in chunks)
            for key in ("frames", "episodes", "return_sum", "return_square_sum")
        )
        mean = total / episodes if episodes else None
        error = None
        if episodes > 1:
            variance = max(squares - total**2 / episodes, 0.0) / (episodes - 1)
            error = math.sqrt(variance / episodes)
        return {"frames": frames, "episodes": episodes, "mean_return": mean, "standard_error": error}


# -------------------------------------------------------------------------------- the worker processes

# Set once in each worker: where it reports to, and whether it should stop.
_reports: multiprocessing.Queue
_stop: threading.Event


def _start_worker(reports: multiprocessing.Queue, stop: threading.Event) -> None:
    global _reports, _stop
    _reports, _stop = reports, stop
    # Reports that nobody reads any more must not hold up the end of the process.
    reports.cancel_join_thread()
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def _record_chunk(chunk: Chunk, path: Path) -> np.ndarray:
    """Record `chunk` to `path` in a worker; return the returns of its complete episodes."""
    all_returns = []

    def report(returns: np.ndarray) -> None:
        if _stop.is_set():
            raise CancelledError
        all_returns.append(returns)
        _reports.put((chunk.num_envs, returns))

    arrays = play_chunk(chunk, report)
    write_chunk(path, arrays)
    return np.concatenate(all_returns)


def record(dataset: Dataset, chunks: list[Chunk], workers: int) -> None:
    """Record `chunks` into `dataset` with `workers` processes, showing the progress."""
    context = multiprocessing.get_context("spawn")
    reports, stop = context.Queue(), context.Event()
    executor = ProcessPoolExecutor(min(workers, len(chunks)), context, _start_worker, (reports, stop))
    bar = tqdm(total=sum(chunk.frames for chunk in chunks), unit=" frames", unit_scale=True, mininterval=1)
    episodes, total = 0, 0.0
    with executor, bar:
        try:
            # Ctrl-C reaches all processes; those started while it is ignored go on ignoring it, and it is
            # this one that tells them to stop.
            handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
            futures = {
                executor.submit(_record_chunk, chunk, dataset.folder / chunk.name): chunk for chunk in chunks
            }
            signal.signal(signal.SIGINT, handler)
            pending = set(futures)
            while pending:
                finished, pending = wait(pending, timeout=0.2, return_when=FIRST_COMPLETED)
                for future in finished:
                    dataset.add(futures[future], future.result())
                with contextlib.suppress(queue.Empty):
                    while True:
                        frames, returns = reports.get_nowait()
                        episodes, total = episodes + returns.size, total + returns.sum()
                        bar.update(frames)
                if episodes:
                    bar.set_postfix_str(f"mean return {total / episodes:.2f}", refresh=False)
        except BaseException:
            stop.set()
            executor.shutdown(cancel_futures=True)
            raise


def main() -> None:
    """Record what the command line asks for."""
    args = tyro.cli(Arguments)
    policy = find_policy(args)
    chunks = plan_chunks(args, policy)
    folder = args.data_dir.expanduser().resolve() / args.env
    dataset = Dataset(folder, args.env, args.seed, args.noise, args.visuals, policy)
    rest = dataset.unfinished(chunks)
    kept = f"{len(chunks) - len(rest)} of {len(chunks)} chunks are there already"
    print(f"{folder}: recording {dataset.settings['expert']}, {kept}")
    try:
        if rest:
            for split in LEVELS:
                (folder / split).mkdir(parents=True, exist_ok=True)
            dataset.save()
            record(dataset, rest, args.workers)
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}; the finished chunks are kept") from None
    except BrokenProcessPool:
        raise UserError(
            "a worker process died, perhaps for lack of memory; the finished chunks are kept, "
            "run the same command again with fewer --workers"
        ) from None
    for split in LEVELS:
        summary = dataset.summary(split)
        score = ""
        if summary["standard_error"] is not None:
            score = f", mean return {summary['mean_return']:.2f} ± {summary['standard_error']:.2f}"
        print(f"{split}: {summary['frames']:,} frames, {summary['episodes']:,} complete episodes{score}")


if __name__ == "__main__":
    run_main(main)
