"""How coefficients of task vectors are learned through the whole model, as the stages say that take them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from merger.planning.plan import TensorPlan

INPUT = "model_coefficients"
"""The input of stages that these coefficients are."""


@dataclass(frozen=True)
class Descent:
    """Steps of gradient descent on the coefficients of all tensors together."""

    objective: str
    per: str
    steps: int
    rate: float
    clamp: bool

    @classmethod
    def of(cls, tensor: TensorPlan) -> Descent:
        """How the coefficients of a tensor are learned."""
        values = _values(tensor)
        return cls(values["objective"], values["per"], values["steps"], float(values["rate"]), values["clamp"])


def start(tensor: TensorPlan) -> float:
    """What the coefficients of a tensor are before the first step."""
    return float(_values(tensor)["start"])


def takes_coefficients(tensor: TensorPlan) -> bool:
    """Whether a stage of a tensor takes coefficients that are learned through the whole model."""
    return any(item.name == INPUT for item in tensor.inputs)


def _values(tensor: TensorPlan) -> Mapping[str, Any]:
    """The parameters of the stage that takes a tensor's coefficients."""
    return next(stage.values for stage in tensor.stages if any(item.name == INPUT for item in stage.inputs))
