"""Importing a file of methods so that a broken one harms no other."""

from __future__ import annotations

import traceback
import warnings
from importlib import import_module
from importlib.util import find_spec

from merger.errors import BrokenMethodWarning
from merger.pipeline.registry import ENTRIES, SCORES, parameters


def import_methods(module: str) -> None:
    """Imports a module, which registers its methods; where it fails, a warning names file and line, and none is left.

    The annotations of all parameters are looked up too, so that no later command stumbles over them.
    """
    try:
        import_module(module)
        for entry in [*ENTRIES.values(), *SCORES.values()]:
            if entry.function.__module__ == module:
                parameters(entry.function)
    except (Exception, SystemExit) as error:
        for table in (ENTRIES, SCORES):
            for name in [name for name, entry in table.items() if entry.function.__module__ == module]:
                del table[name]
        warnings.warn(
            f"{_place(error, module)}: {_reason(error)}; the methods of {module.rpartition('.')[2]}.py are left out",
            BrokenMethodWarning,
            stacklevel=2,
        )


def _place(error: BaseException, module: str) -> str:
    """The file among the methods that its author has to mend, with the line where that is known."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}:{error.lineno}"
    frames = traceback.extract_tb(error.__traceback__)
    own_frames = [frame for frame in frames if "/methods/" in frame.filename and frame.name == "<module>"]
    if own_frames:
        return f"{own_frames[-1].filename}:{own_frames[-1].lineno}"
    spec = find_spec(module)
    return str(module if spec is None else spec.origin)


def _reason(error: BaseException) -> str:
    message = error.msg if isinstance(error, SyntaxError) else " ".join(str(error).split())
    return f"{type(error).__name__}: {message}"
