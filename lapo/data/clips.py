"""Clips of any kind: inspected, then read frame by frame, cropped and scaled to a square.

A clip is a video file, a GIF, a folder of pictures, or a file with several pictures.

Dimensions
    H, W frame of a source · S its size as an obs · C = 3 colours
"""

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import PIL

from lapo.data.pictures import count_pictures, find_files, is_picture, read_pictures
from lapo.data.video import Video, decoder_versions, read_video, scan
from lapo.errors import UserError

Crop = tuple[int, int, int, int]
"""X and Y of the upper left corner, width and height, in pixels of the source."""


@dataclass
class Clip:
    """A clip whose first frame was decoded."""

    path: Path
    frames: int
    """Number of frames: exact unless a video's codec has packets that show nothing."""
    video: Video | None
    """None for pictures."""

    def read(self, every: int = 1) -> Iterator[np.ndarray | None]:
        """Frames (H, W, 3) uint8 in display order. All but every `every`-th are None, which costs less.

        Raises `UserError` where a frame does not decode exactly.
        """
        return read_video(self.video, every) if self.video else read_pictures(self.path, every)

    def notes(self, decoded: int) -> list[str]:
        """What the user should know of a clip of which `decoded` frames were decoded, in whole sentences."""
        if not self.video:
            return []
        notes = list(self.video.notes)
        left_out = self.video.frames + self.video.left_out - decoded
        if self.video.mid_gop and left_out > 0:
            notes.append(
                f"begins between keyframes: its first {left_out} frames depend on missing ones and were left"
                " out"
            )
        return [f"{self.path} {note}" for note in notes]


def open_clip(path: Path, crop: Crop | None) -> Clip:
    """Inspect a clip; of its frames only the first is decoded.

    Raises `UserError` if it cannot be decoded or cropped.
    """
    if path.is_dir() or is_picture(path):
        clip = Clip(path, count_pictures(path), None)
    else:
        find_files(path)
        video = scan(path)
        clip = Clip(path, video.frames, video)
    first = next(clip.read(), None)
    if first is None:
        raise UserError(f"{path} holds no frame that can be decoded; leave it out")
    cropped(first, crop, path)
    return clip


def checksum(path: Path) -> str:
    """Checksum (8 hex digits) of a clip's files and, for a folder, of their names, which give the order."""
    value = 0
    for file in find_files(path):
        if path.is_dir():
            value = zlib.crc32(file.name.encode("utf-8", "surrogateescape"), value)
        with file.open("rb") as opened:
            while block := opened.read(1 << 20):
                value = zlib.crc32(block, value)
    return f"{value:08x}"


def cropped(rgb: np.ndarray, crop: Crop | None, path: Path) -> np.ndarray:
    """Crop a frame (H, W, 3) of the clip `path`. Raises `UserError` if the crop exceeds the frame."""
    if crop is None:
        return rgb
    x, y, width, height = crop
    if min(x, y) < 0 or min(width, height) < 1 or y + height > rgb.shape[0] or x + width > rgb.shape[1]:
        raise UserError(
            f"--crop {x} {y} {width} {height} (x, y, width, height) does not lie within the frames of {path},"
            f" {rgb.shape[1]} × {rgb.shape[0]} pixels; choose a smaller one"
        )
    return rgb[y : y + height, x : x + width]


@lru_cache
def area_weights(length: int, size: int) -> np.ndarray:
    """How much of each of `length` source pixels each of S target pixels covers: (S, length), in 1/S."""
    edges = np.arange(size + 1)[:, None] * length
    pixels = np.arange(length)[None] * size
    overlap = np.minimum(edges[1:], pixels + size) - np.maximum(edges[:-1], pixels)
    return np.maximum(overlap, 0).astype(np.float32)


def shrink(rgb: np.ndarray, size: int) -> np.ndarray:
    """Area averaging: (H, W, 3) uint8 → (S, S, 3) uint8, the rounded mean of the area of each target pixel.

    Pillow and FFmpeg round partly covered pixels or intermediate sums. All sums here are integers that
    floating point represents exactly, so results are the same on every machine.
    """
    height, width, _ = rgb.shape
    rows, weights = rgb.reshape(height, -1), area_weights(height, size)
    strips = np.empty((size, width * 3), np.float32)
    for y in range(size):
        covered = slice(y * height // size, -(-(y + 1) * height // size))
        strips[y] = weights[y, covered] @ rows[covered].astype(np.float32)
    sums = area_weights(width, size).astype(np.float64) @ strips.reshape(size, width, 3)
    return np.floor(sums / (height * width) + 0.5).astype(np.uint8)


def versions() -> dict[str, str]:
    """Versions of the decoding libraries."""
    return {**decoder_versions(), "pillow": PIL.__version__}
