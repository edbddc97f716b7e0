import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import data_loader
import rolling
import stage1_idm_wm
import stage2_bc
from conftest import numbered_frames, write_chunk
from data_loader import Windows
from errors import UserError
from rolling import RollingWindows
from runs import load_checkpoint

CPU = torch.device("cpu")
SIZES = (9, 3, 14, 7, 11, 5, 8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Chunks of different lengths, their frames numbered through, with a cut in the longer ones."""
    folder, first = tmp_path_factory.mktemp("rolling"), 0
    for number, size in enumerate(SIZES):
        done = np.arange(size) == 8
        numbers = np.arange(first, first + size)
        write_chunk(folder / f"{number}.npz", numbered_frames(numbers), ta=numbers % 15, done=done)
        first += size
    return folder


def roll(folder: Path, pool_chunks: int, **options) -> RollingWindows:
    return RollingWindows(folder, device=CPU, pool_chunks=pool_chunks, **options)


@given(pool_chunks=st.integers(1, 9), size=st.integers(1, 40), count=st.integers(1, 60))
def test_parts_are_the_resident_windows(folder, pool_chunks, size, count):
    resident, windows = Windows(folder, device=CPU), roll(folder, pool_chunks)
    assert len(windows) == len(resident)
    ids = windows.spread(count)
    assert torch.equal(ids, resident.spread(count))
    assert torch.equal(windows.actions(ids), resident.actions(ids))
    served = []
    for part in windows.parts(ids, size):
        assert 0 < len(part) <= size
        assert torch.equal(windows.gather(part), resident.gather(part))
        assert torch.equal(windows.middle_frames(part), resident.middle_frames(part))
        served.append(part)
    assert torch.equal(torch.cat(served), ids)


@given(pool_chunks=st.integers(1, 9), batch_size=st.integers(1, 3), seed=st.integers(0, 3))
def test_batches_hold_the_right_frames_and_every_epoch_every_window_once(
    folder, pool_chunks, batch_size, seed
):
    resident, windows = Windows(folder, device=CPU), roll(folder, pool_chunks)
    row = []
    for step in range(-(-3 * len(resident) // batch_size)):
        ids = windows.batch(step, batch_size, seed)
        assert torch.equal(windows.gather(ids), resident.gather(ids))
        row += ids.tolist()
    size = len(resident)
    epochs = [row[i : i + size] for i in range(0, 3 * size, size)]
    assert all(sorted(epoch) == list(range(size)) for epoch in epochs)
    assert epochs[0] != epochs[1]


@given(pool_chunks=st.integers(1, 4), steps=st.lists(st.integers(0, 60), min_size=2, max_size=8))
def test_any_step_can_be_the_next(folder, pool_chunks, steps):
    resident = Windows(folder, device=CPU)
    in_order, windows = roll(folder, pool_chunks), roll(folder, pool_chunks)
    expected = [in_order.batch(step, 3, 0) for step in range(61)]
    for step in steps:
        ids = windows.batch(step, 3, 0)
        assert torch.equal(ids, expected[step])
        assert torch.equal(windows.gather(ids), resident.gather(ids))


def test_the_windows_of_a_pool_are_mixed(folder):
    windows = roll(folder, 3)
    order = torch.cat([windows.batch(step, 1, 0) for step in range(len(windows))])
    chunks = windows._chunk_of[order]
    assert (chunks.diff() != 0).sum() > len(SIZES) + 3


def test_a_slow_disk_is_waited_for_and_read_ahead_by_one_pool(folder, monkeypatch):
    resident, read, busy, most = Windows(folder, device=CPU), [], threading.Lock(), []

    def slowly(path, keys):
        if keys == ("obs",):
            assert busy.acquire(blocking=False), "two chunks in host memory at once"
            time.sleep(0.02)
            read.append(path)
            busy.release()
        return data_loader.read_chunk(path, keys)

    monkeypatch.setattr(rolling, "read_chunk", slowly)
    windows = roll(folder, 2)
    assert len(windows.frames) == 2 * 2 * max(SIZES)
    for step in range(len(windows)):
        ids = windows.batch(step, 1, 0)
        assert torch.equal(windows.gather(ids), resident.gather(ids))
        most.append(len(read) - 2 * windows._pool_of(step, 0))
    assert max(most) <= 4  # the pool being served and the next one
    assert len(read) >= len(SIZES)
    windows._reader.shutdown()


def test_the_next_pool_is_read_while_this_one_is_served(folder, monkeypatch):
    reading = threading.Event()

    def read(path, keys):
        if keys == ("obs",) and len(seen) == 2:
            reading.set()
        if keys == ("obs",):
            seen.append(path)
        return data_loader.read_chunk(path, keys)

    seen = []
    monkeypatch.setattr(rolling, "read_chunk", read)
    windows = roll(folder, 2)
    windows.batch(0, 1, 0)
    assert reading.wait(timeout=10)


def test_damaged_frames_are_named_when_they_are_read(tmp_path):
    for number in range(4):
        write_chunk(tmp_path / f"{number}.npz", numbered_frames(np.arange(10)))
    path = tmp_path / "2.npz"
    content = bytearray(path.read_bytes())
    content[5000] ^= 1
    path.write_bytes(content)
    windows = roll(tmp_path, 1)

    def epoch() -> None:
        for step in range(4):
            windows.batch(step, 8, 0)

    with pytest.raises(UserError, match=rf"{path} is not a readable npz file"):
        epoch()


def test_a_batch_that_needs_more_than_two_pools_is_refused(folder):
    with pytest.raises(UserError, match=r"needs more than two pools of 1 chunks; raise data.pool_chunks"):
        roll(folder, 1).batch(0, 40, 0)


def test_what_does_not_fit_rolls(workplace, monkeypatch, capsys):
    cfg = workplace.config()
    assert type(Windows.read(cfg, "train", CPU)) is Windows
    needed = 80 * 64 * 64 * 3
    monkeypatch.setattr(data_loader, "free_bytes", lambda device: needed)
    assert type(Windows.read(cfg, "train", CPU)) is RollingWindows
    assert "of 0.00 GB free" in capsys.readouterr().out
    assert type(Windows.read(workplace.config("--data.resident", "always"), "train", CPU)) is Windows
    monkeypatch.setattr(data_loader, "free_bytes", lambda device: None)
    assert type(Windows.read(cfg, "train", CPU)) is Windows
    assert type(Windows.read(workplace.config("--data.resident", "never"), "train", CPU)) is RollingWindows
    assert type(Windows.read(workplace.config("--data.resident", "never"), "test", CPU)) is Windows


def test_stages_1_and_2_on_rolling_data(workplace):
    options = ("--data.resident", "never", "--data.pool_chunks", "1")
    results = []
    for exp in ("once", "again"):
        cfg = workplace.config(*options, "--exp", exp)
        stage1_idm_wm.train(cfg)
        stage2_bc.train(cfg)
        results.append(load_checkpoint(workplace.run_dir("stage2", exp) / "checkpoint.pt")["metrics"])
    assert results[0] == results[1]
    assert results[0]["loss_test"] > 0
