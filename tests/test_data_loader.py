"""The loader: which windows it serves, in which order, and what it says of bad data."""

import ast
import errno
import os
import shutil
import tracemalloc
import zipfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lapo.data import chunks
from lapo.data.chunks import (
    UNKNOWN,
    BadChunk,
    find_chunks,
    num_chunks_for,
    read_chunk,
    read_header,
    window_starts,
)
from lapo.data_loader import RollingWindows, Windows, read_splits
from lapo.errors import UserError
from lapo.frames import resize
from support import Trap, numbered_frames, read_numbers, write_chunk, write_game

CPU = torch.device("cpu")


def counting_chunks(folder: Path, sizes: dict[str, int], **arrays) -> None:
    """Chunks of numbered frames: frame i of chunk k has number 1000 · k + i, its action is i modulo 15."""
    for name, size in sizes.items():
        numbers = 1000 * int(name) + np.arange(size)
        extra = {"ta": np.arange(size) % 15} | {key: make(size) for key, make in arrays.items()}
        write_chunk(folder / f"{name}.npz", numbered_frames(numbers), **extra)


# ---------------------------------------------------------------- windows


def test_windows_hold_consecutive_frames_of_one_chunk_in_the_numeric_order_of_chunks(tmp_path):
    counting_chunks(tmp_path, {"10": 5, "2": 4, "0": 3})
    windows = Windows(tmp_path, device=CPU)
    expected = [
        [1000 * k + i, 1000 * k + i + 1, 1000 * k + i + 2]
        for k, n in ((0, 1), (2, 2), (10, 3))
        for i in range(n)
    ]
    assert len(windows) == 6
    assert read_numbers(windows.gather(windows.all())).tolist() == expected
    assert windows.frames.dtype == torch.uint8
    assert windows.gather(windows.all()).shape == (6, 3, 64, 64, 3)


def test_the_action_of_a_window_is_the_one_taken_at_its_middle_frame(tmp_path):
    counting_chunks(tmp_path, {"0": 40, "1": 30})
    windows = Windows(tmp_path, device=CPU)
    ids = torch.randperm(len(windows))
    middle = read_numbers(windows.current_frames(ids))
    np.testing.assert_array_equal(middle, read_numbers(windows.gather(ids))[:, 1])
    np.testing.assert_array_equal(windows.actions(ids), middle % 1000 % 15)
    assert windows.actions(ids).dtype == torch.int64


@given(st.lists(st.booleans(), min_size=5, max_size=30), st.booleans(), st.integers(2, 5))
def test_windows_around_episode_ends_equal_a_loop(done, skip_resets, window):
    done = np.array(done)
    everywhere = list(range(len(done) - window + 1))
    expected = [start for start in everywhere if not (skip_resets and any(done[start : start + window]))]
    assert window_starts(done, len(done), skip_resets, window).tolist() == expected
    assert window_starts(None, len(done), skip_resets, window).tolist() == everywhere


@pytest.mark.parametrize("context", [0, 2, 3])
def test_a_window_holds_the_context_before_its_last_two_frames(tmp_path, context):
    counting_chunks(tmp_path, {"0": 40, "1": 30})
    windows = Windows(tmp_path, device=CPU, context=context)
    assert len(windows) == 70 - 2 * (context + 1)
    ids = torch.randperm(len(windows))
    numbers = read_numbers(windows.gather(ids))
    assert numbers.shape == (len(ids), context + 2)
    assert (np.diff(numbers) == 1).all()
    np.testing.assert_array_equal(read_numbers(windows.current_frames(ids)), numbers[:, -2])
    np.testing.assert_array_equal(windows.actions(ids), numbers[:, -2] % 1000 % 15)


def test_frames_are_averaged_when_they_are_read(tmp_path):
    obs = np.random.default_rng(0).integers(256, size=(12, 64, 64, 3), dtype=np.uint8)
    for number in range(3):
        write_chunk(tmp_path / f"{number}.npz", obs[4 * number : 4 * number + 4])
    small = torch.from_numpy(resize(obs, 32))
    assert torch.equal(Windows(tmp_path, device=CPU, image_size=32).frames, small)
    rolling = RollingWindows(tmp_path, device=CPU, pool_chunks=1, image_size=32)
    windows = list(rolling.iter_frames(rolling.all()))
    expected = [small[4 * k + start : 4 * k + start + 3] for k in range(3) for start in range(2)]
    assert torch.equal(torch.cat(windows), torch.stack(expected))


def test_frames_smaller_than_configured_name_their_size(tmp_path):
    write_chunk(tmp_path / "0.npz", np.zeros((5, 32, 32, 3), np.uint8))
    assert read_header(tmp_path / "0.npz") == 5
    with pytest.raises(UserError, match=r"found uint8 \(5, 32, 32, 3\); choose --data.image_size 32"):
        Windows(tmp_path, device=CPU)
    assert len(Windows(tmp_path, device=CPU, image_size=32)) == 3


def test_a_chunk_shorter_than_a_window_is_refused(tmp_path):
    write_chunk(tmp_path / "0.npz", np.zeros((4, 64, 64, 3), np.uint8))
    with pytest.raises(UserError, match="holds 4 frames; a chunk needs at least 5"):
        Windows(tmp_path, device=CPU, context=3)
    assert len(Windows(tmp_path, device=CPU, context=2)) == 1


def test_windows_that_touch_an_episodes_end_are_left_out_of_every_chunk_unless_kept(tmp_path):
    def ends(size: int) -> np.ndarray:
        return np.arange(size) % 7 == 4

    counting_chunks(tmp_path, {"0": 20, "1": 12}, done=ends)
    for skip_resets in (True, False):
        windows = Windows(tmp_path, device=CPU, skip_resets=skip_resets)
        expected = [
            1000 * k + start
            for k, size in ((0, 20), (1, 12))
            for start in range(size - 2)
            if not (skip_resets and ends(size)[start : start + 3].any())
        ]
        assert read_numbers(windows.gather(windows.all()))[:, 0].tolist() == expected


def test_frames_alone_are_enough(tmp_path):
    write_chunk(tmp_path / "0.npz", numbered_frames(np.arange(5)))
    windows = Windows(tmp_path, device=CPU)
    assert windows.ta is None
    assert len(windows) == 3
    assert "without true actions" in windows.summary()


@pytest.mark.parametrize("kind", [Windows, partial(RollingWindows, pool_chunks=1)])
def test_actions_count_only_when_every_chunk_has_them(kind, tmp_path):
    counting_chunks(tmp_path, {"0": 5})
    write_chunk(tmp_path / "1.npz", numbered_frames(np.arange(5)))
    windows = kind(tmp_path, device=CPU)
    assert windows.ta is None
    assert "without true actions (which 1.npz lacks)," in windows.summary()
    write_chunk(tmp_path / "2.npz", numbered_frames(np.arange(5)))
    assert kind(tmp_path, device=CPU).describe_unlabelled() == "1.npz and 1 more lack"
    assert kind(tmp_path, device=CPU, limit=1).ta is not None


def test_other_keys_and_other_files_are_ignored(tmp_path):
    counting_chunks(tmp_path, {"3": 4}, rewards=np.zeros, notes=lambda size: np.array(["a"] * size, object))
    (tmp_path / "dataset.json").write_text("{}")
    for name in ("extra.npz", "0.npz.part", "-1.npz", "².npz", "1.5.npz"):
        (tmp_path / name).write_bytes(b"no chunk")
    assert find_chunks(tmp_path) == [tmp_path / "3.npz"]
    assert len(Windows(tmp_path, device=CPU)) == 2


def test_compressed_and_fortran_ordered_chunks_are_read_alike(tmp_path):
    obs = np.random.default_rng(0).integers(256, size=(4, 64, 64, 3), dtype=np.uint8)
    np.savez_compressed(tmp_path / "0.npz", obs=obs)
    np.savez(tmp_path / "1.npz", obs=np.asfortranarray(obs))
    frames = Windows(tmp_path, device=CPU).frames
    np.testing.assert_array_equal(frames[:4], obs)
    np.testing.assert_array_equal(frames[4:], obs)


def test_only_the_first_chunks_are_read_when_limited(tmp_path):
    counting_chunks(tmp_path, {"0": 5, "1": 5, "2": 5})
    (tmp_path / "2.npz").write_bytes(b"never read")
    windows = Windows(tmp_path, device=CPU, limit=2)
    assert len(windows.frames) == 10
    assert windows.num_chunks == 2


def test_number_of_first_chunks_that_hold_enough_frames(tmp_path):
    counting_chunks(tmp_path, {"0": 5, "1": 5, "2": 5})
    assert [num_chunks_for(tmp_path, frames) for frames in (1, 5, 6, 15, 99)] == [1, 1, 2, 3, 3]


def test_configured_splits_and_what_is_printed_of_them(workplace, capsys):
    train, test = read_splits(workplace.config("--data.train_chunks", "1"), CPU)
    # 40 frames, an end at 20: the windows that hold frame 20 are left out.
    assert (len(train), len(test)) == (35, 35)
    assert not torch.equal(train.frames, test.frames)
    assert "train: 40 frames in 1 chunks, 35 windows, with true actions" in capsys.readouterr().out
    assert len(read_splits(workplace.config("--data.skip_resets", "false"), CPU)[0]) == 2 * 38
    held_out = workplace.data / workplace.GAME / "test"
    shutil.copy(held_out / "0.npz", held_out / "1.npz")
    for limits in ((2, 1), (1, 2)):
        options = ("--data.train_chunks", str(limits[0]), "--data.test_chunks", str(limits[1]))
        splits = read_splits(workplace.config(*options), CPU)
        assert [len(split) for split in splits] == [35 * number for number in limits]

    shutil.rmtree(workplace.data / workplace.GAME / "test")
    train, test = read_splits(workplace.config(), CPU)
    assert test is train
    assert "test: no such folder; evaluation uses the training windows" in capsys.readouterr().out


def test_chunks_that_the_configuration_leaves_out_are_told(workplace, capsys):
    write_game(workplace.data / workplace.GAME, chunks=5)
    read_splits(workplace.config("--data.train_chunks", "2"), CPU)
    told = "train: 3 of its 5 chunks are not used, as data.train_chunks is 2\n"
    assert told in capsys.readouterr().out
    cfg = workplace.config("--data.train_chunks", "2")
    for limit, expected in ((1, 0), (2, 0), (3, 1), (None, 1)):
        Windows.read(cfg, "train", CPU, limit)
        assert capsys.readouterr().out.count(told) == expected
    read_splits(workplace.config("--data.train_chunks", "5"), CPU)
    assert "not used" not in capsys.readouterr().out


# ---------------------------------------------------------------- order of batches


@pytest.fixture(scope="module")
def seventeen(tmp_path_factory) -> Path:
    """A folder with 17 windows in two chunks."""
    folder = tmp_path_factory.mktemp("seventeen")
    counting_chunks(folder, {"0": 12, "1": 9})
    return folder


@given(batch_size=st.integers(1, 40), seed=st.integers(0, 2**31 - 1))
def test_batches_cut_an_endless_row_of_exact_permutations(seventeen, batch_size, seed):
    windows = Windows(seventeen, device=CPU)
    steps = -(-4 * 17 // batch_size)
    batches = [windows.batch(step, batch_size, seed) for step in range(steps)]
    assert all(len(batch) == batch_size for batch in batches)
    row = torch.cat(batches)
    epochs = [row[17 * k : 17 * (k + 1)].tolist() for k in range(4)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(17))
    assert len({tuple(epoch) for epoch in epochs}) == 4  # each its own order


@given(count=st.integers(1, 30))
def test_windows_to_measure_are_spread_over_all(seventeen, count):
    ids = Windows(seventeen, device=CPU).evenly_spaced(count)
    assert len(ids) == min(count, 17)
    assert ids[0] == 0
    assert count == 1 or ids[-1] == 16
    gaps = ids.diff()
    assert count < 3 or gaps.max() - gaps.min() <= 1
    assert (gaps > 0).all()


@pytest.mark.parametrize("readers", [1, 3])
def test_host_memory_holds_as_many_decoded_chunks_as_there_are_readers(tmp_path, monkeypatch, readers):
    size = 1000
    for number in range(7):
        write_chunk(
            tmp_path / f"{number}.npz", np.zeros((size, 64, 64, 3), np.uint8), done=np.zeros(size, bool)
        )
    monkeypatch.setattr(chunks, "MAX_READERS", readers)
    tracemalloc.start()
    Windows(tmp_path, device=CPU)
    peak = tracemalloc.get_traced_memory()[1]  # torch's own memory is not traced
    tracemalloc.stop()
    assert peak < (readers + 0.5) * size * 64 * 64 * 3


def test_chunks_read_ahead_come_in_order_and_a_bad_one_in_its_turn(tmp_path):
    paths = [tmp_path / f"{number}.npz" for number in range(6)]
    for number, path in enumerate(paths):
        write_chunk(path, np.full((3, 64, 64, 3), number, np.uint8))
    paths[2].write_bytes(b"no zip file")
    seen = []
    for path, take in chunks.read_ahead(paths, readers=3):
        try:
            seen.append((path, int(take()["obs"].max())))
        except chunks.BadChunk as error:
            seen.append((path, str(error)))
    assert [path for path, _ in seen] == paths
    assert "is not a readable npz file" in seen[2][1]
    assert [found for _, found in seen if isinstance(found, int)] == [0, 1, 3, 4, 5]


def test_a_batch_depends_on_seed_and_step_alone(seventeen):
    first, second = Windows(seventeen, device=CPU), Windows(seventeen, device=CPU)
    in_order = [first.batch(step, 5, 0) for step in range(20)]
    torch.manual_seed(1234)
    for step in (19, 3, 11, 0, 3):
        torch.rand(7)
        assert torch.equal(second.batch(step, 5, 0), in_order[step])
    orders = [second.batch(0, 5, seed).tolist() for seed in (0, 1, 0)]  # one after the other
    assert orders[0] == orders[2] != orders[1]
    state = torch.get_rng_state()
    second.batch(40, 5, 0)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(torch.cat(in_order), torch.cat([first.batch(step, 5, 1) for step in range(20)]))


# ---------------------------------------------------------------- bad data


def good(frames: int = 5) -> dict[str, np.ndarray]:
    return {
        "obs": numbered_frames(np.arange(frames)),
        "ta": np.arange(frames) % 15,
        "done": np.zeros(frames, bool),
    }


def bad_chunk(kind: str, path: Path) -> None:
    """Write a chunk with the named fault."""
    arrays = good()
    trap = np.array([Trap(path.parent / "executed")] * 5, object)
    match kind:
        case "no obs":
            del arrays["obs"]
        case "wrong shape":
            arrays["obs"] = arrays["obs"][:, :32]
        case "no colours":
            arrays["obs"] = arrays["obs"][..., 0]
        case "wrong dtype":
            arrays["obs"] = arrays["obs"].astype(np.float32)
        case "two frames":
            arrays = good(2)
        case "negative ta":
            arrays["ta"] = arrays["ta"] - 2
        case "huge ta":
            arrays["ta"] = np.full(5, 2**63, np.uint64)
        case "float ta":
            arrays["ta"] = arrays["ta"].astype(np.float32)
        case "ta of wrong length":
            arrays["ta"] = arrays["ta"][:4]
        case "done of wrong length":
            arrays["done"] = arrays["done"][:3]
        case "done of wrong dtype":
            arrays["done"] = arrays["done"].astype(np.int64)
        case "pickled obs":
            arrays["obs"] = trap
        case "pickled ta":
            arrays["ta"] = trap
    np.savez(path, **arrays)
    content = path.read_bytes()
    match kind:
        case "empty":
            path.write_bytes(b"")
        case "truncated":
            path.write_bytes(content[: len(content) // 2])
        case "a bare array":
            np.save(path.with_suffix(".npy"), arrays["obs"])
            path.with_suffix(".npy").rename(path)
        case "text":
            path.write_text("these are no frames")
        case "flipped bits":
            damaged = bytearray(content)
            damaged[len(content) // 2] ^= 16
            path.write_bytes(damaged)
        case "a folder":
            path.unlink()
            path.mkdir()


FAULTS = {
    "no obs": "holds no array `obs`, found: done.npy, ta.npy",
    "wrong shape": "`obs` must be uint8 (N, 64, 64, 3), found uint8 (5, 32, 64, 3)",
    "no colours": "`obs` must be uint8 (N, 64, 64, 3), found uint8 (5, 64, 64)",
    "wrong dtype": "`obs` must be uint8 (N, 64, 64, 3), found float32",
    "two frames": "holds 2 frames; a chunk needs at least 3",
    "negative ta": "`ta` must lie in 0..255, found -2..2 (-1: unknown)",
    "huge ta": "`ta` must lie in 0..255, found",
    "float ta": "`ta` must be integers (5,), found float32",
    "ta of wrong length": "`ta` must be integers (5,), found int64 (4,)",
    "done of wrong length": "`done` must be bool (5,), found bool (3,)",
    "done of wrong dtype": "`done` must be bool (5,), found int64",
    "pickled obs": "`obs` must be uint8",
    "pickled ta": "`ta` must be integers",
    "empty": "is not a readable npz file",
    "truncated": "is not a readable npz file",
    "a bare array": "is not a readable npz file",
    "text": "is not a readable npz file",
    "flipped bits": "is not a readable npz file",
    "a folder": "is not a readable npz file",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_bad_chunk_is_named_with_its_fault(fault, tmp_path):
    counting_chunks(tmp_path, {"0": 5})
    bad_chunk(fault, tmp_path / "1.npz")
    with pytest.raises(UserError) as error:
        Windows(tmp_path, device=CPU)
    message = str(error.value)
    assert message.startswith(str(tmp_path / "1.npz"))
    assert FAULTS[fault] in message
    assert "\n" not in message
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("claim", [7, 9])
def test_a_header_that_claims_fewer_or_more_frames_than_stored_is_damage(claim, tmp_path):
    path = write_chunk(tmp_path / "0.npz", numbered_frames(np.arange(8)))
    content = path.read_bytes()
    assert content.count(b"'shape': (8,") == 1
    path.write_bytes(content.replace(b"'shape': (8,", f"'shape': ({claim},".encode()))
    with pytest.raises(
        BadChunk, match=rf"`obs` has 98304 bytes, its header says uint8 \({claim}, 64, 64, 3\)"
    ):
        Windows(tmp_path, device=CPU)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_damage_anywhere_is_found(save, tmp_path):
    """A file cut short, or with one wrong byte: a `BadChunk`, or the very arrays that were written."""
    path = tmp_path / "0.npz"
    save(path, **good())
    content = path.read_bytes()
    directory = content.index(b"PK\x01\x02")
    places = {*range(0, directory, len(content) // 100), *range(0, 200, 3)}
    cut = [content[: len(content) * tenth // 10] for tenth in range(10)]
    wrong = [content[:at] + bytes([content[at] ^ 85]) + content[at + 1 :] for at in places]
    found = 0
    for damaged in cut + wrong:
        path.write_bytes(damaged)
        try:
            read_header(path)
            np.testing.assert_equal(read_chunk(path), good())
        except BadChunk:
            found += 1
    assert found > 0.7 * len(cut + wrong)


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
def test_all_versions_of_npy_headers_are_read(version, tmp_path):
    with zipfile.ZipFile(tmp_path / "0.npz", "w") as archive:
        for name, array in good().items():
            with archive.open(f"{name}.npy", "w") as member:
                np.lib.format.write_array(member, array, version=version)
    assert read_header(tmp_path / "0.npz") == 5
    np.testing.assert_equal(read_chunk(tmp_path / "0.npz"), good())


def test_reading_does_not_parse_python(tmp_path, monkeypatch):
    """NumPy parses headers with `ast`, which fails now and then in the threads of `read_ahead`."""
    write_chunk(tmp_path / "0.npz", **good())
    monkeypatch.setattr(ast, "literal_eval", lambda text: pytest.fail("parsed"))
    assert len(Windows(tmp_path, device=CPU)) == 3


def test_missing_and_empty_folders_say_how_to_get_data(tmp_path):
    folder = tmp_path / "bigfish" / "train"
    with pytest.raises(
        UserError, match=r"train does not exist; make it with .*record_expert.py --env bigfish"
    ):
        Windows(folder, device=CPU)
    chunk = write_chunk(folder.parent / "7.npz", numbered_frames(np.arange(5)))
    with pytest.raises(UserError, match=r"train does not exist, but .*bigfish itself holds 7\.npz; move"):
        Windows(folder, device=CPU)
    chunk.unlink()
    folder.mkdir(parents=True)
    with pytest.raises(UserError, match=r"train holds no chunk \(<number>.npz\).*setup_data.sh bigfish"):
        Windows(folder, device=CPU)
    for number in range(5):
        (folder / f"episode_{number}.npz").touch()
    with pytest.raises(UserError) as error:
        Windows(folder, device=CPU)
    assert str(error.value) == (
        f"the data folder {folder} holds no chunk (<number>.npz), but episode_0.npz, episode_1.npz,"
        " episode_2.npz and 2 more (ignored); rename what holds frames to <number>.npz"
    )


READ_ERRORS = {
    "Permission denied": PermissionError(errno.EACCES, "Permission denied"),
    "Input/output error": OSError(errno.EIO, "Input/output error"),
    "Too many open files": OSError(errno.EMFILE, "Too many open files"),
    "too little memory": MemoryError(),
}


@pytest.mark.parametrize("kind", [Windows, partial(RollingWindows, pool_chunks=1)])
@pytest.mark.parametrize("reason", READ_ERRORS)
def test_what_keeps_a_chunk_from_being_read_is_not_called_damage(reason, kind, tmp_path, monkeypatch):
    """Nor is such a chunk left out, even where bad ones may be."""
    counting_chunks(tmp_path, {"0": 5, "1": 5, "2": 5})
    bad_chunk("flipped bits", tmp_path / "0.npz")
    open_zip = zipfile.ZipFile

    def failing(path: Path) -> zipfile.ZipFile:
        if path.name == "1.npz":
            raise READ_ERRORS[reason]
        return open_zip(path)

    monkeypatch.setattr(zipfile, "ZipFile", failing)
    for read in (partial(kind, device=CPU, skip_bad=True), partial(num_chunks_for, frames=9, skip_bad=True)):
        with pytest.raises(UserError) as error:
            read(tmp_path)
        assert str(error.value).startswith(
            f"{tmp_path / '1.npz'} could not be read ({reason}); it may be intact"
        )
        assert "delete" not in str(error.value)
        assert not isinstance(error.value, BadChunk)


def test_a_folder_that_may_not_be_listed_is_not_taken_for_empty(tmp_path, monkeypatch):
    def refused(folder: Path) -> list[str]:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "listdir", refused)
    with pytest.raises(UserError, match=rf"^{tmp_path} could not be read \(Permission denied\)"):
        find_chunks(tmp_path)


def test_frames_for_which_less_memory_is_allowed_than_free_get_a_sentence(tmp_path, monkeypatch):
    counting_chunks(tmp_path, {"0": 50})

    def refuse(*shape, **options):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 614400 bytes")

    monkeypatch.setattr(torch, "empty", refuse)
    with pytest.raises(UserError, match=r"too little memory for its 50 frames, .*lower data\.train_chunks"):
        Windows(tmp_path, device=CPU)


def test_data_in_which_every_window_touches_an_episodes_end_is_refused(tmp_path):
    counting_chunks(tmp_path, {"0": 6}, done=lambda size: np.arange(size) % 3 == 2)
    with pytest.raises(UserError, match="every window of its 6 frames touches an episode's end"):
        Windows(tmp_path, device=CPU)


def test_frames_that_do_not_fit_are_refused_before_they_are_read(tmp_path, monkeypatch):
    counting_chunks(tmp_path, {"0": 50, "1": 50})
    monkeypatch.setattr("lapo.data.windows.free_bytes", lambda device: 1_000_000)
    with pytest.raises(UserError, match=r"100 frames need 0.0 GB on cpu.*lower data.train_chunks"):
        Windows(tmp_path, device=CPU)


# ---------------------------------------------------------------- going on without bad chunks


@pytest.mark.parametrize("fault", ["wrong dtype", "truncated", "flipped bits", "huge ta"])
def test_a_bad_chunk_is_left_out_named_and_counted_where_that_is_allowed(fault, tmp_path, capsys):
    """Whether its headers or only its content is bad, what remains is what a folder without it gives."""
    ends = {"done": lambda size: np.arange(size) % 7 == 4}
    for folder in (tmp_path / "all", tmp_path / "good"):
        counting_chunks(folder, {"0": 5, "2": 16, "3": 9}, **ends)
    bad_chunk(fault, tmp_path / "all" / "1.npz")
    good_ones = Windows(tmp_path / "good", device=CPU)
    assert capsys.readouterr().err == ""

    windows = Windows(tmp_path / "all", device=CPU, skip_bad=True)
    for name in ("frames", "starts", "ta"):
        assert torch.equal(getattr(windows, name), getattr(good_ones, name)), name
    assert torch.equal(windows.batch(1, 5, 0), good_ones.batch(1, 5, 0))
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"skipped: {tmp_path / 'all' / '1.npz'}")
    assert FAULTS[fault] in line
    assert windows.summary().startswith("30 frames in 3 chunks (1 bad skipped), 14 windows, with true")


def test_no_good_chunk_at_all_is_refused(tmp_path):
    for number, fault in enumerate(["no obs", "flipped bits"]):
        bad_chunk(fault, tmp_path / f"{number}.npz")
    with pytest.raises(UserError, match=f"{tmp_path}: all of its 2 chunks are bad; .* --check {tmp_path}`"):
        Windows(tmp_path, device=CPU, skip_bad=True)


def test_bad_chunks_hold_no_frames_when_the_first_enough_are_chosen(tmp_path):
    counting_chunks(tmp_path, {"1": 5, "3": 5, "4": 5})
    bad_chunk("no obs", tmp_path / "0.npz")
    bad_chunk("flipped bits", tmp_path / "2.npz")
    assert [num_chunks_for(tmp_path, frames, True) for frames in (5, 6, 10, 11, 99)] == [2, 4, 4, 5, 5]
    with pytest.raises(UserError, match=r"0\.npz holds no array `obs`"):
        num_chunks_for(tmp_path, 5)


def test_the_configuration_says_whether_bad_chunks_are_left_out(workplace, capsys):
    train = workplace.data / workplace.GAME / "train"
    bad_chunk("flipped bits", train / "0.npz")
    with pytest.raises(UserError, match=r"train/0\.npz is not a readable npz file"):
        read_splits(workplace.config(), CPU)
    windows, _ = read_splits(workplace.config("--data.skip_bad_chunks", "true"), CPU)
    assert torch.equal(windows.frames, Windows(train.parent / "train", device=CPU, skip_bad=True).frames)
    assert "train: 40 frames in 1 chunks (1 bad skipped), 35 windows" in capsys.readouterr().out


@pytest.mark.parametrize("key", ["ta", "done"])
def test_an_array_whose_name_is_damaged_in_the_zip_directory_is_not_taken_for_missing(tmp_path, key):
    """Without `done`, windows would span episodes."""
    obs = np.zeros((5, 64, 64, 3), np.uint8)
    path = write_chunk(tmp_path / "0.npz", obs, ta=np.zeros(5, np.int64), done=np.zeros(5, bool))
    content = path.read_bytes()
    at = content.rindex(f"{key}.npy".encode())  # the directory is at the end
    path.write_bytes(content[:at] + b"x" + content[at + 1 :])
    with pytest.raises(UserError, match=r"is not a readable npz file .*differ"):
        Windows(tmp_path, device=CPU)


@pytest.mark.parametrize(("frame", "known"), [(0, False), (1, True), (8, True), (9, False)])
def test_true_actions_count_only_where_a_window_has_its_middle(tmp_path, frame, known):
    """Those of an episode's first and last frame serve nothing."""
    ta = np.full(10, UNKNOWN)
    ta[frame] = 3
    write_chunk(tmp_path / "0.npz", np.zeros((10, 64, 64, 3), np.uint8), ta=ta)
    windows = Windows(tmp_path, device=CPU)
    assert (windows.ta is not None) == known
    if known:
        assert windows.actions(windows.labelled()).tolist() == [3]
