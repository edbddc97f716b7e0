"""The command line of every script: `argparse`, with this project's conventions."""

import argparse
import difflib
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from lapo.errors import UserError


class Parser(argparse.ArgumentParser):
    """Parses options; a mistake is a `UserError`.

    Options may be written with dashes or underscores (`--data-dir`, `--data_dir`), but not abbreviated. Of an
    option given twice the last one counts. The description is printed as it stands.
    """

    def __init__(self, description: str, **options: Any):
        super().__init__(
            description=description,
            formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=36),
            allow_abbrev=False,
            **options,
        )

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> argparse.Namespace:
        """The options by name. Raises `UserError` for a word that is no option and belongs to none."""
        words = sys.argv[1:] if args is None else args
        known = list(self._option_string_actions)
        spellings = {option.replace("-", "_"): option for option in known}
        spelled = []
        for word in words:
            name, equals, value = word.partition("=")
            spelled.append(
                spellings.get(name.replace("-", "_"), name) + equals + value if name[:2] == "--" else word
            )
        found, rest = self.parse_known_args(spelled, namespace)
        if rest:
            name = rest[0].partition("=")[0]
            if not name.startswith("--"):
                self.error(f"found '{rest[0]}' where an option was expected (--name value)")
            near = [option for option in known if option.startswith(name)]
            near = near or difflib.get_close_matches(name, known, 1, 0.7)
            self.error(
                f"unknown option {name}; {f'did you mean {near[0]}? ' if near else ''}--help lists all"
            )
        return found

    def error(self, message: str) -> NoReturn:
        """Raise `UserError`."""
        raise UserError(f"the command line: {message}")
