"""Chunks of frames on disk → windows on the device.

Dimensions
    F frames of all chunks · M windows · B batch · T frames of a window (3) · H, W = 64 · C = 3
    K chunks · P chunks of a pool

Frames stay uint8, as stored (see data/chunks.py), in one tensor on the device. A window is three consecutive
frames of one chunk; the action of interest was taken at the second to last of them.

`Windows` keeps all frames on the device. `RollingWindows` serves more chunks than fit there: an epoch
shuffles the chunks, cuts them into pools of P, and serves the windows of one pool after the other, those of
each in random order: still an exact permutation of all windows. While one pool is served, a thread reads
the next one into the room of the one before. So the device holds 2·P chunks, and the host a few more while
they are being decoded (see `read_ahead`), whatever the size of the data.

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
    read_ahead,
    read_header,
    say_limit,
    window_starts,
)
from lapo.errors import UserError, run_main
from lapo.runs.compute import free_bytes
from lapo.runs.files import hindrance
from lapo.runs.ranks import Shard, all_max, shard

WHOLE = Shard()
INFERENCE_BATCH = 512
"""Windows of a batch that needs no gradients."""


def chunks_of(folder: Path, limit: int | None, shard: Shard) -> list[Path]:
    """A shard's chunk files of a folder, of which `limit` count. Raises `UserError` if it is empty."""
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
        ta      (F,) int64 true actions, or None when some chunk lacks them; used only to measure

    `num_chunks` were read, `num_bad` left out; `unlabelled` are those that lack `ta`.
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
        """Read the chunks of `folder`: host memory holds no more decoded ones than `read_ahead` says.

        `limit` counts chunk files, bad ones included; of these, only `shard` is read. With `skip_bad`, bad
        ones are named on stderr and left out; everything else then follows from those that were read.

        Raises `UserError` for a missing or empty folder, a bad chunk (with `skip_bad`: if there is no good
        one), one that something keeps from being read, data without any window, or frames that do not fit
        into memory.
        """
        paths = chunks_of(folder, limit, shard)
        self.shard, self.num_bad, self.unlabelled = shard, 0, []
        sizes = {}
        for path in paths:
            with self.leaving_out_bad(skip_bad):
                sizes[path] = read_header(path)
        frames = allocate(sum(sizes.values()), device, folder)
        starts, actions = [], []
        offset = 0
        for path, take in read_ahead(list(sizes)):
            with self.leaving_out_bad(skip_bad):
                chunk, size = take(), sizes[path]
                frames[offset : offset + size].copy_(torch.from_numpy(chunk["obs"]))
                starts.append(window_starts(chunk.get("done"), size, skip_resets) + offset)
                actions.append(chunk.get("ta"))
                self.unlabelled += [path] if "ta" not in chunk else []
                offset += size
                del chunk  # or it would stay while the next one is decoded
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
        """Number the windows of all chunks: `starts` per chunk, and true `actions` where it has them.

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
    def leaving_out_bad(self, allowed: bool) -> Iterator[None]:
        """Where it is `allowed`, name and count a bad chunk instead of raising `BadChunk`."""
        try:
            yield
        except BadChunk as error:
            if not allowed:
                raise
            print(f"left out: {error}", file=sys.stderr)
            self.num_bad += 1

    @classmethod
    def read(cls, cfg: Config, split: str, device: torch.device, limit: int | None = None) -> "Windows":
        """The windows of a configured game's `train` or `test`, at most `limit` chunks; prints a summary."""
        most = cfg.data.train_chunks if split == "train" else cfg.data.test_chunks
        folder = cfg.game_data / split
        if limit is None or limit > most:
            say_limit(folder, most)
        windows = cls(folder, device=device, limit=min(most, limit or most), **reading(cfg))
        print(f"{split}: {windows.summary()}")
        return windows

    def __len__(self) -> int:
        return len(self.starts)

    def summary(self) -> str:
        """One line on what was read."""
        labels = "with true actions" if self.ta is not None else "without true actions"
        if 0 < len(self.unlabelled) < self.num_chunks:
            labels += f" (which {self.name_unlabelled()})"
        left_out = f" ({self.num_bad} bad left out)" if self.num_bad else ""
        return (
            f"{self.num_frames:,} frames in {self.num_chunks} chunks{left_out}, {len(self):,} windows,"
            f" {labels}, {self.frames.numel() / 1e9:.2f} GB on {self.frames.device}"
        )

    def name_unlabelled(self) -> str:
        """Which of the chunks lack true actions, as in "1.npz lacks"."""
        first, *rest = (path.name for path in self.unlabelled)
        return f"{first} and {len(rest)} more lack" if rest else f"{first} lacks"

    def all(self) -> Tensor:
        """Numbers of all windows, in the order of the data: (M,) int64."""
        return torch.arange(len(self), device=self.frames.device)

    def evenly_spaced(self, count: int) -> Tensor:
        """Numbers of at most `count` windows, evenly spaced over the data and in its order: (M,) int64."""
        if count >= len(self):
            return self.all()
        return torch.linspace(0, len(self) - 1, count, device=self.frames.device, dtype=torch.float64).long()

    def iter_batches(self, windows: Tensor, size: int = INFERENCE_BATCH) -> Iterator[Tensor]:
        """The windows numbered (M,), ascending, in batches of at most `size`: use each before the next."""
        yield from windows.split(size)

    def frame_index(self, windows: Tensor) -> Tensor:
        """Index in `frames` of the first frame of the windows numbered (B,): (B,) int64."""
        return self.starts[windows]

    def gather(self, windows: Tensor) -> Tensor:
        """Frames of the windows numbered (B,) → (B, T, H, W, C) uint8."""
        return self.frames[self.frame_index(windows)[:, None] + self._offsets]

    def iter_frames(self, windows: Tensor) -> Iterator[Tensor]:
        """Frames (B, T, H, W, C) uint8 of the windows numbered (M,), batch by batch, see `iter_batches`."""
        for part in self.iter_batches(windows):
            yield self.gather(part)

    def current_frames(self, windows: Tensor) -> Tensor:
        """The frame o[t] of the windows numbered (B,) → (B, H, W, C) uint8."""
        return self.frames[self.frame_index(windows) + WINDOW - 2]

    def actions(self, windows: Tensor) -> Tensor:
        """True actions taken at o[t] of the windows numbered (B,) → (B,) int64. Needs `ta`."""
        return self.ta[self.starts[windows] + WINDOW - 2]

    def batch(self, step: int, batch_size: int, seed: int) -> Tensor:
        """Numbers of the windows of training step `step`: (B,) int64 on the device.

        Batches cut an endless row of epochs, each an exact permutation of all windows. A batch is a function
        of the arguments alone, so a resumed run needs nothing but its step.
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
        """What the order of batches depends on beside the seed."""
        return {
            "windows": len(self),
            "chunks": self.num_chunks,
            "on the device": self.on_device,
            "processes": self.shard.world_size,
        }

    def check_data_order(self, order: dict[str, int | str]) -> None:
        """Raise `UserError` if a run that began with another `order` of batches is to go on with this one.

        Where several processes share the data, `order` is the first one's.
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
            # Drawn on the CPU: the same order on every device.
            self._orders = {key: self._draw(epoch, seed).to(self.frames.device)}
        return self._orders[key]

    def _draw(self, epoch: int, seed: int) -> Tensor:
        """A permutation of all windows, (M,)."""
        return torch.randperm(len(self), generator=self._generator(seed, epoch))

    def _generator(self, seed: int, epoch: int, purpose: int = 0) -> torch.Generator:
        """Random numbers of an epoch, others for every purpose and shard."""
        return generator_of(seed, epoch, purpose, *(self.shard if self.shard.world_size > 1 else ()))


def generator_of(*key: int) -> torch.Generator:
    """A random generator on the CPU, its seed a function of the numbers in `key`."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence(key).generate_state(1)[0]))


def reading(cfg: Config) -> dict[str, bool]:
    """How `cfg` wants chunks to be read: keyword arguments of `Windows`."""
    return {"skip_resets": cfg.data.skip_resets, "skip_bad": cfg.data.skip_bad_chunks}


def allocate(total: int, device: torch.device, folder: Path) -> Tensor:
    """Room for `total` frames; refused when the device has less free than they need."""
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
    except RuntimeError as error:  # less is allowed than is free
        reason = hindrance(error)
        if reason is None:
            raise
        raise UserError(
            f"{folder}: {reason} for its {total:,} frames, which need {needed / 1e9:.1f} GB on {device};"
            " lower data.train_chunks, data.test_chunks or data.pool_chunks"
        ) from None


# ---------------------------------------------------------------- pools of chunks that take turns

RESIDENT_SHARE = 0.7
"""Of the memory that is free, how much frames may take if they are all to stay there."""

ABSENT = -(1 << 60)
"""As the place of a chunk: it is not on the device, and whoever looks there anyway gets an IndexError."""
Pool = tuple[int, ...]
"""Numbers of the chunks that are on the device together, in the order of their room there."""


def read_splits(cfg: Config, device: torch.device) -> tuple[Windows, Windows]:
    """Training and held-out windows of the configured game; prints what was read.

    The held-out ones are resident, the training ones as `cfg.resident` says; of these, each of several
    processes has a shard. Without a `test` folder, the training windows serve for both: those of all
    processes. Raises `UserError` as `Windows` does.
    """
    mine = shard()
    say_limit(cfg.game_data / "train", cfg.data.train_chunks)
    train = read_train(cfg, device, cfg.resident, mine)
    if (cfg.game_data / "test").is_dir():
        return train, Windows.read(cfg, "test", device)
    print("test: no such folder, so the training windows are measured")
    if mine.world_size == 1:
        return train, train
    # What does not fit beside the shard takes turns: "always" was said of the shard.
    return train, read_train(cfg, device, "never" if cfg.resident == "never" else "auto", WHOLE)


def read_train(cfg: Config, device: torch.device, resident: str, shard: Shard) -> Windows:
    """A shard of the training windows of the configured game, kept on the device as `resident` says."""
    folder = cfg.game_data / "train"
    options = {"device": device, "limit": cfg.data.train_chunks, "shard": shard, **reading(cfg)}
    if keeps_all(folder, device, cfg.data.train_chunks, resident, shard):
        train = Windows(folder, **options)
    else:
        train = RollingWindows(folder, pool_chunks=cfg.data.pool_chunks, **options)
    print(f"train: {train.summary()}")
    return train


def keeps_all(
    folder: Path, device: torch.device, limit: int | None, resident: str, shard: Shard = WHOLE
) -> bool:
    """Whether all chunks of a shard of `folder` are to stay on the device; prints what speaks for it.

    They are if they fit there for every one of the processes. Raises `UserError` as `chunks_of` does.
    """
    sizes = []
    for path in chunks_of(folder, limit, shard):
        with suppress(UserError):  # whoever reads it says what is wrong with it
            sizes.append(read_header(path))
    total = sum(sizes)
    needed, free = total * math.prod(FRAME_SHAPE), free_bytes(device)
    there = "" if free is None else f" of {free / 1e9:.2f} GB free"
    print(f"train: {total:,} frames need {needed / 1e9:.2f} GB{there} on {device}")
    if resident != "auto":
        return resident == "always"
    # Two chunks cannot take turns in less room than they need.
    too_many = free is not None and needed > RESIDENT_SHARE * free and len(sizes) >= 3
    return all_max(too_many) == (False,)


class RollingWindows(Windows):
    """All windows of a split of one game, passing through a device.

    `batch` and `iter_batches` bring the frames of the windows they name onto the device; `gather` and
    `current_frames` are for the latest of these, and raise IndexError for windows that are not there. Batches
    in the order of their steps are read ahead; any other order works too, and waits for the disk. Windows are
    numbered as if all frames were there.
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
        """Find the windows of the chunks in a shard of `folder`; frames are read later,
        `pool_chunks` chunks together (or a third of all chunks, where that is less).

        Raises `UserError` as `Windows` does; but damaged frames are noticed only when they are read. With
        `skip_bad`, all are therefore read once at first.
        """
        self.shard, self.num_bad, self.unlabelled = shard, 0, []
        self._paths: list[Path] = []
        keys = KEYS if skip_bad else ("ta", "done")
        headers = {}
        for path in chunks_of(folder, limit, shard):
            with self.leaving_out_bad(skip_bad):
                headers[path] = read_header(path)
        sizes, starts, actions = [], [], []
        for path, take in read_ahead(list(headers), keys):
            with self.leaving_out_bad(skip_bad):
                chunk, size = take(), headers[path]
                starts.append(window_starts(chunk.get("done"), size, skip_resets) + sum(sizes))
                actions.append(chunk.get("ta"))
                self.unlabelled += [path] if "ta" not in chunk else []
                self._paths.append(path)
                sizes.append(size)
                del chunk  # its frames, if read, would stay while the next ones are decoded
        self.index(folder, starts, actions, sum(sizes), device)
        self.pool_chunks = min(pool_chunks, max(1, len(sizes) // 3))
        self.on_device = f"pools of {self.pool_chunks} chunks"
        self._room = max(sizes)  # for one chunk
        self.frames = allocate(2 * self.pool_chunks * self._room, device, folder)

        self._num_pools = -(-len(sizes) // self.pool_chunks)  # of an epoch
        self._first_frame = np.cumsum([0, *sizes[:-1]])  # (K,)
        self._first_window = np.cumsum([0, *map(len, starts)])  # (K + 1,)
        self._num_windows = np.diff(self._first_window)  # (K,)
        # A pool has at least so many windows, whichever its chunks are.
        self._fewest = np.sort(self._num_windows)[: len(sizes) // self._num_pools].sum()
        chunk_of = np.repeat(np.arange(len(sizes)), self._num_windows)
        self._chunk_of = torch.from_numpy(chunk_of).to(device)  # (M,)
        # Where a chunk's frames lie in `frames`, less their place among all frames: (K,).
        self._shift = torch.full((len(sizes),), ABSENT, device=device)
        self._begins = [ABSENT] * len(sizes)  # where `_shift` says that a chunk begins
        self._there: list[Pool | None] = [None, None]  # the pools in the two halves of `frames`
        self._coming: tuple[Pool, int, Future] | None = None
        self._reader = ThreadPoolExecutor(1, "read-ahead")
        self._epochs: dict[tuple[int, int], tuple[list[Pool], np.ndarray]] = {}

    def frame_index(self, windows: Tensor) -> Tensor:
        """See `Windows`."""
        return self.starts[windows] + self._shift[self._chunk_of[windows]]

    def batch(self, step: int, batch_size: int, seed: int) -> Tensor:
        """See `Windows`; the frames of these windows are on the device when it returns.

        Raises `UserError` for a damaged chunk, and if a batch may span more than two pools.
        """
        if self._fewest < batch_size - 1:
            raise UserError(
                f"a batch of {batch_size} windows is too large for {self.on_device}, which may hold but"
                f" {self._fewest};"
                " choose --resident always, or lower the batch size"
            )
        start = step * batch_size
        first, last = self._pool_of(start, seed), self._pool_of(start + batch_size - 1, seed)
        for number in range(first, last + 1):
            self._bring(self._pool(number, seed), number % 2)
        self._fetch(self._pool(first + 1, seed), (first + 1) % 2)
        return super().batch(step, batch_size, seed)

    def iter_batches(self, windows: Tensor, size: int = INFERENCE_BATCH) -> Iterator[Tensor]:
        """See `Windows`; the frames of a batch are on the device while it is served."""
        numbers = range(len(self._paths))
        pools = [tuple(numbers[i : i + self.pool_chunks]) for i in numbers[:: self.pool_chunks]]
        bounds = torch.from_numpy(self._first_window[[*(pool[0] for pool in pools), -1]])
        counts = torch.searchsorted(windows, bounds.to(windows.device)).diff().tolist()
        visits = [(pool, part) for pool, part in zip(pools, windows.split(counts), strict=True) if len(part)]
        for number, (pool, part) in enumerate(visits):
            self._bring(pool, number % 2)
            if number + 1 < len(visits):
                self._fetch(visits[number + 1][0], (number + 1) % 2)
            yield from part.split(size)

    def summary(self) -> str:
        """See `Windows`."""
        held = f"{2 * self.pool_chunks} chunks at a time"
        return f"{super().summary()}, {held}"

    # ---- order: pools are numbered through all epochs

    def _epoch(self, epoch: int, seed: int) -> tuple[list[Pool], np.ndarray]:
        """An epoch's pools, and how many of its windows come before each of them and in all."""
        if (epoch, seed) not in self._epochs:
            chunks = torch.randperm(len(self._paths), generator=self._generator(seed, epoch, 1))
            pools = [tuple(pool.tolist()) for pool in chunks.tensor_split(self._num_pools)]
            counts = [self._num_windows[list(pool)].sum() for pool in pools]
            self._epochs[epoch, seed] = pools, np.cumsum([0, *counts])
        return self._epochs[epoch, seed]

    def _pool_of(self, position: int, seed: int) -> int:
        """Number of the pool that the window at `position` in the endless row of epochs belongs to."""
        epoch, offset = divmod(position, len(self))
        pools, bounds = self._epoch(epoch, seed)
        return epoch * len(pools) + int(np.searchsorted(bounds, offset, side="right")) - 1

    def _pool(self, number: int, seed: int) -> Pool:
        return self._epoch(number // self._num_pools, seed)[0][number % self._num_pools]

    def _draw(self, epoch: int, seed: int) -> Tensor:
        """See `Windows`: pool by pool, the windows of each in random order."""
        generator, order = self._generator(seed, epoch), []
        for pool in self._epoch(epoch, seed)[0]:
            ids = torch.cat([torch.arange(*self._first_window[chunk : chunk + 2]) for chunk in pool])
            order.append(ids[torch.randperm(len(ids), generator=generator)])
        return torch.cat(order)

    # ---- frames

    def _bring(self, pool: Pool, half: int) -> None:
        """Have the pool's frames in a half of the room; waits for the disk unless they are there."""
        if self._there[half] != pool:
            self._fetch(pool, half)
            coming = self._coming[2]
            self._coming = None
            coming.result()
            self._there[half] = pool
        # A chunk may lie in both halves, as the last of one epoch and the first of the next.
        for slot, chunk in enumerate(pool):
            begin = self._begin(half, slot)
            if self._begins[chunk] != begin:
                self._begins[chunk] = begin
                self._shift[chunk] = begin - int(self._first_frame[chunk])

    def _fetch(self, pool: Pool, half: int) -> None:
        """Start reading the pool into a half of the room, unless it is there or on its way."""
        if self._there[half] == pool or (self._coming and self._coming[:2] == (pool, half)):
            return
        if self._coming:  # somebody went another way
            self._coming[2].result()
        for chunk in self._there[half] or ():
            if self._begins[chunk] // (self.pool_chunks * self._room) == half:
                self._begins[chunk] = ABSENT
                self._shift[chunk] = ABSENT
        self._there[half] = None
        self._coming = pool, half, self._reader.submit(self._read, pool, half)

    def _read(self, pool: Pool, half: int) -> None:
        for slot, (_, take) in enumerate(read_ahead([self._paths[chunk] for chunk in pool], ("obs",))):
            obs = torch.from_numpy(take()["obs"])
            begin = self._begin(half, slot)
            self.frames[begin : begin + len(obs)].copy_(obs)
            del obs  # or it would stay while the next one is decoded

    def _begin(self, half: int, slot: int) -> int:
        return (half * self.pool_chunks + slot) * self._room


if __name__ == "__main__":
    from lapo.data.checks import main

    run_main(main)
