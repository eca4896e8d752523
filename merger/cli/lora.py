"""`merger lora`."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from merger.cli._app import USE, command
from merger.cli._options import AsJson, RunFlags, run_flags
from merger.cli._terminal import make_console
from merger.display import Column, Table, text_row
from merger.display.terminal import print_table, print_text
from merger.errors import RecipeError

if TYPE_CHECKING:
    from rich.console import Console

    from merger.outputs.lora import LoraExtraction


@command(USE)
@run_flags("offline", "trust_remote_code", "quiet")
def lora(
    base: Annotated[str, typer.Argument(metavar="BASE", help="The model that was fine-tuned.", show_default=False)],
    model: Annotated[str, typer.Argument(metavar="MODEL", help="The fine-tune of it.", show_default=False)],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIR", help="Where the adapter goes.", show_default=False)
    ],
    rank: Annotated[
        int | None, typer.Option(min=1, help="Directions kept of each matrix's change.", show_default=False)
    ] = None,
    energy: Annotated[
        str | None,
        typer.Option(metavar="SHARE", help="Or as many as hold this share of its squared norm.", show_default=False),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a folder that is there already.")] = False,
    flags: RunFlags = RunFlags(),
    as_json: AsJson = False,
) -> None:
    """Turn a fine-tune into a PEFT LoRA adapter for its base, and say what that leaves out, layer by layer."""
    from merger.outputs.lora import extract_lora

    share = None if energy is None else _share(energy)
    with flags.options() as options:
        adapter = extract_lora(base, model, output, options, rank=rank, energy=share, force=force)
    if as_json:
        print(json.dumps(adapter.as_json()))
    else:
        _print(adapter, make_console())


def _print(adapter: LoraExtraction, console: Console) -> None:
    """Prints the error of each layer, then of the model."""
    rows = [
        text_row(name, layer.matrices, "-".join(map(str, dict.fromkeys(layer.ranks))), f"{layer.error:.4f}")
        for name, layer in adapter.layers.items()
    ]
    print_table(Table([Column("layer"), Column("matrices"), Column("rank"), Column("error")], rows), console)
    for name, share in sorted(adapter.left_out.items(), key=lambda item: -item[1])[:10]:
        print_text(f"left out: {name}, {share:.2%} of the model's change", console)
    remaining = len(adapter.left_out) - 10
    if remaining > 0:
        print_text(f"left out: {remaining} other tensors that changed less", console)
    print_text(
        f"{adapter.output}: {adapter.parameters:,} parameters; error {adapter.error:.4f} of the matrices' change, "
        f"{adapter.whole_error:.4f} of the model's",
        console,
    )


def _share(text: str) -> Fraction:
    try:
        share = Fraction(text)
    except (ValueError, ZeroDivisionError):
        share = Fraction(0)
    if not 0 < share <= 1:
        raise RecipeError(f"--energy {text}: expected a share above 0 and at most 1, such as 0.9")
    return share
