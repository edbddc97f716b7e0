"""True actions beside one's own videos: `import_video.py --actions`, and what every stage makes of them."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import lapo
from lapo import stage1_idm_wm, stage2_bc, stage3_decode
from lapo.data.checks import action_names
from lapo.data.chunks import UNKNOWN, find_chunks
from lapo.data_loader import Shared, Windows
from lapo.errors import UserError
from lapo.imitation import labelled
from lapo.reporting.inspection import Inspection
from lapo.runs.checkpoints import load_checkpoint, saved_config
from lapo.runs.compute import Compute
from support import LAPO, PATIENCE, Workplace

CPU = torch.device("cpu")
NAMES = ["hold, still", "left", "right"]


def write_walk(folder: Path, frames: int, seed: int) -> np.ndarray:
    """Pictures of a square that walks, as 0.png, 1.png, ...; returns its actions (frames,)."""
    folder.mkdir()
    rng = np.random.default_rng(seed)
    actions, x = rng.integers(3, size=frames), 30
    for t, action in enumerate(actions):
        picture = np.full((64, 64, 3), 30, np.uint8)
        picture[20:40, x : x + 12] = 240
        Image.fromarray(picture).save(folder / f"{t}.png")
        x = int(np.clip(x + (0, -6, 6)[action], 0, 52))
    return actions


def write_actions(path: Path, actions: dict[str, dict[int, int]]) -> Path:
    rows = [f'{clip},{t},"{NAMES[a]}"' for clip, known in actions.items() for t, a in known.items()]
    path.write_text("\n".join(["clip,frame,action", *rows, ""]))
    return path


@pytest.fixture
def walks(tmp_path):
    """A place of work, two clips, and all of their actions."""
    place = Workplace(tmp_path)
    actions = {name: write_walk(tmp_path / name, 150, seed) for seed, name in enumerate(("one", "two"))}
    return place, [tmp_path / "one", tmp_path / "two"], actions


def import_walks(
    place: Workplace, clips: list[Path], *options: str | Path
) -> subprocess.CompletedProcess[str]:
    """The real command line."""
    places = "--env", "walk", "--data-dir", place.data
    command = [sys.executable, LAPO / "import_video.py", *clips, *places, "--cut-threshold", "255", *options]
    return subprocess.run(
        list(map(str, command)), cwd=place.folder, capture_output=True, text=True, timeout=PATIENCE
    )


def read_ta(folder: Path) -> np.ndarray:
    return np.concatenate([np.load(path)["ta"] for path in find_chunks(folder)])


def test_labels_lie_at_their_frames(walks):
    place, clips, actions = walks
    known = {"two": {t: int(actions["two"][t]) for t in (0, 7, 8, 140)}}
    done = import_walks(place, clips, "--actions", write_actions(place.folder / "a.csv", known))
    assert done.returncode == 0, done.stderr
    assert "train: 270 frames in 2 shots, 3 with actions\ntest: 30 frames in 2 shots, 1 with" in done.stdout
    names = sorted({NAMES[action] for action in known["two"].values()})
    folder = place.data / "walk"
    assert action_names(folder) == names
    expected = np.full(300, UNKNOWN)
    for t, action in known["two"].items():
        expected[150 + t] = names.index(NAMES[action])
    train, test = np.r_[0:135, 150:285], np.r_[135:150, 285:300]
    assert np.array_equal(read_ta(folder / "train"), expected[train])
    assert np.array_equal(read_ta(folder / "test"), expected[test])
    record = json.loads((folder / "dataset.json").read_text())
    assert (record["train"]["labels"], record["test"]["labels"]) == (3, 1)

    # Windows know which of them are labelled; the last frame of a shot begins none.
    windows = Windows(folder / "train", device=CPU)
    ids = windows.labelled()
    current = windows.frame_index(ids) + 1
    assert current.tolist() == [135 + 7, 135 + 8]  # frame 0 has no frame before it
    assert windows.actions(ids).tolist() == expected[[157, 158]].tolist()
    assert windows.evenly_spaced(1, ids).tolist() == ids[:1].tolist()
    assert "2 of them with true actions" in windows.summary()


def test_other_labels_are_another_data_set_of_the_same_frames(walks):
    place, clips, actions = walks
    first = write_actions(place.folder / "a.csv", {"one": {3: int(actions["one"][3])}})
    assert import_walks(place, clips, "--actions", first).returncode == 0
    frames = [np.load(path)["obs"] for path in find_chunks(place.data / "walk/train")]
    for options in ((), ("--actions", write_actions(place.folder / "b.csv", {"one": {4: 0}}))):
        done = import_walks(place, clips, *options)
        assert done.returncode == 2
        assert "was imported with other labels or none; delete it" in done.stderr
        assert done.stderr.count("\n") == 1
    assert "nothing to do" in import_walks(place, clips, "--actions", first).stdout
    wrong = write_actions(place.folder / "c.csv", {"three": {0: 0}})
    done = import_walks(place, clips, "--actions", wrong, "--data-dir", place.folder / "other")
    assert done.returncode == 2
    assert "row 2: there is no clip 'three'" in done.stderr
    assert not (place.folder / "other/walk").exists()
    again = [np.load(path)["obs"] for path in find_chunks(place.data / "walk/train")]
    assert all(np.array_equal(*pair) for pair in zip(frames, again, strict=True))


def test_a_few_labels_lead_to_a_policy_with_named_actions(walks, capsys):
    """From clips to the probe, the figures' names, and a decoder, without a game."""
    place, clips, actions = walks
    options = "--env", "walk", "--eval.episodes", "1", "--probe.windows", "500", "--offline.labels", "40"

    # Without labels, the end of stage 2 says what they would give.
    assert import_walks(place, clips).returncode == 0
    cfg = place.config(*options)
    stage1_idm_wm.train(cfg)
    stage2_bc.train(cfg)
    assert "import the clips with `import_video.py --actions FILE`" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"no true actions `ta`.*import them with `import_video\.py --act"):
        stage3_decode.train(place.config(*options, "--stage3.mode", "offline"))

    # With labels of every third frame, the same frames: stages 1 and 2 remain valid.
    for path in sorted((place.data / "walk").rglob("*.*"), reverse=True):
        path.unlink()
    for path in sorted((place.data / "walk").rglob("*"), reverse=True):
        path.rmdir()
    known = {
        clip: {t: int(a) for t, a in enumerate(values) if t % 3 == 0} for clip, values in actions.items()
    }
    labels = write_actions(place.folder / "a.csv", known)
    assert import_walks(place, clips, "--actions", labels).returncode == 0
    chosen = place.config(*options, "--stage3.mode", "offline")
    windows, ids, ta = labelled(chosen, Compute.from_config(cfg), Shared())
    assert len(ids) == 40
    assert (ta >= 0).all()
    frames = windows.frame_index(ids) + 1
    clip, t = frames // 135, frames % 135
    assert ta.tolist() == [actions[("one", "two")[c]][k] for c, k in zip(clip, t, strict=True)]

    for mode in ("offline", "bc"):
        stage3_decode.train(place.config(*options, "--stage3.mode", mode))
        folder = place.results / f"main/walk/seed0/stage3_{mode}"
        policy = lapo.load_policy(folder, device="cpu")
        assert policy.actions == NAMES
        assert policy.logits(np.zeros((2, 64, 64, 3), np.uint8)).shape == (2, 3)
        metrics = load_checkpoint(folder / "checkpoint.pt")["metrics"]
        assert 0 <= metrics["action_acc_test"] <= 1
        held_out = read_ta(place.data / "walk/test").reshape(2, 15)[:, 1:-2]
        counts = np.bincount(held_out[held_out >= 0])
        assert metrics["majority_acc_test"] == pytest.approx(counts.max() / counts.sum())
    with pytest.raises(UserError, match=r"offline\.labels is 400, but .* has 8\d labelled windows"):
        stage3_decode.train(
            place.config(*options, "--exp", "many", "--stage3.mode", "bc", "--offline.labels", "400")
        )

    # The probe is trained on the labelled windows alone, and figures show the names.
    stage1_idm_wm.train(place.config(*options, "--exp", "probed"))
    checkpoint = load_checkpoint(place.results / "probed/walk/seed0/stage1/checkpoint.pt")
    assert 0 <= checkpoint["metrics"]["probe_acc_test"] <= 1
    inspection = Inspection(saved_config(checkpoint), checkpoint["state"], Compute.from_config(cfg))
    assert (inspection.ta >= 0).all()
    assert set(inspection.predictions().names) <= set(NAMES)
