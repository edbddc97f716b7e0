"""The paper's comparisons: modes no_sl, ilpo, idm_labelling and lapo_plus of stage 3."""

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lapo import ilpo, imitation, stage1_idm_wm, stage2_bc, stage3_decode
from lapo.data_loader import Shared, Windows
from lapo.decoding import Fit
from lapo.errors import UserError
from lapo.ilpo import ilpo_loss
from lapo.models import (
    Generator,
    image_size_of,
    infer_latents,
    make_acting_policy,
    make_idm,
    make_ilpo_policy,
    make_latent_policy,
    restore,
    stack_frames,
)
from lapo.ppo import ppo_loss
from lapo.runs.checkpoints import load_checkpoint, saved_config
from support import CPU as PLAIN
from support import LAPO, PATIENCE, Workplace, result, write_chunk

CPU = torch.device("cpu")


def checkpoint(place: Workplace, stage: str, exp: str = "main") -> dict:
    return load_checkpoint(place.run_dir(stage, exp) / "checkpoint.pt")


# ---------------------------------------------------------------- without the decoder


def test_no_sl_is_online_without_decoder_and_halving(workplace):
    """Same head, the decoder's logits zero, logits not halved: equal losses and gradients."""
    cfg = workplace.config()
    latent = make_latent_policy(cfg)
    online, alone = (make_acting_policy(cfg, mode, 15, latent.state_dict()) for mode in ("online", "no_sl"))
    torch.nn.init.zeros_(online.decoder[-1].weight)
    torch.nn.init.zeros_(online.decoder[-1].bias)
    for layer in ("fc", "policy_head", "value_head"):
        weights = {key: torch.randn_like(x) for key, x in getattr(online, layer).state_dict().items()}
        getattr(online, layer).load_state_dict(weights)
        getattr(alone, layer).load_state_dict(weights)
    frames = torch.randint(256, (32, 64, 64, 3), dtype=torch.uint8)
    action = torch.randint(15, (32,))
    old = [torch.randn(32) for _ in range(4)]
    losses = []
    for policy, factor in ((online, 2), (alone, 1)):
        logits, value = policy(*policy.encode(frames))
        loss, _ = ppo_loss(factor * logits, value, action, *old, cfg.ppo)
        loss.backward()
        losses.append(loss)
        assert torch.equal(factor * policy.logits(frames), factor * logits)
    assert torch.equal(*losses)
    for layer in ("fc", "policy_head", "value_head"):
        pairs = zip(getattr(online, layer).parameters(), getattr(alone, layer).parameters(), strict=True)
        for ours, theirs in pairs:
            assert torch.equal(ours.grad, theirs.grad)
            assert ours.grad.abs().sum() > 0
    assert all(x.grad is None for x in alone.trunk.parameters())


def test_no_sl_begins_without_preference_on_the_latent_policys_layers(workplace):
    cfg = workplace.config()
    latent = make_latent_policy(cfg)
    policy = make_acting_policy(cfg, "no_sl", 15, latent.state_dict())
    frames = torch.randint(256, (4, 64, 64, 3), dtype=torch.uint8)
    assert (policy.logits(frames) == 0).all()
    for ours, theirs in ((policy.trunk, latent.trunk), (policy.fc, latent.fc)):
        for key, value in theirs.state_dict().items():
            assert torch.equal(ours.state_dict()[key], value)


def test_no_sl_trains_its_head_on_the_trunk_of_stage_2_with_onlines_rates(trained):
    trained.branch("no-sl", "stage2")  # it needs no IDM
    stage3_decode.train(trained.config("--exp", "no-sl", "--stage3.mode", "no_sl"))
    policy = checkpoint(trained, "stage3_no_sl", "no-sl")["state"]["policy"]
    latent = checkpoint(trained, "stage2")["state"]["policy"]
    for key, value in policy.items():
        frozen = key.startswith("trunk")
        assert frozen == (key in latent and torch.equal(value, latent[key])), key
    cfg = trained.config()
    networks = [make_acting_policy(cfg, mode, 15) for mode in ("no_sl", "online")]
    optimizers = [stage3_decode.ramped_optimizer(cfg, network) for network in networks]
    for env_steps in (32, 64, 192):
        for _, set_lrs in optimizers:
            set_lrs(env_steps)
        ours, theirs = ([group["lr"] for group in optimizer.param_groups] for optimizer, _ in optimizers)
        assert ours == theirs


# ---------------------------------------------------------------- ILPO


def test_ilpos_loss_equals_loops():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 4, generator=generator, requires_grad=True)
    changes = torch.randn(5, 4, 3, 6, 6, generator=generator, requires_grad=True)
    change = torch.randn(5, 3, 6, 6, generator=generator)
    loss, parts = ilpo_loss(logits, changes, change)
    loss.backward()

    best_sum, mixed_sum = 0.0, 0.0
    for b in range(5):
        errors = [sum(((change[b] - changes[b, z]) ** 2).flatten()) for z in range(4)]
        best_sum = best_sum + min(errors)
        weights = logits[b].exp() / logits[b].exp().sum()
        expected = sum(weights[z] * changes[b, z].detach() for z in range(4))
        mixed_sum = mixed_sum + sum(((change[b] - expected) ** 2).flatten())
    assert parts["generator_loss"].item() == pytest.approx(best_sum.item() / 5, rel=1e-5)
    assert parts["policy_loss"].item() == pytest.approx(mixed_sum.item() / 5, rel=1e-5)
    assert loss.item() == pytest.approx((best_sum + mixed_sum).item() / 5, rel=1e-5)
    ours = [x.grad.clone() for x in (logits, changes)]
    naive = torch.autograd.grad((best_sum + mixed_sum) / 5, (logits, changes))
    for found, expected in zip(ours, naive, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    # The policy's part does not train the generator: every sample trains its best prediction alone.
    assert ((changes.grad != 0).flatten(2).any(2).sum(1) == 1).all()


@pytest.mark.parametrize("size", [64, 16])
def test_the_generator_predicts_each_latent_action_as_if_it_were_alone(size):
    torch.manual_seed(0)
    network = Generator(4, 2, size).eval()
    images = torch.rand(3, 3, size, size) - 0.5
    together = network(images)
    assert together.shape == (3, 4, 3, size, size)
    skips, x = [], images
    for block in network.down:
        x = block(x)
        skips.append(x)
    for z in range(4):
        alone = network.ascend(skips, F.one_hot(torch.tensor([z] * 3), 4).float(), images)
        torch.testing.assert_close(together[:, z], alone)
    assert (together.std(1) > 0).any()


def test_ilpo_pretrains_a_trunk_on_frames_then_plays_on_it(workplace, capsys):
    stage3_decode.train(workplace.config("--stage3.mode", "ilpo"))
    trunk = checkpoint(workplace, "ilpo_trunk")
    assert trunk["finished"]
    assert trunk["step"] == 8
    policy = checkpoint(workplace, "stage3_ilpo")
    for key, value in policy["state"]["policy"].items():
        if key.startswith("trunk"):
            assert torch.equal(value, trunk["state"]["policy"][key])
    assert policy["state"]["policy"]["policy_head.bias"].shape == (15,)
    assert trunk["state"]["policy"]["policy_head.bias"].shape == (3,)
    capsys.readouterr()
    stage3_decode.train(workplace.config("--stage3.mode", "ilpo"))
    assert capsys.readouterr().out.count("finished already") == 2
    with pytest.raises(UserError, match=r"ilpo\.num_actions: 3 → 4"):
        stage3_decode.train(workplace.config("--stage3.mode", "ilpo", "--ilpo.num_actions", "4"))


def test_ilpo_equals_a_plain_loop(workplace):
    cfg = workplace.config("--stage3.mode", "ilpo")
    ilpo.train_trunk(cfg, PLAIN)
    torch.manual_seed(cfg.seed)
    windows = Windows.read(cfg, "train", CPU)
    policy, generator = make_ilpo_policy(cfg), Generator(3, cfg.model.wm_width)
    initial = {key: x.clone() for key, x in policy.state_dict().items()}
    params = [*policy.parameters(), *generator.parameters()]
    optimizer, losses = torch.optim.Adam(params, lr=cfg.ilpo.lr, betas=(0.5, 0.999)), []
    for step in range(8):
        frames = windows.gather(windows.batch(step, 4, cfg.seed))
        now, following = (frames[:, t].movedim(-1, 1).float() / 255 - 0.5 for t in (1, 2))
        loss, parts = ilpo_loss(policy(now), generator(now), following - now)
        losses.append(parts["generator_loss"].item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    # Adam turns rounding of gradients near zero into whole steps, of a few weights.
    saved, expected = checkpoint(workplace, "ilpo_trunk")["state"]["policy"], policy.state_dict()
    error = sum((saved[key] - expected[key]).square().sum() for key in expected)
    movement = sum((expected[key] - initial[key]).square().sum() for key in expected)
    assert error < 0.3**2 * movement
    lines = (workplace.run_dir("ilpo_trunk") / "metrics.jsonl").read_text().splitlines()
    logged = [json.loads(line)["generator_loss"] for line in lines]
    assert logged == pytest.approx([sum(losses[k : k + 2]) / 2 for k in range(0, 8, 2)], rel=1e-4)


# ---------------------------------------------------------------- labels of an IDM


@pytest.fixture
def fits(monkeypatch) -> list[Fit]:
    """All `Fit`s that the modes make, in order."""
    made = []

    class Kept(Fit):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            made.append(self)

    monkeypatch.setattr(imitation, "Fit", Kept)
    return made


@pytest.mark.parametrize("mode", ["idm_labelling", "lapo_plus"])
def test_all_frames_get_the_likeliest_action_of_what_the_labels_taught(trained, fits, mode):
    options = "--exp", f"relabel-{mode}", "--stage3.mode", mode, "--stages_from", "main"
    cfg = trained.config(*options)
    stage3_decode.train(cfg)
    teacher, clone = fits
    windows = Windows.read(cfg, "train", CPU)
    frames = windows.gather(windows.all())
    if mode == "idm_labelling":
        logits = teacher.network(stack_frames(frames))
        assert (teacher.count, len(teacher.ta)) == (6, 32)
    else:
        idm = restore(make_idm(cfg), checkpoint(trained, "stage1")["state"]["idm"], PLAIN)
        logits = teacher.network(infer_latents(idm, [frames], PLAIN))
        assert (teacher.count, len(teacher.ta)) == (20, 32)
    assert torch.equal(clone.ta, logits.argmax(-1))
    assert clone.count == 14
    # The teacher saw the labels of the other modes.
    _, ids, ta = imitation.labelled(cfg, PLAIN, Shared())
    assert torch.equal(teacher.ta, ta)
    assert len(ids) == 32
    metrics = checkpoint(trained, f"stage3_{mode}", f"relabel-{mode}")["metrics"]
    right = (clone.ta == windows.actions(windows.all())).float().mean()
    assert metrics["label_acc"] == pytest.approx(right.item())
    # Whose weights the acting policy has: the clone's.
    policy = checkpoint(trained, f"stage3_{mode}", f"relabel-{mode}")["state"]["policy"]
    for key, value in clone.network.state_dict().items():
        assert torch.equal(policy[key], value)


def test_a_clone_equals_a_plain_loop(trained, fits):
    """Cross-entropy to the labels, in stage 2's order of batches."""
    options = "--exp", "clone-loop", "--stage3.mode", "lapo_plus", "--stages_from", "main"
    cfg = trained.config(*options)
    initial = []
    start = imitation.make_acting_policy

    def keeping(*arguments):
        policy = start(*arguments)
        initial.append({key: x.clone() for key, x in policy.state_dict().items()})
        return policy

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(imitation, "make_acting_policy", keeping)
        stage3_decode.train(cfg)
    clone = fits[1]
    windows = Windows.read(cfg, "train", CPU)
    policy = make_acting_policy(cfg, "lapo_plus", 15)
    policy.load_state_dict(initial[0])
    optimizer = torch.optim.Adam(policy.parameters(), lr=cfg.relabel.lr)
    for step in range(14):
        ids = windows.batch(step, 16, cfg.seed)
        loss = F.cross_entropy(policy.logits(windows.gather(ids)[:, 1]), clone.ta[ids])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    # Adam makes whole steps of gradients that are almost zero, so single weights differ by rounding.
    for key, value in policy.state_dict().items():
        moved = (value - initial[0][key]).abs().mean()
        assert (clone.network.state_dict()[key] - value).abs().mean() < 0.01 * moved, key


# ---------------------------------------------------------------- all of them


@pytest.mark.parametrize(
    ("mode", "where", "count"),
    [
        ("idm_labelling", (Fit, "step"), 4),
        ("idm_labelling", (Fit, "step"), 13),
        ("lapo_plus", (Fit, "step"), 27),
        ("ilpo", (ilpo, "ilpo_loss"), 5),
        ("ilpo", (stage3_decode.PPOTrainer, "improve"), 3),
        ("no_sl", (stage3_decode.PPOTrainer, "improve"), 3),
    ],
)
def test_a_stopped_run_ends_as_an_uninterrupted_one(trained, monkeypatch, mode, where, count):
    """Stopped in either phase."""
    owner, name = where
    original, calls = getattr(owner, name), []

    def stopping(*arguments):
        calls.append(None)
        if len(calls) == count:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*arguments)

    whole, stopped = (f"{mode}-{name}-{count}-{kind}" for kind in ("whole", "stopped"))
    options = "--stage3.mode", mode, "--stages_from", "main"
    stage3_decode.train(trained.config("--exp", whole, *options))
    monkeypatch.setattr(owner, name, stopping)
    with pytest.raises(SystemExit):
        stage3_decode.train(trained.config("--exp", stopped, *options))
    assert len(calls) == count
    stage3_decode.train(trained.config("--exp", stopped, *options))
    stages = [f"stage3_{mode}"] + ["ilpo_trunk"] * (mode == "ilpo")
    for stage in stages:
        assert result(trained.run_dir(stage, stopped)) == result(trained.run_dir(stage, whole))


@pytest.mark.slow
def test_without_quantiser_and_without_the_decoder(workplace):
    """The ablation "no VQ": `--vq.enabled false` through all stages, then no_sl; with LAPO+'s windows."""
    options = "--vq.enabled", "false", "--data.context", "0"
    for script in ("stage1.py", "stage2.py", "stage3.py"):
        mode = ["--stage3.mode", "no_sl"] * (script == "stage3.py")
        done = workplace.run(script, *options, *mode)
        assert done.returncode == 0, done.stderr
    saved = checkpoint(workplace, "stage3_no_sl")
    assert saved["finished"]
    assert saved["config"]["vq"]["enabled"] is False
    assert np.isfinite(saved["metrics"]["return_mean"])


def test_small_frames_and_another_window_in_all_modes(workplace):
    """And the real command of one, whose policy another command evaluates."""
    options = "--data.image_size", "16", "--data.context", "2"
    stage1_idm_wm.train(workplace.config(*options))
    stage2_bc.train(workplace.config(*options))
    for mode in ("no_sl", "ilpo", "idm_labelling"):
        stage3_decode.train(workplace.config(*options, "--stage3.mode", mode))
    done = workplace.run("stage3.py", *options, "--stage3.mode", "lapo_plus")
    assert done.returncode == 0, done.stderr
    for mode in ("no_sl", "ilpo", "idm_labelling", "lapo_plus"):
        saved = checkpoint(workplace, f"stage3_{mode}")
        network = make_acting_policy(saved_config(saved), mode, 15)
        network.load_state_dict(saved["state"]["policy"])
        assert image_size_of(network) == 16
        assert saved["metrics"]["episodes"] == 2
    path = workplace.run_dir("stage3_lapo_plus") / "checkpoint.pt"
    command = [sys.executable, str(LAPO / "evaluate.py"), "--checkpoint", str(path), "--episodes", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    assert "2 episodes of bossfight" in done.stdout


@pytest.mark.parametrize(
    ("mode", "sentence"),
    [("no_sl", "learns by playing"), ("ilpo", "learns by playing"), ("lapo_plus", "does not exist")],
)
def test_what_a_mode_lacks_is_said(workplace, mode, sentence):
    env = ["--env", "nogame"] * (mode != "lapo_plus")
    with pytest.raises(UserError, match=sentence):
        stage3_decode.train(workplace.config(*env, "--stage3.mode", mode))


def test_labels_may_be_those_of_the_first_chunk_alone(workplace):
    """Whether the actions given to frames without true ones are right cannot be told."""
    path = workplace.data / workplace.GAME / "train" / "1.npz"
    arrays = {key: x for key, x in np.load(path).items() if key != "ta"}
    write_chunk(path, **arrays)
    cfg = workplace.config(
        "--stage3.mode", "idm_labelling", "--offline.labels", "8", "--offline.batch_size", "8"
    )
    stage3_decode.train(cfg)
    metrics = load_checkpoint(cfg.run_dir / "stage3_idm_labelling" / "checkpoint.pt")["metrics"]
    assert "loss" in metrics
    assert "label_acc" not in metrics
