"""A model's tensor with the rows of the output's tensor: each row is that of the same token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from merger._lazy import torch
from merger.checkpoint.checkpoint import Checkpoint
from merger.planning.plan import Plan, TensorPlan
from merger.planning.row_map import RowMap, Run

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class AlignedTensor:
    """A stored tensor of one model, read by the rows of the output; row maps meet stored weights only here."""

    model: Checkpoint
    name: str
    row_map: RowMap | None  # None: its rows have their numbers in the output

    @classmethod
    def of(cls, plan: Plan, tensor: TensorPlan, label: str) -> AlignedTensor | None:
        """The tensor of a model that stands for a tensor of the output; None where nothing does."""
        name = tensor.reads[label]
        return None if name is None else cls(plan.models[label], name, tensor.row_maps.get(label))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which it is read."""
        return self.model.dtype(self.name)

    def read_into(self, rows: Tensor, start: int, stop: int, absent: Tensor | None = None) -> None:
        """Reads rows ``start`` to ``stop`` into ``rows`` [r c].

        Rows that the model lacks are those of ``absent`` [r c], or zero. A vector is one row with an element for each
        token, of which ``rows`` may take the first.
        """
        if self._is_vector:
            self._fill(rows.T, 0, None if absent is None else absent.T)
        elif self.row_map is None:
            self.model.read_into(rows, self.name, start, stop)
        else:
            self._fill(rows, start, absent)

    def read_tokens(self, start: int, stop: int) -> Tensor:
        """The rows of the output's tokens ``start`` to ``stop`` [r c], in a column where the tensor is a vector."""
        columns = 1 if self._is_vector else self.model.tensors[self.name].matrix[1]
        rows = torch.empty(stop - start, columns, dtype=self.dtype)
        self._fill(rows, start, None)
        return rows

    def change_rows(self, start: int, stop: int, base: AlignedTensor) -> Tensor | None:
        """The float32 change of these rows, where the model stores one and its rows are the base's; else None.

        Rows that the model lacks are not changed.
        """
        if self.row_map is None:
            return self.model.change_rows(self.name, start, stop) if base.row_map is None else None
        if base.row_map != self.row_map and (base.row_map is not None or self.row_map.moves_rows):
            return None
        change: Tensor | None = None
        for run in self.row_map.between(start, stop):
            rows = self.model.change_rows(self.name, run.first, run.last)
            if rows is None:
                return None
            change = rows.new_zeros(stop - start, rows.shape[1]) if change is None else change
            change[run.start - start : run.stop - start] = rows
        return change

    @property
    def _is_vector(self) -> bool:
        return len(self.model.tensors[self.name].shape) == 1

    def _fill(self, rows: Tensor, start: int, absent: Tensor | None) -> None:
        """Fills ``rows`` with those of the output's tokens from ``start`` on."""
        stop = start + len(rows)
        row_map = self.row_map or RowMap((Run(0, self.model.tensors[self.name].shape[0], 0),))
        vector = self.model.read_rows(self.name, 0, 1).T if self._is_vector else None
        for run in row_map.between(start, stop):
            target = rows[run.start - start : run.stop - start]
            if vector is None:
                self.model.read_into(target, self.name, run.first, run.last)
            else:
                target.copy_(vector[run.first : run.last])
        for gap in row_map.gaps(start, stop):
            places = slice(gap.start - start, gap.stop - start)
            rows[places] = 0 if absent is None else absent[places]
