"""import_video.py and video.py: real clips, a real command line, and stages that train on the result."""

import json
import shlex
import subprocess
import sys
import wave
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import PIL
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from lapo import import_video, stage2_bc, stage3_decode
from lapo.data.chunks import find_chunks, read_header, window_starts
from lapo.data.clips import checksum, shrink
from lapo.errors import UserError
from lapo.import_video import Split
from lapo.runs.checkpoints import load_checkpoint
from support import LAPO, PATIENCE, ROOT, Workplace, numbered_frames, read_numbers


def write_video(path: Path, frames: np.ndarray, codec: str, pix_fmt: str, rotation: int = 0) -> Path:
    """Frames (N, H, W, 3) as a video file, with a note for players to turn them by `rotation` degrees."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=Fraction(30))
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], pix_fmt
        if rotation:
            stream.set_display_rotation(rotation)
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return path


def write_images(folder: Path, frames: np.ndarray) -> Path:
    """Frames (N, H, W, 3) as PNGs 0.png, 1.png, ..., 10.png, ..."""
    folder.mkdir()
    for number, frame in enumerate(frames):
        Image.fromarray(frame).save(folder / f"{number}.png")
    return folder


def grey(levels: np.ndarray, height: int = 16, width: int = 24) -> np.ndarray:
    """Frames (N, height, width, 3), each of one level of grey."""
    return np.broadcast_to(np.uint8(levels)[:, None, None, None], (len(levels), height, width, 3))


def moving_square(num_frames: int) -> np.ndarray:
    """A white square that crosses a dark field: (N, 72, 96, 3)."""
    frames = np.full((num_frames, 72, 96, 3), 40, np.uint8)
    for t, frame in enumerate(frames):
        frame[24:48, t % 72 : t % 72 + 24] = 255
    return frames


def run(data_dir: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """The real command line, from another working directory; the name is mygame."""
    command = [sys.executable, str(LAPO / "import_video.py"), "--env", "mygame", "--data-dir", str(data_dir)]
    return subprocess.run(
        [*command, *map(str, arguments)],
        cwd=data_dir.parent,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )


@pytest.fixture
def importing(tmp_path, monkeypatch):
    """`main` on a command line, in this process: gives the folder of the data set."""

    def call(*arguments: str | Path, env: str = "mygame") -> Path:
        data_dir = tmp_path / "data"
        argv = ["import_video.py", "--env", env, "--data-dir", str(data_dir), *map(str, arguments)]
        monkeypatch.setattr(sys, "argv", argv)
        import_video.main()
        return data_dir / env

    return call


def read(folder: Path) -> dict[str, np.ndarray]:
    """All chunks of a split, one after the other."""
    chunks = [dict(np.load(path)) for path in find_chunks(folder)]
    return {key: np.concatenate([chunk[key] for chunk in chunks]) for key in ("obs", "done")}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ---------------------------------------------------------------- from clips to stages 1 and 2


@pytest.mark.slow
def test_an_mp4_a_gif_and_images_train_stages_1_and_2(tmp_path):
    frames = moving_square(60)
    mp4 = write_video(tmp_path / "clip.mp4", frames, "mpeg4", "yuv420p")
    pictures = [Image.fromarray(frame) for frame in frames]
    pictures[0].save(tmp_path / "walk.gif", save_all=True, append_images=pictures[1:], loop=0)
    images = write_images(tmp_path / "shots", frames)

    place = Workplace(tmp_path)
    done = run(place.data, mp4, tmp_path / "walk.gif", images)
    assert done.returncode == 0, done.stderr
    assert "train: 162 frames in 3 shots\ntest: 18 frames in 3 shots\n" in done.stdout
    command = shlex.split(done.stdout.splitlines()[-1].split(" is ready: ")[1])
    assert command == ["bash", "launch.sh", "mygame", "--stages", "1,2", "--data-dir", str(place.data)]

    # The three are the same pictures, but for what compression loses.
    obs = read(place.data / "mygame/train")["obs"]
    np.testing.assert_array_equal(obs[54:108], obs[108:])
    assert np.abs(obs[:54].astype(int) - obs[108:]).mean() < 4

    done = place.run("stage1.py", "--env", "mygame")
    assert done.returncode == 0, done.stderr
    assert "train: 162 frames in 1 chunks, 153 windows, without true actions" in done.stdout
    stage2_bc.train(place.config("--env", "mygame"))
    assert load_checkpoint(place.results / "main/mygame/seed0/stage2/checkpoint.pt")["finished"]
    for mode, sentence in (
        ("online", "learns by playing, and 'mygame' is not a Procgen game"),
        ("offline", "holds no true actions `ta`, which mode offline learns from; import them"),
    ):
        with pytest.raises(UserError, match=sentence):
            stage3_decode.train(place.config("--env", "mygame", "--stage3.mode", mode))


@pytest.mark.slow
def test_equal_clips_give_equal_files_and_a_finished_import_is_left_alone(tmp_path):
    clip = write_video(tmp_path / "clip.mp4", moving_square(40), "mpeg4", "yuv420p")
    expected = None
    for name in ("a", "b"):
        # As a killed import leaves it.
        leftover = tmp_path / name / ".mygame.partial/train/0.npz"
        leftover.parent.mkdir(parents=True)
        leftover.write_bytes(b"half a chunk")
        assert run(tmp_path / name, clip).returncode == 0
        found = contents(tmp_path / name)
        assert sorted(found) == ["mygame/dataset.json", "mygame/test/0.npz", "mygame/train/0.npz"]
        assert expected in (None, found)
        expected = found
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "a").rglob("*")}
    again = run(tmp_path / "a", clip)
    assert again.returncode == 0
    assert "nothing to do" in again.stdout
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "a").rglob("*")} == times


def test_the_record_says_how_the_data_were_made(tmp_path, importing):
    clip = write_images(tmp_path / "shots", grey(np.arange(50)))
    folder = importing(clip, "--crop", "1", "2", "8", "4", "--frame-skip", "2", "--test-share", "0.2")
    record = json.loads((folder / "dataset.json").read_text())
    size = sum(path.stat().st_size for path in clip.iterdir())
    assert record.pop("versions").items() >= {"av": av.__version__, "pillow": PIL.__version__}.items()
    assert record == {
        "sources": [{"name": "shots", "bytes": size, "crc32": checksum(clip)}],
        "actions": None,
        "crop": [1, 2, 8, 4],
        "image_size": 64,
        "frame_skip": 2,
        "test_share": 0.2,
        "cut_threshold": 35.0,
        "decoded": [50],
        "train": {"frames": 20, "shots": 1, "chunks": 1, "left_out": 0},
        "test": {"frames": 5, "shots": 1, "chunks": 1, "left_out": 0},
    }


# ---------------------------------------------------------------- pixels


def block_means(frames: np.ndarray) -> np.ndarray:
    """(N, 64 · a, 64 · b, 3) → (N, 64, 64, 3): means of blocks of a × b pixels."""
    count, height, width, _ = frames.shape
    return frames.reshape(count, 64, height // 64, 64, width // 64, 3).mean((2, 4))


def test_frames_are_block_means_in_the_order_of_their_numbers(tmp_path, importing):
    frames = np.random.default_rng(0).integers(256, size=(12, 128, 192, 3), dtype=np.uint8)
    clip = write_images(tmp_path / "shots", frames)
    (clip / "notes.txt").write_text("no image")
    obs = read(importing(clip, "--test-share", "0") / "train")["obs"]
    assert np.abs(obs - block_means(frames)).max() <= 0.5


def test_a_lossless_video_gives_the_same_frames(tmp_path, importing):
    frames = np.random.default_rng(0).integers(256, size=(12, 128, 192, 3), dtype=np.uint8)
    clip = write_video(tmp_path / "clip.mkv", frames, "ffv1", "bgr0")
    obs = read(importing(clip, "--test-share", "0") / "train")["obs"]
    assert np.abs(obs - block_means(frames)).max() <= 0.5


@given(
    height=st.integers(1, 150),
    width=st.integers(1, 150),
    size=st.sampled_from([8, 32, 64]),
    seed=st.integers(0, 9),
)
def test_shrinking_is_the_mean_of_the_covered_area(height, width, size, seed):
    rgb = np.random.default_rng(seed).integers(256, size=(height, width, 3), dtype=np.uint8)
    # Every pixel is cut into S × S, so that each target pixel covers whole ones: a block of H × W.
    rows = rgb.repeat(size, axis=0).reshape(size, height, width, 3).mean(1)
    means = rows.repeat(size, axis=1).reshape(size, size, width, 3).mean(2)
    obs = shrink(rgb, size)
    assert obs.dtype == np.uint8
    assert np.abs(obs - means).max() <= 0.5 + 1e-9


def test_crop_is_given_in_pixels_of_the_source(tmp_path, importing):
    frames = np.random.default_rng(0).integers(256, size=(6, 80, 100, 3), dtype=np.uint8)
    clip = write_images(tmp_path / "shots", frames)
    options = ("--crop", "30", "10", "64", "64", "--test-share", "0", "--cut-threshold", "255")
    obs = read(importing(clip, *options) / "train")["obs"]
    np.testing.assert_array_equal(obs, frames[:, 10:74, 30:94])


def test_a_turned_video_is_turned_back_before_it_is_cropped(tmp_path, importing):
    frames = np.zeros((8, 64, 128, 3), np.uint8)
    frames[:, :32, :32] = 255  # the upper left corner, which a quarter turn to the left puts below
    clip = write_video(tmp_path / "clip.mp4", frames, "mpeg4", "yuv420p", rotation=90)
    obs = read(importing(clip, "--crop", "0", "96", "32", "32", "--test-share", "0") / "train")["obs"]
    assert obs.mean() > 250


# ---------------------------------------------------------------- frames


def test_frame_skip_counts_from_the_first_frame_of_every_clip(tmp_path, importing):
    clips = [write_images(tmp_path / name, grey(np.arange(n))) for name, n in (("a", 14), ("b", 12))]
    chunk = read(importing(*clips, "--frame-skip", "3", "--test-share", "0") / "train")
    assert chunk["obs"][:, 0, 0, 0].tolist() == [0, 3, 6, 9, 12, 0, 3, 6, 9]
    assert np.flatnonzero(chunk["done"]).tolist() == [4, 8]


def test_cuts_end_shots_and_the_end_of_every_clip_is_held_out(tmp_path, importing):
    levels = [10, 10, 10, 10, 10, 60, 60, 60, 60, 30, 30, 30, 30, 90, 90, 90, 90, 90, 90, 90]
    clip = write_images(tmp_path / "shots", grey(np.array(levels)))
    folder = importing(clip, "--test-share", "0.25")
    train, test = read(folder / "train"), read(folder / "test")
    assert train["obs"][:, 0, 0, 0].tolist() == levels[:13]  # two frames before the held-out part are no shot
    assert np.flatnonzero(train["done"]).tolist() == [4, 12]
    assert test["obs"][:, 0, 0, 0].tolist() == [90] * 5
    assert np.flatnonzero(test["done"]).tolist() == [4]


def test_without_threshold_there_are_no_cuts(tmp_path, importing):
    clip = write_images(tmp_path / "shots", grey(np.tile([0, 255], 5)))
    chunk = read(importing(clip, "--test-share", "0", "--cut-threshold", "255") / "train")
    assert np.flatnonzero(chunk["done"]).tolist() == [9]


@given(shots=st.lists(st.integers(1, 9), min_size=1, max_size=12), chunk_frames=st.integers(6, 200))
def test_windows_lie_within_a_shot_and_none_is_lost(tmp_path_factory, shots, chunk_frames):
    folder = tmp_path_factory.mktemp("split") / "train"
    split = Split(folder, chunk_frames, 64)
    number, whole = 0, []
    for length in shots:
        for frame in numbered_frames(np.arange(number, number + length)):
            split.add(frame)
        split.end_shot()
        # The loader leaves out windows that touch the mark on a shot's last frame.
        whole += range(number, number + length - 3)
        number += length + 1000
    split.flush()

    found, frames = [], 0
    for path in find_chunks(folder) if split.chunks else []:
        chunk = dict(np.load(path))
        assert read_header(path) == len(chunk["obs"]) <= chunk_frames
        numbers = read_numbers(chunk["obs"])
        starts = window_starts(chunk["done"], len(numbers), skip_resets=True, window=3)
        assert len(starts)
        for start in starts:
            assert numbers[start : start + 3].tolist() == list(range(numbers[start], numbers[start] + 3))
        found += numbers[starts].tolist()
        frames += len(numbers)
    assert frames == split.frames == sum(shots) - split.left_out
    assert set(found) <= set(whole)
    if sum(shots) <= chunk_frames:
        assert found == whole


def test_long_clips_fill_several_chunks(tmp_path, importing, monkeypatch):
    monkeypatch.setattr(import_video, "CHUNK_FRAMES", {"train": 16, "test": 8})
    clip = write_images(tmp_path / "shots", grey(np.arange(50)))
    folder = importing(clip, "--test-share", "0.2")
    assert [read_header(path) for path in find_chunks(folder / "train")] == [16, 16, 8]
    assert [read_header(path) for path in find_chunks(folder / "test")] == [8]
    chunk = read(folder / "train")
    assert chunk["obs"][:, 0, 0, 0].tolist() == list(range(40))
    assert np.flatnonzero(chunk["done"]).tolist() == [39]


def test_short_clips_are_held_out_whole_in_proportion(tmp_path, importing, capsys):
    clips = [write_images(tmp_path / str(k), grey(np.arange(12) + 20 * k)) for k in range(12)]
    folder = importing(*clips)
    levels = read(folder / "train")["obs"][:, 0, 0, 0], read(folder / "test")["obs"][:, 0, 0, 0]
    # A tenth of 12 clips is 1.2; the first is due once half a clip is.
    assert sorted({int(level) // 20 for level in levels[1]}) == [4]
    assert [len(found) for found in levels] == [11 * 12, 12]
    assert "no held-out frames" not in capsys.readouterr().out


def test_clips_of_both_lengths_hold_out_what_is_asked_for(tmp_path, importing):
    lengths = (12, 60, 12, 12, 12, 12)
    clips = [write_images(tmp_path / str(k), grey(np.arange(n))) for k, n in enumerate(lengths)]
    folder = importing(*clips, "--frame-skip", "2", "--test-share", "0.2")
    assert len(read(folder / "test")["obs"]) == 6 + 6  # of the long clip, and one of five short ones
    assert len(read(folder / "train")["obs"]) == 24 + 4 * 6


def test_that_nothing_is_held_out_is_printed(tmp_path, importing, capsys):
    importing(write_images(tmp_path / "shots", grey(np.arange(20))))
    assert "there are no held-out frames: they need 4 kept frames at a clip's end" in capsys.readouterr().out
    importing(tmp_path / "shots", "--test-share", "0", env="other")
    assert "held-out" not in capsys.readouterr().out


def test_notes_on_a_clip_are_printed(tmp_path, importing, capsys):
    film = write_video(tmp_path / "film.flv", moving_square(60), "flv", "yuv420p")
    film.write_bytes(film.read_bytes()[: film.stat().st_size // 2])
    importing(film)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{film} ends early: it may be truncated; the part that is there was read (")


# ---------------------------------------------------------------- where it goes


def test_one_import_at_a_time(tmp_path, importing):
    clip = write_images(tmp_path / "shots", grey(np.arange(20)))
    data = tmp_path / "data"
    # As another process has it: locks of one process do not hold each other up.
    code = f"""
import sys
from pathlib import Path
from lapo.runs.files import folder_lock
with folder_lock(Path({str(data / "mygame")!r}), "importing"):
    print("locked", flush=True)
    sys.stdin.read()
"""
    command = [sys.executable, "-c", code]
    with subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline() == "locked\n"
        partial = data / ".mygame.partial"
        partial.mkdir()
        with pytest.raises(UserError, match=r"another process is importing into .*mygame; wait for it"):
            importing(clip)
        assert partial.exists()  # the other one's
        other.stdin.close()
        assert other.wait(PATIENCE) == 0
    assert len(read(importing(clip) / "train")["obs"]) == 20
    assert sorted(path.name for path in data.iterdir()) == ["mygame"]


def test_who_waited_for_the_same_import_has_nothing_to_do(tmp_path, importing, monkeypatch, capsys):
    clip = write_images(tmp_path / "shots", grey(np.arange(20)))
    folder = importing(clip)
    before, answers = contents(folder), iter([False, True])
    monkeypatch.setattr(import_video, "is_finished", lambda *_: next(answers))
    importing(clip)  # finished between the first look and the lock
    assert "nothing to do" in capsys.readouterr().out
    assert contents(folder) == before


@pytest.mark.parametrize("there", [True, False])
def test_the_target_may_be_a_link(tmp_path, importing, there):
    clip = write_images(tmp_path / "shots", grey(np.arange(50)))
    disk = tmp_path / "disk" / "frames"
    if there:
        (disk / "lost+found").mkdir(parents=True)
        (disk / ".DS_Store").touch()
    (tmp_path / "data").mkdir()
    (tmp_path / "data/mygame").symlink_to(disk)
    importing(clip)
    expected = {"train/0.npz", "test/0.npz", "dataset.json"} | ({".DS_Store"} if there else set())
    assert contents(disk).keys() == expected
    assert (tmp_path / "data/mygame").is_symlink()
    assert [path.name for path in disk.parent.iterdir()] == ["frames"]


# ---------------------------------------------------------------- mistakes


def noise_file(path: Path) -> Path:
    path.write_bytes(np.random.default_rng(0).bytes(5000))
    return path


def sound(path: Path) -> Path:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1), file.setsampwidth(2), file.setframerate(8000)
        file.writeframes(bytes(8000))
    return path


def truncated_video(path: Path) -> Path:
    write_video(path, moving_square(20), "mpeg4", "yuv420p")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path


def frameless_video(path: Path) -> Path:
    """A file with a video stream and nothing in it: header, logical screen, trailer."""
    path.write_bytes(b"GIF89a\x10\x00\x10\x00\x00\x00\x00;")
    return path


def damaged_image(folder: Path) -> Path:
    write_images(folder, grey(np.arange(12), 80, 80))
    (folder / "10.png").write_bytes((folder / "10.png").read_bytes()[:-30])
    return folder


def damaged_jpeg(folder: Path) -> Path:
    folder.mkdir()
    noise = np.random.default_rng(0).integers(256, size=(80, 80, 3), dtype=np.uint8)
    for number in range(13):
        Image.fromarray(noise).save(folder / f"{number}.jpg")
    (folder / "12.jpg").write_bytes((folder / "12.jpg").read_bytes()[:2000])
    return folder


def smaller_image(folder: Path) -> Path:
    write_images(folder, grey(np.arange(12), 80, 80))
    Image.fromarray(grey(np.arange(1))[0]).save(folder / "10.png")
    return folder


def empty_folder(path: Path) -> Path:
    path.mkdir()
    return path


@pytest.mark.parametrize(
    ("make", "name", "complaint"),
    [
        (lambda path: path, "absent.mp4", "absent.mp4 does not exist"),
        (noise_file, "noise.mp4", "noise.mp4 cannot be decoded"),
        (lambda path: path.touch() or path, "empty.mp4", "empty.mp4 cannot be decoded"),
        (truncated_video, "truncated.mp4", "truncated.mp4 holds no video, or is truncated"),
        (sound, "sound.wav", "sound.wav holds no video"),
        (frameless_video, "frameless.gif", "frameless.gif"),
        (empty_folder, "folder", "folder holds no picture (.png, "),
        (damaged_image, "folder", "folder/10.png cannot be decoded"),
        (damaged_jpeg, "folder", "folder/12.jpg cannot be decoded"),
        (smaller_image, "folder", "--crop 0 0 20 20 (x, y, width, height) does not lie within"),
        (
            lambda path: write_images(path, grey(np.arange(3), 20, 20)),
            "folder",
            "there are no training frames",
        ),
    ],
)
def test_a_bad_clip_is_named_and_nothing_is_left_behind(tmp_path, importing, make, name, complaint):
    good = write_images(tmp_path / "good", grey(np.tile([0, 100], 10), 20, 20))
    clip = make(tmp_path / name)
    with pytest.raises(UserError) as error:
        importing(good, clip, "--crop", "0", "0", "20", "20")
    assert complaint in str(error.value)
    assert not any((tmp_path / "data").glob("*"))


@pytest.mark.parametrize(
    "crop",
    [(0, 0, 25, 16), (0, 0, 24, 17), (-1, 0, 5, 5), (0, -1, 5, 5), (0, 0, 0, 5), (0, 0, 5, 0), (24, 0, 1, 1)],
)
def test_an_impossible_crop_says_how_large_the_frames_are(tmp_path, importing, crop):
    clip = write_images(tmp_path / "shots", grey(np.arange(8)))
    with pytest.raises(UserError, match=r"does not lie within the frames of .*shots, 24 × 16 pixels"):
        importing(clip, "--crop", *map(str, crop))


@pytest.mark.parametrize(
    ("arguments", "env", "complaint"),
    [
        ([], "maze", "'maze' is a Procgen game; choose another name, such as mymaze"),
        ([], "../maze", "'env' is '../maze'"),
        (["--frame-skip", "0"], "mygame", "--frame-skip is 0"),
        (["--test-share", "1"], "mygame", "--test-share is 1.0"),
        (["--cut-threshold", "-1"], "mygame", "--cut-threshold is -1.0"),
    ],
)
def test_impossible_options_are_refused(tmp_path, importing, arguments, env, complaint):
    clip = write_images(tmp_path / "shots", grey(np.arange(8)))
    with pytest.raises(UserError) as error:
        importing(clip, *arguments, env=env)
    assert complaint in str(error.value)


@pytest.mark.slow
def test_a_mistake_is_one_line_on_the_command_line(tmp_path):
    for arguments, complaint in (([], "no clip is given"), (["absent.mp4"], "absent.mp4 does not exist")):
        result = run(tmp_path / "data", *arguments)
        assert result.returncode == 2
        assert result.stderr.startswith(f"error: {complaint}")
        assert result.stderr.count("\n") == 1


def test_other_data_are_never_overwritten(tmp_path, importing):
    clip = write_images(tmp_path / "shots", grey(np.arange(20)))
    folder = importing(clip)
    before = contents(folder)
    with pytest.raises(UserError, match="was imported with frame_skip 1, not 2; choose another --env"):
        importing(clip, "--frame-skip", "2")
    Image.fromarray(grey(np.arange(1))[0]).save(clip / "20.png")
    with pytest.raises(UserError, match="was imported from other clips"):
        importing(clip)
    (clip / "20.png").unlink()
    importing(clip)
    # Another picture of as many bytes, and the same pictures in another order.
    pictures = [clip / f"{number}.png" for number in (3, 4)]
    contents_of = [picture.read_bytes() for picture in pictures]
    assert len(contents_of[0]) == len(contents_of[1])
    pictures[0].write_bytes(contents_of[1])
    with pytest.raises(UserError, match="or from clips of the same names"):
        importing(clip)
    pictures[1].write_bytes(contents_of[0])
    with pytest.raises(UserError, match="or from clips of the same names"):
        importing(clip)
    for picture, content in zip(pictures, contents_of, strict=True):
        picture.write_bytes(content)
    (clip / "19.png").rename(clip / "21.png")
    with pytest.raises(UserError, match="or from clips of the same names"):
        importing(clip)
    (clip / "21.png").rename(clip / "19.png")
    importing(clip)
    assert contents(folder) == before

    (folder / "dataset.json").unlink()
    before = contents(folder)
    with pytest.raises(UserError, match="mygame already holds something else"):
        importing(clip)
    assert contents(folder) == before
