"""The SHA-256 of the weights that every recipe in recipes/ writes, to compare before and after a change.

    merger demo DEMO && python scripts/recipe_bytes.py DEMO OUT.json   # all, on the demo's models
    python scripts/recipe_bytes.py MODELS OUT.json [RECIPE ...]       # MODELS/base, MODELS/NAME, MODELS/data/NAME.jsonl
    python scripts/recipe_bytes.py --compare BEFORE.json AFTER.json

A recipe keeps its method, parameters and rules; its models, texts and output are replaced. Each merge runs in a process
of its own, and the statistics that it makes are shared by the recipes of one run alone.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml

RECIPES = Path(__file__).parent.parent / "recipes"
SAMPLES, TOKENS = 8, 128


def main() -> None:
    arguments = sys.argv[1:]
    if arguments[:1] == ["--compare"]:
        sys.exit(compare(*map(Path, arguments[1:])))
    with tempfile.TemporaryDirectory() as scratch:
        models, output, *names = map(Path, arguments)
        hashes = {}
        for path in names or sorted(RECIPES.glob("*.yaml")):
            hashes[path.name] = recipe_hash(path, models.resolve(), Path(scratch))
            print(path.name, hashes[path.name][:200], flush=True)
    output.write_text(json.dumps(hashes, indent=1) + "\n")


def recipe_hash(path: Path, models: Path, scratch: Path) -> str:
    """The SHA-256 of the weights that a recipe writes, or the last line of the error that it ends in."""
    recipe = yaml.safe_load(path.read_text())
    folder = models / "models" if (models / "models").is_dir() else models
    experts = sorted(expert.name for expert in folder.iterdir() if expert.name not in ("base", "data"))
    names = dict(zip(recipe["experts"], experts, strict=False))
    recipe["base"] = str(folder / "base")
    recipe["experts"] = {name: expert(recipe["experts"][name], folder / names[name]) for name in names}
    if "calibration" in recipe:
        data = {name: str(models / "data" / f"{names[name]}.jsonl") for name in names}
        recipe["calibration"] |= {"data": data, "samples": SAMPLES, "max_tokens": TOKENS}
    output = scratch / "out" / path.stem
    recipe["output"] = {"path": str(output)}
    file = scratch / path.name
    file.write_text(yaml.safe_dump(recipe, sort_keys=False))
    environment = {**os.environ, "MERGER_CACHE": str(scratch / "cache")}
    command = [sys.executable, "-m", "merger", "run", str(file), "--device", "cpu"]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True)
    if finished.returncode:
        return f"exit {finished.returncode}: {finished.stderr.strip().splitlines()[-1]}"
    digest = hashlib.sha256()
    for weights in sorted(output.glob("*.safetensors")):
        digest.update(weights.name.encode() + weights.read_bytes())
        weights.unlink()
    return digest.hexdigest()


def expert(entry: object, model: Path) -> dict[str, object]:
    """An expert of a recipe with another model; its weight stays."""
    weight = {"weight": entry["weight"]} if isinstance(entry, dict) and "weight" in entry else {}
    return {"model": str(model), **weight}


def compare(old_file: Path, new_file: Path) -> int:
    """Prints what differs; the exit status is 1 if anything does."""
    hashes = [json.loads(path.read_text()) for path in (old_file, new_file)]
    names = sorted(hashes[0].keys() | hashes[1].keys())
    changed_names = [name for name in names if hashes[0].get(name) != hashes[1].get(name)]
    for name in changed_names:
        print(f"{name}: {hashes[0].get(name)} before, {hashes[1].get(name)} after")
    print(f"{len(names) - len(changed_names)} of {len(names)} the same")
    return 1 if changed_names else 0


if __name__ == "__main__":
    main()
