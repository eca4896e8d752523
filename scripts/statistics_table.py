"""Writes the table of `merger inspect`'s statistics in docs/inspect.md from their declarations.

python scripts/statistics_table.py            # rewrites the table
python scripts/statistics_table.py --check    # exits with 1 if the table differs
"""

from pathlib import Path

from generated import rewrite

from merger.inspection.statistic import Statistic, statistics

DOCS = Path(__file__).parents[1] / "docs" / "inspect.md"
BEGIN, END = "<!-- statistics: written by scripts/statistics_table.py -->\n", "<!-- end of statistics -->\n"


def table() -> str:
    rows = ["| metric | of | unit | what it is | formula |", "|---|---|---|---|---|"]
    rows += [row(entry, entry.form.about) for entry in statistics("experts")]
    rows += [row(entry, about_result(entry)) for entry in statistics("merged")]
    return "\n".join(rows) + "\n"


def about_result(entry: Statistic) -> str:
    return "the result" if entry.form.about == "the model" else f"the result and {entry.form.about}"


def row(entry: Statistic, about: str) -> str:
    option = f" With `--{entry.request}`." if entry.request else ""
    formula = entry.formula.replace("|", "\\|")
    return f"| `{entry.name}` | {about} | {entry.unit} | {entry.explanation}{option} | {formula} |"


if __name__ == "__main__":
    rewrite(DOCS, BEGIN, END, table(), "the declared statistics")
