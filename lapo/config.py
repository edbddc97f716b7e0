"""The typed view of `config.yaml`, and the command line made from it.

`load_config()` is what every script calls first. The YAML file holds the values, the dataclasses below hold
types, ranges and help texts; a key that only one of the two knows is an error.
"""

import math
import re
import sys
from dataclasses import asdict, dataclass, fields, is_dataclass
from functools import reduce
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import tyro
from pydantic import BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError

from lapo.errors import UserError
from lapo.sources import merge, nested, read_options, read_yaml

ROOT = Path(__file__).resolve().parent.parent
DEFAULTS = Path(__file__).resolve().parent / "config.yaml"

PUBLISHED_STEPS = {"stage1": 50_000, "stage2": 60_000, "stage3": 4_000_000}
"""Steps of the published runs, in stage 3 env steps: the lengths that schedules are given for."""


def _whole(value: Any) -> Any:
    """`4e6` as the whole number that it is; anything else as it came."""
    if isinstance(value, str) and re.fullmatch(r"\s*[+-]?\d[\d_]*(\.\d*)?[eE]\+?\d{1,2}\s*", value):
        number = float(value)
        return int(number) if number.is_integer() else value
    return value


def _items(value: Any) -> Any:
    """The items of a list as a command line or a sweep may write it: `64 32`, `64,32`, `[64, 32]`."""
    words = [value] if isinstance(value, str) else value
    if not (isinstance(words, list) and all(isinstance(word, str) for word in words)):
        return value
    text = " ".join(words).strip()
    if text.startswith("[") and text.endswith("]"):
        text = text[1:-1].strip()
    return re.split(r"\s*,\s*|\s+", text) if text else []


STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)
Int = Annotated[int, BeforeValidator(_whole)]
Count = Annotated[Int, Field(ge=1)]
NonNegative = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]
Widths = Annotated[list[Count], BeforeValidator(_items)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]


@dataclass
class DataConfig:
    """Which windows the loader serves."""

    __pydantic_config__ = STRICT
    train_chunks: Count
    """Use at most this many training chunks, in order of their number, bad ones included."""
    test_chunks: Count
    """The same for test chunks."""
    skip_resets: bool
    """Leave out windows that touch an episode's end (the published code keeps them)."""
    pool_chunks: Count
    """Chunks whose windows are mixed where they take turns; the device holds twice as many."""
    skip_bad_chunks: bool
    """Name a damaged chunk and go on without it, instead of stopping."""


@dataclass
class ModelConfig:
    """Sizes of the networks."""

    __pydantic_config__ = STRICT
    idm_scale: Count
    """Width multiplier of the IDM's IMPALA encoder."""
    policy_scale: Count
    """Width multiplier of the policy's IMPALA encoder."""
    wm_width: Annotated[Int, Field(ge=2, multiple_of=2)]
    """Base width of the world model's U-Net (even)."""


@dataclass
class VQConfig:
    """The vector-quantised bottleneck."""

    __pydantic_config__ = STRICT
    enabled: bool
    """False: latents pass unquantised (the paper's no-VQ ablation)."""
    num_codebooks: Count
    """Independent codebooks."""
    num_latents: Count
    """Latent slots per codebook."""
    num_embs: Annotated[Int, Field(ge=2)]
    """Codes per codebook."""
    emb_dim: Count
    """Size of a code."""
    decay: Decay
    """Decay of the moving averages that make the codes."""
    commitment_cost: NonNegative
    """Weight of the commitment loss."""
    epsilon: Positive
    """Laplace smoothing of the code counts."""
    start: Literal["published", "data"]
    """Published: uniform codes, counts from zero. Data: codes drawn from the first batch, counts from one."""

    @property
    def la_dim(self) -> int:
        """Size of a latent action."""
        return self.num_codebooks * self.num_latents * self.emb_dim


@dataclass
class SupervisedConfig:
    """What stages 1 and 2 share."""

    __pydantic_config__ = STRICT
    steps: Count
    """Optimisation steps."""
    batch_size: Annotated[Int, Field(ge=2)]
    """Windows per step."""
    lr: Positive
    """Learning rate (AdamW)."""
    lr_start: NonNegative
    """Factor of lr at step 0."""
    lr_warmup: Count
    """Step at which lr is reached, for a run of the published length."""
    lr_end: NonNegative
    """Factor of lr one step after the last."""
    log_every: Count
    """Steps between lines of metrics.jsonl."""
    save_every: Count
    """Steps between checkpoints."""


@dataclass
class Stage1Config(SupervisedConfig):
    """Stage 1: IDM and world model."""

    clip_norm: Positive
    """Largest global gradient norm over IDM and world model."""
    probe_every: Count
    """Steps between probes; the last step is always probed."""


@dataclass
class ProbeConfig:
    """How the true action is read from the latent one, as a measurement."""

    __pydantic_config__ = STRICT
    windows: Annotated[Int, Field(ge=4)]
    """Windows used at most; half train the probe, half test it. The world model sees up to 16,384."""
    hidden: Count
    """Width of the probe's two hidden layers."""
    epochs: Count
    """Passes over the probe's training half."""
    batch_size: Count
    """Batch of the probe's training."""


@dataclass
class Stage3Config:
    """Stage 3: the acting policy."""

    __pydantic_config__ = STRICT
    mode: Literal["online", "offline", "scratch", "bc"]
    """How the acting policy is made: online (PPO + decoder), offline (decoder from labels), or a baseline:
    scratch (PPO from random weights), bc (behaviour cloning of the labels without latents)."""
    steps: Count
    """Environment steps (online, scratch)."""
    log_every: Count
    """PPO updates between lines of metrics.jsonl."""
    save_every: Count
    """PPO updates between checkpoints."""


@dataclass
class Ramp:
    """A learning-rate factor: 0 until `hold`, `peak` at `peak_at`, 0 at the end, linear between."""

    __pydantic_config__ = STRICT
    hold: Annotated[Int, Field(ge=0)]
    """Env steps with factor 0 (at the published length)."""
    peak_at: Count
    """Env steps at which the factor peaks (at the published length)."""
    peak: NonNegative
    """The factor there."""


@dataclass
class PPOConfig:
    """PPO, in the modes online and scratch."""

    __pydantic_config__ = STRICT
    num_envs: Count
    """Environments stepped together."""
    rollout_steps: Count
    """Steps of each environment per update."""
    minibatches: Count
    """Minibatches per epoch."""
    epochs: Count
    """Passes over a rollout."""
    gamma: Fraction
    """Discount."""
    gae_lambda: Fraction
    """Lambda of generalised advantage estimation."""
    clip: Positive
    """Clip range of the policy's ratio and of the value's change."""
    entropy_coef: NonNegative
    """Weight of the entropy bonus."""
    value_coef: NonNegative
    """Weight of the value loss."""
    clip_norm: Positive
    """Largest global gradient norm."""
    lr: Positive
    """Learning rate of online mode, scaled by the three ramps."""
    policy_head: Ramp
    """Ramp of the RL path's policy head."""
    value_head: Ramp
    """Ramp of the value head."""
    fc: Ramp
    """Ramp of the RL path's hidden layer."""
    scratch_lr: Positive
    """Constant learning rate of scratch mode."""


@dataclass
class DecoderConfig:
    """The decoder latent → true action of online mode."""

    __pydantic_config__ = STRICT
    hidden: Widths
    """Widths of the hidden layers."""
    batch_size: Count
    """Batch of the decoder's training."""
    epochs: Count
    """Passes over all pairs at each training."""
    lr: Positive
    """Learning rate (Adam)."""
    label_smoothing: Fraction
    """Label smoothing of the cross-entropy."""
    start: Annotated[Int, Field(ge=0)]
    """Env steps after which training starts (at the published length)."""
    until: Annotated[Int, Field(ge=0)]
    """Env steps at which it ends (at the published length)."""
    every_update_until: Annotated[Int, Field(ge=0)]
    """Env steps up to which it is trained after every update (at the published length)."""
    every: Count
    """Updates between trainings from then on."""


@dataclass
class OfflineConfig:
    """Learning from a few labelled frames, in the modes offline and bc."""

    __pydantic_config__ = STRICT
    labels: Count
    """Labelled expert frames (offline, bc)."""
    steps: Count
    """Optimisation steps on them."""
    batch_size: Count
    """Batch size (at most `labels`)."""
    lr: Positive
    """Learning rate (Adam)."""


@dataclass
class ExpertConfig:
    """How train_expert.py makes an expert."""

    __pydantic_config__ = STRICT
    teacher: Literal["none", "planner"]
    """None: PPO from scratch, with the numbers of `ppo`. Planner: DAgger, with the numbers of `dagger`."""
    scale: Count
    """Width multiplier of the expert's IMPALA encoder; 1 makes a file of 2.5 MB."""
    steps: Count
    """Environment steps of PPO."""
    log_every: Count
    """PPO updates or rounds of DAgger between lines of metrics.jsonl."""
    save_every: Count
    """PPO updates or rounds of DAgger between checkpoints."""


@dataclass
class DaggerConfig:
    """Distilling a planner into a policy that sees one frame at a time."""

    __pydantic_config__ = STRICT
    steps: Count
    """Environment steps; the teacher labels every one."""
    num_envs: Count
    """Environments stepped together."""
    rollout_steps: Count
    """Steps of each environment per round."""
    teacher_until: Annotated[float, Field(gt=0, le=1)]
    """Share of the run in which the teacher takes part; the share of its actions falls from 1 to 0."""
    buffer: Count
    """Latest frames that are learnt from, in whole rounds, one at least."""
    updates: Count
    """Optimisation steps per round."""
    batch_size: Count
    """Frames per optimisation step."""
    lr: Positive
    """Learning rate (Adam), falling to 0."""

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
    """Episodes played on held-out levels, rounded up to a multiple of num_envs."""
    num_envs: Count
    """Environments played side by side."""
    greedy: bool
    """Take the most likely action instead of a sample."""


@dataclass
class Config:
    """Everything a run depends on; the groups follow the stages."""

    __pydantic_config__ = STRICT
    env: Name
    """Procgen game, or any name with a folder in data_dir."""
    exp: Name
    """Experiment: results lie in <results_dir>/<exp>/<env>/seed<seed>."""
    seed: Annotated[Int, Field(ge=0, lt=2**31)]
    """Seed of everything random."""
    visuals: Literal["full", "plain"]
    """How Procgen draws: full, as in the paper; plain: no backgrounds, one look for all levels."""
    data_dir: str
    """Folder of the games' chunks; relative to the repository's root."""
    results_dir: str
    """Folder of all results; relative to the repository's root."""
    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:[0-9]+)?)$")]
    """auto, cpu, cuda or cuda:N."""
    precision: Literal["auto", "fp32", "bf16"]
    """Auto: bf16 where the hardware computes it natively."""
    resident: Literal["auto", "always", "never"]
    """Whether all training frames stay on the device; never: chunks take turns there; auto: if they fit."""
    compile: Literal["auto", "off", "on", "graphs"]
    """Compile the training steps; graphs: launch them as CUDA graphs as well; auto: graphs for CUDA."""
    wandb: Literal["online", "offline", "disabled"]
    """Weights & Biases; metrics.jsonl is written in any case."""
    save_minutes: Positive
    """Longest time between checkpoints, beside each stage's save_every."""
    data: DataConfig
    model: ModelConfig
    vq: VQConfig
    stage1: Stage1Config
    probe: ProbeConfig
    stage2: SupervisedConfig
    stage3: Stage3Config
    ppo: PPOConfig
    decoder: DecoderConfig
    offline: OfflineConfig
    expert: ExpertConfig
    dagger: DaggerConfig
    eval: EvalConfig

    @property
    def run_dir(self) -> Path:
        """Folder of all stages of this experiment, game and seed."""
        return resolve(self.results_dir) / self.exp / self.env / f"seed{self.seed}"

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


def load_config(
    argv: list[str] | None = None, description: str = "", short: dict[str, str] | None = None
) -> Config:
    """Read config.yaml, `--config`, `--preset` and the command line, in this order of precedence.

    Any key of the config is an option: `--stage1.lr 1e-4`, `--stage1.lr=1e-4`; a list takes several values,
    and of an option given twice the last counts. `short` gives further names of keys. `--help` prints
    `description` and all keys, and exits. Raises `UserError` for an unknown key, a wrong type, an impossible
    value or schedule, or a missing file.
    """
    options = read_options(sys.argv[1:] if argv is None else argv, short or {}, several=("config", "preset"))
    files, presets = options.pop("config", []), options.pop("preset", [])
    values = read_yaml(DEFAULTS)
    source = DEFAULTS.name
    for file in files:
        source = file
        values = merge(values, read_yaml(Path(file).expanduser()), source)
    known = values.pop("presets", None) or {}
    if not isinstance(known, dict):
        raise UserError(f"{source}: 'presets' must hold one group of settings per name, found {known!r}")
    for name in presets:
        if name not in known:
            raise UserError(f"unknown preset '{name}'; the presets are: {', '.join(known) or 'none'}")
        source = f"preset {name}"
        values = merge(values, known[name], source)
    cfg = validate(values, source=source)
    if "help" in options:
        tyro.cli(Config, default=cfg, args=["--help"], description=description + _HELP, config=(FLAGS,))
    for key, words in options.items():
        values = merge(values, nested(key, words), "the command line")
    cfg = validate(values, source="the command line")
    _check_schedules(cfg)
    return cfg


FLAGS = tyro.conf.FlagConversionOff
_HELP = """
Every key of config.yaml is an option, shown with the value it has now. Also: --config FILE, a YAML file that
names only what it changes, and --preset NAME, e.g. demo.
"""


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
    if problem["input"] is None:
        return f"{source}: '{key}' has no value; give it one (the word null in quotes), or leave the line out"
    return f"{source}: '{key}' is {problem['input']!r}: {problem['msg'][0].lower()}{problem['msg'][1:]}"
