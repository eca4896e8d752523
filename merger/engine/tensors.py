"""Merging tensors that are in memory, checked as a recipe and its inputs are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merger.engine.tensor_arguments import check_arguments, unfit_values
from merger.errors import CheckpointError, RecipeError, nearest
from merger.pipeline.in_memory import merge_stages
from merger.pipeline.registry import Stage
from merger.recipe.calibration_faults import needs_text
from merger.recipe.document import Document, KeyPath
from merger.recipe.sections import expert_name
from merger.recipe.stages import stages_of

if TYPE_CHECKING:
    from torch import Tensor


_WITHOUT_INPUTS = (
    "looks at layer inputs; give layer_inputs={tensor: {'second_moment': ...}}, or merge folders with their text"
)


def merge_tensors(
    method: str | Sequence[str | Mapping[str, Any]],
    base: Mapping[str, Tensor],
    experts: Mapping[str, Mapping[str, Tensor]],
    *,
    kinds: Mapping[str, str] | None = None,
    layer_inputs: Mapping[str, Mapping[str, Tensor]] | None = None,
    seed: int = 0,
    expert: str | None = None,
    **parameters: Any,
) -> dict[str, Tensor]:
    """Merges tensors in memory by the same arithmetic as `merge` does files; float32 in and out.

    >>> merge_tensors("ties", base, {"code": code, "french": french}, density=0.2)  # doctest: +SKIP

    ``method`` is a method or a stage with its ``parameters``, or a pipeline as a recipe writes it. A parameter that is
    a word of Python ends in an underscore: ``lambda_``. ``base`` maps names to tensors, ``experts`` an expert's name to
    its tensors of the same names and shapes. ``kinds`` are by tensor, as rules of a recipe name them; a tensor of two
    or more axes is `linear` if not given. ``layer_inputs`` are by tensor, for methods that look at them:
    ``second_moment`` [k 1 c] and the like. Where a method makes a pack, ``expert`` is whose tensors are rebuilt of it.

    Raises RecipeError with all arguments of another type or with all faults of the method and its parameters, and
    CheckpointError with all tensors that do not fit the base or hold NaN or infinity.
    """
    check_arguments(method, base, experts, kinds=kinds, layer_inputs=layer_inputs, seed=seed)
    stages = _checked_stages(method, parameters, list(experts), has_inputs=bool(layer_inputs))
    if expert is not None and expert not in experts:
        raise RecipeError(f"expert={expert!r}: there is no such expert; {nearest(expert, experts)}")
    misfits = [fault for name, tensors in experts.items() for fault in _misfits(name, tensors, base)]
    misfits += [fault for label, tensors in {"base": base, **experts}.items() for fault in unfit_values(label, tensors)]
    if misfits:
        raise CheckpointError("\n".join(misfits))
    return merge_stages(stages, base, experts, kinds=kinds, inputs=layer_inputs, seed=seed, expert=expert)


def _checked_stages(
    method: str | Sequence[str | Mapping[str, Any]],
    parameters: Mapping[str, Any],
    experts: Sequence[str],
    *,
    has_inputs: bool,
) -> list[Stage]:
    """Returns the stages of a method or pipeline; RecipeError with all of their faults."""
    names = {"method": method} if isinstance(method, str) else {"pipeline": list(method)}
    node = {**names, "parameters": {name.rstrip("_"): value for name, value in parameters.items()}}
    faults = list(_expert_faults(experts))
    stages = stages_of(node, (), dict.fromkeys(experts, Fraction(1)), faults)
    if not has_inputs and not faults and needs_text(stages, experts):
        faults.append(((*names,), _WITHOUT_INPUTS))
    if faults:
        document = Document("merge_tensors", Path(), node)
        raise RecipeError([document.fault(path, message) for path, message in faults])
    return stages


def _expert_faults(experts: Sequence[str]) -> Iterator[tuple[KeyPath, str]]:
    if not experts:
        yield ("experts",), "is {}, expected at least 1 of them"
    for name in experts:
        try:
            expert_name(name)
        except ValueError as error:
            yield ("experts", name), str(error)


def _misfits(expert: str, tensors: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> Iterator[str]:
    """The tensors of an expert that the base has not, or in another shape, and those that the expert lacks."""
    for name in sorted(base.keys() | tensors.keys()):
        if name not in tensors:
            yield f"{expert}: has no {name}, which the base has"
        elif name not in base:
            yield f"{expert}: has {name}, which the base has not"
        elif tensors[name].shape != base[name].shape:
            yield f"{expert}: {name} is {list(tensors[name].shape)}, but {list(base[name].shape)} in base"
