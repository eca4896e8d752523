"""Loads a checkpoint's weights into a model and drops them again, module by module."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from itertools import chain
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

from merger.calibration.moments import InputSums, Moments, stack_moments
from merger.checkpoint.parameter_names import WeightGroup, locate
from merger.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

    from merger.calibration.input_observer import MatrixKey
    from merger.checkpoint.checkpoint import Checkpoint


class TensorSource(Protocol):
    """Reads a checkpoint's tensors by name."""

    def read(self, name: str) -> Tensor:
        """Reads a whole tensor."""


class Loader:
    """Puts a checkpoint's weights into a model that was built without, and takes them out again."""

    def __init__(self, model: Any, weights: Checkpoint, device: torch.device, dtype: torch.dtype) -> None:
        self.model, self.device, self.dtype = model, device, dtype
        self._weights = weights
        self._groups = locate(model, weights.tensors, weights.original_names)
        self._meta_parameters = dict(model.named_parameters(remove_duplicate=False))
        aliases: dict[int, list[str]] = defaultdict(list)
        for name, parameter in self._meta_parameters.items():
            aliases[id(parameter)].append(name)
        self._aliases = {name: aliases[id(parameter)] for name, parameter in self._meta_parameters.items()}
        self._at: dict[int, tuple[str, Tensor]] = {}  # what lies where in memory
        self._stays_float32 = _float32_parameters(model, dtype)
        for module in model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                module._buffers[name] = buffer.to(device)

    def load(self, prefix: str, source: TensorSource, *, recurse: bool = True) -> None:
        """Loads the weights of the module of this name from ``source``, with those of the modules in it or without."""
        names = self._module_tensors(prefix, recurse)
        for name in names:
            if name in self._meta_parameters and self._group(name) is None:
                raise CheckpointError(f"{self._weights.label}: {name} is not in the checkpoint, but its model needs it")
        groups = {id(group): group for group in map(self._group, names) if group is not None}
        for group in groups.values():
            tensors = {name: source.read(name) for _, name in group.names}
            for target, tensor in group.convert(tensors, self.model).items():
                for name in self._aliases.get(target, [target]):
                    if name in names:
                        self._place_tensor(name, tensor)

    def drop(self, prefix: str) -> None:
        """Takes the weights of the module out again."""
        for name in self._module_tensors(prefix, True):
            if name in self._meta_parameters:
                self.place(name, self._meta_parameters[name])

    def place(self, name: str, parameter: nn.Parameter) -> None:
        """Makes a tensor the parameter of this name; one on the meta device is nowhere in memory."""
        module, _, leaf = name.rpartition(".")
        parameters = self.model.get_submodule(module)._parameters
        if not parameters[leaf].is_meta:
            self._at.pop(parameters[leaf].untyped_storage().data_ptr(), None)
        parameters[leaf] = parameter
        if not parameter.is_meta:
            self._at[parameter.untyped_storage().data_ptr()] = self.first_name(name), parameter

    @cached_property
    def plain_parameters(self) -> Mapping[str, str]:
        """By name of a stored tensor, the parameter that it is as it is stored."""
        groups = [group for group in self._groups.values() if group.converter is None]
        names = {group.target: [name for _, name in group.names] for group in groups}
        return {name: target for target, [name, *further] in names.items() if not further}

    def find(self, tensor: Tensor) -> tuple[str, Tensor] | None:
        """The loaded parameter that a tensor is, or is a part of, by its first name and itself."""
        return None if tensor.is_meta else self._at.get(tensor.untyped_storage().data_ptr())

    def first_name(self, name: str) -> str:
        """The one name that all uses of a tied parameter go by."""
        return self._aliases[name][0]

    def _module_tensors(self, prefix: str, recurse: bool) -> dict[str, None]:
        """The names of a module's parameters, and of its buffers that are stored; in order."""
        module = self.model.get_submodule(prefix)
        parameters = module.named_parameters(prefix, recurse, remove_duplicate=False)
        buffers = module.named_buffers(prefix, recurse)
        names = [name for name, _ in parameters] + [name for name, _ in buffers if name in self._groups]
        return dict.fromkeys(names)

    def _group(self, name: str) -> WeightGroup | None:
        """Returns the tensors that make a parameter; tied parameters share the group that is stored for any of them."""
        return next((self._groups[alias] for alias in self._aliases.get(name, [name]) if alias in self._groups), None)

    def _place_tensor(self, name: str, tensor: Tensor) -> None:
        module, _, leaf = name.rpartition(".")
        owner = self.model.get_submodule(module)
        empty = self._meta_parameters.get(name, owner._buffers.get(leaf))
        if tensor.shape != empty.shape:
            raise CheckpointError(
                f"{self._weights.label}: {name} is {tuple(tensor.shape)} in the checkpoint, "
                f"but {tuple(empty.shape)} in the model that its config.json describes"
            )
        if name not in self._meta_parameters:
            owner._buffers[leaf] = tensor.to(self.device, empty.dtype)
            return
        if tensor.nbytes < tensor.untyped_storage().nbytes():
            tensor = tensor.clone()  # a part of another, whose place in memory would name them both
        float_dtype = torch.float32 if self._stays_float32(name) else self.dtype
        dtype = float_dtype if tensor.is_floating_point() else tensor.dtype
        self.place(name, nn.Parameter(tensor.to(self.device, dtype), requires_grad=False))

    # --- statistics, under the checkpoint's names ---------------------------------------------------

    def moments_by_name(
        self, sums_by_key: Mapping[MatrixKey, InputSums], axes: Mapping[str, int | None]
    ) -> dict[str, Moments]:
        """The sums of parameters, and the axes that met the inputs, as moments of the checkpoint's own tensors."""
        slots: dict[str, dict[int | None, Moments]] = defaultdict(dict)
        for key, sums in sums_by_key.items():
            slots[key.name][key.slot] = sums.moments()
        moments: dict[str, Moments] = {}
        for name, slot_moments in slots.items():
            packed = [] if None in slot_moments else _all_slots(slot_moments, self._meta_parameters[name].shape[0])
            for source, slot in self.stored(name):
                tensor_moments = (
                    slot_moments[None] if not packed else stack_moments(packed) if slot is None else packed[slot]
                )
                moments[source] = replace(tensor_moments, axis=self._stored_axis(axes.get(name), name, source))
        return moments

    def _stored_axis(self, axis: int | None, name: str, source: str) -> int | None:
        """The axis of a stored tensor that becomes an axis, -1 or -2, of a parameter."""
        group, shape = self._group(name), self._weights.tensors[source].shape
        turned = group is not None and group.transposes(shape, self._meta_parameters[name].shape)
        return -3 - axis if axis and turned else axis

    def stored(self, name: str) -> Iterator[tuple[str, int | None]]:
        """The checkpoint's tensors behind a parameter, each with the slice of it that it makes alone."""
        groups = {
            id(self._groups[alias]): self._groups[alias] for alias in self._aliases[name] if alias in self._groups
        }
        for index, source in chain.from_iterable(group.names for group in groups.values()):
            is_single = len(self._weights.tensors[source].shape) < self._meta_parameters[name].dim()
            yield source, index if is_single else None


def _all_slots(slot_moments: Mapping[int | None, Moments], size: int) -> list[Moments]:
    """The moments of all packed experts: zero for those that no token reached."""
    example = next(iter(slot_moments.values()))

    def zero(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else torch.zeros_like(tensor)

    empty = Moments(
        torch.zeros_like(example.count),
        zero(example.second_moment),
        zero(example.mean),
        zero(example.gram),
        cross=zero(example.cross),
    )
    return [slot_moments.get(slot, empty) for slot in range(size)]


def _float32_parameters(model: Any, dtype: torch.dtype) -> Callable[[str], bool]:
    """Which parameters transformers itself would not load in half precision."""
    module_names = set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    if dtype == torch.float16:
        module_names |= set(getattr(model, "_keep_in_fp32_modules", None) or ())
    return lambda name: dtype != torch.float32 and not module_names.isdisjoint(name.split("."))
