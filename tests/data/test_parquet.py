"""Rows of parquet files: both layouts of frames, both names of the end of an episode, and damaged files."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from hub import IMAGE, columns, images, nested, write_rows
from lapo.data.parquet import BATCH_ROWS, BadRows, RowFile
from lapo.errors import UserError
from support import numbered_frames, read_numbers


def read(path: Path, first: int = 0) -> dict[str, np.ndarray]:
    """All rows from `first` on."""
    file = RowFile(path)
    blocks = list(file.read(first))
    file.close()
    return {key: np.concatenate([block[key] for block in blocks]) for key in blocks[0]}


def fixed(frames: np.ndarray) -> pa.Array:
    """Frames as lists of a fixed size."""
    array = pa.array(frames.reshape(-1))
    for size in reversed(frames.shape[1:]):
        array = pa.FixedSizeListArray.from_arrays(array, size)
    return array


@pytest.mark.parametrize("layout", [nested, fixed, images])
@pytest.mark.parametrize("end", ["terminated", "done"])
def test_rows_become_the_arrays_of_a_chunk(tmp_path, layout, end):
    numbers = np.arange(1000, 1060)
    path = write_rows(tmp_path / "0.parquet", columns(numbers, layout, end))
    arrays = read(path)
    assert np.array_equal(arrays["obs"], numbered_frames(numbers))
    assert np.array_equal(arrays["ta"], numbers % 15)
    assert np.array_equal(arrays["rewards"], (numbers % 7).astype(np.float32))
    assert np.array_equal(arrays["done"], (numbers % 10 == 9) | (numbers % 25 == 24))
    kinds = {key: array.dtype.str for key, array in arrays.items()}
    assert kinds == {"obs": "|u1", "ta": "<i8", "rewards": "<f4", "done": "|b1"}


def test_truncated_may_be_missing_and_other_columns_are_ignored(tmp_path):
    rows = columns(np.arange(30)) | {"level": np.arange(30)}
    del rows["truncated"]
    arrays = read(write_rows(tmp_path / "0.parquet", rows))
    assert np.flatnonzero(arrays["done"]).tolist() == [9, 19, 29]
    assert arrays.keys() == {"obs", "ta", "rewards", "done"}


@pytest.mark.parametrize("group", [7, 8, 1000])
def test_reading_begins_at_any_row(tmp_path, group):
    rows = BATCH_ROWS + 20
    path = write_rows(tmp_path / "0.parquet", columns(np.arange(rows)), group)
    for first in (0, 1, 7, 8, 16, BATCH_ROWS - 1, BATCH_ROWS, rows - 1):
        assert read_numbers(read(path, first)["obs"]).tolist() == list(range(first, rows))
    assert list(RowFile(path).read(rows)) == []


def test_row_groups_before_the_first_row_are_not_read(tmp_path):
    path = write_rows(tmp_path / "0.parquet", columns(np.arange(40)), 10)
    content = bytearray(path.read_bytes())
    for column in range(5):  # of the first row group
        chunk = RowFile(path).file.metadata.row_group(0).column(column)
        start = chunk.dictionary_page_offset if chunk.has_dictionary_page else chunk.data_page_offset
        content[start : start + chunk.total_compressed_size] = bytes(chunk.total_compressed_size)
    path.write_bytes(content)
    assert read_numbers(read(path, 15)["obs"]).tolist() == list(range(15, 40))
    with pytest.raises(BadRows, match="not an intact parquet file"):
        read(path, 5)


ROWS = columns(np.arange(20))
IMAGES = columns(np.arange(20), images)["observation"].to_pylist()


def picture(**changed: object) -> pa.Array:
    """Images of which one is changed."""
    return pa.array([*IMAGES[:12], IMAGES[12] | changed, *IMAGES[13:]], IMAGE)


def without(name: str) -> dict:
    return {key: column for key, column in ROWS.items() if key != name}


@pytest.mark.parametrize(
    ("rows", "complaint"),
    [
        (without("observation"), "unexpected schema: `observation` is missing"),
        (without("action"), "unexpected schema: `action` is missing"),
        (without("reward"), "unexpected schema: `reward` is missing"),
        (without("terminated"), "unexpected schema: `terminated` is missing"),
        (ROWS | {"terminated": np.zeros(20)}, "`terminated` is missing or of another type"),
        (ROWS | {"truncated": np.zeros(20)}, "`truncated` is missing or of another type"),
        (ROWS | {"action": np.zeros(20)}, "`action` is missing or of another type"),
        (ROWS | {"reward": ["1"] * 20}, "`reward` is missing or of another type"),
        (ROWS | {"observation": np.arange(20)}, "`observation` is missing or of another type"),
        (
            ROWS | {"observation": nested(np.zeros((20, 64, 64, 3), np.int32))},
            "`observation` is missing or of another type",
        ),
        (ROWS | {"observation": [{"path": "1.png"}] * 20}, "`observation` is missing or of another type"),
        (ROWS | {"action": np.full(20, 15)}, "`action` must lie in 0..14, found 15..15"),
        (ROWS | {"action": np.full(20, -1)}, "found -1..-1"),
        (ROWS | {"action": pa.array([None, *range(14)] + [0] * 5)}, "values of `action` are missing"),
        (ROWS | {"reward": np.full(20, np.nan)}, "a `reward` is not finite"),
        (
            ROWS | {"observation": nested(np.zeros((20, 64, 63, 3), np.uint8))},
            "found 63 to 63 values where 64",
        ),
        (ROWS | {"observation": images(np.zeros((20, 64, 32, 3), np.uint8))}, "found RGB 32 × 64"),
        (ROWS | {"observation": images(np.zeros((20, 64, 64), np.uint8))}, "found L 64 × 64"),
        (ROWS | {"observation": picture(bytes=b"no image")}, "found UnidentifiedImageError"),
        (
            ROWS | {"observation": picture(bytes=IMAGES[12]["bytes"][:60])},
            "an image must be RGB 64 × 64, found",
        ),
        (ROWS | {"observation": picture(bytes=None)}, "an image must be RGB 64 × 64, found"),
    ],
)
def test_other_content_is_one_sentence(tmp_path, rows, complaint):
    path = write_rows(tmp_path / "0.parquet", rows, 20)
    with pytest.raises(BadRows) as error:
        read(path)
    assert str(error.value).startswith(str(path))
    assert complaint in str(error.value)
    assert str(error.value).endswith("choose another --revision")


def test_lists_whose_lengths_only_add_up_are_refused(tmp_path):
    frames = numbered_frames(np.arange(20)).tolist()
    frames[3][5][6] = [1, 2]
    frames[3][5][7] = [1, 2, 3, 4]
    kind = pa.list_(pa.list_(pa.list_(pa.uint8())))
    path = write_rows(tmp_path / "0.parquet", ROWS | {"observation": pa.array(frames, kind)})
    with pytest.raises(BadRows, match="found 2 to 4 values where 3 are expected"):
        read(path)


@pytest.mark.parametrize("damage", ["cut", "empty", "text", "footer"])
def test_damaged_files_are_one_sentence(tmp_path, damage):
    path = write_rows(tmp_path / "0.parquet", ROWS)
    content = path.read_bytes()
    path.write_bytes(
        {
            "cut": content[: len(content) // 2],
            "empty": b"",
            "text": b"<html>Sign in</html>",
            "footer": content[:-200] + bytes(192) + content[-8:],
        }[damage]
    )
    with pytest.raises(BadRows, match="is not an intact parquet file") as error:
        read(path)
    assert "\n" not in str(error.value)


def test_a_file_that_cannot_be_read_is_not_called_damaged(tmp_path):
    with pytest.raises(UserError, match="could not be read") as error:
        RowFile(tmp_path / "missing.parquet")
    assert not isinstance(error.value, BadRows)
