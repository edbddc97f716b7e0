"""Other frames, windows and bottlenecks than the published ones: all stages, and what uses them."""

import numpy as np
import pytest
import torch

import lapo
from lapo import evaluate, stage1_idm_wm, stage2_bc, stage3_decode
from lapo.errors import UserError
from lapo.modes import MODES
from support import Workplace, write_game

VARIANTS = {
    "small frames, no context, fsq": ("--data.image_size=32", "--data.context=0", "--vq.kind=fsq"),
    "long context, no bottleneck": ("--data.context=3", "--vq.enabled=false"),
}
SIZES = {"small frames, no context, fsq": (32, 0), "long context, no bottleneck": (64, 3)}


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_through_all_stages(workplace: Workplace, variant, call_main):
    """Later stages and scripts follow the checkpoint: only stages without an earlier one need the options."""
    options, (size, context) = VARIANTS[variant], SIZES[variant]
    write_game(workplace.data / workplace.GAME, frames=400)
    stage1_idm_wm.train(workplace.config(*options))
    stage2_bc.train(workplace.config())
    for mode in MODES:
        given = () if {"stage1", "stage2"} & set(MODES[mode].stages) else options
        stage3_decode.train(workplace.config(*given, "--stage3.mode", mode))
    report = workplace.run("report.py")
    assert report.returncode == 0, report.stderr
    drawn = {path.name for path in workplace.run_dir("stage1").parent.iterdir()}
    assert drawn >= {"latents.png", "predictions.png", "returns.png"}

    model = lapo.load_stage1(workplace.run_dir("stage1"))
    video = np.random.default_rng(0).integers(256, size=(9, size, size, 3), dtype=np.uint8)
    found = model.infer(video)
    assert found.valid.tolist() == [t >= context and t < 8 for t in range(9)]
    past = torch.from_numpy(np.stack([video[t - context : t + 1] for t in range(context, 8)]))
    assert model.predict(past, found.la_q[found.valid]).shape == (8 - context, size, size, 3)
    assert model.rollout(past, found.la_q[found.valid][:2]).shape == (8 - context, 2, size, size, 3)
    with pytest.raises(UserError, match=rf"frames must be uint8 \(B, {context + 1}, {size}, {size}, 3\)"):
        model.predict(past[:, :, :8, :8], found.la_q[found.valid])

    policy = workplace.run_dir("stage3_online") / "checkpoint.pt"
    assert lapo.load_policy(policy).act(video).shape == (9,)
    arguments = ("--checkpoint", str(policy), "--episodes", "2", "--num-envs", "2", "--device", "cpu")
    status, out, _ = call_main(evaluate.main, *arguments)
    assert status == 0
    assert "return  " in out


@pytest.mark.parametrize(
    ("options", "change"),
    [
        ("--data.image_size=32", "data.image_size: 64 → 32"),
        ("--data.context=0", "data.context: 1 → 0"),
        ("--vq.kind=fsq", "vq.kind: ema → fsq"),
        ("--vq.enabled=false", "vq.enabled: True → False"),
    ],
)
def test_a_finished_stage_of_another_variant_is_refused(trained: Workplace, options, change):
    with pytest.raises(UserError, match=f"trained with other settings .*{change}"):
        stage1_idm_wm.train(trained.config(options))


def test_a_finished_policy_of_another_size_is_refused(workplace: Workplace):
    stage3_decode.train(workplace.config("--stage3.mode=scratch"))
    with pytest.raises(UserError, match=r"other settings \(data.image_size: 64 → 32\)"):
        stage3_decode.train(workplace.config("--stage3.mode=scratch", "--data.image_size=32"))
    with pytest.raises(UserError, match=r"'data.image_size' is 48: input should be"):
        workplace.config("--data.image_size=48")
