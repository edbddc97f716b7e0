"""The types and ranges of `config.yaml`, and `load_config`, which every script calls first.

`config.yaml` holds the values and explains them; the dataclasses below check them. A key that only one of the
two knows is an error.
"""

import argparse
import math
import sys
from dataclasses import asdict, dataclass, fields, is_dataclass
from functools import reduce
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

from pydantic import BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError

from lapo.command_line import Parser
from lapo.errors import UserError
from lapo.frames import SIZES
from lapo.modes import MODES
from lapo.sources import explanations, items, leaves, merge, nested, read_yaml, whole

ROOT = Path(__file__).resolve().parent.parent
DEFAULTS = Path(__file__).resolve().parent / "config.yaml"

HELP = {"-h", "--help"}
PUBLISHED_STEPS = {"stage1": 50_000, "stage2": 60_000, "stage3": 4_000_000}
"""Steps of the published runs, in stage 3 env steps: the lengths that schedules are given for."""
PUBLISHED_UPDATE_STEPS = 64 * 64  # env steps per PPO update


STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)
Int = Annotated[int, BeforeValidator(whole)]
Count = Annotated[Int, Field(ge=1)]
NonNegative = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]
Widths = Annotated[list[Count], BeforeValidator(items)]
ImageSize = Annotated[Literal[SIZES], BeforeValidator(lambda x: int(x) if str(x).isdecimal() else x)]
EnvName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*(:[A-Za-z_][A-Za-z0-9_]*)?$")]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._=-]*$")]


@dataclass
class DataConfig:
    """Which windows the loader serves."""

    __pydantic_config__ = STRICT
    image_size: ImageSize
    context: Annotated[Int, Field(ge=0, le=16)]
    train_chunks: Count
    test_chunks: Count
    skip_resets: bool
    pool_chunks: Count
    skip_bad_chunks: bool

    @property
    def window(self) -> int:
        """Frames T of a window: `context` earlier ones, o[t] and o[t+1]."""
        return self.context + 2


@dataclass
class RecordConfig:
    """What `launch.sh --data` gets for a game without frames."""

    __pydantic_config__ = STRICT
    frames: Annotated[Int, Field(ge=3)]
    test_frames: Annotated[Int, Field(ge=3)]
    noise: Fraction


@dataclass
class ModelConfig:
    """Sizes of the networks."""

    __pydantic_config__ = STRICT
    idm_scale: Count
    policy_scale: Count
    wm_width: Annotated[Int, Field(ge=2, multiple_of=2)]


@dataclass
class VQConfig:
    """The vector-quantised bottleneck."""

    __pydantic_config__ = STRICT
    enabled: bool
    kind: Literal["ema", "fsq"]
    normalize: bool
    num_codebooks: Count
    num_latents: Count
    num_embs: Annotated[Int, Field(ge=2)]
    emb_dim: Count
    decay: Decay
    commitment_cost: NonNegative
    epsilon: Positive
    start: Literal["published", "data"]
    levels: Annotated[list[Annotated[Int, Field(ge=2)]], BeforeValidator(items), Field(min_length=1)]

    @property
    def num_codes(self) -> int:
        """Codes of all codebooks."""
        return self.num_codebooks * (math.prod(self.levels) if self.kind == "fsq" else self.num_embs)

    @property
    def la_dim(self) -> int:
        """Size of a latent action."""
        size = len(self.levels) if self.kind == "fsq" else self.emb_dim
        return self.num_codebooks * self.num_latents * size


@dataclass
class SupervisedConfig:
    """What stages 1 and 2 share."""

    __pydantic_config__ = STRICT
    steps: Count
    batch_size: Annotated[Int, Field(ge=2)]
    lr: Positive
    lr_start: NonNegative
    lr_warmup: Count
    lr_end: NonNegative
    log_every: Count
    save_every: Count


@dataclass
class Stage1Config(SupervisedConfig):
    """Stage 1: IDM and world model."""

    clip_norm: Positive
    probe_every: Count


@dataclass
class ProbeConfig:
    """How the true action is read from the latent one, as a measurement."""

    __pydantic_config__ = STRICT
    windows: Annotated[Int, Field(ge=4)]
    hidden: Count
    epochs: Count
    batch_size: Count


@dataclass
class Stage3Config:
    """Stage 3: the acting policy."""

    __pydantic_config__ = STRICT
    mode: Literal[tuple(MODES)]
    steps: Count
    log_every: Count
    save_every: Count
    eval_every: Annotated[Int, Field(ge=0)]


@dataclass
class Ramp:
    """A learning-rate factor: 0 until `hold`, `peak` at `peak_at`, 0 at the end, linear between."""

    __pydantic_config__ = STRICT
    hold: Annotated[Int, Field(ge=0)]
    peak_at: Count
    peak: NonNegative


@dataclass
class PPOConfig:
    """PPO, in the modes online and scratch."""

    __pydantic_config__ = STRICT
    num_envs: Count
    rollout_steps: Count
    minibatches: Count
    epochs: Count
    gamma: Fraction
    gae_lambda: Fraction
    clip: Positive
    entropy_coef: NonNegative
    value_coef: NonNegative
    clip_norm: Positive
    lr: Positive
    policy_head: Ramp
    value_head: Ramp
    fc: Ramp
    scratch_lr: Positive


@dataclass
class DecoderConfig:
    """The decoder latent → true action of online mode."""

    __pydantic_config__ = STRICT
    hidden: Widths
    batch_size: Count
    epochs: Count
    lr: Positive
    label_smoothing: Fraction
    start: Annotated[Int, Field(ge=0)]
    until: Annotated[Int, Field(ge=0)]
    """Env steps at which it ends (at the published length)."""
    every_update_until: Annotated[Int, Field(ge=0)]
    every: Count


@dataclass
class OfflineConfig:
    """Learning from a few labelled frames."""

    __pydantic_config__ = STRICT
    labels: Count
    sweep: Annotated[list[Annotated[Int, Field(ge=0)]], BeforeValidator(items)]
    draws: Count
    steps: Count
    batch_size: Count
    lr: Positive

    @property
    def trainings(self) -> list[tuple[int, int]]:
        """(number of labels, draw) of every training of a run: its own first, then those of the sweep."""
        swept = [(labels, draw) for labels in dict.fromkeys(self.sweep) for draw in range(self.draws)]
        return list(dict.fromkeys([(self.labels, 0), *swept]))


@dataclass
class RelabelConfig:
    """The policy that learns from labels of an IDM, in the modes idm_labelling and lapo_plus."""

    __pydantic_config__ = STRICT
    idm_steps: Count
    policy_steps: Count
    batch_size: Count
    lr: Positive
    save_every: Count


@dataclass
class ILPOConfig:
    """The trunk that mode ilpo pretrains."""

    __pydantic_config__ = STRICT
    num_actions: Count
    steps: Count
    batch_size: Count
    lr: Positive
    log_every: Count
    save_every: Count


@dataclass
class ExpertConfig:
    """How train_expert.py makes an expert."""

    __pydantic_config__ = STRICT
    teacher: Literal["none", "planner"]
    scale: Count
    steps: Count
    log_every: Count
    save_every: Count


@dataclass
class DaggerConfig:
    """Distilling a planner into a policy that sees one frame at a time."""

    __pydantic_config__ = STRICT
    steps: Count
    num_envs: Count
    rollout_steps: Count
    label_every: Count
    teacher_until: Annotated[float, Field(gt=0, le=1)]
    buffer: Count
    updates: Count
    batch_size: Count
    lr: Positive

    @property
    def round_steps(self) -> int:
        """Environment steps of a round."""
        return self.num_envs * self.rollout_steps

    @property
    def rounds(self) -> int:
        """Rounds of a run; the last one is complete, so a run may be a bit longer than `steps`."""
        return math.ceil(self.steps / self.round_steps)

    @property
    def rounds_kept(self) -> int:
        """Rounds that the buffer holds."""
        return max(1, self.buffer // self.round_steps)


@dataclass
class EvalConfig:
    """How policies are evaluated."""

    __pydantic_config__ = STRICT
    episodes: Count
    num_envs: Count
    greedy: bool


@dataclass
class Config:
    """Everything a run depends on; the groups follow the stages."""

    __pydantic_config__ = STRICT
    env: EnvName
    exp: Name
    stages_from: Annotated[str, Field(pattern=r"^([A-Za-z0-9][A-Za-z0-9._=-]*)?$")]
    seed: Annotated[Int, Field(ge=0, lt=2**31)]
    visuals: Literal["full", "plain"]
    data_dir: str
    results_dir: str
    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:[0-9]+)?)$")]
    precision: Literal["auto", "fp32", "bf16"]
    resident: Literal["auto", "always", "never"]
    compile: Literal["auto", "off", "on", "graphs"]
    wandb: Literal["online", "offline", "disabled"]
    save_minutes: Positive
    data: DataConfig
    record: RecordConfig
    model: ModelConfig
    vq: VQConfig
    stage1: Stage1Config
    probe: ProbeConfig
    stage2: SupervisedConfig
    stage3: Stage3Config
    ppo: PPOConfig
    decoder: DecoderConfig
    offline: OfflineConfig
    relabel: RelabelConfig
    ilpo: ILPOConfig
    expert: ExpertConfig
    dagger: DaggerConfig
    eval: EvalConfig

    @property
    def run_dir(self) -> Path:
        """Folder of all stages of this experiment, game and seed."""
        return resolve(self.results_dir) / self.exp / self.env / f"seed{self.seed}"

    def stage_dir(self, stage: str) -> Path:
        """Folder of an earlier stage: the run's own or, if it has none, that of experiment `stages_from`."""
        own = self.run_dir / stage
        if own.exists() or not self.stages_from:
            return own
        return resolve(self.results_dir) / self.stages_from / self.env / f"seed{self.seed}" / stage

    def total_steps(self, stage: str) -> int:
        """Steps of a stage: env steps in the modes of stage 3 that play, otherwise optimisation steps.

        Those of a sweep over labels included.
        """
        mode = MODES.get(stage.removeprefix("stage3_"))
        if mode and mode.plays:
            return self.stage3.steps
        taught = {"stage3_idm_labelling": self.relabel.idm_steps, "stage3_lapo_plus": self.offline.steps}
        earlier = {"stage1": self.stage1, "stage2": self.stage2, "ilpo_trunk": self.ilpo}
        steps = earlier.get(stage, self.offline).steps
        if stage in taught:
            steps = taught[stage] + self.relabel.policy_steps
        return steps * len(self.offline.trainings) if mode else steps

    @property
    def game_data(self) -> Path:
        """Folder with this game's `train` and `test` chunks."""
        return resolve(self.data_dir) / self.env


def resolve(path: str) -> Path:
    """Absolute path of a configured one: relative paths start at the repository's root."""
    return ROOT / Path(path).expanduser()


def diff(old: Any, new: Any, key: str = "") -> list[str]:
    """What changed between two nested dicts, one "key: old → new" per leaf."""
    if isinstance(old, dict) and isinstance(new, dict):
        names = dict.fromkeys([*old, *new])
        return [
            line for name in names for line in diff(old.get(name), new.get(name), f"{key}.{name}".lstrip("."))
        ]
    return [] if old == new else [f"{key}: {old} → {new}"]


def to_dict(cfg: Any) -> dict:
    """A dataclass of this module as plain nested dicts."""
    return asdict(cfg)


def validate(values: dict, kind: type = Config, source: str = "config") -> Any:
    """Make a config dataclass from nested dicts.

    Strings such as "3e-4", which YAML does not read as a number, become numbers.
    Raises `UserError` with one sentence that names the first key at fault.
    """
    try:
        return TypeAdapter(kind).validate_python(values)
    except ValidationError as error:
        raise UserError(_explain(error, kind, source)) from None


def load_config(argv: list[str] | None = None, description: str = "") -> Config:
    """The config that a command line asks for, by default that of this process, see `parse_with_config`."""
    return parse_with_config(Parser(description), argv)[1]


def parse_with_config(parser: Parser, argv: list[str] | None = None) -> tuple[argparse.Namespace, Config]:
    """Parse a command line that holds the parser's own options and any key of the config.

    The config comes from config.yaml, `--config` files, `--preset`s and the keys given as options, of which
    later ones win: `--stage1.lr 1e-4`, `--stage1.lr=1e-4`, `--decoder.hidden 64,32`. An own option whose
    `dest` is a key of the config sets that key. `--help` prints the own options and all keys with their
    explanations and values, and exits. Raises `UserError` for an unknown option, a wrong type, an impossible
    value or schedule, or a missing file.
    """
    values = read_yaml(DEFAULTS)
    presets = values.pop("presets", {})
    keys = _add_config_options(parser, values)
    words = sys.argv[1:] if argv is None else argv
    args = parser.parse_args([word for word in words if word not in HELP])
    source = DEFAULTS.name
    for file in args.config:
        source = file
        values = merge(values, read_yaml(Path(file).expanduser()), source)
        presets = merge(presets, values.pop("presets", None), f"{source}: 'presets'")
    for name in args.preset:
        if name not in presets:
            raise UserError(f"unknown preset '{name}'; the presets are: {', '.join(presets) or 'none'}")
        source = f"preset {name}"
        values = merge(values, presets[name], source)
    cfg = validate(values, source=source)
    if HELP & set(words):  # only now, as files and presets change the values shown
        now = leaves(to_dict(cfg))
        for key, option in keys.items():
            option.nargs, option.metavar = _shown(now[key])
        parser.print_help()
        parser.exit()
    for key in keys.keys() & vars(args).keys():
        values = merge(values, nested(key, getattr(args, key)), "the command line")
    cfg = validate(values, source="the command line")
    _check_schedules(cfg)
    return args, cfg


def _add_config_options(parser: Parser, values: dict) -> dict[str, argparse.Action]:
    """Make every key of `values` an option of `parser`; returns the options by key."""
    parser.usage = "%(prog)s [--option value ...]"
    parser.add_argument(
        "--config",
        nargs="+",
        action="extend",
        default=[],
        metavar="FILE",
        help="YAML file that names only what it changes",
    )
    parser.add_argument(
        "--preset",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME",
        help="group of settings at the end of config.yaml, e.g. demo",
    )
    explained = explanations(DEFAULTS)
    general = parser.add_argument_group("config.yaml")
    groups = {
        name: parser.add_argument_group(name, explained[name])
        for name, x in values.items()
        if isinstance(x, dict)
    }
    options = {}
    for key, value in leaves(values).items():
        nargs, metavar = _shown(value)
        options[key] = groups.get(key.split(".")[0], general).add_argument(
            f"--{key}",
            nargs=nargs,
            default=argparse.SUPPRESS,
            metavar=metavar,
            help=explained[key].replace("%", "%%"),
        )
    return options


def _shown(value: Any) -> tuple[str | None, str | tuple[str, str]]:
    """`nargs` and `metavar` of an option that has this value; an empty list may be given without items."""
    if not isinstance(value, list):
        return None, str(value).lower() or '""'
    return ("+", (",".join(map(str, value)), "N")) if value else ("*", "N")


def _check_schedules(cfg: Config) -> None:
    """Raise `UserError` for schedules out of order, or that the run would end before.

    A run shorter than the published one shrinks the points in proportion, so these count up to the published
    length; a longer one keeps them, and they count up to its own.
    """
    ends = {stage: max(getattr(cfg, stage).steps, steps) for stage, steps in PUBLISHED_STEPS.items()}
    pairs = [
        *((f"{stage}.lr_warmup", f"the end of {stage}") for stage in ("stage1", "stage2")),
        ("decoder.start", "decoder.until"),
        ("decoder.start", "the end of stage3"),
    ]
    for ramp in ("policy_head", "value_head", "fc"):
        pairs += [(f"ppo.{ramp}.hold", f"ppo.{ramp}.peak_at"), (f"ppo.{ramp}.peak_at", "the end of stage3")]
    points = {f"the end of {stage}": end for stage, end in ends.items()}
    for key in {key for pair in pairs for key in pair} - points.keys():
        points[key] = reduce(getattr, key.split("."), cfg)
    for earlier, later in pairs:
        if points[earlier] >= points[later]:
            raise UserError(
                f"{earlier} is {points[earlier]:,}, but must come before {later}, {points[later]:,}"
                " (points of a schedule are given for the published length, see config.yaml)"
            )


def _form(key: str) -> str:
    """What the word at `key` must look like."""
    if key == "device":
        return "choose auto, cpu, cuda or cuda:N"
    own = ", or module:function" if key == "env" else ""
    return f"use letters, digits, '.', '_' and '-', a letter or digit first{own}"


def _explain(error: ValidationError, kind: type, source: str) -> str:
    """The first problem of a validation as one sentence."""
    problem = error.errors()[0]
    loc = [str(part) for part in problem["loc"]]
    key = ".".join(loc)
    if problem["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        owner: Any = kind
        for part in loc[:-1]:
            owner = get_type_hints(owner).get(part, owner)
        allowed = ", ".join(field.name for field in fields(owner)) if is_dataclass(owner) else "none"
        return f"{source}: unknown key '{key}'; allowed here: {allowed}"
    if problem["type"] in ("missing", "missing_argument"):
        return f"{source}: the key '{key}' is missing; config.yaml shows every key"
    if problem["type"] == "string_pattern_mismatch":
        return f"{source}: '{key}' is {problem['input']!r}; {_form(key)}"
    if problem["input"] is None:
        return f"{source}: '{key}' has no value; give it one (the word null in quotes), or leave the line out"
    return f"{source}: '{key}' is {problem['input']!r}: {problem['msg'][0].lower()}{problem['msg'][1:]}"
