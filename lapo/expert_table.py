"""Returns of the experts: `python expert_table.py` prints the table of docs/experts.md.

Its numbers are in docs/experts.json. `python expert_table.py --add FILE …` adds results of
`evaluate.py --json FILE`, with `--policy random` or `planner`, or the `--checkpoint` of a learned expert.
"""

import json
from pathlib import Path

from lapo.command_line import Parser
from lapo.config import ROOT
from lapo.errors import UserError, run_main
from lapo.games.table import GAMES, check_game
from lapo.reporting.tables import table
from lapo.runs.files import atomic_write

HEAD = ["game", "random", "planner", "learned expert", "published expert", "relative return", "frames/s"]
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
        help="results of evaluate.py to take into the table first",
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
    if args.add:
        ordered = {game: results[game] for game in GAMES if game in results}
        atomic_write(
            args.file, lambda path: path.write_text(json.dumps(ordered, indent=1) + "\n", encoding="utf-8")
        )
    print(table(HEAD, [row(game, results.get(game, {})) for game in GAMES]))


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


def mean_return(result: dict | None) -> str:
    """Mean ± standard error (which a single episode lacks); empty without a result."""
    if not result:
        return ""
    error = result["return_stderr"]
    return f"{result['return_mean']:.2f}" + ("" if error is None else f" ± {error:.2f}")


if __name__ == "__main__":
    run_main(main)
