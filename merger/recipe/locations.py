"""Locations of models and texts as a user types them: on this machine, on the Hub, or misspelt."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from merger.checkpoint.foreign_models import GGUF, GGUF_REMEDY
from merger.checkpoint.hub import is_repository
from merger.checkpoint.near_paths import names_in, near_path
from merger.recipe.sections import is_dataset

_NAMES_SHOWN = 8  # of a folder in which a name has no near one


@dataclass(frozen=True)
class InputKind:
    """A kind of input: what it is on this machine, and by what names the Hub has it."""

    noun: str
    is_here: Callable[[Path], bool]
    remote: str = ""
    is_remote: Callable[[str], bool] = lambda location: False
    suffix: str = ""  # makes a name that of the Hub, whatever lies here


FOLDER = InputKind("folder", Path.is_dir, "a repository", is_repository, "@main")
TEXT_FILE = InputKind("file", Path.is_file, "a data set", is_dataset, ":train")
STATISTICS = InputKind("file", Path.exists)


def location_path(location: str) -> Path:
    """The path of a location, with the home folder in place of ~."""
    return Path(os.path.expanduser(location))


def location_fault(location: str, kind: InputKind, start: Path = Path(), *, least_remote_parts: int = 2) -> str | None:
    """The fault of a location that is neither here nor on the Hub, as far as its name tells; None if it is none.

    Relative paths begin at the folder ``start``. A name of the Hub has at least ``least_remote_parts`` parts.
    """
    path = location_path(location)
    if not location:
        return f"an argument is empty, expected a {kind.noun}"
    if kind.is_here(start / path):
        return None
    if (start / path).is_dir():
        return f"{location}: is a folder, expected a file of text"
    if path.suffix == GGUF and (start / path).is_file():
        return f"{location}: is a file in GGUF, which is made for inference and is not merged; {GGUF_REMEDY}"
    if (start / path).exists():
        return f"{location}: is a file, expected the folder of a model"
    is_remote = kind.is_remote(location)
    if is_remote and kind.suffix[0] in location:
        return None
    is_path = len(path.parts) > 1 and (start / path).parent.is_dir()
    near = near_path(path, kind.is_here, start)
    if near is None and is_remote and not is_path and len(path.parts) >= least_remote_parts:
        return None
    suggestion = f"; did you mean {near}?" if near else _listing(path.parent, kind, start)
    escape = f" (for {kind.remote} of the Hub, write {location}{kind.suffix})" if is_remote and not is_path else ""
    return f"there is no {kind.noun} {location}{suggestion}{escape}"


def _listing(folder: Path, kind: InputKind, start: Path) -> str:
    """A clause with the inputs of a kind in a folder; nothing where there are none."""
    names = [name for name in names_in(start / folder, kind.is_here) if not name.startswith(".")]
    return f"; {'this folder' if folder == Path() else folder} has {', '.join(names[:_NAMES_SHOWN])}" if names else ""


def location_from(folder: Path, location: str) -> str:
    """A location that starts in the working folder, as a recipe in ``folder`` writes it.

    Absolute paths, and locations that are no files or folders here, are unchanged.
    """
    if os.path.isabs(location) or not Path(location).exists():
        return location
    relative, target = os.path.relpath(location, folder), Path(location).resolve()
    return relative if (folder / relative).resolve() == target else str(target)  # links may lead `..` elsewhere
