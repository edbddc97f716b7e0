"""The one way a user's mistake is reported: a sentence on stderr and a non-zero exit code."""

import sys
from collections.abc import Callable


class UserError(Exception):
    """Something the user can mend; the message names the thing, what was found and the remedy."""


def run_main(main: Callable[[], None]) -> None:
    """Run a script's `main`; turn `UserError` (exit code 2) and Ctrl-C (130) into one line on stderr."""
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
