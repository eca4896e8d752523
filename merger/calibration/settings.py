"""What, besides a model and its data, decides the result of a calibration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Settings:
    """The part of a recipe's ``calibration`` section that changes the numbers; docs/calibration.md."""

    samples: int = 100
    max_tokens: int = 2048
    weighting: Literal["token", "sample"] = "token"  # every token alike, or every sample alike
    skip_first_tokens: int = 0  # of each sample: attention sinks, whose activations dwarf the others
    calib_text: Literal["input", "input+target"] = "input"
    seed: int = 0
