"""Notes on what differs between the inputs: settings of their configs, and their tokenizers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from merger.checkpoint.checkpoint import Checkpoint
from merger.checkpoint.tokenizers import Tokenizer, splitting_differences

_NOISE = {
    "_name_or_path",
    "transformers_version",
    "torch_dtype",
    "dtype",
    "architectures",
    "use_cache",
    "vocab_size",
}


def config_differences(models: Mapping[str, Checkpoint]) -> Iterator[str]:
    """Notes on settings of config.json in which an expert differs from the base."""
    base = models["base"]
    for label, model in list(models.items())[1:]:
        changed = [
            f"{key} {base.config.get(key)!r} -> {model.config.get(key)!r}"
            for key in sorted((set(base.config) | set(model.config)) - _NOISE)
            if base.config.get(key) != model.config.get(key)
        ]
        if changed:
            yield f"{label}: config differs from the base: {'; '.join(changed)[:300]}"


def tokenizer_differences(tokenizers: Mapping[str, Tokenizer], chosen: str) -> Iterator[str]:
    """Notes on what the output, which gets the tokenizer of ``chosen``, has not of the other models' tokenizers."""
    output = tokenizers[chosen]
    for label, tokenizer in tokenizers.items():
        if not output.exists or tokenizer.digest == output.digest:
            continue
        if not tokenizer.exists:
            yield f"{label}: has no tokenizer; its rows are taken for the tokens that the other models have there"
        elif not (tokenizer.is_readable and output.is_readable):
            if tokenizer.vocabulary_digest != output.vocabulary_digest:
                yield f"{label}: its tokenizer is not that of {chosen}, and their tokens cannot be compared"
        else:
            yield from _token_notes(label, tokenizer, chosen, output)
            yield from _settings_notes(label, tokenizer, chosen, output)


def _token_notes(label: str, tokenizer: Tokenizer, chosen: str, output: Tokenizer) -> Iterator[str]:
    names = set(output.tokens.values())
    changed = [(i, token) for i, token in sorted(tokenizer.tokens.items()) if output.tokens.get(i) != token]
    lost = [f"{token!r} ({i})" for i, token in changed if token not in names]
    if lost:
        more = f" and {len(lost) - 5:,} more" if len(lost) > 5 else ""
        yield f"{label}: the output has not its tokens {', '.join(lost[:5])}{more}; it gets the tokenizer of {chosen}"
    if moved := len(changed) - len(lost):
        yield f"{label}: {moved:,} of its tokens have other ids in the output, which gets the tokenizer of {chosen}"


def _settings_notes(label: str, tokenizer: Tokenizer, chosen: str, output: Tokenizer) -> Iterator[str]:
    parts = splitting_differences(tokenizer, output)
    if tokenizer.chat_templates != output.chat_templates:
        parts.append("chat template")
    for key in {**tokenizer.special_tokens, **output.special_tokens}:
        token, output_token = tokenizer.special_tokens.get(key), output.special_tokens.get(key)
        parts += [f"{key} ({token!r} instead of {output_token!r})"] if token != output_token else []
    if parts:
        advice = f"; `output: {{tokenizer: {label}}}` takes its own" if tokenizer.tokens == output.tokens else ""
        other = f"that of {chosen}, which the output gets"
        yield f"{label}: its tokenizer differs from {other}, in {', '.join(parts)}{advice}"
