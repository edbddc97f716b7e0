"""Pictures: the order of a folder's files, EXIF, and the formats that Pillow reads better than FFmpeg.

FFmpeg refuses TIFFs with transparency and animated WebP; all else it decodes more strictly than Pillow, which
overlooks damage.
"""

import re
from collections import Counter
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from lapo.data.video import over_white, read_stills, turn
from lapo.errors import UserError

KINDS = {
    ".png": "PNG",
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".bmp": "BMP",
    ".webp": "WebP",
    ".tif": "TIFF",
    ".tiff": "TIFF",
    ".ppm": "PPM",
}
"""Kinds of pictures by the endings of their names."""
FILMS = (
    *(".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".ts", ".mts", ".m2ts", ".mpg", ".mpeg", ".vob"),
    *(".wmv", ".asf", ".flv", ".ogv", ".3gp", ".gif"),
)
"""Endings of the names of films."""
WITH_PILLOW = ("WebP", "TIFF")
COLOURS = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "YCbCr")
"""Pillow's modes that become RGB without a colour profile; I;16 is handled besides."""
ORIENTATION = 274
TURNS = {
    2: (-1, 0, 0, 1),
    3: (-1, 0, 0, -1),
    4: (1, 0, 0, -1),
    5: (0, 1, 1, 0),
    6: (0, 1, -1, 0),
    7: (0, -1, -1, 0),
    8: (0, -1, 1, 0),
}
"""EXIF's orientations as display matrices (a, b, c, d)."""
# Digits are one number up to a dot, or a decimal with a sign: who named the files knows.
WHOLE = r"(\d+)"
SIGNED = r"((?:(?<![A-Za-z0-9])-)?(?:(?<!\d\.)\d+\.\d+(?!\d|\.\d)|\d+))"


def find_files(path: Path) -> list[Path]:
    """The files of a clip: itself or a folder's pictures, in the order of the numbers in their names.

    Raises UserError if there is none, if the folder holds more than pictures of one kind, and if the order is
    not certain.
    """
    if not path.is_dir():
        if not path.exists():
            raise UserError(f"{path} does not exist")
        return [path]
    files = [file for file in path.iterdir() if file.name[0] != "."]
    pictures = [file for file in files if file.suffix.lower() in KINDS]
    if not pictures:
        raise UserError(
            f"the folder {path} holds no image ({', '.join(KINDS)}); videos are named one by one,"
            f" as in {path}/*.mp4"
        )
    films = [file for file in files if file.suffix.lower() in FILMS]
    if films:
        raise UserError(
            f"the folder {path} holds films and pictures, such as {min(films).name} and {min(pictures).name};"
            f" name the films one by one, as in {path}/*{min(films).suffix}, or move the pictures elsewhere"
        )
    kinds = Counter(KINDS[file.suffix.lower()] for file in pictures)
    if len(kinds) > 1:
        found = " and ".join(f"{count} {kind}" for kind, count in kinds.most_common())
        raise UserError(f"the folder {path} holds {found} pictures; keep a single kind in it")
    ordered, other = (_in_order(pictures, number) for number in (WHOLE, SIGNED))
    for one, another in zip(ordered, other, strict=True):
        if one != another:
            raise UserError(
                f"the order of the pictures in {path} is not certain: {one.name} comes before {another.name}"
                " if dots and minus signs separate numbers, and after it if they belong to them; name them"
                f" 0001{one.suffix}, 0002{one.suffix}, ..."
            )
    return ordered


def _in_order(pictures: list[Path], number: str) -> list[Path]:
    """Pictures sorted by the numbers, as the pattern `number` finds them, in their names."""

    def order(picture: Path) -> tuple[list, str]:
        parts: list = re.split(number, picture.stem)
        parts[1::2] = map(Decimal, parts[1::2])
        return parts, picture.name

    return sorted(pictures, key=order)


def is_picture(file: Path) -> bool:
    """Whether a file's name is that of a picture, or of an animated one."""
    return file.suffix.lower() in KINDS


def count_pictures(path: Path) -> int:
    """How many pictures a folder has, or one file: animated ones and TIFFs can hold several."""
    if path.is_dir():
        return len(find_files(path))
    return sum(1 for _ in read_pictures(path))


def read_pictures(path: Path, every: int = 1) -> Iterator[np.ndarray | None]:
    """Pictures (H, W, 3) uint8 of a file or a folder, upright; None for all but one in `every`.

    Raises UserError where one cannot be decoded exactly, and for a file in a folder that holds several.
    """
    index = 0
    for file in find_files(path):
        kind = KINDS[file.suffix.lower()]
        read = _read_with_pillow if kind in WITH_PILLOW else _read_with_ffmpeg
        for number, rgb in enumerate(read(file)):
            if number and path.is_dir():
                raise UserError(
                    f"{file} holds several pictures; move it out of the folder, and name it by itself"
                )
            yield None if index % every else rgb
            index += 1


def _read_with_ffmpeg(file: Path) -> Iterator[np.ndarray]:
    try:
        with Image.open(file) as image:
            orientation = image.getexif().get(ORIENTATION)
    except Exception:  # whatever Pillow does not make of it, FFmpeg judges
        orientation = None
    matrix = TURNS.get(orientation, (1, 0, 0, 1))
    for rgb in read_stills(file):
        yield turn(rgb, matrix)


def _read_with_pillow(file: Path) -> Iterator[np.ndarray]:
    try:
        with Image.open(file) as image:
            for number in range(getattr(image, "n_frames", 1)):
                image.seek(number)
                yield _to_rgb(image, file)
    except UserError:
        raise
    except Exception as error:  # damaged files make Pillow raise almost anything
        raise UserError(
            f"{file} cannot be decoded ({error}); leave it out, or save it as PNG with another program"
        ) from None


def _to_rgb(image: Image.Image, file: Path) -> np.ndarray:
    """An open picture of `file`, upright, what is transparent laid over white: (H, W, 3) uint8."""
    image.load()
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):
        return np.repeat((np.asarray(image) >> 8).astype(np.uint8)[..., None], 3, axis=2)
    if image.mode not in COLOURS:
        raise UserError(
            f"{file}: its colours ({image.mode}) have no exact conversion to 8-bit RGB; save it as an RGB PNG"
        )
    if not image.has_transparency_data:
        return np.asarray(image.convert("RGB"))
    rgba = np.asarray(image.convert("RGBA"))
    return over_white(rgba[..., :3], rgba[..., 3:])
