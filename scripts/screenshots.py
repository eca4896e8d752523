"""Makes the pictures of commands and pages in docs/pictures/: the real output of the real commands at 80 columns.

python scripts/screenshots.py              # commands, and pages where there is a chromium
python scripts/screenshots.py --commands   # commands alone

The commands run on the models of `merger demo` in a folder of their own, which the pictures show as ~.
"""

from __future__ import annotations

import argparse
import fcntl
import io
import os
import pty
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import termios
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.text import Text

ROOT = Path(__file__).parents[1]
PICTURES = ROOT / "docs" / "pictures"
COLUMNS = 80
FIRST, LAST = 40, 30
"""Lines of a picture from the beginning and the end of a long output; it says how many it leaves out between them."""
PAGE = (1000, 900)
"""Width and height of a page's picture."""
COLOURS = 128
"""Colours of a page's picture, which keep it small."""
FRAME = """<svg class="rich-terminal" viewBox="0 0 {width} {height}" xmlns="http://www.w3.org/2000/svg">
<style>
.{unique_id}-matrix {{ font-family: ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace;
  font-size: {char_height}px; line-height: {line_height}px; }}
.{unique_id}-title {{ font-size: 18px; font-family: system-ui, sans-serif; }}
{styles}
</style>
<defs><clipPath id="{unique_id}-clip-terminal"><rect x="0" y="0" width="{terminal_width}" height="{terminal_height}"/>
</clipPath>{lines}</defs>
{chrome}
<g transform="translate({terminal_x}, {terminal_y})" clip-path="url(#{unique_id}-clip-terminal)">
{backgrounds}
<g class="{unique_id}-matrix">{matrix}</g>
</g>
</svg>
"""
"""The frame of `rich` without its fonts from the network."""


@dataclass(frozen=True)
class Shot:
    """A command and the name of its picture; without a name the command only prepares the next ones."""

    command: str
    name: str = ""
    folder: str = "demo"


SHOTS = (
    Shot("merger demo", "demo", "."),
    Shot("merger plan featcal.yaml", "plan"),
    Shot("merger run featcal.yaml", "run"),
    Shot("merger eval recipe.yaml merged/featcal --html eval.html", "eval"),
    Shot("merger inspect ties.yaml --html inspect.html", "inspect"),
    Shot("merger search search.yaml --html search.html"),
)
PAGES = {f"page-{name}": f"{name}.html" for name in ("demo", "eval", "inspect", "search")}
MODELS = """base: models/base
experts: {upper: models/upper, shift: models/shift, double: models/double}
"""
TIES = """method: ties
parameters: {density: 0.3}
output: {path: merged/ties}
"""
SEARCH = """method: task_arithmetic
parameters: {lambda: {search: {low: 0.2, high: 1.0, step: 0.1}}}
evaluation:
  data: {upper: held-out/upper.jsonl, shift: held-out/shift.jsonl, double: held-out/double.jsonl}
  samples: 50
search: {samples: 40}
output: {path: merged/found}
"""


def terminal_output(command: str, folder: Path) -> str:
    """What a command writes on a terminal of 80 columns; CalledProcessError where it fails."""
    program, *arguments = command.split()
    assert program == "merger"
    child, terminal = pty.fork()
    if child == 0:
        os.chdir(folder)
        environment = {**os.environ, "TERM": "xterm-256color", "PYTHONPATH": str(ROOT)}
        for name in ("COLUMNS", "NO_COLOR"):
            environment.pop(name, None)
        os.execve(sys.executable, [sys.executable, "-m", "merger", *arguments], environment)
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, COLUMNS, 0, 0))
    output = bytearray()
    while True:
        try:
            chunk = os.read(terminal, 1 << 16)
        except OSError:  # how Linux says that the other side is closed
            break
        if not chunk:
            break
        output += chunk
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status:
        raise subprocess.CalledProcessError(status, command, output=bytes(output))
    return output.decode()


def screen(output: str) -> list[str]:
    """The lines that a terminal shows in the end, with their colours: bars that were erased are gone."""
    lines, row = [""], 0
    for token in re.findall(r"\x1b\[[0-9;?]*[A-Za-z]|[\r\n]|[^\x1b\r\n]+", output):
        if token == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        elif token.endswith("A") and token.startswith("\x1b["):
            row = max(0, row - int(token[2:-1] or 1))
        elif token == "\x1b[2K":
            lines[row] = ""
        elif not token.startswith("\x1b") or token.endswith("m"):
            lines[row] += "" if token == "\r" else token
    while len(lines) > 1 and not lines[-1].strip():
        lines.pop()
    return lines


def picture(command: str, lines: list[str]) -> str:
    """The lines below the command as an SVG file."""
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    console.print(Text.assemble(("$ ", "bold green"), (command, "bold")))
    left_out = len(lines) - FIRST - LAST
    shown = lines if left_out <= 1 else [*lines[:FIRST], f"[{left_out} lines more]", "", *lines[-LAST:]]
    for line in shown:
        console.print(Text.from_ansi(line), soft_wrap=True)
    svg = console.export_svg(title="merger", code_format=FRAME, unique_id="merger")
    return re.sub(r"[ \t]+$", "", svg, flags=re.MULTILINE)


def page_picture(page: Path, file: Path, browser: str, profile: Path) -> None:
    """The upper part of a page as a browser shows it, as a PNG file of few colours."""
    from PIL import Image

    width, height = PAGE
    flags = ("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars")
    command = [browser, *flags, f"--user-data-dir={profile}"]
    command += [f"--window-size={width},{height}", "--blink-settings=preferredColorScheme=1"]
    subprocess.run([*command, f"--screenshot={file}", page.as_uri()], check=True, capture_output=True)
    Image.open(file).convert("RGB").quantize(COLOURS, Image.Quantize.FASTOCTREE).save(file, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--commands", action="store_true", help="make no pictures of pages")
    options = parser.parse_args()
    PICTURES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        home = Path(temporary).resolve()
        for shot in SHOTS:
            output = terminal_output(shot.command, home / shot.folder).replace(str(home), "~")
            for name, text in (("ties", TIES), ("search", SEARCH)):  # beside the recipes of the demo, which comes first
                (home / "demo" / f"{name}.yaml").write_text(MODELS + text, encoding="utf-8")
            if shot.name:
                (PICTURES / f"{shot.name}.svg").write_text(picture(shot.command, screen(output)), encoding="utf-8")
        browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
        if browser is None or options.commands:
            return
        for name, page in PAGES.items():
            page_picture(home / "demo" / page, PICTURES / f"{name}.png", browser, home / "profile")


if __name__ == "__main__":
    main()
