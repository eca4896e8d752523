"""The same merges by mergekit and by merger, and the largest difference between what they write.

    python scripts/against_mergekit.py --mergekit VENV/bin/python [--only ties,della] [--as-it-sorts] [--keep FOLDER]
        [--models BASE A B C]

VENV has mergekit (0.1.5 is what the import was written for). Tiny Llama, Granite and GPT-2 models and three
fine-tunes of each are made in float32 and bfloat16, mergekit configurations are written for every method, and
each runs through mergekit and, imported, through merger. Prints Markdown tables. Methods that draw random numbers
are compared by what they keep, by what they multiply it with, and by the mean. --models takes models of your own
instead, stored in bfloat16.

mergekit's sorts leave the order of equal magnitudes to torch, which leaves it to the processor. So that both tools
keep the same of them, its sorts are made stable here, lower index first, unless --as-it-sorts is given.

What was stored in bfloat16 is merged twice: as it is, where mergekit computes in bfloat16 and rounds after each
operation, and with dtype: float32 and out_dtype: bfloat16, where it rounds once, as merger always does.
"""

from __future__ import annotations

import argparse
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel, GraniteConfig, GraniteForCausalLM, LlamaConfig, LlamaForCausalLM

from merger import Recipe, merge
from merger.recipe.document import read
from merger.recipe.mergekit import import_mergekit

SHAPE = {
    "vocab_size": 160, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip
MODELS = {
    "Llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE, tie_word_embeddings=False)),
    "Granite": lambda: GraniteForCausalLM(GraniteConfig(**SHAPE, tie_word_embeddings=True)),
    "GPT-2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=160, n_positions=32, n_embd=64, n_layer=3, n_head=4)),
}
TUNED = ("a", "b", "c")
GIVEN = "given models"
ROUNDED_ONCE = ", rounded once"


def several(*weights: Any, **parameters: Any) -> dict[str, Any]:
    """Models a, b, ... with these weights, and a map of other parameters for each."""
    entries = [{"weight": weight} for weight in weights]
    for name, values in parameters.items():
        for entry, value in zip(entries, values, strict=True):
            entry[name] = value
    return {"models": [{"model": m, "parameters": p} for m, p in zip(TUNED, entries, strict=False)]}


def plain(*models: str) -> dict[str, Any]:
    return {"models": [{"model": model} for model in models]}


GRADED = [{"filter": "attn", "value": [0, 0.5, 0.3]}, {"filter": "mlp", "value": [1, 0.5, 0.7]}, {"value": 0.4}]
CASES: dict[str, dict[str, Any]] = {
    "linear": {"merge_method": "linear", **several(0.5, 0.3, 0.9)},
    "linear, not normalized, base among the models": {
        "merge_method": "linear", **several(0.5, 0.3, 0.9), "base_model": "base",
        "parameters": {"normalize": False, "weight": 0.2},
    },
    "linear, gradients and filters": {"merge_method": "linear", **several(GRADED, [1, 0, 0.5], 0.9)},
    "linear, two slices": {
        "merge_method": "linear",
        "slices": [
            {"sources": [{"model": m, "layer_range": r} for m in ("a", "b")], "parameters": {"weight": w}}
            for r, w in (([0, 2], [0.2, 0.7]), ([2, 3], 0.5))
        ],
    },
    "slerp": {"merge_method": "slerp", **plain("base", "a"), "base_model": "base", "parameters": {"t": 0.3}},
    "slerp, gradients and filters": {
        "merge_method": "slerp", **plain("a"), "base_model": "base", "parameters": {"t": GRADED},
    },
    "nuslerp": {"merge_method": "nuslerp", **several(0.3, 0.9)},
    "nuslerp, task vectors": {"merge_method": "nuslerp", **several(0.3, 0.9), "base_model": "base"},
    "nuslerp, by row": {
        "merge_method": "nuslerp", **several(0.3, 0.9), "base_model": "base", "parameters": {"nuslerp_flatten": False},
    },
    "nuslerp, the other way": {
        "merge_method": "nuslerp", **several(0.3, 0.9), "base_model": "base",
        "parameters": {"nuslerp_flatten": False, "nuslerp_row_wise": True},
    },
    "multislerp": {"merge_method": "multislerp", **several(0.5, 0.3, 0.9)},
    "multislerp, task vectors, not normalized": {
        "merge_method": "multislerp", **several(0.5, 0.3, 0.9), "base_model": "base",
        "parameters": {"normalize_weights": False},
    },
    "karcher": {"merge_method": "karcher", **plain("a", "b", "c")},
    "task_arithmetic": {
        "merge_method": "task_arithmetic", **several(0.5, -0.3, 0.9), "base_model": "base",
        "parameters": {"lambda": 0.7},
    },
    "task_arithmetic, normalized": {
        "merge_method": "task_arithmetic", **several(0.5, 0.3, 0.9), "base_model": "base",
        "parameters": {"normalize": True},
    },
    "ties": {
        "merge_method": "ties", **several(1, 0.6, 0.8, density=(0.5, [0.3, 0.9], GRADED)), "base_model": "base",
        "parameters": {"int8_mask": True, "lambda": 1.1},
    },
    "ties, not normalized, rescaled": {
        "merge_method": "ties", **several(1, 0.6, 0.8, density=(0.5, 0.3, 0.007)), "base_model": "base",
        "parameters": {"normalize": False, "rescale": True},
    },
    "breadcrumbs": {
        "merge_method": "breadcrumbs", **several(1, 0.6, 0.8, density=(0.5, 0.3, 1), gamma=(0.1, 0.013, 0.2)),
        "base_model": "base",
    },
    "breadcrumbs_ties": {
        "merge_method": "breadcrumbs_ties", **several(1, 0.6, 0.8, density=(0.51, 0.33, 0.97), gamma=(0.1, 0.013, 0.2)),
        "base_model": "base",
    },
    "sce": {"merge_method": "sce", **plain(*TUNED), "base_model": "base", "parameters": {"select_topk": 0.3}},
    "sce, all positions": {"merge_method": "sce", **plain(*TUNED), "base_model": "base"},
    "model_stock": {"merge_method": "model_stock", **plain(*TUNED), "base_model": "base"},
    "model_stock, filter_wise": {
        "merge_method": "model_stock", **plain(*TUNED), "base_model": "base", "parameters": {"filter_wise": True},
    },
    "nearswap": {"merge_method": "nearswap", **plain("a"), "base_model": "base", "parameters": {"t": 0.001}},
    "ram": {"merge_method": "ram", **plain(*TUNED), "base_model": "base"},
    "ramplus_tl": {
        "merge_method": "ramplus_tl", **plain(*TUNED), "base_model": "base", "parameters": {"epsilon": 0.002, "r": 0.3},
    },
    "arcee_fusion": {"merge_method": "arcee_fusion", **plain("a"), "base_model": "base"},
    "passthrough": {"merge_method": "passthrough", **plain("a")},
    "passthrough, scaled": {
        "merge_method": "passthrough",
        "models": [{"model": "a", "parameters": {"scale": [{"filter": "mlp", "value": 0.5}, {"value": 1.0}]}}],
    },
    "passthrough, two slices": {
        "merge_method": "passthrough",
        "slices": [{"sources": [{"model": m, "layer_range": r}]} for m, r in (("a", [0, 1]), ("b", [1, 3]))],
    },
}  # fmt: skip
DRAWN: dict[str, dict[str, Any]] = {
    name: {
        "merge_method": name.partition(",")[0], **several(1, density=(0.4,)), "base_model": "base",
        "parameters": extras,
    }
    for name, extras in {
        "dare_linear": {}, "dare_linear, not rescaled": {"rescale": False}, "dare_ties": {}, "della_linear": {},
        "della": {},
    }.items()
}  # fmt: skip
STABLE = """
import torch
def argsort(values, *, descending=False, dim=-1):
    order = torch.Tensor.argsort(values, stable=True, descending=True, dim=dim)
    return order if descending else order.flip(dim)
def ascending(values, descending=False):
    order = argsort(values)
    return torch.return_types.sort((values[order], order))
def topk(values, k, largest=True):
    order = argsort(values, descending=True)[:k]
    return values[order], order
torch.argsort, torch.sort, torch.topk = argsort, ascending, topk
"""
BY_MERGEKIT = """
import pathlib, yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
for path in sorted(pathlib.Path().glob("*.yml")):
    config = MergeConfiguration.model_validate(yaml.safe_load(path.read_text()))
    options = MergeOptions(copy_tokenizer=False, write_model_card=False, quiet=True, random_seed=0)
    run_merge(config, str(path.with_suffix("")) + ".mergekit", options)
from importlib.metadata import version
print(*(f"{name} {version(name)}" for name in ("mergekit", "torch", "transformers")), sep=", ")
"""


# --- models and configurations --------------------------------------------------------------------


def make_models(folder: Path, family: str, dtype: torch.dtype) -> None:
    """A base with random weights, and fine-tunes that changed a part of each tensor, some of it alike."""
    torch.manual_seed(0)
    model = MODELS[family]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += torch.randn_like(parameter) * 0.02  # norms and biases as well
    base = {name: values.clone() for name, values in model.state_dict().items()}
    common_changes = {name: torch.randn_like(values) for name, values in base.items()}
    for label in ("base", *TUNED):
        if label != "base":
            for name, values in model.state_dict().items():
                expert_change = torch.randn_like(values) * (torch.rand_like(values) < 0.8)
                values.copy_(base[name] + 0.003 * (expert_change + 0.5 * common_changes[name]))
        model.to(dtype).save_pretrained(folder / label)
        model.float()


def configurations(folder: Path, only: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """A name and a configuration for every merge of the models in a folder."""
    for name, config in (CASES | DRAWN).items():
        if (not only or config["merge_method"] in only) and not ("slices" in config and folder.name == GIVEN):
            yield name, config
            if not folder.name.endswith("float32") and name in CASES:
                yield name + ROUNDED_ONCE, {**config, "dtype": "float32", "out_dtype": "bfloat16"}


# --- comparison -----------------------------------------------------------------------------------


@dataclass
class Apart:
    """How far two merges are apart: absolute in float32, in steps of bfloat16 otherwise."""

    largest: float = 0
    over_limit: int = 0  # elements that differ by more than 1e-6, or than one step
    elements: int = 0

    def add(self, base: torch.Tensor, reference: torch.Tensor, merged: torch.Tensor) -> None:
        """Counts one tensor; a step is that from the base's value, or from a result if that is larger."""
        distances, allowed = (reference.double() - merged.double()).abs(), 1e-6
        if base.dtype == torch.bfloat16:
            sizes = torch.stack([tensor.double().abs() for tensor in (base, reference, merged)]).amax(0)
            distances, allowed = distances / torch.exp2(sizes.clamp(min=1e-30).log2().floor() - 7), 1
        self.largest = max(self.largest, distances.max().item())
        self.over_limit += int((distances > allowed).sum())
        self.elements += distances.numel()

    def __str__(self) -> str:
        return f"{self.largest:.2g}" + (f" ({self.over_limit / self.elements:.2%})" if self.over_limit else "")


def differences(folders: list[Path], name: str) -> Apart:
    """Between what both tools made of a configuration in these folders."""
    distance = Apart()
    for folder in folders:
        base = load_all(folder / "base")
        references, merges = (load_all(folder / f"{name}.{tool}") for tool in ("mergekit", "merger"))
        assert references.keys() == merges.keys(), set(references) ^ set(merges)
        for tensor_name in merges:
            distance.add(base[tensor_name], references[tensor_name], merges[tensor_name])
    return distance


def load_all(folder: Path) -> dict[str, torch.Tensor]:
    return {name: values for file in folder.glob("*.safetensors") for name, values in load_file(file).items()}


def drawn_facts(folder: Path, name: str, tool: str) -> tuple[float, float, float]:
    """Of a merge of one fine-tune: the share kept, what that is multiplied with, and its mean over the original's."""
    base, tuned, merged = (load_all(folder / changes) for changes in ("base", "a", f"{name}.{tool}"))
    changed = {changes: (tuned[changes] - values).double() for changes, values in base.items()}
    remainders = {changes: (merged[changes] - values).double() for changes, values in base.items()}
    count = sum((changes.abs() > 1e-9).sum().item() for changes in remainders.values())
    factors = torch.cat([(remainders[e] / changed[e])[remainders[e].abs() > 1e-4].flatten() for e in base])
    signed = [sum((changes[e] * changed[e].sign()).sum() for e in base).item() for changes in (remainders, changed)]
    return (
        count / sum((changes != 0).sum().item() for changes in changed.values()),
        factors.median().item(),
        signed[0] / signed[1],
    )


# --- the whole ------------------------------------------------------------------------------------


def run_all(folder: Path, python: Path, program: str, only: list[str]) -> str:
    """Every merge of the models in a folder by both tools; returns mergekit's versions."""
    for name, config in configurations(folder, only):
        (folder / f"{name}.yml").write_text(yaml.safe_dump(config, sort_keys=False))
    ran = subprocess.run([python, "-c", program], cwd=folder, text=True, capture_output=True)
    if ran.returncode:
        raise SystemExit(f"mergekit: {ran.stderr[-2000:]}")
    for name, _ in configurations(folder, only):
        recipe = import_mergekit(read(folder / f"{name}.yml")).recipe
        recipe["output"]["path"] = f"{name}.merger"
        merge(Recipe.parse(recipe, folder))
    return ran.stdout.strip().splitlines()[-1]


def folders_of(root: Path, models: list[Path]) -> list[Path]:
    """Folders with a base and three fine-tunes: those that are given, or tiny ones of each family and dtype."""
    if models:
        (root / GIVEN).mkdir(parents=True)
        for label, model in zip(("base", *TUNED), models, strict=True):
            (root / GIVEN / label).symlink_to(model.absolute())
        return [root / GIVEN]
    folders = []
    for family in MODELS:
        for dtype in (torch.float32, torch.bfloat16):
            folders.append(root / f"{family} {str(dtype).removeprefix('torch.')}")
            folders[-1].mkdir(parents=True)
            make_models(folders[-1], family, dtype)
    return folders


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--mergekit", required=True, metavar="PYTHON", type=Path, help="the interpreter that has mergekit"
    )
    parser.add_argument("--only", default="", help="merge methods of mergekit, with commas")
    parser.add_argument("--keep", type=Path, help="keep everything in this new folder")
    parser.add_argument("--as-it-sorts", action="store_true", help="leave mergekit's choice among equals to torch")
    parser.add_argument("--models", nargs=4, type=Path, default=[], metavar="MODEL", help="a base and three fine-tunes")
    args = parser.parse_args()
    program = BY_MERGEKIT if args.as_it_sorts else STABLE + BY_MERGEKIT
    only = [name for name in args.only.split(",") if name]
    with tempfile.TemporaryDirectory() as temporary:
        folders = folders_of(args.keep or Path(temporary), args.models)
        versions = [run_all(folder, args.mergekit.absolute(), program, only) for folder in folders]
        print_differences(folders, only)
        print_drawn(folders, only)
    print(f"\nmergekit: {versions[0]}. merger: {', '.join(f'{p} {version(p)}' for p in ('torch', 'transformers'))}.")


def print_differences(folders: list[Path], only: list[str]) -> None:
    exact = [folder for folder in folders if folder.name.endswith("float32")]
    rounded = [folder for folder in folders if folder not in exact]
    print(
        "|".join(
            [
                "| merge ",
                *(f" {model_folder.name} " for model_folder in exact),
                " bfloat16, computed in float32 ",
                " as it is |",
            ]
        )
    )
    print("|---" * (len(exact) + 3) + "|")
    for name in (name for name, _ in configurations(folders[0], only) if name in CASES):
        cells = [differences([folder], name) for folder in exact]
        cells += [differences(rounded, name + suffix) for suffix in (ROUNDED_ONCE, "")]
        print(f"| {name} | {' | '.join(map(str, cells))} |")


def print_drawn(folders: list[Path], only: list[str]) -> None:
    print("\n| drawn at random | models | kept | multiplied by | mean |\n|---|---|---|---|---|")
    for name in (name for name, _ in configurations(folders[0], only) if name in DRAWN):
        for folder in folders:
            facts = [drawn_facts(folder, name, tool) for tool in ("mergekit", "merger")]
            cells = [f"{reference:.4f} / {result:.4f}" for reference, result in zip(*facts, strict=True)]
            print(f"| {name} | {folder.name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
