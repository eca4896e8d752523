"""Writes the tables of all methods, stages and scores in docs/methods/parameters.md from their signatures.

python scripts/methods_table.py            # rewrites the tables
python scripts/methods_table.py --check    # exits with 1 if they differ
"""

import json
from pathlib import Path
from typing import Any

from generated import rewrite

from merger.cli._report import methods_json

DOCS = Path(__file__).parents[1] / "docs" / "methods" / "parameters.md"
BEGIN, END = "<!-- methods: written by scripts/methods_table.py -->\n", "<!-- end of methods -->\n"
HEADINGS = {
    "method": "Methods, each a short pipeline of stages",
    "merger": "Mergers: K task vectors to one; each is a method too",
    "pack": "Packs: K task vectors to an output that holds every expert; each is a method too",
    "sparsifier": "Sparsifiers, before the merger",
    "filter": "Filters, after the merger",
    "scale": "Scales, before the merger or after it",
    "score": "Scores, as `score: NAME` of a stage; or each as a stage, with the parameters of `top` beside its own",
}


def tables() -> str:
    parts = []
    entries_by_kind = methods_json(None)
    for kind, heading in HEADINGS.items():
        entries = sorted(entries_by_kind[kind], key=lambda entry: entry["name"])
        rows = [row(entry) for entry in entries if entry["package"] is None]
        parts.append(
            "\n".join([f"## {heading}", "", "| name | needs | what it does | parameters |", "|---|---|---|---|", *rows])
        )
    return "\n\n".join(parts) + "\n"


def row(entry: dict[str, Any]) -> str:
    parameters = (f"`{name}: {yaml_text(facts['default'])}`" for name, facts in entry["parameters"].items())
    needs = ", ".join(entry["needs"])
    return f"| `{entry['name']}` | {needs} | {entry['summary'].replace('|', chr(92) + '|')} | {', '.join(parameters)} |"


def yaml_text(default: Any) -> str:
    return default if isinstance(default, str) else json.dumps(default)


if __name__ == "__main__":
    rewrite(DOCS, BEGIN, END, tables(), "the signatures")
