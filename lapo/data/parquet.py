"""Rows of parquet files as arrays of chunks: one row is one step of a Procgen game.

    column                   type                                               array
    observation              uint8 lists of 64 × 64 × 3, or an image {bytes}    obs      (N, 64, 64, 3) uint8
    action                   integer, 0 to 14                                   ta       (N,) int64
    reward                   floating point                                     rewards  (N,) float32
    terminated, older: done  bool, the step ended the episode                   done     (N,) bool
    truncated, may lack      bool, the step was the last one allowed            done, too

This module needs pyarrow, of the extra `huggingface`.
"""

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image

from lapo.errors import UserError
from lapo.frames import CHANNELS
from lapo.games.table import ACTIONS
from lapo.runs.files import reading

FRAME_SHAPE = 64, 64, CHANNELS
BATCH_ROWS = 128
"""Rows that are decoded at a time. pyarrow needs 20 times the memory of a nested row meanwhile."""
END_COLUMNS = "terminated", "done"
"""Names of the column that says that a step ended the episode; the first one that is there counts."""


class BadRows(UserError):
    """A parquet file that is damaged, or holds something else than rows of Procgen."""


class RowFile:
    """An open parquet file of `rows` rows. Call `read`, and `close` at the end."""

    def __init__(self, path: Path):
        """Open a file. Raises `BadRows` if it is damaged or has other columns, `UserError` if unreadable."""
        self.path = path
        with _checking(path):
            # Without a buffer size, pyarrow reads whole columns of a row group.
            self.file = pq.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False)
            self.rows: int = self.file.metadata.num_rows
            self.columns = _find_columns(self.file.schema_arrow, path)

    def close(self) -> None:
        """Close the file."""
        self.file.close()

    def read(self, first: int = 0) -> Iterator[dict[str, np.ndarray]]:
        """The arrays `obs`, `ta`, `rewards` and `done`, a few rows at a time, from row `first` on.

        Row groups before that row are not read. Raises as `__init__`; also `BadRows` for missing values,
        frames of another shape, unknown actions, and rewards that are not finite.
        """
        sizes = [self.file.metadata.row_group(i).num_rows for i in range(self.file.num_row_groups)]
        group = 0
        while group < len(sizes) and first >= sizes[group]:
            first -= sizes[group]
            group += 1
        with _checking(self.path):
            batches = self.file.iter_batches(
                BATCH_ROWS, range(group, len(sizes)), self.columns, use_threads=False
            )
            for batch in batches:
                if first < len(batch):
                    yield self._arrays(batch.slice(first))
                first = max(first - len(batch), 0)

    def _arrays(self, batch: pa.RecordBatch) -> dict[str, np.ndarray]:
        obs, ta, rewards, *ends = (batch.column(name) for name in self.columns)
        for name in self.columns:
            if batch.column(name).null_count:
                raise BadRows(f"{self.path}: values of `{name}` are missing; choose another --revision")
        to_frames = _decode if pa.types.is_struct(obs.type) else _flatten
        arrays = {
            "obs": to_frames(obs, self.path),
            "ta": ta.to_numpy().astype(np.int64),
            "rewards": rewards.to_numpy().astype(np.float32),
            "done": np.logical_or.reduce([end.to_numpy(zero_copy_only=False) for end in ends]),
        }
        low, high = arrays["ta"].min(), arrays["ta"].max()
        if low < 0 or high >= len(ACTIONS):
            raise BadRows(
                f"{self.path}: `action` must lie in 0..{len(ACTIONS) - 1}, found {low}..{high};"
                " choose another --revision"
            )
        if not np.isfinite(arrays["rewards"]).all():
            raise BadRows(f"{self.path}: a `reward` is not finite; choose another --revision")
        return arrays


@contextmanager
def _checking(path: Path) -> Iterator[None]:
    """Turn pyarrow's errors into `BadRows`, errors of the system into `UserError`."""
    try:
        with reading(path):
            yield
    except (pa.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise BadRows(
            f"{path} is not an intact parquet file ({reason}); delete it and run the command again, or choose"
            " another --revision"
        ) from None


def _find_columns(schema: pa.Schema, path: Path) -> list[str]:
    """The columns to read: frames, actions, rewards, one or two of ends. Raises `BadRows` for others."""
    wanted: dict[str, Callable[[pa.DataType], bool]] = {
        "observation": _holds_frames,
        "action": pa.types.is_integer,
        "reward": pa.types.is_floating,
        next((name for name in END_COLUMNS if name in schema.names), END_COLUMNS[0]): pa.types.is_boolean,
    }
    if "truncated" in schema.names:
        wanted["truncated"] = pa.types.is_boolean
    wrong = [
        name for name, fits in wanted.items() if name not in schema.names or not fits(schema.field(name).type)
    ]
    if wrong:
        found = ", ".join(f"{field.name} {field.type}" for field in schema)
        raise BadRows(
            f"{path} has an unexpected schema: `{wrong[0]}` is missing or of another type in ({found[:400]});"
            " choose another --revision"
        )
    return list(wanted)


def _holds_frames(kind: pa.DataType) -> bool:
    """Whether a type is an image with bytes, or uint8 in three levels of lists."""
    if pa.types.is_struct(kind):
        index = kind.get_field_index("bytes")
        return index >= 0 and (
            pa.types.is_binary(kind[index].type) or pa.types.is_large_binary(kind[index].type)
        )
    for _ in FRAME_SHAPE:
        if not (pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)):
            return False
        kind = kind.value_type
    return pa.types.is_uint8(kind)


def _flatten(column: pa.Array, path: Path) -> np.ndarray:
    """Frames (N, 64, 64, 3) of nested lists."""
    rows = len(column)
    for size in FRAME_SHAPE:
        lengths = pc.min_max(pc.list_value_length(column)).as_py()
        column = column.flatten()
        if lengths != {"min": size, "max": size} or column.null_count:
            raise BadRows(
                f"{path}: frames must be 64 × 64 × 3, found {lengths['min']} to {lengths['max']} values where"
                f" {size} are expected, or empty ones; choose another --revision"
            )
    return column.to_numpy().reshape(rows, *FRAME_SHAPE)


def _decode(column: pa.StructArray, path: Path) -> np.ndarray:
    """Frames (N, 64, 64, 3) of images."""
    frames = np.empty((len(column), *FRAME_SHAPE), np.uint8)
    for frame, data in zip(frames, column.field("bytes"), strict=True):
        try:
            with Image.open(io.BytesIO(data.as_buffer())) as image:
                found = f"{image.mode} {image.width} × {image.height}"
                pixels = np.asarray(image)
        except Exception as error:  # pillow raises whatever the damage leads to, also SyntaxError
            found, pixels = " ".join(f"{type(error).__name__} {error}".split()), None
        if pixels is None or pixels.shape != FRAME_SHAPE:
            raise BadRows(f"{path}: an image must be RGB 64 × 64, found {found}; choose another --revision")
        frame[:] = pixels
    return frames
