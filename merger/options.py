"""How a command runs on this machine; none of the options changes what is computed beyond rounding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

Progress = Callable[[str, int, int], None]
"""Receives the name of a step, the amount of it that is done, and the total amount as far as it is known.

The steps ``merging``, ``inspecting``, ``verifying`` and ``extracting`` count bytes; ``calibrating NAME`` counts forward
passes of a batch through a block.
"""

Notice = Callable[[str], None]
"""Receives a remark for the user, one sentence."""


def ignore(*_: object) -> None:
    """Discards progress and remarks."""


@dataclass(frozen=True)
class RunOptions:
    """The options that every function of the library takes which reads or writes models."""

    device: str = "auto"  # auto, cpu, cuda (all CUDA devices) or cuda:N
    max_memory: int | None = None  # bytes of host memory; None: no limit
    offline: bool = False  # only the Hub's cache is used
    trust_remote_code: bool = False  # calibration may run code that comes with a checkpoint
    progress: Progress = ignore
    notice: Notice = ignore
