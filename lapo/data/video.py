"""Films and pictures as FFmpeg decodes them: only what is exact, upright, with colours as they are seen.

The only module that imports PyAV. Dimensions: H, W frame of a source · C = 3 colours
"""

import shlex
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
from av.stream import Disposition

from lapo.errors import UserError

STILL = Disposition.attached_pic | Disposition.still_image | Disposition.timed_thumbnails
MISSING_REFERENCE = "mmco: unref short failure"
"""What H.264's decoder says where a frame is to be forgotten that lies before a cut: harmless in itself."""
DURATION_IN_HEADER = ("matroska,webm", "mov,mp4,m4a,3gp,3g2,mj2", "avi", "flv", "asf")
"""Containers that say beforehand how long they are; of others FFmpeg only estimates it."""
EVENLY_SPACED = ("mpegts", "mpeg")
"""Containers of broadcasts, which neither say how long they are nor vary their frame rate."""
TO_BT709 = "-vf colorspace=all=bt709:iprimaries=bt709:itrc=bt709:format=yuv444p "
"""FFmpeg's option that converts colours, from the space that a film names."""
TOLERANCE = 0.5
"""Seconds by which a film may be shorter than its header says: the last frame's duration is often unknown."""
TILT = 0.09
"""Tangent of the largest angle, 5°, that is taken for no turn at all."""


@dataclass
class Film:
    """Which packets of which stream of a video file are decoded."""

    file: Path
    stream: int
    codec: str
    packets: int
    skipped: set[int]
    """Packets, by their number in the stream, that are not given to the decoder."""
    frames: int
    """How many the film gives: exact but where a codec has packets that show nothing."""
    left_out: int
    """How many those skipped, and those shown before the first keyframe, would have given."""
    second_key: int
    """Number of the second keyframe's packet, or of packets if there is none."""
    cut: bool
    """Whether the film begins amid a group of pictures; then its decoder may leave out frames, too."""
    last_dts: int | None
    """When the last packet is to be decoded: a frame is never shown before it is decoded."""
    until: int | None
    """Frames from this time on are left out, as others are missing before them."""
    notes: list[str]
    """What the user should know, in words that follow the file's name."""

    def leave_out_last(self) -> None:
        """Skip the last packet: no other frame is predicted from it."""
        self.skipped.add(self.packets - 1)
        self.until = self.last_dts
        self.notes.append("ends early, amid a frame, which was left out")


@dataclass
class _Track:
    """What one pass over a video stream's packets tells."""

    packets: int = 0
    hidden: set[int] = field(default_factory=set)
    keyframes: int = 0
    first_key: int = 0
    first_key_pts: int | None = None
    second_key: int | None = None
    last_dts: int | None = None
    last_pts: deque[int] = field(default_factory=lambda: deque(maxlen=32))
    leading: list[int] = field(default_factory=list)
    corrupt: list[int] = field(default_factory=list)

    def add(self, packet: av.Packet) -> None:
        number = self.packets
        self.packets += 1
        self.last_dts = packet.dts
        if packet.pts is not None:
            self.last_pts.append(packet.pts)
        if packet.is_discard:  # outside of the edit list: decoded, but not shown
            self.hidden.add(number)
        if packet.is_corrupt:
            self.corrupt.append(number)
        if packet.is_keyframe:
            self.keyframes += 1
            if self.keyframes == 1:
                self.first_key, self.first_key_pts = number, packet.pts
            elif self.keyframes == 2:
                self.second_key = number
        elif self.keyframes == 1 and None not in (packet.pts, self.first_key_pts):
            self.leading += [number] * (packet.pts < self.first_key_pts)

    def gap_at_end(self) -> int | None:
        """When the first frame is shown that, frames being evenly spaced, follows one that never came."""
        times = sorted(self.last_pts)
        steps = [after - before for before, after in pairwise(times)]
        for time, step in zip(times[1:], steps, strict=True):
            # Nothing is missing before the last packet is decoded. Pulldown alternates 2 and 3 fields.
            if self.last_dts is not None and time > self.last_dts and step > 1.75 * min(steps):
                return time
        return None


def encode_anew(file: Path, options: str = "", decoder: str = "") -> str:
    """The command line that makes a lossless film, upright and patched up, of whatever FFmpeg makes of it."""
    result = shlex.quote(file.stem + "-anew.mkv")
    return f"ffmpeg {decoder}-i {shlex.quote(str(file))} {options}-c:v ffv1 {result}"


@contextmanager
def _decoding(file: Path) -> Iterator[None]:
    """What FFmpeg refuses raises UserError."""
    try:
        yield
    except (av.FFmpegError, OSError) as error:
        raise UserError(
            f"{file} cannot be decoded ({error.strerror}); leave it out, or have FFmpeg patch up what is"
            f" damaged: {encode_anew(file)}"
        ) from None


@contextmanager
def _opened(file: Path) -> Iterator[av.container.InputContainer]:
    """An open video file. Raises UserError for what FFmpeg refuses, now or while it is being read."""
    with _decoding(file), av.open(str(file.absolute())) as container:
        yield container


def _decoder(container: av.container.InputContainer, index: int) -> av.VideoStream:
    """A stream, ready to be decoded on all cores, in which damage is an error."""
    stream = container.streams[index]
    stream.thread_type = "AUTO"
    # By default, what is missing of a damaged picture is made up from its surroundings.
    stream.codec_context.options = {"err_detect": "explode"}
    return stream


def scan(file: Path) -> Film:
    """Read all packets of a video file, without decoding them.

    Raises UserError if it holds no video, or if packets amid it were lost.
    """
    with _opened(file) as container:
        videos = container.streams.video
        tracks = {stream.index: _Track() for stream in videos}
        end = 0.0
        for packet in container.demux():
            if not packet.size and packet.dts is None:  # the one that ends a stream
                continue
            if packet.stream_index in tracks:
                tracks[packet.stream_index].add(packet)
            time = packet.pts if packet.pts is not None else packet.dts
            if time is not None:
                end = max(end, float((time + (packet.duration or 0)) * packet.time_base))
        stream = _choose(videos, tracks)
        if stream is None:
            raise UserError(f"{file} holds no video, or is cut off")
        index, codec = stream.index, stream.codec_context.name
        if "alpha_mode" in stream.metadata:
            other = f"-c:v {'libvpx' if codec == 'vp8' else 'libvpx-vp9'} "
            raise UserError(
                f"{file} is transparent in a way that its usual decoder does not see; encode it anew:"
                f" {encode_anew(file, decoder=other)}"
            )
        declared = (container.duration or 0) / av.time_base
        evenly_spaced = container.format.name in EVENLY_SPACED
        if container.format.name not in DURATION_IN_HEADER:
            declared = 0.0
        end -= min(0, container.start_time or 0) / av.time_base
        notes = []
        if sum(track.packets > 0 for track in tracks.values()) > 1:
            size = f"{stream.width} × {stream.height}"
            notes.append(f"has {len(videos)} video streams; number {index} ({codec}, {size}) was taken")

    track = tracks[index]
    skipped = set(range(track.first_key))
    last = track.packets - 1
    corrupt = [number for number in track.corrupt if number not in skipped and number != last]
    if corrupt:
        raise UserError(
            f"{file} is damaged: data are missing at frame {corrupt[0]} ({len(corrupt)} packets are corrupt),"
            " and frames that follow are spoilt; leave it out, cut out what is whole, or have FFmpeg patch"
            f" it up: {encode_anew(file)}"
        )
    until = track.gap_at_end() if evenly_spaced else None
    if until is not None:
        notes.append("ends early: frames are missing before its very last ones, which were left out")
    if last in track.corrupt or declared > end + TOLERANCE:
        told = f" ({end:.1f} s; its header says {declared:.1f} s)" if declared else ""
        notes.append(f"ends early: it may be cut short, and only what is there was taken{told}")
        until = track.last_dts
        if last in track.corrupt:
            skipped.add(last)  # nothing is predicted from it
        elif until is not None:
            until += 1
    cut = bool(track.first_key or track.leading)
    # Those shown before the very first keyframe are left out by the decoder, unless it has all they need.
    left_out = len(skipped.union(track.leading) - track.hidden)
    frames = track.packets - len(track.hidden) - left_out
    second_key = track.packets if track.second_key is None else track.second_key
    return Film(
        file=file,
        stream=index,
        codec=codec,
        packets=track.packets,
        skipped=skipped,
        frames=frames,
        left_out=left_out,
        second_key=second_key,
        cut=cut,
        last_dts=track.last_dts,
        until=until,
        notes=notes,
    )


def _choose(videos: Sequence[av.VideoStream], tracks: dict[int, _Track]) -> av.VideoStream | None:
    """The stream that players show: no still picture; the default one; of several, the largest."""
    filled = [stream for stream in videos if tracks[stream.index].packets and not stream.disposition & STILL]
    moving = [stream for stream in filled if tracks[stream.index].packets > 1]
    return max(
        moving or filled,
        key=lambda s: (bool(s.disposition & Disposition.default), s.width * s.height),
        default=None,
    )


def read_film(film: Film, every: int = 1) -> Iterator[np.ndarray | None]:
    """Frames (H, W, 3) uint8 in the order shown, upright; None for all but one in `every`.

    Notes in `film` if its last packet turns out to be half. Raises UserError where a frame cannot be decoded
    exactly.
    """
    decode, done = _decode, 0
    with _decoding(film.file):
        while True:
            try:
                for number, frame in enumerate(decode(film)):
                    if None not in (film.until, frame.pts) and frame.pts >= film.until:
                        return
                    if number == done:
                        yield _shown(frame, film.file) if number % every == 0 else None
                        done += 1
                return
            except av.InvalidDataError:
                if decode is _decode_slowly:
                    raise
                decode = _decode_slowly
            except _HalfPacketError:
                film.leave_out_last()


class _HalfPacketError(Exception):
    """A film's last packet does not decode."""


def _decode(film: Film) -> Iterator[av.VideoFrame]:
    """All frames; whatever its decoder finds wrong raises FFmpegError."""
    with av.open(str(film.file.absolute())) as container:
        for number, packet in enumerate(container.demux(_decoder(container, film.stream))):
            if number not in film.skipped:
                yield from packet.decode()


def _decode_slowly(film: Film) -> Iterator[av.VideoFrame]:
    """All frames of a film in which the decoder found something wrong that may be harmless.

    On one thread, so that it is known what is wrong with which packet. Besides, H.264's decoder, asked to
    make errors of all damage, makes one of what is missing before a cut, even if no frame needs it; so it is
    not asked, and what it says is read instead. Raises _HalfPacketError; UserError or FFmpegError for damage.
    """
    with av.open(str(film.file.absolute())) as container:
        stream = _decoder(container, film.stream)
        stream.thread_type = "NONE"
        if film.codec == "h264":
            stream.codec_context.options = {}
        for number, packet in enumerate(container.demux(stream)):
            if number in film.skipped:
                continue
            try:
                frames, complaints = _decode_and_listen(packet)
                if number < film.second_key:
                    complaints = [text for text in complaints if text != MISSING_REFERENCE]
                if complaints and film.codec == "h264":
                    raise UserError(
                        f"{film.file} is damaged ({complaints[0]}, at frame {number}); leave it out, or have"
                        f" FFmpeg patch it up: {encode_anew(film.file)}"
                    )
            except (UserError, av.InvalidDataError):
                if number == film.packets - 1:
                    raise _HalfPacketError from None
                raise
            yield from frames


def _decode_and_listen(packet: av.Packet) -> tuple[list[av.VideoFrame], list[str]]:
    """The frames that a packet gives, and the errors that the decoder reports meanwhile."""
    level, repeated = av.logging.get_level(), av.logging.get_skip_repeated()
    av.logging.set_level(av.logging.ERROR)
    av.logging.set_skip_repeated(False)
    try:
        with av.logging.Capture() as said:
            frames = packet.decode()
    finally:
        av.logging.set_level(level)
        av.logging.set_skip_repeated(repeated)
    return frames, [text.strip() for rank, _, text in said if rank <= av.logging.ERROR]


def _shown(frame: av.VideoFrame, file: Path) -> np.ndarray:
    """A frame of `file` as players show it: (H, W, 3) uint8. Raises UserError if that cannot be had."""
    if frame.is_corrupt:
        raise UserError(
            f"{file} is damaged: the frame at {frame.time or 0:.2f} s does not decode exactly; leave it out,"
            f" or have FFmpeg patch it up: {encode_anew(file)}"
        )
    return _turned(to_rgb(frame, file), frame, file)


def read_stills(file: Path) -> Iterator[np.ndarray]:
    """Pictures (H, W, 3) uint8 of a picture file, as stored: EXIF may say that they are to be turned."""
    with _opened(file) as container:
        if not container.streams.video:
            raise UserError(f"{file} holds no picture, or is cut off")
        for frame in container.decode(_decoder(container, container.streams.video[0].index)):
            yield to_rgb(frame, file)


def to_rgb(frame: av.VideoFrame, file: Path) -> np.ndarray:
    """Colours of a frame of `file`, what is transparent laid over white: (H, W, 3) uint8.

    Raises UserError if they cannot be converted.
    """
    try:
        rgb = frame.to_ndarray(format="rgb24")
        if not (frame.format.has_palette or any(part.is_alpha for part in frame.format.components)):
            return rgb
        return over_white(rgb, frame.to_ndarray(format="rgba")[..., 3:])
    except (av.FFmpegError, OSError, ValueError) as error:
        raise UserError(
            f"{file}: its colours cannot be converted to RGB ({error.strerror or error}: {frame.format.name},"
            f" colour space {int(frame.colorspace)}); encode it anew: {encode_anew(file, TO_BT709)}"
        ) from None


def over_white(rgb: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Colours (H, W, 3) uint8 of which `alpha` (H, W, 1) / 255 covers a white ground: what viewers show."""
    if alpha.min() == 255:
        return rgb
    alpha = alpha.astype(np.uint16)
    return ((rgb * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)


def _turned(rgb: np.ndarray, frame: av.VideoFrame, file: Path) -> np.ndarray:
    """A frame as its display matrix wants it shown. Raises UserError if it takes more than quarter turns."""
    try:
        side_data = frame.side_data.get("DISPLAYMATRIX")
    except ValueError:  # PyAV does not know all kinds of side data
        raise UserError(
            f"{file}: how it is turned cannot be read; encode it anew: {encode_anew(file)}"
        ) from None
    if side_data is None:
        return rgb
    matrix = np.frombuffer(side_data, np.int32)[[0, 1, 3, 4]].astype(float).tolist()
    upright = turn(rgb, matrix)
    if upright is None:
        raise UserError(
            f"{file} is to be shown turned by an odd angle or slanted (its display matrix begins"
            f" {', '.join(f'{value / 65536:.3f}' for value in matrix)}); encode it anew: {encode_anew(file)}"
        )
    return upright


def turn(rgb: np.ndarray, matrix: Sequence[float]) -> np.ndarray | None:
    """Mirror and turn (H, W, C) so that x' = a x + c y and y' = b x + d y for the matrix (a, b, c, d).

    The scale does not matter. Gives None unless each axis ends within 5° of one of the two.
    """
    a, b, c, d = matrix
    if not any(matrix):  # players ignore it
        return rgb
    if abs(b) <= TILT * abs(a) and abs(c) <= TILT * abs(d):
        down, right = d, a
    elif abs(a) <= TILT * abs(b) and abs(d) <= TILT * abs(c):
        rgb, down, right = rgb.transpose(1, 0, 2), b, c
    else:
        return None
    if 0 in (down, right):
        return None
    return rgb[:: 1 if down > 0 else -1, :: 1 if right > 0 else -1]


def versions() -> dict[str, str]:
    """Versions of what decodes."""
    return {"av": av.__version__, "libavcodec": ".".join(map(str, av.library_versions["libavcodec"]))}
