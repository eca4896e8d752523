"""What calibration costs beside plain forward passes of the same batches, in time and in memory.

    python scripts/calibration_cost.py MODEL TEXT.jsonl [--samples 100] [--tokens 512] [--runs 3]

Each run is a process of its own, one kind after the other: `plain` is transformers' own model on the same
batches, `body` the same without the logits of its head, which calibration does not compute either, and
`calibration` is merger's, block by block, with the statistics of every matrix's input. All compute in float32
with the same number of threads. Time is that of the passes and of reading the weights; memory is the most
resident memory of the process.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import transformers

from merger.calibration import Batch, Settings, batches, collect_all
from merger.calibration import samples as texts
from merger.checkpoint.opening import open_checkpoint

KINDS = ("plain", "body", "calibration")


def prepared(model: Path, text: Path, samples: int, tokens: int) -> tuple[list[Batch], Settings]:
    """Batches of samples that are cut to the same length, as long as the text is."""
    settings = Settings(samples=samples, max_tokens=tokens)
    tokenizer = texts.load_tokenizer(model, "model", trust_remote_code=False)
    joined = "\n\n".join(json.loads(line)["text"] for line in text.read_text().splitlines())
    ids = tokenizer(joined).input_ids
    while len(ids) < samples * tokens:
        ids = ids + ids
    return list(batches([tuple(ids[i * tokens : (i + 1) * tokens]) for i in range(samples)])), settings


def whole(model: Path, passes: list[Batch], *, logits: bool) -> None:
    """The forward passes of the whole model."""
    fewer = {} if logits else {"logits_to_keep": 1}
    loaded = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    with torch.inference_mode():
        for batch in passes:
            loaded(input_ids=batch.ids, attention_mask=batch.mask.long(), use_cache=False, **fewer)


def calibration(model: Path, passes: list[Batch], settings: Settings) -> None:
    """The forward passes block by block, with statistics."""
    with open_checkpoint(str(model), None, label="model", folder=model.parent) as checkpoint:
        collect_all(checkpoint, passes, settings)


def measured(kind: str, args: argparse.Namespace) -> dict[str, float]:
    """Seconds and bytes of one run, in a process of its own."""
    command = [sys.executable, __file__, str(args.model), str(args.text), "--one", kind]
    command += ["--samples", str(args.samples), "--tokens", str(args.tokens)]
    line = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1]
    result: dict[str, float] = json.loads(line)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--samples", type=int, default=100)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--one", choices=KINDS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        passes, settings = prepared(args.model, args.text, args.samples, args.tokens)
        began = time.monotonic()
        if args.one == "calibration":
            calibration(args.model, passes, settings)
        else:
            whole(args.model, passes, logits=args.one == "plain")
        seconds = time.monotonic() - began
        print(json.dumps({"seconds": seconds, "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}))
        return
    runs = [{kind: measured(kind, args) for kind in KINDS} for _ in range(args.runs)]
    print("| kind | seconds of each run | median, of plain | peak memory, median |\n|---|---|---|---|")
    for kind in KINDS:
        seconds_text = ", ".join(f"{run[kind]['seconds']:.1f}" for run in runs)
        ratio = statistics.median(run[kind]["seconds"] / run["plain"]["seconds"] for run in runs)
        peak = statistics.median(run[kind]["peak"] for run in runs)
        print(f"| {kind} | {seconds_text} | {ratio:.2f} | {peak / 1e6:,.0f} MB |")


if __name__ == "__main__":
    main()
