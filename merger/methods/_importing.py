"""Importing files of methods, merger's and those of installed packages, so that a broken one harms no other."""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Collection
from importlib import import_module
from importlib.metadata import entry_points
from importlib.util import find_spec

from merger.errors import BrokenMethodWarning
from merger.pipeline.registry import ENTRIES, PACKAGES, SCORES, Entry, Package, parameters

GROUP = "merger.methods"
"""The group of the entry points by which an installed package adds methods."""


def import_file(module: str) -> None:
    """Imports a file of `merger.methods`; where it fails, a warning names file and line, and none of it is left."""
    try:
        _import_methods(module)
    except (Exception, SystemExit) as error:
        _warn(f"{_place(error, module)}{_reason(error)}; the methods of {module.rpartition('.')[2]}.py are left out")


def import_installed() -> None:
    """Imports the modules of all entry points; where one fails, a warning names its package and entry point.

    Packages come in the order of their names, so that it depends on no search path which of two has a name first.
    """
    packages = {
        point: Package(point.dist.name, point.dist.version) for point in entry_points(group=GROUP) if point.dist
    }
    PACKAGES.update({point.value: package for point, package in packages.items()})
    for point, package in sorted(packages.items(), key=lambda item: (item[1], item[0].name)):
        try:
            _import_methods(point.value)
        except (Exception, SystemExit) as error:
            place = _place(error, point.value)
            _warn(f"{package}, entry point {point.name}: {place}{_reason(error)}; its methods are left out")


def _import_methods(module: str) -> None:
    """Imports a module, which registers its methods; where that fails, they are removed again.

    The annotations of all parameters are looked up too, so that no later command stumbles over them.
    """
    earlier_entries = _entries()
    try:
        import_module(module)
        for entry in _entries_of(module, earlier_entries):
            parameters(entry.function)
            if module in PACKAGES and entry.root is None:
                file = entry.function.__module__
                raise ValueError(f"{entry.name} stands in {file}; methods stand in the module of an entry point")
    except (Exception, SystemExit):
        for entry in _entries_of(module, earlier_entries):
            del (SCORES if entry.kind == "score" else ENTRIES)[entry.name]
        raise


def _entries() -> list[Entry]:
    return [*ENTRIES.values(), *SCORES.values()]


def _entries_of(module: str, earlier_entries: Collection[Entry]) -> list[Entry]:
    """Returns the entries of a module; for an entry point, also new ones of modules that no entry point names."""
    if module not in PACKAGES:
        return [entry for entry in _entries() if entry.function.__module__ == module]
    return [
        entry for entry in _entries() if entry.root == module or (entry.root is None and entry not in earlier_entries)
    ]


def _warn(message: str) -> None:
    warnings.warn(message, BrokenMethodWarning, stacklevel=3)


def _place(error: BaseException, module: str) -> str:
    """The file that the author of a module has to mend, with the line where that is known, as `file:line: `."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}:{error.lineno}: "
    package = module.partition(".")[0]
    bodies = [
        (frame.f_code.co_filename, line)
        for frame, line in traceback.walk_tb(error.__traceback__)
        if frame.f_code.co_name == "<module>"
        and frame.f_globals.get("__name__", "").partition(".")[0] == package
        and not frame.f_code.co_filename.startswith("<")  # an annotation that was evaluated
    ]
    if bodies:
        return "{}:{}: ".format(*bodies[-1])
    try:
        spec = find_spec(module)
    except (ImportError, ValueError):
        spec = None
    return "" if spec is None or spec.origin is None else f"{spec.origin}: "


def _reason(error: BaseException) -> str:
    message = error.msg if isinstance(error, SyntaxError) else " ".join(str(error).split())
    return f"{type(error).__name__}: {message}"
