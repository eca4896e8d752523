"""The settings that decide, with a model and its data, the result of a calibration."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Literal

from merger._lazy import torch

if TYPE_CHECKING:
    from merger.checkpoint.checkpoint import Checkpoint


@dataclass(frozen=True)
class Settings:
    """The part of a recipe's ``calibration`` section that changes the numbers; docs/calibration.md."""

    samples: int = 100
    max_tokens: int = 2048
    weighting: Literal["token", "sample"] = "token"  # every token alike, or every sample alike
    skip_first_tokens: int = 0  # of each sample: attention sinks, whose activations dwarf the others
    calib_text: Literal["input", "input+target"] = "input"
    seed: int = 0


@dataclass(frozen=True)
class ForwardPass:
    """The facts that decide the rounding of a forward pass: device, dtype, and versions of the libraries."""

    device: str  # cpu or cuda
    dtype: str
    torch: str  # version
    transformers: str  # version

    @classmethod
    def of(cls, model: Checkpoint, device: str) -> ForwardPass:
        """The forward passes of a checkpoint on a device."""
        place = torch.device(device)
        dtype = str(default_dtype(model, place)).removeprefix("torch.")
        return cls(place.type, dtype, version("torch"), version("transformers"))


def default_dtype(weights: Checkpoint, device: torch.device) -> torch.dtype:
    """float32 on a CPU, where it is fast and exact; elsewhere the dtype in which most tensors are stored."""
    stored = Counter(info.dtype for info in weights.tensors.values())
    half = {"BF16": torch.bfloat16, "F16": torch.float16}
    return torch.float32 if device.type == "cpu" else half.get(stored.most_common(1)[0][0], torch.float32)
