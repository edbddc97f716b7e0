"""The one way a user's mistake is reported: a sentence on stderr and a non-zero exit code."""

import contextlib
import io
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable
from types import FrameType
from typing import Any

STOPPING = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
"""How schedulers, closed terminals and time limits tell a process to stop; beside them, Ctrl-C."""


class UserError(Exception):
    """Something the user can mend; the message names the thing, what was found and the remedy."""


def run_main(main: Callable[[], None]) -> None:
    """Run a script's `main`; what ends it becomes one line and an exit code.

    The code is 2 for a `UserError` and a GPU whose memory is full, 130 for Ctrl-C, 128 + its number for a
    signal of `STOPPING`. What a terminal has no signs for is printed as an escape sequence, and ends nothing.
    """
    handle_signals(STOPPING, _stop)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by who started us
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        main()
        sys.stdout.flush()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # `head`, say, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's, whose import takes seconds
            raise
        print(
            f"error: the GPU has too little memory ({str(error).splitlines()[0]}); lower the batch size,"
            " choose --resident never, or end what else uses it; the same command continues",
            file=sys.stderr,
        )
        sys.exit(2)
    except KeyboardInterrupt:
        say("interrupted; the same command continues")
        sys.exit(130)


def handle_signals(
    numbers: Iterable[int], handler: Callable[[int, FrameType | None], None]
) -> dict[int, Any]:
    """Let `handler` deal with signals; returns what dealt with them before, by their numbers.

    Python allows that in its main thread alone; in another one, as Jupyter or Ray may train in, nothing
    changes. A SIGHUP that is ignored stays so: `nohup` wants that.
    """
    if threading.current_thread() is not threading.main_thread():
        return {}
    kept = {signal.SIGHUP} if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else set()
    # None stands for a handler that is not Python's, and that Python could not put back.
    return {
        number: signal.signal(number, handler) or signal.SIG_DFL for number in numbers if number not in kept
    }


def say(line: str) -> None:
    """Print a line on stderr, once for all of torchrun's processes; the terminal may have gone."""
    if os.environ.get("RANK", "0") == "0":
        with contextlib.suppress(OSError):
            print(line, file=sys.stderr)


def _stop(number: int, frame: FrameType | None) -> None:
    for other in STOPPING:  # schedulers repeat it
        signal.signal(other, signal.SIG_IGN)
    say("terminated; the same command continues")
    sys.exit(128 + number)
