"""The command line: each command parses, calls one function of the library, and prints."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from merger.errors import INTERRUPTED, MergerError, RecipeError, VerifyError

if TYPE_CHECKING:
    from rich.console import Console

    from merger.recipe import Recipe
    from merger.run import Progress

app = typer.Typer(
    help="Merge language-model checkpoints by a YAML recipe.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="The recipe, a YAML file.", show_default=False)]
Overrides = Annotated[
    list[str],
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Override a key of the recipe, as in --set parameters.density=0.3."
    ),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
MaxMemory = Annotated[
    str | None,
    typer.Option(metavar="SIZE", help="The most host memory to use, as in 2GB.", show_default=False),
]
Offline = Annotated[bool, typer.Option("--offline", help="Use only what the Hub cache has; open no connection.")]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Let calibration run model code that a checkpoint brings along.")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar, no remarks.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]


@app.command()
def run(
    recipe: RecipePath,
    overrides: Overrides = [],  # noqa: B006 typer reads the default, nothing changes it
    device: Device = "auto",
    max_memory: MaxMemory = None,
    offline: Offline = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an output that is there already.")] = False,
    trust_remote_code: TrustRemoteCode = False,
    locked: Annotated[bool, typer.Option("--locked", help="Refuse what differs from the recipe's lock.")] = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Merge: read the inputs, write one checkpoint that transformers loads."""
    from merger.run import merge

    loaded = _load(recipe, overrides)
    with _progress_bar(quiet) as (progress, notice):
        if locked and _is_done(loaded, recipe, offline, progress):
            output = loaded.folder / loaded.output.path
            print(json.dumps({"output": str(output), "unchanged": True}) if as_json else f"{output}: {_UNCHANGED}")
            return
        result = merge(
            loaded,
            device=device,
            max_memory=_size(max_memory),
            offline=offline,
            force=force,
            trust_remote_code=trust_remote_code,
            progress=progress,
            notice=notice,
        )
    if as_json:
        print(json.dumps(result.as_json()))
        return
    counts = ", ".join(f"{count} {what}" for what, count in result.tensors.items() if count)
    print(
        f"{result.output}: {counts} tensors; read {_bytes(result.bytes_read)}, wrote {_bytes(result.bytes_written)} "
        f"in {result.seconds:.1f} s on {result.device}, peak memory {_bytes(result.peak_memory_bytes)}"
    )


_UNCHANGED = "is what the lock says, and whole; nothing to do"


def _is_done(loaded: Recipe, path: Path, offline: bool, progress: Progress | None) -> bool:
    from merger.locking import check_lock, is_done, lock_of

    check_lock(loaded, lock_of(path), offline=offline)
    return is_done(loaded, lock_of(path), progress=progress)


@app.command()
def lock(recipe: RecipePath, overrides: Overrides = [], offline: Offline = False, as_json: AsJson = False) -> None:  # noqa: B006
    """Write down what a recipe comes to today, in recipe.lock beside it, for `merger run --locked`."""
    from merger.locking import lock as write
    from merger.locking import lock_of

    content = write(_load(recipe, overrides), lock_of(recipe), offline=offline)
    if as_json:
        print(json.dumps(content))
    else:
        print(f"{lock_of(recipe)}: {len(content['inputs'])} inputs, {len(content['files'])} files beside the weights")


@app.command()
def plan(
    recipe: RecipePath,
    overrides: Overrides = [],  # noqa: B006
    max_memory: MaxMemory = None,
    offline: Offline = False,
    as_json: AsJson = False,
) -> None:
    """Say what a merge would do, from headers alone: nothing is downloaded whole, nothing is written."""
    from merger import report
    from merger.machine import preview
    from merger.planning import plan as make_plan

    loaded = _load(recipe, overrides)
    made = make_plan(loaded, offline=offline)
    forecast = preview(made, loaded.folder / Path(loaded.output.path).expanduser(), _size(max_memory))
    if as_json:
        print(json.dumps(report.plan_json(made, forecast)))
    else:
        report.print_plan(made, forecast, _console())


@app.command()
def inspect(
    what: Annotated[
        Path,
        typer.Argument(
            metavar="WHAT", help="A recipe, the folder of a finished merge, or with --base a model.", show_default=False
        ),
    ],
    base: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Say where the model WHAT differs from this one.")
    ] = None,
    fail_if: Annotated[
        list[str],
        typer.Option("--fail-if", metavar="CONDITION", help="Exit with 1 where it holds, as in 'overlap > 0.3'."),
    ] = [],  # noqa: B006
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the same as one page for a browser.")] = None,
    tensor: Annotated[
        str | None, typer.Option(metavar="NAME", help="Map in the page where this tensor keeps its weights.")
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="Show every layer, not only the first dozen.")] = False,
    inputs: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where the relative paths of a finished merge start.")
    ] = None,
    overrides: Overrides = [],  # noqa: B006
    device: Device = "auto",
    max_memory: MaxMemory = None,
    offline: Offline = False,
    trust_remote_code: TrustRemoteCode = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Show what a merge would do, or what it did: density, overlap, conflict and balance, by layer and stage."""
    from merger import inspection
    from merger.checkpoint.writer import write_text
    from merger.inspection import conditions, page, tables

    wanted = [conditions.parse(text) for text in fail_if]
    if overrides and (base is not None or what.is_dir()):
        raise RecipeError(f"--set changes a recipe, and {what} is none")
    if html is not None and (html.is_dir() or not html.parent.is_dir()):
        raise RecipeError(f"--html {html}: expected a file in a folder that is there")
    size = _size(max_memory)
    with _progress_bar(quiet) as (progress, notice):
        common: dict[str, Any] = {"max_memory": size, "progress": progress, "notice": notice}
        if base is not None:
            seen = inspection.inspect_model(str(what), base, picture=tensor, offline=offline, **common)
        elif what.is_dir():
            seen = inspection.inspect_merge(what, inputs=inputs, picture=tensor, **common)
        else:
            loaded = _load(what, overrides)
            common |= {"offline": offline, "device": device, "trust_remote_code": trust_remote_code}
            seen = inspection.inspect(loaded, picture=tensor, **common)
    if html is not None:
        write_text(html, page.page(seen))
    if as_json:
        print(json.dumps(seen.as_json()))
    else:
        tables.print_inspection(seen, _console(), every=every)
        print(f"read {_bytes(seen.bytes_read)} in {seen.seconds:.1f} s, peak memory {_bytes(seen.peak_memory_bytes)}")
    conditions.check(wanted, seen)


@app.command()
def calibrate(
    recipe: RecipePath,
    to: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Copy the statistics there, one file an expert.")
    ] = None,
    overrides: Overrides = [],  # noqa: B006
    device: Device = "auto",
    max_memory: MaxMemory = None,
    offline: Offline = False,
    trust_remote_code: TrustRemoteCode = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Run the calibration of a recipe alone, and say where each expert's statistics are."""
    from merger.run import calibrate as make_statistics

    with _progress_bar(quiet) as (progress, notice):
        paths = make_statistics(
            _load(recipe, overrides),
            to=to,
            device=device,
            max_memory=_size(max_memory),
            offline=offline,
            trust_remote_code=trust_remote_code,
            progress=progress,
            notice=notice,
        )
    if as_json:
        print(json.dumps({name: str(path) for name, path in paths.items()}))
    else:
        print("calibration:\n  stats:")
        for name, path in paths.items():
            print(f"    {name}: {path}")


@app.command()
def verify(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A checkpoint's folder.", show_default=False)],
    deep: Annotated[bool, typer.Option("--deep", help="Merge a sample of tensors again, and compare bits.")] = False,
    sample: Annotated[int, typer.Option(metavar="N", min=1, help="How many tensors --deep merges again.")] = 16,
    seed: Annotated[int, typer.Option(help="Chooses them.")] = 0,
    recipe: Annotated[
        Path | None,
        typer.Option(metavar="RECIPE", help="For --deep, where the folder was moved: its recipe.", show_default=False),
    ] = None,
    device: Annotated[str | None, typer.Option(help="For --deep; the recorded kind if not given.")] = None,
    max_memory: MaxMemory = None,
    offline: Offline = False,
    trust_remote_code: TrustRemoteCode = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Check that a model is what it says: hashes, headers, values, config, tokenizer; with --deep, the merge itself."""
    from merger.verification import Deep
    from merger.verification import verify as check

    how = Deep(sample, seed, recipe, device, _size(max_memory), offline, trust_remote_code) if deep else None
    with _progress_bar(quiet) as (progress, notice):
        found = check(folder, deep=how, progress=progress, notice=notice)
    if as_json:
        print(json.dumps(found.as_json()))
    if found.differences:
        raise VerifyError("\n".join(f"{folder}: {each}" for each in found.differences))
    if not as_json:
        whole = "is what merger.json says" if found.recorded else "agrees with itself; it has no merger.json"
        again = f"; {len(found.recomputed)} tensors merged again are the same bits" if deep else ""
        print(f"{folder}: {whole}: {found.tensors} tensors, {_bytes(found.bytes)}{again}")


@app.command()
def methods(
    name: Annotated[str | None, typer.Argument(help="One method, stage or score.", show_default=False)] = None,
    as_json: AsJson = False,
) -> None:
    """List the methods, stages and scores, or show one: what it expands to, its parameters, its paper."""
    from merger import report

    if as_json:
        print(json.dumps(report.methods_json(name)))
    else:
        report.print_methods(name, _console())


@app.command()
def demo(
    folder: Annotated[Path, typer.Argument(help="Where the demo is written.")] = Path("demo"),
    device: Device = "auto",
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier demo.")] = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Merge three tiny fine-tunes that come with merger, and show what each model can do."""
    from merger import demo as demonstration

    console = _console(stderr=True)
    tell = (lambda line: None) if quiet else (lambda line: console.print(line, markup=False))
    scores = demonstration.demo(folder, force=force, device=device, tell=tell)
    if as_json:
        print(json.dumps([{"model": s.model, "kind": s.kind, "accuracy": dict(s.accuracy)} for s in scores]))
        return
    demonstration.print_scores(scores, _console())
    print(f"The models, the data and a recipe are in {folder}: try  merger plan {folder / 'recipe.yaml'}")


@app.command()
def schema(
    of: Annotated[str, typer.Argument(metavar="[recipe|inspection]", help="Of what.", show_default=False)] = "recipe",
) -> None:
    """Print the JSON Schema of a recipe, for editors, or of what inspect --json says, for machines."""
    from merger.errors import nearest

    if of == "inspection":
        from merger.inspection.facts import json_schema
    elif of == "recipe":
        from merger.recipe import json_schema
    else:
        raise RecipeError(f"there is no schema of {of!r}; {nearest(of, ('recipe', 'inspection'))}")
    print(json.dumps(json_schema(), indent=2))


def _load(path: Path, overrides: list[str]) -> Recipe:
    from merger.recipe import Recipe

    return Recipe.load(path, overrides)


def _size(text: str | None) -> int | None:
    if text is None:
        return None
    from merger.recipe import byte_size

    size = byte_size(text)
    if not isinstance(size, int) or size < 1:
        raise RecipeError(f"--max-memory {text}: expected a size such as 800MB, 2GB or 1.5GiB")
    return size


def _bytes(count: int) -> str:
    """1.23 GB: three digits, as disks are sold."""
    size, unit = float(count), "B"
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if size < 999.5 or unit == "TB":
            break
        size /= 1000
    return f"{size:.3g} {unit}" if unit != "B" else f"{count} B"


def _console(*, stderr: bool = False) -> Console:
    from rich.console import Console

    console = Console(stderr=stderr, highlight=False, soft_wrap=False)
    if not console.is_terminal:
        console.width = 200  # a file or another program wants whole names
    return console


@contextmanager
def _progress_bar(quiet: bool) -> Iterator[tuple[Progress | None, Any]]:
    """A progress callback that draws a bar on a terminal and nothing elsewhere, and one for remarks."""
    console = _console(stderr=True)
    if quiet:
        yield None, None
        return

    def notice(message: str) -> None:
        console.print(f"note: {message}", markup=False, soft_wrap=True)

    if not console.is_terminal:
        yield None, notice
        return
    from rich.progress import (
        BarColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

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
    with Progress(*columns, console=console, transient=True) as bar:

        def tell(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, amount="")
            speed = next(task.speed for task in bar.tasks if task.id == tasks[what]) or 0
            counted = f"{_bytes(done)} of {_bytes(total)}, {_bytes(int(speed))}/s"
            amount = "" if what.startswith("calibrating") else counted
            bar.update(tasks[what], completed=done, total=total, amount=amount)

        yield tell, notice


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
