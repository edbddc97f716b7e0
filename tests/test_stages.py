"""The stages as they are used: real command lines on tiny networks, and what each leaves behind."""

import importlib
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml

from lapo import decoding, imitation, stage1_idm_wm, stage2_bc, stage3_decode
from lapo.config import load_config, to_dict
from lapo.data_loader import Shared, Windows
from lapo.errors import UserError
from lapo.games.table import GAMES
from lapo.models import make_idm, make_latent_policy, make_world_model, normalize, stack_frames
from lapo.modes import MODES
from lapo.report import report
from lapo.runs.checkpoints import load_checkpoint
from support import CPU, LAPO, PATIENCE, Workplace, numbered_frames, result, write_chunk

TRAIN = {"stage1": stage1_idm_wm.train, "stage2": stage2_bc.train, "stage3": stage3_decode.train}


def metrics(folder: Path) -> list[dict]:
    """The lines of a run's metrics."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def checkpoint(workplace: Workplace, stage: str, exp: str = "main") -> dict:
    return load_checkpoint(workplace.run_dir(stage, exp) / "checkpoint.pt")


def assert_equal_weights(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(found[key], value), key


# ---------------------------------------------------------------- the commands


@pytest.mark.parametrize(
    ("short", "script"),
    [("stage1", "stage1_idm_wm"), ("stage2", "stage2_bc"), ("stage3", "stage3_decode")],
)
def test_each_stage_has_two_names(short, script):
    names = [importlib.import_module(f"lapo.{name}") for name in (short, script)]
    assert names[0].main is names[1].main


def test_the_three_stages_from_another_folder(workplace):
    before = set(workplace.folder.iterdir())
    seed0 = workplace.results / "main" / workplace.GAME / "seed0"
    for script, stage, lines in (
        (
            "stage1.py",
            "stage1",
            [
                "stage1 of bossfight, seed 0, on cpu (1 threads), fp32",
                "train: 80 frames in 2 chunks, 70 windows, with true actions",
                "test: 40 frames in 1 chunks, 35 windows, with true actions",
                "probe_acc_test",
                "majority_acc_test",
                "copy_loss_test",
            ],
        ),
        (
            "stage2_bc.py",
            "stage2",
            [
                f"stage1: {seed0}/stage1/checkpoint.pt",
                "inherits idm_scale, vq, image_size, context\n",
                "loss_test",
            ],
        ),
        (
            "stage3.py",
            "stage3_online",
            [
                f"stage1: {seed0}/stage1/checkpoint.pt",
                f"stage2: {seed0}/stage2/checkpoint.pt",
                "inherits policy_scale, vq, image_size, context\n",
                "return_mean",
                "return_stderr",
                "relative_return",
                "episodes                     2",
            ],
        ),
    ):
        done = workplace.run(script)
        assert done.returncode == 0, done.stderr
        for line in [*lines, f"\n{seed0}/{stage}\n"]:
            assert line in done.stdout
        assert done.stdout.endswith(f"{stage} done: {seed0}/{stage}/checkpoint.pt\n")
        assert f"{stage}: 100%" in done.stderr  # progress
        assert "Traceback" not in done.stderr
        assert {path.name for path in (seed0 / stage).iterdir()} == {
            "checkpoint.pt",
            "config.yaml",
            "metrics.jsonl",
        }
    assert set(workplace.folder.iterdir()) == before | {workplace.results}


def test_sigterm_on_the_command_line_saves_and_the_same_command_continues(workplace):
    process = workplace.start("stage1.py", "--stage1.steps", "1000", "--stage1.save_every", "1")
    while process.poll() is None and not (workplace.run_dir("stage1") / "checkpoint.pt").exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=PATIENCE)
    assert process.returncode == 143
    step = checkpoint(workplace, "stage1")["step"]
    assert stderr.splitlines()[-1] == f"stopped at step {step}; the same command continues"


# ---------------------------------------------------------------- mistakes on real command lines


def refused(workplace: Workplace, script: str, *arguments: str) -> str:
    """The one line with which a command line is refused."""
    done = workplace.run(script, *arguments)
    assert done.returncode == 2, done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    return lines[0].removeprefix("error: ")


def test_an_unknown_game_lists_the_games(workplace):
    message = refused(workplace, "stage1.py", "--env", "bigfsh")
    assert message == (
        f"'bigfsh' is neither a Procgen game nor a folder {workplace.data / 'bigfsh'};"
        f" the games are {', '.join(GAMES)}, and `python import_video.py --env bigfsh` makes such a folder"
        " from videos"
    )


@pytest.mark.slow
def test_a_closed_pipe_is_no_error():
    command = [sys.executable, str(LAPO / "expert_table.py")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(timeout=PATIENCE) == 141


def test_a_missing_data_folder_says_how_to_make_it(workplace):
    folder = workplace.data / "maze"
    message = refused(workplace, "stage1.py", "--env", "maze")
    assert message.startswith(f"the data folder {folder} does not exist; make it with")
    assert "record_expert.py --env maze" in message


def truncated(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def test_a_bad_chunk_is_named(workplace):
    path = workplace.data / workplace.GAME / "train" / "1.npz"
    truncated(path)
    assert refused(workplace, "stage1_idm_wm.py").startswith(f"{path} is not a readable npz file")


def test_a_missing_earlier_stage_names_the_command_that_makes_it(workplace):
    path = workplace.run_dir("stage1") / "checkpoint.pt"
    message = refused(workplace, "stage2.py", "--seed", "0")
    assert message == (
        f"the checkpoint {path} does not exist; make it with"
        f" `python stage1.py --config {workplace.config_file} --seed 0`, or take that of another experiment"
        " with --stages_from EXP"
    )


def test_a_typo_in_a_config_file_is_named(workplace):
    workplace.config_file.write_text("stage1: {leraning_rate: 1}\n")
    message = refused(workplace, "stage1.py")
    assert message.startswith(
        f"{workplace.config_file}: unknown key 'stage1.leraning_rate'; allowed here: steps,"
    )


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(workplace):
    """The learning rate is 0 at step 0 and absurd from step 2 on."""
    schedule = ["--stage1.lr_start", "0", "--stage1.lr_end", "1e38", "--stage1.lr", "1"]
    done = workplace.run("stage1.py", *schedule, "--stage1.log_every", "1", "--stage1.save_every", "1")
    assert done.returncode == 2
    last = done.stderr.splitlines()[-1]
    path = workplace.run_dir("stage1") / "checkpoint.pt"
    assert f"; the last good checkpoint, {path}, is kept; try a lower learning rate" in last
    assert last.startswith("error: stage1: ")
    assert " at step " in last
    kept = checkpoint(workplace, "stage1")
    assert not kept["finished"]
    assert all(value.isfinite().all() for value in kept["state"]["idm"].values())
    assert all(math.isfinite(value) for line in metrics(path.parent) for value in line.values())


def test_wandb_without_an_account_keeps_metrics_offline(workplace, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    done = workplace.run("stage1.py", "--wandb", "online", HOME=str(workplace.folder))
    assert done.returncode == 0
    assert "wandb: nobody is logged in here, so metrics are kept offline" in done.stdout
    folder = workplace.run_dir("stage1")
    assert list(folder.glob("wandb/offline-run-*/*.wandb"))
    assert checkpoint(workplace, "stage1")["wandb_id"]
    assert len(metrics(folder)) == 5


# ---------------------------------------------------------------- stage 1


def one_chunk(workplace: Workplace) -> Windows:
    """The training windows, as the stages see them."""
    return Windows(workplace.data / workplace.GAME / "train", device=torch.device("cpu"))


def test_stage_1_equals_a_plain_training_loop(workplace):
    """Joint loss, AdamW, learning rates and clipping; quantiser and networks have tests of their own."""
    cfg = workplace.config("--stage1.log_every", "1", "--stage1.steps", "5", "--vq.start", "data")
    stage1_idm_wm.train(cfg)

    torch.manual_seed(cfg.seed)
    idm, world_model = make_idm(cfg), make_world_model(cfg)
    params = [*idm.parameters(), *world_model.parameters()]
    optimizer = torch.optim.AdamW(params)
    windows = one_chunk(workplace)
    for step, line in enumerate(metrics(workplace.run_dir("stage1"))[1:]):
        assert line["step"] == step + 1
        warmup = 50 * 5 / 50_000
        done = (step - warmup) / (6 - warmup)
        optimizer.param_groups[0]["lr"] = 3e-4 * (0.1 if step == 0 else 1 - 0.99 * done)
        frames = windows.gather(windows.batch(step, 4, cfg.seed))
        before, now, after = (normalize(frames[:, t]) for t in range(3))
        _, quantized = idm(torch.cat([before, now, after], 1))
        wm_loss = F.mse_loss(world_model(torch.cat([before, now], 1), quantized.la_q), after)
        optimizer.zero_grad()
        (wm_loss + quantized.loss).backward()
        norm = torch.nn.utils.clip_grad_norm_(params, 2.0)
        optimizer.step()
        expected = {
            "loss": wm_loss + quantized.loss,
            "wm_loss": wm_loss,
            "vq_loss": quantized.loss,
            "perplexity": quantized.perplexity,
            "grad_norm": norm,
        }
        for key, value in expected.items():
            assert line[key] == pytest.approx(value.item(), rel=1e-4), (step, key)


def test_stage_1_is_evaluated_untrained_at_intervals_and_at_the_end(trained):
    lines = {line["step"]: line for line in metrics(trained.run_dir("stage1"))}
    assert list(lines) == [0, 2, 4, 6, 8]
    measured = {"wm_loss_test", "copy_loss_test", "majority_acc_test"} | {
        f"probe_{kind}{half}" for kind in ("acc", "loss") for half in ("", "_test")
    }
    trained_on = {"loss", "wm_loss", "vq_loss", "perplexity", "grad_norm"}
    assert lines[0].keys() - {"step", "seconds"} == {f"untrained_{key}" for key in measured}
    for step in (2, 6):
        assert lines[step].keys() - {"step", "seconds"} == trained_on
    assert lines[4].keys() - {"step", "seconds"} == trained_on | measured
    steering = lines[8].keys() - {"step", "seconds"} - trained_on - measured
    assert lines[8].keys() > trained_on | measured
    assert all(re.match("(copy_|delta_)?psnr_|readback_", key) for key in steering)
    assert "psnr_1" in steering


def test_actions_and_rewards_never_reach_stages_1_and_2(trained, tmp_path):
    """With frames and episode ends alone, training gives the very same weights."""
    bare = Workplace(tmp_path)
    for path in sorted((bare.data / bare.GAME).rglob("*.npz")):
        arrays = dict(np.load(path))
        write_chunk(path, arrays["obs"], done=arrays["done"])
    stage1_idm_wm.train(bare.config())
    stage2_bc.train(bare.config())
    for stage, network in (("stage1", "idm"), ("stage1", "world_model"), ("stage2", "policy")):
        found = checkpoint(bare, stage)["state"][network]
        assert_equal_weights(found, checkpoint(trained, stage)["state"][network])
    assert not any("probe" in key for line in metrics(bare.run_dir("stage1")) for key in line)


def test_the_runs_seed_orders_the_batches(workplace):
    cfg, windows = workplace.config("--seed", "3"), one_chunk(workplace)
    la = torch.arange(len(windows))[:, None]
    stage1 = stage1_idm_wm.Trainer(cfg, CPU, windows, make_idm(cfg), make_world_model(cfg))
    stage2 = stage2_bc.Trainer(cfg, CPU, windows, la, make_latent_policy(cfg))
    ids = windows.batch(7, 4, 3)
    assert not torch.equal(ids, windows.batch(7, 4, 0))
    assert torch.equal(stage1.load(7), windows.gather(ids))
    assert torch.equal(stage2.load(7)[1][:, 0], ids)


def test_three_frames_are_enough(workplace):
    game = workplace.data / workplace.GAME
    for path in game.rglob("*.npz"):
        path.unlink()
    for split in ("train", "test"):
        write_chunk(game / split / "0.npz", numbered_frames(np.arange(3)), ta=np.zeros(3, np.int64))
    stage1_idm_wm.train(workplace.config("--stage1.steps", "2"))
    stage2_bc.train(workplace.config("--stage2.steps", "2"))
    assert checkpoint(workplace, "stage2")["finished"]


# ---------------------------------------------------------------- stage 2


def test_stage_2_equals_a_plain_loop_that_labels_at_every_visit(trained):
    cfg = trained.config("--exp", "plain", "--stage2.log_every", "1", "--stage2.steps", "5")
    trained.branch("plain", "stage1")
    stage2_bc.train(cfg)

    idm = make_idm(cfg)
    idm.load_state_dict(checkpoint(trained, "stage1")["state"]["idm"])
    idm.eval().requires_grad_(False)
    windows = one_chunk(trained)
    torch.manual_seed(cfg.seed)
    make_idm(cfg)
    policy = make_latent_policy(cfg)
    optimizer = torch.optim.AdamW(policy.parameters())
    for step, line in enumerate(metrics(trained.run_dir("stage2", "plain"))):
        warmup = 1000 * 5 / 60_000
        optimizer.param_groups[0]["lr"] = 2e-4 * (0.01 if step == 0 else 1 - (step - warmup) / (6 - warmup))
        frames = windows.gather(windows.batch(step, 4, cfg.seed))
        loss = F.mse_loss(policy(normalize(frames[:, 1])), idm.infer_latents(stack_frames(frames)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert line["loss"] == pytest.approx(loss.item(), rel=1e-4)


def test_a_later_stage_inherits_the_sizes_of_the_earlier_ones(workplace, capsys):
    stage1_idm_wm.train(workplace.config("--vq.num_embs", "4", "--vq.emb_dim", "2", "--model.idm_scale", "2"))
    capsys.readouterr()
    stage2_bc.train(workplace.config("--model.policy_scale", "2"))
    changes = "model.idm_scale: 1 → 2; vq.num_embs: 8 → 4; vq.emb_dim: 4 → 2"
    assert f"inherits idm_scale, vq, image_size, context ({changes})" in capsys.readouterr().out
    stage3_decode.train(workplace.config("--stage3.mode", "offline"))
    assert (
        "inherits policy_scale, vq, image_size, context (model.policy_scale: 1 → 2)"
        in capsys.readouterr().out
    )
    saved = yaml.safe_load((workplace.run_dir("stage3_offline") / "config.yaml").read_text())
    assert saved["model"] | {"wm_width": 2} == {"idm_scale": 2, "policy_scale": 2, "wm_width": 2}
    assert (saved["vq"]["num_embs"], saved["vq"]["emb_dim"]) == (4, 2)


def test_without_quantiser_through_all_stages(workplace):
    """The switch is given to stage 1; the later ones inherit it."""
    stage1_idm_wm.train(workplace.config("--vq.enabled", "false"))
    stage2_bc.train(workplace.config())
    stage3_decode.train(workplace.config("--stage3.mode", "online"))
    stage3_decode.train(workplace.config("--stage3.mode", "offline"))
    assert not any("vq" in key for key in checkpoint(workplace, "stage1")["state"]["idm"])
    assert all(line["vq_loss"] == 0 for line in metrics(workplace.run_dir("stage1"))[1:])
    assert checkpoint(workplace, "stage3_online")["metrics"]["episodes"] == 2


def test_all_stages_in_bf16(workplace):
    bf16 = ["--precision", "bf16"]
    stage1_idm_wm.train(workplace.config(*bf16))
    stage2_bc.train(workplace.config(*bf16))
    for mode in MODES:
        stage3_decode.train(workplace.config(*bf16, "--stage3.mode", mode))
        state = checkpoint(workplace, f"stage3_{mode}")["state"]["policy"]
        assert {value.dtype for value in state.values()} == {torch.float32}


# ---------------------------------------------------------------- stage 3


@pytest.mark.parametrize("stage", TRAIN)
def test_a_compiled_step_is_one_graph_and_computes_the_same(trained, monkeypatch, stage):
    """As the compiler traces and differentiates it; what it then generates differs between devices.

    With a larger epsilon, Adam's steps stay proportional to small gradients: by default it would turn the
    rounding errors of gradients near zero into steps as large as the learning rate.
    """
    for kind in ("Adam", "AdamW"):
        monkeypatch.setattr(torch.optim, kind, partial(getattr(torch.optim, kind), eps=1e-3))
    compiler, compiled = torch.compile, []

    def trace(function):
        compiled.append(compiler(function, backend="aot_eager", fullgraph=True))
        return compiled[-1]

    monkeypatch.setattr(torch, "compile", trace)
    states = []
    for choice in ("on", "off"):
        exp = f"{stage}-compile-{choice}"
        trained.branch(exp, *(earlier for earlier in ("stage1", "stage2") if earlier < stage))
        TRAIN[stage](trained.config("--exp", exp, "--compile", choice))
        states.append(checkpoint(trained, "stage3_online" if stage == "stage3" else stage, exp)["state"])
    assert len(compiled) == 1
    for part in states[0].keys() - {"optimizer", "order"}:
        torch.testing.assert_close(states[0][part], states[1][part], rtol=1e-4, atol=1e-6)


def test_online_mode_trains_its_rl_path_and_its_decoder_and_nothing_else(trained):
    stage3_decode.train(trained.config("--stage3.mode", "online"))
    policy = checkpoint(trained, "stage3_online")["state"]["policy"]
    latent = checkpoint(trained, "stage2")["state"]["policy"]
    for name, old in (("trunk", "trunk"), ("sl_fc", "fc"), ("sl_head", "policy_head")):
        kept = {key: value for key, value in policy.items() if key.startswith(f"{name}.")}
        assert kept
        for key, value in kept.items():
            assert torch.equal(value, latent[key.replace(name, old, 1)]), key
    assert not torch.equal(policy["fc.weight"], latent["fc.weight"])
    assert policy["policy_head.weight"].any()

    lines = metrics(trained.run_dir("stage3_online"))
    assert [line["step"] for line in lines] == [32, 64, 96, 128, 160, 192]
    # 4 environments, no window at a rollout's last step yet: fewer where an episode ended. The
    # schedule of the decoder ends before the last update.
    pairs = [line["decoder_pairs"] for line in lines[:5]]
    for update, count in enumerate(pairs, start=1):
        assert 0 < count <= 4 * (8 * update - 1)
    assert sorted(set(pairs)) == pairs
    assert "decoder_pairs" not in lines[5]
    result = checkpoint(trained, "stage3_online")["metrics"]
    game = GAMES[trained.GAME]
    relative = (result["return_mean"] - game.random_return) / (game.expert_return - game.random_return)
    assert result["relative_return"] == pytest.approx(relative)


def test_scratch_mode_needs_no_earlier_stage(workplace):
    stage3_decode.train(workplace.config("--stage3.mode", "scratch"))
    final = checkpoint(workplace, "stage3_scratch")
    assert final["metrics"]["episodes"] == 2
    assert {key.split(".")[0] for key in final["state"]["policy"]} == {
        "trunk",
        "fc",
        "policy_head",
        "value_head",
    }
    assert [line["step"] for line in metrics(workplace.run_dir("stage3_scratch"))] == [
        32,
        64,
        96,
        128,
        160,
        192,
    ]


def test_offline_mode_fits_a_decoder_on_the_untouched_latent_policy(trained):
    stage3_decode.train(trained.config("--stage3.mode", "offline"))
    final = checkpoint(trained, "stage3_offline")
    latent = checkpoint(trained, "stage2")["state"]["policy"]
    prefix = "latent_policy."
    kept = {
        key.removeprefix(prefix): x for key, x in final["state"]["policy"].items() if key.startswith(prefix)
    }
    assert_equal_weights(kept, latent)
    assert final["metrics"].keys() >= {"loss", "action_acc_test", "majority_acc_test", "return_mean"}


def test_bc_mode_needs_no_earlier_stage_and_learns_its_labels(workplace):
    arguments = ["--stage3.mode", "bc", "--offline.steps", "150", "--offline.labels", "8"]
    stage3_decode.train(workplace.config(*arguments))
    final = checkpoint(workplace, "stage3_bc")
    assert final["metrics"]["loss"] < 1.5  # the mean over training; ln 15 = 2.7 before it
    assert final["metrics"]["return_stderr"] >= 0


def test_labels_are_distinct_windows_drawn_by_seed_with_their_own_actions(workplace):
    def drawn(*arguments: str) -> list[int]:
        cfg = workplace.config("--stage3.mode", "offline", *arguments)
        windows, ids, ta = imitation.labelled(cfg, stage3_decode.Compute.from_config(cfg), Shared())
        assert torch.equal(ta, windows.actions(ids))
        return ids.tolist()

    assert len(set(drawn())) == 32
    assert drawn() == drawn()
    assert drawn() != drawn("--seed", "1")


def test_labels_come_from_good_chunks_alone(workplace):
    bad, good = (workplace.data / workplace.GAME / "train" / f"{k}.npz" for k in (0, 1))
    truncated(bad)
    cfg = workplace.config("--stage3.mode", "bc", "--offline.labels", "10", "--data.skip_bad_chunks", "true")
    windows, ids, ta = imitation.labelled(cfg, stage3_decode.Compute.from_config(cfg), Shared())
    with np.load(good) as chunk:
        assert torch.equal(windows.frames, torch.from_numpy(chunk["obs"]))
        middle = windows.starts[ids] + 1
        assert torch.equal(ta, torch.from_numpy(chunk["ta"])[middle])


def test_more_labels_than_windows_are_refused(workplace):
    with pytest.raises(UserError, match=r"offline\.labels is 71, but .* has 70 windows; lower it"):
        stage3_decode.train(workplace.config("--stage3.mode", "bc", "--offline.labels", "71"))


@pytest.mark.parametrize("mode", ["offline", "bc"])
def test_frames_without_actions_cannot_be_labels(trained, tmp_path, mode):
    write_chunk(tmp_path / trained.GAME / "train" / "0.npz", numbered_frames(np.arange(50)))
    trained.branch(f"bare-{mode}", "stage1", "stage2")
    cfg = trained.config("--stage3.mode", mode, "--data_dir", str(tmp_path), "--exp", f"bare-{mode}")
    with pytest.raises(UserError, match=f"train holds no true actions `ta`, which mode {mode} learns from"):
        stage3_decode.train(cfg)
    write_chunk(
        tmp_path / trained.GAME / "train" / "1.npz", numbered_frames(np.arange(50)), ta=np.zeros(50, int)
    )
    with pytest.raises(UserError, match=rf"train: 0\.npz lacks the true actions `ta`, which mode {mode} "):
        stage3_decode.train(cfg)


@pytest.mark.parametrize("mode", ["offline", "bc"])
def test_actions_that_no_policy_can_take_cannot_be_labels(trained, tmp_path, mode):
    frames, ta = numbered_frames(np.arange(50)), np.arange(50) % 16
    write_chunk(tmp_path / trained.GAME / "train" / "0.npz", frames, ta=ta)
    trained.branch(f"many-{mode}", "stage1", "stage2")
    cfg = trained.config("--stage3.mode", mode, "--data_dir", str(tmp_path), "--exp", f"many-{mode}")
    with pytest.raises(UserError, match="true actions up to 15, but policies of stage 3 choose among 15;"):
        stage3_decode.train(cfg)


def test_frames_of_no_procgen_game_train_and_can_be_decoded_but_not_played(workplace):
    game = workplace.data / workplace.GAME
    game.rename(workplace.data / "mygame")
    mine = ["--env", "mygame"]
    stage1_idm_wm.train(workplace.config(*mine))
    stage2_bc.train(workplace.config(*mine))
    for mode in ("online", "scratch"):
        with pytest.raises(
            UserError, match=rf"mode {mode} learns by playing, and 'mygame' is not .*--stage3.mode offline"
        ):
            stage3_decode.train(workplace.config(*mine, "--stage3.mode", mode))
    for mode in ("offline", "bc"):
        stage3_decode.train(workplace.config(*mine, "--stage3.mode", mode))
        final = load_checkpoint(workplace.results / f"main/mygame/seed0/stage3_{mode}/checkpoint.pt")
        assert "action_acc_test" in final["metrics"]
        assert "return_mean" not in final["metrics"]


def test_too_many_minibatches_are_refused(workplace):
    with pytest.raises(UserError, match=r"ppo\.minibatches is 17, too many for an update's 32 steps"):
        stage3_decode.train(workplace.config("--stage3.mode", "scratch", "--ppo.minibatches", "17"))


def test_one_seed_gives_one_result_and_another_another(trained, workplace):
    expected = checkpoint(trained, "stage1")["state"]["idm"]
    stage1_idm_wm.train(workplace.config())
    assert_equal_weights(checkpoint(workplace, "stage1")["state"]["idm"], expected)
    cfg = workplace.config("--seed", "1")
    stage1_idm_wm.train(cfg)
    other = load_checkpoint(cfg.run_dir / "stage1" / "checkpoint.pt")["state"]["idm"]
    assert not torch.equal(other["head.weight"], expected["head.weight"])


# ---------------------------------------------------------------- modes


def test_every_mode_of_the_table_has_a_function_and_groups_of_the_config_that_exist():
    assert stage3_decode.TRAIN.keys() == MODES.keys()
    config = to_dict(load_config([]))
    groups = {group: values for group, values in config.items() if isinstance(values, dict)}
    known = config.keys() | {f"{group}.{key}" for group, values in groups.items() for key in values}
    for mode in MODES.values():
        assert set(mode.config_keys) <= known
    assert len({mode.color for mode in MODES.values()}) == len(MODES)
    for group in ("ppo", "relabel", "ilpo", "offline", "decoder"):  # no key that no mode depends on
        keys = {key for mode in MODES.values() for key in mode.config_keys}
        assert {f"{group}.{key}" for key in config[group]} <= keys or group in keys


@pytest.mark.parametrize("mode", ["offline", "bc"])
def test_resumed_modes_with_labels_equal_uninterrupted_ones(trained, monkeypatch, mode):
    options = ("--stage3.mode", mode, "--stages_from", "main")
    stage3_decode.train(trained.config("--exp", f"labels-whole-{mode}", *options))
    steps, step = [], decoding.Fit.step

    def stopping(fit: decoding.Fit, ids: torch.Tensor) -> None:
        steps.append(ids)
        step(fit, ids)
        if len(steps) == 7:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(decoding.Fit, "step", stopping)
    with pytest.raises(SystemExit):
        stage3_decode.train(trained.config("--exp", f"labels-stopped-{mode}", *options))
    assert len(steps) == 7
    stage3_decode.train(trained.config("--exp", f"labels-stopped-{mode}", *options))
    assert len(steps) == 20
    stage = f"stage3_{mode}"
    assert result(trained.run_dir(stage, f"labels-stopped-{mode}")) == result(
        trained.run_dir(stage, f"labels-whole-{mode}")
    )


def test_a_sweep_takes_the_stages_of_another_experiment(trained, capsys):
    """Stage 3 of a new experiment, without copies; its own stages come first where it has some."""
    options = ("--stage3.mode", "offline", "--offline.steps", "2")
    with pytest.raises(UserError, match=r"or take that of another experiment with --stages_from EXP$"):
        stage3_decode.train(trained.config("--exp", "sweep", *options))
    stage3_decode.train(trained.config("--exp", "sweep", "--stages_from", "main", *options))
    assert f"stage1: {trained.run_dir('stage1')}/checkpoint.pt" in capsys.readouterr().out
    assert not trained.run_dir("stage1", "sweep").exists()
    report(trained.config("--exp", "sweep", "--stages_from", "main"))
    assert "| stage1         | 8 " in (trained.run_dir("stage1", "sweep").parent / "summary.md").read_text()
    trained.branch("sweep", "stage2")  # of its own, say
    cfg = trained.config("--exp", "sweep", "--stages_from", "elsewhere")
    assert cfg.stage_dir("stage2") == trained.run_dir("stage2", "sweep")
    with pytest.raises(UserError, match=r"elsewhere/.*stage1/checkpoint\.pt does not exist"):
        stage3_decode.train(trained.config("--exp", "sweep", "--stages_from", "elsewhere", *options))
