"""Devices that are not there: tensors in the memory of the CPU that say they are elsewhere, and will not meet others.

What PyTorch refuses of tensors on different devices is refused here without having any: an operation on several of
them, but for copies, and for single numbers of the CPU, which every device takes; so is looking into a device's memory
from Python. All else is done on the CPU.
"""

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

from merger.ops.kernels import lazy

Tensor = torch.Tensor
CPU = torch.device("cpu")
COPIES = (Tensor.copy_, Tensor.__setitem__)
LOOKS = (Tensor.numpy, Tensor.data_ptr, Tensor.__array__)


class Away(Tensor):
    """A tensor that says it is on the device ``home``."""

    home: torch.device

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        return carried_out(function, args, kwargs or {})


class Pretence(TorchFunctionMode):
    """Within it tensors can be made on any device, and sent there; in this thread, as all modes of torch."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        return carried_out(function, args, kwargs or {})


def carried_out(function, args, kwargs):
    """One call of torch, if the devices of its tensors allow it."""
    with torch._C.DisableTorchFunction():
        args, kwargs = lazy.plain(args), lazy.plain(kwargs)
        own = device_of(args[0]) if args else CPU
        if function == Tensor.device.__get__:
            return own
        if function == Tensor.is_cpu.__get__:
            return own == CPU
        if function in LOOKS and own != CPU:
            raise TypeError(f"{function.__name__}: the tensor is on {own}, not in the memory of the CPU")
        if function is Tensor.cpu:
            return copied(args[0], CPU)
        if function is Tensor.to:
            return sent(*args, **kwargs)
        where = own if function in COPIES else meeting_place(function, args, kwargs)
        if kwargs.get("device") is not None:
            where, kwargs = torch.device(kwargs["device"]), {**kwargs, "device": CPU}
        made = function(*plain(args), **plain({**kwargs, "pin_memory": False} if "pin_memory" in kwargs else kwargs))
        return tree_map_only(Tensor, lambda each: said_to_be(each, where), made)


def meeting_place(function, args, kwargs):
    """The device of a call's tensors; RuntimeError where they are on several."""
    tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
    found = {device_of(each) for each in tensors} - {CPU}
    if found and any(device_of(each) == CPU and each.ndim for each in tensors):
        found.add(CPU)
    if len(found) > 1:
        raise RuntimeError(f"{function.__name__}: tensors on {' and '.join(sorted(map(str, found)))} meet")
    return found.pop() if found else CPU


def sent(tensor, *given, device=None, non_blocking=False, **others):
    """Tensor.to: another device, dtype, or those of another tensor."""
    where = device_of(tensor) if device is None else torch.device(device)
    for each in given:
        where = torch.device(each) if isinstance(each, str | torch.device) else device_of(each, where)
    left = [each for each in plain(given) if not isinstance(each, str | torch.device)]
    changed = said_to_be(plain(tensor).to(*left, **others), device_of(tensor)) if left or others else tensor
    return copied(changed, where)


def copied(tensor, where):
    """A tensor on another device; itself where it is there."""
    return tensor if device_of(tensor) == where else said_to_be(plain(tensor).clone(), where)


def device_of(value, otherwise=CPU):
    """Where a tensor says it is."""
    return value.home if isinstance(value, Away) else CPU if isinstance(value, Tensor) else otherwise


def said_to_be(tensor, where):
    """The same memory on another device."""
    bare = tensor.as_subclass(Tensor)
    if where == CPU:
        return bare
    away = bare.as_subclass(Away)
    away.home = where
    return away


def plain(value):
    """Arguments as what they are."""
    return tree_map_only(Away, lambda each: each.as_subclass(Tensor), value)
