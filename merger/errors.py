"""Every error a user can mend, and the exit code it ends in.

    MergerError
    ├── ConditionError   1   what `merger inspect --fail-if` was told to fail for
    ├── RecipeError      2   the recipe, or what it names as output, is wrong
    ├── CheckpointError  3   an input (checkpoint, adapter, calibration data) is wrong
    │   └── UnreadableError  3   an input's file cannot be read, which may pass: what was made of it so far is right
    ├── ResourceError    4   not enough disk or memory
    └── VerifyError      5   an output is not what its manifest says

A recipe that has faults of its own and names inputs that are not there is a RecipeError with all of them; inputs that
are not there are a CheckpointError where the recipe is sound.
What torch or the system raises under a command has a line and one of these codes too (merger/cli/_failures.py).
Anything else that escapes is a defect of merger: it keeps its traceback, and the command ends in `DEFECT`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

DEFECT = 70
"""Exit code of a command that ends in a traceback."""
INTERRUPTED = 130
"""Exit code of a run that was stopped by SIGINT or SIGTERM."""
CLOSED_PIPE = 141
"""Exit code of a command whose output nobody reads any more, as the shell gives it for SIGPIPE."""

_ALLOCATION = (
    "out of memory", "not enough memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED",
    "can't start new thread",
)  # fmt: skip


class MergerError(Exception):
    """Base of all errors that are said in a line or more, without a traceback."""

    exit_code = 1


class ConditionError(MergerError):
    """An inspection meets a condition of its --fail-if."""


class RecipeError(MergerError):
    """The recipe is wrong; ``faults`` holds one line for each thing to mend."""

    exit_code = 2

    def __init__(self, faults: str | Sequence[str]) -> None:
        self.faults = [printable(fault) for fault in ([faults] if isinstance(faults, str) else faults)]
        super().__init__("\n".join(self.faults))


class CheckpointError(MergerError):
    """An input cannot be used: missing, broken, of another shape, or of a refused kind."""

    exit_code = 3


class UnreadableError(CheckpointError):
    """The disk of an input fails."""


class ResourceError(MergerError):
    """The machine has too little disk or memory for the command."""

    exit_code = 4


class VerifyError(MergerError):
    """A written model differs from its manifest."""

    exit_code = 5


class BrokenMethodWarning(UserWarning):
    """A file among the methods cannot be used; all others can."""


@contextmanager
def naming(place: str) -> Iterator[None]:
    """Adds a place, such as a tensor's name, to an exception of torch or the system that escapes the block."""
    try:
        yield
    except MergerError:
        raise
    except Exception as error:
        error.add_note(place)
        raise


@contextmanager
def checkpoint_faults(subject: str) -> Iterator[None]:
    """Turns an exception of a model's or a tokenizer's code into a CheckpointError that begins with ``subject``.

    Such code may raise any exception for files that do not fit. A lack of memory is raised unchanged.
    """
    try:
        yield
    except MergerError:
        raise
    except Exception as error:
        if lacks_memory(error):
            raise
        message = " ".join(str(error).split())
        raise CheckpointError(f"{subject}: {type(error).__name__}: {message}") from error


def lacks_memory(error: Exception) -> bool:
    """Whether host or device memory ran out, or the threads of the process."""
    names = {kind.__name__ for kind in type(error).__mro__}
    return bool(names & {"MemoryError", "OutOfMemoryError"}) or any(words in str(error) for words in _ALLOCATION)


def system_reason(error: OSError) -> str:
    """The system's words for an error, or the error's own where it has no number."""
    return error.strerror or " ".join(str(error).split()) or type(error).__name__


def printable(text: str) -> str:
    """Returns the text in one line, with breaks, escape sequences and lone surrogates escaped."""
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)


def nearest(name: str, valid: Iterable[str]) -> str:
    """A clause that offers the name that was probably meant, or else lists all of them."""
    names = sorted(valid)
    close = difflib.get_close_matches(name, names, n=1)
    if close:
        return f"did you mean {close[0]!r}?"
    return f"choose from {', '.join(names)}" if names else "there is none"
