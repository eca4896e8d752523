"""Measure how a merge's cost grows with parameters and with experts, and fit lines through it.

    python scripts/growth.py WORK [--only linear,ties] [--sizes 0.1B 0.2B 0.4B 0.8B] [--experts 1 2 3 4 5 6]
                                  [--at 0.2B] [--runs 3] [--device cpu] [--out benchmarks/NAME]

Every size is merged with three experts, and the size `--at` with each number of experts. In every round all of them
run one after another as processes of their own, on inputs in the page cache whose hashes are known; a merge of next to
nothing tells the start-up. Through the medians goes the line of least squares. The exponent is the slope of the line
through the logarithms after the start-up was taken off: that of the merge of next to nothing for parameters; for
experts the line's own value at none, for base and output are there without any. The default takes about 15 GB.
"""

from __future__ import annotations

import argparse
import math
import shutil
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import bench
import numpy
import synthesize

EXPERTS = 3


@dataclass(frozen=True)
class Case:
    """One merge to measure."""

    scenario: str
    size: str
    experts: int

    @property
    def parameters(self) -> float:
        """Parameters of one model, in billions."""
        return sum(math.prod(shape) for shape in synthesize.shapes(self.size).values()) / 1e9


@dataclass(frozen=True)
class Fit:
    """The line of least squares, and how far from it the values are."""

    intercept: float
    slope: float
    residuals: list[float]  # of the line's value
    steps: list[float]  # from each value to the next, as shares of the slope

    @classmethod
    def through(cls, places: Sequence[float], values: Sequence[float]) -> Fit:
        slope, intercept = map(float, numpy.polyfit(places, values, 1))
        residuals = [value / (intercept + slope * place) - 1 for place, value in zip(places, values, strict=True)]
        steps = [float(step) / slope for step in numpy.diff(values) / numpy.diff(places)]
        return cls(intercept, slope, residuals, steps)


def exponent(places: Sequence[float], values: Sequence[float], start: float) -> float:
    """The slope of the line through the logarithms of places and of what values have above ``start``."""
    return float(numpy.polyfit(numpy.log(places), numpy.log(numpy.array(values) - start), 1)[0])


def made(work: Path, size: str, experts: int) -> None:
    """Makes the checkpoints that are not there."""
    for i in range(experts + 1):
        path = work / size / (f"expert{i}" if i else "base")
        if not path.exists():
            synthesize.write(path, size, i, 5_000_000_000)


def section(
    title: str, unit: str, cases: list[Case], place: Callable[[Case], float], runs: list[bench.Run], start: Case | None
) -> list[str]:
    """A table of medians and its fit, as Markdown."""
    medians = {each: statistics.median(run.wall for run in runs if run.scenario == name(each)) for each in cases}
    places, values = [place(each) for each in cases], list(medians.values())
    fit = Fit.through(places, values)
    none = fit.intercept if start is None else statistics.median(r.wall for r in runs if r.scenario == name(start))
    power = exponent(places, values, none)
    lines = [
        f"## {title}",
        "",
        f"| {unit} | wall | the line | off by | step to it, of the slope |",
        "|---|---|---|---|---|",
    ]
    for place_, value, off, step in zip(places, values, fit.residuals, [None, *fit.steps], strict=True):
        on = fit.intercept + fit.slope * place_
        told = "" if step is None else f"{step:.2f}"
        lines.append(f"| {place_:g} | {value:.2f} s | {on:.2f} s | {off:+.1%} | {told} |")
    lines += [
        "",
        f"wall = {fit.intercept:.2f} s + {fit.slope:.3f} s x {unit}; without {none:.2f} s of start-up it grows "
        f"with the power {power:.3f}.",
        "",
    ]
    return lines


def name(case: Case) -> str:
    """What a run is known by."""
    return f"{case.scenario} {case.size} x {case.experts}"


def page(given: argparse.Namespace, cases: list[Case], runs: list[bench.Run]) -> str:
    """All fits."""
    lines = [
        "# How the cost of a merge grows",
        "",
        f"`python scripts/growth.py WORK --sizes {' '.join(given.sizes)} --experts {' '.join(map(str, given.experts))} "
        f"--at {given.at} --runs {given.runs} --device {given.device}`; medians of {given.runs} rounds.",
        bench.hardware(given.device),
        "",
    ]
    for scenario in given.only.split(","):
        own = [each for each in cases if each.scenario == scenario]
        sizes = [each for each in own if each.experts == EXPERTS and each.size in given.sizes]
        several = [each for each in own if each.size == given.at and each.experts in given.experts]
        start = Case(scenario, "tiny", EXPERTS)
        lines += section(
            f"{scenario}: parameters, {EXPERTS} experts", "billions", sizes, lambda each: each.parameters, runs, start
        )
        lines += section(
            f"{scenario}: experts of {given.at}", "experts", several, lambda each: each.experts, runs, None
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--only", default="linear,ties")
    parser.add_argument("--sizes", nargs="+", choices=synthesize.SIZES, default=["0.1B", "0.2B", "0.4B", "0.8B"])
    parser.add_argument("--experts", nargs="+", type=int, default=[1, 2, 3, 4, 5, 6])
    parser.add_argument("--at", choices=synthesize.SIZES, default="0.2B")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--device", default="cpu", help="what the merges run on, as merger run takes it")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()

    pairs = [("tiny", EXPERTS), *((size, EXPERTS) for size in given.sizes), *((given.at, k) for k in given.experts)]
    by_size = sorted(set(pairs), key=lambda pair: (Case("", *pair).parameters, pair[1]))
    cases = [Case(scenario, *pair) for scenario in given.only.split(",") for pair in by_size]
    for each in cases:
        made(given.work, each.size, each.experts)
    log, cache = given.work / "log.txt", str(given.work / "cache")

    def run(case: Case, number: int) -> bench.Run:
        command = bench.ours(given.work / case.size, case.experts, given.device, case.scenario)
        ran = bench.timed(command, "merger", name(case), case.experts, number, log, MERGER_CACHE=cache)
        shutil.rmtree(given.work / case.size / "merged", ignore_errors=True)
        return ran

    most = {each.size: max(other.experts for other in cases if other.size == each.size) for each in cases}
    for size, experts in most.items():
        run(Case("linear", size, experts), -1)  # reads and hashes the inputs
    runs = []
    for number in range(given.runs):
        for each in cases:
            runs.append(run(each, number))
            print(runs[-1], flush=True)
    if any(each.exit for each in runs):
        raise SystemExit(f"a merge failed; {log} says why")
    text = page(given, cases, runs)
    if given.out:
        bench.stored(given.out, text, runs)
    print(text)


if __name__ == "__main__":
    main()
