"""A data set as the Hugging Face hub serves it: parquet files in a folder, and a server on loopback."""

import hashlib
import io
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from support import numbered_frames

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPOSITORY = "EpicPinkPenguin/procgen"
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def nested(frames: np.ndarray) -> pa.Array:
    """Frames (N, 64, 64, 3) as lists of lists of lists."""
    array = pa.array(frames.reshape(-1))
    for size in reversed(frames.shape[1:]):
        array = pa.ListArray.from_arrays(np.arange(0, len(array) + 1, size, dtype=np.int32), array)
    return array


def images(frames: np.ndarray) -> pa.Array:
    """Frames (N, 64, 64, 3) as PNG files."""
    files = []
    for frame in frames:
        Image.fromarray(frame).save(file := io.BytesIO(), "PNG")
        files.append({"bytes": file.getvalue(), "path": None})
    return pa.array(files, IMAGE)


def columns(numbers: np.ndarray, layout: Callable = nested, end: str = "terminated") -> dict[str, Any]:
    """Rows by column: the frames spell `numbers`; every tenth step terminates, every 25th is truncated."""
    return {
        "observation": layout(numbered_frames(numbers)),
        "action": (numbers % 15).astype(np.uint8),
        "reward": (numbers % 7).astype(np.float32),
        end: numbers % 10 == 9,
        "truncated": numbers % 25 == 24,
    }


def write_rows(path: Path, rows: dict[str, Any], group: int = 8) -> Path:
    """A parquet file in row groups of `group` rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(rows), path, row_group_size=group)
    return path


class Hub:
    """The files of a revision, how they are answered for, and which were fetched."""

    def __init__(self, folder: Path):
        self.folder, self.fetched, self.commit = folder, [], COMMIT
        self.status: int | None = None
        """Answer to every request, if not None."""
        self.on_fetch: Callable[[str], None] = lambda path: None
        self.damage: set[str] = set()
        """Files that arrive with another byte."""
        self.card: dict = {"license": "apache-2.0"}
        self.url = ""

    def add(self, game: str, split: str, sizes: list[int], first: int = 0, **options: Any) -> None:
        """An upload of a split; its numbers count from `first`."""
        for index, size in enumerate(sizes):
            name = f"{game}/{split}-{index:05}-of-{len(sizes):05}.parquet"
            write_rows(self.folder / name, columns(np.arange(first, first + size), **options))
            first += size

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body for the path of a request."""
        if self.status:
            return self.status, {}, b"{}"
        api, tree = f"/api/datasets/{REPOSITORY}/revision/", f"/api/datasets/{REPOSITORY}/tree/"
        files = f"/datasets/{REPOSITORY}/resolve/{self.commit}/"
        if path.startswith(api):
            if path.removeprefix(api) not in (self.commit, "main"):
                return 404, {"X-Error-Code": "RevisionNotFound"}, b""
            info = {"id": REPOSITORY, "sha": self.commit, "cardData": self.card, "siblings": []}
            return 200, {"Content-Type": "application/json"}, json.dumps(info).encode()
        if path.startswith(tree):
            folder = self.folder / path.removeprefix(f"{tree}{self.commit}/")
            if not folder.is_dir():
                return 404, {"X-Error-Code": "EntryNotFound"}, b""
            return 200, {}, json.dumps([self.describe(file) for file in sorted(folder.iterdir())]).encode()
        if path.startswith(files):
            name = path.removeprefix(files)
            content = (self.folder / name).read_bytes()
            headers = {"X-Repo-Commit": self.commit, "ETag": f'"{hashlib.sha256(content).hexdigest()}"'}
            if name in self.damage:
                content = content[:99] + bytes([content[99] ^ 1]) + content[100:]
            return 200, headers, content
        return 404, {}, b""

    def describe(self, file: Path) -> dict:
        """An entry of the list of files."""
        content, path = file.read_bytes(), file.relative_to(self.folder).as_posix()
        lfs = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
        return {"type": "file", "oid": "0" * 40, "size": len(content), "path": path, "lfs": lfs}


@contextmanager
def serve(hub: Hub) -> Iterator[None]:
    """Answer as the hub would, at `hub.url`."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            path = self.path.partition("?")[0]
            status, headers, body = hub.answer(path)
            if self.command == "GET" and "/resolve/" in path and status == 200:
                name = path.partition(f"/resolve/{hub.commit}/")[2]
                hub.fetched.append(name)
                hub.on_fetch(name)
            self.send_response(status)
            for name, value in (headers | {"Content-Length": str(len(body))}).items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_GET = do_HEAD

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
