"""Errors and exit codes of scripts: a user's mistake is one sentence on stderr and a non-zero exit code."""

import contextlib
import io
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable
from types import FrameType
from typing import Any

STOP_SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
"""Signals of schedulers, closed terminals and time limits. Ctrl-C (SIGINT) is handled beside them."""


class UserError(Exception):
    """A user's mistake. The message names the thing, what was found and the remedy."""


def run_main(main: Callable[[], None]) -> None:
    """Run a script's `main`; turn errors into one line on stderr and an exit code.

    The code is 2 for a `UserError` or a GPU out of memory, 130 for Ctrl-C, 128 + n for signal n of
    `STOP_SIGNALS`. Characters outside the terminal's encoding are printed as escape sequences.
    """
    handle_signals(STOP_SIGNALS, _stop)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by the parent process
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        main()
        sys.stdout.flush()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # the reader, `head` for instance, has exited
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
    """Install `handler` for signals; returns the previous handlers by signal number.

    Python allows this only in the main thread. In another thread, as in Jupyter or Ray, nothing changes. An
    ignored SIGHUP stays ignored, as `nohup` expects.
    """
    if threading.current_thread() is not threading.main_thread():
        return {}
    kept = {signal.SIGHUP} if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else set()
    # None is a handler that Python did not install and cannot restore.
    return {
        number: signal.signal(number, handler) or signal.SIG_DFL for number in numbers if number not in kept
    }


def say(line: str) -> None:
    """Print a line on stderr, on rank 0 only. A closed terminal is ignored."""
    if os.environ.get("RANK", "0") == "0":
        with contextlib.suppress(OSError):
            print(line, file=sys.stderr)


def _stop(number: int, frame: FrameType | None) -> None:
    for other in STOP_SIGNALS:  # schedulers repeat the signal
        signal.signal(other, signal.SIG_IGN)
    say("terminated; the same command continues")
    sys.exit(128 + number)
