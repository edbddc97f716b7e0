import shutil
import sys
import threading
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from lapo import data_loader, stage1_idm_wm, stage2_bc, stage3_decode
from lapo.data import chunks
from lapo.data_loader import RollingWindows, Windows, read_splits
from lapo.errors import UserError
from lapo.models import infer_latents, make_idm, make_latent_policy, normalize
from lapo.runs.checkpoints import load_checkpoint
from lapo.runs.compute import Compute
from lapo.runs.run import Run
from support import PATIENCE, Workplace, numbered_frames, read_numbers, write_chunk, write_game

CPU = torch.device("cpu")
SIZES = (9, 4, 14, 7, 11, 5, 8)


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


def chunk_of(windows: Windows, ids: torch.Tensor) -> np.ndarray:
    """The chunks (B,) that the windows numbered (B,) lie in, as their frames tell."""
    numbers = read_numbers(windows.current_frames(ids))
    return np.searchsorted(np.cumsum(SIZES), numbers, side="right")


def roll(folder: Path, pool_chunks: int, **options) -> RollingWindows:
    return RollingWindows(folder, device=CPU, pool_chunks=pool_chunks, **options)


@given(pool_chunks=st.integers(1, 9), size=st.integers(1, 40), count=st.integers(1, 60))
def test_parts_are_the_resident_windows(folder, pool_chunks, size, count):
    resident, windows = Windows(folder, device=CPU), roll(folder, pool_chunks)
    assert len(windows) == len(resident)
    ids = windows.evenly_spaced(count)
    assert torch.equal(ids, resident.evenly_spaced(count))
    assert torch.equal(windows.actions(ids), resident.actions(ids))
    served = []
    for part in windows.iter_batches(ids, size):
        assert 0 < len(part) <= size
        assert torch.equal(windows.gather(part), resident.gather(part))
        assert torch.equal(windows.current_frames(part), resident.current_frames(part))
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
    windows, resident = roll(folder, 3), Windows(folder, device=CPU)
    order = torch.cat([windows.batch(step, 1, 0) for step in range(len(windows))])
    assert (np.diff(chunk_of(resident, order)) != 0).sum() > len(SIZES) + 3


def test_every_epoch_takes_the_chunks_in_another_order(folder):
    """A pool is a chunk: the chunks are served one after the other."""
    windows, resident, orders = roll(folder, 1), Windows(folder, device=CPU), []
    for epoch in range(6):
        steps = range(epoch * len(windows), (epoch + 1) * len(windows))
        chunks = chunk_of(resident, torch.cat([windows.batch(step, 1, 0) for step in steps]))
        orders.append(tuple(dict.fromkeys(chunks.tolist())))
        assert (np.diff(chunks) != 0).sum() == len(SIZES) - 1
    assert len(set(orders)) == 6
    first = [roll(folder, 1).batch(0, 1, seed) for seed in range(10)]
    assert len(set(chunk_of(resident, torch.cat(first)))) > 2


def test_a_slow_disk_is_waited_for_and_read_ahead_by_one_pool(folder, monkeypatch):
    resident, read, original = Windows(folder, device=CPU), [], chunks.read_chunk

    def slowly(path, keys, image_size):
        if keys == ("obs",):
            time.sleep(0.02)
            read.append(path)
        return original(path, keys, image_size)

    monkeypatch.setattr(chunks, "read_chunk", slowly)
    windows = roll(folder, 2)
    assert len(windows.frames) == 2 * 2 * max(SIZES)
    served = set()
    for step in range(len(windows)):
        ids = windows.batch(step, 1, 0)
        assert torch.equal(windows.gather(ids), resident.gather(ids))
        served.update(chunk_of(windows, ids))
        assert len(read) <= len(served) + 1 + 2  # this pool and the next one
    assert len(read) >= len(SIZES)


def test_host_memory_holds_as_many_decoded_chunks_as_there_are_readers(tmp_path, monkeypatch):
    size = 1000
    for number in range(12):
        write_chunk(tmp_path / f"{number}.npz", np.zeros((size, 64, 64, 3), np.uint8))
    for readers in (1, 2):
        monkeypatch.setattr(chunks, "MAX_READERS", readers)
        windows = roll(tmp_path, 4)
        tracemalloc.start()
        for step in range(2 * 12 * 9):
            windows.batch(step, 100, 0)
        windows._reader.shutdown()  # or it would go on reading while the other one is measured
        peak = tracemalloc.get_traced_memory()[1]  # torch's own memory, 8 chunks, is not traced
        tracemalloc.stop()
        assert peak < (readers + 0.5) * size * 64 * 64 * 3


def test_windows_that_are_not_there_cannot_be_gathered(folder):
    windows = roll(folder, 2)
    with pytest.raises(IndexError):
        windows.gather(windows.all()[:2])
    ids = windows.batch(0, 1, 0)
    windows.gather(ids)
    for step in range(len(windows)):
        windows.batch(step, 1, 0)
    there = [number for number in windows.all() if can_gather(windows, number[None])]
    assert 1 <= len(set(chunk_of(windows, torch.stack(there)))) <= 2  # the chunks of the pool being served


def can_gather(windows: RollingWindows, ids: torch.Tensor) -> bool:
    try:
        windows.gather(ids)
    except IndexError:
        return False
    return True


def test_the_next_pool_is_read_while_this_one_is_served(folder, monkeypatch):
    reading = threading.Event()

    def read(path, keys, image_size):
        if keys == ("obs",) and len(seen) == 2:
            reading.set()
        if keys == ("obs",):
            seen.append(path)
        return original(path, keys, image_size)

    seen, original = [], chunks.read_chunk
    monkeypatch.setattr(chunks, "read_chunk", read)
    windows = roll(folder, 2)
    windows.batch(0, 1, 0)
    assert reading.wait(timeout=PATIENCE)


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


def test_a_batch_that_may_need_more_than_two_pools_is_refused_at_once(folder):
    with pytest.raises(UserError, match=r"a batch of 4 windows is too large for pools of 1 chunks"):
        roll(folder, 1).batch(0, 4, 0)


def test_damaged_chunks_are_left_out_where_allowed(tmp_path):
    for number in range(4):
        write_chunk(tmp_path / f"{number}.npz", numbered_frames(np.arange(10) + 10 * number))
    content = bytearray((tmp_path / "2.npz").read_bytes())
    content[5000] ^= 1
    (tmp_path / "2.npz").write_bytes(content)
    windows, resident = roll(tmp_path, 1, skip_bad=True), Windows(tmp_path, device=CPU, skip_bad=True)
    assert (windows.num_bad, windows.num_chunks, len(windows)) == (1, 3, len(resident))
    for part in windows.iter_batches(windows.all(), 5):
        assert torch.equal(windows.gather(part), resident.gather(part))


def test_what_does_not_fit_rolls(tmp_path, monkeypatch, capsys):
    place = Workplace(tmp_path)
    write_game(place.data / place.GAME, chunks=3)

    def kinds(*options: str) -> list[type]:
        return [type(windows) for windows in read_splits(place.config(*options), CPU)]

    assert kinds() == [Windows, Windows]
    assert "train: 120 frames need 0.00 GB of " in capsys.readouterr().out
    monkeypatch.setattr(data_loader, "free_bytes", lambda device: 120 * 64 * 64 * 3)
    assert kinds() == [RollingWindows, Windows]
    assert kinds("--resident", "always") == [Windows, Windows]
    assert kinds("--data.train_chunks", "2") == [Windows, Windows]  # too few to take turns
    monkeypatch.setattr(data_loader, "free_bytes", lambda device: None)
    assert kinds() == [Windows, Windows]
    assert kinds("--resident", "never") == [RollingWindows, Windows]


@pytest.mark.slow
def test_stages_on_rolling_data_without_a_test_folder(tmp_path):
    place = Workplace(tmp_path)
    write_game(place.data / place.GAME, chunks=6)
    shutil.rmtree(place.data / place.GAME / "test")
    options = ("--resident", "never", "--data.pool_chunks", "1")
    measured = []
    for exp in ("once", "again"):
        cfg = place.config(*options, "--exp", exp)
        stage1_idm_wm.train(cfg)
        stage2_bc.train(cfg)
        for mode in ("bc", "offline"):
            stage3_decode.train(place.config(*options, "--exp", exp, "--stage3.mode", mode))
        measured.append(load_checkpoint(place.run_dir("stage2", exp) / "checkpoint.pt"))
    assert measured[0]["metrics"] == measured[1]["metrics"]

    # Measured on all windows, each with its own frames: so says the resident loader.
    cfg = place.config("--exp", "once")
    windows = read_splits(cfg, CPU)[0]
    compute = Compute.from_config(cfg)
    idm, policy = make_idm(cfg), make_latent_policy(cfg)
    stage1 = load_checkpoint(place.run_dir("stage1", "once") / "checkpoint.pt")
    idm.load_state_dict(stage1["state"]["idm"])
    policy.load_state_dict(measured[0]["state"]["policy"])
    la = infer_latents(idm, windows.iter_frames(windows.all()), compute)
    loss = F.mse_loss(policy(normalize(windows.current_frames(windows.all()))), la)
    assert measured[0]["metrics"]["loss_test"] == pytest.approx(loss.item(), rel=1e-4)


def test_a_run_does_not_go_on_in_another_order(tmp_path):
    place = Workplace(tmp_path)
    write_game(place.data / place.GAME, chunks=6)
    began = read_splits(place.config("--resident", "never", "--data.pool_chunks", "1"), CPU)[0]
    now = read_splits(place.config(), CPU)[0]
    now.check_data_order(now.data_order)
    with pytest.raises(UserError, match=r"\(on the device: pools of 1 chunks → all frames\); restore its"):
        now.check_data_order(began.data_order)
    with pytest.raises(UserError, match=r"\(on the device: all frames → pools of 1 chunks\)"):
        began.check_data_order(now.data_order)


def test_a_run_does_not_go_on_with_other_data(workplace, monkeypatch):
    monkeypatch.setattr(Run, "finish", lambda *arguments: sys.exit(7))
    with pytest.raises(SystemExit, match="7"):
        stage1_idm_wm.train(workplace.config())
    write_game(workplace.data / workplace.GAME, chunks=3)
    with pytest.raises(UserError, match="was trained before train frames and test frames changed"):
        stage1_idm_wm.train(workplace.config())
