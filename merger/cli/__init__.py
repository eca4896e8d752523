"""The command line: one file is one command, which parses, calls one function of the library, and prints."""

from __future__ import annotations

import gc
import signal
import sys
from importlib import import_module
from pkgutil import iter_modules

from merger.cli._app import app
from merger.cli._failures import report
from merger.cli._terminal import note_broken_methods, prepare_streams, silence_stdout
from merger.errors import CLOSED_PIPE, INTERRUPTED

for _module in sorted(iter_modules(__path__), key=lambda module: module.name):
    if not _module.name.startswith("_"):
        import_module(f"{__name__}.{_module.name}")  # which adds its command to the app


class _Stopped(BaseException):
    """SIGINT or SIGTERM came; typer answers to KeyboardInterrupt itself, without a word."""


def _stop(signum: int, frame: object) -> None:
    raise _Stopped


def main() -> None:
    """The `merger` command; whatever goes wrong ends in a line and an exit code."""
    signal.signal(signal.SIGINT, _stop)
    signal.signal(signal.SIGTERM, _stop)
    try:
        prepare_streams()
        note_broken_methods()
        code = _flush(_run())
    except _Stopped:
        print("interrupted; nothing was left half-written", file=sys.stderr)
        code = INTERRUPTED
    gc.freeze()  # looking for garbage among all that torch made takes Python's exit 0.3 s
    sys.exit(code)


def _run() -> int:
    """Carries the command out; returns its exit code."""
    try:
        app(prog_name="merger")
    except SystemExit as end:
        # typer ends in 1 where a pipe is closed, but here 1 means that a condition holds
        return CLOSED_PIPE if end.code == 1 else int(end.code or 0)
    except Exception as error:
        return report(error)
    return 0


def _flush(code: int) -> int:
    """Puts out all that was printed; returns the exit code ``code``, or where that was 0 and this fails another."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        silence_stdout()
        return code or CLOSED_PIPE
    except OSError as error:
        silence_stdout()
        return code or report(error)
    return code
