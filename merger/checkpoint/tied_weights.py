"""Tied weights: tensors that a model holds once, however many names its checkpoint stores them under.

What transformers 5 does when it loads a checkpoint decides. A head that config.json calls tied is the embedding unless
the checkpoint stores both with different values; then each keeps its own (`PreTrainedModel.tie_weights`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from merger.checkpoint.tensor_info import Info

Equal = Callable[[str, str], bool | None]
"""Whether two tensors of a checkpoint hold the same bits; None where only headers are at hand."""

TIE = "tie_word_embeddings"
_CLASSES_WITH_HEAD = re.compile(r"ForCausalLM|LMHead|ForConditionalGeneration|ForMaskedLM|ForPreTraining")
_CLASSES_WITH_LM_HEAD = re.compile(r"ForCausalLM|GPT2LMHead|ForConditionalGeneration")
_CLASSES_WITH_ANOTHER = re.compile(r"BioGpt|Blt|Csm|Kosmos2|NeoX|Rwkv|TrOCR|Whisper")


def unknown(tensor: str, twin: str) -> bool | None:
    """The `Equal` of headers alone."""
    return None


# --- config.json ---


def tie_word(config: Mapping[str, Any]) -> bool | None:
    """Whether config.json calls the head tied, None if it says nothing.

    A vision-language config says it twice, and transformers 5 ties where either part says true.
    """
    words = _tie_words(config)
    return True in words if words else None


def with_tie_word(config: Mapping[str, Any], tied: bool) -> dict[str, Any]:
    """The config with ``tied`` as its word, in its text part as well.

    An encoder-decoder keeps its word: it is about the encoder's and decoder's embeddings too, and T5 scales the
    decoder's output by it. transformers 5 loads a head of its own all the same.
    """
    if config.get("is_encoder_decoder"):
        return dict(config)
    parts = {"text_config": {**config["text_config"], TIE: tied}} if _has_text_part(config) else {}
    return {**config, TIE: tied, **parts}


def disagrees(config: Mapping[str, Any], tied: bool) -> bool:
    """Whether any part of the config says otherwise than ``tied``."""
    return (not tied) in _tie_words(config)


def _tie_words(config: Mapping[str, Any]) -> set[bool]:
    parts = (config, config["text_config"]) if _has_text_part(config) else (config,)
    return {part[TIE] for part in parts if isinstance(part.get(TIE), bool)}


def _has_text_part(config: Mapping[str, Any]) -> bool:
    return isinstance(config.get("text_config"), Mapping)


# --- one checkpoint ---


def is_tied(
    tensors: Mapping[str, Info], config: Mapping[str, Any], embedding: str | None, head: str | None, equal: Equal
) -> bool:
    """Whether the model has one tensor for embedding and head, whichever of the two is stored."""
    word = tie_word(config)
    if head is None or embedding is None:
        return word is not False and _CLASSES_WITH_HEAD.search(str(config.get("architectures"))) is not None
    if tensors[head].shape != tensors[embedding].shape:
        return False
    if word is False:
        return _same_place(tensors[head], tensors[embedding]) and equal(embedding, head) is not False
    equality = equal(embedding, head)
    return word is True if equality is None else equality


def head_name(embedding: str, config: Mapping[str, Any]) -> str | None:
    """The name that transformers gives a tied head which the checkpoint does not store; None where it is not lm_head.

    An encoder-decoder has further names for its embedding; BERT and its kin have a head of several layers.
    """
    classes = str(config.get("architectures"))
    if config.get("is_encoder_decoder") or ".embeddings." in embedding or _CLASSES_WITH_ANOTHER.search(classes):
        return None
    return "lm_head.weight" if _CLASSES_WITH_LM_HEAD.search(classes) else None


def stored_copies(tensors: Mapping[str, Info], candidates: Sequence[str], equal: Equal) -> dict[str, str]:
    """Names whose tensor is stored under another name as well, each with that name; earlier candidates come first.

    Tensors in one place of a pickle are one whatever their names. Of the ``candidates`` those are one that hold the
    same bits, as T5's table under the names shared, encoder.embed_tokens and decoder.embed_tokens.
    """
    copies: dict[str, str] = {}
    places: dict[tuple[Any, ...], str] = {}
    for name in dict.fromkeys((*candidates, *tensors)):
        info = tensors[name]
        if info.file is not None and info.elements:
            first = places.setdefault((info.offset, info.file, info.dtype, info.shape, info.strides), name)
            copies |= {} if first == name or equal(first, name) is False else {name: first}  # an adapter may differ
    for index, name in enumerate(candidates):
        originals = (n for n in candidates[:index] if n not in copies and _alike(tensors[n], tensors[name]))
        original = None if name in copies else next((n for n in originals if equal(n, name)), None)
        copies |= {} if original is None else {name: original}
    return copies


def _alike(info: Info, twin: Info) -> bool:
    return (info.dtype, info.shape) == (twin.dtype, twin.shape)


def _same_place(info: Info, twin: Info) -> bool:
    """Whether two tensors are the same bytes of the same file."""
    return info.file is not None and info == twin
