"""The output's vocabulary: whose rows stand for each token."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from merger.checkpoint.united_tokenizer import Flags
from merger.planning.plan import ExtraRows
from merger.planning.row_map import RowMap, Run

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
class TableRows:
    """The rows of one table of the output."""

    count: int
    merged: int  # how many of the first rows its stages see
    row_maps: Mapping[str, RowMap] = field(default_factory=dict)  # of models whose rows have other numbers, or gaps
    extra: tuple[ExtraRows, ...] = ()  # rows that are not merged

    @classmethod
    def of(cls, shape: tuple[int, ...]) -> TableRows:
        """The rows of a tensor of this shape that has the same rows in all models."""
        rows = shape[0] if shape else 1
        return cls(rows, rows)

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the output's table, where ``shape`` is that of a model's."""
        return (self.count, *shape[1:]) if shape else shape

    def merged_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the rows that stages see."""
        return (self.merged, *shape[1:]) if shape else shape

    @property
    def is_plain(self) -> bool:
        """Whether each row of the output is the row with the same number of all models, merged."""
        return not self.extra and not self.row_maps


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of the rows of each model and of the output, which are matched as strings."""

    tokenizer: str  # the model whose tokenizer the output gets
    tokens: Mapping[str, Tokens] = field(default_factory=dict)  # by model, base first; empty where all are the same
    added: Tokens = field(default_factory=dict)  # the tokens of experts that the output adds to that tokenizer
    flags: Mapping[str, Flags] = field(default_factory=dict)  # of the added tokens, in order of their ids
    names_tokenizer: bool = False  # whether the recipe names the tokenizer
    sources: Mapping[str, str] = field(default_factory=dict)  # by token: the row's source, as the recipe names it

    @property
    def label(self) -> str:
        """The models whose tokens the output has, as a message names them."""
        return "all models" if self.added else self.tokenizer

    @cached_property
    def meaning(self) -> Tokens:
        """The token of each row of the output: the tokenizer's, else the base's, else that of the first expert."""
        meaning = {**self.tokens.get(self.tokenizer, {}), **self.added}
        names = set(meaning.values())
        for tokens in self.tokens.values():
            further = {i: token for i, token in tokens.items() if i not in meaning and token not in names}
            meaning |= further
            names |= set(further.values())
        return meaning

    def table_rows(self, rows: Mapping[str, int], *, drop: bool = False, multiple: int = 1) -> TableRows:
        """The rows of a table, given the number of its rows in each model that has it.

        A row is merged if all models have its token; where the recipe names the tokenizer, if the base has it. An
        expert that lacks the token then leaves the base as it is. Other rows come from the experts that have the token,
        or from the base where no expert has it. With ``drop`` the output ends where the shortest model ends. The number
        of rows is rounded up to a ``multiple``.
        """
        count = min(rows.values()) if drop else max(*rows.values(), max(self.added, default=-1) + 1)
        exact = {label: self._row_map(label, length, count) for label, length in rows.items()}
        required = ["base"] if self.names_tokenizer else list(rows)
        filled = {label: _fill(exact[label], min(rows[label], count)) for label in {"base", *required}}
        merged = min(filled[label].stop for label in required)
        row_maps = {
            label: row_map
            for label, row_map in {**exact, "base": filled["base"]}.items()
            if row_map.runs != (Run(0, min(rows[label], count), 0),) or row_map.stop < merged
        }
        padded = round_up(count, multiple)
        return TableRows(padded, merged, row_maps, tuple(self._extra_rows(exact, required, count, padded)))

    def _row_map(self, label: str, length: int, count: int) -> RowMap:
        """The rows of a model with the tokens of the output's rows; rows without a token are matched by number."""
        tokens, meaning = self.tokens.get(label, {}), self.meaning
        if tokens == meaning:
            return RowMap((Run(0, min(length, count), 0),))
        ids = {token: i for i, token in tokens.items() if i < length}
        rows: dict[int, int] = {}
        for i in range(count):
            token = meaning.get(i)
            if i < length and tokens.get(i) == token:
                rows[i] = i
            elif token in ids:
                rows[i] = ids[token]
            elif token not in self._names and i < length and tokens.get(i) not in self._placed:
                rows[i] = i
        return RowMap.of(rows)

    @cached_property
    def _names(self) -> frozenset[str]:
        """The tokens that some model has a row for."""
        return frozenset(token for tokens in self.tokens.values() for token in tokens.values())

    @cached_property
    def _placed(self) -> frozenset[str]:
        """The tokens that have a row in the output."""
        return frozenset(self.meaning.values())

    def _extra_rows(
        self, row_maps: Mapping[str, RowMap], required: Sequence[str], count: int, padded: int
    ) -> Iterator[ExtraRows]:
        """The rows that are not merged, as runs of rows that come from the same models."""
        missing = {i for label in required for gap in row_maps[label].gaps(0, count) for i in gap}
        sourced = {i for i, token in self.meaning.items() if token in self.sources and i < count}
        run: ExtraRows | None = None
        for i in (*sorted(missing | sourced), *range(count, padded)):
            models = self._donors(i, row_maps) if i < count else ()
            if run is not None and (run.stop, run.models) == (i, models):
                run = replace(run, stop=i + 1)
                continue
            if run is not None:
                yield run
            run = ExtraRows(i, i + 1, models)
        if run is not None:
            yield run

    def _donors(self, i: int, row_maps: Mapping[str, RowMap]) -> tuple[str, ...]:
        """The models whose mean is row ``i`` of the output, which is not merged; zeros where there are none."""
        source = self.sources.get(self.meaning.get(i, ""), "mean")
        if source != "mean":
            return () if source == "zero" else (source,)
        labels = [label for label, row_map in row_maps.items() if any(row_map.between(i, i + 1))]
        return tuple(label for label in labels if label != "base") or tuple(labels)


def _fill(row_map: RowMap, length: int) -> RowMap:
    """The map with those of the first ``length`` rows that are nothing in the output, where their places are free."""
    gaps = list(row_map.gaps(0, length))
    if not gaps:
        return row_map
    rows = {run.start + i: run.first + i for run in row_map.runs for i in range(run.stop - run.start)}
    used = set(rows.values())
    return RowMap.of({**rows, **{i: i for gap in gaps for i in gap if i not in used}})


def round_up(count: int, multiple: int) -> int:
    """The first multiple that is no less than ``count``."""
    return -(-count // multiple) * multiple


def describe_rows(name: str, extra: Iterable[ExtraRows], tokens: Mapping[int, str]) -> list[str]:
    """Notes on rows that are not merged, one for each set of models that they come from, with the first tokens."""
    ranges: dict[str, list[ExtraRows]] = {}
    for rows in extra:
        source = f"those of {' and '.join(rows.models)}" if rows.models else "zero"
        ranges.setdefault(source, []).append(rows)
    return [
        f"{name}: {_describe_ranges(runs)}{_describe_tokens(runs, tokens)} are {source}"
        for source, runs in ranges.items()
    ]


_TOKENS_SHOWN = 5


def _describe_tokens(ranges: Sequence[ExtraRows], tokens: Mapping[int, str]) -> str:
    """The tokens of some rows, in parentheses; nothing where no tokenizer names them."""
    names = [repr(tokens[i]) for rows in ranges for i in range(rows.start, rows.stop) if i in tokens]
    remainder = f" and {len(names) - _TOKENS_SHOWN:,} more" if len(names) > _TOKENS_SHOWN else ""
    return f" ({', '.join(names[:_TOKENS_SHOWN])}{remainder})" if names else ""


def _describe_ranges(ranges: Sequence[ExtraRows]) -> str:
    if len(ranges) > 3:
        count = sum(rows.stop - rows.start for rows in ranges)
        return f"{count:,} rows from {ranges[0].start} to {ranges[-1].stop - 1}"
    return "rows " + ", ".join(f"{rows.start} to {rows.stop - 1}" for rows in ranges)
