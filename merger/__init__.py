"""Merge language-model checkpoints: streamed, reproducible, and with methods that look at activations.

    import merger

    recipe = merger.Recipe.load("recipe.yaml")
    print(merger.plan(recipe).bytes_written)
    result = merger.merge(recipe, merger.RunOptions(progress=lambda step, done, total: print(step, done / total)))

Everything the commands do is one of these calls; they raise `MergerError` for what a user can mend.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from merger._version import VERSION

if TYPE_CHECKING:
    from merger.engine.calibrate import calibrate
    from merger.engine.merge import Result, merge
    from merger.engine.output_plan import plan
    from merger.engine.tensors import merge_tensors
    from merger.errors import CheckpointError, MergerError, RecipeError, ResourceError, VerifyError
    from merger.evaluation import evaluate
    from merger.evaluation.search import search
    from merger.inspection import Inspection, inspect, inspect_merge, inspect_model
    from merger.options import RunOptions
    from merger.outputs.extract import Extraction, extract
    from merger.outputs.lock import check_lock, is_done, lock
    from merger.outputs.lora import LoraExtraction, extract_lora
    from merger.outputs.push import Pushed, push
    from merger.outputs.verify import DeepCheck, Verification, verify
    from merger.planning.plan import Plan
    from merger.recipe.recipe import Recipe

__version__ = VERSION

_HOMES = {
    "CheckpointError": "errors",
    "Extraction": "outputs.extract",
    "Inspection": "inspection",
    "LoraExtraction": "outputs.lora",
    "DeepCheck": "outputs.verify",
    "MergerError": "errors",
    "Plan": "planning.plan",
    "Recipe": "recipe.recipe",
    "Pushed": "outputs.push",
    "RecipeError": "errors",
    "ResourceError": "errors",
    "Result": "engine.merge",
    "RunOptions": "options",
    "Verification": "outputs.verify",
    "VerifyError": "errors",
    "calibrate": "engine.calibrate",
    "evaluate": "evaluation",
    "inspect": "inspection",
    "inspect_merge": "inspection",
    "inspect_model": "inspection",
    "check_lock": "outputs.lock",
    "extract": "outputs.extract",
    "extract_lora": "outputs.lora",
    "is_done": "outputs.lock",
    "lock": "outputs.lock",
    "merge": "engine.merge",
    "merge_tensors": "engine.tensors",
    "plan": "engine.output_plan",
    "push": "outputs.push",
    "search": "evaluation.search",
    "verify": "outputs.verify",
}
__all__ = [
    "CheckpointError",
    "DeepCheck",
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
    "RunOptions",
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


def __dir__() -> list[str]:
    """The public names, which completion in a notebook offers."""
    return [*__all__, "__version__"]
