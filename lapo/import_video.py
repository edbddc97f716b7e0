"""Turn your own videos into chunks of frames: `python import_video.py clip.mp4 walk.gif shots/ --env mygame`.

A clip is a video file, a GIF or a folder of pictures. All its frames are used, whatever their timing. Only
frames that decode exactly are imported: a damaged clip is refused; frames that depend on frames missing
before a cut are left out, and a line says so.

Writes `<data_dir>/<env>/{train,test}/<k>.npz`, which is all that stages 1 and 2 read, and `dataset.json`
beside them, which records how they were made. The folder appears when it is complete; an interrupted import
starts again.

A chunk holds N frames:
    obs   (N, S, S, 3) uint8 RGB with S = `--image-size` (64), scaled by area averaging
    done  (N,) bool: last frame of a shot
    ta    (N,) int16, with `--actions`: the true action, -1 where unknown

A shot ends where its clip ends, where the clip's held-out part begins, and where the picture changes by more
than `--cut-threshold` from one frame to the next. Shots shorter than a window are left out.
"""

import argparse
import json
import math
import shlex
from pathlib import Path

import numpy as np
from tqdm import tqdm

from lapo.command_line import Parser
from lapo.config import ROOT, load_config, resolve
from lapo.data.chunks import CHUNK_FRAMES, UNKNOWN, write_chunk
from lapo.data.clips import Clip, checksum, cropped, open_clip, shrink, versions
from lapo.data.labels import labels_checksum, read_labels
from lapo.data.pictures import find_files
from lapo.errors import UserError, run_main
from lapo.frames import CHANNELS, SIZES
from lapo.games.table import GAMES
from lapo.runs.files import atomic_folder, folder_lock, is_absent_or_empty, write_json

MIN_SHOT = 4
"""Frames of the shortest shot: a window has three frames, and none may be the last one of a shot."""


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line. Raises `UserError` for invalid arguments."""
    parser = Parser(__doc__)
    parser.add_argument(
        "sources",
        nargs="*",
        type=Path,
        metavar="clip",
        help="video file, GIF, or folder of pictures of one kind, ordered by the numbers in their names",
    )
    parser.add_argument("--env", required=True, help="name of the data set; Procgen's names are reserved")
    parser.add_argument(
        "--crop",
        nargs=4,
        type=int,
        metavar=("X", "Y", "WIDTH", "HEIGHT"),
        help="crop, in pixels of the source, before scaling to a square; default: the whole picture",
    )
    parser.add_argument(
        "--image-size", type=int, choices=SIZES, default=64, help="pixels of a frame's side (64)"
    )
    parser.add_argument(
        "--frame-skip", type=int, default=1, help="keep every n-th frame: 4 keeps frames 0, 4, 8, ... (1)"
    )
    parser.add_argument(
        "--test-share",
        type=float,
        default=0.1,
        help="fraction of each clip, at its end, that is held out; of short clips, a fraction of clips (0.1)",
    )
    # With random actions in Procgen, 97 to 100 % of the steps within episodes are below it (ninja: 94 %).
    parser.add_argument(
        "--cut-threshold",
        type=float,
        default=35.0,
        help="mean absolute difference (0 to 255) of two frames that makes a cut; 255: no cuts (35)",
    )
    parser.add_argument(
        "--actions",
        type=Path,
        metavar="FILE",
        help="CSV with the columns clip, frame (from 0) or second, and action (a name); frames without a row"
        " have no known action",
    )
    parser.add_argument(
        "--data-dir",
        type=Path,
        default=ROOT / "expert_data",
        help="folder that receives the data set's folder (expert_data)",
    )
    args = parser.parse_args(argv)
    if not args.sources:
        raise UserError("no clip is given; name video files, GIFs or folders of pictures")
    load_config(["--env", args.env])  # raises unless the stages accept the name
    if args.env in GAMES:
        raise UserError(f"'{args.env}' is a Procgen game; choose another name, such as my{args.env}")
    if args.frame_skip < 1:
        raise UserError(f"--frame-skip is {args.frame_skip}; choose 1, which keeps every frame, or more")
    if not 0 <= args.test_share < 1:
        raise UserError(f"--test-share is {args.test_share}; choose a fraction from 0 to below 1")
    if not 0 <= args.cut_threshold <= 255:
        raise UserError(f"--cut-threshold is {args.cut_threshold}; choose a difference from 0 to 255")
    return args


def settings_of(args: argparse.Namespace) -> dict:
    """Everything that the chunks depend on, as JSON data. Raises `UserError` for a missing clip."""
    return {
        "sources": [
            {
                "name": path.resolve().name,
                "bytes": sum(file.stat().st_size for file in find_files(path)),
                "crc32": checksum(path),
            }
            for path in args.sources
        ],
        "actions": args.actions and labels_checksum(args.actions),
        **{
            key: getattr(args, key)
            for key in ("crop", "image_size", "frame_skip", "test_share", "cut_threshold")
        },
    }


class Split:
    """Writer of the chunks of `train` or `test`. Memory holds one chunk at a time."""

    def __init__(self, folder: Path, chunk_frames: int, image_size: int, with_actions: bool = False):
        """Chunks of at most `chunk_frames` frames, in `folder`."""
        self.folder = folder
        self.obs = np.empty((chunk_frames, image_size, image_size, CHANNELS), np.uint8)
        self.done = np.zeros(chunk_frames, bool)
        self.ta = np.empty(chunk_frames, np.int16) if with_actions else None
        self.filled = 0
        self.shot_frames = 0
        """Frames of the current shot in the current chunk."""
        self.spans_chunks = False
        """Whether the current shot began in an earlier chunk."""
        self.chunks = self.frames = self.shots = self.left_out = self.labels = 0

    def add(self, obs: np.ndarray, ta: int = UNKNOWN) -> None:
        """Add a frame (S, S, 3) uint8, and the action taken at it, to the current shot."""
        if self.filled == len(self.obs):
            self.flush()
        self.obs[self.filled] = obs
        if self.ta is not None:
            self.ta[self.filled] = ta
        self.filled += 1
        self.shot_frames += 1

    def end_shot(self) -> None:
        """Mark the end of the current shot. Its frames in this chunk are dropped if they make no window."""
        if self.shot_frames < MIN_SHOT:
            self.filled -= self.shot_frames
            self.left_out += self.shot_frames
            self.shots += self.spans_chunks
        else:
            self.done[self.filled - 1] = True
            self.shots += 1
        self.shot_frames, self.spans_chunks = 0, False

    def flush(self) -> None:
        """Write the current chunk unless it is empty, and begin the next one."""
        if self.filled:
            self.folder.mkdir(exist_ok=True)
            arrays = {"obs": self.obs[: self.filled], "done": self.done[: self.filled]}
            if self.ta is not None:
                arrays["ta"] = self.ta[: self.filled]
                self.labels += int((arrays["ta"] != UNKNOWN).sum())
            write_chunk(self.folder / f"{self.chunks}.npz", arrays)
            self.chunks, self.frames = self.chunks + 1, self.frames + self.filled
        self.done[:] = False
        self.spans_chunks = self.spans_chunks or self.shot_frames > 0
        self.filled = self.shot_frames = 0


def first_held_out(clips: list[Clip], fraction: float, every: int) -> list[float]:
    """First held-out frame of each clip: infinity if none is held out, 0 if all are.

    A clip whose held-out part would be shorter than a shot goes to one split as a whole, such that about
    `fraction` of the frames of all such clips are held out. `every` is the frame skip.
    """
    firsts, owed = [], 0.0
    for clip in clips:
        first = round(clip.frames * (1 - fraction)) if fraction else math.inf
        if fraction and math.ceil(clip.frames / every) - math.ceil(first / every) < MIN_SHOT:
            owed += fraction * clip.frames
            first = 0 if 2 * owed >= clip.frames > 0 else math.inf
            owed -= 0 if first else clip.frames
        firsts.append(first)
    return firsts


def import_clips(args: argparse.Namespace, folder: Path) -> dict:
    """Write the chunks of all clips to `folder`; returns their summary as JSON data.

    Prints notes on single clips. Raises `UserError` for a damaged clip. The first frames of all clips are
    decoded before any chunk is written.
    """
    clips = [open_clip(path, args.crop) for path in args.sources]
    labels = read_labels(args.actions, clips) if args.actions else None
    splits = {
        name: Split(folder / name, size, args.image_size, labels is not None)
        for name, size in CHUNK_FRAMES.items()
    }
    decoded, notes = [], []
    with tqdm(
        total=sum(clip.frames for clip in clips), unit=" frames", unit_scale=True, mininterval=1
    ) as bar:
        firsts = first_held_out(clips, args.test_share, args.frame_skip)
        for clip, first_test in zip(clips, firsts, strict=True):
            split, previous, index = splits["train"], None, -1
            name, every = clip.path.resolve().name, args.frame_skip
            actions = labels.of(name, every, clip.frames) if labels else None
            for index, rgb in enumerate(clip.read(args.frame_skip)):
                bar.update()
                if rgb is None:
                    continue
                obs = shrink(cropped(rgb, args.crop, clip.path), args.image_size)
                target = splits["test" if index >= first_test else "train"]
                if target is not split or is_cut(previous, obs, args.cut_threshold):
                    split.end_shot()
                target.add(obs, UNKNOWN if actions is None else actions[index // every])
                split, previous = target, obs
            split.end_shot()
            decoded.append(index + 1)
            notes += clip.notes(index + 1)
    for note in notes:
        print(note)
    for split in splits.values():
        split.flush()
    if not splits["train"].frames:
        raise UserError(
            f"there are no training frames: no shot outside the held-out part has {MIN_SHOT} frames; lower"
            " --frame-skip or --test-share, raise --cut-threshold, or name more clips"
        )
    counts = ["frames", "shots", "chunks", "left_out"] + ["labels"] * (labels is not None)
    return ({"action_names": labels.names} if labels else {}) | {
        "decoded": decoded,
        **{name: {key: getattr(split, key) for key in counts} for name, split in splits.items()},
    }


def is_cut(previous: np.ndarray | None, obs: np.ndarray, threshold: float) -> bool:
    """Whether there is a cut between two frames (S, S, 3); False if `previous` is None."""
    return previous is not None and np.abs(obs - previous.astype(np.int16)).mean() > threshold


def is_finished(folder: Path, settings: dict) -> bool:
    """Whether `folder` holds an import with `settings`. Raises `UserError` if it holds anything else."""
    if is_absent_or_empty(folder):
        return False
    remedy = "choose another --env or --data-dir, or delete it"
    try:
        text = (folder / "dataset.json").read_text(encoding="utf-8")
        record = {"image_size": 64, "actions": None} | json.loads(text)  # which older versions did not write
        found = {key: record[key] for key in settings}
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{folder} already holds something else; {remedy}") from None
    if found.pop("sources") != settings["sources"]:
        raise UserError(
            f"{folder} was imported from other clips, or from clips of the same names but other content;"
            f" {remedy}"
        )
    if found.pop("actions") != settings["actions"]:
        raise UserError(
            f"{folder} was imported with other labels or none; delete it and run the command again (stages 1"
            " and 2 of the same frames remain valid), or choose another --env or --data-dir"
        )
    for key, value in found.items():
        if value != settings[key]:
            raise UserError(f"{folder} was imported with {key} {value}, not {settings[key]}; {remedy}")
    return True


def main() -> None:
    """Import the clips of the command line."""
    args = parse()
    folder = resolve(str(args.data_dir)).resolve() / args.env
    try:
        settings = settings_of(args)
        done = f"{folder} already holds these clips: nothing to do"
        if is_finished(folder, settings):
            print(done)
            return
        with folder_lock(folder, "importing"):
            if is_finished(folder, settings):  # by the process that held the lock before
                print(done)
                return
            with atomic_folder(folder) as partial:
                summary = import_clips(args, partial)
                write_json(partial / "dataset.json", {**settings, **summary, "versions": versions()})
    except OSError as error:
        raise UserError(
            f"cannot make {folder} ({error}); remove the cause and run the command again"
        ) from None
    for name in CHUNK_FRAMES:
        split = summary[name]
        left_out = f", {split['left_out']:,} frames of too short shots left out" if split["left_out"] else ""
        labels = f", {split['labels']:,} with actions" if "labels" in split else ""
        print(f"{name}: {split['frames']:,} frames in {split['shots']:,} shots{labels}{left_out}")
    if args.test_share and not summary["test"]["frames"]:
        print(
            f"there are no held-out frames: they need {MIN_SHOT} kept frames at a clip's end, or more clips;"
            " raise --test-share"
        )
    option = "" if args.data_dir == ROOT / "expert_data" else f" --data-dir {shlex.quote(str(folder.parent))}"
    option += "" if args.image_size == 64 else f" --data.image_size {args.image_size}"
    print(f"{folder} is ready: bash launch.sh {args.env} --stages 1,2{option}")


if __name__ == "__main__":
    run_main(main)
