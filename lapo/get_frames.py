"""Frames for games that have none: what `launch.sh --data` does, and how long it takes."""

import json
import shlex
import sys
from contextlib import suppress
from pathlib import Path

from lapo.config import ROOT, Config
from lapo.data.chunks import list_chunks, read_header
from lapo.errors import UserError
from lapo.experts.recording import SHIPPED
from lapo.games.table import GAMES
from lapo.games.vec_env import num_cores
from lapo.runs.files import write_json, writing

SOURCES = "record", "published", "huggingface"


RECORDED_PER_SECOND = 700
"""Frames per second of CPU time of which a learned expert is recorded: docs/experts.md."""


def request_file(cfg: Config) -> Path:
    """Where `note_request` keeps how many frames the configured game shall have."""
    return cfg.game_data.parent / f".{cfg.env}.wanted.json"


def note_request(cfg: Config, source: str) -> None:
    """Note how many frames are about to be got, so that an interrupted command is known as unfinished.

    Of the published frames there is nothing to note: a game's folder appears when it is complete.
    """
    path = request_file(cfg)
    with writing(path, "nothing was changed"):
        path.unlink(missing_ok=True)
        if source != "published":
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, {"train": cfg.record.frames, "test": cfg.record.test_frames})


def lacks_frames(cfg: Config) -> bool:
    """Whether the configured game has no chunk to train on, or fewer frames than `note_request` noted."""
    if not list_chunks(cfg.game_data / "train"):
        return True
    path = request_file(cfg)
    if not path.exists():
        return False
    try:
        wanted = json.loads(path.read_text(encoding="utf-8"))
        return any(num_frames(cfg.game_data / split) < count for split, count in wanted.items())
    except (OSError, ValueError, AttributeError, TypeError):
        raise UserError(f"{path} is damaged; delete it") from None


def num_frames(folder: Path) -> int:
    """Frames of all chunks in `folder`; bad ones count as empty."""
    total = 0
    for path in list_chunks(folder):
        with suppress(UserError):  # the stages name it
            total += read_header(path)
    return total


def commands(configs: list[Config], source: str) -> list[str]:
    """A shell command for each of the `configs`, of games that lack frames, without the interpreter.

    What the recordings take is printed on stderr. Raises `UserError` without a `source` (""), for an unknown
    one, and for games that it does not have.
    """
    if not configs:
        return []
    folder = configs[0].game_data.parent
    names = [cfg.env for cfg in configs if cfg.game_data.parent == folder]
    others = [cfg.env for cfg in configs if cfg.env not in GAMES]
    if source not in SOURCES:
        begun = next((cfg for cfg in configs if list_chunks(cfg.game_data / "train")), None)
        if begun:
            raise UserError(
                f"the frames of {begun.env} in {begun.game_data.parent} are incomplete; --data record or"
                f" huggingface, as before, gets the others, and without {request_file(begun)} those that are"
                " there are used"
            )
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
    path = SHIPPED / f"{cfg.env}.pt"
    learned = path.exists() and visuals_of(path) == cfg.visuals
    expert, noise = ("learned expert", 0.0) if learned else ("planner", cfg.record.noise)
    frames = cfg.record.frames + cfg.record.test_frames
    rates = json.loads((ROOT / "docs" / "experts.json").read_text(encoding="utf-8"))[cfg.env]
    rate = RECORDED_PER_SECOND if learned else rates["planner"]["steps_per_cpu_second"]
    hours = frames / rate / num_cores() / 3600
    drawn = f"{noise:.0%} of its actions at random" if noise else "its actions sampled"
    duration = f"{hours:.1f} h" if hours >= 1 else f"{max(1, round(60 * hours))} min"
    print(
        f"{cfg.env}: records {frames:,} frames of the {expert}, {drawn}: about {duration}"
        f" on {num_cores()} cores",
        file=sys.stderr,
    )
    sizes = [f"--frames={cfg.record.frames}", f"--test-frames={cfg.record.test_frames}"]
    look = [f"--visuals={cfg.visuals}", f"--noise={noise}", "--data-dir", str(cfg.game_data.parent)]
    who = ["--expert", str(path) if learned else "planner"]
    return shlex.join(["record_expert.py", "--env", cfg.env, *who, *sizes, *look])


def visuals_of(path: Path) -> str:
    """The visuals that a learned expert was trained in. Raises `UserError` for a bad checkpoint."""
    from lapo.policies import load_policy_checkpoint  # imports PyTorch

    return load_policy_checkpoint(path)["config"]["visuals"]
