"""Frames for games that have none: what `launch.sh --data` does, and how long it takes."""

import json
import shlex
import sys

from lapo.config import ROOT, Config
from lapo.data.chunks import list_chunks
from lapo.errors import UserError
from lapo.experts.recording import SHIPPED
from lapo.games.table import GAMES
from lapo.games.vec_env import num_cores

SOURCES = "record", "published", "huggingface"


def lacks_frames(cfg: Config) -> bool:
    """Whether the configured game has no chunk to train on."""
    return not list_chunks(cfg.game_data / "train")


def commands(configs: list[Config], source: str) -> list[str]:
    """A shell command for each of the games `configs` that lack frames, without the interpreter.

    What the recordings take is printed on stderr. Raises `UserError` without a `source` (""), for an unknown
    one, and for games that it does not have.
    """
    if not configs:
        return []
    names = [cfg.env for cfg in configs]
    folder = configs[0].game_data.parent
    others = [name for name in names if name not in GAMES]
    if source not in SOURCES:
        some = f"{', '.join(names[:3])} and {len(names) - 3} more" if len(names) > 4 else ", ".join(names)
        raise UserError(
            f"there are no frames of {some} in {folder}; get them with --data record (an expert plays),"
            " --data published or --data huggingface (downloads of gigabytes per game), or see docs/data.md"
        )
    if others:
        raise UserError(f"--data {source} has no frames of {others[0]}; docs/data.md says how to make some")
    return [record(cfg) if source == "record" else download(cfg, source) for cfg in configs]


def download(cfg: Config, source: str) -> str:
    """The command that downloads frames, from `huggingface` as many as `cfg.record` says."""
    if cfg.visuals != "full":
        raise UserError(f"the frames of {source} have visuals full, not plain; choose --data record")
    words = ["download_data.py", cfg.env, "--data-dir", str(cfg.game_data.parent)]
    if source == "huggingface":
        words += [f"--source={source}", f"--frames={cfg.record.frames}"]
        words += [f"--test-frames={cfg.record.test_frames}"]
    return shlex.join(words)


def record(cfg: Config) -> str:
    """The command that records an expert as `cfg.record` says; says on stderr what it takes."""
    learned = cfg.visuals == "plain" and (SHIPPED / f"{cfg.env}.pt").exists()
    expert, noise = ("learned expert", 0.0) if learned else ("planner", cfg.record.noise)
    frames = cfg.record.frames + cfg.record.test_frames
    rates = json.loads((ROOT / "docs" / "experts.json").read_text(encoding="utf-8"))[cfg.env]
    hours = frames / rates[expert.split()[0]]["steps_per_cpu_second"] / num_cores() / 3600
    drawn = f"{noise:.0%} of its actions at random" if noise else "its actions sampled"
    duration = f"{hours:.1f} h" if hours >= 1 else f"{max(1, round(60 * hours))} min"
    print(
        f"{cfg.env}: records {frames:,} frames of the {expert}, {drawn}: about {duration}"
        f" on {num_cores()} cores",
        file=sys.stderr,
    )
    sizes = [f"--frames={cfg.record.frames}", f"--test-frames={cfg.record.test_frames}"]
    look = [f"--visuals={cfg.visuals}", f"--noise={noise}", "--data-dir", str(cfg.game_data.parent)]
    return shlex.join(["record_expert.py", "--env", cfg.env, *sizes, *look])
