"""Record an expert's play as chunks of frames: `python record_expert.py --env bigfish --frames 131072`.

Writes `<data_dir>/<game>/{train,test}/<k>.npz` in the published format, and `dataset.json` beside them,
which says how they were made. The same command again continues an interrupted recording: a chunk is a
function of game, expert, seed, split, number and length alone, so the files come out the same.

The expert is a planner (`--expert planner`) or a trained policy (`--expert checkpoint.pt`, of train_expert.py
or stage 3), whose actions are sampled. By default it is the learned expert in expert_data/experts, if the
game has one with these visuals, else the planner.
"""

import argparse
import contextlib
import math
import multiprocessing
import os
import queue
import signal
import threading
from concurrent.futures import FIRST_COMPLETED, CancelledError, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
from tqdm import tqdm

from lapo.command_line import Parser
from lapo.config import ROOT, resolve
from lapo.data.chunks import CHUNK_FRAMES, MIN_FRAMES, write_chunk
from lapo.errors import UserError, run_main
from lapo.experts.recording import SHIPPED, SPLITS, Chunk, Dataset, PolicyFile, play_chunk
from lapo.games.make import check_env
from lapo.games.table import GAMES
from lapo.games.vec_env import num_cores
from lapo.runs.files import locked


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line. Raises `UserError` for a mistake in it."""
    parser = Parser(__doc__)
    parser.add_argument("--env", required=True, help="game to record")
    parser.add_argument(
        "--frames", type=int, default=131_072, help="frames to train on, in chunks of 32,768 (131072)"
    )
    parser.add_argument(
        "--test-frames",
        type=int,
        default=8_192,
        help="held-out frames, from levels of their own, in chunks of 4,096 (8192)",
    )
    parser.add_argument("--expert", help="planner, or the checkpoint of a policy; without it, see above")
    parser.add_argument(
        "--seed", type=int, default=0, help="draws the levels; another seed, another data set (0)"
    )
    parser.add_argument(
        "--noise",
        type=float,
        default=0.0,
        help="fraction of the steps in which the action is random instead (0)",
    )
    parser.add_argument(
        "--visuals",
        choices=("full", "plain"),
        default="full",
        help="plain: no backgrounds, one look for all levels (full)",
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=num_cores(),
        help="processes, each with a chunk at a time in 0.6 GB of memory, more for a policy (one per core)",
    )
    parser.add_argument(
        "--data-dir",
        type=Path,
        default=ROOT / "expert_data",
        help="where the game's folder lies (expert_data)",
    )
    return parser.parse_args(argv)


def find_policy(args: argparse.Namespace) -> PolicyFile | None:
    """The learned expert to record; None for the planner.

    Raises UserError for a checkpoint that is missing, damaged or cannot act, or of another game or visuals.
    """
    check_env(args.env)
    path = Path(args.expert).expanduser().resolve() if args.expert else SHIPPED / f"{args.env}.pt"
    if args.expert == "planner" or not (args.expert or path.exists()):
        if args.env not in GAMES:
            raise UserError(
                f"there is no planner for {args.env}; train a policy with `python train_expert.py --env"
                f" {args.env}`, then name its checkpoint: --expert CHECKPOINT"
            )
        return None
    from lapo.experts import learned

    description = learned.describe_policy(path)
    visuals = {"visuals": args.visuals} if args.env in GAMES else {}  # nothing to others
    for key, wanted in ({"game": args.env} | visuals).items():
        found = description[key]
        if found != wanted:
            if key == "visuals" and not args.expert:
                return None
            option = {"game": "--env", "visuals": "--visuals"}[key]
            raise UserError(
                f"{path} is a policy for {key} {found}, not {wanted};"
                f" choose {option} {found} or another --expert"
            )
    return PolicyFile(path, learned.fingerprint(path), description, learned.versions())


def plan_chunks(args: argparse.Namespace, policy: PolicyFile | None = None) -> list[Chunk]:
    """All chunks of a data set, of which the last of a split may be shorter than the others.

    Raises UserError for numbers that make no data set.
    """
    if args.workers < 1:
        raise UserError(f"--workers is {args.workers}; there must be at least 1")
    if not 0 <= args.seed < 2**31:
        raise UserError(f"--seed is {args.seed}; choose one from 0 to {2**31 - 1}")
    if not 0 <= args.noise <= 1:
        raise UserError(f"--noise is {args.noise}; choose a fraction from 0 to 1")
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


# -------------------------------------------------------------------------------- the worker processes

# Set once in each worker: the queue for its progress, and whether it should stop.
_reports: multiprocessing.Queue
_stop: threading.Event


def _start_worker(reports: multiprocessing.Queue, stop: threading.Event) -> None:
    global _reports, _stop
    _reports, _stop = reports, stop
    # Progress that is not read any more must not delay the end of the process.
    reports.cancel_join_thread()
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def _record_chunk(chunk: Chunk, path: Path) -> np.ndarray:
    """Record `chunk` to `path` in a worker; return the returns of its complete episodes."""
    all_returns = []

    def on_returns(returns: np.ndarray) -> None:
        if _stop.is_set():
            raise CancelledError
        all_returns.append(returns)
        _reports.put((chunk.num_envs, returns))

    arrays = play_chunk(chunk, on_returns)
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
            # Ctrl-C reaches all processes. Workers are started while it is ignored, so they ignore it, and
            # this process tells them to stop.
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
    args = parse()
    policy = find_policy(args)
    chunks = plan_chunks(args, policy)
    folder = resolve(str(args.data_dir)).resolve() / args.env

    def open_dataset() -> tuple[Dataset, list[Chunk]]:
        dataset = Dataset(folder, args.env, args.seed, args.noise, args.visuals, policy)
        return dataset, dataset.unfinished(chunks)

    dataset, rest = open_dataset()
    kept = f"{len(chunks) - len(rest)} of {len(chunks)} chunks are there already"
    print(f"{folder}: recording {dataset.settings['expert']}, {kept}")
    try:
        if rest:
            for split in SPLITS:
                (folder / split).mkdir(parents=True, exist_ok=True)
            busy = f"another process is recording into {folder}; wait for it, or choose another --data-dir"
            with locked(folder / "lock", busy):
                dataset, rest = open_dataset()  # as the previous holder of the lock left it
                dataset.save()
                if rest:
                    record(dataset, rest, args.workers)
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}; the finished chunks are kept") from None
    except BrokenProcessPool:
        raise UserError(
            "a worker process died, perhaps for lack of memory; the finished chunks are kept, "
            "run the same command again with fewer --workers"
        ) from None
    for split in SPLITS:
        summary = dataset.summary(split)
        mean = ""
        if summary["standard_error"] is not None:
            mean = f", mean return {summary['mean_return']:.2f} ± {summary['standard_error']:.2f}"
        print(f"{split}: {summary['frames']:,} frames, {summary['episodes']:,} complete episodes{mean}")


if __name__ == "__main__":
    run_main(main)
