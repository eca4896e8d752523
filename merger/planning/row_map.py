"""The map from the rows of the output's tables to the rows of one model: matched tokens, as runs of rows."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor


class Run(NamedTuple):
    """Rows ``start`` to ``stop`` of the output, which are rows of the model from ``first`` on."""

    start: int
    stop: int
    first: int

    @property
    def last(self) -> int:
        """The row of the model behind the last one."""
        return self.first + self.stop - self.start


@dataclass(frozen=True)
class RowMap:
    """The rows of a model's table by rows of the output's table; rows of the output in no run are not in the model."""

    runs: tuple[Run, ...]  # in order of the output

    @classmethod
    def of(cls, rows: Mapping[int, int]) -> RowMap:
        """The map of these rows of a model, by rows of the output."""
        runs: list[Run] = []
        for i, row in sorted(rows.items()):
            if runs and (runs[-1].stop, runs[-1].last) == (i, row):
                runs[-1] = runs[-1]._replace(stop=i + 1)
            else:
                runs.append(Run(i, i + 1, row))
        return cls(tuple(runs))

    @property
    def stop(self) -> int:
        """The row of the output behind the last one that is in the model."""
        return self.runs[-1].stop if self.runs else 0

    @property
    def moves_rows(self) -> bool:
        """Whether a row of the model has another number in the output."""
        return any(run.first != run.start for run in self.runs)

    def between(self, start: int, stop: int) -> Iterator[Run]:
        """The runs of the output's rows from ``start`` to ``stop``, cut to these."""
        for number in range(max(0, bisect_right(self._starts, start) - 1), len(self.runs)):
            run = self.runs[number]
            if run.start >= stop:
                return
            begin, end = max(run.start, start), min(run.stop, stop)
            if begin < end:
                yield Run(begin, end, run.first + begin - run.start)

    def gaps(self, start: int, stop: int) -> Iterator[range]:
        """The rows of the output from ``start`` to ``stop`` that the model lacks."""
        for run in self.between(start, stop):
            if start < run.start:
                yield range(start, run.start)
            start = run.stop
        if start < stop:
            yield range(start, stop)

    def gather(self, values: Tensor, count: int) -> Tensor:
        """Values of a model's rows [v ...] as values of the output's first ``count`` rows; zero where it has none."""
        gathered = values.new_zeros(count, *values.shape[1:])
        for run in self.between(0, count):
            gathered[run.start : run.stop] = values[run.first : run.last]
        return gathered

    @cached_property
    def _starts(self) -> list[int]:
        return [run.start for run in self.runs]
