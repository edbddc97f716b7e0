"""Evaluation of stage 1: the probe's accuracy, and the world model's error on held-out windows."""

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lapo import probe, stage1_idm_wm
from lapo.bottleneck import VectorQuantizer
from lapo.config import ProbeConfig, VQConfig, load_config
from lapo.data_loader import Windows
from lapo.models import IDM, WorldModel, infer_latents, make_idm, make_world_model, normalize
from lapo.probe import find_failures, train_probe, world_model_loss
from lapo.report import report
from support import CPU, write_game


@pytest.fixture(scope="module")
def cfg() -> ProbeConfig:
    """The published settings."""
    return load_config([]).probe


@pytest.fixture(scope="module")
def windows(tmp_path_factory) -> Windows:
    """70 windows of random frames."""
    folder: Path = tmp_path_factory.mktemp("game")
    write_game(folder)
    return Windows(folder / "train", device=CPU.device)


def latents(size: int, actions: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Actions, and latents that encode them in noise."""
    generator = torch.Generator().manual_seed(seed)
    ta = torch.randint(actions, (size,), generator=generator)
    la = 0.3 * torch.randn(size, 16, generator=generator)
    la[:, :actions] += F.one_hot(ta, actions)
    return la, ta


# ---------------------------------------------------------------- the probe


def test_probe_equals_its_description(cfg):
    """With at most a batch of windows in a half, every epoch is one step whatever the order."""
    la, ta = latents(200, 5)
    metrics = train_probe(la, ta, cfg, seed=3)

    la = (la - la[:100].mean(0)) / la[:100].std(0, correction=0)
    torch.manual_seed(3)
    mlp = nn.Sequential(nn.Linear(16, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 5))
    optimizer = torch.optim.AdamW(mlp.parameters())
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(mlp(la[:100]), ta[:100]).backward()
        optimizer.step()
    for suffix, half in (("", slice(0, 100)), ("_test", slice(100, 200))):
        logits = mlp(la[half])
        accuracy = (logits.argmax(-1) == ta[half]).float().mean()
        torch.testing.assert_close(metrics[f"probe_acc{suffix}"], accuracy)
        loss = F.cross_entropy(logits, ta[half]).detach()
        torch.testing.assert_close(metrics[f"probe_loss{suffix}"], loss, rtol=1e-5, atol=1e-5)


def test_probe_predicts_actions_from_latents_that_hold_them_and_no_others(cfg):
    la, ta = latents(4000, 5)
    assert train_probe(la, ta, cfg, 0)["probe_acc_test"] > 0.95
    shuffled = train_probe(la, ta[torch.randperm(4000)], cfg, 0)
    assert shuffled["probe_acc_test"] < 0.3


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_probe_does_not_depend_on_the_scale_of_latents(cfg, scale):
    la, ta = latents(4000, 5)
    assert train_probe(scale * la + 7 * scale, ta, cfg, 0)["probe_acc_test"] > 0.95


def test_probe_is_trained_on_the_first_half_alone(cfg):
    la, ta = latents(300, 5)
    other = torch.cat([la[:150], torch.randn(150, 16)]), torch.cat([ta[:150], ta[150:].flip(0)])
    one, two = train_probe(la, ta, cfg, 0), train_probe(*other, cfg, 0)
    assert one["probe_loss"] == two["probe_loss"]
    assert one["probe_loss_test"] != two["probe_loss_test"]


def test_a_latent_that_varies_on_one_half_only_does_no_harm(cfg):
    la, ta = latents(4000, 5)
    la[:, -1] = 0
    la[2000:, -1] = torch.randn(2000)
    assert train_probe(la, ta, cfg, 0)["probe_acc_test"] > 0.9


def test_majority_is_the_fraction_of_the_commonest_action_in_the_second_half(cfg):
    ta = torch.tensor([3, 3, 1, 0, 0, 3, 0, 0])
    metrics = train_probe(torch.randn(8, 4), ta, cfg, 0)
    assert metrics["majority_acc_test"] == 0.75


def test_evaluation_leaves_the_global_generator_alone(cfg):
    la, ta = latents(300, 5)
    state = torch.get_rng_state()
    metrics = train_probe(la, ta, cfg, 0)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    torch.testing.assert_close(train_probe(la, ta, cfg, 0), metrics, rtol=0, atol=0)


@pytest.mark.parametrize("size", [0, 1])
def test_a_single_window_gives_no_probe(cfg, size):
    la, ta = latents(size, 5)
    assert train_probe(la, ta, cfg, 0) == {}


def test_an_action_seen_in_the_second_half_only_counts_as_wrong(cfg):
    la, ta = latents(400, 3)
    ta[200:] += 3
    metrics = train_probe(la, ta, replace(cfg, epochs=20), 0)
    assert metrics["probe_acc"] > 0.9
    assert metrics["probe_acc_test"] == 0


# ---------------------------------------------------------------- networks on windows


def small_idm() -> IDM:
    torch.manual_seed(0)
    return IDM(1, 16, VectorQuantizer(2, 2, 8, 4))


def images(windows: Windows, number: int) -> Tensor:
    """The three frames of a window, normalised, on the channels: (1, 9, H, W)."""
    return normalize(windows.gather(torch.tensor([number]))[0]).reshape(1, 9, 64, 64)


def test_inferred_latents_are_those_before_quantisation_in_the_order_of_the_windows(windows):
    idm = small_idm()
    before = copy.deepcopy(idm.state_dict())
    ids = torch.tensor([5, 0, 33, 69])
    la = infer_latents(idm, windows.iter_frames(ids), CPU)
    expected = torch.cat([idm.infer_latents(images(windows, int(number))) for number in ids])
    torch.testing.assert_close(la, expected.detach(), rtol=1e-5, atol=1e-5)
    assert not la.requires_grad
    assert idm.training
    torch.testing.assert_close(idm.state_dict(), before, rtol=0, atol=0)


def test_held_out_errors_equal_a_loop_over_windows_and_change_nothing(windows):
    idm, world_model = small_idm(), WorldModel(16, 8)
    world_model(torch.rand(4, 6, 64, 64) - 0.5, torch.randn(4, 16))
    before = copy.deepcopy((idm.state_dict(), world_model.state_dict()))
    ids = torch.tensor([3, 68, 20, 7, 41])
    metrics = world_model_loss(
        idm, world_model, windows, ids, infer_latents(idm, windows.iter_frames(ids), CPU), CPU
    )
    assert idm.training
    assert world_model.training
    torch.testing.assert_close((idm.state_dict(), world_model.state_dict()), before, rtol=0, atol=0)

    idm.eval(), world_model.eval()
    model_error, copy_error = 0.0, 0.0
    with torch.no_grad():
        for number in ids:
            window = images(windows, int(number))
            predicted = world_model(window[:, :6], idm(window)[1].la_q)
            model_error += (predicted - window[:, 6:]).square().mean().item() / 5
            copy_error += (window[:, 3:6] - window[:, 6:]).square().mean().item() / 5
    assert metrics["wm_loss_test"].item() == pytest.approx(model_error, rel=1e-5)
    assert metrics["copy_loss_test"].item() == pytest.approx(copy_error, rel=1e-5)


def test_the_world_model_is_evaluated_on_a_subset_of_the_probes_windows(windows, monkeypatch):
    cfg = load_config(["--preset", "demo", "--data.image_size", "64"])
    monkeypatch.setattr(probe, "WM_WINDOWS", 30)
    trainer = stage1_idm_wm.Trainer(cfg, CPU, windows, make_idm(cfg), make_world_model(cfg))
    metrics = trainer.evaluate(windows)
    ids = windows.all()
    la = infer_latents(trainer.idm, windows.iter_frames(ids), CPU)
    probed = train_probe(la, windows.actions(ids), cfg.probe, cfg.seed)
    subset = world_model_loss(trainer.idm, trainer.world_model, windows, ids[::3], la[::3], CPU)
    assert metrics == subset | probed


def test_modes_of_networks_in_eval_mode_are_kept(windows):
    idm, world_model = small_idm().eval(), WorldModel(16, 2).eval()
    ids = windows.all()[:2]
    world_model_loss(idm, world_model, windows, ids, infer_latents(idm, windows.iter_frames(ids), CPU), CPU)
    assert not idm.training
    assert not world_model.training


HEALTHY = {
    "perplexity": 40.0,
    "probe_acc_test": 0.6,
    "majority_acc_test": 0.35,
    "untrained_probe_acc_test": 0.4,
}


@pytest.mark.parametrize(
    ("changes", "options", "words"),
    [
        ({}, [], []),
        ({"perplexity": 8.0}, [], ["collapsed: its perplexity is 8.0, and 8 if every slot"]),
        ({"perplexity": 2.0}, [], ["collapsed"]),
        ({"perplexity": 9.4}, [], []),
        ({"perplexity": 8.0}, ["--vq.num_latents", "2"], []),
        ({"perplexity": 4.0}, ["--vq.num_embs", "2"], []),
        ({"perplexity": 1.0}, ["--vq.enabled", "false"], []),
        ({"probe_acc_test": 0.4}, [], ["(40.0%) than the commonest action (35.0%) or an untrained IDM (40"]),
        ({"probe_acc_test": 0.36, "untrained_probe_acc_test": 0.3}, [], []),
        ({"probe_acc_test": 0.34, "untrained_probe_acc_test": 0.3}, [], ["record with --noise 0.2"]),
        ({"perplexity": 8.0, "probe_acc_test": 0.2}, [], ["collapsed", "tell no more"]),
    ],
)
def test_a_failed_stage_1_is_recognised_and_a_healthy_one_left_alone(changes, options, words):
    found = find_failures(HEALTHY | changes, load_config(options).vq)
    assert len(found) == len(words)
    for sentence, part in zip(found, words, strict=True):
        assert part in sentence


def test_data_without_actions_raise_no_alarm_about_them():
    assert find_failures({"perplexity": 40.0}, load_config([]).vq) == []


def test_stage_1_and_the_report_say_that_it_failed(workplace, monkeypatch, capsys):
    """Once, at the end. A bottleneck counts as collapsed here whatever its perplexity."""
    monkeypatch.setattr(probe, "COLLAPSED", 100.0)
    monkeypatch.setattr(VQConfig, "num_codes", 1000)
    stage1_idm_wm.train(workplace.config())
    assert capsys.readouterr().err.count("warning: the bottleneck has collapsed: its perplexity is ") == 1
    assert any("collapsed" in warning for warning in report(workplace.config())["warnings"])
    assert "**Warning**: the bottleneck has collapsed: " in capsys.readouterr().out
