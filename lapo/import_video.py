"""Turn anyone's videos into chunks of frames: `python import_video.py clip.mp4 walk.gif shots/ --env mygame`.

A clip is a video file, a GIF or a folder of pictures; its frames are taken as stored, whatever their timing.
Only what decodes exactly is taken: a damaged clip is refused, and frames that a cut left without the frames
which they need are left out, with a sentence.
Writes `<data_dir>/<env>/{train,test}/<k>.npz`, which is all that stages 1 and 2 read, and `dataset.json`
beside them, which says how they were made. The folder appears when everything is in it; an import that was
stopped begins again.

A chunk holds N frames:
    obs   (N, 64, 64, 3) uint8 RGB; a pixel is the mean of the area that it covers in the source
    done  (N,) bool, a cut: the last frame of a shot

A shot ends with its clip, where the part of the clip that is held out for `test` begins, and where the
picture changes by more than `--cut-threshold` from one frame to the next. Shots without a window are left
out.
"""

import argparse
import json
import math
import shlex
from pathlib import Path

import numpy as np
from tqdm import tqdm

from lapo.command_line import Parser
from lapo.config import ROOT, load_config
from lapo.data.chunks import CHUNK_FRAMES, write_chunk
from lapo.data.clips import SIZE, Clip, checksum, cropped, open_clip, shrink, versions
from lapo.data.pictures import find_files
from lapo.errors import UserError, run_main
from lapo.games.table import GAMES
from lapo.runs.files import atomic_folder, folder_lock, is_absent_or_empty, write_json

MIN_SHOT = 4
"""Frames of the shortest shot: a window is three frames, none of them the last one of a shot."""


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line. Raises `UserError` for arguments that make no data set."""
    parser = Parser(__doc__)
    parser.add_argument(
        "sources",
        nargs="*",
        type=Path,
        metavar="clip",
        help="video file, GIF, or folder of pictures of one kind, in the order of the numbers in their names",
    )
    parser.add_argument("--env", required=True, help="name of the data set, none of a Procgen game")
    parser.add_argument(
        "--crop",
        nargs=4,
        type=int,
        metavar=("X", "Y", "WIDTH", "HEIGHT"),
        help="part of the picture to keep, in pixels of the source, squeezed into a square; without it, all",
    )
    parser.add_argument(
        "--frame-skip", type=int, default=1, help="keep one frame in so many: 4 keeps frames 0, 4, 8, ... (1)"
    )
    parser.add_argument(
        "--test-share",
        type=float,
        default=0.1,
        help="fraction of every clip, at its end, that is held out; of short clips, so many whole ones (0.1)",
    )
    # Random play of Procgen stays below it in 97 to 100 % of the steps within episodes (ninja: 94 %).
    parser.add_argument(
        "--cut-threshold",
        type=float,
        default=35.0,
        help="mean absolute difference (0 to 255) of frames beyond which a shot begins; 255: no cuts (35)",
    )
    parser.add_argument(
        "--data-dir",
        type=Path,
        default=ROOT / "expert_data",
        help="where the data set's folder lies (expert_data)",
    )
    args = parser.parse_args(argv)
    if not args.sources:
        raise UserError("no clip is named; name video files, GIFs or folders of pictures")
    load_config(["--env", args.env])  # the stages must accept the name
    if args.env in GAMES:
        raise UserError(f"'{args.env}' is a Procgen game; choose another name, such as my{args.env}")
    if args.frame_skip < 1:
        raise UserError(f"--frame-skip is {args.frame_skip}; 1 keeps every frame")
    if not 0 <= args.test_share < 1:
        raise UserError(f"--test-share is {args.test_share}; choose a fraction from 0 to below 1")
    if not 0 <= args.cut_threshold <= 255:
        raise UserError(f"--cut-threshold is {args.cut_threshold}; choose a difference from 0 to 255")
    return args


def settings_of(args: argparse.Namespace) -> dict:
    """All that the chunks depend on, as plain data. Raises `UserError` for a clip that does not exist."""
    return {
        "sources": [
            {
                "name": path.resolve().name,
                "bytes": sum(file.stat().st_size for file in find_files(path)),
                "crc32": checksum(path),
            }
            for path in args.sources
        ],
        **{key: getattr(args, key) for key in ("crop", "frame_skip", "test_share", "cut_threshold")},
    }


class Split:
    """The chunks of `train` or `test`, written one by one as they fill up: memory holds a single one."""

    def __init__(self, folder: Path, chunk_frames: int):
        """Chunks of at most `chunk_frames` frames, in `folder`."""
        self.folder = folder
        self.obs = np.empty((chunk_frames, SIZE, SIZE, 3), np.uint8)
        self.done = np.zeros(chunk_frames, bool)
        self.filled = 0
        self.shot_frames = 0
        """Frames of the present shot in the present chunk."""
        self.carried = False
        """Whether the present shot began in an earlier chunk."""
        self.chunks = self.frames = self.shots = self.left_out = 0

    def add(self, obs: np.ndarray) -> None:
        """Add a frame (64, 64, 3) to the present shot."""
        if self.filled == len(self.obs):
            self.flush()
        self.obs[self.filled] = obs
        self.filled += 1
        self.shot_frames += 1

    def end_shot(self) -> None:
        """Mark the end of the present shot; without a single window, it is taken back."""
        if self.shot_frames < MIN_SHOT:
            self.filled -= self.shot_frames
            self.left_out += self.shot_frames
            self.shots += self.carried
        else:
            self.done[self.filled - 1] = True
            self.shots += 1
        self.shot_frames, self.carried = 0, False

    def flush(self) -> None:
        """Write the present chunk, if it holds anything, and begin the next one."""
        if self.filled:
            self.folder.mkdir(exist_ok=True)
            arrays = {"obs": self.obs[: self.filled], "done": self.done[: self.filled]}
            write_chunk(self.folder / f"{self.chunks}.npz", arrays)
            self.chunks, self.frames = self.chunks + 1, self.frames + self.filled
        self.done[:] = False
        self.carried = self.carried or self.shot_frames > 0
        self.filled = self.shot_frames = 0


def first_held_out(clips: list[Clip], fraction: float, every: int) -> list[float]:
    """Where each clip's part for `test` begins: infinity for none of it, 0 for all of it.

    A clip whose part would be shorter than a shot goes to one split whole, so that `fraction` of the frames
    of all such clips is held out.
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
    """Write the chunks that the arguments ask for to `folder`; returns their summary as plain data.

    Prints what is to be known of single clips. Raises UserError for a bad clip: before anything else is read
    if its very first frame shows it.
    """
    clips = [open_clip(path, args.crop) for path in args.sources]
    splits = {name: Split(folder / name, size) for name, size in CHUNK_FRAMES.items()}
    decoded, notes = [], []
    with tqdm(
        total=sum(clip.frames for clip in clips), unit=" frames", unit_scale=True, mininterval=1
    ) as bar:
        firsts = first_held_out(clips, args.test_share, args.frame_skip)
        for clip, first_test in zip(clips, firsts, strict=True):
            split, previous, index = splits["train"], None, -1
            for index, rgb in enumerate(clip.read(args.frame_skip)):
                bar.update()
                if rgb is None:
                    continue
                obs = shrink(cropped(rgb, args.crop, clip.path))
                goes_to = splits["test" if index >= first_test else "train"]
                if goes_to is not split or is_cut(previous, obs, args.cut_threshold):
                    split.end_shot()
                goes_to.add(obs)
                split, previous = goes_to, obs
            split.end_shot()
            decoded.append(index + 1)
            notes += clip.notes(index + 1)
    for note in notes:
        print(note)
    for split in splits.values():
        split.flush()
    if not splits["train"].frames:
        raise UserError(
            f"nothing to train on: no shot of the training part has {MIN_SHOT} frames; lower --frame-skip or"
            " --test-share, raise --cut-threshold, or name more clips"
        )
    counts = ("frames", "shots", "chunks", "left_out")
    return {"decoded": decoded} | {
        name: {key: getattr(split, key) for key in counts} for name, split in splits.items()
    }


def is_cut(previous: np.ndarray | None, obs: np.ndarray, threshold: float) -> bool:
    """Whether `obs` (64, 64, 3) begins another shot than the frame before it, if there is one."""
    return previous is not None and np.abs(obs - previous.astype(np.int16)).mean() > threshold


def is_finished(folder: Path, settings: dict) -> bool:
    """Whether `folder` holds this very import. Raises UserError if it holds anything else."""
    if is_absent_or_empty(folder):
        return False
    way_out = "choose another --env or --data-dir, or delete it"
    try:
        record = json.loads((folder / "dataset.json").read_text(encoding="utf-8"))
        found = {key: record[key] for key in settings}
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{folder} holds something else already; {way_out}") from None
    if found.pop("sources") != settings["sources"]:
        raise UserError(
            f"{folder} was imported from other clips, or from others of the same names; {way_out}"
        )
    for key, value in found.items():
        if value != settings[key]:
            raise UserError(f"{folder} was imported with {key} {value}, not {settings[key]}; {way_out}")
    return True


def main() -> None:
    """Import what the command line names."""
    args = parse()
    folder = args.data_dir.expanduser().resolve() / args.env
    try:
        settings = settings_of(args)
        done = f"{folder} holds these clips already: nothing to do"
        if is_finished(folder, settings):
            print(done)
            return
        with folder_lock(folder, "importing"):
            if is_finished(folder, settings):  # by whoever held the lock before
                print(done)
                return
            with atomic_folder(folder) as partial:
                summary = import_clips(args, partial)
                write_json(partial / "dataset.json", {**settings, **summary, "versions": versions()})
    except OSError as error:
        raise UserError(f"cannot make {folder} ({error})") from None
    for name in CHUNK_FRAMES:
        split = summary[name]
        left_out = f", {split['left_out']:,} frames of shots too short left out" if split["left_out"] else ""
        print(f"{name}: {split['frames']:,} frames in {split['shots']:,} shots{left_out}")
    if args.test_share and not summary["test"]["frames"]:
        print(
            f"there are no held-out frames: that takes {MIN_SHOT} kept frames at a clip's end, or more clips;"
            " raise --test-share to have some"
        )
    place = "" if args.data_dir == ROOT / "expert_data" else f" --data-dir {shlex.quote(str(folder.parent))}"
    print(f"{folder} is ready: bash launch.sh {args.env} --stages 1,2{place}")


if __name__ == "__main__":
    run_main(main)
