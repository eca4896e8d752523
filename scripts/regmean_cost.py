"""What RegMean and FeatCal cost beside plain forward passes of the experts, and what of that their regressions take.

    python scripts/regmean_cost.py BASE EXPERT=MODEL:TEXT.jsonl ... [--samples 100] [--tokens 512] [--rows ROW ...]

Each row is a process of its own on the same samples, which are all cut to the same length: `plain` is
transformers' own float32 model of each expert on its text, without the logits of its head, one expert after the
other; `own` and `merged` are `merger run` with RegMean and these `inputs`; `kept` is the same merge from Gram
matrices that `merger calibrate --gram` made before, so reading, regressions and writing alone. What is asked of
RegMean is (own - kept) / plain. `featcal` has its default anchor; `anchor` is a merge by that alone, which FeatCal
makes twice: once as the draft of a block and once for its regressions.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import transformers
from calibration_cost import prepared, whole

import merger

METHODS: dict[str, tuple[str, dict[str, str]]] = {
    "own": ("regmean", {"inputs": "own"}),
    "merged": ("regmean", {"inputs": "merged"}),
    "featcal": ("featcal", {}),
    "anchor": ("wudi_svc", {}),
    "keep": ("regmean", {}),
    "kept": ("regmean", {}),
}
ROWS = ("plain", "own", "merged", "featcal", "anchor", "keep", "kept")  # what is kept would be found by `own`


def experts(args: argparse.Namespace) -> dict[str, tuple[Path, Path]]:
    """Each expert's model and text."""
    entries = (entry.partition("=") for entry in args.experts)
    return {name: tuple(map(Path, paths.split(":"))) for name, _, paths in entries}


def long_texts(model: Path, text: Path, args: argparse.Namespace, to: Path) -> None:
    """Writes as many texts as there are samples, each of a few more tokens than a sample has."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    joined = "\n\n".join(json.loads(line)["text"] for line in text.read_text().splitlines())
    ids, size = tokenizer(joined).input_ids, args.tokens + args.tokens // 4
    while len(ids) < args.samples * size:
        ids = ids + ids
    pieces = (tokenizer.decode(ids[i * size : (i + 1) * size]) for i in range(args.samples))
    to.write_text("\n".join(json.dumps({"text": f"{i} {piece}"}) for i, piece in enumerate(pieces)))


def recipe(args: argparse.Namespace, folder: Path, row: str) -> merger.Recipe:
    """A row's merge of the experts on the texts in ``folder``."""
    inputs_by_expert = experts(args)
    data = {name: str(folder / f"{name}.jsonl") for name in inputs_by_expert}
    method, parameters = METHODS[row]
    content = {
        "base": str(args.base.resolve()),
        "experts": {name: str(model.resolve()) for name, (model, _) in inputs_by_expert.items()},
        "method": method,
        "parameters": parameters,
        "calibration": {"data": data, "samples": args.samples, "max_tokens": args.tokens},
        "output": {"path": str(folder / "out")},
    }
    return merger.Recipe.parse(content)


def plain(args: argparse.Namespace) -> None:
    for model, text in experts(args).values():
        passes, _ = prepared(model, text, args.samples, args.tokens)
        whole(model, passes, logits=False)


def one(args: argparse.Namespace) -> None:
    """One row, in this process."""
    folder = Path(args.folder)
    began = time.monotonic()
    if args.one == "plain":
        plain(args)
    elif args.one == "keep":
        merger.calibrate(recipe(args, folder, args.one), gram=True)
    else:
        merger.merge(recipe(args, folder, args.one), force=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"seconds": time.monotonic() - began, "peak": peak}))


def measured(kind: str, args: argparse.Namespace, folder: str, cache: str) -> dict[str, float]:
    command = [sys.executable, __file__, str(args.base), *args.experts, "--one", kind, "--folder", folder]
    command += ["--samples", str(args.samples), "--tokens", str(args.tokens)]
    environment = {**os.environ, "MERGER_CACHE": cache}
    lines = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout.splitlines()
    result: dict[str, float] = json.loads(lines[-1])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path)
    parser.add_argument("experts", nargs="+", metavar="EXPERT=MODEL:TEXT")
    parser.add_argument("--samples", type=int, default=100)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=ROWS)
    parser.add_argument("--one", choices=ROWS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        one(args)
        return
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as cache:
        for name, (model, text) in experts(args).items():
            long_texts(model, text, args, Path(folder) / f"{name}.jsonl")
        rows = {}
        for kind in args.rows:
            rows[kind] = measured(kind, args, folder, cache)
            print(kind, rows[kind], file=sys.stderr, flush=True)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads\n")
    print("| row | seconds | of plain | without the regressions, of plain | peak memory |\n|---|---|---|---|---|")
    rests = {"own": "kept", "merged": "kept"}  # the row that has the same regressions and no forward pass
    for kind in args.rows:
        seconds, base = rows[kind]["seconds"], rows[args.rows[0]]["seconds"]
        rest = rows.get(rests.get(kind, ""))
        share = "" if rest is None else f"{(seconds - rest['seconds']) / base:.2f}"
        print(f"| {kind} | {seconds:.1f} | {seconds / base:.2f} | {share} | {rows[kind]['peak'] / 1e6:,.0f} MB |")


if __name__ == "__main__":
    main()
