"""Feed merger mutated headers, index files and recipes, and see that each is read or refused in a line.

    python scripts/fuzz.py [--cases 10000] [--seed 0] [--only headers|indexes|recipes] [--memory 1024]

Every case is a sound file with one to four mutations: of bytes, or of the values, keys and nesting that they spell.
It is then read as a command would read it: a header by itself, an index with the model it belongs to, a recipe with
the plan that it makes. A case fails if anything but a `MergerError` of one line for each fault escapes, if it takes
more than five seconds, if a header or an index gets a file outside the model's folder opened, or if the process grows
beyond --memory MB (of address space, so that it is a MemoryError). Ends with exit code 1 if one does; seed and number
make a case again.
"""

from __future__ import annotations

import argparse
import copy
import io
import json
import os
import random
import resource
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from merger.checkpoint.folder import MODEL, find_weights, local_folder, read_tensors
from merger.checkpoint.formats.safetensors import FORMAT
from merger.errors import MergerError, RecipeError
from merger.planning.planner import plan
from merger.recipe.recipe import Recipe

SECONDS = 5  # of the processor, after which a case hangs
WAITING = 60  # seconds by the clock: a busy machine may let a process wait
CODE = (".py", ".pyc", ".so", ".zip", "METADATA")  # what Python opens when something is imported

# --- mutations ------------------------------------------------------------------------------------

NUMBERS = [0, -1, 1, 7, 2**31, 2**63 - 1, 2**63, 2**64, -(2**63), 10**400, 1e308, -0.0, float("nan"), float("inf")]
WORDS = [
    "",
    " ",
    ".",
    "..",
    "../..",
    "../secret.safetensors",
    "/etc/passwd",
    "a/b",
    "a\\b",
    "~",
    "\0",
    "\n",
    "\x1b[2J",
    "\ud800",
]
WORDS += [
    "F32",
    "BF16",
    "Q4",
    "1/3",
    "1/0",
    "5GB",
    "base",
    "code",
    "org/name@main",
    "é" * 300,
    "w" * 5000,
    "(",
    "[a-",
    "null",
]
TOKENS = [b"{", b"[", b"&a [*a]", b"\xff", b"\0", b": ", b"\t", b"- ", b"!!", b"\n"]
PLAIN = [None, True, False, [], {}, [[]], [None], {"": None}, {"a": {"a": {}}}]


def nasty(draw: random.Random) -> Any:
    """A value that nobody would write."""
    kind = draw.randrange(4)
    if kind == 3:
        value: Any = draw.choice(PLAIN)
        for _ in range(draw.choice([1, 3, 60, 150])):
            value = [value] if draw.random() < 0.5 else {"a": value}
        return value
    return copy.deepcopy(draw.choice([NUMBERS, WORDS, PLAIN][kind]))


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths to all that is in a JSON value."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in items:
        yield from places(child, (*path, key))


def mutated_value(value: Any, draw: random.Random) -> Any:
    """The value with one thing in it replaced, removed, renamed, doubled or moved."""
    value = copy.deepcopy(value)
    *way, last = draw.choice([path for path in places(value) if path] or [(None,)])
    if last is None:
        return nasty(draw)
    node = value
    for key in way:
        node = node[key]
    action = draw.randrange(5)
    if action == 0:
        node[last] = nasty(draw)
    elif action == 1:
        del node[last]
    elif action == 2 and isinstance(node, dict):
        node[draw.choice(WORDS)] = node.pop(last)
    elif action == 3:
        source_path = draw.choice(list(places(value)))
        source = value
        for key in source_path:
            source = source[key]
        node[last] = copy.deepcopy(source)
    elif isinstance(node, list):
        node.insert(draw.randrange(len(node) + 1), node[last])
    elif isinstance(node[last], int) and not isinstance(node[last], bool):
        node[last] += draw.choice([-8, -1, 1, 8])
    else:
        node[draw.choice(WORDS)] = nasty(draw)
    return value


def mutated_bytes(data: bytes, draw: random.Random) -> bytes:
    """The bytes with some of them changed, removed, doubled or put in."""
    at = draw.randrange(len(data) + 1)
    end = min(len(data), at + draw.choice([1, 1, 2, 8, 64]))
    action = draw.randrange(6)
    if action == 0:
        return data[:at] + bytes(byte ^ 1 << draw.randrange(8) for byte in data[at:end]) + data[end:]
    if action == 1:
        return data[:at] + data[end:]
    if action == 2:
        return data[:at] + data[at:end] * draw.choice([2, 100]) + data[end:]
    if action == 3:
        return data[:at]
    if action == 4:
        return data[:at] + draw.randbytes(end - at) + data[end:]
    return (
        data[:at] + draw.choice([b"{", b"[", b"&a [*a]", b"\xff", b"\0", b": ", b"\t", b"- ", b"!!", b"\n"]) + data[at:]
    )


def mutated(value: Any, write: Callable[[Any], bytes], draw: random.Random) -> bytes:
    """What ``write`` makes of the value, after one to four mutations of it or of what was written."""
    steps = draw.choice([1, 1, 1, 2, 3, 4])
    of_bytes = draw.randint(0, steps)
    for _ in range(steps - of_bytes):
        value = mutated_value(value, draw)
    data = write(value)
    for _ in range(of_bytes):
        data = mutated_bytes(data, draw)
    return data


def as_json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=True).encode()


def as_yaml(value: Any) -> bytes:
    try:
        return yaml.safe_dump(value, sort_keys=False, allow_unicode=True).encode(errors="surrogatepass")
    except (yaml.YAMLError, RecursionError):
        return as_json(value)  # which is YAML as well


# --- what is fed ----------------------------------------------------------------------------------

SHAPES = {"model.embed_tokens.weight": [8, 4], "model.layers.0.mlp.up_proj.weight": [8, 4], "model.norm.weight": [4]}


def entries(shapes: dict[str, list[int]]) -> dict[str, Any]:
    header, end = {}, 0
    for name, shape in shapes.items():
        size = 4 * shape[0] * (shape[1] if len(shape) > 1 else 1)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    return {"__metadata__": {"format": "pt"}, **header}


def safetensors(header: Any) -> bytes:
    text = as_json(header)
    last = max((entry["data_offsets"][1] for entry in header.values() if "data_offsets" in entry), default=0)
    return len(text).to_bytes(8, "little") + text + bytes(last)


def headers(folder: Path, draw: random.Random) -> Callable[[], None]:
    """A header, of the length that it claims or of another."""

    def write(header: Any) -> bytes:
        text = as_json(header)
        length = len(text) if draw.random() < 0.8 else draw.choice([0, 1, len(text) - 1, 2**27, 2**63, 2**64 - 1])
        return length.to_bytes(8, "little") + text + bytes(272)

    data = mutated(entries(SHAPES), write, draw)
    return lambda: FORMAT.parse(io.BytesIO(data), len(data), Path("model.safetensors")) and None


def indexes(folder: Path, draw: random.Random) -> Callable[[], None]:
    """The index of a model in two shards, beside which lies what it must not reach."""
    model = folder / "sharded"
    if not model.exists():
        model.mkdir()
        names = list(SHAPES)
        for file, file_names in (("a.safetensors", names[:2]), ("b.safetensors", names[2:])):
            (model / file).write_bytes(safetensors(entries({name: SHAPES[name] for name in file_names})))
        (folder / "secret.safetensors").write_bytes((model / "b.safetensors").read_bytes())
    files = dict(zip(SHAPES, ("a.safetensors", "a.safetensors", "b.safetensors"), strict=True))
    index = {"metadata": {"total_size": 272}, "weight_map": files}
    (model / "model.safetensors.index.json").write_bytes(mutated(index, as_json, draw))

    def work() -> None:
        model_folder = local_folder(model, "code")
        read_tensors(model_folder, find_weights(model_folder, MODEL))

    return work


def recipes(folder: Path, draw: random.Random) -> Callable[[], None]:
    """A recipe, and the plan that it makes of three models."""
    recipe_folder = folder / "recipes"
    if not recipe_folder.exists():
        for name in ("base", "code", "math"):
            (recipe_folder / name).mkdir(parents=True)
            (recipe_folder / name / "config.json").write_text('{"model_type": "llama", "vocab_size": 8}')
            (recipe_folder / name / "model.safetensors").write_bytes(safetensors(entries(SHAPES)))
    (recipe_folder / "recipe.yaml").write_bytes(mutated(draw.choice(RECIPES), as_yaml, draw))

    def work() -> None:
        recipe = Recipe.load(recipe_folder / "recipe.yaml")
        with closing(plan(recipe, offline=True)):
            recipe.spelled_out()

    return work


MODELS = {"base": "base", "experts": {"code": "code", "math": {"model": "math", "weight": "1/3"}}}
OUTPUT = {"path": "out", "dtype": "bfloat16", "shard_size": "5GB"}
RECIPES = [
    {**MODELS, "method": "ties", "parameters": {"density": {"code": 0.3, "math": [0.1, 0.2]}}, "output": OUTPUT},
    {
        **MODELS,
        "pipeline": [{"bs": {"n": 2, "m": 4, "exclusive": "rotation"}}, "sign_elect", {"scale": {"lambda": 1.1}}],
        "rules": [{"kinds": ["embedding"], "method": "linear"}, {"tensors": "norm", "use": "base"}],
        "missing": "zero",
        "extra_rows": "drop",
        "output": OUTPUT,
    },
]  # fmt: skip
TARGETS = {"headers": headers, "indexes": indexes, "recipes": recipes}

# --- one case -------------------------------------------------------------------------------------


class Hang(BaseException):
    """A case took too long."""


@dataclass
class Watch:
    """Hears of every file that is opened, and keeps those outside a folder while there is one."""

    folder: Path | None = None
    outside_files: list[str] = field(default_factory=list)

    def hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and self.folder is not None and isinstance(arguments[0], str | bytes | os.PathLike):
            path = os.path.realpath(os.fsdecode(arguments[0]))
            if not path.startswith(f"{self.folder}/") and not path.endswith(CODE):
                self.outside_files.append(path)


WATCH = Watch()
sys.addaudithook(WATCH.hear)


@contextmanager
def limited(folder: Path | None) -> Iterator[None]:
    """No longer than SECONDS, and told of every file outside the folder that is opened meanwhile."""

    def stop(*_: object) -> None:
        raise Hang(f"took more than {SECONDS} s of the processor, or {WAITING} s")

    handlers = [signal.signal(number, stop) for number in (signal.SIGPROF, signal.SIGALRM)]
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    signal.setitimer(signal.ITIMER_REAL, WAITING)
    WATCH.folder, WATCH.outside_files = folder and folder.resolve(), []
    try:
        yield
    finally:
        WATCH.folder = None
        for timer in (signal.ITIMER_PROF, signal.ITIMER_REAL):
            signal.setitimer(timer, 0)
        for number, handler in zip((signal.SIGPROF, signal.SIGALRM), handlers, strict=True):
            signal.signal(number, handler)


def outcome(work: Callable[[], None], folder: Path | None) -> tuple[str, str]:
    """How a case ended: read, refused, or failed and why."""
    try:
        with limited(folder):
            work()
        ending = "read", ""
    except MergerError as error:
        faults = error.faults if isinstance(error, RecipeError) else [str(error)]
        unsaid = [fault for fault in faults if not fault or not fault.isprintable() or len(fault) > 20_000]
        ending = ("failed", f"said {unsaid[0][:200]!r}") if unsaid else ("refused", "")
    except (Exception, Hang) as error:
        ending = "failed", f"{type(error).__name__}: {error}"[:300]
    return ("failed", f"opened {WATCH.outside_files[0]}") if WATCH.outside_files else ending


@dataclass
class Report:
    """What became of all cases of a kind."""

    endings: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    slowest: float = 0


def fuzz(kind: str, cases: int, seed: int, folder: Path) -> Report:
    """Feeds so many cases of a kind; the same ones for the same seed."""
    report = Report()
    home = {"headers": folder, "indexes": folder / "sharded", "recipes": None}[kind]  # a recipe may name any file
    outcome(TARGETS[kind](folder, random.Random(0)), home)  # whatever is imported only now
    for case in range(cases):
        work = TARGETS[kind](folder, random.Random(f"{seed} {kind} {case}"))
        began = time.process_time()
        ending, reason = outcome(work, home)
        report.slowest = max(report.slowest, time.process_time() - began)
        report.endings[ending] += 1
        if ending == "failed":
            report.failures.append(f"{kind}, seed {seed}, case {case}: {reason}")
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=10_000, help="of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=TARGETS)
    parser.add_argument("--memory", type=int, default=1024, help="MB of address space")
    args = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_AS, (args.memory << 20, args.memory << 20))
    failures: list[str] = []
    with tempfile.TemporaryDirectory() as temporary:
        os.environ["MERGER_CACHE"] = os.environ["HF_HOME"] = f"{temporary}/cache"
        for kind in [args.only] if args.only else TARGETS:
            began = time.monotonic()
            report = fuzz(kind, args.cases, args.seed, Path(temporary))
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000
            print(
                f"{kind}: {args.cases:,} cases in {time.monotonic() - began:.0f} s: {report.endings['read']:,} read, "
                f"{report.endings['refused']:,} refused, {report.endings['failed']:,} failed; the slowest took "
                f"{1000 * report.slowest:.0f} ms, and the process had {peak:.0f} MB at most"
            )
            failures += report.failures
    for failure in failures[:20]:
        print(failure)
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
