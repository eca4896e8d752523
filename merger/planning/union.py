"""The union of the models' tokens: those of the base at their ids, then those that experts add."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from merger.checkpoint.united_tokenizer import Flags, united_tokens
from merger.planning.row_tokens import RowTokens
from merger.planning.vocabulary import Tokens


@dataclass(frozen=True)
class Union:
    """The tokens that experts add to the base's tokenizer, or the reasons why there can be none."""

    tokens: Tokens = field(default_factory=dict)  # by id in the output
    flags: Mapping[str, Flags] = field(default_factory=dict)  # by token, in order of their ids
    faults: tuple[str, ...] = ()


def unite(models: RowTokens) -> Union:
    """The union of the tokens that models have rows for, experts in their order.

    Only added tokens can be united: they are found in a text before the rest of it is split, while two vocabularies
    split the same text in two ways.
    """
    base, *experts = models.tokenizers
    tokenizer = models.tokenizers[base]
    if not tokenizer.exists:
        return Union(faults=(f"tokenizer: union adds tokens to the base's tokenizer, and {base} has none",))
    names, faults = set(tokenizer.tokens.values()), []
    flags: dict[str, Flags] = {}
    for label in experts:
        new = [token for _, token in sorted(models.tokens[label].items()) if token not in names]
        added = models.tokenizers[label].added_tokens
        if pieces := [token for token in new if token not in added]:
            faults.append(_different_vocabularies(label, pieces))
        flags |= {token: added[token] for token in new if token in added}
        names |= set(new)
    tokens = united_tokens(tokenizer, flags) if tokenizer.is_readable else {}
    ids = {i: token for i, token in tokens.items() if token in flags}
    if not faults and any(i in tokenizer.tokens for i in ids):
        faults.append(f"{base}: its ids have gaps, into which the library `tokenizers` would put added tokens")
    return Union(ids, flags, tuple(faults))


def _different_vocabularies(label: str, pieces: list[str]) -> str:
    remainder = f" and {len(pieces) - 3:,} more" if len(pieces) > 3 else ""
    return (
        f"{label}: its vocabulary has {', '.join(map(repr, pieces[:3]))}{remainder}, which are no added tokens, and "
        "one tokenizer cannot split text as two vocabularies do"
    )
