"""Draws the pictures of README and docs from the tables of benchmarks/.

python scripts/docs_pictures.py            # writes docs/pictures/
python scripts/docs_pictures.py --check    # exits with 1 if a picture differs from its table
"""

import re
import sys
from pathlib import Path

from merger.charts import Bar, BarChart, in_row
from merger.charts.svg import adaptive

ROOT = Path(__file__).parents[1]
BENCHMARK = ROOT / "benchmarks" / "regression-135M_202611.md"
PICTURE = ROOT / "docs" / "pictures" / "share-kept.svg"
NEEDS = {
    "featcal": "20 texts of each expert",
    "distill": "20 texts of each expert",
    "regmean": "20 texts of each expert",
    "wudi_svc": "weights alone",
    "wudi": "weights alone",
    "linear": "the plain average",
    "task_arithmetic": "the plain sum",
}


def share_kept() -> BarChart:
    """The share of the experts' gains that each method keeps by its defaults, most first."""
    table = BENCHMARK.read_text(encoding="utf-8").partition("## Defaults")[2].partition("\n## ")[0]
    pattern = re.compile(r"^\| (\w+) \|.*\| ([\d.]+) to ([\d.]+) \| ([\d.]+) \|$", re.MULTILINE)
    rows = sorted(pattern.findall(table), key=lambda row: -float(row[3]))
    return BarChart(
        title="What a merge keeps of three fine-tunes' gains",
        caption="A 135M model with fine-tunes for code, French and WordNet; methods by their defaults. 1 is what each "
        "fine-tune gains on its own held-out text, 0 is the base. Lines: 95 % intervals, 40 texts of each.",
        x_label="share of the gains kept, mean over the three",
        rows=[f"{method} ({NEEDS[method]})" for method, *_ in rows],
        series={"share kept": [Bar(float(share), float(low), float(high)) for _, low, high, share in rows]},
    )


def main() -> None:
    chart = share_kept()
    label = f"{chart.title}: " + ", ".join(
        f"{row} {bar.value}" for row, bar in zip(chart.rows, chart.series["share kept"], strict=True) if bar
    )
    picture = adaptive(in_row([chart.titled()]), label)
    if "--check" not in sys.argv[1:]:
        PICTURE.parent.mkdir(exist_ok=True)
        PICTURE.write_text(picture, encoding="utf-8")
    elif picture != PICTURE.read_text(encoding="utf-8"):
        sys.exit(f"{PICTURE} differs from {BENCHMARK.name}; run python scripts/{Path(__file__).name}")


main()
