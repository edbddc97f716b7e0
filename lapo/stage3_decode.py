"""Stage 3: turn the latent policy into a policy that acts in the game.

Modes (`--stage3.mode`)
    online    PPO on the frozen trunk of the latent policy, and a decoder latent → true action, trained on the
              agent's own actions and the latents that the IDM infers for them
    offline   the decoder is trained on a few labelled expert frames, without rewards
    scratch   baseline: PPO with the same network from random weights, end to end
    bc        baseline: behaviour cloning of the same labelled frames, without latents
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lapo.acting import evaluate_policy
from lapo.config import PUBLISHED_STEPS, Config, load_config
from lapo.data.checks import action_names, check_data, check_frames
from lapo.data.chunks import KEYS, data_checksums, num_chunks_for
from lapo.data_loader import INFERENCE_BATCH, Windows
from lapo.decoding import Fit, OnlineDecoder, training_updates
from lapo.errors import UserError, run_main
from lapo.games.env import Env
from lapo.games.make import can_be_played, env_spec
from lapo.games.table import GAMES
from lapo.models import infer_latents, make_acting_policy, make_idm, restore
from lapo.modes import MODES
from lapo.ppo import PPOTrainer, num_updates, train_from_scratch, train_ppo, training_env
from lapo.runs.checkpoints import inherit, load_stages, weights_checksum
from lapo.runs.compute import Compute, seed_everything
from lapo.runs.optim import make_optimizer, piecewise_linear, ramp_schedule, set_lr
from lapo.runs.ranks import distributed, shard
from lapo.runs.run import Run


def main() -> None:
    """Train stage 3, as configured on the command line."""
    with distributed():
        processes = shard().world_size
        if processes > 1:
            raise UserError(f"stage 3 runs in one process, not {processes}; start it without torchrun")
        train(load_config(description=__doc__))


def train(cfg: Config) -> None:
    """Train the acting policy of `cfg.stage3.mode`, and write the run's checkpoint."""
    mode = MODES[cfg.stage3.mode]
    compute = Compute.from_config(cfg)
    check_mode(cfg)
    earlier = {}
    if mode.needs_latents:
        earlier = load_stages(cfg, "stage1", "stage2")
        cfg = inherit(cfg, earlier["stage1"], ("idm_scale",))
        cfg = inherit(cfg, earlier["stage2"], ("policy_scale",))
    seed_everything(cfg.seed)
    built_on = {stage: weights_checksum(checkpoint) for stage, checkpoint in earlier.items()}
    if not mode.plays:
        built_on |= data_checksums(cfg, KEYS)
    keys = "model", "stage3", "data.image_size", *mode.config_keys
    run = Run(cfg, f"stage3_{cfg.stage3.mode}", keys, compute, built_on)
    if run.finished:
        run.print_result()
        return
    policy = TRAIN[cfg.stage3.mode](
        cfg, compute, run, {stage: saved["state"] for stage, saved in earlier.items()}
    )
    names = None if can_be_played(cfg.env) else action_names(cfg.game_data)
    state = {"policy": policy.state_dict()} | ({"actions": names} if names else {})
    run.finish(state, evaluate_policy(policy, cfg, compute))


# ---------------------------------------------------------------- with rewards: online, scratch


def online(cfg: Config, compute: Compute, run: Run, earlier: dict) -> nn.Module:
    """Train the RL and SL paths on a frozen trunk, see `models.TwoPathPolicy`."""
    trainer = online_trainer(cfg, compute, earlier, training_env(cfg))
    train_ppo(cfg, run, trainer)
    return trainer.policy


def online_trainer(cfg: Config, compute: Compute, earlier: dict, env: Env) -> PPOTrainer:
    """The trainer of online mode; `earlier` holds the states of stages 1 and 2."""
    policy = compute.place(make_acting_policy(cfg, "online", env.num_actions, earlier["stage2"]["policy"]))
    groups = [
        {"params": list(getattr(policy, name).parameters()), "lr": 0.0}
        for name in ("policy_head", "value_head", "fc")
    ]
    optimizer = make_optimizer(torch.optim.Adam, groups, [policy])
    ramps = [
        ramp_schedule(ramp, cfg.stage3.steps, PUBLISHED_STEPS["stage3"])
        for ramp in (cfg.ppo.policy_head, cfg.ppo.value_head, cfg.ppo.fc)
    ]

    def set_lrs(env_steps: int) -> None:
        for group, ramp in zip(optimizer.param_groups, ramps, strict=True):
            set_lr(group, cfg.ppo.lr * piecewise_linear(env_steps, ramp))

    idm = restore(make_idm(cfg), earlier["stage1"]["idm"], compute)
    decoder = OnlineDecoder(policy.decoder, idm, cfg.decoder, compute, decoder_updates(cfg), cfg.data.context)
    return PPOTrainer(cfg, compute, env, policy, optimizer, set_lrs, decoder)


def scratch(cfg: Config, compute: Compute, run: Run, earlier: dict) -> nn.Module:
    """Train the same network from random weights by PPO."""
    return train_from_scratch(cfg, compute, run)


def decoder_updates(cfg: Config) -> list[int]:
    """The PPO updates (counted from 1) after which the decoder is trained."""
    scale = min(1.0, cfg.stage3.steps / PUBLISHED_STEPS["stage3"])
    return training_updates(cfg.decoder, *num_updates(cfg), scale)


# ---------------------------------------------------------------- with labels: offline, bc


def offline(cfg: Config, compute: Compute, run: Run, earlier: dict) -> nn.Module:
    """Train a decoder on the pairs (la, ta) of the labelled frames; it acts on the frozen latent policy."""
    windows, ids, ta = labelled(cfg, compute)
    idm = restore(make_idm(cfg), earlier["stage1"]["idm"], compute)
    la = infer_latents(idm, windows.iter_frames(ids), compute)
    num_actions = choices(cfg)
    policy = compute.place(make_acting_policy(cfg, "offline", num_actions, earlier["stage2"]["policy"]))
    fit = Fit(lambda batch: policy.decoder(la[batch]), policy.decoder, ta, cfg.offline.lr)
    train_on_labels(cfg, compute, run, policy, fit)
    return policy


def bc(cfg: Config, compute: Compute, run: Run, earlier: dict) -> nn.Module:
    """Train the policy network from random weights on the pairs (frame, ta) of the labelled frames."""
    windows, ids, ta = labelled(cfg, compute)
    policy = compute.place(make_acting_policy(cfg, "bc", choices(cfg)))

    def predict(batch: Tensor) -> Tensor:
        with compute.autocast():
            return policy.logits(windows.current_frames(ids[batch]))

    train_on_labels(cfg, compute, run, policy, Fit(predict, policy, ta, cfg.offline.lr))
    return policy


def labelled(cfg: Config, compute: Compute) -> tuple[Windows, Tensor, Tensor]:
    """Draw `cfg.offline.labels` labelled frames: all windows, indices (N,) of those drawn, true actions (N,).

    Only as many chunks are read as hold four times as many frames as labels. Raises `UserError` if the data
    has no true actions, too few windows, or actions outside the policy's action space.
    """
    folder, count = cfg.game_data / "train", cfg.offline.labels
    check_frames(cfg.env, cfg.game_data, cfg.visuals)
    limit = None  # labels made by hand may lie anywhere
    if action_names(cfg.game_data) is None:
        limit = num_chunks_for(folder, 4 * count, cfg.data.skip_bad_chunks)
    windows = Windows.read(cfg, "train", compute.device, limit=limit)
    if windows.ta is None:
        lacking = f"{folder} holds no"
        if len(windows.unlabelled) < windows.num_chunks:
            lacking = f"{folder}: {windows.describe_unlabelled()} the"
        raise UserError(
            f"{lacking} true actions `ta`, which mode {cfg.stage3.mode} learns from; import them with"
            " `import_video.py --actions`, or add them to its chunks, see docs/data.md"
        )
    num_actions = choices(cfg)
    if windows.ta.max() >= num_actions:
        raise UserError(
            f"{folder} holds true actions up to {windows.ta.max()}, but policies of stage 3 choose among"
            f" {num_actions}; number them from 0 to {num_actions - 1}"
        )
    known = windows.labelled()
    if len(known) < count:
        what = "labelled windows" if windows.has_gaps else "windows"
        raise UserError(f"offline.labels is {count}, but {folder} has {len(known)} {what}; lower it")
    generator = torch.Generator().manual_seed(cfg.seed)
    ids = known[torch.randperm(len(known), generator=generator)[:count].to(compute.device)]
    return windows, ids, windows.actions(ids)


def choices(cfg: Config) -> int:
    """How many actions the policy chooses among: those named in the data set, or the game's."""
    names = None if can_be_played(cfg.env) else action_names(cfg.game_data)
    return len(names) if names else env_spec(cfg.env).num_actions


def train_on_labels(cfg: Config, compute: Compute, run: Run, policy: nn.Module, fit: Fit) -> None:
    """Train `policy` or a part of it with `fit` for `cfg.offline.steps` steps; log loss and accuracy."""
    if run.state:
        policy.load_state_dict(run.state["policy"])
        fit.load_state_dict(run.state["fit"])
    size, steps = min(cfg.offline.batch_size, len(fit.ta)), cfg.offline.steps

    def state() -> dict:
        return {"policy": policy.state_dict(), "fit": fit.state_dict()}

    for _ in run.loop(steps, state, save_every=steps, unit="step"):
        fit.step(torch.randperm(len(fit.ta), device=fit.ta.device)[:size])
    run.log(steps, {"loss": fit.loss} | accuracy(policy, cfg, compute))


def accuracy(policy: nn.Module, cfg: Config, compute: Compute) -> dict[str, Tensor]:
    """How often `policy`, and the commonest action, equal the expert's action on held-out frames.

    Returns {} if there are no held-out frames with actions.
    """
    if not (cfg.game_data / "test").is_dir():
        return {}
    test = Windows.read(cfg, "test", compute.device)
    if test.ta is None:
        return {}
    known = test.labelled()
    with torch.no_grad(), compute.autocast():
        predicted = [
            policy.logits(test.current_frames(ids)).argmax(-1) for ids in known.split(INFERENCE_BATCH)
        ]
    ta = test.actions(known)
    return {
        "action_acc_test": (torch.cat(predicted) == ta).float().mean(),
        "majority_acc_test": (ta == ta.bincount().argmax()).float().mean(),
    }


# ---------------------------------------------------------------- the modes

TRAIN: dict[str, Callable[[Config, Compute, Run, dict], nn.Module]] = {
    "bc": bc,
    "scratch": scratch,
    "offline": offline,
    "online": online,
}
"""Training function of each mode: (config, compute, run, states of stages 1 and 2) → acting policy."""


def check_mode(cfg: Config) -> None:
    """Raise `UserError` if the mode cannot use the configured game or data set."""
    if not MODES[cfg.stage3.mode].plays:
        check_data(cfg.env, cfg.game_data)
    elif not can_be_played(cfg.env):
        raise UserError(
            f"mode {cfg.stage3.mode} learns by playing, and '{cfg.env}' is not a Procgen game; frames of your"
            " own can be decoded with --stage3.mode offline, if they come with true actions `ta`, and an"
            f" environment of your own is named as module:function (the games are {', '.join(GAMES)})"
        )


if __name__ == "__main__":
    run_main(main)
