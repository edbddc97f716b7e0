"""video.py: videos as cameras, recorders, editors and downloads leave them, compared with known frames."""

import math
import struct
from pathlib import Path

import av
import numpy as np
import pytest
from av.stream import Disposition

from lapo.data.clips import open_clip
from lapo.data.video import transform
from lapo.errors import UserError

Frames = list[np.ndarray]


def textured(num_frames: int) -> Frames:
    """A pattern that moves, so that no frame equals another: (128, 160, 3) each."""
    tiles = np.random.default_rng(0).integers(256, size=(16, 20, 3), dtype=np.uint8)
    return [np.roll(tiles.repeat(8, 0).repeat(8, 1), i * 5, 1) for i in range(num_frames)]


def flat(level: int, size: int = 64) -> np.ndarray:
    return np.full((size, size, 3), level, np.uint8)


def corner() -> np.ndarray:
    """White in the upper left quarter: (64, 128, 3)."""
    frame = np.zeros((64, 128, 3), np.uint8)
    frame[:32, :64] = 255
    return frame


def add_film(out, frames: Frames, codec: str, pix_fmt: str = "yuv420p", **options: str):
    """A new stream and its packets, one after the other."""
    stream = out.add_stream(codec, rate=25, options=options)
    stream.height, stream.width, stream.pix_fmt = *frames[0].shape[:2], pix_fmt
    stream.codec_context.thread_count = 1  # some encoders' results depend on it
    packets = [packet for frame in frames for packet in stream.encode(av.VideoFrame.from_ndarray(frame))]
    return stream, packets + stream.encode()


def film(path: Path, frames: Frames, codec: str, pix_fmt: str = "yuv420p", **options: str) -> Path:
    with av.open(str(path), "w") as out:
        out.mux(add_film(out, frames, codec, pix_fmt, **options)[1])
    return path


def cut(source: Path, target: Path, first: int, without: int = -1) -> Path:
    """All packets from `first` on but one: what cutting without re-encoding leaves."""
    with av.open(str(source)) as opened, av.open(str(target), "w") as out:
        stream = out.add_stream_from_template(opened.streams.video[0])
        for number, packet in enumerate(opened.demux(video=0)):
            if packet.size and number >= first and number != without:
                packet.stream = stream
                out.mux(packet)
    return target


def shortened(source: Path, fraction: float, unit: int = 1) -> Path:
    """A file of the first `fraction` of a file's bytes, in whole units."""
    content = source.read_bytes()
    path = source.with_stem("short")
    path.write_bytes(content[: unit * int(len(content) // unit * fraction)])
    return path


def read(path: Path) -> tuple[Frames, list[str]]:
    """A film's frames, and what the user is told about it."""
    clip = open_clip(path, None)
    frames = list(clip.read())
    return frames, clip.notes(len(frames))


def assert_ends_alike(found: Frames, whole: Frames, count: int) -> None:
    assert len(found) == count
    for one, another in zip(found, whole[-count:], strict=True):
        np.testing.assert_array_equal(one, another)


# ---------------------------------------------------------------- cut and truncated videos


@pytest.mark.parametrize(
    ("name", "codec", "options", "first", "left"),
    [
        ("film.mkv", "libx264", {"x264-params": "open-gop=1:keyint=20:bframes=3"}, 19, 80),
        ("film.mkv", "libx264", {"x264-params": "open-gop=1:keyint=20:bframes=3"}, 33, 60),
        ("film.mp4", "libx264", {"x264-params": "open-gop=1:keyint=20:bframes=3"}, 33, 60),
        ("film.ts", "libx264", {"x264-params": "open-gop=1:keyint=20:bframes=3"}, 33, 60),
        ("film.mkv", "libx265", {"x265-params": "keyint=20:bframes=6:b-adapt=0:log-level=none"}, 22, 60),
        ("film.ts", "libx264", {"g": "20", "bf": "2"}, 33, 60),
        ("film.ts", "mpeg2video", {"g": "12", "bf": "2"}, 20, 76),
        ("film.avi", "mpeg4", {"g": "12"}, 15, 76),
        ("film.webm", "libvpx-vp9", {"g": "20"}, 33, 60),
    ],
)
def test_frames_that_depend_on_missing_ones_are_left_out_and_counted(
    tmp_path, name, codec, options, first, left
):
    whole = film(tmp_path / f"whole{Path(name).suffix}", textured(100), codec, **options)
    expected, nothing = read(whole)
    assert (len(expected), nothing) == (100, [])
    path = cut(whole, tmp_path / name, first)
    frames, notes = read(path)
    assert_ends_alike(frames, expected, left)
    assert open_clip(path, None).frames - left in (
        0,
        2,
    )  # AVI does not say which are shown before the keyframe
    shown = 100 - first - left
    if shown > 0:
        (note,) = notes
        assert f"{name} begins between keyframes: its first " in note
        assert " frames depend on missing ones and were left out" in note
        assert (
            abs(int(note.split("its first ")[1].split()[0]) - shown) <= 3
        )  # packets are not in the order shown


def test_damage_after_a_cut_is_still_damage(tmp_path):
    options = {"x264-params": "open-gop=1:keyint=20:bframes=3"}
    whole = film(tmp_path / "whole.mkv", textured(100), "libx264", **options)
    path = cut(whole, tmp_path / "film.mkv", 33)
    intact = path.read_bytes()
    for fraction in (0.4, 0.45, 0.55, 0.6):
        content = bytearray(intact)
        at = int(len(content) * fraction)
        content[at : at + 20] = bytes(20)
        path.write_bytes(content)
        with pytest.raises(
            UserError, match=r"film.mkv is damaged.* ffmpeg -i \S*film.mkv -c:v ffv1 film-reencoded"
        ):
            read(path)


@pytest.mark.parametrize("lost", [30, 32, 35, 36])
def test_a_missing_packet_is_not_taken_for_a_cut(tmp_path, lost):
    options = {"x264-params": "open-gop=1:keyint=20:bframes=3"}
    whole = film(tmp_path / "whole.mkv", textured(60), "libx264", **options)
    path = cut(whole, tmp_path / "film.mkv", 0, without=lost)
    with pytest.raises(UserError, match=r"film.mkv is damaged \((mmco|reference picture missing)"):
        read(path)


@pytest.mark.parametrize(
    ("name", "codec", "options", "header"),
    [
        ("film.mkv", "libx264", {}, "4.0 s"),
        ("film.mkv", "mpeg4", {}, "4.0 s"),
        ("film.mp4", "mpeg4", {"movflags": "faststart"}, "4.0 s"),
        ("film.flv", "flv", {}, "4.0 s"),
        ("film.avi", "mpeg4", {}, ""),
    ],
)
def test_a_film_that_ends_early_gives_what_is_there_and_says_so(tmp_path, name, codec, options, header):
    whole = tmp_path / name
    container = {key: options[key] for key in ("movflags",) if key in options}
    with av.open(str(whole), "w", options=container) as out:
        out.mux(add_film(out, textured(100), codec)[1])
    expected, notes = read(whole)
    assert (len(expected), notes) == (100, [])
    frames, (note,) = read(shortened(whole, 0.6))
    assert 20 < len(frames) < 80
    if codec != "libx264":  # none is shown later than it is decoded
        assert len(frames) == open_clip(whole.with_stem("short"), None).frames
    for one, another in zip(frames, expected, strict=False):
        np.testing.assert_array_equal(one, another)
    assert "ends early: it may be truncated; the part that is there was read (" in note
    assert f"its header says {header}" in note


@pytest.mark.parametrize("codec", ["libx264", "mpeg2video"])
def test_a_recording_that_ends_anywhere_is_taken_as_far_as_it_is_whole(tmp_path, codec):
    whole = film(tmp_path / "film.ts", textured(60), codec, g="12", bf="2")
    expected, notes = read(whole)
    assert (len(expected), notes) == (60, [])
    told = set()
    for fraction in np.arange(0.4, 0.9, 0.04):
        frames, notes = read(shortened(whole, fraction, 188))
        assert len(frames) > 60 * fraction - 12
        for one, another in zip(frames, expected, strict=False):
            np.testing.assert_array_equal(one, another)
        told |= {note.split(" ends early")[1] for note in notes}
    assert told == {
        ": its last frame is incomplete and was left out",
        ": its last frames follow missing ones and were left out",
    }


def test_lost_packets_amid_a_film_are_refused(tmp_path):
    whole = film(tmp_path / "film.ts", textured(60), "mpeg2video", g="12")
    content = whole.read_bytes()
    at = 188 * (len(content) // 376)
    whole.write_bytes(content[:at] + content[at + 752 :])
    with av.open(str(whole)) as container:
        assert any(packet.is_corrupt for packet in container.demux(video=0))
    with pytest.raises(UserError, match=r"film\.ts is damaged: data are missing at frame [0-9]+ \(1 packets"):
        open_clip(whole, None)


def test_an_edit_list_is_obeyed_and_counted(tmp_path):
    whole = film(tmp_path / "whole.mp4", textured(60), "libx264", g="250", bf="0")
    expected, _ = read(whole)
    path = tmp_path / "film.mp4"
    with (
        av.open(str(whole)) as opened,
        av.open(str(path), "w", options={"avoid_negative_ts": "disabled"}) as out,
    ):
        old = opened.streams.video[0]
        stream, shift = out.add_stream_from_template(old), int(1 / old.time_base)
        for packet in opened.demux(old):
            if packet.size:
                packet.pts, packet.dts, packet.stream = packet.pts - shift, packet.dts - shift, stream
                out.mux(packet)
    assert open_clip(path, None).frames == 35
    frames, notes = read(path)
    assert_ends_alike(frames, expected, 35)
    assert notes == []


# ---------------------------------------------------------------- which stream


def two_streams(path: Path, first: Frames, second: Frames, flags: tuple[int, int]) -> Path:
    with av.open(str(path), "w") as out:
        made = [add_film(out, frames, "mpeg4") for frames in (first, second)]
        for (stream, _), flag in zip(made, flags, strict=True):
            stream.disposition = Disposition(flag)
        for _, packets in made:
            out.mux(packets)
    return path


STILL, PREVIEW, FILM = [flat(200)], [flat(200, 32)] * 20, [flat(i * 5) for i in range(20)]


@pytest.mark.parametrize(
    ("first", "flags", "number"),
    [
        (STILL, (0, 0), 1),
        (STILL, (Disposition.default, 0), 1),
        (PREVIEW, (0, 0), 0),
        (PREVIEW, (0, Disposition.default), 1),
        (PREVIEW, (Disposition.default, 0), 0),
        (FILM, (0, 0), 0),
    ],
)
def test_the_stream_is_the_one_that_players_show(tmp_path, first, flags, number):
    # With no flag at all, the first one is marked as the default when the file is written.
    path = two_streams(tmp_path / "film.mov", first, FILM, flags)
    frames, notes = read(path)
    with av.open(str(path)) as container:
        expected = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=number)]
    assert_ends_alike(frames, expected, 20)
    assert f"has 2 video streams; number {number} (mpeg4, " in notes[0]


def test_a_cover_is_no_film(tmp_path):
    path = tmp_path / "film.mp4"
    with av.open(str(path), "w") as out:
        stream, packets = add_film(out, [flat(9)], "mjpeg", "yuvj420p")
        stream.disposition = Disposition.attached_pic
        out.mux(packets)
    with pytest.raises(UserError, match=r"film\.mp4 holds no video"):
        open_clip(path, None)


# ---------------------------------------------------------------- which way up


def with_matrix(path: Path, *matrix: float) -> Path:
    """A film of `corner()` with the display matrix (a, b, c, d)."""
    film(path, [corner()] * 6, "libx264")
    a, b, c, d = (round(value * 65536) for value in matrix)
    content = path.read_bytes()
    at = content.index(b"tkhd") + 44
    path.write_bytes(content[:at] + struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30) + content[at + 36 :])
    return path


def turned(degrees: float, scale: float = 1.0) -> tuple[float, float, float, float]:
    c, s = (scale * f(math.radians(degrees)) for f in (math.cos, math.sin))
    return c, s, -s, c


@pytest.mark.parametrize(
    ("matrix", "shape", "white"),
    [
        ((1, 0, 0, 1), (64, 128), (16, 32)),
        ((-1, 0, 0, 1), (64, 128), (16, 96)),
        ((-1, 0, 0, -1), (64, 128), (48, 96)),
        ((1, 0, 0, -1), (64, 128), (48, 32)),
        ((0, 1, 1, 0), (128, 64), (32, 16)),
        ((0, 1, -1, 0), (128, 64), (32, 48)),
        ((0, -1, -1, 0), (128, 64), (96, 48)),
        ((0, -1, 1, 0), (128, 64), (96, 16)),
        ((0, 0, 0, 0), (64, 128), (16, 32)),
        (turned(2), (64, 128), (16, 32)),
        (turned(-3), (64, 128), (16, 32)),
        (turned(88, 2), (128, 64), (32, 48)),
        (turned(180.5), (64, 128), (48, 96)),
    ],
)
def test_the_display_matrix_is_applied(tmp_path, matrix, shape, white):
    frames, _ = read(with_matrix(tmp_path / "film.mp4", *matrix))
    assert len(frames) == 6
    for frame in frames:
        assert frame.shape[:2] == shape
        ys, xs = np.nonzero(frame[..., 0] > 128)
        assert np.abs(np.array([ys.mean(), xs.mean()]) - white).max() < 2


@pytest.mark.parametrize(
    "matrix", [turned(30), turned(80), (1, 0.3, 0, 1), (1, 0, 0.3, 1), (1, 0, 0, 0), (0, 1, 0, 1)]
)
def test_odd_angles_and_shears_are_refused(tmp_path, matrix):
    path = with_matrix(tmp_path / "film.mp4", *matrix)
    with pytest.raises(
        UserError, match=r"film.mp4 is rotated by no multiple of 90°, or sheared .*; re-encode it"
    ):
        open_clip(path, None)


def test_a_matrix_moves_pixels_as_it_says():
    rgb = np.arange(6, dtype=np.uint8).reshape(2, 3, 1)
    for matrix in ((1, 0, 0, 1), (-1, 0, 0, 1), (0, 1, 1, 0), (0, 1, -1, 0), (0, -1, 1, 0), (0, -1, -1, 0)):
        a, b, c, d = matrix
        out = transform(rgb, matrix)
        for y, x in np.ndindex(2, 3):
            to_x, to_y = a * x + c * y, b * x + d * y
            # Coordinates count from the far edge where an axis is turned round.
            assert (
                out[to_y + (out.shape[0] - 1) * (b + d < 0), to_x + (out.shape[1] - 1) * (a + c < 0)]
                == (rgb[y, x])
            )


# ---------------------------------------------------------------- colours


def test_transparent_pixels_are_drawn_on_white(tmp_path):
    rgba = np.random.default_rng(0).integers(256, size=(64, 64, 4), dtype=np.uint8)
    rgba[:, :20, 3], rgba[:, 20:40, 3] = 0, 255
    path = tmp_path / "film.mov"
    with av.open(str(path), "w") as out:
        stream = out.add_stream("png", rate=25)
        stream.height, stream.width, stream.pix_fmt = 64, 64, "rgba"
        for _ in range(4):
            out.mux(stream.encode(av.VideoFrame.from_ndarray(rgba, format="rgba")))
    frames, _ = read(path)
    alpha = rgba[..., 3:] / 255
    assert len(frames) == 4
    assert np.abs(frames[0] - (rgba[..., :3] * alpha + 255 * (1 - alpha))).max() <= 0.5 + 1e-9
    assert (frames[0][:, :20] == 255).all()


def test_transparency_that_the_decoder_ignores_is_refused(tmp_path):
    path = tmp_path / "film.webm"
    with av.open(str(path), "w") as out:
        out.mux(add_film(out, [flat(50)] * 6, "libvpx-vp9", "yuva420p", **{"auto-alt-ref": "0"})[1])
    with pytest.raises(
        UserError, match=r"film.webm has transparency .*: ffmpeg -c:v libvpx-vp9 -i \S+ -c:v ffv1"
    ):
        open_clip(path, None)


def test_colours_that_cannot_be_converted_name_the_film_and_a_remedy_that_works(tmp_path):
    path = tmp_path / "film.mkv"
    planes = np.stack([np.full((64, 64), value, np.uint8) for value in (100, 113, 203)])
    with av.open(str(path), "w") as out:
        stream = out.add_stream("ffv1", rate=25)
        stream.height, stream.width, stream.pix_fmt = 64, 64, "yuv444p"
        stream.codec_context.colorspace = 8  # YCgCo
        frame = av.VideoFrame.from_ndarray(planes, format="yuv444p")
        frame.colorspace = 8
        out.mux(stream.encode(frame))
        out.mux(stream.encode())
    with pytest.raises(UserError) as error:
        open_clip(path, None)
    assert f"{path}: its colours cannot be converted to RGB (Operation not supported: " in str(error.value)
    assert "yuv444p, colour space 8)" in str(error.value)
    words = str(error.value).split(" re-encode it: ")[1].split()
    name, options = words[words.index("-vf") + 1].split("=", 1)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        graph = av.filter.Graph()
        graph.link_nodes(graph.add_buffer(template=stream), graph.add(name, options), graph.add("buffersink"))
        graph.configure()
        graph.push(next(container.decode(stream)))
        rgb = graph.pull().to_ndarray(format="rgb24")
    assert np.abs(rgb.astype(int) - (200, 80, 30)).max() <= 2
