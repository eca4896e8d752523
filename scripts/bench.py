"""Time merges of synthetic checkpoints against the floor of reading the inputs and writing the output, and a peer.

    python scripts/bench.py WORK [--size 1.1B] [--experts 2 3 6] [--runs 3] [--only ties,obim] [--out benchmarks/NAME]
                                 [--device cuda] [--mergekit PATH/TO/mergekit-yaml --peer-runs 1]

WORK holds the checkpoints (made there by `synthesize.py` if they are not yet) and the outputs. In every round all
scenarios run one after another as processes of their own, the floor before each, on inputs that are in the page cache
as far as it holds them; the peer runs in the first `--peer-runs` rounds. Reported are medians, the ratio to the median
floor of the same round, and CPU time and peak resident memory of the whole process, Python's start and imports
included, with what torch took of the fullest GPU. Before the first round one merge hashes the inputs, as the first
merge of any checkpoint does; its time is told too. On a GPU, with the shapes of a 7B model and files in memory (68 GB):

    python scripts/bench.py /dev/shm/bench --size 7B --device cuda --only linear,ties,obim --out benchmarks/merges-7B

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
from merger.ops import kernels

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
    experts: int
    round: int
    wall: float  # seconds
    cpu: float
    peak: int  # bytes
    device: int  # bytes that torch had of the fullest GPU
    exit: int


def timed(command: list[str], tool: str, scenario: str, experts: int, number: int, log: Path, **env: str) -> Run:
    """Runs a command and has the operating system's own account of it, and what a merge says of the device."""
    with log.open("ab") as output:
        log_size = output.tell()
        began = time.monotonic()
        process = subprocess.Popen(command, stdout=output, stderr=output, env={**os.environ, **env})
        _, status, used = os.wait4(process.pid, 0)
        wall = time.monotonic() - began
    process.returncode = os.waitstatus_to_exitcode(status)  # it was waited for here
    report_lines = [line for line in log.read_bytes()[log_size:].splitlines() if line.startswith(b"{")]
    report = json.loads(report_lines[-1]) if report_lines else {}
    device = report.get("peak_device_memory_bytes", 0)
    peak = report.get("peak_memory_bytes", used.ru_maxrss * 1024)  # of the peer, but no less than this process's own
    cpu = used.ru_utime + used.ru_stime
    return Run(tool, scenario, experts, number, wall, cpu, peak, device, process.returncode)


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
    from merger.calibration import Settings
    from merger.calibration import statistics_files as files
    from merger.calibration.moments import Moments
    from merger.calibration.origins import fingerprint
    from merger.calibration.settings import ForwardPass
    from merger.calibration.statistics import layers

    plan = merger.plan(merger.Recipe.parse({**recipe, "method": "linear"}))
    calibrated_plan = merger.plan(merger.Recipe.parse({**recipe, "method": "obim", "calibration": {"data": str(HERE)}}))
    paths = {}
    for name in recipe["experts"]:
        path = folder / f"{name}.stats.safetensors"
        paths[name] = str(path)
        if path.exists():
            continue
        generator = torch.Generator().manual_seed(len(paths))
        moments = {}
        for layer in layers(calibrated_plan, name):
            columns = plan.models[name].tensors[layer].matrix[1]
            mean = torch.randn(columns, generator=generator)
            moments[layer] = Moments(torch.tensor(1000), mean.square() + mean.exp(), mean)
        model = plan.models[name]
        key = files.StatisticsKey(fingerprint(model), "", "", Settings(), ForwardPass.of(model, "cpu"))
        files.save(path, moments, key)
    return paths


def ours(work: Path, experts: int, device: str, scenario: str) -> list[str]:
    """The command of a merge."""
    recipe: dict[str, Any] = {
        "base": str(work / "base"),
        "experts": {f"e{i}": str(work / f"expert{i}") for i in range(1, experts + 1)},
        "output": {"path": str(work / "merged")},
    }
    if scenario == "obim":
        recipe["calibration"] = {"stats": statistics_of(recipe, work)}
    path = work / f"{scenario.replace(', ', '-')}-{experts}.yaml"
    path.write_text(yaml.safe_dump({**recipe, **SCENARIOS[scenario]}, sort_keys=False))
    return [sys.executable, "-m", "merger", "run", str(path), "--force", "--quiet", "--json", "--device", device]


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


def table(runs: list[Run], moved: int) -> list[str]:
    """Medians over the rounds of one number of experts, as Markdown; ``moved`` bytes are read and written at least."""
    floor_runs = [run for run in runs if run.tool == "floor"]
    floors = {
        n: statistics.median(run.wall for run in floor_runs if run.round == n)
        for n in {run.round for run in floor_runs}
    }
    floor_ = statistics.median(run.wall for run in floor_runs)
    lines = [
        "| scenario | tool | wall | of the floor | GB/s | mergekit takes | CPU | peak memory | of a GPU | runs |",
        "|---|---|---|---|---|---|---|---|---|---|",
        f"| floor | | {floor_:.2f} s | 1 | {moved / floor_ / 1e9:.2f} | | | | | {len(floor_runs)} |",
    ]
    for scenario in SCENARIOS:
        peer = {run.round: run.wall for run in _of(runs, "mergekit", scenario) if run.exit == 0}
        for tool in ("merger", "mergekit"):
            tool_runs = _of(runs, tool, scenario)
            good = [run for run in tool_runs if run.exit == 0]
            if good:
                lines.append(f"| {scenario} | {tool} | {_cells(good, floors, peer, moved)} |")
            elif tool_runs:
                failure = f"failed with exit code {tool_runs[0].exit}"
                lines.append(f"| {scenario} | {tool} | {failure} | | | | | | | {len(tool_runs)} |")
    return lines


def _of(runs: list[Run], tool: str, scenario: str) -> list[Run]:
    return [run for run in runs if (run.tool, run.scenario) == (tool, scenario)]


def _cells(runs: list[Run], floors: dict[int, float], peer: dict[int, float], moved: int) -> str:
    """A row from the wall on: medians, but of memory the most."""
    median = statistics.median
    wall, ratio = median(run.wall for run in runs), median(run.wall / floors[run.round] for run in runs)
    against = [peer[run.round] / run.wall for run in runs if run.round in peer and run.tool == "merger"]
    times = f"{median(against):.1f} times as long" if against else ""
    cpu, peak, device = median(run.cpu for run in runs), max(run.peak for run in runs), max(run.device for run in runs)
    gpu = f"{device / 1e6:,.0f} MB" if device else ""
    speed = moved / wall / 1e9
    return (
        f"{wall:.1f} s | {ratio:.1f} | {speed:.2f} | {times} | {cpu:.1f} s | {peak / 1e6:,.0f} MB | {gpu} | {len(runs)}"
    )


def hardware(device: str) -> str:
    """The machine and the versions, in a sentence."""
    gpus = range(torch.cuda.device_count()) if device != "cpu" and torch.cuda.is_available() else []
    names = "".join(f"{torch.cuda.get_device_name(i)}, " for i in gpus)
    loops = "compiled loops" if kernels.compiled() else "no compiled loops"
    return (
        f"{names}{os.cpu_count()} CPUs ({_processor()}), {platform.system()}, Python {platform.python_version()}, "
        f"torch {torch.__version__}, transformers {transformers.__version__}, merger {merger.__version__}, {loops}."
    )


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def report(args: argparse.Namespace, runs: list[Run], first: Run) -> str:
    """The page, of what has run so far."""
    counts = " ".join(map(str, args.experts))
    flags = f"--size {args.size} --experts {counts} --runs {args.runs} --device {args.device}"
    lines = [
        f"# Merges of base and experts of {args.size} parameters",
        "",
        f"`python scripts/bench.py WORK {flags}`; bf16, page cache warm where it fits.",
        hardware(args.device),
        "The floor reads every input byte once and writes and syncs the output's bytes.",
    ]
    for experts in args.experts:
        expert_runs = [run for run in runs if run.experts == experts]
        if expert_runs:
            moved = size_of([*models_of(args.work, experts), args.work / "base"])
            lines += ["", f"## Base + {experts} experts", "", *table(expert_runs, moved)]
    lines += ["", f"First merge of these files (linear), which hashes the inputs too: {first.wall:.1f} s."]
    return "\n".join(lines) + "\n"


def stored(stem: Path, page: str, runs: list[Run]) -> None:
    """Writes OUT.md and OUT.json, which holds every run."""
    Path(f"{stem}.md").write_text(page)
    Path(f"{stem}.json").write_text(json.dumps([asdict(run) for run in runs], indent=1) + "\n")


def models_of(work: Path, experts: int) -> list[Path]:
    """The folders of the base and so many experts."""
    return [work / name for name in ("base", *(f"expert{i}" for i in range(1, experts + 1)))]


def size_of(models: list[Path]) -> int:
    """Bytes of all their weights."""
    return sum(file.stat().st_size for model in models for file in model.glob("*.safetensors"))


def one_round(args: argparse.Namespace, experts: int, number: int, scenarios: list[str], cache: Path) -> Iterator[Run]:
    """Every scenario by each tool, with the floor before it."""
    log, scratch, merged = args.work / "log.txt", args.work / "floor", args.work / "merged"
    for name in scenarios:
        began = time.monotonic()
        floor(models_of(args.work, experts), scratch)
        yield Run("floor", name, experts, number, time.monotonic() - began, 0, 0, 0, 0)
        scratch.unlink()
        command = ours(args.work, experts, args.device, name)
        yield timed(command, "merger", name, experts, number, log, MERGER_CACHE=str(cache))
        shutil.rmtree(merged, ignore_errors=True)
        if args.mergekit and name in PEER and number < args.peer_runs:
            yield timed(peers(args.mergekit, args.work, experts, name), "mergekit", name, experts, number, log)
            shutil.rmtree(merged, ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--size", choices=synthesize.SIZES, default="1.1B")
    parser.add_argument("--experts", nargs="+", type=int, default=[3])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--only", default=",".join(SCENARIOS).replace(", ", " "))
    parser.add_argument("--device", default="cpu", help="what the merges run on, as merger run takes it")
    parser.add_argument("--mergekit", metavar="PROGRAM", help="mergekit-yaml of an environment of its own")
    parser.add_argument("--peer-runs", type=int, default=1)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    max_experts = max(args.experts)
    for i, model in enumerate(models_of(args.work, max_experts)):
        if not model.exists():
            synthesize.write(model, args.size, i, 5_000_000_000)
    scenarios = [name for name in SCENARIOS if name.replace(", ", " ") in args.only.split(",")]
    cache, log = args.work / "cache", args.work / "log.txt"
    shutil.rmtree(cache, ignore_errors=True)
    linear = ours(args.work, max_experts, args.device, "linear")
    first = timed(linear, "merger", "linear", max_experts, -1, log, MERGER_CACHE=str(cache))
    runs: list[Run] = []
    for number in range(args.runs):
        for experts in args.experts:
            for run in one_round(args, experts, number, scenarios, cache):
                print(run, flush=True)
                runs.append(run)
        page = report(args, runs, first)  # after every round, for a long bench may be stopped
        if args.out:
            stored(args.out, page, [first, *runs])
    print(page)


if __name__ == "__main__":
    main()
