"""Stage 3: turn the latent policy into a policy that acts in the game.

Modes (`--stage3.mode`)
    online         PPO on the frozen trunk of the latent policy, and a decoder latent → true action, trained
                   on the agent's own actions and the latents that the IDM infers for them
    offline        the decoder is trained on a few labelled expert frames, without rewards
Comparisons
    scratch        PPO with the same network from random weights, end to end
    no_sl          PPO on the frozen trunk of the latent policy, without the decoder
    ilpo           the same on a trunk that ILPO pretrains, without stages 1 and 2
    bc             behaviour cloning of the labelled frames
    idm_labelling  behaviour cloning of all frames, labelled by an IDM that the labelled ones taught
    lapo_plus      behaviour cloning of all frames, labelled by stage 1's IDM and a decoder
"""

from collections.abc import Callable

import torch
from torch import nn

from lapo.acting import evaluate_policy
from lapo.config import PUBLISHED_STEPS, Config, load_config
from lapo.data.checks import action_names, check_data
from lapo.data.chunks import KEYS, data_checksums
from lapo.data_loader import Shared
from lapo.decoding import OnlineDecoder, training_updates
from lapo.errors import UserError, run_main
from lapo.games.env import Env
from lapo.games.make import can_be_played
from lapo.games.table import GAMES
from lapo.ilpo import train_trunk
from lapo.imitation import bc, idm_labelling, lapo_plus, offline
from lapo.models import make_acting_policy, make_idm, restore
from lapo.modes import MODES
from lapo.ppo import PPOTrainer, num_updates, train_from_scratch, train_ppo, training_env
from lapo.runs.checkpoints import inherit, load_stages, weights_checksum
from lapo.runs.compute import Compute, seed_everything
from lapo.runs.optim import make_optimizer, piecewise_linear, ramp_schedule, set_lr
from lapo.runs.ranks import distributed, shard
from lapo.runs.run import Run
from lapo.sweep import check_labels, in_sweep, train_sweep


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
    if cfg.stage3.mode == "ilpo":
        train_trunk(cfg, compute)
    earlier = load_stages(cfg, *mode.stages)
    for stage, key in (("stage1", "idm_scale"), ("stage2", "policy_scale")):
        if stage in earlier:
            cfg = inherit(cfg, earlier[stage], (key,))
    seed_everything(cfg.seed)
    built_on = {stage: weights_checksum(checkpoint) for stage, checkpoint in earlier.items()}
    if not mode.plays:
        built_on |= data_checksums(cfg, KEYS)
    keys = "model.policy_scale", "stage3", "data.image_size", *mode.config_keys
    run = Run(cfg, f"stage3_{cfg.stage3.mode}", keys, compute, built_on)
    if run.finished:
        run.print_result()
        return
    states = {stage: saved["state"] for stage, saved in earlier.items()}
    if mode.plays:
        policy = TRAIN[cfg.stage3.mode](cfg, compute, run, states)
        run.finish({"policy": policy.state_dict()}, evaluate_policy(policy, cfg, compute))
    else:
        train_from_labels(cfg, compute, run, states)


def train_from_labels(cfg: Config, compute: Compute, run: Run, earlier: dict) -> None:
    """Train in a mode that learns from labels, then on the other numbers of labels that are asked for."""
    shared, mode_function = Shared(), TRAIN[cfg.stage3.mode]
    if in_sweep(cfg, run):
        final = {key: value for key, value in run.state.items() if key != "training"}
    else:
        check_labels(cfg, compute, shared)
        policy = mode_function(cfg, compute, run, earlier, shared)
        names = None if can_be_played(cfg.env) else action_names(cfg.game_data)
        final = {"policy": policy.state_dict()} | ({"actions": names} if names else {})
        run.metrics |= evaluate_policy(policy, cfg, compute)
    if cfg.offline.sweep:
        train_sweep(mode_function, cfg, compute, run, earlier, shared, final)
    run.finish(final)


# ---------------------------------------------------------------- with rewards; imitation.py has the others


def online(cfg: Config, compute: Compute, run: Run, earlier: dict) -> nn.Module:
    """Train the RL and SL paths on a frozen trunk, see `models.TwoPathPolicy`."""
    trainer = online_trainer(cfg, compute, earlier, training_env(cfg))
    train_ppo(cfg, run, trainer)
    return trainer.policy


def online_trainer(cfg: Config, compute: Compute, earlier: dict, env: Env) -> PPOTrainer:
    """The trainer of online mode; `earlier` holds the states of stages 1 and 2."""
    policy = compute.place(make_acting_policy(cfg, "online", env.num_actions, earlier["stage2"]["policy"]))
    optimizer, set_lrs = ramped_optimizer(cfg, policy)
    idm = restore(make_idm(cfg), earlier["stage1"]["idm"], compute)
    decoder = OnlineDecoder(policy.decoder, idm, cfg.decoder, compute, decoder_updates(cfg), cfg.data.context)
    return PPOTrainer(cfg, compute, env, policy, optimizer, set_lrs, decoder)


def ramped_optimizer(cfg: Config, policy: nn.Module) -> tuple[torch.optim.Optimizer, Callable[[int], None]]:
    """The optimiser of the RL path, and what sets its learning rates after so many env steps."""
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

    return optimizer, set_lrs


def frozen_trunk(cfg: Config, compute: Compute, run: Run, earlier: dict) -> nn.Module:
    """Train the RL path alone, by PPO on the frozen trunk of a pretrained policy (modes no_sl and ilpo)."""
    env = training_env(cfg)
    ((_, pretrained),) = earlier.items()
    policy = compute.place(make_acting_policy(cfg, cfg.stage3.mode, env.num_actions, pretrained["policy"]))
    train_ppo(cfg, run, PPOTrainer(cfg, compute, env, policy, *ramped_optimizer(cfg, policy)))
    return policy


def scratch(cfg: Config, compute: Compute, run: Run, earlier: dict) -> nn.Module:
    """Train the same network from random weights by PPO."""
    return train_from_scratch(cfg, compute, run)


def decoder_updates(cfg: Config) -> list[int]:
    """The PPO updates (counted from 1) after which the decoder is trained."""
    scale = min(1.0, cfg.stage3.steps / PUBLISHED_STEPS["stage3"])
    return training_updates(cfg.decoder, *num_updates(cfg), scale)


# ---------------------------------------------------------------- the modes

TRAIN: dict[str, Callable[..., nn.Module]] = {
    "bc": bc,
    "idm_labelling": idm_labelling,
    "scratch": scratch,
    "ilpo": frozen_trunk,
    "offline": offline,
    "lapo_plus": lapo_plus,
    "no_sl": frozen_trunk,
    "online": online,
}
"""Training function of each mode: (config, compute, run, states of the stages below) → acting policy.

Those of modes that do not play also get what the trainings of a sweep share.
"""


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
