"""Frames of another size: blocks of pixels are averaged.

Dimensions: S pixels of a stored frame, s of a smaller one · C = 3 colours
"""

import numpy as np

from lapo.errors import UserError

CHANNELS = 3
SIZES = 8, 16, 32, 64, 128, 256
"""Sizes of frames, in pixels: the networks halve them again and again."""
BLOCK = 256
"""Frames that are averaged at a time, so that sums stay in the processor's cache."""


def resize(frames: np.ndarray, size: int) -> np.ndarray:
    """Average (N, S, S, C) uint8 frames over blocks of pixels: (N, s, s, C) uint8 with s = `size`.

    Halves are rounded up. Frames of that size are returned as they are. Raises `UserError` unless S is a
    multiple of `size`.
    """
    _, height, width, channels = frames.shape
    if height == width == size:
        return frames
    if height != width or height % size:
        usable = height == width and height in SIZES
        remedy = f"choose --data.image_size {height}" if usable else "scale the frames"
        raise UserError(f"frames have {height}×{width} pixels, but data.image_size is {size}; {remedy}")
    ratio = height // size
    small = np.empty((len(frames), size, size, channels), np.uint8)
    for start in range(0, len(frames), BLOCK):
        block = frames[start : start + BLOCK]
        total = np.full((len(block), *small.shape[1:]), ratio**2 // 2, np.uint32)
        for y in range(ratio):
            for x in range(ratio):
                total += block[:, y::ratio, x::ratio]
        small[start : start + BLOCK] = total // ratio**2
    return small
