"""Returns of the experts and of their clones: `python expert_table.py` prints the tables of docs/experts.md.

Its numbers are in docs/experts.json. `python expert_table.py --add FILE …` adds results of
`evaluate.py --json FILE`, with `--policy random` or `planner`, or the `--checkpoint` of a learned expert.
`--add-clones DIR …` adds finished stages 3 in mode bc: imitations of the expert that recorded their frames.
"""

import json
from pathlib import Path

from lapo.command_line import Parser
from lapo.config import ROOT
from lapo.errors import UserError, run_main
from lapo.experts.registry import expert_name
from lapo.games.table import GAMES, check_game
from lapo.reporting.tables import table
from lapo.runs.checkpoints import load_checkpoint, saved_config
from lapo.runs.files import atomic_write

HEAD = ["game", "random", "planner", "learned expert", "published expert", "relative return", "frames/s"]
CLONE_HEAD = ["game", "expert", "its return", "its clone's", "imitated", "agreement", "commonest action"]
CLONES = {"clone of planner": "planner", "clone of learned": "learned"}
KEPT = "episodes", "return_mean", "return_stderr", "relative_return", "mean_length", "steps_per_cpu_second"


def main() -> None:
    """Do what the command line asks for."""
    parser = Parser(__doc__)
    parser.add_argument(
        "--add",
        nargs="+",
        type=Path,
        default=[],
        metavar="FILE",
        help="results of evaluate.py to take into the table first: of random play, of the planner, or of a"
        " checkpoint, which counts as the game's learned expert",
    )
    parser.add_argument(
        "--add-clones",
        nargs="+",
        type=Path,
        default=[],
        metavar="DIR",
        help="folders of finished stages 3 in mode bc to take into the table first",
    )
    parser.add_argument(
        "--file",
        type=Path,
        default=ROOT / "docs" / "experts.json",
        help="where the numbers are kept (docs/experts.json)",
    )
    args = parser.parse_args()
    results = read(args.file) if args.file.exists() else {}
    for path in args.add:
        result = read(path)
        try:
            kept = {key: result[key] for key in KEPT}
            kind = result["policy"] if result["policy"] in ("random", "planner") else "learned"
            results.setdefault(check_game(result["game"]).name, {})[kind] = kept
        except (KeyError, TypeError):
            raise UserError(f"{path} is no result of `evaluate.py --json`") from None
    for path in args.add_clones:
        game, kind, clone = read_clone(path)
        results.setdefault(game, {})[kind] = clone
    if args.add or args.add_clones:
        ordered = {game: results[game] for game in GAMES if game in results}
        atomic_write(
            args.file, lambda path: path.write_text(json.dumps(ordered, indent=1) + "\n", encoding="utf-8")
        )
    print(table(HEAD, [row(game, results.get(game, {})) for game in GAMES]))
    clones = [
        clone_row(game, kind, found) for game, found in results.items() for kind in CLONES if kind in found
    ]
    if clones:
        print(f"\n{table(CLONE_HEAD, clones)}")


def read_clone(folder: Path) -> tuple[str, str, dict]:
    """Game, kind (a key of `CLONES`) and numbers of a finished stage 3 in mode bc.

    Raises UserError for anything else, and if its frames were not recorded here.
    """
    checkpoint = load_checkpoint(folder / "checkpoint.pt")
    cfg, metrics = saved_config(checkpoint), checkpoint["metrics"]
    if checkpoint["stage"] != "stage3_bc" or not checkpoint["finished"]:
        raise UserError(f"{folder} is no finished stage 3 in mode bc")
    recording = read(cfg.game_data / "dataset.json")
    try:
        learned, frames = "policy" in recording, recording["train"]["frames"]
        ours = learned or recording["expert"] == expert_name(cfg.env)
    except (KeyError, TypeError):
        ours = False
    if not ours:
        raise UserError(f"{cfg.game_data} was not recorded by record_expert.py")
    if "action_acc_test" not in metrics:
        raise UserError(
            f"{folder} has no accuracy on held-out frames; record some, and clone the expert again"
        )
    kept = {key: metrics[key] for key in ("return_mean", "return_stderr", "relative_return", "episodes")}
    kept |= {key: round(metrics[key], 4) for key in ("action_acc_test", "majority_acc_test")}
    kept |= {"frames": frames, "labels": cfg.offline.labels, "image_size": cfg.data.image_size}
    return check_game(cfg.env).name, f"clone of {'learned' if learned else 'planner'}", kept


def read(path: Path) -> dict:
    """A JSON file's content. Raises UserError if it cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None


def row(game: str, results: dict[str, dict]) -> list[str]:
    """The row of a game; relative return and speed are those of the planner."""
    planner = results.get("planner")
    return [
        game,
        *(mean_return(results.get(kind)) for kind in ("random", "planner", "learned")),
        f"{GAMES[game].expert_return:.1f}",
        f"{planner['relative_return']:.2f}" if planner else "",
        f"{planner['steps_per_cpu_second']:,.0f}" if planner else "",
    ]


def clone_row(game: str, kind: str, results: dict[str, dict]) -> list[str]:
    """The row of an expert's clone; `imitated` scales its return from random play (0) to its expert (1)."""
    clone, expert, random = results[kind], results.get(CLONES[kind]), results.get("random")
    imitated = ""
    if expert and random:
        gain = expert["return_mean"] - random["return_mean"]
        imitated = f"{(clone['return_mean'] - random['return_mean']) / gain:.2f}"
    shares = (f"{clone[key]:.0%}" for key in ("action_acc_test", "majority_acc_test"))
    return [game, kind.removeprefix("clone of "), mean_return(expert), mean_return(clone), imitated, *shares]


def mean_return(result: dict | None) -> str:
    """Mean ± standard error (which a single episode lacks); empty without a result."""
    if not result:
        return ""
    error = result["return_stderr"]
    return f"{result['return_mean']:.2f}" + ("" if error is None else f" ± {error:.2f}")


if __name__ == "__main__":
    run_main(main)
