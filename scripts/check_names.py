"""Checks that variables and arguments are named by nouns of the field.

    python scripts/check_names.py FOLDER... MAX_PERCENT     # exit status 1 above the limit, with the places

The limit holds for each folder and for each package directly in it. A pronoun, a participle or an adverb makes a reader
look up what it stands for. `density` and `expert_delta` do not.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

WORDS = """
each own other others it they them these those which what who whom whose its their our mine yours theirs ours
one ones two both all any some none nothing everything something anything every whole several rest more most
less least few many much enough such same different differing here there where when why how so also again
already alone apart around beside besides behind below beyond beneath together between near far first second
last next ahead onward along away back forth out away within without inside outside before after since until
then now later earlier soon like unlike said known told given found made asked wanted taken seen held left
kept done doing being been becoming going gone coming come looked heard shown read written sent fetched
brought carried put set got had having has ready open opened closed broken dealt chosen named spelled placed
counted judged filled stacked shared missing absent present lacking holding unreached reached plain wrong
right true false fitted silent
"""
CONVENTIONAL = "first last index set open read all any missing next"  # as names in Python and its libraries
REFUSED = frozenset(WORDS.split()) - frozenset(CONVENTIONAL.split())


def bound_names(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """The names of variables and arguments in a module, each with its line."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id, node.lineno
        elif isinstance(node, ast.arg) and node.arg not in ("self", "cls"):
            yield node.arg, node.lineno


def is_noun(name: str) -> bool:
    """Whether a name is none of the words that stand for something else."""
    return name.strip("_") not in REFUSED


def packages(folder: Path) -> list[Path]:
    """The folder, and the packages directly in it."""
    return [folder, *sorted(file.parent for file in folder.glob("*/__init__.py"))]


def exceeds(folder: Path, limit: float) -> bool:
    """Prints the share of names below a folder that are no nouns, with their places if it is above the limit."""
    names = [
        (name, f"{path}:{line}")
        for path in sorted(folder.rglob("*.py"))
        for name, line in bound_names(ast.parse(path.read_text(encoding="utf-8")))
        if name.strip("_")
    ]
    places = [f"{place}: {name}" for name, place in names if not is_noun(name)]
    percent = 100 * len(places) / max(1, len(names))
    if percent > limit:
        print("\n".join(places))
    share = f"{len(places)} of {len(names)} names ({percent:.1f} %)"
    print(f"{folder}: {share} are pronouns, participles or adverbs; at most {limit:g} % may be")
    return percent > limit


def main() -> int:
    *folders, limit = sys.argv[1:]
    results = [exceeds(path, float(limit)) for folder in folders for path in packages(Path(folder))]
    return int(any(results))


if __name__ == "__main__":
    sys.exit(main())
