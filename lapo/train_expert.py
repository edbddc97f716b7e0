"""Train an expert to record from: `python train_expert.py --env bigfish`, then `record_expert.py --expert`.

`--teacher none`     PPO from scratch: what stage 3 does in mode scratch, for longer
`--teacher planner`  DAgger: distils the game's planner, which reads the simulator's state, into a policy
                     that sees single frames, and whose actions can be imitated from frames

The finished run's checkpoint is the expert: a small file with its training and its returns. Saved as
`expert_data/experts/<game>.pt`, it is what `record_expert.py` records by default.
"""

from argparse import SUPPRESS
from dataclasses import replace
from functools import partial

from torch import nn

from lapo.acting import evaluate_policy
from lapo.command_line import Parser
from lapo.config import Config, parse_with_config
from lapo.errors import run_main
from lapo.experts import registry as experts
from lapo.experts.dagger import Dagger
from lapo.games.make import check_env, env_version, make_env
from lapo.games.table import check_game
from lapo.models import make_acting_policy
from lapo.ppo import num_updates, train_from_scratch
from lapo.runs.compute import Compute, seed_everything
from lapo.runs.ranks import require_single_process
from lapo.runs.run import Run

STAGE = "expert"


def main() -> None:
    """Train as the command line says."""
    require_single_process("train_expert.py")
    parser = Parser(__doc__)
    parser.add_argument(
        "--teacher", dest="expert.teacher", default=SUPPRESS, help="short for --expert.teacher"
    )
    train(parse_with_config(parser)[1])


def train(cfg: Config) -> None:
    """Train the expert; the result is the run's checkpoint."""
    compute = Compute.from_config(cfg)
    distils = cfg.expert.teacher == "planner"
    if distils:
        check_game(cfg.env)
    check_env(cfg.env)
    # The networks are those of stage 3, so that experts can be used wherever its policies can.
    cfg = replace(
        cfg,
        model=replace(cfg.model, policy_scale=cfg.expert.scale),
        stage3=replace(
            cfg.stage3,
            mode="bc" if distils else "scratch",
            steps=cfg.expert.steps,
            log_every=cfg.expert.log_every,
            save_every=cfg.expert.save_every,
        ),
    )
    seed_everything(cfg.seed)
    keys = "expert", "dagger" if distils else "ppo", "eval", "data.image_size"
    run = Run(cfg, STAGE, keys, compute)
    if run.finished:
        run.print_result()
        return
    if distils:
        policy, env_steps = distil(cfg, compute, run), cfg.dagger.rounds * cfg.dagger.round_steps
    else:
        updates, steps_per_update = num_updates(cfg)
        policy, env_steps = train_from_scratch(cfg, compute, run), updates * steps_per_update
    result = {"env_steps": env_steps} | evaluate_policy(policy, cfg, compute)
    run.finish({"policy": policy.state_dict(), "origin": origin(cfg)}, result)
    print(f"record it with `python record_expert.py --env {cfg.env} --expert {run.checkpoint_path}`")


def distil(cfg: Config, compute: Compute, run: Run) -> nn.Module:
    """A policy distilled from the game's planner."""
    env = make_env(cfg.env, cfg.dagger.num_envs, seed=cfg.seed, visuals=cfg.visuals)
    policy = compute.place(make_acting_policy(cfg, "bc", env.num_actions))
    dagger = Dagger(cfg.dagger, compute, env, partial(experts.make_expert, cfg.env), policy)
    if run.state:
        dagger.load_state_dict(run.state)
    rounds, round_steps = cfg.dagger.rounds, cfg.dagger.round_steps
    options = {"save_every": cfg.expert.save_every, "unit": "step", "scale": round_steps}
    for number in run.loop(rounds, dagger.state_dict, **options):
        run.track(dagger.collect() | dagger.fit())
        if (number + 1) % cfg.expert.log_every == 0 or number + 1 == rounds:
            recent = dagger.recent
            run.log((number + 1) * round_steps, {"train_return": sum(recent) / len(recent)} if recent else {})
    env.close()
    return policy


def origin(cfg: Config) -> dict[str, str]:
    """How the expert was made, in addition to what every checkpoint holds."""
    made = {"method": "PPO from scratch"} | env_version(cfg.env)
    if cfg.expert.teacher == "planner":
        teacher = experts.expert_name(cfg.env)
        made |= {"method": f"DAgger, taught by {teacher}", "experts": experts.source_hash()}
    return made


if __name__ == "__main__":
    run_main(main)
