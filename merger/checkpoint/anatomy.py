"""What each tensor of a checkpoint is, told from names, shapes and config: no table of architectures."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from merger.checkpoint.packed_experts import COLUMNS, ROWS, packed_experts
from merger.checkpoint.safetensors_header import Info

_EMBEDDING = re.compile(
    r"(?:^|\.)(?:embed|embed_tokens|embed_positions|embed_in|wte|wpe|shared|(?:\w+_)?embeddings?|"
    r"relative_attention_bias)\.weight$"
)
_LANGUAGE_HEAD = re.compile(r"(?:^|\.)(?:lm_head|embed_out|output|decoder)\.weight$")
_HEAD = re.compile(r"(?:^|\.)(?:lm_head|embed_out|output|decoder|score|classifier|qa_outputs)\.weight$")
_BLOCK = re.compile(r"^(?P<list>.*?(?:^|\.)[a-z_]+)\.(?P<number>\d+)\.")


@dataclass(frozen=True)
class Anatomy:
    """What must be known of a whole checkpoint to say what one tensor of it is."""

    tensors: Mapping[str, Info]
    tied: bool  # the input embedding is the head as well
    head: str | None  # the stored head that predicts tokens, if there is one
    embedding: str | None  # the input embedding
    blocks: Mapping[str, int]  # how many blocks each list of them has
    conv1d: frozenset[str]  # last parts of names whose weights are stored [in, out]
    packed: Mapping[str, int | None]  # packed experts [E, ., .], and the axis of each that is the input, if it shows

    def kind(self, name: str) -> str:
        """The kind of methods.md 0.5."""
        info = self.tensors[name]
        if not info.is_float:
            return "buffer"
        if len(info.shape) < 2:
            return "vector"
        if len(info.shape) > 2:
            return "expert3d" if name in self.packed else "other"
        if name == self.embedding or (name == self.head and self.tied):
            return "tied" if self.tied else "embedding"
        if _HEAD.search(name) and block_of(name) is None:
            return "head"
        if _EMBEDDING.search(name):
            return "embedding"
        if not name.endswith("weight"):
            return "vector" if name.endswith("bias") else "other"  # biases of packed experts; Mamba's A_log
        return "conv1d" if _leaf(name) in self.conv1d else "linear"

    def input_axis(self, name: str) -> int | None:
        """The axis of a tensor's matrices along which their inputs lie: -1, or -2 where they are stored [in, out].

        None where nothing shows it.
        """
        return self.packed.get(name, ROWS if self.kind(name) == "conv1d" else COLUMNS)

    def unit(self, name: str) -> str:
        """What the tensor belongs to: its transformer block, or itself."""
        found = _BLOCK.match(name)
        return f"{found['list']}.{found['number']}" if found else name

    def depth(self, name: str) -> Fraction:
        """0 at the first block and before it, 1 at the last one and after it."""
        found = _BLOCK.match(name)
        if found is None:
            return Fraction(0) if self._comes_first(name) else Fraction(1)
        last = self.blocks[found["list"]] - 1
        return Fraction(int(found["number"]), last) if last else Fraction(0)

    def rotation(self, name: str) -> int:
        """The rotation index by block: 0 for embeddings, b + 1 for block b, L + 1 after them (methods.md 2.2)."""
        found = _BLOCK.match(name)
        if found is not None:
            return int(found["number"]) + 1
        return 0 if self._comes_first(name) else max(self.blocks.values(), default=0) + 1

    def _comes_first(self, name: str) -> bool:
        kind = self.kind(name)
        return kind in ("embedding", "tied") or (kind != "head" and "embed" in name)

    def has_vocabulary(self, name: str) -> bool:
        """Whether the tensor has a row for each token, as embedding and head do, and a head's bias."""
        if self.embedding is None or self.kind(name) not in ("embedding", "tied", "head", "vector"):
            return False
        return self.tensors[name].shape[:1] == self.tensors[self.embedding].shape[:1]


def block_of(name: str) -> int | None:
    """The number of the block a tensor belongs to."""
    found = _BLOCK.match(name)
    return int(found["number"]) if found else None


def _leaf(name: str) -> str:
    """The module's own name: c_proj of transformer.h.0.mlp.c_proj.weight."""
    return name.rsplit(".", 2)[-2] if "." in name else name


def study(tensors: Mapping[str, Info], config: Mapping[str, Any]) -> Anatomy:
    """Looks at a checkpoint as a whole."""
    embedding = _input_embedding(tensors, config)
    head = next((n for n in tensors if _LANGUAGE_HEAD.search(n) and block_of(n) is None), None)
    blocks: dict[str, int] = {}
    for name in tensors:
        if found := _BLOCK.match(name):
            blocks[found["list"]] = max(blocks.get(found["list"], 0), int(found["number"]) + 1)
    same = head is None or (embedding is not None and tensors[head].shape == tensors[embedding].shape)
    packed = packed_experts(tensors, config, _width(tensors, config, embedding))
    return Anatomy(tensors, same and _is_tied(head, config), head, embedding, blocks, _conv1d(tensors), packed)


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a config that is about the language model."""
    inner = config.get("text_config")
    return inner if isinstance(inner, Mapping) else config


def _input_embedding(tensors: Mapping[str, Info], config: Mapping[str, Any]) -> str | None:
    """The table of token vectors: the embedding with the most rows, or with the vocabulary's."""
    tables = [n for n, info in tensors.items() if len(info.shape) == 2 and _EMBEDDING.search(n)]
    vocabulary = text_config(config).get("vocab_size")
    exact = [n for n in tables if tensors[n].shape[0] == vocabulary]
    return max(exact or tables, key=lambda n: tensors[n].shape[0], default=None)


def _width(tensors: Mapping[str, Info], config: Mapping[str, Any], embedding: str | None) -> int | None:
    """How many features the hidden states have: as the config says, or else as the embedding has columns."""
    hidden = text_config(config).get("hidden_size")
    return hidden if isinstance(hidden, int) or embedding is None else tensors[embedding].shape[1]


def _is_tied(head: str | None, config: Mapping[str, Any]) -> bool:
    """Whether the model reads its head from the embedding: said by config, or shown by a missing head."""
    said = text_config(config).get("tie_word_embeddings", config.get("tie_word_embeddings"))
    if head is not None:
        return said is True
    has_head = re.compile(r"ForCausalLM|LMHead|ForConditionalGeneration|ForMaskedLM|ForPreTraining")
    return said is not False and has_head.search(str(config.get("architectures"))) is not None


def _conv1d(tensors: Mapping[str, Info]) -> frozenset[str]:
    """GPT-2 stores some weights [in, out], which shows where a bias is as long as the columns, not the rows.

    A square one shows nothing, but goes by the same name as another that does (c_proj).
    """
    shown: dict[str, bool] = {}
    for name, info in tensors.items():
        bias = tensors.get(name.removesuffix("weight") + "bias")
        if name.endswith("weight") and bias is not None and len(info.shape) == 2 and info.shape[0] != info.shape[1]:
            shown[_leaf(name)] = shown.get(_leaf(name), True) and bias.shape == info.shape[1:]
    return frozenset(leaf for leaf, transposed in shown.items() if transposed)
