"""Pictures: the order of a folder's files, EXIF orientation, and decoding with FFmpeg or Pillow.

Pillow reads TIFF and WebP, because FFmpeg cannot read transparent TIFFs and animated WebP. FFmpeg reads the
rest, because Pillow ignores some damage.

Dimensions
    H, W picture of a source · C = 3 colours
"""

import re
from collections import Counter
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from lapo.data.video import on_white, read_stills, transform
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
"""Kinds of pictures by file name extension."""
VIDEOS = (
    *(".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".ts", ".mts", ".m2ts", ".mpg", ".mpeg", ".vob"),
    *(".wmv", ".asf", ".flv", ".ogv", ".3gp", ".gif"),
)
"""File name extensions of videos."""
WITH_PILLOW = ("WebP", "TIFF")
COLOURS = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "YCbCr")
"""Pillow's modes that convert to RGB without a colour profile; `_to_rgb` handles I;16, too."""
ORIENTATION = 274
"""EXIF's tag for it."""
MATRICES = {
    2: (-1, 0, 0, 1),
    3: (-1, 0, 0, -1),
    4: (1, 0, 0, -1),
    5: (0, 1, 1, 0),
    6: (0, 1, -1, 0),
    7: (0, -1, -1, 0),
    8: (0, -1, 1, 0),
}
"""Display matrices (a, b, c, d) of EXIF's orientations."""
# A dot or a minus sign in a file name may separate numbers or belong to one. Both patterns must agree.
WHOLE = r"(\d+)"
SIGNED = r"((?:(?<![A-Za-z0-9])-)?(?:(?<!\d\.)\d+\.\d+(?!\d|\.\d)|\d+))"


def find_files(path: Path) -> list[Path]:
    """The files of a clip: the file itself, or a folder's pictures by the numbers in their names.

    Raises `UserError` if there is none, if the folder also holds videos or pictures of another kind, and if
    the order is ambiguous.
    """
    if not path.is_dir():
        if not path.exists():
            raise UserError(f"{path} does not exist; name video files, GIFs or folders of pictures")
        return [path]
    files = [file for file in path.iterdir() if file.name[0] != "."]
    pictures = [file for file in files if file.suffix.lower() in KINDS]
    if not pictures:
        raise UserError(
            f"the folder {path} holds no picture ({', '.join(KINDS)}); name videos one by one, as in"
            f" {path}/*.mp4"
        )
    videos = [file for file in files if file.suffix.lower() in VIDEOS]
    if videos:
        raise UserError(
            f"the folder {path} holds videos and pictures, such as {min(videos).name} and"
            f" {min(pictures).name}; name the videos one by one, as in {path}/*{min(videos).suffix}, or move"
            " the pictures elsewhere"
        )
    kinds = Counter(KINDS[file.suffix.lower()] for file in pictures)
    if len(kinds) > 1:
        found = " and ".join(f"{count} {kind}" for kind, count in kinds.most_common())
        raise UserError(f"the folder {path} holds {found} pictures; keep a single kind in it")
    ordered, other = (_in_order(pictures, number) for number in (WHOLE, SIGNED))
    for one, another in zip(ordered, other, strict=True):
        if one != another:
            raise UserError(
                f"the order of the pictures in {path} is ambiguous: {one.name} comes before {another.name} if"
                " dots and minus signs separate numbers, after it if they are part of a number; rename them"
                f" to 0001{one.suffix}, 0002{one.suffix}, ..."
            )
    return ordered


def _in_order(pictures: list[Path], number: str) -> list[Path]:
    """Pictures sorted by the numbers in their names that match the pattern `number`."""

    def order(picture: Path) -> tuple[list, str]:
        parts: list = re.split(number, picture.stem)
        parts[1::2] = map(Decimal, parts[1::2])
        return parts, picture.name

    return sorted(pictures, key=order)


def is_picture(file: Path) -> bool:
    """Whether a file has the extension of a picture, which may be animated."""
    return file.suffix.lower() in KINDS


def count_pictures(path: Path) -> int:
    """Number of pictures in a folder or in a file: TIFF, PNG and WebP files can hold several."""
    if path.is_dir():
        return len(find_files(path))
    return sum(1 for _ in read_pictures(path))


def read_pictures(path: Path, every: int = 1) -> Iterator[np.ndarray | None]:
    """Upright pictures (H, W, 3) uint8 of a file or a folder. All but every `every`-th are None.

    Raises `UserError` where one does not decode exactly, and if a file of a folder holds several.
    """
    index = 0
    for file in find_files(path):
        kind = KINDS[file.suffix.lower()]
        read = _read_with_pillow if kind in WITH_PILLOW else _read_with_ffmpeg
        for number, rgb in enumerate(read(file)):
            if number and path.is_dir():
                raise UserError(
                    f"{file} holds several pictures; move it out of the folder and name it as a clip"
                )
            yield None if index % every else rgb
            index += 1


def _read_with_ffmpeg(file: Path) -> Iterator[np.ndarray]:
    try:
        with Image.open(file) as image:
            orientation = image.getexif().get(ORIENTATION)
    except Exception:  # Pillow cannot read the file; FFmpeg decides whether it is damaged
        orientation = None
    matrix = MATRICES.get(orientation, (1, 0, 0, 1))
    for rgb in read_stills(file):
        yield transform(rgb, matrix)


def _read_with_pillow(file: Path) -> Iterator[np.ndarray]:
    try:
        with Image.open(file) as image:
            for number in range(getattr(image, "n_frames", 1)):
                image.seek(number)
                yield _to_rgb(image, file)
    except UserError:
        raise
    except Exception as error:  # Pillow raises many kinds of exceptions for damaged files
        raise UserError(
            f"{file} cannot be decoded ({error}); leave it out, or save it as PNG with another program"
        ) from None


def _to_rgb(image: Image.Image, file: Path) -> np.ndarray:
    """RGB of an open picture of `file`, upright, transparent pixels on white: (H, W, 3) uint8."""
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
    return on_white(rgba[..., :3], rgba[..., 3:])
