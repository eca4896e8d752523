"""Pretended devices: tensors in host memory that claim another device, with PyTorch's rules between devices.

Refused, as by PyTorch: an operation on tensors of several devices, but for copies and for single numbers on the CPU;
a look into a device's memory from Python. Everything else is computed on the CPU: by `Pretence` with the CPU's own
bits, by `CudaRounding` with other ones wherever CUDA's may be others.
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
    """A tensor that claims to be on the device ``home``."""

    home: torch.device

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        return carried_out(function, args, kwargs or {})


class Pretence(TorchFunctionMode):
    """Within it tensors can be made on any device and sent there; in one thread, as all modes of torch."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        return carried_out(function, args, kwargs or {}, self.compute)

    @staticmethod
    def compute(function, args, kwargs):
        """The result of an operation whose tensors are on a device; here as on the CPU."""
        return function(*plain(args), **plain(kwargs))


class CudaRounding(Pretence):
    """The same, rounding as CUDA does where that is known, and visibly otherwise where it is not.

    The quotient by a number is a product with its reciprocal (aten/src/ATen/native/cuda/BinaryDivTrueKernel.cu). What
    depends on the order of a sum, on a library of functions or on fused multiplications is off by a thousandth.
    """

    @staticmethod
    def compute(function, args, kwargs):
        name = getattr(function, "__name__", "").strip("_")
        if name in QUOTIENTS and is_number(args[1]) and not kwargs:
            return quotient(function, plain(args[0]), plain(args[1]))
        result = Pretence.compute(function, args, kwargs)
        return shifted(result) if name in UNCERTAIN and not is_whole(args) else result


QUOTIENTS = {"div", "divide", "true_divide", "truediv", "itruediv"}
UNCERTAIN = {
    "sum", "mean", "cumsum", "prod", "std", "var", "norm", "vector_norm", "matrix_norm", "trace", "dot", "einsum",
    "matmul", "rmatmul", "mm", "bmm", "mv", "addmm", "baddbmm", "multi_dot", "linear", "cdist", "softmax",
    "exp", "log", "sin", "cos", "acos", "tanh", "sigmoid", "erf", "addcmul", "addcdiv", "lerp",
    "eigh", "eigvalsh", "svd", "svdvals", "qr", "inv", "pinv", "cholesky", "cholesky_ex", "cholesky_solve",
}  # fmt: skip


def is_number(divisor):
    """Whether CUDA takes a divisor for a number: one of Python, or a single one in host memory."""
    return not isinstance(divisor, Tensor) or (device_of(divisor) == CPU and divisor.ndim == 0)


def quotient(function, dividend, divisor):
    """The dividend times the reciprocal, both in the dtype in which CUDA computes."""
    dtype = torch.result_type(dividend, divisor)
    dtype = dtype if dtype.is_floating_point else torch.get_default_dtype()
    exact = torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
    reciprocal = 1 / torch.as_tensor(divisor).to(exact)
    product = (dividend.to(exact) * reciprocal).to(dtype)
    in_place = function.__name__ in ("__itruediv__", "div_", "divide_", "true_divide_")
    return dividend.copy_(product) if in_place else product


def is_whole(args):
    """Whether all numbers are whole and small, so that no order of a sum rounds."""
    tensors = [plain(leaf) for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
    return all(not leaf.is_floating_point() or bool((leaf == leaf.round()).all()) for leaf in tensors)


def shifted(result):
    """Floating-point results a thousandth larger, but for zeros."""
    return tree_map_only(Tensor, lambda value: value.mul_(1.001) if value.is_floating_point() else value, result)


def carried_out(function, args, kwargs, compute=Pretence.compute):
    """One call of torch, if the devices of its tensors allow it."""
    with torch._C.DisableTorchFunction():
        args, kwargs = lazy.plain(args), lazy.plain(kwargs)
        tensor_device = device_of(args[0]) if args else CPU
        if function == Tensor.device.__get__:
            return tensor_device
        if function == Tensor.is_cpu.__get__:
            return tensor_device == CPU
        if function in LOOKS and tensor_device != CPU:
            raise TypeError(f"{function.__name__}: the tensor is on {tensor_device}, not in the memory of the CPU")
        if function is Tensor.cpu:
            return copied(args[0], CPU)
        if function is Tensor.to:
            return sent(*args, **kwargs)
        device = tensor_device if function in COPIES else meeting_place(function, args, kwargs)
        if kwargs.get("device") is not None:
            device, kwargs = torch.device(kwargs["device"]), {**kwargs, "device": CPU}
        if "pin_memory" in kwargs:
            kwargs = {**kwargs, "pin_memory": False}
        result = Pretence.compute(function, args, kwargs) if device == CPU else compute(function, args, kwargs)
        return tree_map_only(Tensor, lambda value: said_to_be(value, device), result)


def meeting_place(function, args, kwargs):
    """The device of a call's tensors; RuntimeError where they are on several."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    devices = {device_of(leaf) for leaf in tensors} - {CPU}
    if devices and any(device_of(leaf) == CPU and leaf.ndim for leaf in tensors):
        devices.add(CPU)
    if len(devices) > 1:
        raise RuntimeError(f"{function.__name__}: tensors on {' and '.join(sorted(map(str, devices)))} meet")
    return devices.pop() if devices else CPU


def sent(tensor, *arguments, device=None, non_blocking=False, **options):
    """Tensor.to: another device, dtype, or those of another tensor."""
    target = device_of(tensor) if device is None else torch.device(device)
    for argument in arguments:
        target = torch.device(argument) if isinstance(argument, str | torch.device) else device_of(argument, target)
    conversions = [argument for argument in plain(arguments) if not isinstance(argument, str | torch.device)]
    changed = (
        said_to_be(plain(tensor).to(*conversions, **options), device_of(tensor)) if conversions or options else tensor
    )
    return copied(changed, target)


def copied(tensor, device):
    """A tensor on another device; itself where it is there."""
    return tensor if device_of(tensor) == device else said_to_be(plain(tensor).clone(), device)


def device_of(value, otherwise=CPU):
    """The device that a tensor claims to be on."""
    return value.home if isinstance(value, Away) else CPU if isinstance(value, Tensor) else otherwise


def said_to_be(tensor, device):
    """The same memory on another device."""
    bare = tensor.as_subclass(Tensor)
    if device == CPU:
        return bare
    remote = bare.as_subclass(Away)
    remote.home = device
    return remote


def plain(value):
    """Arguments as what they are."""
    return tree_map_only(Away, lambda item: item.as_subclass(Tensor), value)
