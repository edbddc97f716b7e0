"""Inputs of a run: changed stages and frames are noticed; what no number depends on may change."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from lapo import report, stage1_idm_wm, stage2_bc, stage3_decode
from lapo.data.chunks import data_checksums
from lapo.errors import UserError
from lapo.runs import checkpoints
from lapo.runs.checkpoints import changed_inputs, load_checkpoint, provenance, weights_checksum
from lapo.runs.compute import Compute
from lapo.runs.run import Run
from support import CPU, Workplace, write_chunk, write_game

OTHER = ["--stage1.lr", "3e-3"]


@pytest.fixture
def place(trained, tmp_path) -> Workplace:
    """A copy of a workplace in which stages 1 and 2 are done."""
    workplace = Workplace(tmp_path)
    for stage in ("stage1", "stage2"):  # other tests may have left more there
        shutil.copytree(trained.run_dir(stage), workplace.run_dir(stage))
    return workplace


def checkpoint(place: Workplace, stage: str) -> dict:
    return load_checkpoint(place.run_dir(stage) / "checkpoint.pt")


def rewrite(place: Workplace, stage: str, **changes) -> None:
    """Save a stage's checkpoint again, as somebody would who edits it."""
    path = place.run_dir(stage) / "checkpoint.pt"
    torch.save(load_checkpoint(path) | changes, path)


def exchange_stage1(place: Workplace, *arguments: str) -> None:
    shutil.rmtree(place.run_dir("stage1"))
    stage1_idm_wm.train(place.config(*arguments))


# ---------------------------------------------------------------- stages


def test_a_finished_stage_2_of_another_stage_1_is_refused(place):
    exchange_stage1(place, *OTHER)
    before = (place.run_dir("stage2") / "checkpoint.pt").read_bytes()
    folder = place.run_dir("stage2")
    with pytest.raises(UserError, match=f"^{folder} was trained before stage1 changed; .* delete {folder}"):
        stage2_bc.train(place.config())
    assert (place.run_dir("stage2") / "checkpoint.pt").read_bytes() == before


def test_stage_1_is_not_exchanged_in_the_middle_of_stage_2(place):
    shutil.rmtree(place.run_dir("stage2"))
    run = Run(
        place.config(), "stage2", ("stage2",), CPU, {"stage1": weights_checksum(checkpoint(place, "stage1"))}
    )
    run.step = 3
    run.save({})
    exchange_stage1(place, *OTHER)
    with pytest.raises(UserError, match="stage2 was trained before stage1 changed"):
        stage2_bc.train(place.config())


@pytest.mark.parametrize("mode", ["online", "offline"])
def test_stage_3_does_not_pair_an_idm_with_the_policy_of_another(place, mode):
    exchange_stage1(place, *OTHER)
    with pytest.raises(UserError) as error:
        stage3_decode.train(place.config("--stage3.mode", mode))
    folders = {stage: place.run_dir(stage) for stage in ("stage1", "stage2")}
    assert str(error.value) == (
        f"{folders['stage2']} was trained on another stage1 than {folders['stage1']} holds now; delete"
        f" {folders['stage2']} and run stage2.py again, or restore the old stage1"
    )
    assert not place.run_dir(f"stage3_{mode}").exists()


def test_a_stage_1_made_anew_with_the_same_numbers_is_the_same(place, capsys):
    exchange_stage1(place)
    stage2_bc.train(place.config())
    assert "finished already" in capsys.readouterr().out


def test_the_report_says_what_does_not_belong_together(place, capsys):
    exchange_stage1(place, *OTHER)
    summary = report.report(place.config())
    assert summary["stages"]["stage2"]["stale"] == ["stage1"]
    assert summary["stages"]["stage1"]["stale"] == []
    assert "finished, but trained on another stage1" in capsys.readouterr().out


def test_a_checkpoint_that_does_not_say_is_taken_to_be_right(place, capsys):
    exchange_stage1(place, *OTHER)
    rewrite(place, "stage2", built_on={})
    stage2_bc.train(place.config())
    assert "finished already" in capsys.readouterr().out
    assert changed_inputs({}, {"stage1": "0123"}) == []


def test_weights_count_and_nothing_else(place):
    stage1 = checkpoint(place, "stage1")
    expected = weights_checksum(stage1)
    assert (
        weights_checksum(stage1 | {"step": 1, "state": stage1["state"] | {"optimizer": {}, "order": {}}})
        == expected
    )
    weights = stage1["state"]["idm"]["head.weight"]
    weights[0, 0] = torch.nextafter(weights[0, 0], torch.tensor(9.0))
    assert weights_checksum(stage1) != expected


def test_a_stage_of_another_game_is_refused(place):
    stage1 = checkpoint(place, "stage1")
    rewrite(place, "stage1", config=stage1["config"] | {"env": "maze"})
    with pytest.raises(
        UserError, match=r"was trained with env maze, but env is bossfight; choose --env maze"
    ):
        stage2_bc.train(place.config())


# ---------------------------------------------------------------- frames


def frames(folder: Path, seed: int = 0, **arrays: np.ndarray) -> Path:
    obs = np.random.default_rng(seed).integers(256, size=(9, 64, 64, 3), dtype=np.uint8)
    return write_chunk(folder, obs, **arrays)


def test_frames_are_known_by_their_chunks_in_use(workplace):
    game, cfg = workplace.data / workplace.GAME, workplace.config()
    found = data_checksums(cfg)
    assert found.keys() == {"train frames", "test frames"}
    assert data_checksums(workplace.config("--data.train_chunks", "2")) == found
    assert (
        data_checksums(workplace.config("--data.train_chunks", "1"))["train frames"] != found["train frames"]
    )
    (game / "train" / "0.npz").rename(game / "train" / "5.npz")  # now behind the other one
    assert data_checksums(cfg)["train frames"] != found["train frames"]
    assert data_checksums(cfg)["test frames"] == found["test frames"]
    shutil.rmtree(game / "test")
    assert data_checksums(cfg).keys() == {"train frames"}


def test_which_arrays_of_the_chunks_count(workplace):
    path, cfg = workplace.data / workplace.GAME / "test" / "0.npz", workplace.config()

    def of(*keys: str, **arrays: np.ndarray) -> str:
        frames(path, **arrays)
        return data_checksums(cfg, keys)["test frames"]

    ta, done = np.zeros(9, np.int64), np.zeros(9, bool)
    assert of("obs", "done", ta=ta, done=done) == of("obs", "done", ta=ta + 1, done=done, rewards=ta)
    assert of("obs", "done", done=done) != of("obs", "done", done=~done)
    assert of("obs", "done", "ta", ta=ta) != of("obs", "done", "ta", ta=ta + 1)
    damaged = path.read_bytes()
    path.write_bytes(damaged[:100])
    assert data_checksums(cfg)["test frames"] not in (of("obs", "done"), of("obs", "done", done=done))


@pytest.mark.parametrize("train", [stage1_idm_wm.train, stage2_bc.train])
def test_a_run_knows_its_frames_but_can_do_without_them_once_finished(place, train, capsys):
    train(place.config())
    assert "finished already" in capsys.readouterr().out
    game = place.data / place.GAME
    frames(game / "train" / "7.npz", seed=7)
    with pytest.raises(UserError, match=r"was trained before train frames changed"):
        train(place.config())
    shutil.rmtree(game)
    train(place.config())
    assert "finished already" in capsys.readouterr().out


def test_labels_matter_to_the_modes_that_learn_from_them_alone(place, capsys):
    stage3_decode.train(place.config("--stage3.mode", "offline"))
    chunk = place.data / place.GAME / "train" / "0.npz"
    arrays = dict(np.load(chunk))
    write_chunk(chunk, **arrays | {"ta": (arrays["ta"] + 1) % 15})
    stage1_idm_wm.train(place.config())
    stage2_bc.train(place.config())
    with pytest.raises(UserError, match="stage3_offline was trained before train frames"):
        stage3_decode.train(place.config("--stage3.mode", "offline"))


def test_modes_that_play_see_no_frames(place, capsys):
    stage3_decode.train(place.config("--stage3.mode", "online"))
    assert checkpoint(place, "stage3_online")["built_on"].keys() == {"stage1", "stage2"}
    write_game(place.data / place.GAME, chunks=3)
    capsys.readouterr()
    stage3_decode.train(place.config("--stage3.mode", "online"))
    assert "finished already" in capsys.readouterr().out


# ---------------------------------------------------------------- the configuration


@pytest.mark.parametrize("keys", [("data", "pool_chunks"), ("vq", "start"), ("save_minutes",)])
def test_a_key_that_is_new_or_gone_makes_no_checkpoint_unusable(place, keys, capsys):
    """As if config.yaml had got `keys` since, and another key had been removed."""
    for stage in ("stage1", "stage2"):
        config = checkpoint(place, stage)["config"] | {"removed": 1}
        group = config
        for key in keys[:-1]:
            group = group[key]
        del group[keys[-1]]
        group["removed_too"] = 2
        rewrite(place, stage, config=config)
    stage1_idm_wm.train(place.config())
    stage2_bc.train(place.config())
    assert capsys.readouterr().out.count("finished already") == 2
    stage3_decode.train(place.config("--stage3.mode", "offline"))


def test_a_key_that_is_new_is_refused_when_it_is_not_at_its_default(place):
    config = checkpoint(place, "stage1")["config"]
    del config["vq"]["start"]
    rewrite(place, "stage1", config=config)
    with pytest.raises(UserError, match=r"vq\.start: published → data"):
        stage1_idm_wm.train(place.config("--vq.start", "data"))


def test_what_no_number_depends_on_may_change(place, capsys):
    neutral = [
        "--stage1.log_every",
        "7",
        "--stage1.save_every",
        "9",
        "--save_minutes",
        "3",
        "--wandb",
        "disabled",
    ]
    stage1_idm_wm.train(place.config(*neutral, "--resident", "never", "--device", "auto"))
    assert "finished already" in capsys.readouterr().out


# ---------------------------------------------------------------- precision, provenance

BF16 = Compute(torch.device("cpu"), bf16=True, compile=False)


def test_a_run_keeps_the_precision_that_it_began_with(workplace):
    auto = replace(workplace.config(), precision="auto")
    run = Run(auto, "stage1", ("stage1",), BF16)
    run.step = 2
    run.save({})
    assert checkpoint(workplace, "stage1")["config"]["precision"] == "bf16"
    with pytest.raises(UserError, match="precision: bf16 → fp32"):
        Run(auto, "stage1", ("stage1",), CPU)  # as on a machine without bf16
    Run(replace(auto, precision="bf16"), "stage1", ("stage1",), BF16).finish({})
    assert Run(auto, "stage1", ("stage1",), CPU).finished
    with pytest.raises(UserError, match="precision: bf16 → fp32"):
        Run(workplace.config(), "stage1", ("stage1",), CPU)


def test_a_run_of_unknown_precision_goes_on(workplace):
    run = Run(workplace.config(), "stage1", ("stage1",), CPU)
    run.save({})
    rewrite(workplace, "stage1", config=checkpoint(workplace, "stage1")["config"] | {"precision": "auto"})
    assert Run(workplace.config(), "stage1", ("stage1",), BF16).state == {}


def test_provenance_is_that_of_the_start(workplace, monkeypatch):
    provenance.cache_clear()
    run = Run(workplace.config(), "stage1", ("stage1",), CPU)
    began = provenance()
    monkeypatch.setattr(checkpoints.subprocess, "run", lambda *_, **__: pytest.fail("asked again"))
    run.save({})
    assert checkpoint(workplace, "stage1")["provenance"] == began
    assert len(began["revision"]) >= 7
