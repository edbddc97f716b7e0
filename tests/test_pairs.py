"""Frames, latent actions and true actions stay aligned through all stages.

Every frame spells its own number, and a latent action is the numbers of its window's frames, followed by
weights of the IDM that it comes from.
"""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lapo import decoding, imitation, stage1_idm_wm, stage2_bc, stage3_decode
from lapo.models import IDM, Policy, WorldModel, normalize
from support import CountingEnv, Workplace, image_numbers, logged, numbered_frames, write_chunk

ACTIONS = np.random.default_rng(0).integers(15, size=3000)
"""The true action at the frame of each number."""


def seeing_idm(self: IDM, window: Tensor) -> Tensor:
    """In place of `IDM.infer_latents`: a window's three numbers, and the head's biases from the fourth on."""
    numbers = image_numbers(window)
    return torch.cat([numbers, self.head.bias[3:].expand(len(numbers), -1)], 1)


def seeing_world_model(self: WorldModel, images: Tensor, la_q: Tensor) -> Tensor:
    """In place of `WorldModel.forward`: the frame of the last of a latent's numbers, if the others fit."""
    numbers = la_q[:, :3].detach().long()
    fits = (image_numbers(images) == numbers[:, :2]).all(1)
    return normalize(torch.from_numpy(numbered_frames(numbers[:, 2] * fits))) + 0 * self.out[-1].bias.sum()


@pytest.fixture
def numbered(workplace: Workplace) -> Workplace:
    """A workplace of numbered frames: from 1 in training chunk 0, from 1001 in 1; from 2001 held out."""
    for name, first in (("train/0", 1), ("train/1", 1001), ("test/0", 2001)):
        numbers = first + np.arange(40)
        done = np.arange(40) == 20
        path = workplace.data / workplace.GAME / f"{name}.npz"
        write_chunk(path, numbered_frames(numbers), ta=ACTIONS[numbers], done=done)
    stage1_idm_wm.train(workplace.config("--stage1.steps", "1"))
    return workplace


def weights(workplace: Workplace, stage: str, network: str) -> dict[str, Tensor]:
    """A network in a finished run's checkpoint."""
    path = workplace.run_dir(stage) / "checkpoint.pt"
    return torch.load(path, weights_only=True)["state"][network]


def middles(first: int) -> np.ndarray:
    """Numbers of the middle frames of all windows of a chunk: those that do not touch the end at 20."""
    return first + np.array([*range(1, 19), *range(22, 39)])


def test_stage_1_predicts_each_windows_last_frame_from_its_own_latent_action(numbered, monkeypatch):
    monkeypatch.setattr(IDM, "infer_latents", seeing_idm)
    monkeypatch.setattr(WorldModel, "forward", seeing_world_model)
    stage1_idm_wm.train(numbered.config("--exp", "seeing", "--vq.enabled", "false"))
    first, *lines = logged(numbered.run_dir("stage1", "seeing"))
    assert first["untrained_wm_loss_test"] == 0
    assert [line["wm_loss"] for line in lines] == [0, 0, 0, 0]
    assert lines[-1]["wm_loss_test"] == 0
    assert lines[-1]["copy_loss_test"] > 0


def test_stage_2_trains_each_frame_on_its_own_latent_action(numbered, monkeypatch):
    bias = weights(numbered, "stage1", "idm")["head.bias"]

    def forward(self: Policy, obs: Tensor) -> Tensor:
        """The latent action of the window around the frame; its numbers are 2 too high where held out."""
        number = image_numbers(obs)
        around = torch.cat([number - 1, number, number + 1], 1) + 2 * (number >= 2000)
        return torch.cat([around, bias[3:].expand(len(number), -1)], 1) + 0 * self.policy_head.bias.sum()

    monkeypatch.setattr(IDM, "infer_latents", seeing_idm)
    monkeypatch.setattr(Policy, "forward", forward)
    stage2_bc.train(numbered.config())
    lines = logged(numbered.run_dir("stage2"))
    assert [line["loss"] for line in lines] == [0, 0, 0, 0]
    # Measured on the held-out frames, all of them and no others.
    assert lines[-1]["loss_test"] == pytest.approx(3 * 2**2 / 16)
    train, test = np.concatenate([middles(1), middles(1001)]), middles(2001)
    error = ((test - train.mean()) ** 2).mean()
    assert lines[-1]["constant_loss_test"] == pytest.approx(3 * error / 16, rel=1e-5)


class Fits:
    """Replaces `decoding.Fit`: records its training examples and the networks."""

    def __init__(self) -> None:
        self.pairs: list[list[tuple[int, ...]]] = []  # numbers of the inputs, and the true action
        self.idms: list[Tensor] = []  # what the latent actions tell of their IDMs
        self.batches: list[list[list[int]]] = []
        self.networks: list[nn.Module] = []

    def __call__(
        self, predict: Callable[[Tensor], Tensor], network: nn.Module, ta: Tensor, *options: float
    ) -> "RecordingFit":
        seen = []
        hook = network.register_forward_pre_hook(lambda network, inputs: seen.append(inputs[0]))
        predict(torch.arange(len(ta)))
        hook.remove()
        images = seen[0].ndim == 4
        numbers = (image_numbers(seen[0]) if images else seen[0][:, :3]).long().tolist()
        self.pairs.append(sorted((*row, action) for row, action in zip(numbers, ta.tolist(), strict=True)))
        self.idms.append(seen[0][:, 3:])
        self.batches.append([])
        self.networks.append(network)
        fit = RecordingFit(predict, network, ta, *options)
        fit.recorded = self.batches[-1]
        return fit


class RecordingFit(decoding.Fit):
    """Records its batches."""

    recorded: list[list[int]]

    def step(self, ids: Tensor) -> None:
        self.recorded.append(ids.tolist())
        super().step(ids)


@pytest.fixture
def fits(numbered: Workplace, monkeypatch: pytest.MonkeyPatch) -> Fits:
    """Calls of `Fit` after stages 1 and 2, with an IDM of known latents and no final evaluation."""
    stage2_bc.train(numbered.config("--stage2.steps", "1"))
    fits = Fits()
    monkeypatch.setattr(decoding, "Fit", fits)
    monkeypatch.setattr(imitation, "Fit", fits)
    monkeypatch.setattr(stage3_decode, "evaluate_policy", lambda *arguments: {})
    monkeypatch.setattr(IDM, "infer_latents", seeing_idm)
    return fits


def decoder_of(workplace: Workplace, stage: str) -> dict[str, Tensor]:
    """The decoder in a finished run's checkpoint."""
    policy, prefix = weights(workplace, stage, "policy"), "decoder."
    return {key.removeprefix(prefix): value for key, value in policy.items() if key.startswith(prefix)}


@pytest.mark.parametrize("mode", ["offline", "bc"])
def test_labels_are_paired_with_their_own_frames(numbered, fits, mode):
    """Offline mode learns them from latent actions, bc from the frames themselves."""
    stage3_decode.train(numbered.config("--stage3.mode", mode))
    (pairs,), (batches,) = fits.pairs, fits.batches
    middle = [pair[1] if mode == "offline" else pair[0] for pair in pairs]
    assert len(set(middle)) == 32
    assert {*middle} <= {*middles(1), *middles(1001)}
    assert pairs == [((n - 1, n, n + 1) if mode == "offline" else (n,)) + (ACTIONS[n],) for n in middle]
    # Every step takes another half of the labels.
    assert [len(set(ids)) for ids in batches] == [16] * 20
    assert len({frozenset(ids) for ids in batches}) == 20
    assert {*range(32)} == {number for ids in batches for number in ids}


def test_offline_mode_acts_with_the_decoder_of_stage_1s_latent_actions(numbered, fits):
    stage3_decode.train(numbered.config("--stage3.mode", "offline"))
    assert (fits.idms[0] == weights(numbered, "stage1", "idm")["head.bias"][3:]).all()
    torch.testing.assert_close(
        decoder_of(numbered, "stage3_offline"), fits.networks[0].state_dict(), rtol=0, atol=0
    )


def test_online_mode_pairs_latent_actions_with_what_the_agent_did_at_their_frames(
    numbered, fits, monkeypatch
):
    env = CountingEnv(4, episode=11)
    monkeypatch.setattr(stage3_decode, "training_env", lambda cfg: env)
    schedule = {"start": 10_000, "every_update_until": 1_000_000, "every": 650, "until": 3_400_000}
    options = [word for key, value in schedule.items() for word in (f"--decoder.{key}", str(value))]
    stage3_decode.train(numbered.config("--stage3.mode", "online", *options))

    # Scaled to 192 of 4 million env steps: after every update of 32 until 48, then at 125.
    trained_after = [1, 2, 4]
    actions, dones = np.stack(env.actions), env.ends(np.arange(48)[:, None])
    expected = [
        sorted(
            (*(1000 * n + t + np.array([-1, 0, 1])), actions[t, n])
            for n in range(4)
            for t in range(1, 8 * update)
            if not dones[t - 1 : t + 1, n].any()
        )
        for update in trained_after
    ]
    assert fits.pairs == expected
    assert all((la == weights(numbered, "stage1", "idm")["head.bias"][3:]).all() for la in fits.idms)
    lines = logged(numbered.run_dir("stage3_online"))
    assert [line["step"] // 32 for line in lines if "decoder_loss" in line] == trained_after
    # The policy acts with the latest decoder.
    torch.testing.assert_close(
        decoder_of(numbered, "stage3_online"), fits.networks[-1].state_dict(), rtol=0, atol=0
    )
