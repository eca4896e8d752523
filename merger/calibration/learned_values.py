"""What gradient descent changes of a tensor: its weights themselves, or coefficients of the experts' task vectors."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from merger.planning.plan import Part, Plan, TensorPlan

if TYPE_CHECKING:
    from torch import Tensor

WEIGHTS, COEFFICIENTS = "learned", "coefficients"
"""The inputs of stages that hold the two."""


class LearnedWeights:
    """The weights of a tensor, float32, which the models that run on the experts' texts share."""

    def __init__(self, start: Tensor) -> None:
        self.weights = nn.Parameter(start)

    @property
    def values(self) -> Tensor:
        """What is learned, and takes steps."""
        return self.weights

    def pull_gradient(self) -> None:
        """Passes the gradient of the weights on to what is learned."""

    def push_values(self) -> None:
        """Makes the weights of what is learned."""


class LearnedCoefficients(LearnedWeights):
    """Coefficients c_k of the task vectors, [k r c], [k r 1] or [k 1 1]: the weights are base + sum of c_k delta_k."""

    def __init__(self, base: Tensor, deltas: Tensor, part: Part, per: str, start: float) -> None:
        self._base, self._deltas, self._part = base, deltas, part
        shape = {"element": deltas.shape, "row": (*deltas.shape[:2], 1), "matrix": (len(deltas), 1, 1)}[per]
        self._values = nn.Parameter(deltas.new_full(shape, start))
        super().__init__(base.clone())
        self.push_values()

    @classmethod
    def of(cls, plan: Plan, tensor: TensorPlan, device: torch.device) -> LearnedCoefficients:
        """The coefficients of a tensor at their start, as the stage says that takes them."""
        values = next(stage.values for stage in tensor.stages if COEFFICIENTS in stage.arguments)
        stored = [plan.models[label].read(tensor.reads[label] or "") for label in ("base", *tensor.place.experts)]
        base, *experts = (weights.to(device, torch.float32) for weights in stored)
        part = tensor.parts[0]
        deltas = torch.stack([_oriented(expert - base, part) for expert in experts])
        return cls(base, deltas, part, values["per"], float(values["start"]))

    @property
    def values(self) -> Tensor:
        """The coefficients."""
        return self._values

    def pull_gradient(self) -> None:
        """The gradient of c_k is that of the weights times delta_k, summed over what c_k stands for."""
        gradient, self.weights.grad = self.weights.grad, None
        if gradient is not None:
            products = self._deltas * _oriented(gradient, self._part)
            self._values.grad = products.sum_to_size(self._values.shape)

    def push_values(self) -> None:
        """Adds the task vectors times their coefficients to the base."""
        with torch.no_grad():
            change = (self._values * self._deltas).sum(0)
            stored = change.T if self._part.transposed else change
            self.weights.copy_(self._base + stored.reshape(self._base.shape))


def _oriented(values: Tensor, part: Part) -> Tensor:
    """A stored tensor as its stages see it: [r c]."""
    matrix = values.reshape(-1, values.shape[-1])
    return matrix.T if part.transposed else matrix
