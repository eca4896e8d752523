"""Which model's tokenizer the output gets, and what to write in a recipe where none fits."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from merger.checkpoint.tokenizers import Tokenizer
from merger.planning.vocabulary import Table, Tokens, Vocabulary


@dataclass(frozen=True)
class Case:
    """What decides the choice: the models' tokenizers and tables, and what the recipe says of them."""

    tokenizers: Mapping[str, Tokenizer]  # by model, base first
    tables: Sequence[Table]
    requested: str | None  # output.tokenizer
    drop: bool  # extra_rows: drop

    @cached_property
    def contributors(self) -> Sequence[str]:
        """The models whose rows come into the output."""
        sources = {table.source for table in self.tables}
        return [label for label in self.tokenizers if not sources or None in sources or label in sources]

    @cached_property
    def row_counts(self) -> Mapping[str, int]:
        """The rows of each model's longest table."""
        return {label: max((table.rows.get(label, 0) for table in self.tables), default=0) for label in self.tokenizers}

    @cached_property
    def common_rows(self) -> int:
        """The rows that each table has in all models that it is made of."""
        return min((min(table.used_rows) for table in self.tables), default=0)

    @cached_property
    def are_alike(self) -> bool:
        """Whether all tokenizers are the same and every token has its row, so that no token need be looked at."""
        same = len({tokenizer.digest for tokenizer in self.tokenizers.values() if tokenizer.exists}) < 2
        counts = {count for table in self.tables for count in table.used_rows}
        whole = len(counts) < 2 or (not self.drop and all(table.source is None for table in self.tables))
        return same and whole and not self.lacks_requested

    @property
    def lacks_requested(self) -> bool:
        """Whether the recipe names a model without a tokenizer, though there are others."""
        having = [label for label, tokenizer in self.tokenizers.items() if tokenizer.exists]
        return bool(having) and self.requested is not None and self.requested not in having

    @cached_property
    def written(self) -> Mapping[str, Tokens]:
        """The tokens that each tokenizer names, as far as any model has rows."""
        end = max(self.row_counts.values())
        return {label: _up_to(end, tokenizer.tokens) for label, tokenizer in self.tokenizers.items()}

    @cached_property
    def tokens(self) -> Mapping[str, Tokens]:
        """What the rows of each model stand for.

        An expert is a fine-tune of the base: where its tokenizer names no token, its row still is the base's token.
        A base without a tokenizer has the tokens that all experts agree on.
        """
        stored = {label: _up_to(self.row_counts[label], tokens) for label, tokens in self.written.items()}
        base, *experts = stored
        if not self.tokenizers[base].is_readable:
            known = [stored[label] for label in experts if self.tokenizers[label].is_readable] or [{}]
            common = {i: token for i, token in known[0].items() if all(tokens.get(i) == token for tokens in known)}
            stored[base] = _up_to(self.row_counts[base], common)
        return {base: stored[base], **{label: self._inherited(label, stored) for label in experts}}

    def _inherited(self, label: str, stored: Mapping[str, Tokens]) -> Tokens:
        tokens = stored[label]
        names = set(tokens.values())
        base = _up_to(self.row_counts[label], next(iter(stored.values())))
        return {**{i: token for i, token in base.items() if token not in names}, **tokens}


def choose_tokenizer(case: Case) -> tuple[Vocabulary, list[str]]:
    """The output's vocabulary, by the tokenizer that the recipe names or else the first that names every token.

    There is a fault where no tokenizer fits the rows that the output would have. It names the tokens, and what to
    write in the recipe instead.
    """
    if case.are_alike:
        return Vocabulary(case.requested or _default(case)), []
    label = _fitting(case)
    faults = [f"{_complaint(case)}; {_remedies(case)}"] if label is None else []
    return Vocabulary(label or case.requested or "base", case.tokens), faults


def _default(case: Case) -> str:
    """The first model with a tokenizer; where there is none, the first one with the longest vocabulary."""
    having = [label for label in case.contributors if case.tokenizers[label].exists]
    longest = "base" if case.drop else max(case.contributors, key=case.row_counts.__getitem__)
    return having[0] if having else longest


def _fitting(case: Case) -> str | None:
    """The model whose tokenizer fits the rows of the output."""
    if case.requested is not None:
        return None if any(_misfits(case, case.requested)) else case.requested
    candidates = [label for label in case.contributors if case.tokenizers[label].exists]
    if not candidates:
        return _default(case)
    if any(_unreadable(case)):
        return None
    return next((label for label in candidates if not any(_misfits(case, label))), None)


# --- why no tokenizer fits ------------------------------------------------------------------------


def _complaint(case: Case) -> str:
    if case.requested is not None:
        return "; ".join(_misfits(case, case.requested))
    clash = _clash(case)
    reasons = list(_unreadable(case)) or ([clash] if clash else [])
    misfits = (reason for label in case.contributors for reason in _misfits(case, label))
    return "; ".join(reasons or dict.fromkeys(misfits))


def _unreadable(case: Case) -> Iterator[str]:
    """Tokenizers that cannot be compared with that of the first model, for one of both cannot be read."""
    first, *others = [label for label in case.contributors if case.tokenizers[label].exists]
    for label in others:
        pair = [case.tokenizers[first], case.tokenizers[label]]
        if not all(each.is_readable for each in pair) and len({each.vocabulary_digest for each in pair}) == 2:
            files = " and ".join(dict.fromkeys(each.vocabulary_file.name for each in pair if each.vocabulary_file))
            yield f"{label}: its tokenizer is not that of {first}, and merger cannot compare their tokens in {files}"


def _clash(case: Case) -> str | None:
    """Ids that are different tokens in different models."""
    tokens = {label: case.tokens[label] for label in case.contributors}
    clashes: dict[int, dict[str, list[str]]] = {}
    for i in Vocabulary("base", tokens).differing_ids:
        named: dict[str, list[str]] = {}
        for label, names in tokens.items():
            if i in names:
                named.setdefault(names[i], []).append(label)
        if len(named) > 1:
            clashes[i] = named
    if not clashes:
        return None
    examples = [
        f"{i} is {' and '.join(f'{token!r} in {_listed(labels)}' for token, labels in named.items())}"
        for i, named in list(clashes.items())[:3]
    ]
    return f"the models' tokenizers give one id to different tokens: {_listed(examples, len(clashes), 'and')}"


def _misfits(case: Case, label: str) -> Iterator[str]:
    """Why the tokenizer of a model does not fit the rows that the output would have."""
    written = case.written[label]
    if case.lacks_requested:
        yield f"output.tokenizer: {label} has no tokenizer"
    for table in case.tables:
        if table.source is not None:
            rows = case.tokens[table.source]
            if wrong := {i: token for i, token in written.items() if rows.get(i) != token}:
                yield f"{table.name} is copied from {table.source}, which has no row for {_tokens(wrong)} of {label}"
    if case.drop and (beyond := {i: token for i, token in written.items() if i >= case.common_rows}):
        yield f"extra_rows: drop leaves out the rows of {_tokens(beyond)}, which the tokenizer of {label} names"
    others = [model for model in case.contributors if model != label]
    for model in others if case.requested is None else ():
        lost = dict(case.tokens[model].items() - written.items())
        if lost := {i: token for i, token in lost.items() if not case.drop or i in written}:
            yield f"the tokenizer of {label} lacks {_tokens(lost)} of {model}"


# --- what to write instead ------------------------------------------------------------------------


def _remedies(case: Case) -> str:
    """Changes of the recipe, each of which was tried: with it there is a tokenizer that fits."""
    labels = [label for label in case.tokenizers if label in case.contributors]
    having = [label for label in labels if case.tokenizers[label].exists]
    remedies = []
    if names := [label for label in having if label != case.requested and _works(replace(case, requested=label))]:
        remedies.append(f"`output: {{tokenizer: {names[0]}}}`{_others(names)} to keep the tokens of one model")
    if not case.drop and _works(replace(case, drop=True)):
        remedies.append("`extra_rows: drop` to leave out the tokens that not all models have")
    if names := [label for label in case.tokenizers if _works(_copied(case, label))]:
        remedies.append(f"`{_rule(case.tables, names[0])}`{_others(names)} as the first rule")
    if not remedies:
        return "merge models with one vocabulary"
    return f"write {', or '.join(remedies)}"


def _works(case: Case) -> bool:
    """Whether a tokenizer fits, and no table would be stored for several experts with rows that they do not share."""
    label = "base" if case.are_alike else _fitting(case)
    if label is None:
        return False
    vocabulary = Vocabulary(label, {} if case.are_alike else case.tokens)
    return not any(
        table.packed and table.source is None and vocabulary.extra_rows(table.rows, drop=case.drop)
        for table in case.tables
    )


def _copied(case: Case, label: str) -> Case:
    """The case in which all tables are copied from one model."""
    return replace(case, tables=[replace(table, source=label) for table in case.tables])


def _rule(tables: Sequence[Table], label: str) -> str:
    kinds = {table.kind for table in tables}
    if kinds <= {"embedding", "tied", "head"}:
        return f"{{kinds: [{', '.join(sorted(kinds))}], use: {label}}}"
    return f"{{tensors: '^({'|'.join(re.escape(table.name) for table in tables)})$', use: {label}}}"


def _others(names: Sequence[str]) -> str:
    return f" (or {_listed(names[1:], word='or')})" if len(names) > 1 else ""


def _tokens(tokens: Tokens) -> str:
    return _listed([f"{token!r} ({i})" for i, token in sorted(tokens.items())[:3]], len(tokens))


def _listed(items: Sequence[str], count: int | None = None, word: str = "and") -> str:
    """The items, and how many more there are of ``count``."""
    more = 0 if count is None else count - len(items)
    several = [*items, f"{more:,} more"] if more else items
    return f" {word} ".join([*([", ".join(several[:-1])] if len(several) > 1 else []), several[-1]])


def _up_to(end: int, tokens: Tokens) -> Tokens:
    """The tokens with ids below ``end``."""
    return tokens if not tokens or max(tokens) < end else {i: token for i, token in tokens.items() if i < end}
