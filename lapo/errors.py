"""The one way a user's mistake is reported: a sentence on stderr and a non-zero exit code."""

import argparse
import os
import select
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import NoReturn


class UserError(Exception):
    """Something the user can mend; the message names the thing, what was found and the remedy."""


class Parser(argparse.ArgumentParser):
    """Raises `UserError` for a mistake on the command line."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"the command line: {message}")


def run_main(main: Callable[[], None]) -> None:
    """Run a script's `main`; a `UserError` (exit code 2), Ctrl-C (130) and SIGTERM (143) become one line."""
    signal.signal(signal.SIGTERM, _stop)
    try:
        main()
        sys.stdout.flush()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:
        if not _reader_has_gone():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except KeyboardInterrupt:
        _say("interrupted; the same command continues")
        sys.exit(130)


def _say(line: str) -> None:
    if os.environ.get("RANK", "0") == "0":  # of torchrun's processes, all of which get the signal
        print(line, file=sys.stderr)


def _reader_has_gone() -> bool:
    """Whether nobody reads our output any more: `head`, say, has seen enough."""
    poll = select.poll()
    poll.register(sys.stdout, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _stop(number: int, frame: FrameType | None) -> None:
    signal.signal(number, signal.SIG_IGN)  # schedulers repeat it
    _say("terminated; the same command continues")
    sys.exit(128 + number)
