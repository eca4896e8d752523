"""The file formats of checkpoints, one module each."""

from importlib import import_module
from pkgutil import iter_modules

from merger.checkpoint.formats.interface import Format

_MODULES = [import_module(f"{__name__}.{module.name}") for module in iter_modules(__path__)]
FORMATS: tuple[Format, ...] = tuple(
    sorted((module.FORMAT for module in _MODULES if hasattr(module, "FORMAT")), key=lambda format_: format_.order)
)
"""The preferred first."""

SUFFIXES = tuple(format_.suffix for format_ in FORMATS)


def format_of(file: str) -> Format | None:
    """The format of a weight file by its name; None for any other file."""
    return next((format_ for format_ in FORMATS if file.endswith(format_.suffix)), None)
