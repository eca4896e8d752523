"""The token that each row of each model stands for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from merger.checkpoint.tokenizers import Tokenizer
from merger.planning.vocabulary import Tokens


@dataclass(frozen=True)
class RowTokens:
    """The tokenizers of base and experts, and the tokens of the rows that the models have."""

    tokenizers: Mapping[str, Tokenizer]  # by model, base first
    row_counts: Mapping[str, int]  # of each model's longest table

    @cached_property
    def with_tokenizer(self) -> list[str]:
        """The models that have a tokenizer."""
        return [label for label, tokenizer in self.tokenizers.items() if tokenizer.exists]

    @cached_property
    def are_alike(self) -> bool:
        """Whether all tokenizers are the same."""
        return len({self.tokenizers[label].digest for label in self.with_tokenizer}) < 2

    @cached_property
    def tokens_by_label(self) -> Mapping[str, Tokens]:
        """The tokens that each tokenizer names, as far as any model has rows."""
        end = max(self.row_counts.values())
        return {label: _up_to(end, tokenizer.tokens) for label, tokenizer in self.tokenizers.items()}

    @cached_property
    def tokens(self) -> Mapping[str, Tokens]:
        """The tokens of the rows that each model has.

        An expert is a fine-tune of the base: where its tokenizer names no token, its row is still the base's token.
        A base without a tokenizer has the tokens that all experts agree on.
        """
        tokens = {label: _up_to(self.row_counts[label], tokens) for label, tokens in self.tokens_by_label.items()}
        base, *experts = tokens
        if not self.tokenizers[base].is_readable:
            readable = [tokens[label] for label in experts if self.tokenizers[label].is_readable] or [{}]
            common = {i: token for i, token in readable[0].items() if all(names.get(i) == token for names in readable)}
            tokens[base] = _up_to(self.row_counts[base], common)
        inherited = {label: _up_to(self.row_counts[label], tokens[base]) for label in experts}
        return {base: tokens[base], **{label: _inherit(inherited[label], tokens[label]) for label in experts}}


def _inherit(base: Tokens, tokens: Tokens) -> Tokens:
    """An expert's tokens, and those of the base at other ids, but for tokens that the expert has moved."""
    names = set(tokens.values())
    return {**{i: token for i, token in base.items() if token not in names}, **tokens}


def _up_to(end: int, tokens: Tokens) -> Tokens:
    """The tokens with ids below ``end``."""
    return tokens if not tokens or max(tokens) < end else {i: token for i, token in tokens.items() if i < end}
