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
    medians = {case: statistics.median(run.wall for run in runs if run.scenario == name(case)) for case in cases}
    places, values = [place(case) for case in cases], list(medians.values())
    fit = Fit.through(places, values)
    start_up = fit.intercept if start is None else statistics.median(r.wall for r in runs if r.scenario == name(start))
    power = exponent(places, values, start_up)
    lines = [
        f"## {title}",
        "",
        f"| {unit} | wall | the line | off by | step to it, of the slope |",
        "|---|---|---|---|---|",
    ]
    for place_, value, off, step in zip(places, values, fit.residuals, [None, *fit.steps], strict=True):
        on = fit.intercept + fit.slope * place_
        step_text = "" if step is None else f"{step:.2f}"
        lines.append(f"| {place_:g} | {value:.2f} s | {on:.2f} s | {off:+.1%} | {step_text} |")
    lines += [
        "",
        f"wall = {fit.intercept:.2f} s + {fit.slope:.3f} s x {unit}; without {start_up:.2f} s of start-up it grows "
        f"with the power {power:.3f}.",
        "",
    ]
    return lines


def name(case: Case) -> str:
    """What a run is known by."""
    return f"{case.scenario} {case.size} x {case.experts}"


def page(args: argparse.Namespace, cases: list[Case], runs: list[bench.Run]) -> str:
    """All fits."""
    lines = [
        "# How the cost of a merge grows",
        "",
        f"`python scripts/growth.py WORK --sizes {' '.join(args.sizes)} --experts {' '.join(map(str, args.experts))} "
        f"--at {args.at} --runs {args.runs} --device {args.device}`; medians of {args.runs} rounds.",
        bench.hardware(args.device),
        "",
    ]
    for scenario in args.only.split(","):
        scenario_cases = [case for case in cases if case.scenario == scenario]
        sizes = [case for case in scenario_cases if case.experts == EXPERTS and case.size in args.sizes]
        expert_cases = [case for case in scenario_cases if case.size == args.at and case.experts in args.experts]
        start = Case(scenario, "tiny", EXPERTS)
        lines += section(
            f"{scenario}: parameters, {EXPERTS} experts", "billions", sizes, lambda case: case.parameters, runs, start
        )
        lines += section(
            f"{scenario}: experts of {args.at}", "experts", expert_cases, lambda case: case.experts, runs, None
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
    args = parser.parse_args()

    pairs = [
        ("tiny", EXPERTS),
        *((size, EXPERTS) for size in args.sizes),
        *((args.at, k) for k in args.experts),
    ]
    by_size = sorted(set(pairs), key=lambda pair: (Case("", *pair).parameters, pair[1]))
    cases = [Case(scenario, *pair) for scenario in args.only.split(",") for pair in by_size]
    for case in cases:
        made(args.work, case.size, case.experts)
    log, cache = args.work / "log.txt", str(args.work / "cache")

    def run(timed_case: Case, number: int) -> bench.Run:
        command = bench.ours(args.work / timed_case.size, timed_case.experts, args.device, timed_case.scenario)
        ran = bench.timed(command, "merger", name(timed_case), timed_case.experts, number, log, MERGER_CACHE=cache)
        shutil.rmtree(args.work / timed_case.size / "merged", ignore_errors=True)
        return ran

    max_experts = {case.size: max(peer.experts for peer in cases if peer.size == case.size) for case in cases}
    for size, experts in max_experts.items():
        run(Case("linear", size, experts), -1)  # reads and hashes the inputs
    runs = []
    for number in range(args.runs):
        for case in cases:
            runs.append(run(case, number))
            print(runs[-1], flush=True)
    if any(case.exit for case in runs):
        raise SystemExit(f"a merge failed; {log} says why")
    text = page(args, cases, runs)
    if args.out:
        bench.stored(args.out, text, runs)
    print(text)


if __name__ == "__main__":
    main()
