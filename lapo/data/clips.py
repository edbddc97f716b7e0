"""Clips of any kind, one frame at a time: looked at beforehand, read, cropped and shrunk.

A clip is a video file, a GIF, a folder of pictures, or a picture file that holds several.
Dimensions: H, W frame of a source · C = 3 colours
"""

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import PIL

from lapo.data import video
from lapo.data.pictures import count_pictures, find_files, is_picture, read_pictures
from lapo.data.video import Film, read_film, scan
from lapo.errors import UserError

SIZE = 64
Crop = tuple[int, int, int, int]
"""X and Y of the upper left corner, width and height, in pixels of the source."""


@dataclass
class Clip:
    """A clip whose first frame decodes."""

    path: Path
    frames: int
    """How many it gives: exact but for films whose codec has packets that show nothing."""
    film: Film | None
    """None for pictures."""

    def read(self, every: int = 1) -> Iterator[np.ndarray | None]:
        """Frames (H, W, 3) uint8 in the order shown; None for all but one in `every`, which costs less.

        Raises UserError where one cannot be decoded exactly.
        """
        return read_film(self.film, every) if self.film else read_pictures(self.path, every)

    def notes(self, decoded: int) -> list[str]:
        """What the user should know of a clip that gave so many frames, in whole sentences."""
        if not self.film:
            return []
        notes = list(self.film.notes)
        left_out = self.film.frames + self.film.left_out - decoded
        if self.film.cut and left_out > 0:
            notes.append(
                f"begins amid a group of pictures: {left_out} frames at its beginning, which need earlier"
                " ones, were left out"
            )
        return [f"{self.path} {note}" for note in notes]


def open_clip(path: Path, crop: Crop | None) -> Clip:
    """Look at a clip without decoding more than its first frame.

    Raises UserError if that cannot be had, or cropped.
    """
    if path.is_dir() or is_picture(path):
        clip = Clip(path, count_pictures(path), None)
    else:
        find_files(path)
        film = scan(path)
        clip = Clip(path, film.frames, film)
    first = next(clip.read(), None)
    if first is None:
        raise UserError(f"{path} holds no frame that can be decoded")
    cropped(first, crop, path)
    return clip


def checksum(path: Path) -> str:
    """Checksum of all bytes of a clip's files and, in a folder, of their names, whose order is the film's."""
    value = 0
    for file in find_files(path):
        if path.is_dir():
            value = zlib.crc32(file.name.encode("utf-8", "surrogateescape"), value)
        with file.open("rb") as opened:
            while block := opened.read(1 << 20):
                value = zlib.crc32(block, value)
    return f"{value:08x}"


def cropped(rgb: np.ndarray, crop: Crop | None, path: Path) -> np.ndarray:
    """The part of a frame (H, W, 3) of the clip `path` that is kept. Raises UserError if it is not in it."""
    if crop is None:
        return rgb
    x, y, width, height = crop
    if min(x, y) < 0 or min(width, height) < 1 or y + height > rgb.shape[0] or x + width > rgb.shape[1]:
        raise UserError(
            f"--crop {x} {y} {width} {height} (x, y, width, height) does not lie within the frames of {path},"
            f" {rgb.shape[1]} × {rgb.shape[0]} pixels"
        )
    return rgb[y : y + height, x : x + width]


@lru_cache
def area_weights(length: int) -> np.ndarray:
    """How much of `length` source pixels each of 64 target pixels covers: (64, length), in 1/64 pixels."""
    edges = np.arange(SIZE + 1)[:, None] * length
    pixels = np.arange(length)[None] * SIZE
    overlap = np.minimum(edges[1:], pixels + SIZE) - np.maximum(edges[:-1], pixels)
    return np.maximum(overlap, 0).astype(np.float32)


def shrink(rgb: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8 → (64, 64, 3) uint8: the exact mean of the area that each pixel covers, rounded.

    Pillow and FFmpeg take a pixel that is covered in part for covered or not, or round in between. All sums
    here are of whole numbers which floating point holds exactly, so they are the same on every machine.
    """
    height, width, _ = rgb.shape
    rows, weights = rgb.reshape(height, -1), area_weights(height)
    strips = np.empty((SIZE, width * 3), np.float32)
    for y in range(SIZE):
        covered = slice(y * height // SIZE, -(-(y + 1) * height // SIZE))
        strips[y] = weights[y, covered] @ rows[covered].astype(np.float32)
    sums = area_weights(width).astype(np.float64) @ strips.reshape(SIZE, width, 3)
    return np.floor(sums / (height * width) + 0.5).astype(np.uint8)


def versions() -> dict[str, str]:
    """Versions of what decodes."""
    return {**video.versions(), "pillow": PIL.__version__}
