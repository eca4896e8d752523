"""The command line: one file is one command, which parses, calls one function of the library, and prints."""

from __future__ import annotations

import gc
import signal
import sys
from importlib import import_module
from pkgutil import iter_modules

from merger.cli._app import app
from merger.errors import INTERRUPTED, MergerError

for _module in sorted(iter_modules(__path__), key=lambda module: module.name):
    if not _module.name.startswith("_"):
        import_module(f"{__name__}.{_module.name}")  # which adds its command to the app


class _Stopped(BaseException):
    """SIGINT or SIGTERM came; typer answers to KeyboardInterrupt itself, and says nothing."""


def _stop(signum: int, frame: object) -> None:
    raise _Stopped


def main() -> None:
    """The `merger` command; a user's mistake is told in a line, with its exit code."""
    signal.signal(signal.SIGINT, _stop)
    signal.signal(signal.SIGTERM, _stop)
    try:
        app(prog_name="merger")
    except MergerError as error:
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr)
        sys.exit(error.exit_code)
    except _Stopped:
        print("interrupted; nothing was left half-written", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(0)
    finally:
        gc.freeze()  # looking for garbage among all that torch made takes Python's exit 0.3 s
