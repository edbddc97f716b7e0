"""Chunks of frames on disk → windows on the device.

Dimensions
    F frames of all chunks · M windows · B batch · T frames of a window (3) · H, W = 64 · C = 3
    K chunks · P chunks of a pool

Frames stay uint8, as stored (see data/chunks.py), in one tensor on the device. A window is three consecutive
frames of one chunk; its action was taken at the second to last of them.

`Windows` keeps all frames on the device. `RollingWindows` serves more chunks than fit there: an epoch
shuffles the chunks, splits them into pools of P, and serves the windows of one pool after the other, each in
random order. An epoch is still an exact permutation of all windows. While one pool is served, a thread reads
the next one into the memory of the previous one. So the device holds 2·P chunks, and the host a few more
while they are decoded (see `read_ahead`), whatever the size of the data.

`python data_loader.py --check FOLDER` checks chunks and prints a table, see data/checks.py.
"""

import math
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lapo.config import Config, diff
from lapo.data.chunks import (
    FRAME_SHAPE,
    KEYS,
    WINDOW,
    BadChunk,
    find_chunks,
    print_chunk_limit,
    read_ahead,
    read_header,
    window_starts,
)
from lapo.errors import UserError, run_main
from lapo.runs.compute import free_bytes
from lapo.runs.files import read_error_cause
from lapo.runs.ranks import Shard, all_max, shard

WHOLE = Shard()
INFERENCE_BATCH = 512
"""Windows per batch where no gradients are needed."""


def shard_paths(folder: Path, limit: int | None, shard: Shard) -> list[Path]:
    """A shard of the first `limit` chunk files of a folder. Raises `UserError` if it is empty."""
    paths = find_chunks(folder, limit)
    if len(paths) < shard.world_size:
        raise UserError(
            f"{folder}: its chunks in use ({len(paths)}) cannot be shared by {shard.world_size} processes,"
            " which need one each; start fewer, or make more chunks"
        )
    return paths[shard.rank :: shard.world_size]


class Windows:
    """All windows of a split of one game, or of a shard of its chunks, resident on a device.

    Attributes
        frames  (F, H, W, C) uint8
        starts  (M,) int64: index of every window's first frame
        ta      (F,) int64 true actions, or None if a chunk lacks them; used for evaluation and offline modes

    `num_chunks` were read and `num_bad` skipped; `unlabelled` are the chunks without `ta`.
    """

    on_device = "all frames"

    def __init__(
        self,
        folder: Path,
        *,
        device: torch.device,
        limit: int | None = None,
        skip_resets: bool = True,
        skip_bad: bool = False,
        shard: Shard = WHOLE,
    ):
        """Read the chunks of `folder`; the host holds no more decoded chunks than `read_ahead` states.

        `limit` counts chunk files, including bad ones; `shard` of these is read. With `skip_bad`, bad chunks
        are named on stderr and skipped.

        Raises `UserError` for a missing or empty folder, a bad chunk (with `skip_bad`: if all are bad), an
        unreadable one, data without a window, or frames that do not fit into memory.
        """
        paths = shard_paths(folder, limit, shard)
        self.shard, self.num_bad, self.unlabelled = shard, 0, []
        sizes = {}
        for path in paths:
            with self.skipping_bad_chunks(skip_bad):
                sizes[path] = read_header(path)
        frames = allocate(sum(sizes.values()), device, folder)
        starts, actions = [], []
        offset = 0
        for path, take in read_ahead(list(sizes)):
            with self.skipping_bad_chunks(skip_bad):
                chunk, size = take(), sizes[path]
                frames[offset : offset + size].copy_(torch.from_numpy(chunk["obs"]))
                starts.append(window_starts(chunk.get("done"), size, skip_resets) + offset)
                actions.append(chunk.get("ta"))
                self.unlabelled += [path] if "ta" not in chunk else []
                offset += size
                del chunk  # free it before the next one is decoded
        self.frames = frames[:offset]
        self.index(folder, starts, actions, offset, device)

    def index(
        self,
        folder: Path,
        starts: list[np.ndarray],
        actions: list[np.ndarray | None],
        num_frames: int,
        device: torch.device,
    ) -> None:
        """Set up the window index from each chunk's `starts` and true `actions` (None if it has none).

        Raises `UserError` if there is no chunk or no window.
        """
        self.num_chunks, self.num_frames = len(starts), num_frames
        if not self.num_chunks:
            raise UserError(
                f"{folder}: every one of its {self.num_bad} chunks is bad;"
                f" `python data_loader.py --check {folder}` tells why; make them again"
            )
        self.starts = torch.from_numpy(np.concatenate(starts)).to(device)
        if not len(self.starts):
            raise UserError(f"{folder}: every window of its {num_frames:,} frames touches an episode's end")
        has_actions = all(ta is not None for ta in actions)
        self.ta = (
            torch.from_numpy(np.concatenate(actions).astype(np.int64)).to(device) if has_actions else None
        )
        self._offsets = torch.arange(WINDOW, device=device)
        self._orders: dict[tuple[int, int], Tensor] = {}

    @contextmanager
    def skipping_bad_chunks(self, allowed: bool) -> Iterator[None]:
        """If `allowed`, name and count a bad chunk instead of raising `BadChunk`."""
        try:
            yield
        except BadChunk as error:
            if not allowed:
                raise
            print(f"left out: {error}", file=sys.stderr)
            self.num_bad += 1

    @classmethod
    def read(cls, cfg: Config, split: str, device: torch.device, limit: int | None = None) -> "Windows":
        """The windows of the configured game's `split`, of at most `limit` chunks; prints a summary."""
        most = cfg.data.train_chunks if split == "train" else cfg.data.test_chunks
        folder = cfg.game_data / split
        if limit is None or limit > most:
            print_chunk_limit(folder, most)
        windows = cls(folder, device=device, limit=min(most, limit or most), **loader_options(cfg))
        print(f"{split}: {windows.summary()}")
        return windows

    def __len__(self) -> int:
        return len(self.starts)

    def summary(self) -> str:
        """One line about what was read."""
        labels = "with true actions" if self.ta is not None else "without true actions"
        if 0 < len(self.unlabelled) < self.num_chunks:
            labels += f" (which {self.describe_unlabelled()})"
        left_out = f" ({self.num_bad} bad left out)" if self.num_bad else ""
        return (
            f"{self.num_frames:,} frames in {self.num_chunks} chunks{left_out}, {len(self):,} windows,"
            f" {labels}, {self.frames.numel() / 1e9:.2f} GB on {self.frames.device}"
        )

    def describe_unlabelled(self) -> str:
        """The chunks without true actions as subject and verb: "1.npz lacks"."""
        first, *rest = (path.name for path in self.unlabelled)
        return f"{first} and {len(rest)} more lack" if rest else f"{first} lacks"

    def all(self) -> Tensor:
        """Indices of all windows, in the order of the data: (M,) int64."""
        return torch.arange(len(self), device=self.frames.device)

    def evenly_spaced(self, count: int) -> Tensor:
        """Indices of at most `count` windows, evenly spaced over the data, ascending: (M,) int64."""
        if count >= len(self):
            return self.all()
        return torch.linspace(0, len(self) - 1, count, device=self.frames.device, dtype=torch.float64).long()

    def iter_batches(self, windows: Tensor, size: int = INFERENCE_BATCH) -> Iterator[Tensor]:
        """Split window indices (M,), ascending, into batches of at most `size`; use each before the next."""
        yield from windows.split(size)

    def frame_index(self, windows: Tensor) -> Tensor:
        """Indices in `frames` of the first frames of windows (B,): (B,) int64."""
        return self.starts[windows]

    def gather(self, windows: Tensor) -> Tensor:
        """Frames (B, T, H, W, C) uint8 of windows (B,)."""
        return self.frames[self.frame_index(windows)[:, None] + self._offsets]

    def iter_frames(self, windows: Tensor) -> Iterator[Tensor]:
        """Frames (B, T, H, W, C) uint8 of windows (M,), ascending, batch by batch."""
        for part in self.iter_batches(windows):
            yield self.gather(part)

    def current_frames(self, windows: Tensor) -> Tensor:
        """The frames o[t] (B, H, W, C) uint8 of windows (B,)."""
        return self.frames[self.frame_index(windows) + WINDOW - 2]

    def actions(self, windows: Tensor) -> Tensor:
        """True actions (B,) int64, taken at o[t], of windows (B,). Needs `ta`."""
        return self.ta[self.starts[windows] + WINDOW - 2]

    def batch(self, step: int, batch_size: int, seed: int) -> Tensor:
        """Indices of the windows of training step `step`: (B,) int64 on the device.

        Batches are consecutive slices of an endless sequence of epochs, each a permutation of all windows. A
        batch is a function of the arguments alone, so a resumed run needs only its step.
        """
        parts = []
        position, missing = step * batch_size, batch_size
        while missing:
            epoch, offset = divmod(position, len(self))
            part = self._order(epoch, seed)[offset : offset + missing]
            parts.append(part)
            position += len(part)
            missing -= len(part)
        return torch.cat(parts)

    @property
    def data_order(self) -> dict[str, int | str]:
        """What the batches depend on besides the seed; saved in checkpoints."""
        return {
            "windows": len(self),
            "chunks": self.num_chunks,
            "on the device": self.on_device,
            "processes": self.shard.world_size,
        }

    def check_data_order(self, order: dict[str, int | str]) -> None:
        """Raise `UserError` unless a resumed run, whose saved `data_order` is `order`, gets the same batches.

        With several processes, `order` is that of rank 0.
        """
        changes = diff(order, self.data_order) if self.shard.rank == 0 else []
        if changes:
            raise UserError(
                f"the run would go on with other batches than it began with ({'; '.join(changes)}); give it"
                " back its data, its --resident and its number of processes, or choose another --exp"
            )

    def _order(self, epoch: int, seed: int) -> Tensor:
        key = (epoch, seed)
        if key not in self._orders:
            # Drawn on the CPU, so that the order is the same on every device.
            self._orders = {key: self._draw(epoch, seed).to(self.frames.device)}
        return self._orders[key]

    def _draw(self, epoch: int, seed: int) -> Tensor:
        """A random permutation of all windows, (M,)."""
        return torch.randperm(len(self), generator=self._generator(seed, epoch))

    def _generator(self, seed: int, epoch: int, purpose: int = 0) -> torch.Generator:
        """The random generator of an epoch, different for each purpose and shard."""
        return generator_of(seed, epoch, purpose, *(self.shard if self.shard.world_size > 1 else ()))


def generator_of(*key: int) -> torch.Generator:
    """A CPU random generator, seeded by the numbers in `key`."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence(key).generate_state(1)[0]))


def loader_options(cfg: Config) -> dict[str, bool]:
    """Keyword arguments of `Windows` from the config."""
    return {"skip_resets": cfg.data.skip_resets, "skip_bad": cfg.data.skip_bad_chunks}


def allocate(total: int, device: torch.device, folder: Path) -> Tensor:
    """An uninitialised tensor for `total` frames. Raises `UserError` if the device has too little memory."""
    needed = total * math.prod(FRAME_SHAPE)
    free = free_bytes(device)
    if free is not None and needed > free:
        raise UserError(
            f"{folder}: its {total:,} frames need {needed / 1e9:.1f} GB on {device},"
            f" where {free / 1e9:.1f} GB are free; lower data.train_chunks, data.test_chunks or"
            " data.pool_chunks"
        )
    try:
        return torch.empty((total, *FRAME_SHAPE), dtype=torch.uint8, device=device)
    except RuntimeError as error:  # the process may be allowed less than is free
        reason = read_error_cause(error)
        if reason is None:
            raise
        raise UserError(
            f"{folder}: {reason} for its {total:,} frames, which need {needed / 1e9:.1f} GB on {device};"
            " lower data.train_chunks, data.test_chunks or data.pool_chunks"
        ) from None


# ---------------------------------------------------------------- more chunks than fit on the device

RESIDENT_FRACTION = 0.7
"""Fraction of the free memory that resident frames may take."""

ABSENT = -(1 << 60)
"""Offset of a chunk that is not on the device: indexing with it raises IndexError."""
Pool = tuple[int, ...]
"""Indices of the chunks that are on the device together, in the order of their slots."""


def read_splits(cfg: Config, device: torch.device) -> tuple[Windows, Windows]:
    """Training and held-out windows of the configured game; prints a summary.

    The held-out windows are resident, the training windows as `cfg.resident` says. With several processes,
    each has a shard of the training windows. Without a `test` folder, the training windows of all processes
    are used for evaluation. Raises `UserError` as `Windows` does.
    """
    mine = shard()
    print_chunk_limit(cfg.game_data / "train", cfg.data.train_chunks)
    train = read_train(cfg, device, cfg.resident, mine)
    if (cfg.game_data / "test").is_dir():
        return train, Windows.read(cfg, "test", device)
    print("test: no such folder, so the training windows are measured")
    if mine.world_size == 1:
        return train, train
    # `always` refers to the shard; all windows take turns if they do not fit beside it.
    return train, read_train(cfg, device, "never" if cfg.resident == "never" else "auto", WHOLE)


def read_train(cfg: Config, device: torch.device, resident: str, shard: Shard) -> Windows:
    """A shard of the configured game's training windows, kept on the device as `resident` says."""
    folder = cfg.game_data / "train"
    options = {"device": device, "limit": cfg.data.train_chunks, "shard": shard, **loader_options(cfg)}
    if stays_resident(folder, device, cfg.data.train_chunks, resident, shard):
        train = Windows(folder, **options)
    else:
        train = RollingWindows(folder, pool_chunks=cfg.data.pool_chunks, **options)
    print(f"train: {train.summary()}")
    return train


def stays_resident(
    folder: Path, device: torch.device, limit: int | None, resident: str, shard: Shard = WHOLE
) -> bool:
    """Whether all chunks of a shard of `folder` stay on the device; prints their size and the free memory.

    With `auto` they do if they fit on every rank. Raises `UserError` as `shard_paths` does.
    """
    sizes = []
    for path in shard_paths(folder, limit, shard):
        with suppress(UserError):  # the reader reports it
            sizes.append(read_header(path))
    total = sum(sizes)
    needed, free = total * math.prod(FRAME_SHAPE), free_bytes(device)
    there = "" if free is None else f" of {free / 1e9:.2f} GB free"
    print(f"train: {total:,} frames need {needed / 1e9:.2f} GB{there} on {device}")
    if resident != "auto":
        return resident == "always"
    # Fewer than three chunks cannot take turns: pools need memory for two.
    too_many = free is not None and needed > RESIDENT_FRACTION * free and len(sizes) >= 3
    return all_max(too_many) == (False,)


class RollingWindows(Windows):
    """All windows of a split of one game, with pools of chunks that take turns on the device.

    `batch` and `iter_batches` load the frames of the windows that they return; `gather` and `current_frames`
    work for the latest of these, and raise IndexError for windows that are not on the device. Batches in
    ascending order of their steps are read ahead; any other order works, too, but waits for the disk. Window
    indices are those of all frames.
    """

    def __init__(
        self,
        folder: Path,
        *,
        device: torch.device,
        pool_chunks: int,
        limit: int | None = None,
        skip_resets: bool = True,
        skip_bad: bool = False,
        shard: Shard = WHOLE,
    ):
        """Index the windows of a shard of `folder`; frames are read later, in pools of `pool_chunks` chunks
        (or a third of all chunks, if that is less).

        Raises `UserError` as `Windows` does, but damaged frames are found only when they are read. With
        `skip_bad`, all frames are therefore read once here.
        """
        self.shard, self.num_bad, self.unlabelled = shard, 0, []
        self._paths: list[Path] = []
        keys = KEYS if skip_bad else ("ta", "done")
        headers = {}
        for path in shard_paths(folder, limit, shard):
            with self.skipping_bad_chunks(skip_bad):
                headers[path] = read_header(path)
        sizes, starts, actions = [], [], []
        for path, take in read_ahead(list(headers), keys):
            with self.skipping_bad_chunks(skip_bad):
                chunk, size = take(), headers[path]
                starts.append(window_starts(chunk.get("done"), size, skip_resets) + sum(sizes))
                actions.append(chunk.get("ta"))
                self.unlabelled += [path] if "ta" not in chunk else []
                self._paths.append(path)
                sizes.append(size)
                del chunk  # free its frames, if read, before the next ones are decoded
        self.index(folder, starts, actions, sum(sizes), device)
        self.pool_chunks = min(pool_chunks, max(1, len(sizes) // 3))
        self.on_device = f"pools of {self.pool_chunks} chunks"
        self._slot_frames = max(sizes)  # frames per slot
        self.frames = allocate(2 * self.pool_chunks * self._slot_frames, device, folder)

        self._num_pools = -(-len(sizes) // self.pool_chunks)  # per epoch
        self._first_frame = np.cumsum([0, *sizes[:-1]])  # (K,)
        self._first_window = np.cumsum([0, *map(len, starts)])  # (K + 1,)
        self._num_windows = np.diff(self._first_window)  # (K,)
        # The fewest windows that a pool of any chunks can have.
        self._min_pool_windows = np.sort(self._num_windows)[: len(sizes) // self._num_pools].sum()
        chunk_of = np.repeat(np.arange(len(sizes)), self._num_windows)
        self._chunk_of = torch.from_numpy(chunk_of).to(device)  # (M,)
        # Offset of a chunk's frames in `frames` relative to their index among all frames: (K,).
        self._shift = torch.full((len(sizes),), ABSENT, device=device)
        self._chunk_starts = [ABSENT] * len(sizes)  # index in `frames` of each chunk's first frame
        self._resident: list[Pool | None] = [None, None]  # the pools in the two halves of `frames`
        self._pending: tuple[Pool, int, Future] | None = None
        self._reader = ThreadPoolExecutor(1, "read-ahead")
        self._epochs: dict[tuple[int, int], tuple[list[Pool], np.ndarray]] = {}

    def frame_index(self, windows: Tensor) -> Tensor:
        """See `Windows`."""
        return self.starts[windows] + self._shift[self._chunk_of[windows]]

    def batch(self, step: int, batch_size: int, seed: int) -> Tensor:
        """See `Windows`; loads the frames of these windows.

        Raises `UserError` for a damaged chunk, and if a batch may span more than two pools.
        """
        if self._min_pool_windows < batch_size - 1:
            raise UserError(
                f"a batch of {batch_size} windows is too large for {self.on_device}, which may hold but"
                f" {self._min_pool_windows};"
                " choose --resident always, or lower the batch size"
            )
        start = step * batch_size
        first, last = self._pool_of(start, seed), self._pool_of(start + batch_size - 1, seed)
        for number in range(first, last + 1):
            self._load(self._pool(number, seed), number % 2)
        self._prefetch(self._pool(first + 1, seed), (first + 1) % 2)
        return super().batch(step, batch_size, seed)

    def iter_batches(self, windows: Tensor, size: int = INFERENCE_BATCH) -> Iterator[Tensor]:
        """See `Windows`; the frames of a batch are on the device while it is served."""
        numbers = range(len(self._paths))
        pools = [tuple(numbers[i : i + self.pool_chunks]) for i in numbers[:: self.pool_chunks]]
        bounds = torch.from_numpy(self._first_window[[*(pool[0] for pool in pools), -1]])
        counts = torch.searchsorted(windows, bounds.to(windows.device)).diff().tolist()
        visits = [(pool, part) for pool, part in zip(pools, windows.split(counts), strict=True) if len(part)]
        for number, (pool, part) in enumerate(visits):
            self._load(pool, number % 2)
            if number + 1 < len(visits):
                self._prefetch(visits[number + 1][0], (number + 1) % 2)
            yield from part.split(size)

    def summary(self) -> str:
        """See `Windows`."""
        held = f"{2 * self.pool_chunks} chunks at a time"
        return f"{super().summary()}, {held}"

    # ---- order: pools are numbered consecutively through all epochs

    def _epoch(self, epoch: int, seed: int) -> tuple[list[Pool], np.ndarray]:
        """An epoch's pools, and the cumulative number of windows before each of them and in total."""
        if (epoch, seed) not in self._epochs:
            chunks = torch.randperm(len(self._paths), generator=self._generator(seed, epoch, 1))
            pools = [tuple(pool.tolist()) for pool in chunks.tensor_split(self._num_pools)]
            counts = [self._num_windows[list(pool)].sum() for pool in pools]
            self._epochs[epoch, seed] = pools, np.cumsum([0, *counts])
        return self._epochs[epoch, seed]

    def _pool_of(self, position: int, seed: int) -> int:
        """Number of the pool of the window at `position` in the endless sequence of epochs."""
        epoch, offset = divmod(position, len(self))
        pools, bounds = self._epoch(epoch, seed)
        return epoch * len(pools) + int(np.searchsorted(bounds, offset, side="right")) - 1

    def _pool(self, number: int, seed: int) -> Pool:
        return self._epoch(number // self._num_pools, seed)[0][number % self._num_pools]

    def _draw(self, epoch: int, seed: int) -> Tensor:
        """See `Windows`: pool by pool, each in random order."""
        generator, order = self._generator(seed, epoch), []
        for pool in self._epoch(epoch, seed)[0]:
            ids = torch.cat([torch.arange(*self._first_window[chunk : chunk + 2]) for chunk in pool])
            order.append(ids[torch.randperm(len(ids), generator=generator)])
        return torch.cat(order)

    # ---- frames

    def _load(self, pool: Pool, half: int) -> None:
        """Make the pool's frames available in a half of `frames`; waits for the disk if necessary."""
        if self._resident[half] != pool:
            self._prefetch(pool, half)
            coming = self._pending[2]
            self._pending = None
            coming.result()
            self._resident[half] = pool
        # A chunk may be in both halves: in the last pool of an epoch and the first of the next.
        for slot, chunk in enumerate(pool):
            begin = self._slot_start(half, slot)
            if self._chunk_starts[chunk] != begin:
                self._chunk_starts[chunk] = begin
                self._shift[chunk] = begin - int(self._first_frame[chunk])

    def _prefetch(self, pool: Pool, half: int) -> None:
        """Start reading the pool into a half of `frames`, unless it is there or being read."""
        if self._resident[half] == pool or (self._pending and self._pending[:2] == (pool, half)):
            return
        if self._pending:  # the order was left; let the read in progress finish
            self._pending[2].result()
        for chunk in self._resident[half] or ():
            if self._chunk_starts[chunk] // (self.pool_chunks * self._slot_frames) == half:
                self._chunk_starts[chunk] = ABSENT
                self._shift[chunk] = ABSENT
        self._resident[half] = None
        self._pending = pool, half, self._reader.submit(self._read, pool, half)

    def _read(self, pool: Pool, half: int) -> None:
        for slot, (_, take) in enumerate(read_ahead([self._paths[chunk] for chunk in pool], ("obs",))):
            obs = torch.from_numpy(take()["obs"])
            begin = self._slot_start(half, slot)
            self.frames[begin : begin + len(obs)].copy_(obs)
            del obs  # free it before the next one is decoded

    def _slot_start(self, half: int, slot: int) -> int:
        return (half * self.pool_chunks + slot) * self._slot_frames


if __name__ == "__main__":
    from lapo.data.checks import main

    run_main(main)
