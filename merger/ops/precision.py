"""Products of float32 matrices in full precision, whatever the process has chosen for its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from merger._lazy import torch


@contextmanager
def full_float32() -> Iterator[None]:
    """Turns TF32 off within it, for matrix products and convolutions on CUDA, and restores what was chosen before.

    TF32 keeps 10 bits of a factor's mantissa, so a Gram matrix would be off by 1e-4 of its size. The choice is the
    process's: other threads have it too as long as this lasts.
    """
    choices = _tf32_choices()
    for place, name, _, full in choices:
        setattr(place, name, full)
    try:
        yield
    finally:
        for place, name, setting, _ in choices:
            setattr(place, name, setting)


def _tf32_choices() -> list[tuple[Any, str, Any, Any]]:
    """Where torch keeps its choices about TF32: object, attribute, value now, value for full precision.

    torch 2.9 and later has `fp32_precision` beside `allow_tf32`, and refuses to read the older name where the newer one
    was set last.
    """
    cuda: Any = torch.backends.cuda
    cudnn: Any = torch.backends.cudnn
    try:
        return [(place, "allow_tf32", place.allow_tf32, False) for place in (cuda.matmul, cudnn)]
    except RuntimeError:
        newer = (cuda.matmul, cudnn.conv, cudnn.rnn)
        return [(place, "fp32_precision", place.fp32_precision, "ieee") for place in newer]
