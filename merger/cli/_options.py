"""Arguments and options that several commands take, and the `RunOptions` that their flags stand for."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from merger.cli._terminal import progress_bar
from merger.errors import RecipeError
from merger.options import RunOptions

if TYPE_CHECKING:
    from merger.recipe.recipe import Recipe

RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="The recipe, a YAML file.", show_default=False)]
Overrides = Annotated[
    list[str],
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Override a key of the recipe, as in --set parameters.density=0.3."
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]


RUN_FLAGS: dict[str, Any] = {
    "device": Annotated[str, typer.Option(help="auto, cpu, cuda (all of them) or cuda:N.")],
    "max_memory": Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="The most host memory to use, as in 2GB.", show_default=False),
    ],
    "offline": Annotated[bool, typer.Option("--offline", help="Use only what the Hub cache has; open no connection.")],
    "trust_remote_code": Annotated[
        bool,
        typer.Option("--trust-remote-code", help="Let merger run model code that a checkpoint brings along."),
    ],
    "quiet": Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar, no remarks.")],
}


@dataclass(frozen=True)
class RunFlags:
    """The flags that a command takes by `run_flags`; a flag that it does not take has the default of `RunOptions`."""

    device: str = RunOptions.device
    max_memory: str | None = None
    offline: bool = RunOptions.offline
    trust_remote_code: bool = RunOptions.trust_remote_code
    quiet: bool = False

    @property
    def memory(self) -> int | None:
        """The limit of host memory in bytes; RecipeError where it is no size."""
        return memory_size(self.max_memory)

    @contextmanager
    def options(self) -> Iterator[RunOptions]:
        """The options of a run, whose progress is drawn on the terminal while the context lasts."""
        memory = self.memory
        with progress_bar(self.quiet) as (progress, notice):
            yield RunOptions(self.device, memory, self.offline, self.trust_remote_code, progress, notice)


def run_flags(*names: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Gives a command the flags ``names`` in place of its parameter ``flags``, and the command their `RunFlags`."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @wraps(command)
        def decorated(**arguments: Any) -> None:
            values = {name: arguments.pop(name) for name in names}
            command(flags=RunFlags(**values), **arguments)

        parameters: list[inspect.Parameter] = []
        signature = inspect.signature(command, eval_str=True)
        for parameter in signature.parameters.values():
            parameters += [_flag(name) for name in names] if parameter.name == "flags" else [parameter]
        vars(decorated)["__signature__"] = signature.replace(parameters=parameters)
        return decorated

    return decorate


def _flag(name: str) -> inspect.Parameter:
    """A flag as a parameter of a command's function."""
    default = getattr(RunFlags, name)
    return inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=default, annotation=RUN_FLAGS[name])


def load(path: Path, overrides: list[str]) -> Recipe:
    """The recipe of a file, with what ``--set`` changes."""
    from merger.recipe.recipe import Recipe

    return Recipe.load(path, overrides)


def new_file_faults(file: Path, *, force: bool) -> list[str]:
    """The fault of a file ``--output`` that is there already, unless ``force``, or whose folder is not."""
    if file.is_dir() or not file.parent.is_dir():
        return [f"--output {file}: expected a file in a folder that is there"]
    return [f"--output {file}: is there already; --force replaces it"] if file.exists() and not force else []


def memory_size(text: str | None) -> int | None:
    """What ``--max-memory`` says, in bytes."""
    if text is None:
        return None
    from merger.recipe.sections import byte_size

    size = byte_size(text)
    if not isinstance(size, int) or size < 1:
        raise RecipeError(f"--max-memory {text}: expected a size such as 800MB, 2GB or 1.5GiB")
    return size
