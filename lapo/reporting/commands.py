"""The commands that train the runs of a grid."""

import shlex
from collections import defaultdict
from collections.abc import Callable

from lapo.config import DEFAULTS, Config, load_config, to_dict, validate
from lapo.modes import MODES
from lapo.reporting.grid import BELOW, FRAMES, Grid, Policy, belongs, game_order, shown, stages_below
from lapo.sources import leaves, merge, nested, read_yaml

COMMAND_PARTS = "env", "exp", "seed", "stage3.mode", "results_dir", "precision"
"""Keys that are named in a command in another way, or that the checkpoint holds as resolved."""
OF_MODES = {key.split(".")[0] for mode in MODES.values() for key in mode.config_keys} - {
    key.split(".")[0] for keys in BELOW.values() for key in keys
}
"""Groups of the config that only modes of stage 3 read."""


def commands(grid: Grid) -> list[str]:
    """Commands that train the grid's runs, from the configs in their checkpoints, in an order that works.

    The nearest preset is named, then every key that differs from it and is read. Stages 1 and 2 are as they
    were trained: a run's later stages may have been started without these options, or take them from another
    experiment.
    """
    spell = speller()
    # By order, experiment and options: games, seeds, stages and modes
    lines: dict[tuple, list[tuple[str, int, str, str]]] = defaultdict(list)
    trained: dict[tuple, Config] = {}
    for policy in grid.policies:
        for stage, run in policy.earlier.items():
            trained[run.cfg.exp, policy.game, policy.seed, stage] = run.cfg
    trained |= {(found.exp, found.game, found.seed, "stage1"): found.run.cfg for found in grid.stage1}
    written = set()
    for policy in grid.policies:
        cfg, place = policy.stage.cfg, (policy.exp, policy.game, policy.seed)
        taken = {stage for stage, run in policy.earlier.items() if run.cfg.exp != policy.exp}
        own = [
            stage
            for stage in stages_below(policy.mode)
            if stage not in taken and (stage in policy.earlier or not cfg.stages_from)
        ]
        if reads_labels_elsewhere(policy):  # one command cannot name both folders
            own = []
        for stage in ("stage1", "stage2"):
            if (found := trained.get((*place, stage))) is not None:
                cfg = as_trained(cfg, found, stage, frames=stage in own)
        lines[1 + bool(taken), policy.exp, spell(cfg)] += [
            (*place[1:], stage, policy.mode) for stage in [*own, "stage3"]
        ]
        written |= {(*place, stage) for stage in own}
    for (exp, game, seed, stage), cfg in trained.items():
        if (exp, game, seed, stage) not in written and stage in BELOW:
            for other in BELOW:  # in one command, where both are missing
                cfg = as_trained(cfg, trained.get((exp, game, seed, other), cfg), other, frames=True)
            lines[0, exp, spell(cfg)].append((game, seed, stage, ""))
    # A command that has a mode also covers where the mode is missing; what is finished returns at once.
    for missing in grid.missing:
        mode = missing.stage.removeprefix("stage3_")
        for (order, exp, _), runs in lines.items():
            if order and exp == missing.exp and any(run[2:] == ("stage3", mode) for run in runs):
                stages = {run[2] for run in runs if run[3] == mode}
                runs += [(missing.game, missing.seed, stage, mode) for stage in stages]
                break
    needed: dict[tuple, list[tuple[str, int, str, str]]] = defaultdict(list)
    for (order, exp, words), runs in lines.items():
        needed[order, exp, read_by(runs, words)] += runs
    return [
        command(exp, words, runs)
        for (_, exp, words), runs in sorted(needed.items(), key=lambda item: item[0][0])
    ]


def read_by(runs: list[tuple[str, int, str, str]], words: tuple[str, ...]) -> tuple[str, ...]:
    """The options, as `--key value`, without those of groups that none of the runs' modes or stages reads."""
    modes = {mode for *_, mode in runs if mode}  # "" without a stage 3
    unread = OF_MODES - {key.split(".")[0] for mode in modes for key in MODES[mode].config_keys}
    if all(stage == "stage1" for _, _, stage, _ in runs):
        unread |= {"stage2", "stage3"}
    return tuple(word for word in words if not belongs(word.split()[0][2:], unread))


def command(exp: str, words: tuple[str, ...], runs: list[tuple[str, int, str, str]]) -> str:
    """The command for games, seeds, stages and modes of one experiment, with further options."""
    games, seeds, stages, modes = (set(column) for column in zip(*runs, strict=True))
    numbers = [name.removeprefix("stage") for name in ("stage1", "stage2", "stage3") if name in stages]
    parts = ["bash launch.sh", shlex.join(sorted(games, key=game_order))]
    parts += [f"--seeds {','.join(map(str, sorted(seeds)))}"]
    parts += [f"--stages {','.join(numbers)}"] if len(numbers) < 3 else []
    parts += [f"--modes {','.join(mode for mode in MODES if mode in modes)}"] if "3" in numbers else []
    return " ".join([*parts, f"--exp {exp}", *words])


def reads_labels_elsewhere(policy: Policy) -> bool:
    """Whether a mode that learns from labels has other frames than the run's own stage 1."""
    below = policy.earlier.get("stage1")
    if below is None or "labels" not in MODES[policy.mode].learns_from:
        return False
    return any(getattr(below.cfg, key) != getattr(policy.stage.cfg, key) for key in FRAMES)


def as_trained(cfg: Config, trained: Config, stage: str, *, frames: bool) -> Config:
    """`cfg` with the keys that belong to a stage as that was `trained`, with its `frames` or without."""
    values, there = to_dict(cfg), leaves(to_dict(trained))
    names = (*BELOW[stage], "probe") if stage == "stage1" else BELOW[stage]
    for key, value in there.items():
        if belongs(key, names) and (frames or not belongs(key, FRAMES)):
            values = merge(values, nested(key, value), "a checkpoint")
    return validate(values)


def speller() -> Callable[[Config], tuple[str, ...]]:
    """What turns a config into options: the nearest preset, and the keys that differ from it."""
    values = read_yaml(DEFAULTS)
    presets = {None: {}, **values.pop("presets", {})}
    bases = {
        name: leaves(to_dict(validate(merge(values, preset, str(name))))) for name, preset in presets.items()
    }
    defaults = load_config([])

    def spell(cfg: Config) -> tuple[str, ...]:
        found = min((options(cfg, bases[name], name) for name in bases), key=len)
        if cfg.run_dir.parents[2] != defaults.run_dir.parents[2]:
            found += [f"--results_dir {shlex.quote(cfg.results_dir)}"]
        return tuple(found)

    return spell


def options(cfg: Config, base: dict, preset: str | None) -> list[str]:
    """The options that make `cfg` of a preset, whose values are `base`."""
    changed = [
        f"--{key} {shlex.quote(shown(value))}"
        for key, value in leaves(to_dict(cfg)).items()
        if value != base[key] and key not in COMMAND_PARTS
    ]
    return [f"--preset {preset}", *changed] if preset else changed
