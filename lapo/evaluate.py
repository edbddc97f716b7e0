"""Evaluate a policy on held-out levels: `python evaluate.py --env bigfish --exp main --policy offline`.

Prints the mean return with its standard error and the relative return (0: random, 1: published expert). The
policy may be any checkpoint of stage 3 or train_expert.py (`--checkpoint PATH`), even an unfinished one.
"""

import argparse
import math
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

from lapo.acting import (
    Act,
    Evaluation,
    checkpoint_actor,
    evaluate_actor,
    held_out_env,
    num_eval_envs,
    play,
    random_actor,
    steps_played,
)
from lapo.command_line import Parser
from lapo.config import Config, load_config, to_dict, validate
from lapo.errors import UserError, run_main
from lapo.experts.expert import Expert
from lapo.experts.recording import SHIPPED
from lapo.experts.registry import expert_name, make_expert
from lapo.games.make import check_env, env_spec, relative_return
from lapo.games.table import GAMES, Visuals, check_game
from lapo.modes import MODES
from lapo.policies import count_actions, load_policy_checkpoint
from lapo.runs.checkpoints import saved_config
from lapo.runs.compute import Compute, seed_everything
from lapo.runs.files import check_json, write_json
from lapo.runs.ranks import require_single_process


def main() -> None:
    """Evaluate as the command line says."""
    require_single_process("evaluate.py")
    evaluate(*parse())


def parse(argv: list[str] | None = None) -> tuple[argparse.Namespace, Config]:
    """The command line, and the config that it makes. Raises `UserError` for an impossible one."""
    defaults = load_config([])
    parser = Parser(__doc__)
    parser.add_argument("--env", help="game; without it, the checkpoint's own, or that of config.yaml")
    parser.add_argument(
        "--policy",
        choices=(*MODES, "random", "planner", "expert"),
        help="a mode of the experiment's stage 3 (online), uniform random actions, the game's planner, or the"
        " learned expert that is shipped",
    )
    parser.add_argument("--exp", default=defaults.exp, help=f"experiment of that policy ({defaults.exp})")
    parser.add_argument(
        "--seed",
        default=defaults.seed,
        help=f"seed of its run; also draws the levels and actions ({defaults.seed})",
    )
    parser.add_argument(
        "--checkpoint",
        type=Path,
        help="a checkpoint of stage 3 or train_expert.py, in place of --exp and --policy",
    )
    parser.add_argument(
        "--visuals", choices=("full", "plain"), help="without it, as in the policy's training"
    )
    episodes, num_envs = defaults.eval.episodes, defaults.eval.num_envs
    parser.add_argument(
        "--episodes", default=episodes, help=f"episodes, rounded up to a multiple of --num-envs ({episodes})"
    )
    parser.add_argument("--num-envs", default=num_envs, help=f"environments played side by side ({num_envs})")
    parser.add_argument(
        "--greedy",
        action=argparse.BooleanOptionalAction,
        default=defaults.eval.greedy,
        help="take the most likely action instead of a sample",
    )
    parser.add_argument("--results-dir", default=defaults.results_dir, help="folder of all results")
    parser.add_argument("--device", default=defaults.device, help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the result to this file")
    args = parser.parse_args(argv)
    if args.policy and args.checkpoint:
        raise UserError(f"--policy {args.policy} and --checkpoint {args.checkpoint}: give one of the two")
    if args.env:
        check_env(args.env)
    check_json(args.json)
    given = {key: getattr(args, key) for key in ("exp", "seed", "results_dir", "device")}
    given |= {"env": args.env or defaults.env, "visuals": args.visuals or defaults.visuals}
    given["eval"] = {key: getattr(args, key) for key in to_dict(defaults.eval)}
    return args, validate(to_dict(defaults) | given, source="the command line")


def evaluate(args: argparse.Namespace, cfg: Config) -> dict:
    """Play, print the result and write it where asked; returns it as plain data."""
    player = choose(args, cfg)
    check_env(player.game)
    print(
        f"{player.describe()} plays {cfg.eval.episodes} episodes of {player.game} on held-out levels,"
        f" on {player.compute}"
    )
    seed_everything(cfg.seed)
    played = player.play(cfg)
    result = {
        "game": player.game,
        "policy": player.policy,
        "checkpoint": str(player.checkpoint) if player.checkpoint else None,
        "seed": cfg.seed,
        "greedy": cfg.eval.greedy,
        "episodes": played.episodes,
        "return_mean": played.mean,
        "return_stderr": None if math.isnan(played.stderr) else played.stderr,
        "relative_return": relative_return(player.game, played.mean),
        "mean_length": float(played.lengths.mean()),
        "steps_per_cpu_second": played.speed,
    }
    if args.json:  # first, for nobody may be reading any more what is printed
        write_json(args.json, result)
    print(describe(result))
    if args.json:
        print(f"written to {args.json}")
    return result


@dataclass(frozen=True)
class Player:
    """A policy or planner and its game."""

    game: str
    policy: str
    """Mode of stage 3, random, planner, or learned expert (of train_expert.py)."""
    act: Act | Expert
    visuals: Visuals
    """How the game is drawn: as in its training."""
    compute: Compute
    """Device and precision, the latter as in its training."""
    checkpoint: Path | None = None
    unfinished_at: int | None = None
    """Env steps so far, if the training has not ended."""

    def play(self, cfg: Config) -> Evaluation:
        """Play the episodes of `cfg.eval`."""
        if not isinstance(self.act, Expert):
            return evaluate_actor(self.act, self.game, self.visuals, cfg.eval, cfg.seed)
        with closing(held_out_env(self.game, self.visuals, cfg.eval, cfg.seed)) as env:
            return play(lambda frames: self.act.act(env.get_state()), env, cfg.eval.episodes)

    def describe(self) -> str:
        """The player, in words."""
        if isinstance(self.act, Expert):
            return f"{expert_name(self.game)}, an expert without training,"
        if self.checkpoint is None:
            return "the uniform random policy"
        progress = "" if self.unfinished_at is None else f", unfinished, at step {self.unfinished_at:,}"
        return f"{self.policy} policy {self.checkpoint}{progress}"


def choose(args: argparse.Namespace, cfg: Config) -> Player:
    """The player that the arguments select.

    Raises `UserError` for a missing checkpoint, a game without a shipped expert, a stage whose networks
    cannot act, and another number of actions than the game's.
    """
    compute = Compute.from_config(cfg)
    if args.policy == "random":
        act = random_actor(cfg.seed, env_spec(cfg.env).num_actions)
        return Player(cfg.env, "random", act, cfg.visuals, compute)
    if args.policy == "planner":
        check_game(cfg.env)
        return Player(cfg.env, "planner", make_expert(cfg.env, num_eval_envs(cfg.eval)), cfg.visuals, compute)
    mode = args.policy or "online"
    path = args.checkpoint or cfg.run_dir / f"stage3_{mode}" / "checkpoint.pt"
    if args.policy == "expert":
        path = SHIPPED / f"{cfg.env}.pt"
        if not path.exists():
            shipped = ", ".join(sorted(file.stem for file in SHIPPED.glob("*.pt")))
            raise UserError(
                f"no learned expert of {cfg.env} is shipped, only of {shipped}; choose --policy planner, or"
                " name one of your own with --checkpoint"
            )
    command = f"python stage3.py --env {cfg.env} --exp {cfg.exp} --seed {cfg.seed} --stage3.mode {mode}"
    checkpoint = load_policy_checkpoint(path, None if args.checkpoint else command)
    saved = saved_config(checkpoint)
    compute = Compute.from_config(replace(cfg, precision=saved.precision))
    game = args.env or saved.env
    has, needs = count_actions(checkpoint["state"]["policy"]), env_spec(game).num_actions
    if has != needs:
        raise UserError(
            f"{path} chooses among {has} actions, but {game} has {needs}; play {saved.env} with it"
        )
    act = checkpoint_actor(checkpoint, compute, cfg.eval.greedy)
    unfinished_at = None if checkpoint["finished"] else steps_played(checkpoint)
    policy = "learned expert" if checkpoint["stage"] == "expert" else saved.stage3.mode
    return Player(game, policy, act, args.visuals or saved.visuals, compute, path, unfinished_at)


def describe(result: dict) -> str:
    """What `evaluate` returns, in words."""
    references = env_spec(result["game"]).reference_returns
    relative = f"unknown: {result['game']} has no reference returns"
    if references:
        expert = "published expert" if result["game"] in GAMES else "expert"
        relative = (
            f"{result['relative_return']:.2f}"
            f" (0: random, {references[0]:.2f}; 1: {expert}, {references[1]:.2f})"
        )
    error = "" if result["return_stderr"] is None else f" ± {result['return_stderr']:.2f}"
    return (
        f"return    {result['return_mean']:.2f}{error}"
        f" (mean ± standard error of {result['episodes']} episodes, {result['mean_length']:.0f} steps long)\n"
        f"relative  {relative}"
    )


if __name__ == "__main__":
    run_main(main)
