"""What belongs together stays together, through all stages: frames, latent actions and true actions.

Every frame spells its own number, and the latent actions are the numbers of a window's frames.
"""

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lapo import decoding, stage1_idm_wm, stage2_bc, stage3_decode
from lapo.models import IDM, Policy, WorldModel, normalize
from support import CountingEnv, Workplace, image_numbers, logged, numbered_frames, write_chunk

ACTIONS = np.random.default_rng(0).integers(15, size=3000)
"""The true action at the frame of each number."""
UNUSED = 16 - 3
"""Dimensions of a tiny run's latent actions, beside three numbers."""


def seeing_idm(self: IDM, window: Tensor) -> Tensor:
    """In place of `IDM.label`: a window's three numbers."""
    return F.pad(image_numbers(window), (0, UNUSED)) + 0 * self.head.bias.sum()


def seeing_policy(self: Policy, obs: Tensor) -> Tensor:
    """In place of `Policy.forward`: the numbers around its frame's; all are 2 too high where held out."""
    number = image_numbers(obs)
    around = torch.cat([number - 1, number, number + 1], 1) + 2 * (number >= 2000)
    return F.pad(around, (0, UNUSED)) + 0 * self.policy_head.bias.sum()


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


def middles(first: int) -> np.ndarray:
    """Numbers of the middle frames of all windows of a chunk: those that do not touch the end at 20."""
    return first + np.array([*range(1, 19), *range(22, 39)])


def test_stage_1_predicts_each_windows_last_frame_from_its_own_latent_action(numbered, monkeypatch):
    monkeypatch.setattr(IDM, "label", seeing_idm)
    monkeypatch.setattr(WorldModel, "forward", seeing_world_model)
    stage1_idm_wm.train(numbered.config("--exp", "seeing", "--vq.enabled", "false"))
    first, *lines = logged(numbered.run_dir("stage1", "seeing"))
    assert first["untrained_wm_loss_test"] == 0
    assert [line["wm_loss"] for line in lines] == [0, 0, 0, 0]
    assert lines[-1]["wm_loss_test"] == 0
    assert lines[-1]["copy_loss_test"] > 0


def test_stage_2_teaches_each_frame_its_own_latent_action(numbered, monkeypatch):
    monkeypatch.setattr(IDM, "label", seeing_idm)
    monkeypatch.setattr(Policy, "forward", seeing_policy)
    stage2_bc.train(numbered.config())
    lines = logged(numbered.run_dir("stage2"))
    assert [line["loss"] for line in lines] == [0, 0, 0, 0]
    # Measured on the held-out frames, all of them and no others.
    assert lines[-1]["loss_test"] == pytest.approx(3 * 2**2 / 16)
    train, test = np.concatenate([middles(1), middles(1001)]), middles(2001)
    error = ((test - train.mean()) ** 2).mean()
    assert lines[-1]["constant_loss_test"] == pytest.approx(3 * error / 16, rel=1e-5)


class Fits:
    """Stands for `decoding.fit`: notes the pairs that a decoder learns from, and its weights afterwards."""

    def __init__(self) -> None:
        self.pairs: list[list[tuple[int, ...]]] = []
        self.weights: list[dict[str, Tensor]] = []
        self.fit = decoding.fit

    def __call__(
        self, predict: Callable[[Tensor], Tensor], network: nn.Module, ta: Tensor, batches, **options
    ) -> Tensor:
        seen = []
        hook = network.register_forward_pre_hook(lambda network, inputs: seen.append(inputs[0]))
        predict(torch.arange(len(ta)))
        hook.remove()
        numbers = seen[0][:, :3].long().tolist()
        self.pairs.append(sorted((*row, action) for row, action in zip(numbers, ta.tolist(), strict=True)))
        loss = self.fit(predict, network, ta, batches, **options)
        self.weights.append({key: value.clone() for key, value in network.state_dict().items()})
        return loss


@pytest.fixture
def fits(monkeypatch: pytest.MonkeyPatch) -> Fits:
    """What decoders are fitted to, with an IDM that sees; nobody plays in the end."""
    fits = Fits()
    monkeypatch.setattr(decoding, "fit", fits)
    monkeypatch.setattr(stage3_decode, "fit", fits)
    monkeypatch.setattr(stage3_decode, "score", lambda *arguments: {})
    monkeypatch.setattr(IDM, "label", seeing_idm)
    return fits


def decoder_of(numbered: Workplace, stage: str) -> dict[str, Tensor]:
    """The decoder in a finished run's checkpoint."""
    path = numbered.run_dir(stage) / "checkpoint.pt"
    policy = torch.load(path, weights_only=True)["state"]["policy"]
    prefix = "decoder."
    return {key.removeprefix(prefix): value for key, value in policy.items() if key.startswith(prefix)}


def test_offline_mode_pairs_latent_actions_with_the_actions_of_their_own_frames(numbered, fits):
    stage2_bc.train(numbered.config("--stage2.steps", "1"))
    stage3_decode.train(numbered.config("--stage3.mode", "offline"))
    (pairs,) = fits.pairs
    assert len({pair[1] for pair in pairs}) == 32
    assert {pair[1] for pair in pairs} <= {*middles(1), *middles(1001)}
    assert pairs == [(n - 1, n, n + 1, ACTIONS[n]) for _, n, _, _ in pairs]
    torch.testing.assert_close(decoder_of(numbered, "stage3_offline"), fits.weights[0], rtol=0, atol=0)


def test_online_mode_pairs_latent_actions_with_what_the_agent_did_at_their_frames(
    numbered, fits, monkeypatch
):
    stage2_bc.train(numbered.config("--stage2.steps", "1"))
    env = CountingEnv(4, episode=11)
    monkeypatch.setattr(stage3_decode, "make_env", lambda cfg: env)
    schedule = {"start": 10_000, "every_update_until": 1_000_000, "every": 40_000, "until": 3_400_000}
    options = [word for key, value in schedule.items() for word in (f"--decoder.{key}", str(value))]
    stage3_decode.train(numbered.config("--stage3.mode", "online", *options))

    # Scaled to 192 of 4 million env steps: after every update of 32 until 48, after every second until 163.
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
    lines = logged(numbered.run_dir("stage3_online"))
    assert [line["step"] // 32 for line in lines if "decoder_loss" in line] == trained_after
    # The policy acts with the latest decoder.
    torch.testing.assert_close(decoder_of(numbered, "stage3_online"), fits.weights[-1], rtol=0, atol=0)
