"""Kill a merge at random moments, run it to its end each time, and compare its bytes with an uninterrupted run.

    python scripts/kill_test.py [--kills 20] [--seed 0] [--method ties] [--force]

The models are synthetic: a Llama of 5 MB with two experts, merged into a dozen shards. Each round starts a merge
in a process of its own, kills it (SIGKILL) at a moment drawn evenly from the time between its first file and its
end, starts it again, and kills that as well with a probability of one half, until one comes to its end. Meanwhile
a watcher looks at the output's name some thousand times a second: whatever has that name must have all files of
a whole model, at their full size. With --force a whole model is there from the beginning: two recipes replace each
other's output by turns, and at every look one of the two must be there, whole. Ends with exit code 1 at the first byte
that differs, the first part of a model, or the first absence of one that should be there.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

from merger.engine.merge import merge
from merger.options import RunOptions
from merger.recipe.recipe import Recipe

CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 512, "hidden_size": 128}
GOES_ON = "goes on where an earlier run stopped: "


def synthesize(folder: Path, seed: int) -> None:
    """A base and two experts of it with random weights."""
    for label, name in enumerate(("base", "code", "math")):
        generator = torch.Generator().manual_seed(seed * 3 + label)
        shapes = {"model.embed_tokens.weight": (512, 128), "lm_head.weight": (512, 128), "model.norm.weight": (128,)}
        for block in range(8):
            for part in ("q", "k", "v", "o"):
                shapes[f"model.layers.{block}.self_attn.{part}_proj.weight"] = (128, 128)
            for part in ("gate", "up"):
                shapes[f"model.layers.{block}.mlp.{part}_proj.weight"] = (256, 128)
            shapes[f"model.layers.{block}.mlp.down_proj.weight"] = (128, 256)
        tensors = {part: torch.randn(shape, generator=generator) for part, shape in shapes.items()}
        (folder / name).mkdir()
        save_file(tensors, folder / name / "model.safetensors", {"format": "pt"})
        (folder / name / "config.json").write_text(json.dumps(CONFIG))


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# --- processes: forked, so that importing torch is paid once --------------------------------------


def forked(work: Callable[[], None]) -> int:
    """Starts a process that does ``work``; its id."""
    process = os.fork()
    if process:
        return process
    try:
        work()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def ended(process: int) -> int:
    """Waits for a process; its exit status, negative where a signal ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def start(folder: Path, recipe: str, *, force: bool) -> int:
    """A merge; what it says is in the file ``said``."""

    def work() -> None:
        with (folder / "said").open("w") as log:
            merge(
                Recipe.load(folder / recipe),
                RunOptions(device="cpu", notice=lambda line: print(line, file=log, flush=True)),
                force=force,
            )

    (folder / "said").write_text("")
    return forked(work)


def watch(output: Path, models: Sequence[Mapping[str, bytes]], report: Path) -> None:
    """Looks at the output's name until SIGTERM, and writes what it saw."""
    sizes = {
        model_files["merger.json"]: {name: len(content) for name, content in model_files.items()}
        for model_files in models
    }
    observations: Counter[str] = Counter()
    signal.signal(signal.SIGTERM, lambda *_: observations.update(stop=1))
    while not observations["stop"]:
        observations["looks"] += 1
        try:
            folder = os.open(output, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            observations["absent"] += 1
            time.sleep(0.0002)
            continue
        model_files = is_whole(folder, sizes)
        is_current = is_at(output, folder)  # one that was replaced while it was looked at may be half deleted
        os.close(folder)
        observations["seen"] += is_current
        observations["parts"] += is_current and not model_files
        time.sleep(0.0002)
    report.write_text(json.dumps(observations))


def is_whole(folder: int, sizes: Mapping[bytes, Mapping[str, int]]) -> bool:
    """Whether an open folder has all the files, at their sizes, of the model whose merger.json it has."""
    try:
        with open(os.open("merger.json", os.O_RDONLY, dir_fd=folder), "rb") as file:
            expected_sizes = sizes.get(file.read())
        return {name: os.stat(name, dir_fd=folder).st_size for name in os.listdir(folder)} == expected_sizes
    except FileNotFoundError:
        return False


def is_at(path: Path, folder: int) -> bool:
    """Whether a name still stands for an open folder."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(folder))
    except FileNotFoundError:
        return False


# --- rounds ---------------------------------------------------------------------------------------


def until_writing(folder: Path, process: int) -> None:
    """Waits until the journal is there, or the process at its end."""
    while not (folder / "out.partial" / "journal").exists():
        if os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            return
        time.sleep(0.0005)


def until_done(folder: Path, recipe: str, seconds: float, draw: random.Random, *, force: bool) -> Counter[str]:
    """Runs and kills until a run comes to its end; what happened."""
    did: Counter[str] = Counter(rounds=1)
    kill, status = True, -1
    while status and (force or not (folder / "out").exists()):
        process = start(folder, recipe, force=force)
        if kill:
            until_writing(folder, process)
            time.sleep(draw.random() * seconds)
            os.kill(process, signal.SIGKILL)
        status = ended(process)
        killed = status == -signal.SIGKILL
        if status and not killed:
            raise SystemExit(f"a run ended with {status}: {(folder / 'said').read_text()}")
        log = (folder / "said").read_text()
        did["kills"] += killed
        did["late"] += killed and not force and (folder / "out").exists()
        if GOES_ON in log:
            did["resumed"] += 1
            did["kept"] += int(log.partition(GOES_ON)[2].split()[0])
        kill = draw.random() < 0.5
    return did


def timed(folder: Path, recipe: str) -> tuple[float, dict[str, bytes]]:
    """Seconds of an uninterrupted merge from its first file on, and what it wrote."""
    process = start(folder, recipe, force=True)
    until_writing(folder, process)
    began = time.monotonic()
    if ended(process):
        raise SystemExit("the uninterrupted merge failed")
    return time.monotonic() - began, contents(folder / "out")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--method", default="linear")
    parser.add_argument("--force", action="store_true", help="each round replaces the last one's model")
    args = parser.parse_args()
    draw = random.Random(args.seed)
    torch.set_num_threads(1)  # a pool of threads would not survive a fork
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        os.environ["MERGER_CACHE"] = str(folder / "cache")
        synthesize(folder, args.seed)
        for name, weight in (("one.yaml", 1), ("other.yaml", "1/2")):
            (folder / name).write_text(
                f"base: base\nexperts: {{code: {{model: code, weight: {weight}}}, math: math}}\n"
                f"method: {args.method}\noutput: {{path: out, shard_size: 500kB}}\n"
            )
        expected = {name: timed(folder, name) for name in ("one.yaml", "other.yaml")}
        longest = max(seconds for seconds, _ in expected.values())
        models = [files for _, files in expected.values()]
        watcher = forked(lambda: watch(folder / "out", models, folder / "watched"))
        events: Counter[str] = Counter()
        try:
            while events["kills"] < args.kills:
                recipe = "other.yaml" if args.force and events["rounds"] % 2 else "one.yaml"
                if not args.force:
                    # the watcher may still look into the last output, so that is deleted a round later
                    shutil.rmtree(folder / "old", ignore_errors=True)
                    (folder / "out").rename(folder / "old")
                    shutil.rmtree(folder / "out.partial", ignore_errors=True)  # of a kill after the end
                events += until_done(folder, recipe, longest, draw, force=args.force)
                if contents(folder / "out") != expected[recipe][1]:
                    raise SystemExit(f"round {events['rounds']}: the bytes differ from those of an uninterrupted run")
        finally:
            os.kill(watcher, signal.SIGTERM)
            ended(watcher)
        saw = Counter(json.loads((folder / "watched").read_text()))
    if saw["parts"]:
        raise SystemExit(f"the output was there {saw['parts']} times with only a part of a model")
    if args.force and saw["absent"]:
        raise SystemExit(f"the output was not there {saw['absent']} times")
    absence_remark = ", nor its absence" if args.force else ""
    print(
        f"{args.method}: {events['kills']} kills in {events['rounds']} rounds, each within {longest:.2f} s of writing; "
        f"every round ended in the same bytes ({len(models[0])} files). {events['resumed']} runs kept finished shards "
        f"({events['kept']} in all); {events['late']} kills came after the end. The watcher looked {saw['looks']:,} "
        f"times, saw the output {saw['seen']:,} times, and never a part of it{absence_remark}."
    )


if __name__ == "__main__":
    main()
