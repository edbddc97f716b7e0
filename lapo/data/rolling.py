"""`RollingWindows`: windows of more chunks than fit on the device.

An epoch shuffles the chunks, splits them into pools of P, and serves the windows of one pool after the other,
each pool in random order. So an epoch is still an exact permutation of all windows. While one pool is served,
a thread reads the next one into the memory of the previous one. Whatever the size of the data, the device
holds 2·P chunks, and the host a few more while they are decoded (see `read_ahead`).

Dimensions
    M windows · B batch · K chunks · P chunks of a pool
"""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lapo.data.chunks import KEYS, read_ahead, read_header, window_starts
from lapo.data.windows import INFERENCE_BATCH, WHOLE, Windows, allocate, shard_paths
from lapo.errors import UserError
from lapo.runs.ranks import Shard

NOT_LOADED = -(1 << 60)
"""Index of a chunk that is not on the device. It is out of range, so indexing with it fails."""
Pool = tuple[int, ...]
"""Indices of the chunks that are on the device together, in the order of their slots."""


class RollingWindows(Windows):
    """All windows of one split of a game. Pools of chunks take turns on the device.

    `batch` and `iter_batches` load the frames of the windows that they return. `gather` and `current_frames`
    work for the latest of these windows. For windows that are not on the device they raise IndexError on a
    CPU; on CUDA, the device's assertion ends the process. If steps ascend, the next pool is read ahead; any
    other order works, too, but waits for the disk. Window indices are the same as those of `Windows`.
    """

    def __init__(
        self,
        folder: Path,
        *,
        device: torch.device,
        pool_chunks: int,
        limit: int | None = None,
        image_size: int = 64,
        context: int = 1,
        skip_resets: bool = True,
        skip_bad: bool = False,
        shard: Shard = WHOLE,
    ):
        """Index the windows of a shard of `folder`. Frames are read later, in pools of `pool_chunks` chunks.

        Pools are smaller if they would hold more than a third of all chunks. Raises `UserError` as `Windows`
        does, but damaged frames are found only when they are read. With `skip_bad`, all frames are therefore
        read once here.
        """
        self.shard, self.num_bad, self.unlabelled = shard, 0, []
        self.window, self._image_size = context + 2, image_size
        self._paths: list[Path] = []
        keys = KEYS if skip_bad else ("ta", "done")
        headers = {}
        for path in shard_paths(folder, limit, shard):
            with self.skipping_bad_chunks(skip_bad):
                headers[path] = read_header(path, image_size, self.window)
        sizes, starts, actions = [], [], []
        for path, get_arrays in read_ahead(list(headers), keys):
            with self.skipping_bad_chunks(skip_bad):
                chunk, size = get_arrays(), headers[path]
                starts.append(window_starts(chunk.get("done"), size, skip_resets, self.window) + sum(sizes))
                actions.append(chunk.get("ta"))
                self.unlabelled += [path] if "ta" not in chunk else []
                self._paths.append(path)
                sizes.append(size)
                del chunk  # free its frames, if read, before the next ones are decoded
        self.index(folder, starts, actions, sum(sizes), device)
        self.pool_chunks = min(pool_chunks, max(1, len(sizes) // 3))
        self.on_device = f"pools of {self.pool_chunks} chunks"
        self._slot_frames = max(sizes)  # frames per slot
        self.frames = allocate(2 * self.pool_chunks * self._slot_frames, image_size, device, folder)

        self._num_pools = -(-len(sizes) // self.pool_chunks)  # per epoch
        self._first_frame = np.cumsum([0, *sizes[:-1]])  # (K,)
        self._first_window = np.cumsum([0, *map(len, starts)])  # (K + 1,)
        self._num_windows = np.diff(self._first_window)  # (K,)
        # The smallest number of windows that a pool can have, whatever its chunks.
        self._min_pool_windows = np.sort(self._num_windows)[: len(sizes) // self._num_pools].sum()
        chunk_of = np.repeat(np.arange(len(sizes)), self._num_windows)
        self._chunk_of = torch.from_numpy(chunk_of).to(device)  # (M,)
        # Index of a chunk's frames in `frames` minus their index among all frames: (K,).
        self._shift = torch.full((len(sizes),), NOT_LOADED, device=device)
        self._chunk_starts = [NOT_LOADED] * len(sizes)  # index in `frames` of each chunk's first frame
        self._resident: list[Pool | None] = [None, None]  # the pools in the two halves of `frames`
        self._pending: tuple[Pool, int, Future] | None = None
        self._reader = ThreadPoolExecutor(1, "read-ahead")
        self._epochs: dict[tuple[int, int], tuple[list[Pool], np.ndarray]] = {}

    def frame_index(self, windows: Tensor) -> Tensor:
        """See `Windows`."""
        return self.starts[windows] + self._shift[self._chunk_of[windows]]

    def batch(self, step: int, batch_size: int, seed: int) -> Tensor:
        """See `Windows`. Loads the frames of these windows.

        Raises `UserError` for a damaged chunk, and if a batch could span more than two pools.
        """
        if self._min_pool_windows < batch_size - 1:
            raise UserError(
                f"a batch of {batch_size} windows is too large for {self.on_device}, which can hold as few as"
                f" {self._min_pool_windows} windows; choose --resident always, or lower the batch size"
            )
        start = step * batch_size
        first, last = self._pool_of(start, seed), self._pool_of(start + batch_size - 1, seed)
        for number in range(first, last + 1):
            self._load(self._pool(number, seed), number % 2)
        self._prefetch(self._pool(first + 1, seed), (first + 1) % 2)
        return super().batch(step, batch_size, seed)

    def iter_batches(self, windows: Tensor, size: int = INFERENCE_BATCH) -> Iterator[Tensor]:
        """See `Windows`. The frames of a batch are on the device until the next batch is requested."""
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
        return f"{super().summary()}, {2 * self.pool_chunks} chunks at a time"

    # ---- order: pools are numbered consecutively over all epochs

    def _epoch(self, epoch: int, seed: int) -> tuple[list[Pool], np.ndarray]:
        """An epoch's pools, and their cumulative numbers of windows, which begin with 0."""
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
        """See `Windows`. Pools follow each other; the windows of each are in random order."""
        generator, order = self._generator(seed, epoch), []
        for pool in self._epoch(epoch, seed)[0]:
            ids = torch.cat([torch.arange(*self._first_window[chunk : chunk + 2]) for chunk in pool])
            order.append(ids[torch.randperm(len(ids), generator=generator)])
        return torch.cat(order)

    # ---- frames

    def _load(self, pool: Pool, half: int) -> None:
        """Load the pool into a half of `frames`; waits for the disk if it was not read ahead."""
        if self._resident[half] != pool:
            self._prefetch(pool, half)
            future = self._pending[2]
            self._pending = None
            future.result()
            self._resident[half] = pool
        # The last pool of an epoch and the first of the next may share a chunk, which is then in both halves.
        for slot, chunk in enumerate(pool):
            begin = self._slot_start(half, slot)
            if self._chunk_starts[chunk] != begin:
                self._chunk_starts[chunk] = begin
                self._shift[chunk] = begin - int(self._first_frame[chunk])

    def _prefetch(self, pool: Pool, half: int) -> None:
        """Start reading the pool into a half of `frames`, unless it is loaded or being read."""
        if self._resident[half] == pool or (self._pending and self._pending[:2] == (pool, half)):
            return
        if self._pending:  # steps did not ascend: let the read in progress finish
            self._pending[2].result()
        for chunk in self._resident[half] or ():
            if self._chunk_starts[chunk] // (self.pool_chunks * self._slot_frames) == half:
                self._chunk_starts[chunk] = NOT_LOADED
                self._shift[chunk] = NOT_LOADED
        self._resident[half] = None
        self._pending = pool, half, self._reader.submit(self._read, pool, half)

    def _read(self, pool: Pool, half: int) -> None:
        paths = [self._paths[chunk] for chunk in pool]
        for slot, (_, get_arrays) in enumerate(read_ahead(paths, ("obs",), self._image_size)):
            obs = torch.from_numpy(get_arrays()["obs"])
            begin = self._slot_start(half, slot)
            self.frames[begin : begin + len(obs)].copy_(obs)
            del obs  # free it before the next one is decoded

    def _slot_start(self, half: int, slot: int) -> int:
        return (half * self.pool_chunks + slot) * self._slot_frames
