"""Chunks of frames on disk → windows on the device.

Dimensions
    F frames of all chunks · M windows · B batch · T frames of a window (3) · H, W = 64 · C = 3

Frames stay uint8, as stored (see chunks.py), in one tensor on the device. A window is three consecutive
frames of one chunk; the action of interest was taken at the second to last of them.

`python data_loader.py --check FOLDER` checks chunks and prints a table, see check_data.py.
"""

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from chunks import FRAME_SHAPE, WINDOW, find_chunks, read_chunk, read_header
from config import Config, diff
from errors import UserError, run_main
from ranks import Share, local_processes

WHOLE = Share()


def window_starts(done: np.ndarray | None, num_frames: int, skip_resets: bool) -> np.ndarray:
    """Indices of the first frames of a chunk's windows, (M,) int64.

    With `skip_resets`, a window is left out when any of its frames is marked `done`: data sets differ in
    whether the mark sits on an episode's last frame or on the next one's first.
    """
    starts = np.arange(num_frames - WINDOW + 1)
    if done is None or not skip_resets:
        return starts
    marked = np.convolve(done.astype(np.int64), np.ones(WINDOW, np.int64), mode="valid")
    return starts[marked == 0]


def chunks_of(folder: Path, limit: int | None, share: Share) -> list[Path]:
    """A share of the chunk files of a folder, of which `limit` count. Raises `UserError` if it is empty."""
    paths = find_chunks(folder, limit)
    if len(paths) < share.of:
        raise UserError(
            f"{folder}: its chunks in use ({len(paths)}) cannot be shared by {share.of} processes, which need"
            " one each; start fewer, or make more chunks"
        )
    return paths[share.rank :: share.of]


class Windows:
    """All windows of a split of one game, or of a share of its chunks, resident on a device.

    Attributes
        frames  (F, H, W, C) uint8
        starts  (M,) int64: index of every window's first frame
        ta      (F,) int64 true actions, or None when some chunk lacks them; used only to measure

    `num_chunks` were read, `num_bad` left out.
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
        share: Share = WHOLE,
    ):
        """Read the chunks of `folder`, one after the other: host memory holds one decoded chunk at a time.

        `limit` counts chunk files, bad ones included; of these, only `share` is read. With `skip_bad`, bad
        ones are named on stderr and left out; everything else then follows from those that were read.

        Raises `UserError` for a missing or empty folder, a bad chunk (with `skip_bad`: if there is no good
        one), data without any window, or frames that do not fit into memory.
        """
        paths = chunks_of(folder, limit, share)
        self.share, self.num_bad = share, 0
        sizes = {}
        for path in paths:
            with self.leaving_out_bad(skip_bad):
                sizes[path] = read_header(path)
        frames = allocate(sum(sizes.values()), device, folder)
        starts, actions = [], []
        offset = 0
        for path, size in sizes.items():
            with self.leaving_out_bad(skip_bad):
                chunk = read_chunk(path)
                frames[offset : offset + size].copy_(torch.from_numpy(chunk["obs"]))
                starts.append(window_starts(chunk.get("done"), size, skip_resets) + offset)
                actions.append(chunk.get("ta"))
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
        """Where it is `allowed`, name and count a bad chunk instead of raising `UserError`."""
        try:
            yield
        except UserError as error:
            if not allowed:
                raise
            print(f"left out: {error}", file=sys.stderr)
            self.num_bad += 1

    @classmethod
    def read(cls, cfg: Config, split: str, device: torch.device, limit: int | None = None) -> "Windows":
        """The windows of a configured game's `train` or `test`, at most `limit` chunks; prints a summary."""
        most = cfg.data.train_chunks if split == "train" else cfg.data.test_chunks
        windows = cls(cfg.game_data / split, device=device, limit=min(most, limit or most), **reading(cfg))
        print(f"{split}: {windows.summary()}")
        return windows

    def __len__(self) -> int:
        return len(self.starts)

    def summary(self) -> str:
        """One line on what was read."""
        labels = "with" if self.ta is not None else "without"
        left_out = f" ({self.num_bad} bad left out)" if self.num_bad else ""
        return (
            f"{self.num_frames:,} frames in {self.num_chunks} chunks{left_out}, {len(self):,} windows,"
            f" {labels} true actions, {self.frames.numel() / 1e9:.2f} GB on {self.frames.device}"
        )

    def all(self) -> Tensor:
        """Numbers of all windows, in the order of the data: (M,) int64."""
        return torch.arange(len(self), device=self.frames.device)

    def spread(self, count: int) -> Tensor:
        """Numbers of at most `count` windows, spread evenly over the data and in its order: (M,) int64."""
        if count >= len(self):
            return self.all()
        return torch.linspace(0, len(self) - 1, count, device=self.frames.device, dtype=torch.float64).long()

    def parts(self, windows: Tensor, size: int) -> Iterator[Tensor]:
        """The windows numbered (M,), ascending, in parts of at most `size`: use each before the next."""
        yield from windows.split(size)

    def place(self, windows: Tensor) -> Tensor:
        """Where in `frames` the windows numbered (B,) start: (B,) int64."""
        return self.starts[windows]

    def gather(self, windows: Tensor) -> Tensor:
        """Frames of the windows numbered (B,) → (B, T, H, W, C) uint8."""
        return self.frames[self.place(windows)[:, None] + self._offsets]

    def middle_frames(self, windows: Tensor) -> Tensor:
        """The frame o[t] of the windows numbered (B,) → (B, H, W, C) uint8."""
        return self.frames[self.place(windows) + WINDOW - 2]

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
    def order(self) -> dict[str, int | str]:
        """What the order of batches depends on beside the seed."""
        return {
            "windows": len(self),
            "chunks": self.num_chunks,
            "on the device": self.on_device,
            "processes": self.share.of,
        }

    def expect_order(self, order: dict[str, int | str]) -> None:
        """Raise `UserError` if a run that began with another `order` of batches is to go on with this one.

        Where several processes share the data, `order` is the first one's.
        """
        changes = diff(order, self.order) if self.share.rank == 0 else []
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
        """Random numbers of an epoch, others for every purpose and share."""
        return generator_of(seed, epoch, purpose, *(self.share if self.share.of > 1 else ()))


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
    return torch.empty((total, *FRAME_SHAPE), dtype=torch.uint8, device=device)


def free_bytes(device: torch.device) -> int | None:
    """Memory that this process may take on `device`; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    free = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)
    return free and free // local_processes()


if __name__ == "__main__":
    from check_data import main

    run_main(main)
