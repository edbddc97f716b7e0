"""report.py: tables and figures of tiny runs, complete and partial."""

import json
import math
import shutil
import struct

import numpy as np
import pytest
import torch

from finished_run import finished_run, write_strips
from lapo import report, stage1_idm_wm
from lapo.acting import evaluate_actor, random_actor
from lapo.config import Config
from lapo.errors import UserError
from lapo.games.table import GAMES
from lapo.reporting import figures, summary
from lapo.reporting.inspection import fit_lda
from lapo.runs.checkpoints import load_checkpoint
from support import Workplace

GAME = Workplace.GAME
STAGE1_FIGURES = {"learning.png", "latents.png", "predictions.png"}
FIGURES = STAGE1_FIGURES | {"returns.png", "rl_curves.png"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Workplace:
    """A run with all stages and modes, to be left as it is."""
    return finished_run(tmp_path_factory.getbasetemp() / "finished")


@pytest.fixture
def cfg(finished, tmp_path) -> Config:
    """The configuration of a copy of the finished run, the test's own."""
    shutil.copytree(finished.folder, tmp_path, dirs_exist_ok=True)
    return finished.config("--results_dir", str(tmp_path / "results"), "--data_dir", str(tmp_path / "data"))


def metrics_of(cfg: Config, stage: str) -> dict:
    return load_checkpoint(cfg.run_dir / stage / "checkpoint.pt")["metrics"]


def written(cfg: Config) -> set[str]:
    return {path.name for path in cfg.run_dir.iterdir() if path.is_file()}


def test_command_line_reports_a_complete_run(finished, cfg):
    process = finished.run("report.py", "--results_dir", cfg.results_dir)
    assert process.returncode == 0, process.stderr
    assert written(cfg) == FIGURES | {"summary.json", "summary.md"}
    text = (cfg.run_dir / "summary.md").read_text(encoding="utf-8")
    assert text in process.stdout
    assert "missing" not in text
    for name in FIGURES:
        header = (cfg.run_dir / name).read_bytes()[:24]
        width, height = struct.unpack(">II", header[16:])
        assert header.startswith(b"\x89PNG")
        assert 500 < width < 1500
        assert 300 < height < 3000

    found = summary.summarize(cfg, summary.read_outputs(cfg))
    assert json.loads((cfg.run_dir / "summary.json").read_text()) == found


def test_a_run_is_shown_by_the_mean_over_its_draws_of_labels(cfg):
    path = cfg.run_dir / "stage3_bc" / "checkpoint.pt"
    saved = torch.load(path, weights_only=True)
    del saved["checksum"]
    labels = saved["config"]["offline"]["labels"]
    own = {"labels": labels, "draw": 0, "return_mean": 1.0, "episodes": 8}
    others = [own | {"labels": 8, "return_mean": 9.0}, own | {"draw": 1, "return_mean": 4.0}]
    others += [own | {"all": True, "return_mean": 9.0}]
    saved["metrics"] |= {"return_mean": 1.0, "return_stderr": 0.25, "sweep": [own, others[0]]}
    torch.save(saved, path)
    found = summary.returns(cfg, summary.read_outputs(cfg))["bc"]
    assert (found["return_mean"], found["return_stderr"]) == (1.0, 0.25)
    assert found["source"] == f"{labels} labels"
    saved["metrics"]["sweep"] = [own, *others]
    torch.save(saved, path)
    found = summary.returns(cfg, summary.read_outputs(cfg))["bc"]
    assert (found["return_mean"], found["episodes"]) == (2.5, 16)
    assert found["return_stderr"] == pytest.approx(1.5)
    assert found["source"] == f"{labels} labels, 2 draws"


def test_random_policy_plays_once(cfg, monkeypatch):
    found = summary.summarize(cfg, summary.read_outputs(cfg))
    played = evaluate_actor(random_actor(cfg.seed), GAME, cfg.visuals, cfg.eval, cfg.seed)
    assert found["returns"]["random"]["return_mean"] == played.mean
    (cfg.run_dir / "summary.json").write_text(json.dumps(found))
    monkeypatch.setattr(summary, "evaluate_actor", lambda *_: pytest.fail("played again"))
    assert summary.random_return(cfg) == found["returns"]["random"]
    cfg.eval.episodes = 4
    with pytest.raises(pytest.fail.Exception, match="played again"):
        summary.random_return(cfg)


def test_numbers_are_those_of_the_stages(cfg):
    found = summary.summarize(cfg, summary.read_outputs(cfg))
    stage1_metrics, stage2_metrics = metrics_of(cfg, "stage1"), metrics_of(cfg, "stage2")
    learnt = found["learnt"]
    assert learnt["wm_loss"] == stage1_metrics["wm_loss_test"]
    assert learnt["wm_loss_ratio"] == pytest.approx(learnt["wm_loss"] / stage1_metrics["copy_loss_test"])
    assert learnt["probe_acc"] == stage1_metrics["probe_acc_test"]
    assert learnt["untrained_probe_acc"] == stage1_metrics["untrained_probe_acc_test"]
    assert learnt["majority_acc"] == stage1_metrics["majority_acc_test"]
    assert learnt["codes"] == 16
    assert learnt["policy_loss"] == stage2_metrics["loss_test"]
    assert learnt["constant_loss"] == stage2_metrics["constant_loss_test"]

    assert list(found["returns"]) == ["random", "bc", "scratch", "offline", "online", "expert"]
    for mode in ("bc", "scratch", "offline", "online"):
        metrics, row = metrics_of(cfg, f"stage3_{mode}"), found["returns"][mode]
        for key in ("return_mean", "return_stderr", "relative_return", "episodes"):
            assert row[key] == metrics[key]
    assert found["returns"]["bc"]["source"] == "32 labels"
    assert found["returns"]["online"]["source"] == "frames, 192 env steps"
    assert {stage: done["steps"] for stage, done in found["stages"].items() if done} == {
        "stage1": 8,
        "stage2": 8,
        "stage3_bc": 20,
        "stage3_scratch": 192,
        "stage3_offline": 20,
        "stage3_online": 192,
    }


def test_expert_is_the_recorded_one_where_it_is_known(cfg):
    file = cfg.game_data / "dataset.json"
    published = summary.expert_return(cfg)
    assert published["return_mean"] == GAMES[GAME].expert_return
    assert published["relative_return"] == 1
    assert published["source"] == "published frames"
    recording = {"expert": "Boss", "train": {"mean_return": 9, "standard_error": 0.5, "episodes": 70}}
    file.write_text(json.dumps(recording))
    row = summary.expert_return(cfg)
    assert (row["return_mean"], row["return_stderr"], row["episodes"]) == (9, 0.5, 70)
    assert row["source"] == "recorded frames, Boss"
    file.write_text(json.dumps(recording | {"source": "huggingface"}))
    assert summary.expert_return(cfg)["source"] == "downloaded frames, Boss"
    for unusable in ("", "[]", json.dumps(recording | {"train": recording["train"] | {"mean_return": None}})):
        file.write_text(unusable)
        assert summary.expert_return(cfg) == published


@pytest.mark.parametrize("source", ["huggingface", None])
def test_a_report_says_that_the_expert_is_not_the_published_one(cfg, source):
    recording = {"expert": "Boss", "train": {"mean_return": 9, "standard_error": 0.5, "episodes": 70}}
    (cfg.game_data / "dataset.json").write_text(json.dumps(recording | {"source": source}))
    text = report.to_markdown(summary.summarize(cfg, summary.read_outputs(cfg)))
    assert ("expert of this run's frames is another one" in text) == (source == "huggingface")


def test_stages_that_have_not_run_and_data_that_has_gone_are_missing(cfg, capsys):
    shutil.rmtree(cfg.game_data)
    for stage in ("stage2", "stage3_bc", "stage3_online"):
        shutil.rmtree(cfg.run_dir / stage)
    found = report.report(cfg)
    assert found["stages"]["stage2"] is None
    assert found["learnt"]["policy_loss"] is None
    assert list(found["returns"]) == ["random", "scratch", "offline", "expert"]
    assert written(cfg) == {"learning.png", "returns.png", "rl_curves.png", "summary.json", "summary.md"}
    assert "latents.png and predictions.png are left out: the data folder" in capsys.readouterr().out
    text = (cfg.run_dir / "summary.md").read_text(encoding="utf-8")
    missing = [line.split("|")[1].strip() for line in text.splitlines() if "missing" in line]
    assert missing == ["behaviour cloning", "LAPO online", "stage2", "stage3_bc", "stage3_online"]


def test_unfinished_first_stage(cfg):
    for folder in cfg.run_dir.iterdir():
        if folder.name != "stage1":
            shutil.rmtree(folder)
    stage = cfg.run_dir / "stage1"
    checkpoint = load_checkpoint(stage / "checkpoint.pt")
    metrics = {key: value for key, value in checkpoint["metrics"].items() if not key.endswith("_test")}
    start = {key: value for key, value in checkpoint["metrics"].items() if key.startswith("untrained")}
    torch.save(checkpoint | {"finished": False, "metrics": metrics | start}, stage / "checkpoint.pt")
    lines = (stage / "metrics.jsonl").read_text().splitlines(keepends=True)
    (stage / "metrics.jsonl").write_text(lines[0] + lines[1] + lines[2][:20])  # killed while writing
    found = report.report(cfg)
    assert found["stages"]["stage1"]["finished"] is False
    assert found["stages"]["stage1"]["steps"] == 2
    assert found["learnt"]["wm_loss"] is None
    assert found["returns"] == {}
    assert written(cfg) == STAGE1_FIGURES | {"summary.json", "summary.md"}


def test_run_without_stages_is_one_sentence(cfg):
    cfg.exp = "other"
    with pytest.raises(UserError) as error:
        report.report(cfg)
    assert str(error.value) == (
        f"{cfg.run_dir} has no stage to report on; the first is made with"
        f" `python stage1.py --env {GAME} --exp other --seed 0`"
    )
    assert not cfg.run_dir.exists()


@pytest.mark.slow
def test_frames_without_actions(tmp_path):
    place = Workplace(tmp_path)
    write_strips(place.data / "holiday", actions=False)
    cfg = place.config("--env", "holiday")
    stage1_idm_wm.train(cfg)
    found = report.report(cfg)
    assert found["learnt"]["probe_acc"] is None
    assert found["returns"] == {}
    assert written(cfg) == {"learning.png", "predictions.png", "summary.json", "summary.md"}


def test_time_of_a_run_that_was_continued_by_an_older_version_adds_up():
    lines = [{"step": step, "seconds": seconds} for step, seconds in ((1, 5), (2, 10), (3, 3), (4, 8))]
    record = summary.StageOutput({"finished": True}, lines)
    assert record.progress() == {"steps": 4, "finished": True, "seconds": 18}


def test_discriminate_is_the_likeliest_class():
    """Against normal densities, one latent and class at a time; and the scale of the latents is no matter."""
    rng = np.random.default_rng(0)
    ta = rng.choice(3, size=600, p=(0.6, 0.3, 0.1))
    mix = rng.normal(size=(5, 5))
    la = (rng.normal(size=(600, 5)) + 2 * np.eye(5)[ta]) @ mix
    fit, rest = la[:400], la[400:]
    means = [fit[ta[:400] == c].mean(0) for c in range(3)]
    covariance = sum(np.outer(x - means[c], x - means[c]) for x, c in zip(fit, ta, strict=False)) / 400
    covariance += np.eye(5) * (1e-3 * np.trace(covariance) / 5 + 1e-12)
    inverse = np.linalg.inv(covariance)
    expected = [
        max(
            range(3),
            key=lambda c: math.log((ta[:400] == c).mean()) - (x - means[c]) @ inverse @ (x - means[c]) / 2,
        )
        for x in rest
    ]
    for scale in (1.0, 1e-3):
        xy, read = fit_lda(torch.tensor(scale * fit), torch.tensor(ta[:400]), torch.tensor(scale * rest))
        assert read.tolist() == expected
        assert xy.shape == (200, 2)
    assert np.mean(read.numpy() == ta[400:]) > 0.8


def test_damaged_checkpoint_is_named(cfg):
    path = cfg.run_dir / "stage2" / "checkpoint.pt"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match=r"stage2.checkpoint\.pt is damaged"):
        report.report(cfg)


def test_returns_of_evaluations_are_drawn_over_those_of_training():
    line = {"step": 10, "train_return": 1.0}
    curves = {"online": [line, {"step": 20, "eval_return_mean": 3.0}], "scratch": [line]}
    (ax,) = figures.rl_curves(curves, report.NAMES, {}, "").axes
    drawn = {(drawn.get_label(), drawn.get_alpha()): drawn.get_ydata() for drawn in ax.lines}
    assert {label for label, _ in drawn if not label.startswith("_")} == {
        "LAPO online, held-out levels",
        "PPO from scratch",
    }
    assert list(drawn["LAPO online, held-out levels", None]) == [3.0]
    assert [alpha for label, alpha in drawn if label.startswith("_")] == [0.3]


@pytest.mark.parametrize(
    ("metrics", "added"),
    [
        ({"eval_return_mean": 3.0, "return_mean": 5.0}, [{"step": 20, "eval_return_mean": 5.0}]),
        ({"eval_return_mean": 3.0}, []),  # unfinished
        ({"return_mean": 5.0}, []),  # not evaluated on the way
    ],
)
def test_the_final_return_ends_a_curve_of_evaluations(metrics, added):
    lines = [{"step": 20, "seconds": 1.0, "train_return": 1.0}]
    output = summary.StageOutput({"metrics": metrics, "finished": True}, lines)
    assert report.with_final_return(output) == lines + added
