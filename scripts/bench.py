"""Time merges of synthetic checkpoints against the floor of reading the inputs and writing the output, and a peer.

    python scripts/bench.py WORK [--size 1.1B] [--experts 3] [--runs 3] [--only ties,obim] [--out benchmarks/NAME]
                                 [--mergekit PATH/TO/mergekit-yaml --peer-runs 1]

WORK holds the checkpoints (made there by `synthesize.py` if they are not yet) and the outputs. In every round the
floor and all scenarios run one after another as processes of their own, on inputs that are in the page cache as far as
it holds them; the peer runs in the first `--peer-runs` rounds. Reported are medians, the ratio to the floor of the same
round, and CPU time and peak resident memory of the whole process, Python's start and imports included. Before the
first round one merge hashes the inputs, as the first merge of any checkpoint does; its time is told too.
NAME.json holds every run, failures included, and NAME.md the table.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import synthesize
import torch
import transformers
import yaml

import merger
from merger import kernels

HERE = Path(__file__).parent
TIES = {"density": 0.2, "lambda": 1}
SCENARIOS: dict[str, dict[str, Any]] = {
    "linear": {"method": "linear"},
    "ties": {"method": "ties", "parameters": {**TIES, "scope": "tensor"}},
    "ties, global": {"method": "ties", "parameters": {**TIES, "scope": "global"}},
    "dare_ties": {"method": "dare_ties", "parameters": {"density": 0.5}},
    "della": {"method": "della", "parameters": {"density": 0.5, "lambda": 1}},
    "breadcrumbs": {"method": "breadcrumbs", "parameters": {"drop_low": 0.5, "lambda": 1}},
    "cabs": {"method": "cabs", "parameters": {"n": 64, "m": 256}},
    "obim": {"method": "obim"},
}
PEER: dict[str, dict[str, Any]] = {
    "linear": {"merge_method": "linear"},
    "ties": {"merge_method": "ties", "density": 0.2},
    "dare_ties": {"merge_method": "dare_ties", "density": 0.5},
    "della": {"merge_method": "della", "density": 0.5, "epsilon": 0.14},
    "breadcrumbs": {"merge_method": "breadcrumbs", "density": 0.49, "gamma": 0.01},
}


@dataclass(frozen=True)
class Run:
    """One process."""

    tool: str
    scenario: str
    round: int
    wall: float  # seconds
    cpu: float
    peak: int  # bytes
    exit: int


def timed(command: list[str], tool: str, scenario: str, number: int, log: Path, **env: str) -> Run:
    """Runs a command and has the operating system's own account of it."""
    with log.open("ab") as output:
        began = time.monotonic()
        process = subprocess.Popen(command, stdout=output, stderr=output, env={**os.environ, **env})
        _, status, used = os.wait4(process.pid, 0)
        wall = time.monotonic() - began
    process.returncode = os.waitstatus_to_exitcode(status)  # it was waited for here
    return Run(tool, scenario, number, wall, used.ru_utime + used.ru_stime, used.ru_maxrss * 1024, process.returncode)


def floor(models: list[Path], output: Path) -> None:
    """Reads every input byte once and writes as many as the base has, put on disk as a merge puts them there."""
    buffer = memoryview(bytearray(1 << 20))
    with output.open("wb", buffering=0) as copy:
        for model in models:
            for file in sorted(model.glob("*.safetensors")):
                with file.open("rb", buffering=0) as source:
                    while count := source.readinto(buffer):
                        if model is models[0]:
                            copy.write(buffer[:count])
        os.fsync(copy.fileno())


def statistics_of(recipe: dict[str, Any], folder: Path) -> dict[str, str]:
    """A statistics file for each expert, with second moments as spread as those of real activations."""
    from merger.calibration import Settings, files
    from merger.calibration.moments import Moments
    from merger.statistics import fingerprint, layers

    plan = merger.plan(merger.Recipe.parse({**recipe, "method": "linear"}))
    wanted = merger.plan(merger.Recipe.parse({**recipe, "method": "obim", "calibration": {"data": str(HERE)}}))
    found = {}
    for name in recipe["experts"]:
        path = folder / f"{name}.stats.safetensors"
        found[name] = str(path)
        if path.exists():
            continue
        generator = torch.Generator().manual_seed(len(found))
        moments = {}
        for layer in layers(wanted, name):
            columns = plan.models[name].tensors[layer].matrix[1]
            mean = torch.randn(columns, generator=generator)
            moments[layer] = Moments(torch.tensor(1000), mean.square() + mean.exp(), mean)
        files.save(path, moments, files.Key(fingerprint(plan.models[name]), "", "", Settings()))
    return found


def ours(work: Path, experts: int, device: str, scenario: str) -> list[str]:
    """The command of a merge."""
    recipe: dict[str, Any] = {
        "base": str(work / "base"),
        "experts": {f"e{i}": str(work / f"expert{i}") for i in range(1, experts + 1)},
        "output": {"path": str(work / "merged")},
    }
    if scenario == "obim":
        recipe["calibration"] = {"stats": statistics_of(recipe, work)}
    path = work / f"{scenario.replace(', ', '-')}.yaml"
    path.write_text(yaml.safe_dump({**recipe, **SCENARIOS[scenario]}, sort_keys=False))
    return [sys.executable, "-m", "merger", "run", str(path), "--force", "--quiet", "--device", device]


def peers(program: str, work: Path, experts: int, scenario: str) -> list[str]:
    """mergekit's command for the same merge."""
    parameters = {key: value for key, value in PEER[scenario].items() if key != "merge_method"}
    models = [
        {"model": str(work / f"expert{i}"), "parameters": {"weight": 1.0, **parameters}} for i in range(1, experts + 1)
    ]
    config = {"merge_method": PEER[scenario]["merge_method"], "models": models, "dtype": "bfloat16"}
    if scenario != "linear":
        config["base_model"] = str(work / "base")
    path = work / f"{scenario}.mergekit.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    return [program, str(path), str(work / "merged"), "--no-copy-tokenizer", "--allow-crimes", "--no-write-model-card"]


def table(runs: list[Run], first: Run) -> list[str]:
    """Medians over the rounds, as Markdown."""
    floors = {run.round: run.wall for run in runs if run.tool == "floor"}
    median = statistics.median
    lines = ["| scenario | tool | wall | of the floor | CPU | peak memory | runs |", "|---|---|---|---|---|---|---|"]
    lines.append(f"| floor | | {median(floors.values()):.2f} s | 1 | | | {len(floors)} |")
    for scenario in SCENARIOS:
        for tool in ("merger", "mergekit"):
            own = [run for run in runs if (run.tool, run.scenario) == (tool, scenario)]
            good = [run for run in own if run.exit == 0]
            if own and not good:
                lines.append(f"| {scenario} | {tool} | failed with exit code {own[0].exit} | | | | {len(own)} |")
            if good:
                wall, ratio = median(r.wall for r in good), median(r.wall / floors[r.round] for r in good)
                cpu, peak = median(r.cpu for r in good), max(r.peak for r in good)
                cells = f"{wall:.1f} s | {ratio:.1f} | {cpu:.1f} s | {peak / 1e6:,.0f} MB | {len(good)}"
                lines.append(f"| {scenario} | {tool} | {cells} |")
    return [*lines, "", f"First merge of these files (linear), which hashes the inputs too: {first.wall:.1f} s."]


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def report(given: argparse.Namespace, runs: list[Run], first: Run) -> str:
    """The page."""
    flags = f"--size {given.size} --experts {given.experts} --runs {given.runs} --device {given.device}"
    loops = "compiled loops" if kernels.compiled() else "no compiled loops"
    head = [
        f"# Merges of base + {given.experts} experts of {given.size} parameters",
        "",
        f"`python scripts/bench.py WORK {flags}`; bf16, page cache warm where it fits.",
        f"{os.cpu_count()} CPUs ({_processor()}), {platform.system()}, Python {platform.python_version()}, "
        f"torch {torch.__version__}, transformers {transformers.__version__}, merger {merger.__version__}, {loops}.",
        "The floor reads every input byte once and writes and syncs the output's bytes.",
        "",
    ]
    return "\n".join([*head, *table(runs, first)]) + "\n"


def one_round(
    given: argparse.Namespace, number: int, models: list[Path], commands: dict[str, list[str]], cache: Path
) -> Iterator[Run]:
    """The floor, then every scenario by each tool."""
    log, scratch, merged = given.work / "log.txt", given.work / "floor", given.work / "merged"
    began = time.monotonic()
    floor(models, scratch)
    yield Run("floor", "", number, time.monotonic() - began, 0, 0, 0)
    scratch.unlink()
    for name, command in commands.items():
        yield timed(command, "merger", name, number, log, MERGER_CACHE=str(cache))
        if given.mergekit and name in PEER and number < given.peer_runs:
            shutil.rmtree(merged, ignore_errors=True)
            yield timed(peers(given.mergekit, given.work, given.experts, name), "mergekit", name, number, log)
    shutil.rmtree(merged, ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--size", choices=synthesize.SIZES, default="1.1B")
    parser.add_argument("--experts", type=int, default=3)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--only", default=",".join(SCENARIOS).replace(", ", " "))
    parser.add_argument("--device", default="cpu", help="what the merges run on, as merger run takes it")
    parser.add_argument("--mergekit", metavar="PROGRAM", help="mergekit-yaml of an environment of its own")
    parser.add_argument("--peer-runs", type=int, default=1)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()

    models = [given.work / name for name in ("base", *(f"expert{i}" for i in range(1, given.experts + 1)))]
    for i, model in enumerate(models):
        if not model.exists():
            synthesize.write(model, given.size, i, 5_000_000_000)
    log = given.work / "log.txt"
    wanted = [name for name in SCENARIOS if name.replace(", ", " ") in given.only.split(",")]
    commands = {name: ours(given.work, given.experts, given.device, name) for name in wanted}

    cache = given.work / "cache"
    shutil.rmtree(cache, ignore_errors=True)
    first = timed(
        ours(given.work, given.experts, given.device, "linear"), "merger", "linear", -1, log, MERGER_CACHE=str(cache)
    )
    runs: list[Run] = []
    for number in range(given.runs):
        for run in one_round(given, number, models, commands, cache):
            print(run, flush=True)
            runs.append(run)
        page = report(given, runs, first)  # after every round, for a long bench may be stopped
        if given.out:
            given.out.with_suffix(".md").write_text(page)
            rows = [asdict(run) for run in (first, *runs)]
            given.out.with_suffix(".json").write_text(json.dumps(rows, indent=1) + "\n")
    print(page)


if __name__ == "__main__":
    main()
