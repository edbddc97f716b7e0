"""Download the published expert data and unpack it: `python download_data.py bigfish maze`, or `all`.

The archives, one zip per game, lie on Google Drive, which limits bandwidth: a download may be refused or
break off. The same command continues it. If it fails, save the zip by hand to the path in the message.

`--source huggingface` downloads the frames of other experts from the Hugging Face hub: see docs/data.md.
"""

import argparse
import contextlib
import json
import os
import re
import shutil
import sys
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path, PurePosixPath

import gdown
from gdown.exceptions import DownloadError
from tqdm import tqdm

from lapo.command_line import Parser
from lapo.config import ROOT, resolve
from lapo.data.chunks import MIN_FRAMES, list_chunks
from lapo.errors import UserError, run_main
from lapo.runs.files import atomic_folder, folder_lock, is_absent_or_empty

ARCHIVES = {
    "bigfish": "10xwWejz1ZwccxV7O4fqbDTP_260OsBU5",
    "bossfight": "11x3-8eh0M4KsnDYW3pVRHjlOIGVCeuMz",
    "caveflyer": "1YdSG3Y3Tyf-UnL4I-ZXGGlJjOIdungU3",
    "chaser": "17c8NyuT-_IU7ymZYh3qGy_zOgm3XwcHb",
    "climber": "1qiomp1WF_KYEqbL5SWgXhZOLoaFYjoJl",
    "coinrun": "14Dfs1xy4u2IOfzLISm8adTA5IwtCsAo7",
    "dodgeball": "1q7DZkTwys0yWEWWkd7ddGczTSwGyJVXG",
    "fruitbot": "1zJw1MNxeSxjeS78Btzqo3c6oq4kXqpKH",
    "heist": "1FMCKSxCOQFjNOlUOHpARK9u0w0BFaXlx",
    "jumper": "1lv1QGv06AJMClX_Iyw9HdXUEiHgnIWX3",
    "leaper": "1S8pR6heQVGixbJ0f1u4kKPji1m481l2a",
    "maze": "18eeqTAZg1OeyN3qQFdyC-Y0l-6niM5Me",
    "miner": "177IBL8ByPBlyCKCc-1jbiwVZklc_2ga0",
    "ninja": "10sXxsoOU2Jcczu91dio7ScpZIAo6sGGP",
    "plunder": "1KzaDi7D8cc_k7M1JyrWtkk88kaS_upRy",
    "starpilot": "1AH6fO7zIp_SQYxJS0aoc81OA-UkWFp1W",
}
"""Google Drive's id of each game's archive, published with the paper."""
FOLDER = "1XjpcfOm0NafPYFPnNtoHfhJ4nHVkQSB1"
"""Google Drive's id of the folder that holds them all."""


def main() -> None:
    """Set up the games of the command line; exit with 2 unless all succeed."""
    parser = Parser(__doc__)
    parser.add_argument(
        "games", nargs="*", metavar="game", help="games to set up, or all; existing data are not changed"
    )
    parser.add_argument(
        "--data-dir",
        type=Path,
        default=ROOT / "expert_data",
        help="folder that receives <game>/train and <game>/test, and meanwhile the archives (expert_data)",
    )
    parser.add_argument(
        "--source",
        choices=("published", "huggingface"),
        default="published",
        help="published: the paper's archives; huggingface: frames of other experts (published)",
    )
    hub = parser.add_argument_group("--source huggingface")
    hub.add_argument("--frames", type=int, help="frames to train on, in chunks of 32,768 (2621440)")
    hub.add_argument("--test-frames", type=int, help="held-out frames, in chunks of 4,096 (65536)")
    hub.add_argument(
        "--revision", help="commit, branch or tag of the data set in place of the one this code names"
    )
    args = parser.parse_args()
    unknown = [game for game in args.games if game not in (*ARCHIVES, "all")]
    if unknown or not args.games:
        found = f"'{unknown[0]}' has no archive" if unknown else "no game is given"
        raise UserError(f"{found}; name one or more of {', '.join(ARCHIVES)}, or all")
    games = list(ARCHIVES) if "all" in args.games else args.games
    make = choose_source(args)
    missing = []
    for game in games:
        try:
            make(game, resolve(str(args.data_dir)))
        except (UserError, OSError) as error:
            print(f"error: {game}: {error}", file=sys.stderr)
            missing.append(game)
    if missing:
        print(f"{len(missing)} of {len(games)} games could not be set up: {', '.join(missing)}")
        sys.exit(2)


def choose_source(args: argparse.Namespace) -> Callable[[str, Path], None]:
    """The function that sets up a game in a folder from the source of the command line.

    Raises `UserError` for options that do not fit the source, and for missing packages.
    """
    options = {"--frames": args.frames, "--test-frames": args.test_frames, "--revision": args.revision}
    if args.source == "published":
        given = next((option for option, value in options.items() if value is not None), None)
        if given:
            raise UserError(f"{given} needs --source huggingface: the published archives come as a whole")
        return set_up
    try:
        from lapo.data import hub
    except ModuleNotFoundError as error:
        raise UserError(
            f"--source huggingface needs the package {error.name.split('.')[0]}; install it with"
            f" `pip install -e '{ROOT}[huggingface]'`"
        ) from None
    frames = {
        "train": 2_621_440 if args.frames is None else args.frames,
        "test": 65_536 if args.test_frames is None else args.test_frames,
    }
    for option, count in zip(options, frames.values(), strict=False):
        if count < MIN_FRAMES:
            raise UserError(f"{option} is {count}; there must be at least {MIN_FRAMES}")
    revision = hub.REVISION if args.revision is None else args.revision
    return lambda game, data_dir: hub.set_up(game, data_dir, frames, revision)


def set_up(game: str, data_dir: Path) -> None:
    """Make the folder `data_dir/<game>` from the published archive, unless it already holds data.

    The archive is downloaded to `data_dir/<game>.zip` unless it lies there, and removed afterwards. Raises
    `UserError` if the download fails or the archive is not intact, `OSError` if the disk fails.
    """
    target, archive = data_dir / game, data_dir / f"{game}.zip"
    with folder_lock(target, "unpacking"):
        if not is_absent_or_empty(target):
            check_chunks(target)
            print(f"{game}: {count_chunks(target)} are already in {target}: nothing to do")
            print_other_source(target)
            return
        if not archive.exists():
            download(game, archive)
        unpack(archive, game)
        archive.unlink()
        for partial in data_dir.glob(f"{game}.zip*.part"):
            partial.unlink()
    print(f"{game}: {count_chunks(target)} are now in {target}")


def check_chunks(folder: Path) -> None:
    """Raise `UserError` if a game's folder is incomplete. Only names and zip directories are read."""
    for part in ("train", "test"):
        chunks = list_chunks(folder / part)
        broken = [path for path in chunks if not zipfile.is_zipfile(path)]
        if not chunks:
            found = f"has no {part}/<number>.npz"
        elif broken:
            found = f"has an incomplete {part}/{broken[0].name}"
        elif int(chunks[-1].stem) >= len(chunks):
            found = f"has {len(chunks)} chunks in {part}, but their numbers go up to {chunks[-1].stem}"
        else:
            continue
        raise UserError(
            f"{folder} is not complete: it {found}; move it away or delete it, and run the command again"
        )


def print_other_source(folder: Path) -> None:
    """Say so if a game's folder is a download from the hub, which may be unfinished."""
    path = folder / "dataset.json"
    with contextlib.suppress(OSError, ValueError, AttributeError):
        if json.loads(path.read_text(encoding="utf-8")).get("source") == "huggingface":
            print("they are from the other source; --source huggingface continues if it was interrupted")


def download(game: str, archive: Path) -> None:
    """Download a game's archive, or continue a download that broke off. Raises `UserError` if that fails."""
    print(f"{game}: downloading {archive}", flush=True)
    try:
        gdown.download(id=ARCHIVES[game], output=str(archive), resume=True, retries=3, timeout=60)
    except (DownloadError, OSError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"the download failed ({reason}); run the command again later to continue it, or open "
            f"https://drive.google.com/file/d/{ARCHIVES[game]}/view (the folder of all games is "
            f"https://drive.google.com/drive/folders/{FOLDER}) in a browser, save the zip as {archive} "
            f"and run the command again; or download other experts' frames with --source huggingface"
        ) from None


def unpack(archive: Path, game: str) -> None:
    """Unpack a game's archive into the folder `<game>` beside it, completely or not at all.

    Checksums are verified. Raises `UserError` if the archive is damaged, another game's, or too large for the
    disk.
    """
    target = archive.with_name(game)
    try:
        with zipfile.ZipFile(archive) as opened:
            chunks = select_chunks(opened, game)
            size = sum(chunk.file_size for chunk in chunks)
            free = shutil.disk_usage(target if target.exists() else archive.parent).free
            if size > free:
                raise UserError(
                    f"{archive} unpacks to {size / 1e9:.1f} GB, but the disk has {free / 1e9:.1f} GB left; "
                    "make room, or choose another disk with --data-dir, and run the command again"
                )
            with atomic_folder(target) as partial:
                for chunk in tqdm(chunks, desc=f"{game}: unpacking", unit="chunk"):
                    path = partial / PurePosixPath(chunk.filename).relative_to(game)
                    path.parent.mkdir(parents=True, exist_ok=True)
                    with opened.open(chunk) as source, path.open("wb") as copy:
                        shutil.copyfileobj(source, copy, 1 << 20)
                        copy.flush()
                        os.fsync(copy.fileno())
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, ValueError) as error:
        raise UserError(
            f"{archive} is not the intact archive of {game} ({error}); delete it and run the command again"
        ) from None


def select_chunks(opened: zipfile.ZipFile, game: str) -> list[zipfile.ZipInfo]:
    """The members `<game>/train/<k>.npz` and `<game>/test/<k>.npz` of an archive; all others are ignored.

    Raises `BadZipFile` if either kind is missing.
    """
    chunks, others = [], []
    for member in opened.infolist():
        if re.fullmatch(rf"{game}/(train|test)/[0-9]+\.npz", member.filename):
            chunks.append(member)
        elif not member.is_dir():
            others.append(member.filename)
    for part in ("train", "test"):
        if not any(chunk.filename.startswith(f"{game}/{part}/") for chunk in chunks):
            raise zipfile.BadZipFile(f"it has no {game}/{part}/<number>.npz")
    if others:
        print(f"{game}: ignored {len(others)} files that are no chunks, such as '{others[0]}'")
    return chunks


def count_chunks(folder: Path) -> str:
    """The numbers of chunks of a game's folder, as a phrase: "2 train and 1 test chunks"."""
    train, test = (len(list((folder / part).glob("*.npz"))) for part in ("train", "test"))
    return f"{train} train and {test} test chunks"


if __name__ == "__main__":
    run_main(main)
