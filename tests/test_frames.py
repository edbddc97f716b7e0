"""Frames of another size."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lapo import frames
from lapo.errors import UserError
from lapo.frames import resize


@given(size=st.sampled_from([8, 16]), ratio=st.sampled_from([1, 2, 3, 4]), count=st.integers(0, 7))
def test_resized_frames_are_the_rounded_means_of_blocks(size, ratio, count):
    rng = np.random.default_rng(0)
    large = rng.integers(256, size=(count, size * ratio, size * ratio, 3), dtype=np.uint8)
    expected = np.empty((count, size, size, 3))
    for y in range(size):
        for x in range(size):
            block = large[:, y * ratio : (y + 1) * ratio, x * ratio : (x + 1) * ratio]
            expected[:, y, x] = np.floor(block.mean((1, 2)) + 0.5)
    small = resize(large, size)
    assert small.dtype == np.uint8
    np.testing.assert_array_equal(small, expected)


def test_many_frames_are_averaged_block_by_block(monkeypatch):
    large = np.random.default_rng(0).integers(256, size=(10, 16, 16, 3), dtype=np.uint8)
    whole = resize(large, 8)
    monkeypatch.setattr(frames, "BLOCK", 3)
    np.testing.assert_array_equal(resize(large, 8), whole)


def test_frames_of_that_size_are_not_copied():
    large = np.zeros((2, 16, 16, 3), np.uint8)
    assert resize(large, 16) is large


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((32, 32), "frames have 32×32 pixels, but data.image_size is 64; choose --data.image_size 32"),
        ((128, 64), "frames have 128×64 pixels, but data.image_size is 64; scale the frames"),
        ((96, 96), "frames have 96×96 pixels, but data.image_size is 64; scale the frames"),
    ],
)
def test_frames_that_cannot_be_averaged_are_refused(shape, message):
    with pytest.raises(UserError, match=message):
        resize(np.zeros((1, *shape, 3), np.uint8), 64)
