"""pictures.py: folders and files of pictures as cameras and programs leave them."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lapo.data.clips import open_clip
from lapo.data.pictures import find_files
from lapo.errors import UserError


def corner() -> np.ndarray:
    """White in the upper left quarter: (64, 128, 3)."""
    picture = np.zeros((64, 128, 3), np.uint8)
    picture[:32, :64] = 255
    return picture


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(256, size=shape, dtype=np.uint8)


def read(path: Path) -> list[np.ndarray]:
    clip = open_clip(path, None)
    pictures = list(clip.read())
    assert len(pictures) == clip.frames
    assert clip.notes(len(pictures)) == []
    return pictures


def folder_of(path: Path, *names: str) -> Path:
    path.mkdir()
    for name in names:
        (path / name).touch()
    return path


# ---------------------------------------------------------------- which pictures, in which order


@pytest.mark.parametrize(
    "names",
    [
        ["0.png", "1.png", "2.png", "10.png", "100.png"],
        ["shot-1.png", "shot-2.png", "shot-10.png"],
        ["00:00:01.250.png", "00:00:01.500.png", "00:00:02.000.png", "00:00:10.000.png"],
        ["2024-01-30 at 9.05.10.png", "2024-01-30 at 10.05.09.png", "2024-02-01 at 10.05.09.png"],
        ["v1.2.3.png", "v1.2.10.png", "v1.10.1.png"],
        ["take1.0009.png", "take1.0010.png", "take2.0001.png"],
        ["a.jpg", "b.JPEG", "c.jpeg"],
        ["1.tif", "2.tiff"],
    ],
)
def test_pictures_come_in_the_order_of_their_numbers(tmp_path, names):
    folder = folder_of(tmp_path / "shots", *names, "notes.txt", ".hidden.webp")
    assert [file.name for file in find_files(folder)] == names


@pytest.mark.parametrize(
    ("names", "first", "second"),
    [
        (["0.25.png", "0.5.png", "1.png"], "0.5.png", "0.25.png"),
        (["t1.9.png", "t1.10.png"], "t1.9.png", "t1.10.png"),
        (["-2.png", "-1.png"], "-1.png", "-2.png"),
        (["x=-10.png", "x=5.png"], "x=5.png", "x=-10.png"),
    ],
)
def test_an_ambiguous_order_is_refused(tmp_path, names, first, second):
    folder = folder_of(tmp_path / "shots", *names)
    with pytest.raises(UserError) as error:
        find_files(folder)
    assert f"the order of the pictures in {folder} is ambiguous: " in str(error.value)
    assert first in str(error.value)
    assert second in str(error.value)
    assert str(error.value).endswith("rename them to 0001.png, 0002.png, ...")


@pytest.mark.parametrize(
    ("names", "complaint"),
    [
        (
            ["0.mp4", "0.webp"],
            "holds videos and pictures, such as 0.mp4 and 0.webp; name the videos one by one",
        ),
        (["b.GIF", "0.png"], "holds videos and pictures, such as b.GIF and 0.png"),
        (["0.png", "1.png", "1.jpg"], "holds 2 PNG and 1 JPEG pictures; keep a single kind in it"),
        (["0.mp4"], "holds no picture (.png, "),
    ],
)
def test_a_folder_holds_pictures_of_one_kind_and_nothing_else(tmp_path, names, complaint):
    folder = folder_of(tmp_path / "shots", *names)
    with pytest.raises(UserError) as error:
        find_files(folder)
    assert complaint in str(error.value)


# ---------------------------------------------------------------- pixels


@pytest.mark.parametrize("ending", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize(
    ("orientation", "shape", "white"),
    [
        (1, (64, 128), (16, 32)),
        (2, (64, 128), (16, 96)),
        (3, (64, 128), (48, 96)),
        (4, (64, 128), (48, 32)),
        (5, (128, 64), (32, 16)),
        (6, (128, 64), (32, 48)),
        (7, (128, 64), (96, 48)),
        (8, (128, 64), (96, 16)),
        (9, (64, 128), (16, 32)),
    ],
)
def test_exif_orientation_is_applied(tmp_path, ending, orientation, shape, white):
    exif = Image.Exif()
    exif[274] = orientation
    path = tmp_path / f"0.{ending}"
    Image.fromarray(corner()).save(path, exif=exif)
    (picture,) = read(path)
    assert picture.shape == (*shape, 3)
    ys, xs = np.nonzero(picture[..., 0] > 128)
    assert np.abs(np.array([ys.mean(), xs.mean()]) - white).max() < 2


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        *(("0.png", "RGBA"), ("0.png", "LA"), ("0.png", "P"), ("0.tif", "RGBA"), ("0.tif", "LA")),
        ("0.webp", "RGBA"),
    ],
)
def test_transparent_pixels_are_drawn_on_white(tmp_path, name, mode):
    rgba = noise(64, 64, 4)
    rgba[:, :20, 3], rgba[:, 20:40, 3] = 0, 255
    if mode == "P":  # each colour is visible or not
        image = Image.fromarray(noise(64, 64) // 64, "P")
        image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90, 100, 110, 120])
        image.info["transparency"] = 1
        rgba = np.asarray(image.convert("RGBA"))
    else:
        image = Image.fromarray(rgba, "RGBA").convert(mode)
        rgba = np.asarray(image.convert("RGBA"))
    options = {"lossless": True, "exact": True} if name == "0.webp" else {}
    image.save(tmp_path / name, **options)
    (picture,) = read(tmp_path / name)
    alpha = rgba[..., 3:] / 255
    assert np.abs(picture - (rgba[..., :3] * alpha + 255 * (1 - alpha))).max() <= 0.5 + 1e-9
    assert (rgba[..., 3] == 0).any()


@pytest.mark.parametrize("compression", ["raw", "tiff_lzw", "tiff_adobe_deflate", "packbits"])
@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "RGBA"])
def test_tiffs_of_common_writers_are_exact(tmp_path, compression, mode):
    image = Image.fromarray(noise(64, 64, 3)).convert(mode)
    image.save(tmp_path / "0.tif", compression=compression)
    (picture,) = read(tmp_path / "0.tif")
    np.testing.assert_array_equal(picture, np.asarray(image.convert("RGB")))


def test_16_bits_keep_the_upper_8(tmp_path):
    levels = np.arange(64 * 64, dtype=np.uint16).reshape(64, 64) * 16
    Image.fromarray(levels).save(tmp_path / "0.tif")
    (picture,) = read(tmp_path / "0.tif")
    np.testing.assert_array_equal(picture, np.repeat((levels // 256)[..., None], 3, 2))


@pytest.mark.parametrize("mode", ["CMYK", "F", "I", "LAB"])
def test_colours_without_an_exact_conversion_are_refused(tmp_path, mode):
    image = Image.new(mode, (64, 64))
    image.save(tmp_path / "0.tif")
    with pytest.raises(UserError, match=rf"0\.tif: its colours \({mode}\) have no exact conversion"):
        read(tmp_path / "0.tif")


@pytest.mark.parametrize("name", ["0.webp", "0.tif", "0.png"])
def test_a_file_of_several_pictures_is_a_clip_but_not_part_of_one(tmp_path, name):
    pictures = [np.roll(noise(64, 64, 3), i, 0) for i in range(6)]
    first, *others = map(Image.fromarray, pictures)
    folder = tmp_path / "shots"
    folder.mkdir()
    first.save(folder / name, save_all=True, append_images=others, lossless=True)
    found = read(folder / name)
    assert len(found) == 6
    for one, another in zip(found, pictures, strict=True):
        np.testing.assert_array_equal(one, another)
    with pytest.raises(UserError, match=rf"{name} holds several pictures; move it out of the folder"):
        list(open_clip(folder, None).read())


@pytest.mark.parametrize("name", ["0.webp", "0.tif", "0.png", "0.jpg", "0.bmp"])
def test_a_cut_off_picture_is_refused(tmp_path, name):
    path = tmp_path / name
    Image.fromarray(noise(64, 64, 3)).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UserError, match=rf"{name} cannot be decoded"):
        read(path)


def test_pictures_between_those_kept_are_not_converted(tmp_path):
    for number in range(7):
        Image.fromarray(np.full((8, 8, 3), number, np.uint8)).save(tmp_path / f"{number}.png")
    found = list(open_clip(tmp_path, None).read(3))
    assert [None if picture is None else picture[0, 0, 0] for picture in found] == [
        0,
        None,
        None,
        3,
        None,
        None,
        6,
    ]
