"""data/labels.py: the true actions that a CSV file gives for frames of clips."""

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lapo.data.chunks import UNKNOWN
from lapo.data.clips import Clip
from lapo.data.labels import Labels, labels_checksum, read_labels
from lapo.data.video import Video
from lapo.errors import UserError


def clip(name: str, frames: int, rate: Fraction | None = None, **details) -> Clip:
    """A clip of so many frames: a video if it has a frame rate, otherwise a folder of pictures."""
    values = {"left_out": 0, "mid_gop": False, "rate": rate} | details
    video = object.__new__(Video) if rate or details else None
    if video:
        video.__dict__.update(values)
    return Clip(Path("videos") / name, frames, video)


def write(folder: Path, text: str) -> Path:
    path = folder / "actions.csv"
    path.write_text(text, encoding="utf-8")
    return path


def test_actions_are_numbered_by_name_and_gaps_are_unknown(tmp_path):
    path = write(
        tmp_path, "action, clip, frame, who\nup, a.mp4, 3, me\ndown, b, 0, I\n\nup, b, 1,\nup, b, 1,\n"
    )
    labels = read_labels(path, [clip("a.mp4", 5), clip("b", 2), clip("c", 2)])
    assert labels.names == ["down", "up"]
    assert labels.of("a.mp4", 1, 5).tolist() == [UNKNOWN, UNKNOWN, UNKNOWN, 1, UNKNOWN]
    assert labels.of("b", 1, 2).tolist() == [0, 1]
    assert labels.of("c", 1, 2).tolist() == [UNKNOWN, UNKNOWN]
    assert labels.of("b", 1, 2).dtype == np.int16


def test_a_file_as_spreadsheets_save_it(tmp_path):
    """With a byte order mark, quotes, and lines that end in CR and LF."""
    path = tmp_path / "actions.csv"
    path.write_bytes(b'\xef\xbb\xbfclip,frame,action\r\n"a, b.gif","2","jump, left"\r\n')
    labels = read_labels(path, [clip("a, b.gif", 3)])
    assert labels.names == ["jump, left"]
    assert labels.of("a, b.gif", 1, 3).tolist() == [UNKNOWN, UNKNOWN, 0]


def test_seconds_are_those_at_which_a_frame_is_shown(tmp_path):
    seconds = (0, 0.04, 0.0999, 0.1, 0.1334, 0.9667)
    rows = "".join(f"a.mp4,{second},action{second}\n" for second in seconds)
    path = write(tmp_path, f"clip,second,action\n{rows}")
    labels = read_labels(path, [clip("a.mp4", 30, Fraction(30))])
    known = np.flatnonzero(labels.of("a.mp4", 1, 30) != UNKNOWN).tolist()
    assert known == [0, 1, 2, 3, 4, 29]


@given(
    frames=st.integers(1, 40),
    every=st.integers(1, 7),
    known=st.dictionaries(st.integers(0, 39), st.integers(0, 3)),
)
def test_a_frame_that_is_left_out_labels_the_one_kept_before_it(frames, every, known):
    known = {frame: action for frame, action in known.items() if frame < frames}
    expected = []
    for kept in range(0, frames, every):
        mine = [known[frame] for frame in range(kept, min(kept + every, frames)) if frame in known]
        expected.append(mine[0] if mine else UNKNOWN)
    assert Labels(list("abcd"), {"a": known}).of("a", every, frames).tolist() == expected


CLIPS = [clip("a.mp4", 10, Fraction(5)), clip("shots", 4)]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (
            "",
            "needs the columns clip, frame or second, and action, and at least one row below them; found: no",
        ),
        ("clip,frame,action\n\n", "at least one row below them; found: clip, frame, action"),
        ("clip,time,action\na.mp4,0,up\n", "found: clip, time, action"),
        ("clip,frame,second,action\na.mp4,0,0,up\n", "found: clip, frame, second, action"),
        ("clip,frame,action\na.mp4,0,up,1\n", "row 2 has 4 values for 3 columns; names with commas need q"),
        ("clip,frame,action\nb.mp4,0,up\n", "row 2: there is no clip 'b.mp4'; the clips are a.mp4, shots"),
        ("clip,frame,action\na.mp4,0,up\na.mp4,1\n", "row 3 has 2 values for 3 columns"),
        ("clip,frame,action\na.mp4,0,up\na.mp4,1,\n", "row 3: the action has no name"),
        ("clip,frame,action\na.mp4,-1,up\n", "row 2: the frame is '-1'; it must be a whole number"),
        ("clip,frame,action\na.mp4,1.5,up\n", "row 2: the frame is '1.5'"),
        ("clip,frame,action\na.mp4,10,up\n", "row 2: there is no frame 10; a.mp4 has frames 0 to 9"),
        ("clip,second,action\na.mp4,2,up\n", "row 2: nothing is shown at second 2; a.mp4 ends at 2.000"),
        ("clip,second,action\na.mp4,nan,up\n", "row 2: the second is 'nan'"),
        ("clip,second,action\na.mp4,,up\n", "row 2: the second is ''"),
        ("clip,second,action\nshots,0,up\n", "row 2: shots has no frame rate; give frames"),
        ("clip,frame,action\na.mp4,0,up\na.mp4,0,down\n", "row 3: frame 0 of a.mp4 has two actions, up and"),
        ("clip,second,action\n" + "".join(f"a.mp4,0.{k:03},act{k}\n" for k in range(5)), "has two actions"),
    ],
)
def test_a_mistake_is_named_with_its_row(tmp_path, text, complaint):
    with pytest.raises(UserError) as error:
        read_labels(write(tmp_path, text), CLIPS)
    assert complaint in str(error.value)


def test_more_actions_than_a_chunk_can_hold(tmp_path):
    rows = "".join(f"a,{frame},act{frame}\n" for frame in range(257))
    path = write(tmp_path, f"clip,frame,action\n{rows}")
    with pytest.raises(UserError, match="names 257 actions; at most 256 are possible"):
        read_labels(path, [clip("a", 300)])


def test_frames_that_cannot_be_counted_are_not_labelled(tmp_path):
    path = write(tmp_path, "clip,frame,action\na.mp4,0,up\n")
    for details in ({"left_out": 3}, {"mid_gop": True}):
        with pytest.raises(UserError, match=r"a\.mp4 begins with frames that cannot be decoded"):
            read_labels(path, [clip("a.mp4", 10, **details)])
    with pytest.raises(UserError, match=r"two clips are named a\.mp4"):
        read_labels(path, [clip("a.mp4", 10), clip("a.mp4", 12)])


def test_a_file_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match="absent"):
        read_labels(tmp_path / "absent.csv", CLIPS)
    path = tmp_path / "latin.csv"
    path.write_bytes("clip,frame,action\na.mp4,0,höher\n".encode("latin1"))
    with pytest.raises(UserError, match="is not a CSV file in UTF-8"):
        read_labels(path, CLIPS)


def test_the_checksum_tells_files_apart(tmp_path):
    first = labels_checksum(write(tmp_path, "clip,frame,action\na,0,up\n"))
    second = labels_checksum(write(tmp_path, "clip,frame,action\na,0,down\n"))
    assert first != second
