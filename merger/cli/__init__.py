"""The command line, a file each: a command parses, calls one function of the library, and prints."""

from __future__ import annotations

import gc
import signal
import sys

import typer

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
from merger.errors import INTERRUPTED, MergerError

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
