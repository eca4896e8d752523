"""The kind of each tensor of a checkpoint, told from names, shapes and config: no table of architectures."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property
from typing import Any, NamedTuple

from merger.checkpoint.packed_experts import COLUMNS, ROWS, packed_experts
from merger.checkpoint.tensor_info import Info
from merger.checkpoint.tied_weights import Equal, is_tied, stored_copies, unknown

_EMBEDDINGS = {
    "embed",
    "embed_tokens",
    "embed_positions",
    "embed_in",
    "wte",
    "wpe",
    "shared",
    "relative_attention_bias",
}
_LANGUAGE_HEADS = {"lm_head", "embed_out", "output", "decoder"}
_HEADS = _LANGUAGE_HEADS | {"score", "classifier", "qa_outputs"}
_BLOCK = re.compile(r"^(?P<list>.*?(?:^|\.)[a-z_]+)\.(?P<number>\d+)\.")


@dataclass(frozen=True)
class TensorKinds:
    """The kinds of a checkpoint's tensors, with the facts about all tensors that decide the kind of one."""

    tensors: Mapping[str, Info]
    tied: bool  # the input embedding is the head as well
    head: str | None  # the stored head that predicts tokens, if there is one
    embedding: str | None  # the input embedding
    copies: Mapping[str, str]  # names that store another tensor once more, and the name of that tensor
    config: Mapping[str, Any]
    blocks: Mapping[str, int]  # the number of blocks of each list of them, as model.layers

    @cached_property
    def conv1d(self) -> frozenset[str]:
        """The last parts of names whose weights are stored [in, out]."""
        return _conv1d(self.tensors)

    @cached_property
    def packed(self) -> Mapping[str, int | None]:
        """The packed experts [E, ., .], and the axis of each that is the input, where shapes show it."""
        width = text_config(self.config).get("hidden_size")
        if not isinstance(width, int) and self.embedding is not None:
            width = self.tensors[self.embedding].shape[1]
        return packed_experts(self.tensors, self.config, width)

    @cached_property
    def _kinds(self) -> dict[str, str]:
        """The kinds that were asked for so far."""
        return {}

    def kind(self, name: str) -> str:
        """One of the kinds that a rule can name: linear, conv1d, head, tied, embedding, vector, expert3d, ..."""
        kind = self._kinds.get(name)
        if kind is None:
            kind = self._kinds[name] = self._kind(name)
        return kind

    def _kind(self, name: str) -> str:
        info = self.tensors[name]
        name = self.copies.get(name, name)
        if not info.is_float:
            return "buffer"
        if len(info.shape) < 2:
            return "vector"
        if len(info.shape) > 2:
            return "expert3d" if name in self.packed else "other"
        if name == self.embedding or (name == self.head and self.tied):
            return "tied" if self.tied else "embedding"
        module = _module_of_weight(name)
        if module in _HEADS and block_of(name) is None:
            return "head"
        if _is_embedding_module(module):
            return "embedding"
        if not name.endswith("weight"):
            return "vector" if name.endswith("bias") else "other"  # biases of packed experts; Mamba's A_log
        return "conv1d" if _leaf(name) in self.conv1d else "linear"

    def input_axis(self, name: str) -> int | None:
        """The axis of a tensor's matrices along which their inputs lie: -1, or -2 where they are stored [in, out].

        None where nothing shows it.
        """
        if name in self.packed:
            return self.packed[name]
        return ROWS if self.conv1d and self.kind(name) == "conv1d" else COLUMNS

    def unit(self, name: str) -> str:
        """The transformer block that the tensor belongs to, or the tensor's own name outside the blocks."""
        match = _BLOCK.match(name)
        return f"{match['list']}.{match['number']}" if match else name

    def depth(self, name: str) -> Fraction:
        """0 at the first block and before it, 1 at the last one and after it."""
        match = _BLOCK.match(name)
        if match is None:
            return Fraction(0) if self._comes_first(name) else Fraction(1)
        last = self.blocks[match["list"]] - 1
        return Fraction(int(match["number"]), last) if last else Fraction(0)

    def rotation(self, name: str) -> int:
        """The index by which OBIM rotates the order of experts: 0 before the blocks, b + 1 in block b, L + 1 after."""
        match = _BLOCK.match(name)
        if match is not None:
            return int(match["number"]) + 1
        return 0 if self._comes_first(name) else max(self.blocks.values(), default=0) + 1

    def _comes_first(self, name: str) -> bool:
        kind = self.kind(name)
        return kind in ("embedding", "tied") or (kind != "head" and "embed" in name)

    def has_vocabulary(self, name: str) -> bool:
        """Whether the tensor has a row for each token, as embedding and head do, and a head's bias."""
        if self.embedding is None or self.tensors[name].shape[:1] != self.tensors[self.embedding].shape[:1]:
            return False
        kind = self.kind(name)
        return kind in ("embedding", "tied", "head") or (
            kind == "vector" and name.endswith("bias") and block_of(name) is None
        )

    def untied(self) -> TensorKinds:
        """The same tensors, with a head apart from the embedding."""
        return replace(self, tied=False, copies={name: of for name, of in self.copies.items() if name != self.head})


def tensor_kinds(tensors: Mapping[str, Info], config: Mapping[str, Any], equal: Equal = unknown) -> TensorKinds:
    """Returns the kinds of a checkpoint's tensors; ``equal`` compares the bits of two of them."""
    outer_tensors = {name: info for name, info in tensors.items() if _BLOCK.match(name) is None}
    embedding = _input_embedding(outer_tensors, config)
    head = _language_head(outer_tensors, embedding)
    tied = is_tied(tensors, config, embedding, head, equal)
    copies = stored_copies(tensors, _with_row_per_token(outer_tensors, embedding), equal)
    if tied and head is not None and embedding is not None:
        copies[head] = embedding
    return TensorKinds(tensors, tied, head, embedding, copies, config, _count_blocks(tensors))


def _count_blocks(names: Iterable[str]) -> dict[str, int]:
    blocks: dict[str, int] = {}
    for match in filter(None, map(_BLOCK.match, names)):
        blocks[match["list"]] = max(blocks.get(match["list"], 0), int(match["number"]) + 1)
    return blocks


class BlockName(NamedTuple):
    """The name of a tensor in a block: that of the list of blocks, the block's number, and the name in the block."""

    stack: str
    number: int
    tensor: str

    @property
    def full(self) -> str:
        """The tensor's name in the checkpoint."""
        return f"{self.stack}.{self.number}.{self.tensor}"


def block_name(name: str) -> BlockName | None:
    """The parts of the name of a tensor in a block; None for a tensor outside the blocks."""
    match = _BLOCK.match(name)
    return BlockName(match["list"], int(match["number"]), name[match.end() :]) if match else None


def block_of(name: str) -> int | None:
    """The number of the block a tensor belongs to."""
    match = _BLOCK.match(name)
    return int(match["number"]) if match else None


def _leaf(name: str) -> str:
    """The module's own name: c_proj of transformer.h.0.mlp.c_proj.weight."""
    return name.rsplit(".", 2)[-2] if "." in name else name


def _module_of_weight(name: str) -> str:
    """Returns the last part of the module's name for a weight, and an empty string for other tensors."""
    return name[:-7].rpartition(".")[2] if name.endswith(".weight") else ""


def _is_embedding(name: str) -> bool:
    return _is_embedding_module(_module_of_weight(name))


def _is_embedding_module(module: str) -> bool:
    return module in _EMBEDDINGS or module.endswith(("embedding", "embeddings"))


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a config that is about the language model."""
    inner = config.get("text_config")
    return inner if isinstance(inner, Mapping) else config


BLOCK_COUNTS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
"""The keys of config.json that may hold the number of the language model's blocks."""


def block_count(config: Mapping[str, Any]) -> int | None:
    """The number of the language model's blocks in a config; None where the config does not have it."""
    inner = text_config(config)
    return next((inner[key] for key in BLOCK_COUNTS if isinstance(inner.get(key), int)), None)


def _input_embedding(tensors: Mapping[str, Info], config: Mapping[str, Any]) -> str | None:
    """The table of token vectors outside the blocks: the embedding with the most rows, or with the vocabulary's.

    Of T5's three names for one table that is the shortest, under which newer checkpoints store it alone.
    """
    tables = [n for n, info in tensors.items() if len(info.shape) == 2 and _is_embedding(n)]
    vocabulary = text_config(config).get("vocab_size")
    exact = [n for n in tables if tensors[n].shape[0] == vocabulary]
    return max(exact or tables, key=lambda n: (tensors[n].shape[0], -len(n)), default=None)


def _language_head(tensors: Mapping[str, Info], embedding: str | None) -> str | None:
    """The matrix outside the blocks that predicts tokens: of several so named, the one in the embedding's shape."""
    heads = [name for name in tensors if _module_of_weight(name) in _LANGUAGE_HEADS]
    shape = None if embedding is None else tensors[embedding].shape
    return next((name for name in heads if tensors[name].shape == shape), next(iter(heads), None))


def _with_row_per_token(tensors: Mapping[str, Info], embedding: str | None) -> list[str]:
    """The tensors outside the blocks that may be one: tables in the embedding's shape, and biases of the head."""
    if embedding is None:
        return []
    shape = tensors[embedding].shape
    tables = [n for n, info in tensors.items() if info.shape == shape and _is_embedding(n)]
    biases = [n for n, info in tensors.items() if info.shape == shape[:1] and n.endswith("bias")]
    return [*sorted(tables, key=lambda name: name != embedding), *sorted(biases, key=len)]


def _conv1d(tensors: Mapping[str, Info]) -> frozenset[str]:
    """GPT-2 stores some weights [in, out], which shows where a bias is as long as the columns, not the rows.

    A square one shows nothing, but goes by the same name as another that does (c_proj).
    """
    transposed: dict[str, bool] = {}
    for name, info in tensors.items():
        bias = tensors.get(name.removesuffix("weight") + "bias")
        if name.endswith("weight") and bias is not None and len(info.shape) == 2 and info.shape[0] != info.shape[1]:
            transposed[_leaf(name)] = transposed.get(_leaf(name), True) and bias.shape == info.shape[1:]
    return frozenset(leaf for leaf, is_transposed in transposed.items() if is_transposed)
