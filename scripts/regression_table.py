"""Compare the defaults of data-free and regression methods on a real model, with intervals.

    python scripts/regression_table.py ZOO DATA --out benchmarks/NAME [--report 40] [--skip 16] [--only TEXT]

ZOO holds `base` and the experts `code`, `french`, `wordnet`; DATA holds NAME.calibration.jsonl and NAME.heldout.jsonl
for each. Nothing is chosen: every row is a method's defaults, or one change of them. The loss is the token-mean
cross-entropy of the first 256 tokens of each held-out text, of which the first ``--skip`` are left to searches.
The share kept of an expert's gain is (base - merged) / (base - expert) on its domain; a row's figure is the mean over
its experts, with the 95 % interval of 2,000 resamplings of the texts of each domain.
Each finished row is appended to NAME.jsonl, so that a run that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from zoo_table import DOMAINS, TOKENS, Judge, texts

import merger

Losses = dict[str, list[tuple[float, int]]]
"""By domain: the summed cross-entropy and the tokens of each text."""
WITHOUT_TEXT = ("linear", "task_arithmetic", "wudi", "wudi_svc", "fr", "awd", "doge")
LOSS = {"objective": "loss", "steps": 30, "rate": 0.03}


@dataclass(frozen=True)
class Row:
    """A merge by a method's defaults but for ``parameters``."""

    title: str
    method: str
    parameters: Mapping[str, Any] = field(default_factory=dict)
    samples: int = 20
    experts: tuple[str, ...] = DOMAINS


ROWS: dict[str, list[Row]] = {
    "Defaults, with 20 texts of each expert where a method takes text": [
        Row("distill", "distill"),
        Row("featcal", "featcal"),
        Row("wudi_svc", "wudi_svc"),
        Row("regmean", "regmean"),
        Row("wudi with head: true", "wudi", {"head": True}),
        Row("wudi", "wudi"),
        Row("task_arithmetic", "task_arithmetic"),
        Row("linear", "linear"),
    ],
    "FeatCal: two experts, and fewer or more texts": [
        Row("code and french", "featcal", experts=("code", "french")),
        Row("5 texts", "featcal", samples=5),
        Row("100 texts", "featcal", samples=100),
        Row("french and wordnet", "featcal", experts=("french", "wordnet")),
    ],
    "Learning block by block, 20 texts": [
        Row("distill, anchor: featcal", "distill", {"anchor": "featcal"}),
        Row("distill, steps: 90", "distill", {"steps": 90}),
        Row("prodistill", "prodistill"),
        Row("prodistill, per: row", "prodistill", {"per": "row"}),
    ],
    "Gradients through the whole model, 20 texts": [
        Row("fisher", "fisher"),
        Row("ugm", "ugm"),
        Row("adamerging", "adamerging"),
        Row("adamerging, objective: loss, steps: 30, rate: 0.03", "adamerging", LOSS),
    ],
    "More from the weights alone": [
        Row("fr", "fr"),
        Row("awd, lambda: 0.4", "awd", {"lambda": 0.4}),
        Row("doge", "doge"),
    ],
    "FeatCal: one part at a time, 5 texts": [
        Row("target: 0", "featcal", {"target": 0}, samples=5),
        Row("anchor: mean", "featcal", {"anchor": "mean"}, samples=5),
        Row("anchor: mean, stretch: fit", "featcal", {"anchor": "mean", "stretch": "fit"}, samples=5),
        Row("stretch: fit", "featcal", {"stretch": "fit"}, samples=5),
        Row(
            "regmean with the same ridge and anchor: own inputs",
            "regmean",
            {"alpha": 1, "normalize": "frobenius", "ridge": 0.05, "anchor": "wudi_svc"},
            samples=5,
        ),
        Row(
            "the same without normalize",
            "regmean",
            {"alpha": 1, "ridge": 0.05, "anchor": "wudi_svc"},
            samples=5,
        ),
    ],
}


class Table:
    """The rows found so far; one that is on record is not computed again."""

    def __init__(self, zoo: Path, data: Path, record: Path, skip: int, report: int) -> None:
        self.zoo, self.data, self.record = zoo, data, record
        self.judge = Judge(zoo / "base", torch.float32)
        self.held_out = {d: self.judge.tokens(texts(data, d)[skip : skip + report]) for d in DOMAINS}
        self.lines: dict[str, dict[str, Any]] = {}
        if record.exists():
            entries = [json.loads(line) for line in record.read_text().splitlines()]
            self.lines = {entry["key"]: entry for entry in entries}

    def model(self, name: str) -> Losses:
        """The losses of the base on all domains, or of an expert on its own."""
        held_out = self.held_out if name == "base" else {name: self.held_out[name]}
        return self._entry(name, lambda: self.judge.text_losses(self.zoo / name, held_out))

    def merge(self, row: Row) -> Losses:
        """The losses of a merge, on the domains of its experts."""

        def compute() -> Losses:
            with tempfile.TemporaryDirectory() as folder:
                output = Path(folder) / "merged"
                merger.merge(self._recipe(row, output))
                return self.judge.text_losses(output, {domain: self.held_out[domain] for domain in row.experts})

        parameters = json.dumps(dict(row.parameters), sort_keys=True)
        return self._entry(f"{row.method} {parameters} {row.samples} {' '.join(row.experts)}", compute)

    def _recipe(self, row: Row, output: Path) -> merger.Recipe:
        content: dict[str, Any] = {
            "base": str(self.zoo / "base"),
            "experts": {name: str(self.zoo / name) for name in row.experts},
            "method": row.method,
            "parameters": dict(row.parameters),
            "output": {"path": str(output)},
        }
        if row.method not in WITHOUT_TEXT:
            sources = {name: str(self.data / f"{name}.calibration.jsonl") for name in row.experts}
            content["calibration"] = {"data": sources, "samples": row.samples, "max_tokens": TOKENS}
        return merger.Recipe.parse(content)

    def _entry(self, key: str, compute: Any) -> Losses:
        if key not in self.lines:
            began = time.monotonic()
            self.lines[key] = {"key": key, "losses": compute(), "seconds": round(time.monotonic() - began, 1)}
            with self.record.open("a") as file:
                file.write(json.dumps(self.lines[key]) + "\n")
            print(key, self.lines[key]["seconds"], flush=True)
        losses: Losses = self.lines[key]["losses"]
        return losses

    def text(self, row: Row) -> str:
        """A row in Markdown."""
        losses = self.merge(row)
        references = {d: (self.model("base")[d], self.model(d)[d]) for d in row.experts}
        shares = {d: share(losses[d], *references[d]) for d in row.experts}
        cells = " | ".join(f"{shares[d]:.3f}" if d in shares else "" for d in DOMAINS)
        low, high = interval(losses, references)
        return f"| {row.title} | {cells} | {low:.3f} to {high:.3f} | {sum(shares.values()) / len(shares):.3f} |"


def mean_loss(rows: Sequence[tuple[float, int]]) -> float:
    """The token-mean cross-entropy of texts."""
    return sum(total for total, _ in rows) / sum(count for _, count in rows)


def share(
    merged: Sequence[tuple[float, int]], base: Sequence[tuple[float, int]], expert: Sequence[tuple[float, int]]
) -> float:
    """The share of an expert's gain that a merge keeps."""
    return (mean_loss(base) - mean_loss(merged)) / (mean_loss(base) - mean_loss(expert))


def interval(losses: Losses, references: Mapping[str, tuple[Any, Any]]) -> tuple[float, float]:
    """The 95 % interval of the mean share, from resampled texts, the same ones for base, expert and merge."""
    draw, means = random.Random(0), []
    for _ in range(2000):
        shares = []
        for domain, (base, expert) in references.items():
            picked = draw.choices(range(len(base)), k=len(base))
            shares.append(share(*([rows[i] for i in picked] for rows in (losses[domain], base, expert))))
        means.append(sum(shares) / len(shares))
    means.sort()
    return means[50], means[1949]


def report(table: Table, only: str) -> Iterator[str]:
    """The tables, in Markdown."""
    for title, rows in ROWS.items():
        if only in title:
            yield f"\n## {title}\n\n| merge | {' | '.join(DOMAINS)} | 95 % | share kept |\n|---|---|---|---|---|---|"
            yield from (table.text(row) for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("zoo", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--report", type=int, default=40)
    parser.add_argument("--skip", type=int, default=16)
    parser.add_argument("--only", default="", help="compute the tables whose title has this text")
    args = parser.parse_args()
    table = Table(args.zoo.resolve(), args.data.resolve(), args.out.with_suffix(".jsonl"), args.skip, args.report)
    lines = list(report(table, args.only))
    args.out.with_suffix(".md").write_text(
        f"# What regression and data-free methods keep of a real model's fine-tunes\n\n"
        f"`python scripts/regression_table.py ZOO DATA --out {args.out.name} --report {args.report} "
        f"--skip {args.skip}`, merger {merger.__version__}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}, {platform.machine()} CPU, {os.cpu_count()} cores. "
        f"{args.report} held-out texts a domain (first {TOKENS} tokens) that chose nothing, in float32.\n"
        + "\n".join(lines)
        + "\n"
    )


if __name__ == "__main__":
    main()
