"""All runs of experiments on disk: games × seeds × modes × settings, and what is missing among them.

Nothing is aggregated here; see aggregate.py.
"""

import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

from lapo.config import Config, resolve, to_dict
from lapo.data.chunks import find_chunks, read_header
from lapo.errors import UserError
from lapo.games.table import GAMES
from lapo.modes import MODES
from lapo.reporting.summary import STAGES, StageOutput
from lapo.runs.checkpoints import changed_inputs, saved_config, weights_checksum
from lapo.sources import leaves

EARLIER = STAGES[:2]
PLAYING = tuple(f"stage3_{mode}" for mode in MODES if MODES[mode].plays)
NO_SETTINGS = "log_every", "save_every", "probe_every"
"""Keys of groups on which no result depends."""
AXES = "offline.labels", "offline.sweep", "offline.draws"
"""Keys that are no settings: tables and figures show their values in any case. So they do the precision."""
FRAMES = "data_dir", "data"
BELOW = {
    "stage1": ("stage1", *FRAMES, "vq", "model.idm_scale", "model.wm_width"),
    "stage2": ("stage2", "model.policy_scale"),
}
"""What counts as the earlier stages were trained with it, whatever stage 3 was called with."""
INHERITED = "vq", "model.idm_scale", "model.policy_scale", "data.image_size", "data.context"
"""What stage 3 takes over from them, and its own config therefore holds."""
INPUTS = "built on"
"""A setting of its own: stages that are not what the policy was trained on; empty if they are."""


@dataclass(frozen=True)
class StageRun:
    """What the folder of one stage holds, its networks left out."""

    cfg: Config
    """The config it was trained with, but for `results_dir` and `exp`, which are those where it was found."""
    metrics: dict[str, Any]
    lines: list[dict]
    """Of metrics.jsonl."""
    steps: int
    """So far: training steps, or env steps in the modes with rewards."""
    finished: bool
    seconds: int
    device: str | None
    """In words; None if an older version wrote the checkpoint."""
    weights: str
    """Checksum of what later stages use."""
    built_on: dict[str, str]
    """Checksums of its inputs."""


@dataclass(frozen=True)
class Policy:
    """One run of stage 3, with what it was built on."""

    exp: str
    game: str
    seed: int
    mode: str
    stage: StageRun
    earlier: dict[str, StageRun]
    """The stages that the mode builds on, directly or through another, as far as they are still there."""
    settings: dict[str, str]
    """The config's keys that its results depend on, as `group.key`, but for `AXES`; and `INPUTS`."""
    frames: int | None
    """Frames without actions that it was trained on, None if there are none or their folder has gone."""

    @property
    def finished(self) -> bool:
        """Whether it was trained to the end and evaluated."""
        return self.stage.finished and bool(evaluations(self.stage.metrics))

    @property
    def stale(self) -> bool:
        """Whether a stage that it was built on has been trained again since."""
        return bool(self.settings.get(INPUTS))

    @property
    def labels(self) -> int | None:
        """Labelled frames; None in the modes with rewards."""
        return None if MODES[self.mode].plays else self.stage.cfg.offline.labels

    @property
    def env_steps(self) -> int | None:
        """Env steps of its training; None in the modes without rewards."""
        return self.stage.cfg.stage3.steps if MODES[self.mode].plays else None


@dataclass(frozen=True)
class Stage1:
    """A finished stage 1, with or without policies that build on it."""

    exp: str
    game: str
    seed: int
    run: StageRun
    settings: dict[str, str]
    """The config's keys that its results depend on, as `group.key`."""


@dataclass(frozen=True)
class Missing:
    """A stage of a run that is missing, unfinished, damaged or stale."""

    exp: str
    game: str
    seed: int
    stage: str
    state: str
    detail: str
    """In words."""


@dataclass
class Grid:
    """The runs of some experiments."""

    policies: list[Policy] = field(default_factory=list)
    stage1: list[Stage1] = field(default_factory=list)
    """Of the experiments themselves, not those taken with `stages_from`."""
    missing: list[Missing] = field(default_factory=list)
    expected: dict[str, tuple[list[str], list[int], list[str]]] = field(default_factory=dict)
    """Games, seeds and modes of each experiment; every combination of them is expected."""

    @property
    def finished(self) -> list[Policy]:
        """Policies that were trained to the end and evaluated."""
        return [policy for policy in self.policies if policy.finished]

    def progress(self, exp: str) -> tuple[int, int]:
        """How many policies of an experiment are finished and not stale, and how many are expected.

        Without any mode, how many stages 1.
        """
        games, seeds, modes = self.expected[exp]
        done = sum(policy.exp == exp and not policy.stale for policy in self.finished)
        if not modes:
            done = sum(found.exp == exp for found in self.stage1)
        return done, len(games) * len(seeds) * max(1, len(modes))


def read_grid(
    results_dir: str,
    exps: list[str],
    games: list[str],
    seeds: list[int],
    modes: list[str],
    recorded: Grid | None = None,
) -> Grid:
    """Read all runs of `exps`; of these games, seeds and modes alone, if any are given.

    Expected is every combination of games, seeds and modes: those given or, where none are given, those that
    the experiment has a folder of. What is `recorded` counts as well, unless the folder has it finished.
    Raises `UserError` if one of the experiments has no run at all, and for an unknown game.
    """
    recorded = recorded or Grid()
    grid, root = Grid(), resolve(results_dir)
    folders = {exp: list(run_folders(root / exp)) for exp in exps}
    known = {place(found): found for found in (*recorded.policies, *recorded.stage1)}
    held = {exp: {game for game, *_ in found} for exp, found in folders.items()}
    for exp, game, *_ in known:
        held.setdefault(exp, set()).add(game)
    if not root.is_dir() and not known:
        raise UserError(f"--results_dir: there is no folder {root}")
    for exp in exps:
        if not held[exp]:
            others = {path.parents[1].name for path in root.glob("*/*/seed*")} | {exp for exp, *_ in known}
            raise UserError(
                f"{root} has no run of {exp}; name experiments with --exp and their folder with --results_dir"
                f" (this one holds {', '.join(sorted(others)) or 'none'})"
            )
    for game in games:
        if game not in GAMES and not any(game in held[exp] for exp in exps):
            raise UserError(
                f"--env {game} is no Procgen game, and {' and '.join(exps)} has no run of it; the games are"
                f" {', '.join(sorted(set().union(*(held[exp] for exp in exps)), key=game_order))}"
            )
    for exp, found in folders.items():
        of_exp = [where[1:] for where in known if where[0] == exp]
        names = {path.name for _, _, folder in found for path in folder.iterdir()}
        names |= {f"stage3_{mode}" for *_, mode in of_exp}
        places = {(game, seed) for game, seed, _ in (*found, *of_exp)}
        grid.expected[exp] = (
            games or sorted({game for game, _ in places}, key=game_order),
            seeds or sorted({seed for _, seed in places}),
            [mode for mode in MODES if mode in modes or (not modes and f"stage3_{mode}" in names)],
        )
        for game, seed in product(*grid.expected[exp][:2]):
            of_run = {mode: known[exp, game, seed, mode] for *where, mode in of_exp if where == [game, seed]}
            read_run(grid, root, exp, game, seed, of_run)
    return grid


def place(found: Policy | Stage1) -> tuple[str, str, int, str]:
    """Experiment, game, seed and mode, which is "" for stage 1."""
    return found.exp, found.game, found.seed, found.mode if isinstance(found, Policy) else ""


def run_folders(folder: Path) -> Iterator[tuple[str, int, Path]]:
    """Game, seed and folder of every run of an experiment."""
    for path in sorted(folder.glob("*/seed*")):
        if path.is_dir() and (number := re.fullmatch(r"seed(\d+)", path.name)):
            yield path.parent.name, int(number[1]), path


def game_order(game: str) -> tuple[int, str]:
    """Sorts Procgen's games as the paper does, others behind them."""
    return (list(GAMES).index(game) if game in GAMES else len(GAMES), game)


def read_run(
    grid: Grid, root: Path, exp: str, game: str, seed: int, recorded: dict[str, Policy | Stage1]
) -> None:
    """Add what there is of one run to the grid, and what is missing.

    `recorded` are policies by mode, and stage 1 by "".
    """
    folder, modes = root / exp / game / f"seed{seed}", grid.expected[exp][2]
    stages: dict[Path, StageRun | None] = {}

    def note(stage: str, state: str, detail: str) -> None:
        grid.missing.append(Missing(exp, game, seed, stage, state, detail))

    def read(path: Path) -> StageRun | None:
        if path not in stages:
            stages[path] = read_stage(path, root)
        return stages[path]

    absent, built = [], False
    needed: set[str] = set()  # of stages 1 and 2; those of a mode may be another experiment's (`stages_from`)
    for mode in [mode for mode in modes if mode in recorded]:
        with suppress(UserError):
            found = read(folder / f"stage3_{mode}")
            if found is not None and found.finished and evaluations(found.metrics):
                continue
        grid.policies.append(recorded[mode])
        built = built or bool(stages_below(mode))
        modes = [other for other in modes if other != mode]

    for stage in (*EARLIER, *(f"stage3_{mode}" for mode in modes)):
        try:
            found = read(folder / stage)
        except UserError as error:
            stages[folder / stage] = None
            note(stage, "damaged", str(error))
            continue
        if found is None:
            absent.append(stage)
        elif not found.finished:
            of = found.cfg.total_steps(stage)
            at = (
                f"at step {found.steps:,} of {of:,}" if found.steps < of else "trained, but not evaluated yet"
            )
            note(stage, "unfinished", f"unfinished, {at}")

    for mode in modes:
        found = stages[folder / f"stage3_{mode}"]
        if found is None:
            continue
        earlier = {}
        below = {stage: found.cfg.stage_dir(stage) for stage in stages_below(mode)}
        built = built or bool(below)
        if mode not in recorded:  # else, so are its stages
            needed |= {stage for stage in below if below[stage] == folder / stage}
        with suppress(UserError):  # damage is noted above, or belongs to another experiment
            for stage in dict.fromkeys((*stages_below(mode), *MODES[mode].stages)):
                if run := read(found.cfg.stage_dir(stage)) or recorded_stage(recorded.get(mode), stage):
                    earlier[stage] = run
        runs = found, *earlier.values()
        changed = list(dict.fromkeys(stage for run in runs for stage in changed_stages(run, earlier)))
        if changed:
            # The stage 1 below a stage 2 that has gone is unknown, unless the policy says what it was.
            kept = {stage: run for stage, run in earlier.items() if stage in found.built_on}
            earlier = kept if "stage2" in changed else earlier
            note(f"stage3_{mode}", "stale", f"trained on another {' and '.join(changed)} than is there now")
        if found.finished and not evaluations(found.metrics):
            note(f"stage3_{mode}", "unfinished", "finished, but not evaluated: its game cannot be played")
        kept = {stage: run for stage, run in earlier.items() if stage not in changed}
        chosen = settings(mode, found, kept)
        if MODES[mode].stages:
            chosen[INPUTS] = f"another {' and '.join(changed)}" if changed else ""
        policy = Policy(exp, game, seed, mode, found, kept, chosen, None)
        grid.policies.append(replace(policy, frames=count_frames(policy)))

    stage1 = stages[folder / "stage1"]
    if stage1 is not None and stage1.finished:
        grid.stage1.append(Stage1(exp, game, seed, stage1, stage1_settings(stage1)))
    elif "" in recorded:
        grid.stage1.append(recorded[""])
        absent = [stage for stage in absent if stage != "stage1"]

    if not built:  # so it is unknown whether they are another experiment's
        needed = {stage for mode in modes for stage in stages_below(mode)}
    if not grid.expected[exp][2]:  # stages 1 are compared
        needed = {"stage1"}
    for stage in absent:
        if stage not in EARLIER or stage in needed:
            detail = "missing: its folder has no checkpoint" if (folder / stage).is_dir() else "missing"
            note(stage, "missing", detail)


def recorded_stage(policy: Policy | None, stage: str) -> StageRun | None:
    """A stage that a recorded policy was built on, if its checksum was recorded, too."""
    found = policy.earlier.get(stage) if policy else None
    return found if found and found.weights else None


def changed_stages(run: StageRun, earlier: dict[str, StageRun]) -> list[str]:
    """The stages of `earlier` that are not those that `run` was trained on."""
    return changed_inputs(
        {"built_on": run.built_on}, {stage: other.weights for stage, other in earlier.items()}
    )


def stages_below(mode: str) -> tuple[str, ...]:
    """The stages 1 and 2 that a mode builds on, directly or through another."""
    stages = MODES[mode].stages
    return EARLIER if "stage2" in stages else tuple(stage for stage in stages if stage in EARLIER)


def read_stage(folder: Path, root: Path) -> StageRun | None:
    """The stage in `folder`, None if it has no checkpoint. Raises `UserError` if something is damaged."""
    output = StageOutput.read(folder)
    if output is None:
        return None
    checkpoint, progress = output.checkpoint, output.progress()
    return StageRun(
        cfg=replace(saved_config(checkpoint), results_dir=str(root), exp=folder.parents[2].name),
        metrics=output.metrics,
        lines=output.lines,
        steps=progress["steps"] if checkpoint["stage"] in PLAYING else checkpoint["step"],
        finished=checkpoint["finished"],
        seconds=progress["seconds"],
        device=checkpoint.get("device"),
        weights="" if checkpoint["stage"].startswith("stage3_") else weights_checksum(checkpoint),
        built_on=checkpoint.get("built_on", {}),
    )


def evaluations(metrics: dict[str, Any]) -> list[dict[str, Any]]:
    """What has a `return_mean` in a stage's metrics: entries of a sweep over labels, then the metrics."""
    return [entry for entry in (*(metrics.get("sweep") or ()), metrics) if "return_mean" in entry]


def settings(mode: str, stage: StageRun, earlier: dict[str, StageRun]) -> dict[str, str]:
    """What `Policy.settings` says, but for `INPUTS`.

    What is in `BELOW` has the value that the stage was trained with; if the stage is not in `earlier`, it is
    left out unless it is `INHERITED` or says where labels come from. Where labels come from other frames than
    stage 1's, both are named.
    """
    own = {key: shown(value) for key, value in leaves(to_dict(stage.cfg)).items()}
    chosen = ["visuals", "model.policy_scale", "data.image_size", *MODES[mode].config_keys]
    if MODES[mode].plays:
        chosen += ["stage3.steps"]
    if "frames" in MODES[mode].learns_from or "labels" in MODES[mode].learns_from:
        chosen += ["data_dir"]
    values = {key: value for key, value in own.items() if belongs(key, chosen)}
    for name in stages_below(mode):
        known = (*INHERITED, *(FRAMES if "labels" in MODES[mode].learns_from else ()))
        unknown = [key for key in values if belongs(key, BELOW[name]) and not belongs(key, known)]
        values = {key: value for key, value in values.items() if key not in unknown}
        if name in earlier:
            there = leaves(to_dict(earlier[name].cfg))
            values |= {key: shown(there[key]) for key in there if belongs(key, BELOW[name])}
    if "labels" in MODES[mode].learns_from:
        for key in values:
            if belongs(key, FRAMES) and values[key] != own[key]:
                values[key] += f", labels {own[key]}"
    return {
        key: value
        for key, value in values.items()
        if key not in AXES and key.split(".")[-1] not in NO_SETTINGS
    }


def stage1_settings(run: StageRun) -> dict[str, str]:
    """The config's keys on which the results of a stage 1 depend."""
    return {
        key: shown(value)
        for key, value in leaves(to_dict(run.cfg)).items()
        if belongs(key, ("visuals", "probe", *BELOW["stage1"])) and key.split(".")[-1] not in NO_SETTINGS
    }


def belongs(key: str, names: Iterable[str]) -> bool:
    """Whether a key of the config, as `group.key`, is among keys and groups."""
    return any(key == name or key.startswith(f"{name}.") for name in names)


def shown(value: Any) -> str:
    """A value of the config as a command line would have it."""
    if isinstance(value, list):
        return ",".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def count_frames(policy: Policy) -> int | None:
    """Training frames in the policy's data folder, as far as its config uses them; see `Policy.frames`."""
    if "frames" not in MODES[policy.mode].learns_from:
        return None
    cfg = policy.earlier["stage1"].cfg if "stage1" in policy.earlier else policy.stage.cfg
    with suppress(OSError, UserError):
        return sum(read_header(path) for path in find_chunks(cfg.game_data / "train", cfg.data.train_chunks))
    return None
