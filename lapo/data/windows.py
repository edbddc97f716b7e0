"""`Windows`: all windows of a split, with all frames resident on the device.

Dimensions
    F frames of all chunks · M windows · B batch · T frames of a window (3) · H, W = 64 · C = 3

A window holds `context` frames, then o[t] and o[t+1]; T = context + 2. The published context is 1.
"""

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lapo.config import Config, diff
from lapo.data.chunks import (
    UNKNOWN,
    BadChunk,
    find_chunks,
    print_chunk_limit,
    read_ahead,
    read_header,
    window_starts,
)
from lapo.errors import UserError
from lapo.frames import CHANNELS
from lapo.runs.compute import free_bytes
from lapo.runs.files import read_error_cause
from lapo.runs.ranks import Shard

WHOLE = Shard()
INFERENCE_BATCH = 512
"""Windows per batch where no gradients are needed."""


def shard_paths(folder: Path, limit: int | None, shard: Shard) -> list[Path]:
    """The chunk files of a shard of the first `limit` of a folder. Raises `UserError` if a shard is empty."""
    paths = find_chunks(folder, limit)
    if len(paths) < shard.world_size:
        raise UserError(
            f"{folder}: {shard.world_size} processes need a chunk each, but {len(paths)} are in use; start"
            " fewer processes, or make more chunks"
        )
    return paths[shard.rank :: shard.world_size]


class Windows:
    """All windows of one split of a game, or of a shard of its chunks. All frames are resident on a device.

    Attributes
        frames      (F, H, W, C) uint8
        starts      (M,) int64: index of every window's first frame
        window      T, the frames of a window
        ta          (F,) int64 true actions, `UNKNOWN` in gaps; None if a chunk lacks them, or none at a
                    window's o[t] is known; for evaluation and offline modes
        num_chunks  chunks that were read
        has_gaps    whether true actions of some frames are unknown
        num_bad     bad chunks that were skipped
        unlabelled  paths of the chunks without `ta`
    """

    on_device = "all frames"

    def __init__(
        self,
        folder: Path,
        *,
        device: torch.device,
        limit: int | None = None,
        image_size: int = 64,
        context: int = 1,
        skip_resets: bool = True,
        skip_bad: bool = False,
        shard: Shard = WHOLE,
    ):
        """Read a `shard` of the first `limit` chunk files of `folder`; average frames to `image_size`.

        With `skip_resets`, windows that touch an episode's end are skipped. With `skip_bad`, bad chunks are
        named on stderr and skipped; they count towards `limit`. Host memory holds at most `MAX_READERS`
        decoded chunks.

        Raises `UserError` for a missing or empty folder, a bad chunk (with `skip_bad`: if all are bad), a
        chunk that cannot be read, data without a window, or frames that do not fit into memory.
        """
        paths = shard_paths(folder, limit, shard)
        self.shard, self.num_bad, self.unlabelled = shard, 0, []
        self.window = context + 2
        sizes = {}
        for path in paths:
            with self.skipping_bad_chunks(skip_bad):
                sizes[path] = read_header(path, image_size, self.window)
        frames = allocate(sum(sizes.values()), image_size, device, folder)
        starts, actions = [], []
        offset = 0
        for path, get_arrays in read_ahead(list(sizes), image_size=image_size):
            with self.skipping_bad_chunks(skip_bad):
                chunk, size = get_arrays(), sizes[path]
                frames[offset : offset + size].copy_(torch.from_numpy(chunk["obs"]))
                starts.append(window_starts(chunk.get("done"), size, skip_resets, self.window) + offset)
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
        """Set up the window index from the `starts` and the true `actions` (None: it has none) of each chunk.

        Raises `UserError` if there is no chunk or no window.
        """
        self.num_chunks, self.num_frames = len(starts), num_frames
        if not self.num_chunks:
            raise UserError(
                f"{folder}: all of its {self.num_bad} chunks are bad;"
                f" `python data_loader.py --check {folder}` says why; make them again"
            )
        self.starts = torch.from_numpy(np.concatenate(starts)).to(device)
        if not len(self.starts):
            raise UserError(
                f"{folder}: every window of its {num_frames:,} frames touches an episode's end;"
                " set data.skip_resets to false, or use longer episodes"
            )
        self.ta, self.has_gaps = None, False
        if all(ta is not None for ta in actions):
            ta = np.concatenate(actions).astype(np.int64)
            known = ta != UNKNOWN
            known_in_windows = known[np.concatenate(starts) + self.window - 2]
            self.ta = torch.from_numpy(ta).to(device) if known_in_windows.any() else None
            self.has_gaps = not known.all()
        self._offsets = torch.arange(self.window, device=device)
        self._orders: dict[tuple[int, int], Tensor] = {}

    @contextmanager
    def skipping_bad_chunks(self, allowed: bool) -> Iterator[None]:
        """If `allowed`, print and count a bad chunk instead of raising `BadChunk`."""
        try:
            yield
        except BadChunk as error:
            if not allowed:
                raise
            print(f"skipped: {error}", file=sys.stderr)
            self.num_bad += 1

    @classmethod
    def read(cls, cfg: Config, split: str, device: torch.device, limit: int | None = None) -> "Windows":
        """The windows of at most `limit` chunks of the configured game's `split`; prints a summary."""
        maximum = cfg.data.train_chunks if split == "train" else cfg.data.test_chunks
        folder = cfg.game_data / split
        if limit is None or limit > maximum:
            print_chunk_limit(folder, maximum)
        windows = cls(folder, device=device, limit=min(maximum, limit or maximum), **loader_options(cfg))
        print(f"{split}: {windows.summary()}")
        return windows

    def __len__(self) -> int:
        return len(self.starts)

    def summary(self) -> str:
        """One line on frames, chunks, windows, true actions and memory."""
        labels = "with true actions" if self.ta is not None else "without true actions"
        if self.ta is not None and self.has_gaps:
            labels = f"{len(self.labelled()):,} of them with true actions"
        if 0 < len(self.unlabelled) < self.num_chunks:
            labels += f" (which {self.describe_unlabelled()})"
        skipped = f" ({self.num_bad} bad skipped)" if self.num_bad else ""
        return (
            f"{self.num_frames:,} frames in {self.num_chunks} chunks{skipped}, {len(self):,} windows,"
            f" {labels}, {self.frames.numel() / 1e9:.2f} GB on {self.frames.device}"
        )

    def describe_unlabelled(self) -> str:
        """The chunks without true actions, as subject and verb of a sentence: "1.npz lacks"."""
        first, *rest = (path.name for path in self.unlabelled)
        return f"{first} and {len(rest)} more lack" if rest else f"{first} lacks"

    def all(self) -> Tensor:
        """Indices of all windows, in data order: (M,) int64."""
        return torch.arange(len(self), device=self.frames.device)

    def labelled(self) -> Tensor:
        """Indices of all windows whose true action is known, in data order, int64. Needs `ta`."""
        windows = self.all()
        return windows[self.actions(windows) != UNKNOWN] if self.has_gaps else windows

    def evenly_spaced(self, count: int, among: Tensor | None = None) -> Tensor:
        """`count` windows (all if there are fewer) `among` ascending ones (default: all), evenly spaced.

        Returns indices (count,) int64, ascending.
        """
        among = self.all() if among is None else among
        if count >= len(among):
            return among
        return among[
            torch.linspace(0, len(among) - 1, count, device=among.device, dtype=torch.float64).long()
        ]

    def iter_batches(self, windows: Tensor, size: int = INFERENCE_BATCH) -> Iterator[Tensor]:
        """Split ascending window indices (M,) into batches of at most `size`; use each before the next."""
        yield from windows.split(size)

    def frame_index(self, windows: Tensor) -> Tensor:
        """Indices in `frames` of the first frames of windows (B,): (B,) int64."""
        return self.starts[windows]

    def gather(self, windows: Tensor) -> Tensor:
        """Frames (B, T, H, W, C) uint8 of windows (B,)."""
        return self.frames[self.frame_index(windows)[:, None] + self._offsets]

    def iter_frames(self, windows: Tensor) -> Iterator[Tensor]:
        """Frames (B, T, H, W, C) uint8 of ascending windows (M,), batch by batch."""
        for batch in self.iter_batches(windows):
            yield self.gather(batch)

    def current_frames(self, windows: Tensor) -> Tensor:
        """The frames o[t] (B, H, W, C) uint8 of windows (B,)."""
        return self.frames[self.frame_index(windows) + self.window - 2]

    def actions(self, windows: Tensor) -> Tensor:
        """True actions (B,) int64, taken at o[t], of windows (B,), or `UNKNOWN`. Needs `ta`."""
        return self.ta[self.starts[windows] + self.window - 2]

    def batch(self, step: int, batch_size: int, seed: int) -> Tensor:
        """Indices of the windows of training step `step`: (B,) int64 on the device.

        Batches are consecutive slices of an endless sequence of epochs. Each epoch is a permutation of all
        windows. A batch depends on the arguments alone, so a resumed run needs only its step.
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
        """What batches depend on besides the seed. Checkpoints save it."""
        return {
            "windows": len(self),
            "chunks": self.num_chunks,
            "on the device": self.on_device,
            "processes": self.shard.world_size,
        }

    def check_data_order(self, order: dict[str, int | str]) -> None:
        """Raise `UserError` if a resumed run would get other batches: `order` is its saved `data_order`.

        Only rank 0 checks, because the checkpoint is its own.
        """
        changes = diff(order, self.data_order) if self.shard.rank == 0 else []
        if changes:
            raise UserError(
                f"the run would continue with other batches than before ({'; '.join(changes)}); restore its"
                " data, its --resident and its number of processes, or choose another --exp"
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
        """The random generator of an epoch. Each purpose and each shard has its own."""
        return generator_of(seed, epoch, purpose, *(self.shard if self.shard.world_size > 1 else ()))


def generator_of(*key: int) -> torch.Generator:
    """A CPU random generator, seeded by the numbers in `key`."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence(key).generate_state(1)[0]))


def loader_options(cfg: Config) -> dict[str, bool | int]:
    """Keyword arguments of `Windows` from the config."""
    return {
        "image_size": cfg.data.image_size,
        "context": cfg.data.context,
        "skip_resets": cfg.data.skip_resets,
        "skip_bad": cfg.data.skip_bad_chunks,
    }


def allocate(total: int, image_size: int, device: torch.device, folder: Path) -> Tensor:
    """An uninitialised tensor for `total` frames. Raises `UserError` if the device has too little memory."""
    shape = total, image_size, image_size, CHANNELS
    needed = math.prod(shape)
    free = free_bytes(device)
    if free is not None and needed > free:
        raise UserError(
            f"{folder}: its {total:,} frames need {needed / 1e9:.1f} GB on {device},"
            f" where {free / 1e9:.1f} GB are free; lower data.train_chunks, data.test_chunks or"
            " data.pool_chunks"
        )
    try:
        return torch.empty(shape, dtype=torch.uint8, device=device)
    except RuntimeError as error:  # a process may have less memory than the machine has free
        reason = read_error_cause(error)
        if reason is None:
            raise
        raise UserError(
            f"{folder}: {reason} for its {total:,} frames, which need {needed / 1e9:.1f} GB on {device};"
            " lower data.train_chunks, data.test_chunks or data.pool_chunks"
        ) from None
