"""Calibration text: read from files or the Hub, chosen by content, tokenised, and put into batches."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merger._lazy import torch
from merger.calibration.datasets import TARGETS, Record, records
from merger.checkpoint.tokenizers import Tokenizer
from merger.errors import CheckpointError, checkpoint_faults
from merger.recipe.sections import TextSource, text_sources

if TYPE_CHECKING:
    from torch import Tensor

    from merger.calibration.settings import Settings


@dataclass(frozen=True)
class Text:
    """One sample as text; where a chat template made it, its special tokens are in it already."""

    content: str
    templated: bool = False


@dataclass(frozen=True)
class Batch:
    """Samples of similar length, padded on the right: b samples of up to t tokens."""

    ids: Tensor  # [b t]
    mask: Tensor  # [b t], true where a token is

    def counted_tokens(self, skip_first_tokens: int) -> Tensor:
        """Returns the mask of the tokens that are part of the statistics: [b t]."""
        return self.mask & (torch.arange(self.mask.shape[1]) >= skip_first_tokens)

    def cut(self, length: int) -> Batch:
        """The same samples, of at most so many tokens."""
        return Batch(self.ids[:, :length], self.mask[:, :length])


@dataclass(frozen=True)
class Samples:
    """The tokenised samples of one expert, and the hash of the texts that they were made from."""

    tokens: tuple[tuple[int, ...], ...]
    data: str


def load_samples(
    data: str | TextSource | Sequence[str | TextSource], folder: Path, tokenizer: Any, settings: Settings
) -> Samples:
    """The samples that the settings choose from files (relative to ``folder``) and Hub datasets.

    A source with a count gives that many samples; the others together give ``settings.samples``.
    """
    sources = text_sources(data)
    pool: list[Text] = []
    selection: dict[Text, None] = {}
    for source in sources:
        texts = _source_texts(source, folder, tokenizer, settings.calib_text)
        if source.samples is None:
            pool += texts
        else:
            selection |= dict.fromkeys(choose(texts, source.samples, settings.seed))
    selection |= dict.fromkeys(choose(pool, settings.samples, settings.seed))
    with checkpoint_faults(f"{', '.join(source.file for source in sources)}: its text cannot be tokenised"):
        tokens = tokenise(selection, tokenizer, settings.max_tokens)
    if not tokens:
        files = ", ".join(source.file for source in sources)
        raise CheckpointError(f"{files}: the {len(selection)} texts that were chosen hold no token at all")
    return Samples(tokens, _digest(selection))


def _source_texts(source: TextSource, folder: Path, tokenizer: Any, calib_text: str) -> list[Text]:
    """All texts of one source; CheckpointError where there is none."""
    texts = [text for record in records(source, folder) if (text := _record_text(record, tokenizer, calib_text))]
    if not texts:
        raise CheckpointError(f"{source.file}: has no text; all its records are empty")
    return texts


def check_text(file: str, folder: Path) -> None:
    """Raises CheckpointError for a file, relative to ``folder``, without records or whose first one holds no text."""
    first = next(records(TextSource(file=file), folder), None)
    if first is None:
        raise CheckpointError(f"{file}: has no text; it holds no record")
    _text_field(first)


# --- tokenizers -----------------------------------------------------------------------------------


def load_tokenizer(directory: Path, label: str, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a folder, by transformers."""
    if not Tokenizer(directory).exists:
        raise CheckpointError(f"{label}: {directory} has no tokenizer (no tokenizer.json or the like)")
    import transformers

    with checkpoint_faults(f"{label}: its tokenizer cannot be loaded"):
        return transformers.AutoTokenizer.from_pretrained(directory, trust_remote_code=trust_remote_code)


# --- from records to tokens -----------------------------------------------------------------------


def _record_text(record: Record, tokenizer: Any, calib_text: str) -> Text | None:
    """Returns the text of a record that runs through the model; None if it is empty.

    The target is part of the text only with ``calib_text`` input+target.
    """
    with_target = calib_text == "input+target"
    fields = record.fields
    target = next((fields[name] for name in TARGETS if fields.get(name)), None) if with_target else None
    name = _text_field(record)
    match fields[name]:
        case list() as turns:
            return _chat_text(record, turns + target if isinstance(target, list) else turns, tokenizer, with_target)
        case text if name == "prompt" and isinstance(target, str):
            return Text(text + target) if text + target else None
        case text:
            return Text(text) if text else None


def _text_field(record: Record) -> str:
    """The field of a record that holds its text or its chat; CheckpointError where there is none."""
    for name in ("messages", "prompt", "text"):
        if isinstance(record.fields.get(name), list | str):
            return name
    columns = ", ".join(sorted(map(str, record.fields))) or "no field at all"
    raise CheckpointError(f"{record.place}: needs a field messages, prompt or text; found {columns}")


def _chat_text(record: Record, turns: Sequence[Any], tokenizer: Any, with_target: bool) -> Text | None:
    """Renders a chat by the tokenizer's template, without or with the answer in which the chat ends."""
    if not all(isinstance(turn, dict) and "role" in turn for turn in turns):
        raise CheckpointError(f"{record.place}: messages need to be objects with role and content")
    end = len(turns)
    while not with_target and end and turns[end - 1]["role"] == "assistant":
        end -= 1
    if not end:
        return None
    if not getattr(tokenizer, "chat_template", None):
        raise CheckpointError(f"{record.place}: has messages, but the tokenizer has no chat template")
    try:
        content = tokenizer.apply_chat_template(
            list(turns[:end]), tokenize=False, add_generation_prompt=not with_target
        )
    except Exception as error:  # a template may raise anything
        raise CheckpointError(f"{record.place}: the tokenizer's chat template refuses it: {error}") from None
    return Text(content, templated=True) if content else None


def choose(texts: Iterable[Text], samples: int, seed: int) -> list[Text]:
    """A random choice that depends on the texts and the seed alone, and not on how a file orders or repeats them.

    Each text is ranked by its own hash, so the choice of 50 is among the choice of 100.
    """

    def rank(text: Text) -> bytes:
        return hashlib.sha256(f"{seed}\x1fcalibration\x1f{text.content}".encode(errors="surrogatepass")).digest()

    return sorted(set(texts), key=lambda text: (rank(text), text.templated))[:samples]


def tokenise(texts: Iterable[Text], tokenizer: Any, max_tokens: int) -> tuple[tuple[int, ...], ...]:
    """Returns the token ids of each text, cut to ``max_tokens`` and to the tokenizer's ``model_max_length``."""
    limit = min(max_tokens, tokenizer.model_max_length)
    token_ids = []
    for text in texts:
        encoding = tokenizer(text.content, add_special_tokens=not text.templated, truncation=True, max_length=limit)
        token_ids.append(tuple(encoding["input_ids"]))
    return tuple(ids for ids in token_ids if ids)


def _digest(texts: Iterable[Text]) -> str:
    digest = hashlib.sha256()
    for text in texts:
        content = text.content.encode(errors="surrogatepass")
        digest.update(f"{len(content)} {text.templated}\n".encode() + content)
    return digest.hexdigest()


# --- batches --------------------------------------------------------------------------------------


def batches(tokens: Iterable[Sequence[int]], batch_tokens: int = 2048) -> list[Batch]:
    """Samples of similar length together, the longest first, padding counted: at most ``batch_tokens`` in a batch.

    Padding is at most a quarter of a batch, or 16 tokens a sample where samples are short.
    """
    ordered = sorted(tokens, key=lambda ids: (-len(ids), ids))
    return [
        pad_samples([ordered[i] for i in group]) for group in group_by_length(list(map(len, ordered)), batch_tokens)
    ]


def group_by_length(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Groups sample numbers by length into batches, the longest first; `batches` describes the limits."""
    groups: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        longest = lengths[groups[-1][0]] if groups else 0
        similar = lengths[i] >= min(0.75 * longest, longest - 16)
        if groups and similar and longest * (len(groups[-1]) + 1) <= batch_tokens:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


def pad_samples(samples: Sequence[Sequence[int]]) -> Batch:
    """One batch of these samples, in this order."""
    ids = torch.zeros(len(samples), max(map(len, samples)), dtype=torch.long)
    mask = torch.zeros_like(ids, dtype=torch.bool)
    for row, sample in enumerate(samples):
        ids[row, : len(sample)] = torch.tensor(sample)
        mask[row, : len(sample)] = True
    return Batch(ids, mask)
