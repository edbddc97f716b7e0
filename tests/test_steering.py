"""How well latent actions steer the world model: ΔPSNR, open-loop PSNR and action read-back against loops."""

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lapo import report, stage1_idm_wm, steering
from lapo.bottleneck import VectorQuantizer
from lapo.config import ProbeConfig, load_config
from lapo.data_loader import RollingWindows, Windows
from lapo.models import IDM, WorldModel, infer_latents, normalize
from lapo.probe import fit_probe, train_probe
from lapo.runs.compute import Compute
from lapo.steering import measure_steering, psnr, sequences
from support import CPU, write_chunk

SEED = 5
ACTIONS = 3
"""A fourth action is taken in the last quarter alone."""
CFG = replace(load_config([]).probe, windows=32 * 6, epochs=1)
"""At most 6 sequences, or states."""


def make_windows(folder: Path, cls: type[Windows] = Windows, context: int = 1, **options) -> Windows:
    """Two chunks of 90 random frames, with an episode that ends after 60 of them."""
    rng = np.random.default_rng(0)
    for number in range(2):
        ta = (
            rng.integers(ACTIONS, size=90)
            if not number
            else np.where(np.arange(90) > 45, 3, np.arange(90) % 3)
        )
        obs = rng.integers(256, size=(90, 64, 64, 3), dtype=np.uint8)
        write_chunk(folder / f"{number}.npz", obs, ta=ta, done=np.arange(90) == 60)
    return cls(folder, device=CPU.device, context=context, **options)


@pytest.fixture(scope="module")
def windows(tmp_path_factory: pytest.TempPathFactory) -> Windows:
    return make_windows(tmp_path_factory.mktemp("steering"))


def make_networks(context: int = 1) -> tuple[IDM, WorldModel]:
    """Small networks whose normalisation layers and codes have seen something."""
    torch.manual_seed(0)
    idm = IDM(1, 16, VectorQuantizer(2, 2, 8, 4, start="data"), context=context)
    world_model = WorldModel(16, 4, context=context)
    frames = 3 * (context + 1)
    for _ in range(3):
        la = idm(torch.rand(8, frames + 3, 64, 64) - 0.5)[1].la_q
        world_model(torch.rand(8, frames, 64, 64) - 0.5, la)
    with torch.no_grad():
        world_model.down[0].conv.weight[:, frames:] *= 100  # latents are small, and predictions shall differ
    return idm, world_model


def images(windows: Windows, number: int) -> Tensor:
    """The frames of a window, normalised, on the channels: (1, T·C, H, W)."""
    return normalize(windows.gather(torch.tensor([number]))[0]).reshape(1, -1, 64, 64)


def decibels(predicted: Tensor, image: Tensor) -> float:
    return 10 * np.log10(1 / (predicted - image).square().mean().item())


def measure(windows: Windows, idm: IDM, world_model: WorldModel, compute: Compute = CPU) -> dict[str, float]:
    ids = windows.all()
    probed = None
    if windows.ta is not None:
        probed = ids, infer_latents(idm, windows.iter_frames(ids), compute)
    metrics = measure_steering(idm, world_model, windows, compute, CFG, SEED, probed)
    return {key: float(value) for key, value in metrics.items()}


# ---------------------------------------------------------------- rollouts


@pytest.mark.parametrize("context", [0, 1, 2])
@torch.no_grad()
def test_psnr_equals_a_loop_over_sequences_and_steps(tmp_path, context):
    windows, (idm, world_model) = make_windows(tmp_path, context=context), make_networks(context)
    found = measure(windows, idm, world_model)
    starts, horizon = sequences(windows, 6)
    assert (len(starts), horizon) == (6, 16)

    idm.eval(), world_model.eval()
    inferred = {
        (row, step): idm(images(windows, int(start) + step))[1].la_q
        for row, start in enumerate(starts)
        for step in range(16)
    }
    shifts = torch.randint(1, 6, (16,), generator=torch.Generator().manual_seed(SEED)).tolist()
    own, copied, other = np.zeros((3, 6, 16))
    for row, start in enumerate(starts):
        for values, chosen in (
            (own, lambda row, step: row),
            (other, lambda row, step: (row - shifts[step]) % 6),
        ):
            past = images(windows, int(start))[:, :-3]
            for step in range(16):
                truth = images(windows, int(start) + step)[:, -3:]
                predicted = world_model(past, inferred[chosen(row, step), step])
                values[row, step] = decibels(predicted, truth)
                copied[row, step] = decibels(images(windows, int(start))[:, -6:-3], truth)
                past = torch.cat([past, predicted], 1)[:, 3:]
    for steps in (1, 2, 4, 8, 16):
        assert found[f"psnr_{steps}"] == pytest.approx(own[:, steps - 1].mean(), abs=1e-4)
        assert found[f"copy_psnr_{steps}"] == pytest.approx(copied[:, steps - 1].mean(), abs=1e-4)
    for steps in (1, 4):
        delta = (own - other)[:, steps - 1].mean()
        assert found[f"delta_psnr_{steps}"] == pytest.approx(delta, abs=1e-4)
    assert "delta_psnr_2" not in found


def test_sequences_stay_within_episodes_and_chunks(windows):
    starts, horizon = sequences(windows, 1000)
    expected = [
        number
        for number in range(len(windows) - 15)
        if all(windows.starts[number + step] == windows.starts[number] + step for step in range(16))
    ]
    assert horizon == 16
    assert starts.tolist() == expected
    assert len(expected) < len(windows) - 16


@pytest.mark.parametrize(("frames", "horizon"), [(19, 16), (18, 8), (7, 4), (4, 1), (3, 1)])
def test_short_data_allow_short_sequences(tmp_path, frames, horizon):
    """19 frames make two sequences of 16 steps."""
    write_chunk(tmp_path / "0.npz", np.zeros((frames, 64, 64, 3), np.uint8))
    short = Windows(tmp_path, device=CPU.device)
    assert sequences(short, 1000)[1] == horizon
    found = measure(short, *make_networks())
    present = {t for t in (1, 2, 4, 8, 16) if t <= horizon} if frames > 3 else set()
    assert found.keys() == {
        *(f"{kind}_{t}" for kind in ("psnr", "copy_psnr") for t in present),
        *(f"delta_psnr_{t}" for t in present & {1, 4}),
    }


def test_psnr_of_a_perfect_prediction_is_finite():
    image = torch.rand(2, 3, 64, 64) - 0.5
    torch.testing.assert_close(psnr(image, image), torch.full((2,), 58.92), rtol=0, atol=0.01)
    torch.testing.assert_close(psnr(image + 0.1, image), torch.full((2,), 20.0))


def test_chunks_that_take_turns_give_the_same(windows, tmp_path):
    resident = measure(windows, *make_networks())
    rolling = measure(make_windows(tmp_path, RollingWindows, pool_chunks=1), *make_networks())
    for key in resident.keys() - {"delta_psnr_1", "delta_psnr_4"}:  # other sequences share a batch
        assert rolling[key] == pytest.approx(resident[key], abs=1e-4), key


# ---------------------------------------------------------------- read-back


@torch.no_grad()
def test_read_back_equals_a_loop_over_actions_and_states(windows):
    idm, world_model = make_networks()
    found = measure(windows, idm, world_model)
    idm.eval(), world_model.eval()
    la = torch.cat([idm.infer_latents(images(windows, number)) for number in range(len(windows))])
    ta, half = windows.actions(windows.all()), len(windows) // 2
    probe = fit_probe(la, ta, CFG, SEED)
    states = windows.evenly_spaced(6, windows.all()[half:])
    accuracy, ceiling = [], []
    for action in range(ACTIONS):
        mine = [number for number in range(half) if ta[number] == action]
        mean = la[mine].mean(0)
        typical = min(mine, key=lambda number: (la[number] - mean).square().sum().item())
        right = 0
        for state in states.tolist():
            window = images(windows, state)
            predicted = world_model(window[:, :-3], idm.quantize(la[typical][None]).la_q)
            read = probe(idm.infer_latents(torch.cat([window[:, :-3], predicted], 1))).argmax()
            right += int(read == action)
        accuracy.append(right / 6)
        later = [number for number in range(half, len(windows)) if ta[number] == action]
        ceiling.append(np.mean([int(probe(la[number][None]).argmax() == action) for number in later]))
        assert found[f"readback_acc_{action}"] == pytest.approx(accuracy[-1])
        assert found[f"readback_ceiling_{action}"] == pytest.approx(ceiling[-1])
    assert found["readback_acc"] == pytest.approx(np.mean(accuracy))
    assert found["readback_ceiling"] == pytest.approx(np.mean(ceiling))
    assert found["readback_chance"] == pytest.approx(1 / 3)
    assert "readback_acc_3" not in found  # the probe has not seen it


def test_the_most_typical_latent_action_is_the_one_closest_to_the_mean():
    assert steering.most_typical(torch.tensor([[0.0], [4.0], [11.0]])).tolist() == [4.0]


class Told(nn.Module):
    """An "IDM" and "world model" that write an action into the first pixel, and read it from there."""

    def __init__(self):
        super().__init__()
        self.window = 3
        self.eval()

    def infer_latents(self, images: Tensor) -> Tensor:
        return images[:, -1, :1, 0] * torch.linspace(1, 2, 8)

    def quantize(self, la: Tensor):
        return type("Quantized", (), {"la_q": la})

    def forward(self, images: Tensor, la_q: Tensor | None = None):
        if la_q is None:
            return None, self.quantize(self.infer_latents(images))
        predicted = images[:, -3:].clone()
        predicted[:, -1, 0, 0] = la_q[:, 0]
        return predicted


@pytest.mark.parametrize("bf16", [False, True])
def test_a_perfect_world_model_is_read_back_perfectly(tmp_path, bf16):
    """In bf16, too, where autocast would go on using the weights that the probe began with."""
    rng = np.random.default_rng(0)
    ta = rng.integers(4, size=600)
    obs = rng.integers(256, size=(600, 64, 64, 3), dtype=np.uint8)
    obs[1:, 0, 0, 2] = 60 * ta[:-1]
    write_chunk(tmp_path / "0.npz", obs, ta=ta)
    told, windows = Told(), Windows(tmp_path, device=CPU.device)
    cfg = ProbeConfig(windows=32 * 40, hidden=64, epochs=40, batch_size=32)
    ids = windows.all()
    compute = replace(CPU, bf16=bf16)
    probed = ids, infer_latents(told, windows.iter_frames(ids), compute)
    assert train_probe(probed[1], windows.actions(ids), cfg, SEED)["probe_acc_test"] == 1
    found = measure_steering(told, told, windows, compute, cfg, SEED, probed)
    assert found["readback_acc"] == found["readback_ceiling"] == 1
    assert all(found[f"readback_acc_{action}"] == 1 for action in range(4))


# ---------------------------------------------------------------- in stage 1


def test_without_true_actions_only_rollouts_are_measured(tmp_path):
    rng = np.random.default_rng(0)
    write_chunk(tmp_path / "0.npz", rng.integers(256, size=(40, 64, 64, 3), dtype=np.uint8))
    found = measure(Windows(tmp_path, device=CPU.device), *make_networks())
    assert "psnr_16" in found
    assert not any("readback" in key for key in found)


def test_measuring_changes_nothing(windows):
    networks = make_networks()
    before, state = copy.deepcopy([x.state_dict() for x in networks]), torch.get_rng_state()
    first = measure(windows, *networks)
    torch.testing.assert_close([x.state_dict() for x in networks], before, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(network.training for network in networks)
    torch.rand(3)
    assert measure(windows, *networks) == first


def test_stage_1_measures_once_at_its_end_and_the_report_shows_it(workplace, monkeypatch, capsys):
    calls = []
    measure = steering.measure_steering

    def counted(*arguments):
        calls.append(measure(*arguments))
        return calls[-1]

    monkeypatch.setattr(stage1_idm_wm, "measure_steering", counted)
    stage1_idm_wm.train(workplace.config("--stage1.probe_every", "1"))
    assert len(calls) == 1
    summary = report.report(workplace.config())
    found, printed = summary["steering"], capsys.readouterr().out
    assert [row["steps"] for row in found["open_loop"]] == [1, 2, 4, 8, 16][: len(found["open_loop"])]
    for row in found["open_loop"]:
        assert row["psnr"] == pytest.approx(float(calls[0][f"psnr_{row['steps']}"]))
        assert f"| {row['steps']} " in printed
    assert "PSNR of its rollouts" in printed
    read = [key for key in calls[0] if key.startswith("readback_acc_")]
    assert len(found["read_back"]) == (len(read) + 1 if read else 0)
