"""The memory that forward passes over calibration text take, from headers alone.

All of it is an upper bound: a header does not tell which matrices share their inputs, nor how long the text is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from merger.checkpoint.tensor_kinds import text_config
from merger.planning.plan import Plan


def largest_block_bytes(plan: Plan, sums: Mapping[str, int] | None = None) -> int:
    """Bytes of the largest block, or embedding, in float32, with the ``sums`` over its inputs by block."""
    weights = Counter[str](sums or {})
    for tensor in plan.tensors:
        weights[tensor.unit] += 4 * tensor.info.elements
    return max(weights.values())


def activation_bytes(plan: Plan, tokens: int = 1024) -> int:
    """Bytes that a block's activations take while gradients go through it: some forty vectors for each token."""
    width = text_config(plan.base.config).get("hidden_size", 0)
    return 4 * 40 * tokens * (width if isinstance(width, int) else 0)


def hidden_state_bytes(plan: Plan, experts_at_once: int) -> int:
    """Bytes of all samples' hidden states, which wait between two blocks: of one expert, or of all at once."""
    calibration = plan.recipe.calibration
    if calibration is None:
        return 0
    samples = calibration.samples
    counts = [samples.get(name, 100) if isinstance(samples, dict) else samples for name in plan.recipe.experts]
    width = text_config(plan.base.config).get("hidden_size", 0)
    tokens = (sum(counts) if experts_at_once > 1 else max(counts)) * calibration.max_tokens
    return 4 * tokens * (width if isinstance(width, int) else 0)
