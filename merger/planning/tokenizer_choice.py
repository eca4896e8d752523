"""The choice of the output's tokenizer, and the remedies in a recipe if none fits."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from merger.checkpoint.tokenizers import Tokenizer
from merger.planning.row_tokens import RowTokens
from merger.planning.union import Union, unite
from merger.planning.vocabulary import Table, Tokens, Vocabulary
from merger.recipe.sections import UNION


@dataclass(frozen=True)
class _Case:
    """The inputs of the choice: the models' tokens, and the recipe's tables, tokenizer and rows."""

    models: RowTokens
    tables: Sequence[Table]
    requested: str | None  # the recipe's `tokenizer`
    drop: bool  # extra_rows: drop
    sources: Mapping[str, str] = field(default_factory=dict)  # the recipe's `tokens`: a row's source, by token

    @cached_property
    def contributors(self) -> Sequence[str]:
        """The models whose rows come into the output."""
        sources = {table.source for table in self.tables}
        return [label for label in self.models.tokenizers if not sources or None in sources or label in sources]

    @cached_property
    def candidates(self) -> Sequence[str]:
        """The models whose tokenizer the output may get."""
        return [label for label in self.contributors if label in self.models.with_tokenizer]

    @cached_property
    def union(self) -> Union:
        """The tokens that experts add to those of the base."""
        return unite(self.models)

    @property
    def lacks_requested(self) -> bool:
        """Whether the recipe names a model without a tokenizer, though other models have one."""
        return self.requested not in (None, UNION, *self.models.with_tokenizer) and bool(self.models.with_tokenizer)

    @cached_property
    def common_rows(self) -> int:
        """The rows that each table has in all models that it is made of."""
        return min((min(table.used_rows) for table in self.tables), default=0)

    @cached_property
    def is_plain(self) -> bool:
        """Whether all tokenizers are the same and every token has its row, so that no token need be looked at."""
        counts = {count for table in self.tables for count in table.used_rows}
        has_rows = len(counts) < 2 or (not self.drop and all(table.source is None for table in self.tables))
        return self.models.are_alike and has_rows and not self.lacks_requested


def choose_tokenizer(
    tokenizers: Mapping[str, Tokenizer],
    tables: Sequence[Table],
    *,
    requested: str | None,
    drop: bool,
    sources: Mapping[str, str],
) -> tuple[Vocabulary, list[str]]:
    """The output's vocabulary, by the tokenizer that the recipe names or else the first that names every token.

    ``tokenizers`` are those of base and experts, ``tables`` the output's tensors with a row for each token, ``sources``
    the models that the recipe takes the rows of some tokens from. There is a fault where no tokenizer fits the rows
    that the output would have. It names the tokens, and what to write in the recipe instead.
    """
    row_counts = {label: max((table.rows.get(label, 0) for table in tables), default=0) for label in tokenizers}
    case = _Case(RowTokens(tokenizers, row_counts), tables, requested, drop, sources)
    label = _fitting(case)
    faults = [f"{_complaint(case)}; {_remedies(case)}"] if label is None else []
    return _vocabulary(case, label or "base"), faults


def _vocabulary(case: _Case, label: str) -> Vocabulary:
    """The vocabulary of the output, whose files are those of the tokenizer of ``label``."""
    is_plain = case.is_plain and not case.sources
    return Vocabulary(
        label,
        tokens={} if is_plain else case.models.tokens,
        added=case.union.tokens if case.requested == UNION else {},
        flags=case.union.flags if case.requested == UNION else {},
        names_tokenizer=case.requested is not None,
        sources=case.sources,
    )


def _fitting(case: _Case) -> str | None:
    """The model whose tokenizer fits the rows of the output."""
    if case.requested == UNION:
        return None if any(_union_misfits(case)) else "base"
    if case.is_plain or not (case.requested or case.candidates):
        return case.requested or _default(case)
    if case.requested is None and any(_unreadable(case, case.candidates)):
        return None
    candidates = [case.requested] if case.requested else case.candidates
    return next((label for label in candidates if not any(_misfits(case, label))), None)


def _default(case: _Case) -> str:
    """The first model with a tokenizer; where there is none, the first one with the longest vocabulary."""
    longest = "base" if case.drop else max(case.contributors, key=case.models.row_counts.__getitem__)
    return next(iter(case.candidates), longest)


# --- why no tokenizer fits ------------------------------------------------------------------------


def _complaint(case: _Case) -> str:
    if case.requested is not None:
        misfits = _union_misfits(case) if case.requested == UNION else _misfits(case, case.requested)
        return "; ".join(misfits)
    clash = _clash(case)
    reasons = list(_unreadable(case, case.candidates)) or ([clash] if clash else [])
    misfits = (reason for label in case.contributors for reason in _misfits(case, label))
    return "; ".join(reasons or dict.fromkeys(misfits))


def _unreadable(case: _Case, labels: Sequence[str]) -> Iterator[str]:
    """Tokenizers that cannot be compared with that of the first of some models, for one of both cannot be read."""
    for label in labels[1:]:
        first = labels[0]
        pair = [case.models.tokenizers[first], case.models.tokenizers[label]]
        digests = {tokenizer.vocabulary_digest for tokenizer in pair}
        if len(digests) == 2 and not all(tokenizer.is_readable for tokenizer in pair):
            files = " and ".join({file.name: None for tokenizer in pair if (file := tokenizer.vocabulary_file)})
            yield f"{label}: its tokenizer is not that of {first}, and merger cannot compare their tokens in {files}"


def _clash(case: _Case) -> str | None:
    """Ids that are different tokens in different models."""
    tokens = {label: case.models.tokens[label] for label in case.contributors}
    clashes: dict[int, dict[str, list[str]]] = {}
    for i in _differing_ids(list(tokens.values())):
        labels: dict[str, list[str]] = {}
        for label, names in tokens.items():
            if i in names:
                labels.setdefault(names[i], []).append(label)
        if len(labels) > 1:
            clashes[i] = labels
    if not clashes:
        return None
    examples = [
        f"{i} is {' and '.join(f'{token!r} in {_enumerate(models)}' for token, models in labels.items())}"
        for i, labels in list(clashes.items())[:3]
    ]
    return f"the models' tokenizers give one id to different tokens: {_enumerate(examples, len(clashes), 'and')}"


def _differing_ids(tokens: Sequence[Tokens]) -> Sequence[int]:
    """The ids that are not the same token in all models."""
    first, *others = tokens or [{}]
    return sorted({i for names in others if names != first for i, _ in names.items() ^ first.items()})


def _misfits(case: _Case, label: str) -> Iterator[str]:
    """Why the tokenizer of a model does not fit the rows that the output would have."""
    output_tokens = case.models.tokens_by_label[label]
    if case.lacks_requested:
        yield f"tokenizer: {label} has no tokenizer"
    yield from _rowless_copies(case, output_tokens, label)
    if case.drop and (dropped := {i: token for i, token in output_tokens.items() if i >= case.common_rows}):
        yield f"extra_rows: drop leaves out the rows of {_tokens(dropped)}, which the tokenizer of {label} names"
    contributors = [model for model in case.contributors if model != label]
    for model in contributors if case.requested is None else ():
        lost = _missing(case.models.tokens[model], output_tokens)
        if lost := {i: token for i, token in lost.items() if not case.drop or i in output_tokens}:
            yield f"the tokenizer of {label} lacks {_tokens(lost)} of {model}"


def _union_misfits(case: _Case) -> Iterator[str]:
    """Why the tokens of all models cannot be those of the output."""
    faults = list(_unreadable(case, case.models.with_tokenizer)) or case.union.faults
    yield from faults
    if not faults:
        yield from _rowless_copies(case, {**case.models.tokens["base"], **case.union.tokens}, UNION)


def _rowless_copies(case: _Case, output_tokens: Tokens, label: str) -> Iterator[str]:
    """The tables that a rule copies from a model without the rows of some tokens of the output."""
    for table in case.tables:
        if table.source is not None and (rowless := _missing(output_tokens, case.models.tokens[table.source])):
            yield f"{table.name} is copied from {table.source}, which has no row for {_tokens(rowless)} of {label}"


def _missing(tokens: Tokens, reference: Tokens) -> Tokens:
    """The tokens that are not, or not with the same id, among those of a reference."""
    return {} if tokens == reference else {i: token for i, token in tokens.items() if reference.get(i) != token}


# --- what to write instead ------------------------------------------------------------------------


def _remedies(case: _Case) -> str:
    """Changes of the recipe, each of which was tried: with it there is a tokenizer that fits."""
    remedies = []
    may_unite = UNION not in (case.requested, *case.models.tokenizers) and not case.drop
    if may_unite and case.union.tokens and _works(replace(case, requested=UNION)):
        remedies.append("`tokenizer: union` to keep the tokens of all models")
    if names := [label for label in case.candidates if _works(replace(case, requested=label))]:
        remedies.append(f"`tokenizer: {names[0]}`{_remainder(names)} to keep the tokens of one model")
    if not case.drop and _works(replace(case, drop=True)):
        remedies.append("`extra_rows: drop` to leave out the tokens that not all models have")
    if names := [label for label in case.models.tokenizers if _works(_copied(case, label))]:
        remedies.append(f"`{_rule(case.tables, names[0])}`{_remainder(names)} as the first rule")
    if not remedies:
        return "merge models with one vocabulary"
    return f"write {', or '.join(remedies)}"


def _works(case: _Case) -> bool:
    """Whether a tokenizer fits, and no table would be stored for several experts with rows that they do not share."""
    label = _fitting(case)
    if label is None or not all(table.source in (None, *table.rows) for table in case.tables):
        return False
    vocabulary = _vocabulary(case, label)
    packs = (table.rows for table in case.tables if table.packed and table.source is None)
    return all(vocabulary.table_rows(rows, drop=case.drop).is_plain for rows in packs)


def _copied(case: _Case, label: str) -> _Case:
    """The case in which all tables are copied from one model."""
    return replace(case, tables=[replace(table, source=label) for table in case.tables])


def _rule(tables: Sequence[Table], label: str) -> str:
    kinds = {table.kind for table in tables}
    if kinds <= {"embedding", "tied", "head"}:
        return f"{{kinds: [{', '.join(sorted(kinds))}], use: {label}}}"
    return f"{{tensors: '^({'|'.join(re.escape(table.name) for table in tables)})$', use: {label}}}"


def _remainder(names: Sequence[str]) -> str:
    return f" (or {_enumerate(names[1:], word='or')})" if len(names) > 1 else ""


def _tokens(tokens: Tokens) -> str:
    return _enumerate([f"{token!r} ({i})" for i, token in sorted(tokens.items())[:3]], len(tokens))


def _enumerate(items: Sequence[str], count: int | None = None, word: str = "and") -> str:
    """Joins the items, with the number of further items up to ``count``."""
    remainder = 0 if count is None else count - len(items)
    *head, tail = [*items, f"{remainder:,} more"] if remainder else items
    return f"{', '.join(head)} {word} {tail}" if head else tail
