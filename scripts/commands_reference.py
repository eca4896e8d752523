"""Writes the reference of all commands in docs/commands.md from the command line itself.

python scripts/commands_reference.py            # rewrites the reference
python scripts/commands_reference.py --check    # exits with 1 if it differs
"""

from pathlib import Path
from typing import Any

import typer
from generated import rewrite

from merger.cli import app
from merger.cli._app import JUDGE, LEARN, MERGE, USE

DOCS = Path(__file__).parents[1] / "docs" / "commands.md"
BEGIN, END = "<!-- commands: written by scripts/commands_reference.py -->\n", "<!-- end of commands -->\n"


def reference() -> str:
    group: Any = typer.main.get_command(app)
    parts = []
    for panel in (LEARN, MERGE, JUDGE, USE):
        commands = [command for command in group.commands.values() if command.rich_help_panel == panel]
        parts += [f"## {panel}", *(section(command) for command in commands)]
    return "\n\n".join(parts) + "\n"


def section(command: Any) -> str:
    arguments = [usage(parameter) for parameter in command.params if is_argument(parameter)]
    lines = [f"### merger {command.name}", "", command.help, "", "```text"]
    lines += [" ".join(["merger", command.name, *arguments, "[OPTIONS]"]), "```", ""]
    lines += ["| argument or option | default | |", "|---|---|---|"]
    return "\n".join([*lines, *(row(parameter) for parameter in command.params)])


def is_argument(parameter: Any) -> bool:
    return bool(parameter.param_type_name == "argument")


def usage(argument: Any) -> str:
    name = metavar(argument)
    brackets = argument.required or name[0] + name[-1] == "[]"
    return (name if brackets else f"[{name}]") + ("..." if argument.nargs == -1 and not name.endswith("...") else "")


def metavar(parameter: Any) -> str:
    return str(parameter.metavar or parameter.name.upper())


def row(parameter: Any) -> str:
    names = metavar(parameter) if is_argument(parameter) else option(parameter)
    cells = [f"`{names}`", default_text(parameter), parameter.help or ""]
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def option(parameter: Any) -> str:
    names = ", ".join([*parameter.opts, *parameter.secondary_opts])
    return names if parameter.is_flag else f"{names} {metavar(parameter)}"


def default_text(parameter: Any) -> str:
    if parameter.required:
        return "required"
    if parameter.default is None or parameter.default is False or parameter.default in ("", []):
        return ""
    return f"`{parameter.default}`"


if __name__ == "__main__":
    rewrite(DOCS, BEGIN, END, reference(), "the commands")
