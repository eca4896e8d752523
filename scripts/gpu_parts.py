"""What scripts/gpu_check.py asks: each function answers one part, in a process of its own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
NEEDED = ["torch", "numpy", "safetensors", "huggingface_hub", "transformers", "accelerate", "pydantic", "yaml", "typer"]
EXPERTS = ("e1", "e2", "e3")
SAMPLES, TOKENS = 100, 512
BLOCKS = 3  # of the models for RegMean
MERGES: dict[str, dict[str, Any]] = {
    "linear first": {"method": "linear"},
    "linear": {"method": "linear"},
    "ties": {"method": "ties", "parameters": {"scope": "tensor"}},
    "dare": {"method": "dare_ties", "parameters": {"density": 0.5}},
    "obim": {"method": "obim"},
    "regmean": {"method": "regmean"},
}


@dataclass(frozen=True)
class Setting:
    """Where answers and models are, and what is measured."""

    answers: Path
    work: Path
    device: str
    size: str

    def file(self, part: str) -> Path:
        """The answer to a part."""
        return self.answers / f"{part.replace(' ', '-')}.json"

    def answer(self, part: str) -> dict[str, Any] | None:
        """What was answered, if anything."""
        file = self.file(part)
        return json.loads(file.read_text()) if file.exists() else None


# --- environment and tests ------------------------------------------------------------------------


def environment(setting: Setting) -> dict[str, Any]:
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        sys.exit(f"missing: {', '.join(missing)}; put them on PYTHONPATH, as with `pip install --target`")
    import torch
    import transformers

    import merger
    from merger.engine.machine import peak_memory
    from merger.engine.memory import CUDA, INTERPRETER
    from merger.ops import kernels

    memory_before = peak_memory()
    _compute(setting.device)
    facts = {
        "commit": _commit(),
        "date": time.strftime("%Y-%m-%d"),
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "merger": merger.__version__,
        "compiled loops": kernels.compiled(),
        "cores": os.cpu_count(),
        "memory-backed bytes free": shutil.disk_usage(setting.work.parent).free,
        "host memory before the device computes": memory_before,
        "host memory after it": peak_memory(),
        "host memory that merger counts for both": INTERPRETER + CUDA,
    }
    if setting.device != "cpu":
        free, total = torch.cuda.mem_get_info()
        facts |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
        facts |= {"gpu bytes free": free, "gpu bytes": total, **_copies()}
    return facts


def _commit() -> str:
    """The commit of the checkout, marked where files in it were changed."""
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"], cwd=ROOT, capture_output=True, text=True
        )
    except FileNotFoundError:
        return "not known: there is no git"
    return described.stdout.strip() or "not known: no git checkout"


def _compute(device: str) -> None:
    """Makes a context and what a merge loads into it: products, solves and eigenvectors."""
    import torch

    matrix = torch.randn(512, 512, dtype=torch.float64, device=device)
    square = matrix @ matrix.T + torch.eye(512, dtype=torch.float64, device=device)
    torch.linalg.eigh(square)
    torch.cholesky_solve(matrix, torch.linalg.cholesky(square))
    (matrix.float() @ matrix.float()).sum().item()


def _copies() -> dict[str, Any]:
    """GB/s from host memory to the device, pageable and pinned."""
    import torch

    speeds = {}
    for name, pinned in (("pageable", False), ("pinned", True)):
        host = torch.ones(1 << 28, dtype=torch.uint8, pin_memory=pinned)
        host.to("cuda")
        torch.cuda.synchronize()
        began = time.monotonic()
        for _ in range(8):
            host.to("cuda", non_blocking=True)
        torch.cuda.synchronize()
        speeds[f"GB/s to the device, {name}"] = round(8 * host.nbytes / (time.monotonic() - began) / 1e9, 1)
    return speeds


def tests(setting: Setting) -> dict[str, Any]:
    missing = [name for name in ("pytest", "hypothesis") if find_spec(name) is None]
    if missing:
        return {"not run": f"no {' and no '.join(missing)}"}
    files = ["tests/test_devices.py", "tests/test_same_bytes.py", "tests/test_precision.py"]
    command = [sys.executable, "-m", "pytest", "-k", "gpu or precision", "-p", "no:cacheprovider", *files]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    lines = ran.stdout.strip().splitlines()
    return {
        "exit": ran.returncode,
        "last lines": [line for line in lines if not line.startswith("=") or " in " in line][-12:],
    }


# --- the same bytes -------------------------------------------------------------------------------


TEXT = {"data": "text.jsonl", "samples": 4, "max_tokens": 32}


def bytes_of_all(setting: Setting) -> dict[str, Any]:
    import gpu_models

    from merger.pipeline.registry import ENTRIES, SCORES

    folder = setting.work / "tiny"
    shutil.rmtree(folder, ignore_errors=True)
    for expert, name in enumerate(("base", *EXPERTS)):
        gpu_models.write_model(folder / name, "tiny", 2, expert, "cpu")
    gpu_models.write_adapter(folder / "adapter", "tiny", 2)
    gpu_models.write_text(folder / "text.jsonl", 4, 32)
    _keep_statistics(folder)
    so_far = setting.answers / "bytes-so-far.json"  # merges that an earlier run has compared
    verdicts = json.loads(so_far.read_text()) if so_far.exists() else {}
    for name in [*ENTRIES, *SCORES]:
        if name not in verdicts:
            verdicts[name] = _compared(folder, name, setting.device)
            so_far.write_text(json.dumps(verdicts))
    by_verdict: dict[str, list[str]] = {"equal": [], "differ, as the manifest says": [], "DIFFER": [], "failed": []}
    for name, (verdict, detail) in verdicts.items():
        by_verdict[verdict].append(f"{name} {detail}".strip())
    return {verdict: ", ".join(names) or "none" for verdict, names in by_verdict.items()}


def _keep_statistics(folder: Path) -> None:
    """Calibrates on the CPU, so that both merges of a method look at the same inputs."""
    from merger.engine.calibrate import calibrate
    from merger.options import RunOptions
    from merger.recipe.recipe import Recipe

    recipe = Recipe.parse({**_recipe_of("regmean"), "calibration": TEXT}, folder)
    calibrate(recipe, RunOptions(device="cpu"), to=folder, gram=True)


def _compared(folder: Path, name: str, device: str) -> tuple[str, str]:
    """Whether a function writes the same bytes on CPU and device."""
    from merger.engine.merge import merge
    from merger.options import RunOptions
    from merger.recipe.calibration_faults import follows_merge
    from merger.recipe.recipe import Recipe

    recipe = Recipe.parse({**_recipe_of(name), "calibration": TEXT}, folder)
    if not follows_merge(recipe):  # else no file can hold what its stages look at
        recipe = Recipe.parse(_recipe_of(name), folder)
    files = []
    try:
        for place in ("cpu", device):
            merge(recipe, RunOptions(device=place), force=True)
            files.append({path.name: path.read_bytes() for path in (folder / "out").glob("*.safetensors")})
    except Exception as error:  # whatever a device makes of it is an answer
        return "failed", f"({type(error).__name__}: {str(error)[:200]})"
    if files[0] == files[1]:
        return "equal", ""
    dependent = json.loads((folder / "out" / "merger.json").read_bytes())["device-dependent"]
    return ("differ, as the manifest says" if dependent else "DIFFER"), ""


def _recipe_of(name: str) -> dict[str, Any]:
    """A merge with one function in it, of two fine-tunes and an adapter, or of as many as it takes."""
    from merger.pipeline.registry import ENTRIES

    entry = ENTRIES.get(name)
    kind = entry.kind if entry else "sparsifier"
    stage = {name: {"inner": "ties"} if name == "knots" else {}}
    stages = {"sparsifier": [stage, "sum"], "merger": [stage], "pack": [stage]}.get(kind, ["sum", stage])
    experts = {"e3": {"model": "base", "adapter": "adapter"}, "e1": "e1", "e2": "e2"}
    names = list(experts)[: entry.experts if entry and entry.experts else 3]
    return {
        "base": "base",
        "experts": {expert: experts[expert] for expert in names},
        **({"method": name} if kind == "method" else {"pipeline": stages}),
        "calibration": {"stats": {expert: f"{expert}.grams" for expert in names}},
        "output": {"path": "out"},
        "seed": 3,
    }


# --- the models and what is done with them --------------------------------------------------------


def models(setting: Setting) -> dict[str, Any]:
    import gpu_models
    import synthesize

    all_layers, spare = synthesize.SIZES[setting.size][2], gpu_models.model_bytes(setting.size, BLOCKS)
    copies = len(EXPERTS) + 2  # base, experts, and an output
    setting.work.mkdir(parents=True, exist_ok=True)
    room = 0.9 * shutil.disk_usage(setting.work).free - copies * spare
    fitting = [n for n in range(1, all_layers + 1) if copies * gpu_models.model_bytes(setting.size, n) <= room]
    if not fitting:
        sys.exit(f"{setting.work} has no room for one block of {setting.size}; give another --work")
    began = time.monotonic()
    for folder, layers in ((setting.work / "models", fitting[-1]), (setting.work / "few", min(BLOCKS, all_layers))):
        for expert, name in enumerate(("base", *EXPERTS)):
            gpu_models.write_model(folder / name, setting.size, layers, expert, setting.device)
    gpu_models.write_text(setting.work / "text.jsonl", SAMPLES, TOKENS)
    size = gpu_models.model_bytes(setting.size, fitting[-1])
    seconds = time.monotonic() - began
    return {"blocks": fitting[-1], "of": all_layers, "bytes of a model": size, "seconds": round(seconds, 1)}


def floor(setting: Setting) -> dict[str, Any]:
    import bench

    began = time.monotonic()
    bench.floor([setting.work / "models" / name for name in ("base", *EXPERTS)], setting.work / "floor")
    (setting.work / "floor").unlink()
    return _speed(setting, "models", time.monotonic() - began)


def _speed(setting: Setting, folder: str, seconds: float) -> dict[str, Any]:
    """Bytes that are read and written at least, and how fast that was."""
    files = {name: list((setting.work / folder / name).glob("*.safetensors")) for name in ("base", *EXPERTS)}
    sizes = {name: sum(file.stat().st_size for file in shards) for name, shards in files.items()}
    moved = sum(sizes.values()) + sizes["base"]
    return {"seconds": round(seconds, 2), "GB/s": round(moved / seconds / 1e9, 2), "bytes moved": moved}


def recipe_file(setting: Setting, name: str) -> Path:
    """The recipe of one merge."""
    folder = setting.work / ("few" if name == "regmean" else "models")
    recipe = {
        "base": str(folder / "base"),
        "experts": {expert: str(folder / expert) for expert in EXPERTS},
        **MERGES[name],
        "output": {"path": str(setting.work / "merged")},
    }
    if name in ("obim", "regmean"):
        samples = SAMPLES if name == "obim" else 16
        text = str(setting.work / "text.jsonl")
        recipe["calibration"] = {"data": text, "samples": samples, "max_tokens": TOKENS}
    path = setting.work / f"{name.replace(' ', '-')}.yaml"
    path.write_text(json.dumps(recipe))
    return path


def calibration(setting: Setting) -> dict[str, Any]:
    from merger.engine.calibrate import calibrate
    from merger.engine.machine import peak_device_memory, peak_memory
    from merger.options import RunOptions
    from merger.recipe.recipe import Recipe

    os.environ["MERGER_CACHE"] = str(setting.work / "cache")
    began = time.monotonic()
    calibrate(Recipe.load(recipe_file(setting, "obim")), RunOptions(device=setting.device))
    seconds = time.monotonic() - began
    return {
        "experts": len(EXPERTS),
        "seconds": round(seconds, 2),
        "tokens a second": round(len(EXPERTS) * SAMPLES * TOKENS / seconds),
        "peak host memory": peak_memory(),
        "peak device memory": peak_device_memory([setting.device]),
    }


def merged(setting: Setting, name: str) -> dict[str, Any]:
    """One merge by the command, and what it says of itself."""
    command = [sys.executable, "-m", "merger", "run", str(recipe_file(setting, name)), "--force", "--quiet", "--json"]
    environment = {**os.environ, "MERGER_CACHE": str(setting.work / "cache")}
    began = time.monotonic()
    ran = subprocess.run([*command, "--device", setting.device], env=environment, stdout=subprocess.PIPE, text=True)
    seconds = time.monotonic() - began
    shutil.rmtree(setting.work / "merged", ignore_errors=True)
    if ran.returncode:
        sys.exit(f"merger run ended with exit {ran.returncode}")
    result = json.loads(ran.stdout.splitlines()[-1])
    return {
        **_speed(setting, "few" if name == "regmean" else "models", seconds),
        "seconds of the merge alone": result["seconds"],
        "peak host memory": result["peak_memory_bytes"],
        "peak device memory": result["peak_device_memory_bytes"],
    }
