"""The terminal: streams that print any text, the console for tables, the progress bar."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import sys
import time
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merger._display import size_text
from merger.display.terminal import print_text
from merger.errors import BrokenMethodWarning
from merger.options import Notice, Progress, ignore

if TYPE_CHECKING:
    from rich.console import Console


def prepare_streams() -> None:
    """Makes every text printable: characters that the terminal's encoding lacks are spelled out, as in \\xe8.

    A stream that was closed becomes the null device, or else the next file that is opened would take its number, and
    all that some library prints.
    """
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))  # noqa: SIM115 it stays open
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]


def note_broken_methods() -> None:
    """Lets the warning of a broken file among the methods be one line; other warnings stay as they are."""
    show = warnings.showwarning

    def showwarning(message: Warning | str, category: type[Warning], *place: Any, **options: Any) -> None:
        if issubclass(category, BrokenMethodWarning):
            print_notes([str(message)])
        else:
            show(message, category, *place, **options)

    warnings.showwarning = showwarning


def silence_stdout() -> None:
    """Lets Python, which flushes stdout at its end, meet no error there again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def program_name() -> str:
    """How this program is typed: ``merger``, or the path by which it was called where the shell would not find it."""
    program, installed = Path(sys.argv[0]), shutil.which("merger")
    is_typed = program.name == "merger" and program.is_file()
    if not is_typed or (installed is not None and os.path.samefile(installed, program)):
        return "merger"
    return shlex.quote(str(program))


def make_console(*, stderr: bool = False) -> Console:
    """A console that does not wrap what goes to a file or to another program."""
    from rich.console import Console

    console = Console(stderr=stderr, highlight=False, soft_wrap=False)
    if not console.is_terminal:
        console.width = 200  # a file or another program wants whole names
    return console


def print_notes(notes: Iterable[str]) -> None:
    """Prints remarks on stderr."""
    console = make_console(stderr=True)
    for note in notes:
        print_text(f"note: {note}", console)


_OPTION = re.compile(
    r"\b(force|offline|gram|public|allow_calibration_text|allow_versions|to|base|inputs|device|max_memory|data|fail_if"
    r"|html|include_path|lm_eval|overrides|picture|plot)=(True\b|[A-Z]+\b|'[^']*')"
)
_FLAGS = {"overrides": "set", "picture": "tensor"}
"""The flags that do not have the name of the library's option."""


def as_flags(text: str) -> str:
    """A message of the library with its options, such as ``force=True``, as flags of a command: ``--force``."""

    def flag(option: re.Match[str]) -> str:
        value = f" {shlex.quote(option[2][1:-1])}" if option[2].startswith("'") else ""
        return f"--{_FLAGS.get(option[1], option[1]).replace('_', '-')}{value}"

    return _OPTION.sub(flag, text)


_COUNTED = ("calibrating", "factoring", "judging", "learning", "searching")
"""The steps whose progress is no number of bytes."""
INTERVAL = 30.0
"""Seconds between two lines of progress where there is no terminal."""


def _progress_lines(console: Console) -> Progress:
    """A callback that prints a line of progress at most every `INTERVAL`, for logs."""
    last = time.monotonic()

    def tell(step: str, count: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= INTERVAL and total:
            last = now
            amount = "" if step.startswith(_COUNTED) else f" of {size_text(total)}"
            console.print(f"{step}: {count / total:.0%}{amount}", markup=False, soft_wrap=True)

    return tell


@contextmanager
def progress_bar(quiet: bool) -> Iterator[tuple[Progress, Notice]]:
    """The callback for progress, a bar on a terminal and a line now and then elsewhere, and the one for remarks."""
    console = make_console(stderr=True)
    if quiet:
        yield ignore, ignore
        return

    def notice(message: str) -> None:
        print_text(f"note: {as_flags(message)}", console)

    if not console.is_terminal:
        yield _progress_lines(console), notice
        return
    from rich.progress import (
        BarColumn,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.progress import Progress as Bar

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[amount]}"),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
    )
    tasks: dict[str, Any] = {}
    with Bar(*columns, console=console, transient=True) as bar:

        def tell(step: str, count: int, total: int) -> None:
            if step not in tasks:
                tasks[step] = bar.add_task(step, amount="")
            speed = next(task.speed for task in bar.tasks if task.id == tasks[step]) or 0
            summary = f"{size_text(count)} of {size_text(total)}, {size_text(int(speed))}/s"
            amount = "" if step.startswith(_COUNTED) else summary
            bar.update(tasks[step], completed=count, total=total, amount=amount)

        yield tell, notice
