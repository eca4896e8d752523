"""The command line, a file each: a command parses, calls one function of the library, and prints."""

from __future__ import annotations

import gc
import signal
import sys

import typer

from merger.cli._failures import report
from merger.cli._terminal import note_broken_methods, prepare_streams, silence_stdout
from merger.cli.calibrate import calibrate
from merger.cli.demo import demo
from merger.cli.evaluate import eval_
from merger.cli.extract import extract
from merger.cli.import_ import import_
from merger.cli.inspect import inspect
from merger.cli.lock import lock
from merger.cli.lora import lora
from merger.cli.methods import methods
from merger.cli.plan import plan
from merger.cli.push import push
from merger.cli.run import run
from merger.cli.schema import schema
from merger.cli.search import search
from merger.cli.verify import verify
from merger.errors import CLOSED_PIPE, INTERRUPTED

app = typer.Typer(
    help="Merge language-model checkpoints by a YAML recipe.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for _command in (
    run,
    lock,
    plan,
    inspect,
    calibrate,
    verify,
    push,
    eval_,
    search,
    extract,
    lora,
    import_,
    methods,
    demo,
    schema,
):
    app.command(_command.__name__.rstrip("_"))(_command)


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
