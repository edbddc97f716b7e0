"""Windows of more chunks than fit on the device: pools of a few chunks take turns there.

Dimensions: K chunks · M windows · P chunks of a pool · B batch

An epoch shuffles the chunks, cuts them into pools of P, and serves the windows of one pool after the other,
each pool's in random order: still an exact permutation of all windows. While one pool is served, a thread
reads the next one into the room of the one before. So the device holds 2·P chunks, and the host one more
while it is being decoded, whatever the size of the data.
"""

import math
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from chunks import FRAME_SHAPE, KEYS, read_chunk, read_header
from config import Config
from data_loader import WHOLE, Windows, allocate, chunks_of, free_bytes, reading, window_starts
from errors import UserError
from ranks import Share, greatest, share

RESIDENT_SHARE = 0.7
"""Of the memory that is free, how much frames may take if they are all to stay there."""

ABSENT = -(1 << 60)
"""As the place of a chunk: it is not on the device, and whoever looks there anyway gets an IndexError."""
Pool = tuple[int, ...]
"""Numbers of the chunks that are on the device together, in the order of their room there."""


def read_splits(cfg: Config, device: torch.device) -> tuple[Windows, Windows]:
    """Training and held-out windows of the configured game; prints what was read.

    The held-out ones are resident, the training ones as `cfg.resident` says; of these, each of several
    processes has a share. Without a `test` folder, the training windows serve for both. Raises `UserError` as
    `Windows` does.
    """
    folder, mine = cfg.game_data / "train", share()
    options = {"device": device, "limit": cfg.data.train_chunks, "share": mine, **reading(cfg)}
    if keeps_all(folder, device, cfg.data.train_chunks, cfg.resident, mine):
        train = Windows(folder, **options)
    else:
        train = RollingWindows(folder, pool_chunks=cfg.data.pool_chunks, **options)
    print(f"train: {train.summary()}")
    if not (cfg.game_data / "test").is_dir():
        print("test: no such folder, so the training windows are measured")
        return train, train
    return train, Windows.read(cfg, "test", device)


def keeps_all(
    folder: Path, device: torch.device, limit: int | None, resident: str, share: Share = WHOLE
) -> bool:
    """Whether all chunks of a share of `folder` are to stay on the device; prints what speaks for it.

    They are if they fit there for every one of the processes. Raises `UserError` as `chunks_of` does.
    """
    sizes = []
    for path in chunks_of(folder, limit, share):
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
    return greatest(too_many) == (False,)


class RollingWindows(Windows):
    """All windows of a split of one game, passing through a device.

    `batch` and `parts` bring the frames of the windows they name onto the device; `gather` and
    `middle_frames` are for the latest of these, and raise IndexError for windows that are not there. Batches
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
        share: Share = WHOLE,
    ):
        """Find the windows of the chunks in a share of `folder`; frames are read later,
        `pool_chunks` chunks together (or a third of all chunks, where that is less).

        Raises `UserError` as `Windows` does; but damaged frames are noticed only when they are read. With
        `skip_bad`, all are therefore read once at first.
        """
        self.share, self.num_bad = share, 0
        self._paths: list[Path] = []
        keys = KEYS if skip_bad else ("ta", "done")
        sizes, starts, actions = [], [], []
        for path in chunks_of(folder, limit, share):
            with self.leaving_out_bad(skip_bad):
                size = read_header(path)
                chunk = read_chunk(path, keys)
                starts.append(window_starts(chunk.get("done"), size, skip_resets) + sum(sizes))
                actions.append(chunk.get("ta"))
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

    def place(self, windows: Tensor) -> Tensor:
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

    def parts(self, windows: Tensor, size: int) -> Iterator[Tensor]:
        """See `Windows`; the frames of a part are on the device while it is served."""
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
        for slot, chunk in enumerate(pool):
            obs = torch.from_numpy(read_chunk(self._paths[chunk], ("obs",))["obs"])
            begin = self._begin(half, slot)
            self.frames[begin : begin + len(obs)].copy_(obs)
            del obs  # or it would stay while the next one is decoded

    def _begin(self, half: int, slot: int) -> int:
        return (half * self.pool_chunks + slot) * self._room
