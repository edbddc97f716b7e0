"""A tiny run with all stages and modes, made once for all tests that read one."""

import functools
import shutil
from pathlib import Path

import numpy as np

from lapo import stage1_idm_wm, stage2_bc, stage3_decode
from support import Workplace, write_chunk

SHOWN = [1, 4, 7]
"""The actions in the data: LEFT, NOOP, RIGHT."""


def write_strips(folder: Path, *, actions: bool = True) -> None:
    """Chunks of 120 frames: a random texture that moves left, stays or moves right, as the action says."""
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        ta = rng.choice(SHOWN, size=120)
        strip = rng.integers(256, size=(64, 64, 3), dtype=np.uint8)
        shifts = np.cumsum([0, *(4 * (SHOWN.index(action) - 1) for action in ta[:-1])])
        obs = np.stack([np.roll(strip, shift, axis=1) for shift in shifts])
        write_chunk(folder / split / "0.npz", obs, **({"ta": ta} if actions else {}))


@functools.cache
def finished_run(folder: Path) -> Workplace:
    """The run, made in `folder`; its policies were evaluated greedily, which leaves nothing to chance."""
    folder.mkdir()
    place = Workplace(folder)
    shutil.rmtree(place.data)
    write_strips(place.data / place.GAME)
    stage1_idm_wm.train(place.config())
    stage2_bc.train(place.config())
    for mode in ("online", "offline", "scratch", "bc"):
        stage3_decode.train(place.config("--stage3.mode", mode, "--eval.greedy", "true"))
    return place
