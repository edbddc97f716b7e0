"""Frames of anyone's videos, one at a time: decoded, cropped and shrunk.

The only module that imports PyAV. A clip is a video file, a GIF or a folder of images.
Dimensions: H, W frame of a source · C = 3 colours
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import av
import numpy as np

from lapo.errors import UserError

SIZE = 64
IMAGE_TYPES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".ppm")
Crop = tuple[int, int, int, int]
"""X and Y of the upper left corner, width and height, in pixels of the source."""


def find_files(path: Path) -> list[Path]:
    """The files of a clip: itself or a folder's images, in the order of the numbers in their names.

    Raises UserError if there is none.
    """
    if not path.is_dir():
        if not path.exists():
            raise UserError(f"{path} does not exist")
        return [path]

    def order(image: Path) -> tuple[list, str]:
        parts: list = re.split(r"(\d+)", image.name)
        parts[1::2] = map(int, parts[1::2])
        return parts, image.name

    images = [file for file in path.iterdir() if file.suffix.lower() in IMAGE_TYPES and file.name[0] != "."]
    if not images:
        raise UserError(
            f"the folder {path} holds no image ({', '.join(IMAGE_TYPES)}); videos are named one by one,"
            f" as in {path}/*.mp4"
        )
    return sorted(images, key=order)


@contextmanager
def open_video(file: Path) -> Iterator[av.VideoStream]:
    """The first video stream of a file. Raises UserError if there is none, and for what FFmpeg refuses."""
    try:
        with av.open(str(file.absolute())) as container:
            if not container.streams.video:
                raise UserError(f"{file} holds no video, or is cut off")
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            # By default, what is missing of a damaged picture is made up from its surroundings.
            stream.codec_context.options = {"err_detect": "explode"}
            yield stream
    except (av.FFmpegError, OSError) as error:
        raise UserError(
            f"{file} cannot be decoded ({error.strerror}); leave it out, or encode it anew with ffmpeg, which"
            " patches up what is damaged"
        ) from None


def read_frames(path: Path) -> Iterator[av.VideoFrame]:
    """Frames of a clip in the order shown. Raises UserError where one cannot be decoded."""
    for file in find_files(path):
        with open_video(file) as stream:
            yield from stream.container.decode(stream)


def probe(path: Path, crop: Crop | None) -> int:
    """How many frames a clip has, counted without decoding them: exact for all but oddly edited files.

    Raises UserError if its first frame cannot be had, or cropped.
    """
    first = next(read_frames(path), None)
    if first is None:
        raise UserError(f"{path} holds no frame")
    to_rgb(first, crop, path)
    if path.is_dir():
        return len(find_files(path))
    with open_video(path) as stream:
        # The packet that ends the stream is empty.
        return sum(packet.size > 0 for packet in stream.container.demux(stream))


def to_rgb(frame: av.VideoFrame, crop: Crop | None, path: Path) -> np.ndarray:
    """A frame of the clip `path` as players show it, cropped: (H, W, 3) uint8.

    Raises UserError if the crop is not within it.
    """
    # Phones store a turned picture with a note to turn it back.
    rgb = np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90)
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
    return {"av": av.__version__, "libavcodec": ".".join(map(str, av.library_versions["libavcodec"]))}
