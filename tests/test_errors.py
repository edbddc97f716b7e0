"""How a script ends: `run_main` on a mistake, a signal, and a terminal that cannot show everything."""

import os
import signal
import subprocess
import sys
import threading

import pytest
import torch

from lapo.errors import STOP_SIGNALS, run_main
from support import PATIENCE, ROOT

START = """
import os, signal, sys, time
from lapo.errors import UserError, run_main

def main():
    {body}

run_main(main)
"""


def script(body: str, *, shell: str = 'exec "$@"', **env: str) -> tuple[int, bytes, bytes]:
    """Exit status, stdout and stderr of a script whose `main` is `body`, started by bash as `shell` says."""
    done = subprocess.run(
        ["bash", "-c", shell, "bash", sys.executable, "-c", START.format(body=body)],
        env=os.environ | {"PYTHONPATH": str(ROOT)} | env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=PATIENCE,
    )
    return done.returncode, done.stdout, done.stderr


def test_a_gpu_whose_memory_is_full_is_no_traceback(capsys):
    def fills(kind: type[Exception]) -> None:
        raise kind("CUDA out of memory. Tried to allocate 20 GiB.\nMore of it.")

    with pytest.raises(SystemExit) as ended:
        run_main(lambda: fills(torch.OutOfMemoryError))
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(
        "error: the GPU has too little memory (CUDA out of memory. Tried to allocate 20 GiB.);"
    )
    assert len(error.splitlines()) == 1
    with pytest.raises(RuntimeError, match="Tried"):
        run_main(lambda: fills(RuntimeError))


@pytest.mark.slow
@pytest.mark.parametrize(
    "env",
    [
        {"PYTHONIOENCODING": "ascii"},
        {"PYTHONIOENCODING": "ascii:strict"},
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": ""},
    ],
)
def test_a_terminal_without_utf8_shows_what_it_can(env):
    # Escaped, as arguments of a process are read by the locale, too.
    assert script(r"print('1.5 \xb1 0.5 \u2192 2')", **env) == (0, b"1.5 \\xb1 0.5 \\u2192 2\n", b"")
    assert script(r"raise UserError('lr: 1 \u2192 2')", **env) == (2, b"", b"error: lr: 1 \\u2192 2\n")


@pytest.mark.slow
def test_other_encodings_and_names_that_are_no_text_end_nothing():
    assert script("print('± →')", PYTHONIOENCODING="latin-1") == (0, b"\xb1 \\u2192\n", b"")
    for env in ({"PYTHONIOENCODING": "utf-8"}, {"PYTHONUTF8": "1"}):  # a file name of other bytes
        assert script("print('± ' + os.fsdecode(bytes([255])))", **env) == (0, "± \\udcff\n".encode(), b"")


@pytest.mark.slow
@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_output_that_was_closed_by_who_started_the_script_is_no_error(stream):
    body = f"print('x', file=sys.{stream}); sys.{stream}.flush()"
    closing = 'exec "$@" >&-' if stream == "stdout" else 'exec "$@" 2>&-'
    assert script(body, shell=closing) == (0, b"", b"")


@pytest.mark.slow
@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_is_one_line_and_its_exit_code_though_it_is_repeated(number):
    body = f"os.kill(os.getpid(), {int(number)}); time.sleep(60)"
    assert script(body) == (128 + number, b"", b"terminated; the same command continues\n")
    again = f"""
    try:
        os.kill(os.getpid(), {int(number)})
        time.sleep(60)
    finally:
        for other in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
            os.kill(os.getpid(), other)
        print("cleaned up")
    """
    expected = (128 + number, b"cleaned up\n", b"terminated; the same command continues\n")
    assert script(again) == expected


@pytest.mark.slow
def test_nohup_keeps_a_script_going():
    body = "os.kill(os.getpid(), signal.SIGHUP); print('on')"
    assert script(body, shell='trap "" HUP; exec "$@"') == (0, b"on\n", b"")


def test_main_may_run_in_a_thread():
    """Which may not touch signal handlers."""
    before, done = [signal.getsignal(number) for number in STOP_SIGNALS], []
    thread = threading.Thread(target=run_main, args=(lambda: done.append("main"),))
    thread.start()
    thread.join()
    assert done == ["main"]
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == before
