"""The output's vocabulary: whose rows stand for each token."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from merger.planning.plan import ExtraRows

Tokens = Mapping[int, str]
"""Tokens by id."""


@dataclass(frozen=True)
class Table:
    """A tensor of the output with a row for each token: an embedding, a head, or a head's bias."""

    name: str
    kind: str
    rows: Mapping[str, int]  # how many, by model that has the tensor
    source: str | None = None  # the model it is copied from; None where it is merged
    packed: bool = False  # stored for several experts at once, with the same rows for all

    @property
    def used_rows(self) -> Collection[int]:
        """The numbers of rows in the models that it is made of."""
        return self.rows.values() if self.source is None else [self.rows.get(self.source, 0)]


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of the rows of each model and of the output."""

    tokenizer: str  # the model whose tokenizer the output gets
    tokens: Mapping[str, Tokens] = field(default_factory=dict)  # by model, base first; empty where all are the same

    @cached_property
    def differing_ids(self) -> Sequence[int]:
        """The ids that are not the same token in all models."""
        base, *experts = self.tokens.values() or [{}]
        return sorted({i for tokens in experts if tokens != base for i, _ in tokens.items() ^ base.items()})

    @cached_property
    def meaning(self) -> Tokens:
        """The token of each row of the output: the tokenizer's, else the base's, else that of the first expert."""
        ordered = [*reversed(list(self.tokens.values())), self.tokens.get(self.tokenizer, {})]
        return {i: token for tokens in ordered for i, token in tokens.items()}

    def extra_rows(self, rows: Mapping[str, int], *, drop: bool) -> tuple[ExtraRows, ...]:
        """The rows that are not merged, because some models lack them or have another token there.

        They come from the experts that have the token, or from the base where no expert has it. With ``drop`` the
        output ends where the shortest model ends.
        """
        common, end = min(rows.values()), max(rows.values())
        runs: list[ExtraRows] = []
        for i in (*(i for i in self.differing_ids if i < common), *range(common, common if drop else end)):
            models = self._donors(i, rows)
            if models and runs and (runs[-1].stop, runs[-1].models) == (i, models):
                runs[-1] = ExtraRows(runs[-1].start, i + 1, models)
            elif models:
                runs.append(ExtraRows(i, i + 1, models))
        return tuple(runs)

    def _donors(self, i: int, rows: Mapping[str, int]) -> tuple[str, ...]:
        """The models whose mean is row ``i`` of the output; none where the row is merged like any other."""
        token = self.meaning.get(i)
        labels = [label for label, count in rows.items() if i < count]
        donors = [label for label in labels if token is None or self.tokens[label].get(i) == token] or labels
        experts = tuple(label for label in donors if label != "base")
        return () if len(donors) == len(rows) else experts or ("base",)


def describe_rows(name: str, extra: Iterable[ExtraRows]) -> list[str]:
    """Notes on rows that are not merged, one for each set of models that they come from."""
    ranges: dict[str, list[ExtraRows]] = {}
    for rows in extra:
        ranges.setdefault(" and ".join(rows.models), []).append(rows)
    return [f"{name}: {_describe_ranges(runs)} are those of {models}" for models, runs in ranges.items()]


def _describe_ranges(ranges: Sequence[ExtraRows]) -> str:
    if len(ranges) > 3:
        count = sum(rows.stop - rows.start for rows in ranges)
        return f"{count:,} rows from {ranges[0].start} to {ranges[-1].stop - 1}"
    return "rows " + ", ".join(f"{rows.start} to {rows.stop - 1}" for rows in ranges)
