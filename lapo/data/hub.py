"""A data set of the Hugging Face hub as chunks: the experts' frames of `EpicPinkPenguin/procgen`.

The files of a game are fetched one at a time, turned into chunks, and removed. `dataset.json` in the game's
folder says which chunks are finished and from which files they came; the same command continues.

This module needs huggingface_hub and pyarrow, of the extra `huggingface`.
"""

import errno
import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import tqdm as hub_tqdm
from tqdm import tqdm

from lapo.data.chunks import CHUNK_FRAMES, MIN_FRAMES, summarize_episodes, write_chunk
from lapo.data.parquet import RowFile
from lapo.errors import UserError
from lapo.runs.files import folder_lock, is_absent_or_empty, reading, write_json, writing

REPOSITORY = "EpicPinkPenguin/procgen"
REVISION = "16fe37a59a8ac18a5ed37262e92d45a28fbf16da"
"""The commit that is fetched unless the command line names another one."""
EXPERT = f"PPO of {REPOSITORY}"
DOWNLOADS = ".huggingface"
"""Folder, in the game's, of the files whose rows are not all in finished chunks."""
CONTINUES = "the finished chunks are kept, and the same command continues"


class HubFile(NamedTuple):
    """A parquet file of a revision."""

    path: str
    size: int
    sha256: str | None


def set_up(game: str, data_dir: Path, frames: dict[str, int], revision: str = REVISION) -> None:
    """Make `data_dir/<game>` with at least `frames` of each split, or all that the revision has; or continue.

    `revision` is a commit, branch or tag. It is resolved to a commit once; the folder is continued with that
    commit alone. Memory holds two chunks. Raises `UserError` if the folder holds other data or was begun with
    another revision, if the hub cannot be reached or refuses, for files that are damaged or of another
    schema, and if the disk is full.
    """
    target = data_dir / game
    with folder_lock(target, "downloading"):
        dataset = Dataset(target, game, revision)
        if any(dataset.missing(split, count) for split, count in frames.items()):
            dataset.ask_hub(revision)
            splits = {split: count for split, count in frames.items() if dataset.missing(split, count)}
            dataset.print_size(splits)
            for split, count in splits.items():
                dataset.import_split(split, count)
        else:
            print(f"{target} already holds these frames: nothing to do")
        shutil.rmtree(dataset.downloads, ignore_errors=True)
    for split, count in frames.items():
        summary = dataset.record[split]
        less = f", of {count:,} asked for: the revision has no more" if summary["frames"] < count else ""
        print(f"{game} {split}: {summary['frames']:,} frames{less}, {summary['episodes']:,} episodes", end="")
        print("" if summary["mean_return"] is None else f", mean return {summary['mean_return']:.2f}")
    print("relative returns refer to the experts of the published frames, not to these")


class Dataset:
    """A game's folder with its `dataset.json`."""

    def __init__(self, folder: Path, game: str, revision: str):
        """Read or begin a record. Raises `UserError` if the folder holds other data, or another revision."""
        self.folder, self.game, self.file = folder, game, folder / "dataset.json"
        self.downloads = folder / DOWNLOADS
        self.files: dict[str, list[HubFile]] = {}
        self.rows_per_file: dict[str, float] = {}
        """From the card, for the announced size alone."""
        source = {"source": "huggingface", "repository": REPOSITORY, "revision": None}
        source |= {"requested_revision": revision, "licence": None}
        # What recordings also say.
        expert = {"expert": EXPERT, "seed": None, "noise": 0.0, "visuals": "full", "levels": "unlimited"}
        expert["versions"] = {name: version(name) for name in ("huggingface_hub", "pyarrow", "pillow")}
        splits = {split: summarize_episodes([]) for split in CHUNK_FRAMES}
        content: dict[str, dict] = {"all_rows": {}, "files": {}, "chunks": {}}
        self.record: dict[str, Any] = {"game": game} | source | expert | splits | content
        if self.file.exists():
            self._read()
        elif not is_absent_or_empty(folder):
            raise UserError(f"{folder} already holds other data; move it away, or choose another --data-dir")

    def _read(self) -> None:
        try:
            with reading(self.file):
                found = json.loads(self.file.read_text(encoding="utf-8"))
            ours = found.get("source") == "huggingface"
            if ours and not {"requested_revision", "revision", "all_rows", "files", "chunks"} <= found.keys():
                raise ValueError
        except (ValueError, AttributeError):
            raise UserError(
                f"{self.file} is damaged; delete {self.folder} and run the command again"
            ) from None
        if not ours:
            raise UserError(
                f"{self.folder} already holds other data; move it away, or choose another --data-dir"
            )
        asked = self.record["requested_revision"]
        if asked in (found["requested_revision"], found["revision"]):
            self.record |= found
        elif found["chunks"]:  # else nothing would be lost
            raise UserError(
                f"{self.folder} was begun with revision {found['revision']}, not {asked}; continue with"
                f" --revision {found['revision']}, or choose another --data-dir"
            )

    def finished(self, split: str) -> list[dict]:
        """The records of the finished chunks of a split, up to the first one that is missing."""
        chunks = []
        while (name := f"{split}/{len(chunks)}.npz") in self.record["chunks"]:
            if not (self.folder / name).exists():
                break
            chunks.append(self.record["chunks"][name])
        return chunks

    def missing(self, split: str, count: int) -> int:
        """How many of `count` frames of a split are still to be imported, at most.

        Raises `UserError` if they cannot be added, as the last chunk is shorter than the others.
        """
        sizes = [chunk["frames"] for chunk in self.finished(split)]
        if sum(sizes) >= min(count, self.record["all_rows"].get(split, count)):
            return 0
        if sizes and sizes[-1] != CHUNK_FRAMES[split]:
            raise UserError(
                f"{self.folder} holds {sum(sizes):,} {split} frames, whose last chunk is shorter than the"
                f" others, and none can be added to make {count:,}; delete it, or choose another --data-dir"
            )
        return count - sum(sizes)

    def ask_hub(self, revision: str) -> None:
        """Resolve the revision, unless that is done, and list its files. Raises `UserError` as `set_up`."""
        commit = self.record["revision"]
        with asking(f"revision {commit or revision}"):
            info = HfApi().dataset_info(REPOSITORY, revision=commit or revision)
        with asking(f"the folder {self.game} of revision {info.sha}"):
            found = list(
                HfApi().list_repo_tree(REPOSITORY, self.game, revision=info.sha, repo_type="dataset")
            )
        files = [
            HubFile(file.path, file.size, file.lfs and file.lfs.sha256)
            for file in found
            if hasattr(file, "size")
        ]
        card = info.card_data.to_dict() if info.card_data else {}
        for split in CHUNK_FRAMES:
            self.files[split] = select_files(files, self.game, split, info.sha)
            rows = rows_of_card(card, self.game, split)
            if rows:
                self.rows_per_file[split] = rows / len(self.files[split])
        self.record |= {"revision": info.sha, "licence": card.get("license")}
        with writing(self.folder, CONTINUES):
            self.downloads.mkdir(parents=True, exist_ok=True)
            for leftover in self.downloads.rglob("*.incomplete"):  # of a process that was killed
                leftover.unlink()
        write_json(self.file, self.record)

    def print_size(self, frames: dict[str, int]) -> None:
        """Say how many files and bytes are about to be fetched: a bound if the card has no counts."""
        parts = []
        for split, count in frames.items():
            files, rows = self.files[split], self.rows_per_file.get(split)
            needed = files[: math.ceil(count / rows)] if rows else files
            start = sum(chunk["frames"] for chunk in self.finished(split))
            needed = needed[int(start / rows) :] if rows else needed
            size = sum(file.size for file in needed) / 1e9
            about = "about" if rows else "at most"
            parts.append(f"{about} {len(needed)} of {len(files)} files of {split} ({size:,.2f} GB)")
        asked, commit = self.record["requested_revision"], self.record["revision"]
        kept = (
            "" if asked == commit else f" (what {asked} named first; the folder is continued with it alone)"
        )
        print(
            f"{self.game}: downloading {' and '.join(parts)} of {REPOSITORY}, revision {commit}{kept}",
            flush=True,
        )

    def import_split(self, split: str, count: int) -> None:
        """Fetch files and write chunks until there are `count` frames, or no more files.

        A chunk is written while the next one is collected. The last chunk has at least three frames. Raises
        `UserError` as `set_up`.
        """
        (self.folder / split).mkdir(exist_ok=True)
        chunks = self.finished(split)
        number, position = len(chunks), sum(chunk["frames"] for chunk in chunks)
        open_return, written = (chunks[-1]["open_return"] if chunks else 0.0), None
        with ThreadPoolExecutor(1, "chunk-writer") as writer:
            for arrays in gather(self.rows(split, position, count), count - position, CHUNK_FRAMES[split]):
                chunk = close_episodes(arrays, open_return)
                open_return = chunk["open_return"]
                if written:
                    self.add(split, *written)
                path = self.folder / split / f"{number}.npz"
                written = number, chunk, writer.submit(write_chunk, path, arrays)
                del arrays  # two chunks are in memory: the one that is written and the next one
                number, position = number + 1, position + chunk["frames"]
            if written:
                self.add(split, *written)
        if position < count:
            self.record["all_rows"][split] = position
            write_json(self.file, self.record)

    def rows(self, split: str, position: int, count: int) -> Iterator[dict[str, np.ndarray]]:
        """The rows of a split from number `position` on, see `RowFile.read`; shows progress up to `count`."""
        start = 0
        options = {"unit": " frames", "unit_scale": True, "desc": f"{self.game} {split}"}
        with tqdm(total=count, initial=position, **options) as bar:
            for file in self.files[split]:
                known = self.record["files"].get(file.path)
                if known and start + known["rows"] <= position:  # all of it lies in finished chunks
                    start += known["rows"]
                    continue
                path, digest = self.fetch(file)
                with closing(RowFile(path)) as opened:
                    known = {"bytes": file.size, "sha256": digest, "rows": opened.rows}
                    self.record["files"][file.path] = known
                    write_json(self.file, self.record)
                    for arrays in opened.read(max(position - start, 0)):
                        bar.update(min(len(arrays["ta"]), count - bar.n))
                        yield arrays
                start += opened.rows

    def fetch(self, file: HubFile) -> tuple[Path, str]:
        """The path of a file of the revision, downloaded unless it is there, and its verified sha256.

        Raises `UserError` if that fails.
        """
        free = shutil.disk_usage(self.downloads).free
        if free < file.size and not (self.downloads / file.path).exists():
            raise UserError(
                f"{file.path} has {file.size / 1e9:.2f} GB, but the disk of {self.folder} has"
                f" {free / 1e9:.2f} GB left; make room, or choose another --data-dir; {CONTINUES}"
            )
        with asking(file.path):
            options = {"repo_type": "dataset", "revision": self.record["revision"], "tqdm_class": FileBar}
            path = Path(hf_hub_download(REPOSITORY, file.path, local_dir=self.downloads, **options))
        hasher = hashlib.sha256()
        with reading(path), path.open("rb") as opened:
            while block := opened.read(1 << 20):
                hasher.update(block)
        digest = hasher.hexdigest()
        if file.sha256 not in (None, digest):
            path.unlink()
            raise UserError(
                f"{file.path} arrived damaged: its sha256 is {digest}, not {file.sha256}; run the"
                f" command again to fetch it again; {CONTINUES}"
            )
        return path, digest

    def add(self, split: str, number: int, chunk: dict, written: Future) -> None:
        """Wait for a chunk, mark it as finished, and remove the files whose rows all are in such chunks."""
        written.result()
        self.record["chunks"][f"{split}/{number}.npz"] = chunk
        chunks = self.finished(split)
        self.record[split] = summarize_episodes(chunks)
        write_json(self.file, self.record)
        position = sum(chunk["frames"] for chunk in chunks)
        for file in self.files[split]:
            position -= self.record["files"].get(file.path, {}).get("rows", math.inf)
            if position < 0:
                break
            (self.downloads / file.path).unlink(missing_ok=True)


class FileBar(hub_tqdm):
    """Progress of one file; it disappears when the file is there."""

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options | {"leave": False})


def gather(blocks: Iterable[dict[str, np.ndarray]], count: int, size: int) -> Iterator[dict[str, np.ndarray]]:
    """The rows of `blocks` in chunks of `size`, until there are `count`; a last one of too few is dropped."""
    arrays, length, filled = {}, 0, 0
    for block in blocks:
        total, used = len(block["ta"]), 0
        while used < total:
            if not arrays:
                length, filled = min(max(count, MIN_FRAMES), size), 0
                arrays = {
                    key: np.empty((length, *array.shape[1:]), array.dtype) for key, array in block.items()
                }
            taken = min(total - used, length - filled)
            for key, array in block.items():
                arrays[key][filled : filled + taken] = array[used : used + taken]
            used, filled = used + taken, filled + taken
            if filled == length:
                yield arrays
                arrays, count = {}, count - length
                if count <= 0:
                    return
    if arrays and filled >= MIN_FRAMES:
        yield {key: array[:filled] for key, array in arrays.items()}


def close_episodes(arrays: dict[str, np.ndarray], open_return: float) -> dict:
    """Add `ep_returns` to a chunk; returns its record. `open_return` is that of the episode so far."""
    done = arrays["done"]
    sums = open_return + np.cumsum(arrays["rewards"], dtype=np.float64)
    returns = np.diff(sums[done], prepend=0.0)
    arrays["ep_returns"] = np.zeros(len(done), np.float32)
    arrays["ep_returns"][done] = returns
    return {
        "frames": len(done),
        "episodes": returns.size,
        "return_sum": float(returns.sum()),
        "return_square_sum": float(np.square(returns).sum()),
        "open_return": float(sums[-1] - (sums[done][-1] if done.any() else 0.0)),
    }


def select_files(files: list[HubFile], game: str, split: str, commit: str) -> list[HubFile]:
    """The files `<game>/<split>-<k>-of-<n>.parquet` of one upload, by k.

    Some revisions also hold files of earlier uploads, with another n. Only complete uploads count; of several
    the one with most files is taken. Raises `UserError` if there is none.
    """
    uploads: dict[int, dict[int, HubFile]] = {}
    for file in files:
        if match := re.fullmatch(rf"{game}/{split}-(\d+)-of-(\d+)\.parquet", file.path):
            uploads.setdefault(int(match[2]), {})[int(match[1])] = file
    complete = [count for count, found in uploads.items() if found.keys() == set(range(count))]
    if not complete:
        counts = ", ".join(f"{len(found)} of {count}" for count, found in uploads.items()) or "none"
        raise UserError(
            f"revision {commit} of {REPOSITORY} has no complete list of files"
            f" {game}/{split}-<k>-of-<n>.parquet, found {counts}; choose another --revision"
        )
    stale = sum(len(found) for count, found in uploads.items() if count != max(complete))
    if stale:
        print(f"{game}: ignored {stale} files of {split} of other uploads than that of {max(complete)} files")
    return [uploads[max(complete)][number] for number in range(max(complete))]


def rows_of_card(card: dict, game: str, split: str) -> int | None:
    """The rows of a split, from the data set's card; None if it does not say."""
    try:
        infos = card["dataset_info"]
        infos = infos if isinstance(infos, list) else [infos]
        (splits,) = (info["splits"] for info in infos if info["config_name"] == game)
        (rows,) = (found["num_examples"] for found in splits if found["name"] == split)
        return int(rows) or None
    except (KeyError, TypeError, ValueError):
        return None


@contextmanager
def asking(what: str) -> Iterator[None]:
    """Turn whatever the hub's library raises into `UserError`; `what` is asked for.

    The library raises errors of its own, of its HTTP client, of its storage client, and of the disk.
    """
    try:
        yield
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
        if any(os.strerror(number) in reason for number in (errno.ENOSPC, errno.EDQUOT)):
            problem = f"the disk is full ({reason}); make room; {CONTINUES}"
        elif isinstance(error, RevisionNotFoundError):
            problem = "there is no such revision; choose another --revision"
        elif isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
            problem = "it is not there; choose another --revision"
        elif status in (401, 403) or isinstance(error, RepositoryNotFoundError):
            problem = (
                f"the hub refuses access ({reason}); accept the data set's terms in a browser if it has any,"
                f" and log in with `hf auth login` or set HF_TOKEN; {CONTINUES}"
            )
        else:
            problem = f"the hub cannot be reached ({reason}); check the network; {CONTINUES}"
        raise UserError(f"cannot get {what} of {REPOSITORY}: {problem}") from None
