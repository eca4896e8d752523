"""The blocks of code in a Markdown file, and the commands and output lines of its consoles."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block."""

    language: str
    text: str
    before: str  # the line of text before it
    line: int  # where its first line stands


def blocks(path, language=None):
    """The blocks of a file below the repository's root, or those of a language."""
    text = (ROOT / path).read_text(encoding="utf-8")
    parsed = [
        Block(
            match[2],
            re.sub(f"^{match[1]}", "", match[3], flags=re.MULTILINE),
            (text[: match.start()].rstrip().splitlines() or [""])[-1],
            text[: match.start()].count("\n") + 2,
        )
        for match in FENCE.finditer(text)
    ]
    return [block for block in parsed if language is None or block.language == language]


def commands(block):
    """The commands of a console, without their comments, each with the lines of output that are shown."""
    entries = []
    for line in block.text.splitlines():
        if line.startswith("$ "):
            entries.append((shlex.split(line[2:], comments=True), []))
        elif entries and line.strip():
            entries[-1][1].append(line)
    return entries


def assert_shown(lines, output):
    """Asserts that lines of a document are in an output in this order; `...` stands for anything."""
    output_lines = [" ".join(line.split()) for line in output.splitlines()]
    for line in lines:
        pattern = re.escape(" ".join(line.split())).replace(re.escape("..."), ".*")
        while output_lines and not re.fullmatch(pattern, output_lines[0]):
            output_lines.pop(0)
        assert output_lines, f"{line!r} is not in this output, or not in this order:\n{output}"
