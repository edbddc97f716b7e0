"""Stage 3: turn the latent policy into one that acts in the game.

Modes (`--stage3.mode`)
    online    PPO on rewards over the frozen trunk of the latent policy, beside a decoder latent → true action
              that learns from the agent's own steps, labelled by the IDM
    offline   no rewards: the decoder learns from a few labelled expert frames
    scratch   yardstick: PPO with the same network from random weights, end to end
    bc        yardstick: behaviour cloning of the same few labelled frames, without latents
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from acting import judge, network_actor
from build import inherit, make_acting_policy, make_idm
from chunks import chunks_holding
from collector import Collector
from config import Config, load_config
from data_loader import Windows
from decoding import OnlineDecoder, fit, training_updates
from errors import UserError, run_main
from ppo import Rollout, ppo_update
from probe import INFERENCE_BATCH, label
from procgen_env import ACTIONS, GAMES, VecEnv, check_data, check_frames, relative_return
from ranks import joined, share
from runs import Run, load_stage
from training import Compute, make_optimizer, piecewise_linear, ramp_schedule, seed_everything, set_lr

PUBLISHED_STEPS = 4_000_000
"""Env steps of a published run: the length that schedules are given for."""


def main() -> None:
    """Run stage 3 as the command line says."""
    with joined():
        if share().of > 1:
            raise UserError(f"stage 3 runs in one process, not {share().of}; start it without torchrun")
        train(load_config(description=__doc__))


def train(cfg: Config) -> None:
    """Make the acting policy of `cfg.stage3.mode`; the result lies in the run's checkpoint."""
    mode = MODES[cfg.stage3.mode]
    compute = Compute.from_config(cfg)
    mode.check(cfg)
    earlier = {}
    if mode.needs_latents:
        earlier = {stage: load_stage(cfg, stage, f"{stage}.py") for stage in ("stage1", "stage2")}
        cfg = inherit(cfg, earlier["stage1"], ("idm_scale",))
        cfg = inherit(cfg, earlier["stage2"], ("policy_scale",))
    seed_everything(cfg.seed)
    run = Run(cfg, f"stage3_{cfg.stage3.mode}", ("model", "stage3", *mode.reads), compute)
    if run.finished:
        run.report()
        return
    policy = mode.train(cfg, compute, run, {stage: saved["state"] for stage, saved in earlier.items()})
    run.finish({"policy": policy.state_dict()}, score(policy, cfg, compute))


def score(policy: nn.Module, cfg: Config, compute: Compute) -> dict[str, float]:
    """Play on held-out levels; nothing to play for a name that is no Procgen game."""
    if cfg.env not in GAMES:
        return {}
    act = network_actor(policy.eval(), compute, cfg.eval.greedy)
    played = judge(act, cfg.env, cfg.visuals, cfg.eval, cfg.seed)
    return {
        "return_mean": played.mean,
        "return_stderr": played.stderr,
        "relative_return": relative_return(cfg.env, played.mean),
        "episodes": played.episodes,
    }


# ---------------------------------------------------------------- with rewards: online, scratch


def online(cfg: Config, compute: Compute, run: Run, earlier: dict) -> nn.Module:
    """RL + SL over a frozen trunk, see `models.TwoPathPolicy`."""
    trainer = online_trainer(cfg, compute, earlier, make_env(cfg))
    ppo(cfg, run, trainer)
    return trainer.policy


def online_trainer(cfg: Config, compute: Compute, earlier: dict, env: VecEnv) -> "PPOTrainer":
    """What trains in online mode; `earlier` holds the states of stages 1 and 2."""
    policy = compute.place(make_acting_policy(cfg, "online", earlier["stage2"]["policy"]))
    groups = [
        {"params": list(getattr(policy, name).parameters()), "lr": 0.0}
        for name in ("policy_head", "value_head", "fc")
    ]
    optimizer = make_optimizer(torch.optim.Adam, groups, [policy])
    ramps = [
        ramp_schedule(ramp, cfg.stage3.steps, PUBLISHED_STEPS)
        for ramp in (cfg.ppo.policy_head, cfg.ppo.value_head, cfg.ppo.fc)
    ]

    def set_lrs(env_steps: int) -> None:
        for group, ramp in zip(optimizer.param_groups, ramps, strict=True):
            set_lr(group, cfg.ppo.lr * piecewise_linear(env_steps, ramp))

    idm = compute.place(make_idm(cfg))
    idm.load_state_dict(earlier["stage1"]["idm"])
    idm.eval().requires_grad_(False)
    decoder = OnlineDecoder(policy.decoder, idm, cfg.decoder, compute, decoder_updates(cfg))
    return PPOTrainer(cfg, compute, env, policy, optimizer, set_lrs, decoder)


def scratch(cfg: Config, compute: Compute, run: Run, earlier: dict) -> nn.Module:
    """PPO with the same network from random weights."""
    policy = compute.place(make_acting_policy(cfg, "scratch"))
    groups = [{"params": list(policy.parameters()), "lr": cfg.ppo.scratch_lr}]
    optimizer = make_optimizer(torch.optim.Adam, groups, [policy])
    ppo(cfg, run, PPOTrainer(cfg, compute, make_env(cfg), policy, optimizer))
    return policy


def make_env(cfg: Config) -> VecEnv:
    """The environments that the policy learns in."""
    return VecEnv(cfg.env, cfg.ppo.num_envs, seed=cfg.seed, visuals=cfg.visuals)


def decoder_updates(cfg: Config) -> list[int]:
    """The PPO updates (from 1) after which the decoder is trained."""
    scale = min(1.0, cfg.stage3.steps / PUBLISHED_STEPS)
    return training_updates(cfg.decoder, *num_updates(cfg), scale)


def num_updates(cfg: Config) -> tuple[int, int]:
    """PPO updates of a run, and env steps of each; the last one is complete, so a run may be a bit longer.

    Raises `UserError` when a minibatch would be too small to normalise its advantages.
    """
    steps_per_update = cfg.ppo.num_envs * cfg.ppo.rollout_steps
    if steps_per_update < 2 * cfg.ppo.minibatches:
        raise UserError(
            f"ppo.minibatches is {cfg.ppo.minibatches}, too many for an update's {steps_per_update} steps"
            " (ppo.num_envs · ppo.rollout_steps); a minibatch needs at least 2"
        )
    return math.ceil(cfg.stage3.steps / steps_per_update), steps_per_update


class PPOTrainer:
    """A policy that plays and learns from it. An update is `collect`, `improve`, `decode`."""

    def __init__(
        self,
        cfg: Config,
        compute: Compute,
        env: VecEnv,
        policy: nn.Module,
        optimizer: torch.optim.Optimizer,
        set_lrs: Callable[[int], None] = lambda env_steps: None,
        decoder: OnlineDecoder | None = None,
    ):
        self.cfg, self.compute, self.policy, self.optimizer = cfg.ppo, compute, policy, optimizer
        self.set_lrs, self.decoder = set_lrs, decoder
        self.collector = Collector(env, cfg.ppo.gamma, compute)
        self.rollout = Rollout(cfg.ppo.rollout_steps, cfg.ppo.num_envs, compute.device)
        self.forward = compute.compiled(policy)

    def collect(self) -> Tensor:
        """Play a rollout; returns the value (N,) of the observation after its last step."""
        return self.collector.collect(self.policy, self.rollout, self.decoder.watch if self.decoder else None)

    def improve(self, env_steps: int, last_value: Tensor) -> dict[str, Tensor]:
        """Learn from the rollout that ended at `env_steps` with values `last_value` (N,); returns metrics."""
        self.set_lrs(env_steps)
        return ppo_update(
            self.forward, self.optimizer, self.rollout, last_value, self.cfg, self.compute.autocast
        )

    def decode(self, update: int) -> dict[str, Tensor]:
        """Let the decoder, if there is one, learn from the rollout of `update` (from 1); returns metrics."""
        return self.decoder.learn(self.collector.frames, update) if self.decoder else {}

    def _parts(self) -> dict:
        parts = {"policy": self.policy, "optimizer": self.optimizer, "collector": self.collector}
        return parts | ({"decoder": self.decoder} if self.decoder else {})

    def state_dict(self) -> dict:
        """Everything the next update depends on, as plain data."""
        return {name: part.state_dict() for name, part in self._parts().items()}

    def load_state_dict(self, state: dict) -> None:
        """Continue from what `state_dict` gave."""
        for name, part in self._parts().items():
            part.load_state_dict(state[name])


def ppo(cfg: Config, run: Run, trainer: PPOTrainer) -> None:
    """Train for `cfg.stage3.steps` env steps."""
    updates, steps_per_update = num_updates(cfg)
    if run.state:
        trainer.load_state_dict(run.state)
    recent = trainer.collector.recent
    options = {"save_every": cfg.stage3.save_every, "unit": "step", "scale": steps_per_update}
    for update in run.loop(updates, trainer.state_dict, **options):
        env_steps = (update + 1) * steps_per_update
        run.track(trainer.improve(env_steps, trainer.collect()))
        learned = trainer.decode(update + 1)
        if recent:
            learned["train_return"] = sum(recent) / len(recent)
        if (
            learned.keys() - {"train_return"}
            or (update + 1) % cfg.stage3.log_every == 0
            or update + 1 == updates
        ):
            run.log(env_steps, learned)
    trainer.collector.env.close()


# ---------------------------------------------------------------- with labels: offline, bc


def offline(cfg: Config, compute: Compute, run: Run, earlier: dict) -> nn.Module:
    """A decoder on the frozen latent policy, fitted to (la, ta) of the labelled frames."""
    windows, ids, ta = labelled(cfg, compute)
    idm = compute.place(make_idm(cfg))
    idm.load_state_dict(earlier["stage1"]["idm"])
    la = label(idm, windows, ids, compute)
    policy = compute.place(make_acting_policy(cfg, "offline", earlier["stage2"]["policy"]))
    loss = fit_labels(lambda batch: policy.decoder(la[batch]), policy.decoder, ta, cfg)
    run.step = cfg.offline.steps
    run.log(run.step, {"loss": loss} | accuracy(policy, cfg, compute))
    return policy


def bc(cfg: Config, compute: Compute, run: Run, earlier: dict) -> nn.Module:
    """The policy's network from random weights, fitted to (frame, ta) of the labelled frames."""
    windows, ids, ta = labelled(cfg, compute)
    policy = compute.place(make_acting_policy(cfg, "bc"))

    def predict(batch: Tensor) -> Tensor:
        with compute.autocast():
            return policy.logits(windows.middle_frames(ids[batch]))

    loss = fit_labels(predict, policy, ta, cfg)
    run.step = cfg.offline.steps
    run.log(run.step, {"loss": loss} | accuracy(policy, cfg, compute))
    return policy


def labelled(cfg: Config, compute: Compute) -> tuple[Windows, Tensor, Tensor]:
    """The labelled frames: windows, numbers (N,) of `cfg.offline.labels` random ones, true actions (N,).

    Only the first chunks are read, enough for four times as many frames as labels.
    """
    folder, count = cfg.game_data / "train", cfg.offline.labels
    check_frames(cfg.env, cfg.game_data, cfg.visuals)
    limit = chunks_holding(folder, 4 * count, cfg.data.skip_bad_chunks)
    windows = Windows.read(cfg, "train", compute.device, limit=limit)
    if windows.ta is None:
        raise UserError(
            f"{folder} holds no true actions `ta`, which mode {cfg.stage3.mode} learns from; add them to its"
            " chunks, see expert_data/README.md"
        )
    if windows.ta.max() >= len(ACTIONS):
        raise UserError(
            f"{folder} holds true actions up to {windows.ta.max()}, but policies of stage 3 choose among"
            f" {len(ACTIONS)}; number them from 0 to {len(ACTIONS) - 1}"
        )
    if len(windows) < count:
        raise UserError(f"offline.labels is {count}, but {folder} has {len(windows)} windows; lower it")
    generator = torch.Generator().manual_seed(cfg.seed)
    ids = torch.randperm(len(windows), generator=generator)[:count].to(compute.device)
    return windows, ids, windows.actions(ids)


def fit_labels(predict: Callable[[Tensor], Tensor], network: nn.Module, ta: Tensor, cfg: Config) -> Tensor:
    """Fit `network` to the labels `ta` (N,) in `cfg.offline.steps` random batches; returns the mean loss."""
    size = min(cfg.offline.batch_size, len(ta))
    batches = (torch.randperm(len(ta), device=ta.device)[:size] for _ in range(cfg.offline.steps))
    return fit(predict, network, ta, batches, lr=cfg.offline.lr)


def accuracy(policy: nn.Module, cfg: Config, compute: Compute) -> dict[str, Tensor]:
    """How often `policy` names the expert's action on held-out frames, and how often the commonest is right.

    Empty when there are no held-out frames with actions.
    """
    if not (cfg.game_data / "test").is_dir():
        return {}
    test = Windows.read(cfg, "test", compute.device)
    if test.ta is None:
        return {}
    with torch.no_grad(), compute.autocast():
        guesses = [
            policy.logits(test.middle_frames(ids)).argmax(-1) for ids in test.all().split(INFERENCE_BATCH)
        ]
    ta = test.actions(test.all())
    return {
        "action_acc_test": (torch.cat(guesses) == ta).float().mean(),
        "majority_acc_test": (ta == ta.bincount().argmax()).float().mean(),
    }


# ---------------------------------------------------------------- the modes


@dataclass(frozen=True)
class Mode:
    """How a mode trains, and what its numbers depend on."""

    train: Callable[[Config, Compute, Run, dict], nn.Module]
    """(config, compute, run, states of stages 1 and 2) → acting policy."""
    reads: tuple[str, ...]
    """Groups of the config."""
    needs_latents: bool
    """Whether it builds on stages 1 and 2."""
    plays: bool
    """Whether it cannot do without the game."""

    def check(self, cfg: Config) -> None:
        """Raise `UserError` when the configured name cannot serve this mode."""
        if not self.plays:
            check_data(cfg.env, cfg.game_data)
        elif cfg.env not in GAMES:
            raise UserError(
                f"mode {cfg.stage3.mode} learns by playing, and '{cfg.env}' is not a Procgen game; frames of"
                " your own can be decoded with --stage3.mode offline, if they come with true actions `ta`"
                f" (the games are {', '.join(GAMES)})"
            )


MODES = {
    "online": Mode(online, ("ppo", "vq", "decoder", "eval"), needs_latents=True, plays=True),
    "offline": Mode(offline, ("data", "offline", "vq", "decoder", "eval"), needs_latents=True, plays=False),
    "scratch": Mode(scratch, ("ppo", "eval"), needs_latents=False, plays=True),
    "bc": Mode(bc, ("data", "offline", "eval"), needs_latents=False, plays=False),
}

if __name__ == "__main__":
    run_main(main)
