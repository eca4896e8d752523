"""Merge language-model checkpoints: streamed, reproducible, and with methods that look at activations.

    import merger

    recipe = merger.Recipe.load("recipe.yaml")
    print(merger.plan(recipe).bytes_written)
    result = merger.merge(recipe, progress=lambda what, done, total: print(what, done / total))

Everything the commands do is one of these calls; they raise `MergerError` for what a user can mend.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from merger._version import VERSION

if TYPE_CHECKING:
    from merger.errors import CheckpointError, MergerError, RecipeError, ResourceError, VerifyError
    from merger.evaluation import evaluate
    from merger.extraction import Extraction, extract
    from merger.inspection import Inspection, inspect, inspect_merge, inspect_model
    from merger.locking import check_lock, is_done, lock
    from merger.lora import LoraExtraction, extract_lora
    from merger.pipeline import merge_tensors
    from merger.planning import Plan, plan
    from merger.pushing import Pushed, push
    from merger.recipe import Recipe
    from merger.run import Result, calibrate, merge
    from merger.searching import search
    from merger.verification import Deep, Verification, verify

__version__ = VERSION

_HOMES = {
    "CheckpointError": "errors",
    "Extraction": "extraction",
    "Inspection": "inspection",
    "LoraExtraction": "lora",
    "Deep": "verification",
    "MergerError": "errors",
    "Plan": "planning",
    "Recipe": "recipe",
    "Pushed": "pushing",
    "RecipeError": "errors",
    "ResourceError": "errors",
    "Result": "run",
    "Verification": "verification",
    "VerifyError": "errors",
    "calibrate": "run",
    "evaluate": "evaluation",
    "inspect": "inspection",
    "inspect_merge": "inspection",
    "inspect_model": "inspection",
    "check_lock": "locking",
    "extract": "extraction",
    "extract_lora": "lora",
    "is_done": "locking",
    "lock": "locking",
    "merge": "run",
    "merge_tensors": "pipeline",
    "plan": "planning",
    "push": "pushing",
    "search": "searching",
    "verify": "verification",
}
__all__ = [
    "CheckpointError",
    "Deep",
    "Extraction",
    "Inspection",
    "LoraExtraction",
    "MergerError",
    "Plan",
    "Pushed",
    "Recipe",
    "RecipeError",
    "ResourceError",
    "Result",
    "Verification",
    "VerifyError",
    "calibrate",
    "check_lock",
    "evaluate",
    "extract",
    "extract_lora",
    "inspect",
    "inspect_merge",
    "inspect_model",
    "is_done",
    "lock",
    "merge",
    "merge_tensors",
    "plan",
    "push",
    "search",
    "verify",
]


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first asked for, so that `merger --help` answers at once."""
    if name not in _HOMES:
        raise AttributeError(f"module 'merger' has no attribute {name!r}")
    return getattr(import_module(f"merger.{_HOMES[name]}"), name)
