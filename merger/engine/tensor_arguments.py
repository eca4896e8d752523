"""What a caller of `merge_tensors` gives, checked before any arithmetic."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, get_args

from merger._lazy import torch
from merger.errors import RecipeError, nearest
from merger.pipeline.inputs import declared_inputs
from merger.recipe.sections import Kind

if TYPE_CHECKING:
    from torch import Tensor

_BY_EXPERT = "expected each expert's tensors by its name, as in {'code': code, 'french': french}"
_BY_NAME = "expected tensors by name, as model.state_dict() has them"
_INPUTS = "expected inputs by tensor, as in {tensor: {'second_moment': values}}"


def check_arguments(
    method: object,
    base: object,
    experts: object,
    *,
    kinds: object,
    layer_inputs: object,
    seed: object,
) -> None:
    """Raises RecipeError with all arguments that are not what `merge_tensors` takes, and what to pass instead."""
    faults = [*_method_faults(method), *_tensor_faults("base", base)]
    if not isinstance(experts, Mapping):
        faults.append(f"experts: {_BY_EXPERT}, not {_type(experts)}")
    elif any(isinstance(tensors, torch.Tensor) for tensors in experts.values()):
        faults.append(f"experts: {_BY_EXPERT}, not the tensors of one")
    else:
        faults += [
            fault for name, tensors in experts.items() for fault in _tensor_faults(f"experts[{name!r}]", tensors)
        ]
    names = list(base) if isinstance(base, Mapping) else []
    faults += [*_kind_faults(kinds, names), *_input_faults(layer_inputs, names)]
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        faults.append(f"seed={seed!r}: expected a whole number from 0 on")
    if faults:
        raise RecipeError([f"merge_tensors: {fault}" for fault in faults])


def _type(value: object) -> str:
    return type(value).__name__


def _method_faults(method: object) -> Iterator[str]:
    if isinstance(method, str) or (isinstance(method, Sequence) and method):
        return
    yield f"method: expected a method's name, as in 'ties', or a list of stages, not {_type(method)}"


def _tensor_faults(label: str, tensors: object) -> Iterator[str]:
    """The faults of a map that is none of names to tensors; of its values, the first one."""
    if not isinstance(tensors, Mapping):
        yield f"{label}: {_BY_NAME}, not {_type(tensors)}"
        return
    unfit = next((name for name, tensor in tensors.items() if not isinstance(tensor, torch.Tensor)), None)
    if unfit is not None:
        yield f"{label}: {unfit} is {_type(tensors[unfit])}, expected a torch.Tensor"


def _kind_faults(kinds: object, names: Sequence[str]) -> Iterator[str]:
    if kinds is None:
        return
    if not isinstance(kinds, Mapping):
        yield f"kinds: expected kinds by tensor, as in {{'lm_head.weight': 'head'}}, not {_type(kinds)}"
        return
    for name, kind in kinds.items():
        if name not in names:
            yield f"kinds: there is no tensor {name!r} in base; {_near(name, names)}"
        if kind not in get_args(Kind):
            yield f"kinds: {name} is {kind!r}, which is no kind; {nearest(str(kind), get_args(Kind))}"


def _input_faults(layer_inputs: object, names: Sequence[str]) -> Iterator[str]:
    """The faults of inputs by tensor; of the inputs of one tensor, their names and types."""
    if layer_inputs is None:
        return
    if not isinstance(layer_inputs, Mapping):
        yield f"layer_inputs: {_INPUTS}, not {_type(layer_inputs)}"
        return
    for name, inputs in layer_inputs.items():
        if name not in names:
            yield f"layer_inputs: there is no tensor {name!r} in base; {_near(name, names)}"
        if not isinstance(inputs, Mapping):
            yield f"layer_inputs: {name} is {_type(inputs)}; {_INPUTS}"
            continue
        for key, values in inputs.items():
            if key not in declared_inputs():
                yield f"layer_inputs: {name}: there is no input {key!r}; {nearest(str(key), declared_inputs())}"
            elif values is not None and not isinstance(values, torch.Tensor):
                yield f"layer_inputs: {name}: {key} is {_type(values)}, expected a torch.Tensor"


def _near(name: Any, names: Sequence[str]) -> str:
    """The nearest name of a tensor, or else how many there are, for they may be thousands."""
    suggestion = nearest(str(name), names)
    return suggestion if suggestion.startswith("did") else f"it has {len(names)}"


def unfit_values(label: str, tensors: Mapping[str, Tensor]) -> Iterator[str]:
    """The tensors of a model that hold NaN or infinity."""
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            yield f"{label}: {name} holds NaN or infinity"
