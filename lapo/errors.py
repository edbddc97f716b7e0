"""The one way a user's mistake is reported: a sentence on stderr and a non-zero exit code."""

import os
import signal
import sys
from collections.abc import Callable
from types import FrameType


class UserError(Exception):
    """Something the user can mend; the message names the thing, what was found and the remedy."""


def run_main(main: Callable[[], None]) -> None:
    """Run a script's `main`; a `UserError` (exit code 2), Ctrl-C (130) and SIGTERM (143) become one line."""
    signal.signal(signal.SIGTERM, _stop)
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # the reader of our output, `head` say, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except KeyboardInterrupt:
        print("interrupted; the same command continues", file=sys.stderr)
        sys.exit(130)


def _stop(number: int, frame: FrameType | None) -> None:
    print("terminated; the same command continues", file=sys.stderr)
    sys.exit(128 + number)
