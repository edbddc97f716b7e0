"""True actions beside one's own videos: a CSV file with the columns clip, frame or second, and action.

    clip,frame,action
    walk.mp4,0,LEFT
    walk.mp4,7,jump

Frames count from 0. An action was taken at its frame, so that its effect is seen in the next one. Frames
without a row have no known action (`UNKNOWN`).
"""

import csv
import io
import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from lapo.data.chunks import MAX_ACTIONS, UNKNOWN
from lapo.data.clips import Clip
from lapo.errors import UserError
from lapo.runs.files import reading


@dataclass
class Labels:
    """The actions of a file; `names[k]` is the name of action k."""

    names: list[str]
    clips: dict[str, dict[int, int]] = field(repr=False)
    """Name of a clip → frame → action."""

    def of(self, clip: str, every: int, frames: int) -> np.ndarray:
        """Actions of every `every`-th of `frames` frames: (ceil(frames / every),) int16, `UNKNOWN` in gaps.

        A label of a frame that is left out counts for the last frame kept before it, unless that has one.
        """
        actions = np.full(math.ceil(frames / every), UNKNOWN, np.int16)
        # Descending: of several frames that count for one, the first is written last.
        for frame, action in sorted(self.clips.get(clip, {}).items(), reverse=True):
            actions[frame // every] = action
        return actions


def read_labels(path: Path, clips: list[Clip]) -> Labels:
    """The labels that the CSV file `path` gives for frames of `clips`.

    Raises `UserError` for a file that cannot be read, or lacks a column or labels; for a row without an
    action, or with a clip, frame or second that does not exist; and for two actions of one frame.
    """
    with reading(path):
        try:
            text = io.StringIO(path.read_text(encoding="utf-8-sig"), newline="")
            columns, *rows = [
                [value.strip() for value in row] for row in csv.reader(text, skipinitialspace=True)
            ] or [[]]
        except (UnicodeDecodeError, csv.Error) as error:
            raise UserError(f"{path} is not a CSV file in UTF-8 ({error}); save it as one") from None
    units = [unit for unit in FRAME_OF if unit in columns]
    if len(units) != 1 or not {"clip", "action"} <= set(columns) or not any(rows):
        raise UserError(
            f"{path} needs the columns clip, frame or second, and action, and at least one row below them;"
            f" found: {', '.join(columns) or 'nothing'}"
        )
    by_name, frame_of = _by_name(clips), FRAME_OF[units[0]]
    labels: dict[str, dict[int, str]] = {name: {} for name in by_name}
    for number, values in enumerate(rows, 2):
        if not any(values):
            continue
        where = f"{path}, row {number}"
        if len(values) != len(columns):
            raise UserError(
                f"{where} has {len(values)} values for {len(columns)} columns; names with commas need quotes"
            )
        row = dict(zip(columns, values, strict=True))
        name, action = row["clip"], row["action"]
        if name not in by_name:
            raise UserError(f"{where}: there is no clip {name!r}; the clips are {', '.join(by_name)}")
        if not action:
            raise UserError(f"{where}: the action has no name; leave rows of unknown actions out")
        frame = frame_of(row[units[0]], by_name[name], where)
        known = labels[name].setdefault(frame, action)
        if known != action:
            raise UserError(
                f"{where}: frame {frame} of {name} has two actions, {known} and {action}; keep one"
            )
    names = sorted({action for frames in labels.values() for action in frames.values()})
    if len(names) > MAX_ACTIONS:
        raise UserError(f"{path} names {len(names)} actions; at most {MAX_ACTIONS} are possible")
    numbered = {
        clip: {frame: names.index(action) for frame, action in frames.items()}
        for clip, frames in labels.items()
    }
    return Labels(names, numbered)


def _by_name(clips: list[Clip]) -> dict[str, Clip]:
    """The clips by their file names, which must differ. They must begin with their first frame."""
    by_name: dict[str, Clip] = {}
    for clip in clips:
        name = clip.path.resolve().name
        if name in by_name:
            raise UserError(f"two clips are named {name}, so --actions cannot tell them apart; rename one")
        if clip.video and (clip.video.left_out or clip.video.mid_gop):
            raise UserError(
                f"{clip.path} begins with frames that cannot be decoded, so that those of --actions cannot"
                " be counted; re-encode it first"
            )
        by_name[name] = clip
    return by_name


def _frame(text: str, clip: Clip, where: str) -> int:
    """A frame's number, from 0. Raises `UserError` if `clip` does not have it."""
    if not text.isascii() or not text.isdigit():
        raise UserError(f"{where}: the frame is {text!r}; it must be a whole number from 0")
    frame = int(text)
    if frame >= clip.frames:
        raise UserError(
            f"{where}: there is no frame {frame}; {clip.path.name} has frames 0 to {clip.frames - 1}"
        )
    return frame


def _frame_at(text: str, clip: Clip, where: str) -> int:
    """The number of the frame shown at a second. Raises `UserError` if `clip` has none then."""
    rate = clip.video and clip.video.rate
    if not rate:
        raise UserError(f"{where}: {clip.path.name} has no frame rate; give frames instead of seconds")
    try:
        second = float(text)
    except ValueError:
        second = math.nan
    if not 0 <= second < math.inf:
        raise UserError(f"{where}: the second is {text!r}; it must be a number from 0")
    # A time that was rounded to microseconds belongs to the frame that begins there.
    frame = math.floor((second + 1e-6) * rate)
    if frame >= clip.frames:
        raise UserError(
            f"{where}: nothing is shown at second {text}; {clip.path.name} ends at"
            f" {float(clip.frames / rate):.3f}"
        )
    return frame


FRAME_OF: dict[str, Callable[[str, Clip, str], int]] = {"frame": _frame, "second": _frame_at}
"""How the number of a frame is read from each of the two columns."""


def labels_checksum(path: Path) -> str:
    """CRC-32 (8 hex digits) of a file. Raises `UserError` if it cannot be read."""
    with reading(path):
        return f"{zlib.crc32(path.read_bytes()):08x}"
