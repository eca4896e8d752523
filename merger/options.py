"""How a command runs on this machine; none of the options changes what is computed beyond rounding."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from merger._notebook import notebook_bar
from merger.errors import RecipeError

Progress = Callable[[str, int, int], None]
"""Receives the name of a step, the amount of it that is done, and the total amount as far as it is known.

The steps ``merging``, ``inspecting``, ``verifying`` and ``extracting`` count bytes; ``calibrating NAME`` counts forward
passes of a batch through a block.
"""

Notice = Callable[[str], None]
"""Receives a remark for the user, one sentence."""


def ignore(*_: object) -> None:
    """Discards progress and remarks."""


@dataclass(frozen=True)
class RunOptions:
    """The options that every function of the library takes which reads or writes models."""

    device: str = "auto"  # auto, cpu, cuda (all CUDA devices) or cuda:N
    max_memory: int | None = None  # bytes of host memory; None: no limit
    offline: bool = False  # only the Hub's cache is used
    trust_remote_code: bool = False  # calibration may run code that comes with a checkpoint
    progress: Progress = field(default_factory=lambda: notebook_bar() or ignore)  # a bar in a notebook
    notice: Notice = ignore

    def __post_init__(self) -> None:
        """Raises RecipeError for values of another type."""
        if not isinstance(self.device, str):
            raise RecipeError(f"device={self.device!r}: expected auto, cpu, cuda or cuda:0")
        if self.max_memory is not None and (isinstance(self.max_memory, bool) or not isinstance(self.max_memory, int)):
            raise RecipeError(f"max_memory={self.max_memory!r}: expected a number of bytes, as in 4_000_000_000")
        for name in ("progress", "notice"):
            if not callable(getattr(self, name)):
                raise RecipeError(f"{name}={getattr(self, name)!r}: expected a function; leave it out for none")


def check_options(options: object) -> None:
    """Raises RecipeError for anything but `RunOptions`."""
    if not isinstance(options, RunOptions):
        raise RecipeError(f"options: expected merger.RunOptions(device='cpu', ...), not {type(options).__name__}")


def path_argument(name: str, value: object) -> Path:
    """The path that an argument gives; RecipeError for anything but text or a path."""
    if not isinstance(value, str | Path):
        remedy = "; merger.Recipe.parse makes a recipe of a dictionary" if isinstance(value, Mapping) else ""
        raise RecipeError(f"{name}: expected a path, not {type(value).__name__}{remedy}")
    return Path(value)
