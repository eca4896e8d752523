"""What calibration takes of a machine, from headers alone: memory while it runs, and disk for what it keeps.

All of it is an upper bound: a header does not tell which matrices share their inputs, nor how long the text is.
"""

from __future__ import annotations

from collections import Counter

from merger.checkpoint.anatomy import text_config
from merger.planning.planner import Plan, TensorPlan


def while_watching(plan: Plan) -> int:
    """Bytes that an expert's forward passes take: its embedding, or a block in float32 and the sums over its inputs.

    Gram matrices are summed up in float64 for one expert at a time; those of the others wait in float32.
    """
    if not plan.calibrated:
        return 0
    weights, squares = Counter[str](), Counter[str]()
    for tensor in plan.tensors:
        weights[tensor.unit] += 4 * tensor.info.elements
        squares[tensor.unit] += (8 + 4 * len(plan.recipe.experts)) * _squares(tensor)
    return max(weights[unit] + squares[unit] for unit in weights)


def while_merging(plan: Plan) -> int:
    """Bytes of a block's Gram matrices of all experts, which wait until all of its matrices are merged."""
    squares = Counter[str]()
    for tensor in plan.tensors:
        squares[tensor.unit] += 4 * len(plan.recipe.experts) * _squares(tensor)
    return max(squares.values(), default=0)


def hidden_states(plan: Plan) -> int:
    """Bytes of all samples' hidden states, which wait between two blocks: of all experts at once for Gram matrices."""
    given = plan.recipe.calibration
    if given is None or not plan.calibrated:
        return 0
    said = given.samples
    each = {name: said.get(name, 100) if isinstance(said, dict) else said for name in plan.recipe.experts}
    samples = sum(each.values()) if any(tensor.gram for tensor in plan.tensors) else max(each.values())
    width = text_config(plan.base.config).get("hidden_size", 0)
    return 4 * samples * given.max_tokens * (width if isinstance(width, int) else 0)


def kept_grams(plan: Plan) -> int:
    """Bytes of the folders that `merger calibrate --gram` makes."""
    triangles = sum(_triangles(tensor) for tensor in plan.tensors)
    return 4 * len(plan.recipe.experts) * triangles


def _squares(tensor: TensorPlan) -> int:
    """The numbers of all Gram matrices that one expert's inputs to a tensor have."""
    return sum(part.columns**2 for part in tensor.parts) if tensor.gram else 0


def _triangles(tensor: TensorPlan) -> int:
    return sum(part.columns * (part.columns + 1) // 2 for part in tensor.parts) if tensor.gram else 0
