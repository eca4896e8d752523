"""Notes on differences between the inputs: settings of their configs, and their tokenizers."""

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


def tokenizer_differences(tokenizers: Mapping[str, Tokenizer], label: str) -> Iterator[str]:
    """Yields notes on parts of the other tokenizers that the tokenizer of the model ``label`` lacks."""
    output = tokenizers[label]
    for model, tokenizer in tokenizers.items():
        if not output.exists or tokenizer.digest == output.digest:
            continue
        if not tokenizer.exists:
            yield f"{model}: has no tokenizer; its rows are taken for the tokens that the other models have there"
        elif not (tokenizer.is_readable and output.is_readable):
            if tokenizer.vocabulary_digest != output.vocabulary_digest:
                yield f"{model}: its tokenizer is not that of {label}, and their tokens cannot be compared"
        else:
            source = f"which gets the tokenizer of {label}"
            yield from (f"{model}: {note}, {source}" for note in _token_notes(tokenizer, output))
            parts = ", ".join(_differing_settings(tokenizer, output))
            advice = f"; `output: {{tokenizer: {model}}}` takes its own" if tokenizer.tokens == output.tokens else ""
            if parts:
                yield f"{model}: its tokenizer differs from that of the output, {source}, in {parts}{advice}"


def _token_notes(tokenizer: Tokenizer, output: Tokenizer) -> Iterator[str]:
    names = set(output.tokens.values())
    changed = [(i, token) for i, token in sorted(tokenizer.tokens.items()) if output.tokens.get(i) != token]
    lost = [f"{token!r} ({i})" for i, token in changed if token not in names]
    if lost:
        count = f" and {len(lost) - 5:,} more" if len(lost) > 5 else ""
        yield f"its tokens {', '.join(lost[:5])}{count} are not in the output"
    if moved := len(changed) - len(lost):
        yield f"{moved:,} of its tokens have other ids in the output"


def _differing_settings(tokenizer: Tokenizer, output: Tokenizer) -> Iterator[str]:
    yield from splitting_differences(tokenizer, output)
    if tokenizer.chat_templates != output.chat_templates:
        yield "chat template"
    for key in {**tokenizer.special_tokens, **output.special_tokens}:
        token, output_token = tokenizer.special_tokens.get(key), output.special_tokens.get(key)
        if token != output_token:
            yield f"{key} ({token!r} instead of {output_token!r})"
