"""Chunks of frames on disk → batches of windows on the device.

A window is consecutive frames of one chunk: as published o[t-1], o[t], o[t+1]. Its action was taken at o[t].
Frames stay uint8 (see data/chunks.py), in one tensor on the device. Two loaders have one interface: `Windows`
(data/windows.py) keeps all frames on the device, `RollingWindows` (data/rolling.py) serves more chunks than
fit there. `read_splits` chooses between them.

`python data_loader.py --check FOLDER` checks chunks and prints a table, see data/checks.py.
"""

from collections.abc import Callable, Hashable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from lapo.config import Config
from lapo.data.chunks import print_chunk_limit, read_header
from lapo.data.rolling import RollingWindows
from lapo.data.windows import INFERENCE_BATCH, WHOLE, Windows, loader_options, shard_paths
from lapo.errors import UserError, run_main
from lapo.frames import CHANNELS
from lapo.runs.compute import free_bytes
from lapo.runs.ranks import Shard, all_max, shard

__all__ = ["INFERENCE_BATCH", "WHOLE", "RollingWindows", "Shared", "Windows", "read_splits", "stays_resident"]

RESIDENT_FRACTION = 0.7
"""Fraction of the free memory that resident frames may take."""


class Shared:
    """What several trainings in a row share, such as frames: the latest value of each kind."""

    def __init__(self) -> None:
        self._latest: dict[str, tuple[Hashable, Any]] = {}

    def get(self, kind: str, make: Callable[[], Any], key: Hashable = None) -> Any:
        """The value of this kind. `make` makes it at first, and when `key` differs from the last call's."""
        if kind not in self._latest or self._latest[kind][0] != key:
            self._latest.pop(kind, None)  # the old value may go before the new one needs its memory
            self._latest[kind] = key, make()
        return self._latest[kind][1]


def read_splits(cfg: Config, device: torch.device) -> tuple[Windows, Windows]:
    """Training and held-out windows of the configured game; prints a summary.

    Held-out windows are resident; `cfg.resident` says whether training windows are. Each process has a shard
    of the training windows. Without a `test` folder, evaluation uses the training windows of all processes.
    Raises `UserError` as `Windows` does.
    """
    own = shard()
    print_chunk_limit(cfg.game_data / "train", cfg.data.train_chunks)
    train = read_train(cfg, device, cfg.resident, own)
    if (cfg.game_data / "test").is_dir():
        return train, Windows.read(cfg, "test", device)
    print("test: no such folder; evaluation uses the training windows")
    if own.world_size == 1:
        return train, train
    # `always` refers to the shard. Beside it, all windows may not fit.
    return train, read_train(cfg, device, "never" if cfg.resident == "never" else "auto", WHOLE)


def read_train(cfg: Config, device: torch.device, resident: str, shard: Shard) -> Windows:
    """A shard of the configured game's training windows; `resident` is always, auto or never."""
    folder = cfg.game_data / "train"
    options = {"device": device, "limit": cfg.data.train_chunks, "shard": shard, **loader_options(cfg)}
    if stays_resident(folder, device, cfg.data.train_chunks, resident, shard, cfg.data.image_size):
        train = Windows(folder, **options)
    else:
        train = RollingWindows(folder, pool_chunks=cfg.data.pool_chunks, **options)
    print(f"train: {train.summary()}")
    return train


def stays_resident(
    folder: Path,
    device: torch.device,
    limit: int | None,
    resident: str,
    shard: Shard = WHOLE,
    image_size: int = 64,
) -> bool:
    """Whether all chunks of a shard of `folder` stay on the device; prints their size and the free memory.

    With `auto` they do if they fit on every rank. Raises `UserError` as `shard_paths` does.
    """
    sizes = []
    for path in shard_paths(folder, limit, shard):
        with suppress(UserError):  # `Windows` raises or prints it
            sizes.append(read_header(path))
    total = sum(sizes)
    needed, free = total * image_size**2 * CHANNELS, free_bytes(device)
    available = "" if free is None else f" of {free / 1e9:.2f} GB free"
    print(f"train: {total:,} frames need {needed / 1e9:.2f} GB{available} on {device}")
    if resident != "auto":
        return resident == "always"
    # Two pools are on the device at a time, so pools save memory from three chunks on.
    too_many = free is not None and needed > RESIDENT_FRACTION * free and len(sizes) >= 3
    return all_max(too_many) == (False,)


if __name__ == "__main__":
    from lapo.data.checks import main

    run_main(main)
