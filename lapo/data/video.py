"""Videos and pictures decoded with FFmpeg: only frames that decode exactly, upright, in RGB, on white.

This is the only module that imports PyAV. Terms: packets hold encoded frames; a packet's pts says when its
frame is shown, its dts when it is decoded. GOP: a keyframe and the frames that depend on it.

Dimensions
    H, W frame of a source · C = 3 colours
"""

import shlex
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
from av.stream import Disposition

from lapo.errors import UserError

STILL = Disposition.attached_pic | Disposition.still_image | Disposition.timed_thumbnails
MISSING_REFERENCE = "mmco: unref short failure"
"""Logged by H.264's decoder when it is told to drop a reference frame that lies before a cut: harmless."""
DURATION_IN_HEADER = ("matroska,webm", "mov,mp4,m4a,3gp,3g2,mj2", "avi", "flv", "asf")
"""Containers whose header has the duration; for others FFmpeg estimates it."""
EVENLY_SPACED = ("mpegts", "mpeg")
"""Containers of broadcasts: without a duration, with a constant frame rate."""
TO_BT709 = "-vf colorspace=all=bt709:iprimaries=bt709:itrc=bt709:format=yuv444p "
"""FFmpeg's option that converts colours from the colour space that a video declares."""
TOLERANCE = 0.5
"""Seconds by which a video may be shorter than its header says: the last duration is often unknown."""
MAX_TILT = 0.09
"""Tangent of 5°, the largest rotation that is ignored."""


@dataclass
class Video:
    """A video file, the stream that is read, and which of its packets and frames are skipped."""

    file: Path
    stream: int
    codec: str
    packets: int
    skipped: set[int]
    """Packets, by their number in the stream, that are not decoded."""
    frames: int
    """Frames that the video gives: exact unless its codec has packets that show nothing."""
    left_out: int
    """Frames that the skipped packets, and those shown before the first keyframe, would have given."""
    second_key: int
    """Number of the second keyframe's packet; `packets` if there is none."""
    mid_gop: bool
    """Whether the video begins in the middle of a GOP. Its decoder may then drop frames, too."""
    last_dts: int | None
    """Decoding time of the last packet. No frame is shown before it is decoded."""
    end_pts: int | None
    """Frames from this time on are left out, because frames before them are missing."""
    rate: Fraction | None
    """Frames per second, on average; None if unknown."""
    notes: list[str]
    """What the user should know; each note continues a sentence that begins with the file's name."""

    def leave_out_last(self) -> None:
        """Skip the last packet. No other frame is predicted from it."""
        self.skipped.add(self.packets - 1)
        self.end_pts = self.last_dts
        self.notes.append("ends early: its last frame is incomplete and was left out")


@dataclass
class _Packets:
    """What one pass over the packets of a video stream finds; packets are numbered in decoding order."""

    count: int = 0
    hidden: set[int] = field(default_factory=set)
    keyframes: int = 0
    first_key: int = 0
    first_key_pts: int | None = None
    second_key: int | None = None
    last_dts: int | None = None
    last_pts: deque[int] = field(default_factory=lambda: deque(maxlen=32))
    leading: list[int] = field(default_factory=list)
    """Packets that follow the first keyframe but are shown before it."""
    corrupt: list[int] = field(default_factory=list)

    def add(self, packet: av.Packet) -> None:
        number = self.count
        self.count += 1
        self.last_dts = packet.dts
        if packet.pts is not None:
            self.last_pts.append(packet.pts)
        if packet.is_discard:  # outside the edit list: decoded, but not shown
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
        """Time of the first frame near the end that follows a missing one. Assumes evenly spaced frames."""
        times = sorted(self.last_pts)
        steps = [after - before for before, after in pairwise(times)]
        for time, step in zip(times[1:], steps, strict=True):
            # Frames shown before the last packet is decoded are complete. Pulldown alternates 2 and 3 fields.
            if self.last_dts is not None and time > self.last_dts and step > 1.75 * min(steps):
                return time
        return None


def reencode_command(file: Path, options: str = "", decoder: str = "") -> str:
    """The FFmpeg command that makes a lossless, upright video of what FFmpeg can decode of `file`."""
    result = shlex.quote(file.stem + "-reencoded.mkv")
    return f"ffmpeg {decoder}-i {shlex.quote(str(file))} {options}-c:v ffv1 {result}"


@contextmanager
def _decoding(file: Path) -> Iterator[None]:
    """Turn FFmpeg's errors into `UserError`."""
    try:
        yield
    except (av.FFmpegError, OSError) as error:
        raise UserError(
            f"{file} cannot be decoded ({error.strerror}); leave it out, or let FFmpeg repair it:"
            f" {reencode_command(file)}"
        ) from None


@contextmanager
def _opened(file: Path) -> Iterator[av.container.InputContainer]:
    """An open video file. Errors of FFmpeg, now or in the context, raise `UserError`."""
    with _decoding(file), av.open(str(file.absolute())) as container:
        yield container


def _decoder(container: av.container.InputContainer, index: int) -> av.VideoStream:
    """A stream that is decoded on all cores and in which damage is an error."""
    stream = container.streams[index]
    stream.thread_type = "AUTO"
    # By default, the decoder fills damaged regions from their surroundings.
    stream.codec_context.options = {"err_detect": "explode"}
    return stream


def scan(file: Path) -> Video:
    """Read all packets of a video file without decoding them.

    Raises `UserError` if it holds no video, or if packets are missing before its end.
    """
    with _opened(file) as container:
        videos = container.streams.video
        tracks = {stream.index: _Packets() for stream in videos}
        end = 0.0
        for packet in container.demux():
            if not packet.size and packet.dts is None:  # marks the end of a stream
                continue
            if packet.stream_index in tracks:
                tracks[packet.stream_index].add(packet)
            time = packet.pts if packet.pts is not None else packet.dts
            if time is not None:
                end = max(end, float((time + (packet.duration or 0)) * packet.time_base))
        stream = _choose(videos, tracks)
        if stream is None:
            raise UserError(f"{file} holds no video, or is truncated; leave it out, or copy it again")
        index, codec = stream.index, stream.codec_context.name
        if "alpha_mode" in stream.metadata:
            other = f"-c:v {'libvpx' if codec == 'vp8' else 'libvpx-vp9'} "
            raise UserError(
                f"{file} has transparency that its default decoder ignores; re-encode it:"
                f" {reencode_command(file, decoder=other)}"
            )
        declared = (container.duration or 0) / av.time_base
        evenly_spaced, rate = container.format.name in EVENLY_SPACED, stream.average_rate
        if container.format.name not in DURATION_IN_HEADER:
            declared = 0.0
        end -= min(0, container.start_time or 0) / av.time_base
        notes = []
        if sum(track.count > 0 for track in tracks.values()) > 1:
            size = f"{stream.width} × {stream.height}"
            notes.append(f"has {len(videos)} video streams; number {index} ({codec}, {size}) was read")

    track = tracks[index]
    skipped = set(range(track.first_key))
    last = track.count - 1
    corrupt = [number for number in track.corrupt if number not in skipped and number != last]
    if corrupt:
        raise UserError(
            f"{file} is damaged: data are missing at frame {corrupt[0]} ({len(corrupt)} packets are corrupt),"
            " and later frames depend on them; leave it out, cut out the intact part, or let FFmpeg repair"
            f" it: {reencode_command(file)}"
        )
    end_pts = track.gap_at_end() if evenly_spaced else None
    if end_pts is not None:
        notes.append("ends early: its last frames follow missing ones and were left out")
    if last in track.corrupt or declared > end + TOLERANCE:
        durations = f" ({end:.1f} s; its header says {declared:.1f} s)" if declared else ""
        notes.append(f"ends early: it may be truncated; the part that is there was read{durations}")
        end_pts = track.last_dts
        if last in track.corrupt:
            skipped.add(last)  # no frame is predicted from it
        elif end_pts is not None:
            end_pts += 1
    mid_gop = bool(track.first_key or track.leading)
    # The decoder drops frames shown before the first keyframe, unless it has all of their references.
    left_out = len(skipped.union(track.leading) - track.hidden)
    frames = track.count - len(track.hidden) - left_out
    second_key = track.count if track.second_key is None else track.second_key
    return Video(
        file=file,
        stream=index,
        codec=codec,
        packets=track.count,
        skipped=skipped,
        frames=frames,
        left_out=left_out,
        second_key=second_key,
        mid_gop=mid_gop,
        last_dts=track.last_dts,
        end_pts=end_pts,
        rate=rate,
        notes=notes,
    )


def _choose(videos: Sequence[av.VideoStream], tracks: dict[int, _Packets]) -> av.VideoStream | None:
    """The stream that players show: not a still picture, then the default one, then the largest."""
    filled = [stream for stream in videos if tracks[stream.index].count and not stream.disposition & STILL]
    moving = [stream for stream in filled if tracks[stream.index].count > 1]
    return max(
        moving or filled,
        key=lambda s: (bool(s.disposition & Disposition.default), s.width * s.height),
        default=None,
    )


def read_video(video: Video, every: int = 1) -> Iterator[np.ndarray | None]:
    """Upright frames (H, W, 3) uint8 in display order. All but every `every`-th are None, which costs less.

    Adds a note to `video` if its last packet is incomplete. Raises `UserError` where a frame does not decode
    exactly.
    """
    decode, done = _decode, 0
    with _decoding(video.file):
        while True:
            try:
                for number, frame in enumerate(decode(video)):
                    if None not in (video.end_pts, frame.pts) and frame.pts >= video.end_pts:
                        return
                    if number == done:
                        yield _upright_rgb(frame, video.file) if number % every == 0 else None
                        done += 1
                return
            except av.InvalidDataError:
                if decode is _decode_packet_by_packet:
                    raise
                decode = _decode_packet_by_packet
            except _IncompletePacketError:
                video.leave_out_last()


class _IncompletePacketError(Exception):
    """The last packet of a video does not decode."""


def _decode(video: Video) -> Iterator[av.VideoFrame]:
    """All frames. Any damage that the decoder detects raises FFmpegError."""
    with av.open(str(video.file.absolute())) as container:
        for number, packet in enumerate(container.demux(_decoder(container, video.stream))):
            if number not in video.skipped:
                yield from packet.decode()


def _decode_packet_by_packet(video: Video) -> Iterator[av.VideoFrame]:
    """All frames of a video in which the decoder detected damage that may be harmless.

    Decodes on one thread, so that an error belongs to a known packet. H.264's decoder, if told to raise
    errors for damage, also raises one for frames missing before a cut, even if no frame refers to them. So it
    is told only to log them, and its log is read. Raises _IncompletePacketError for the last packet,
    UserError or FFmpegError for other damage.
    """
    with av.open(str(video.file.absolute())) as container:
        stream = _decoder(container, video.stream)
        stream.thread_type = "NONE"
        if video.codec == "h264":
            stream.codec_context.options = {}
        for number, packet in enumerate(container.demux(stream)):
            if number in video.skipped:
                continue
            try:
                frames, errors = _decode_with_log(packet)
                if number < video.second_key:
                    errors = [text for text in errors if text != MISSING_REFERENCE]
                if errors and video.codec == "h264":
                    raise UserError(
                        f"{video.file} is damaged ({errors[0]}, at frame {number}); leave it out, or let"
                        f" FFmpeg repair it: {reencode_command(video.file)}"
                    )
            except (UserError, av.InvalidDataError):
                if number == video.packets - 1:
                    raise _IncompletePacketError from None
                raise
            yield from frames


def _decode_with_log(packet: av.Packet) -> tuple[list[av.VideoFrame], list[str]]:
    """The frames that a packet gives, and the errors that the decoder logs meanwhile."""
    level, repeated = av.logging.get_level(), av.logging.get_skip_repeated()
    av.logging.set_level(av.logging.ERROR)
    av.logging.set_skip_repeated(False)
    try:
        with av.logging.Capture() as log:
            frames = packet.decode()
    finally:
        av.logging.set_level(level)
        av.logging.set_skip_repeated(repeated)
    return frames, [text.strip() for rank, _, text in log if rank <= av.logging.ERROR]


def _upright_rgb(frame: av.VideoFrame, file: Path) -> np.ndarray:
    """A frame of `file` as players show it: (H, W, 3) uint8. Raises `UserError` if it is damaged."""
    if frame.is_corrupt:
        raise UserError(
            f"{file} is damaged: the frame at {frame.time or 0:.2f} s does not decode exactly; leave it out,"
            f" or let FFmpeg repair it: {reencode_command(file)}"
        )
    return _apply_display_matrix(to_rgb(frame, file), frame, file)


def read_stills(file: Path) -> Iterator[np.ndarray]:
    """Pictures (H, W, 3) uint8 of a picture file as stored, without the rotation that EXIF may ask for."""
    with _opened(file) as container:
        if not container.streams.video:
            raise UserError(f"{file} holds no picture, or is truncated; leave it out, or copy it again")
        for frame in container.decode(_decoder(container, container.streams.video[0].index)):
            yield to_rgb(frame, file)


def to_rgb(frame: av.VideoFrame, file: Path) -> np.ndarray:
    """RGB of a frame of `file`, transparent pixels on white: (H, W, 3) uint8.

    Raises `UserError` if its colours cannot be converted.
    """
    try:
        rgb = frame.to_ndarray(format="rgb24")
        if not (frame.format.has_palette or any(plane.is_alpha for plane in frame.format.components)):
            return rgb
        return on_white(rgb, frame.to_ndarray(format="rgba")[..., 3:])
    except (av.FFmpegError, OSError, ValueError) as error:
        raise UserError(
            f"{file}: its colours cannot be converted to RGB ({error.strerror or error}: {frame.format.name},"
            f" colour space {int(frame.colorspace)}); re-encode it: {reencode_command(file, TO_BT709)}"
        ) from None


def on_white(rgb: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Composite `rgb` (H, W, 3) uint8 on white with opacity `alpha` (H, W, 1) uint8: (H, W, 3) uint8."""
    if alpha.min() == 255:
        return rgb
    alpha = alpha.astype(np.uint16)
    return ((rgb * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)


def _apply_display_matrix(rgb: np.ndarray, frame: av.VideoFrame, file: Path) -> np.ndarray:
    """Rotate and mirror `rgb` (H, W, 3) as the frame's display matrix says.

    Raises `UserError` unless the rotation is a multiple of 90°.
    """
    try:
        side_data = frame.side_data.get("DISPLAYMATRIX")
    except ValueError:  # PyAV does not know all kinds of side data
        raise UserError(
            f"{file}: its rotation cannot be read; re-encode it: {reencode_command(file)}"
        ) from None
    if side_data is None:
        return rgb
    matrix = np.frombuffer(side_data, np.int32)[[0, 1, 3, 4]].astype(float).tolist()
    upright = transform(rgb, matrix)
    if upright is None:
        raise UserError(
            f"{file} is rotated by no multiple of 90°, or sheared (its display matrix begins"
            f" {', '.join(f'{value / 65536:.3f}' for value in matrix)}); re-encode it:"
            f" {reencode_command(file)}"
        )
    return upright


def transform(rgb: np.ndarray, matrix: Sequence[float]) -> np.ndarray | None:
    """Rotate and mirror (H, W, C) so that x' = a x + c y and y' = b x + d y for the matrix (a, b, c, d).

    Scale is ignored. Returns None unless each axis is mapped to within 5° of an axis.
    """
    a, b, c, d = matrix
    if not any(matrix):  # invalid: players ignore it
        return rgb
    if abs(b) <= MAX_TILT * abs(a) and abs(c) <= MAX_TILT * abs(d):
        down, right = d, a
    elif abs(a) <= MAX_TILT * abs(b) and abs(d) <= MAX_TILT * abs(c):
        rgb, down, right = rgb.transpose(1, 0, 2), b, c
    else:
        return None
    if 0 in (down, right):
        return None
    return rgb[:: 1 if down > 0 else -1, :: 1 if right > 0 else -1]


def decoder_versions() -> dict[str, str]:
    """Versions of the decoding libraries."""
    return {"av": av.__version__, "libavcodec": ".".join(map(str, av.library_versions["libavcodec"]))}
