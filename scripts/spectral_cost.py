"""What TSV-M and Iso-C cost beside an implementation that takes a full SVD of every matrix.

    python scripts/spectral_cost.py [--shapes zoo 1.1B] [--blocks 1] [--experts 3] [--runs 1]

`full SVD` is the methods as their papers write them: `torch.linalg.svd` of each task vector (TSV-M) or of
their sum (Iso-C), and for TSV-M of the two concatenations, one matrix after the other with as many threads as
torch takes, in float64 and in float32, the dtype of the published code. `merger` is this package's stage, two
matrices side by side with a thread each, as in `merger run`. All are given the same task vectors: normal
deviates of some rank and size, beside smaller ones of full rank, rounded to bfloat16 as differences of stored
weights are. The difference is the largest one, as a share of the largest merged value, from the float64 SVD's.
"""

from __future__ import annotations

import argparse
import math
import os
import platform
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from merger.engine.machine import tuned
from merger.methods.iso_c import iso_c
from merger.methods.tsv_m import tsv_m

# the matrices of one transformer block: q, k, v, o, gate, up, down; and of a larger model one of each shape
SHAPES = {
    "zoo": [(576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536)],
    "1.1B": [(2048, 2048), (256, 2048), (5632, 2048)],
}


def svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    strong = s > max(matrix.shape) * 2.0**-23 * s[0]
    return u[:, strong], s[strong], v[strong]


def full_tsv_m(deltas: Tensor) -> Tensor:
    rank = min(deltas.shape[1:]) // len(deltas)
    parts = [svd(delta) for delta in deltas]
    all_u = torch.cat([u[:, :rank] for u, _, _ in parts], 1)
    all_s = torch.cat([s[:rank] for _, s, _ in parts])
    all_v = torch.cat([v[:rank] for _, _, v in parts])
    (u, _, v), (p, _, q) = svd(all_u), svd(all_v)
    return u @ v * all_s @ p @ q


def full_iso_c(deltas: Tensor) -> Tensor:
    u, s, v = svd(deltas.sum(0))
    return u @ v * s.mean()


METHODS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "tsv_m": (full_tsv_m, lambda deltas: tsv_m(deltas, weight=[1] * len(deltas), lambda_=1)),
    "iso_c": (full_iso_c, lambda deltas: iso_c(deltas, weight=[1] * len(deltas), lambda_=1)),
}


def task_vectors(experts: int, shape: tuple[int, int], seed: int) -> Tensor:
    """Deltas [k m n] whose singular values fall off over a quarter of the directions to a floor."""
    random = torch.Generator().manual_seed(seed)
    rows, columns = shape
    strong = torch.logspace(0, -1, min(shape) // 4)
    factors = [torch.randn(experts, n, len(strong), generator=random) / math.sqrt(n) for n in shape]
    noise = torch.randn(experts, rows, columns, generator=random) * 0.03 / math.sqrt(columns)
    return (factors[0] * strong @ factors[1].mT + noise).bfloat16().float()


def timed(work: Callable[[], list[Tensor]]) -> tuple[float, float, list[Tensor]]:
    """Seconds by the clock, and of all cores together."""
    began, cpu_start = time.monotonic(), time.process_time()
    results = work()
    return time.monotonic() - began, time.process_time() - cpu_start, results


def side_by_side(method: Callable[[Tensor], Tensor], stacks: list[Tensor]) -> list[Tensor]:
    with tuned(), ThreadPoolExecutor(2) as pool:
        return list(pool.map(method, stacks))


def measured(name: str, args: argparse.Namespace, stacks: list[Tensor]) -> list[tuple[str, float, float, float]]:
    """Seconds of each way by both clocks, and how far its results are from the float64 SVD's."""
    slow, fast = METHODS[name]
    ways = {
        "full SVD, float64": lambda: [slow(timings.double()) for timings in stacks],
        "full SVD, float32": lambda: [slow(timings) for timings in stacks],
        "merger": lambda: side_by_side(fast, stacks),
    }
    runs = {way: [timed(work) for _ in range(args.runs)] for way, work in ways.items()}
    exact = runs["full SVD, float64"][0][2]
    return [
        (
            way,
            statistics.median(seconds for seconds, _, _ in timings),
            statistics.median(cpu for _, cpu, _ in timings),
            max(map(difference, timings[0][2], exact)),
        )
        for way, timings in runs.items()
    ]


def difference(result: Tensor, exact: Tensor) -> float:
    return float((result - exact).abs().max() / exact.abs().max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--blocks", type=int, default=1, help="how often the shapes occur; a merge has many blocks")
    parser.add_argument("--experts", type=int, default=3)
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the full SVDs")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"torch {torch.__version__}, {platform.machine()}, {os.cpu_count()} cores, {args.threads} threads\n")
    print("| shapes | method | way | seconds | of merger's | CPU seconds | of merger's | difference |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    for shapes in args.shapes:
        stacks = [task_vectors(args.experts, shape, seed) for seed, shape in enumerate(SHAPES[shapes] * args.blocks)]
        for name in METHODS:
            rows = measured(name, args, stacks)
            _, merger_seconds, merger_cpu, _ = rows[-1]
            for way, seconds, cpu, distance in rows:
                ratios = seconds / merger_seconds, cpu / merger_cpu
                cells = f"{seconds:.2f} | {ratios[0]:.1f} | {cpu:.2f} | {ratios[1]:.1f} | {distance:.0e}"
                print(f"| {shapes} | {name} | {way} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
