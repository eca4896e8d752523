"""A checkpoint's weights, which come into a model and go again module by module."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from itertools import chain
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

from merger.calibration.moments import Moments, Sums, stacked
from merger.calibration.names import Group, locate
from merger.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

    from merger.calibration.input_observer import Key
    from merger.checkpoint.checkpoint import Checkpoint


class Readable(Protocol):
    """What gives a checkpoint's tensors by name."""

    def read(self, name: str) -> Tensor:
        """A whole tensor."""


class Loader:
    """Puts a checkpoint's weights into a model that was built without, and takes them out again."""

    def __init__(self, model: Any, weights: Checkpoint, device: torch.device, dtype: torch.dtype) -> None:
        self.model, self.device, self.dtype = model, device, dtype
        self._weights = weights
        self._groups = locate(model, weights.tensors)
        self._empty = dict(model.named_parameters(remove_duplicate=False))
        aliases: dict[int, list[str]] = defaultdict(list)
        for name, parameter in self._empty.items():
            aliases[id(parameter)].append(name)
        self._aliases = {name: aliases[id(parameter)] for name, parameter in self._empty.items()}
        self._at: dict[int, tuple[str, Tensor]] = {}  # what lies where in memory
        self._exact = _kept_in_float32(model, dtype)
        for module in model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                module._buffers[name] = buffer.to(device)

    def load(self, prefix: str, source: Readable, *, recurse: bool = True) -> None:
        """Loads the weights of the module of this name from ``source``, with those of the modules in it or without."""
        wanted = self._held(prefix, recurse)
        for name in wanted:
            if name in self._empty and self._group(name) is None:
                raise CheckpointError(f"{self._weights.label}: {name} is not in the checkpoint, but its model needs it")
        groups = {id(group): group for group in map(self._group, wanted) if group is not None}
        for group in groups.values():
            for target, tensor in self._converted(group, source).items():
                for name in self._aliases.get(target, [target]):
                    if name in wanted:
                        self._put(name, tensor)

    def drop(self, prefix: str) -> None:
        """Takes the weights of the module out again."""
        for name in self._held(prefix, True):
            if name in self._empty:
                self.place(name, self._empty[name])

    def place(self, name: str, parameter: nn.Parameter) -> None:
        """Makes a tensor the parameter of this name; one on the meta device is nowhere in memory."""
        module, _, leaf = name.rpartition(".")
        parameters = self.model.get_submodule(module)._parameters
        if not parameters[leaf].is_meta:
            self._at.pop(parameters[leaf].untyped_storage().data_ptr(), None)
        parameters[leaf] = parameter
        if not parameter.is_meta:
            self._at[parameter.untyped_storage().data_ptr()] = self.first_name(name), parameter

    def find(self, tensor: Tensor) -> tuple[str, Tensor] | None:
        """The loaded parameter that a tensor is, or is a part of, by its first name and itself."""
        return None if tensor.is_meta else self._at.get(tensor.untyped_storage().data_ptr())

    def first_name(self, name: str) -> str:
        """The one name that all uses of a tied parameter go by."""
        return self._aliases[name][0]

    def _held(self, prefix: str, recurse: bool) -> dict[str, None]:
        """The names of a module's parameters, and of its buffers that are stored; in order."""
        module = self.model.get_submodule(prefix)
        parameters = module.named_parameters(prefix, recurse, remove_duplicate=False)
        buffers = module.named_buffers(prefix, recurse)
        names = [name for name, _ in parameters] + [name for name, _ in buffers if name in self._groups]
        return dict.fromkeys(names)

    def _group(self, name: str) -> Group | None:
        """What a parameter is made of: tied ones of what is stored for any of them."""
        return next((self._groups[each] for each in self._aliases.get(name, [name]) if each in self._groups), None)

    def _converted(self, group: Group, source: Readable) -> dict[str, Tensor]:
        tensors = {name: source.read(name) for _, name in group.names}
        if group.converter is None:
            return {group.target: next(iter(tensors.values()))}
        converter = copy.deepcopy(group.converter)
        for pattern, names in group.sources.items():
            for name in names:
                converter.add_tensor(group.target, name, pattern, tensors.pop(name))
        made = converter.convert(group.target, model=self.model, config=self.model.config)
        return {name: tensor[0] if isinstance(tensor, list) else tensor for name, tensor in made.items()}

    def _put(self, name: str, tensor: Tensor) -> None:
        module, _, leaf = name.rpartition(".")
        owner = self.model.get_submodule(module)
        empty = self._empty.get(name, owner._buffers.get(leaf))
        if tensor.shape != empty.shape:
            raise CheckpointError(
                f"{self._weights.label}: {name} is {tuple(tensor.shape)} in the checkpoint, "
                f"but {tuple(empty.shape)} in the model that its config.json describes"
            )
        if name not in self._empty:
            owner._buffers[leaf] = tensor.to(self.device, empty.dtype)
            return
        if tensor.nbytes < tensor.untyped_storage().nbytes():
            tensor = tensor.clone()  # a part of another, whose place in memory would name them both
        dtype = tensor.dtype if not tensor.is_floating_point() else torch.float32 if self._exact(name) else self.dtype
        self.place(name, nn.Parameter(tensor.to(self.device, dtype), requires_grad=False))

    # --- statistics, under the checkpoint's names ---------------------------------------------------

    def named(self, sums: Mapping[Key, Sums], axes: Mapping[str, int | None]) -> dict[str, Moments]:
        """The sums of parameters, and the axes that met the inputs, as moments of the checkpoint's own tensors."""
        slots: dict[str, dict[int | None, Moments]] = defaultdict(dict)
        for key, each in sums.items():
            slots[key.name][key.slot] = each.moments()
        moments: dict[str, Moments] = {}
        for name, known in slots.items():
            packed = [] if None in known else _filled(known, self._empty[name].shape[0])
            for source, slot in self.stored(name):
                whole = known[None] if not packed else stacked(packed) if slot is None else packed[slot]
                moments[source] = replace(whole, axis=self._stored_axis(axes.get(name), name, source))
        return moments

    def _stored_axis(self, axis: int | None, name: str, source: str) -> int | None:
        """The axis of a stored tensor that becomes an axis, -1 or -2, of a parameter."""
        group, shape = self._group(name), self._weights.tensors[source].shape
        turned = group is not None and group.transposes(shape, self._empty[name].shape)
        return -3 - axis if axis and turned else axis

    def stored(self, name: str) -> Iterator[tuple[str, int | None]]:
        """The checkpoint's tensors behind a parameter, each with the slice of it that it makes alone."""
        groups = {id(self._groups[each]): self._groups[each] for each in self._aliases[name] if each in self._groups}
        for index, source in chain.from_iterable(group.names for group in groups.values()):
            alone = len(self._weights.tensors[source].shape) < self._empty[name].dim()
            yield source, index if alone else None


def _filled(known: Mapping[int | None, Moments], size: int) -> list[Moments]:
    """The moments of all packed experts: zero for those that no token reached."""
    one = next(iter(known.values()))

    def zero(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else torch.zeros_like(tensor)

    none = Moments(torch.zeros_like(one.count), zero(one.second_moment), zero(one.mean), zero(one.gram))
    return [known.get(slot, none) for slot in range(size)]


def _kept_in_float32(model: Any, dtype: torch.dtype) -> Callable[[str], bool]:
    """Which parameters transformers itself would not load in half precision."""
    kept = set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    if dtype == torch.float16:
        kept |= set(getattr(model, "_keep_in_fp32_modules", None) or ())
    return lambda name: dtype != torch.float32 and not kept.isdisjoint(name.split("."))
