"""How a command ends that fails: lines on stderr that say why, and an exit code for each kind of failure."""

from __future__ import annotations

import contextlib
import errno
import traceback

from merger.cli._terminal import as_flags, make_console
from merger.display.terminal import print_text
from merger.errors import (
    DEFECT,
    CheckpointError,
    MergerError,
    RecipeError,
    ResourceError,
    lacks_memory,
    printable,
)

_MACHINE = {
    errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EROFS, errno.EIO, errno.EAGAIN,
}  # fmt: skip


def report(error: Exception) -> int:
    """Prints why a command failed, one line for each fault; returns its exit code."""
    if isinstance(error, MergerError):
        return _say(as_flags(str(error)).splitlines(), error.exit_code)
    explained = _explained(error)
    if explained is None:
        traceback.print_exception(error)
        return _say(["this is a defect of merger; please report it with the lines above"], DEFECT)
    places = reversed(getattr(error, "__notes__", []))
    return _say([printable(": ".join([*places, str(explained)]))], explained.exit_code)


def _say(lines: list[str], code: int) -> int:
    with contextlib.suppress(OSError):  # nobody reads stderr either
        console = make_console(stderr=True)
        for line in lines:
            print_text(f"error: {line}", console)
    return code


def _explained(error: Exception) -> MergerError | None:
    """The same as an error that a user can mend; None for a defect."""
    message = " ".join(str(error).split())
    kinds = {kind.__name__ for kind in type(error).__mro__}
    if lacks_memory(error):
        return _out_of_memory(error, message)
    if isinstance(error, ImportError):
        return _missing_module(error)
    if kinds & {"LinAlgError", "_LinAlgError"}:  # of NumPy, of torch
        return CheckpointError(f"a matrix cannot be decomposed ({message}); leave the tensor to the base with a rule")
    if isinstance(error, OSError):
        return _of_the_system(error)
    if isinstance(error, UnicodeEncodeError):
        return RecipeError(f"{printable(str(error.object))[:200]!r} cannot be written as {error.encoding}")
    if "SafetensorError" in kinds:
        return CheckpointError(message)
    if any(note.startswith("stage ") for note in getattr(error, "__notes__", [])):
        return RecipeError(f"{type(error).__name__}: {message} ({_origin(error)})")
    return None


def _out_of_memory(error: Exception, message: str) -> ResourceError:
    if "CUDA" in message or "CUBLAS" in message:
        return ResourceError(f"the GPU is out of memory ({message}); use --device cpu, or a GPU with more memory")
    detail = f" ({message})" if message else ""
    return ResourceError(f"out of memory{detail}; cap it with --max-memory, or use a machine with more")


def _missing_module(error: ImportError) -> ResourceError:
    if error.name in ("fcntl", "resource"):
        return ResourceError("merger runs on Linux and macOS; on Windows, run it in WSL (wsl --install)")
    return ResourceError(f"{error}; install merger again, with its dependencies")


def _of_the_system(error: OSError) -> MergerError:
    text = f"{error.filename}: {error.strerror}" if error.filename is not None and error.strerror else str(error)
    return (ResourceError if error.errno is None or error.errno in _MACHINE else CheckpointError)(text)


def _origin(error: Exception) -> str:
    """The file of a stage and the line in it from which the exception comes."""
    frames = traceback.extract_tb(error.__traceback__)
    called = [i for i, frame in enumerate(frames) if frame.name == "_run_stages"]  # of merger/pipeline/flow.py
    stage = frames[min(called[-1] + 1, len(frames) - 1)] if called else frames[-1]
    line = [frame.lineno for frame in frames if frame.filename == stage.filename][-1]
    return f"{stage.filename}:{line}"
