"""A PEFT LoRA adapter on top of a checkpoint: every weight it changes is W + scale·B·A, a few rows at a time."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from merger._lazy import torch
from merger.checkpoint.adapter_config import CONFIG, unsupported
from merger.checkpoint.adapter_names import AdapterMatch, match_adapter
from merger.checkpoint.checkpoint import Checkpoint
from merger.checkpoint.tensor_info import Info
from merger.checkpoint.tensor_kinds import tensor_kinds
from merger.checkpoint.tied_weights import head_name
from merger.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

# Rows of one product. Always the same rows are multiplied at once, because BLAS gives a row other bits in
# another company: of 1000 numbers, 390 differed when their row was multiplied alone (MKL 2024, rank 4).
BLOCK = 64

_NAMELESS = ""
"""Stands for a tied tensor's further names in the model in memory, where the checkpoint does not tell them."""


class Adapted(Checkpoint):
    """A checkpoint with an adapter on it: the tensors of the two, of which some read as float32."""

    adapter: Checkpoint

    def __init__(self, model: Checkpoint, adapter: Checkpoint, base: Checkpoint | None = None) -> None:
        check_config(adapter)
        match = _match(model, adapter)
        super().__init__(
            model.label,
            model.directory,
            match.tensors,
            model.config,
            commit=model.commit,
            original_names=model.original_names,
        )
        self.is_rearranged = model.is_rearranged
        self.adapter = adapter
        self.changes, self.rows = match.changes, match.rows
        # Where the model is the base itself, the difference from it is the change, not (W + BA) - W.
        base_tensors = frozenset(base.tensors.values() if base is not None and type(base) is Checkpoint else ())
        self._on_base = frozenset(name for name in self.changes if self.tensors[name] in base_tensors)
        self._factors = lru_cache(8)(self._read_factors)

    @property
    def files(self) -> list[Path]:
        """The weight files of the model, and the adapter's weights and config, which holds the scale."""
        return sorted({*super().files, *self.adapter.files, self.adapter.directory / CONFIG})

    def dtype(self, name: str) -> torch.dtype:
        """float32 where the adapter changes a tensor, else as stored."""
        return torch.float32 if name in self.changes or name in self.rows else super().dtype(name)

    def read_into(self, rows: Tensor, name: str, start: int, stop: int) -> None:
        """Reads rows of W, of W + scale·B·A, or of W with the adapter's own rows for some tokens, into ``rows``."""
        super().read_into(rows, name, start, stop)
        if name in self.changes:
            rows += self._change(name, start, stop)
        if name in self.rows:
            tokens = self.rows[name]
            for row, index in enumerate(tokens.indices):
                if start <= index < stop:
                    rows[index - start] = self.adapter.read_rows(tokens.tensor, row, row + 1)[0]

    def change_rows(self, name: str, start: int, stop: int) -> Tensor | None:
        """Rows of scale·B·A where the model under the adapter is the base itself."""
        return self._change(name, start, stop) if name in self._on_base else None

    def change_rank(self, name: str, base: Checkpoint, base_name: str) -> int | None:
        """The adapter's rank where it changes a tensor of the base; see `Checkpoint`."""
        rank = super().change_rank(name, base, base_name)
        if rank is None or name in self.rows:
            return None
        return self.adapter.tensors[self.changes[name].down].shape[0] if name in self.changes else 0

    def equal(self, tensor: str, twin: str) -> bool | None:
        """Whether two tensors hold the same bits, or get the same change to the same bits."""
        stored = super().equal(tensor, twin)
        return stored and self._equal_rows(tensor, twin) and self._equal_changes(tensor, twin)

    def _equal_rows(self, tensor: str, twin: str) -> bool | None:
        rows, twin_rows = self.rows.get(tensor), self.rows.get(twin)
        if rows is None or twin_rows is None or rows.indices != twin_rows.indices:
            return rows is twin_rows
        return self.adapter.equal(rows.tensor, twin_rows.tensor)

    def _equal_changes(self, tensor: str, twin: str) -> bool:
        change, twin_change = self.changes.get(tensor), self.changes.get(twin)
        if change is None or twin_change is None or change.scale != twin_change.scale:
            return change is twin_change
        return all(torch.equal(*pair) for pair in zip(self._factors(tensor), self._factors(twin), strict=True))

    def close(self) -> None:
        """Closes the files of both."""
        self._factors.cache_clear()
        self.adapter.close()
        super().close()

    def _change(self, name: str, start: int, stop: int) -> Tensor:
        """Rows ``start`` to ``stop`` of scale·B·A."""
        left, right = self._factors(name)
        first = start - start % BLOCK
        blocks = [left[row : row + BLOCK] @ right for row in range(first, max(stop, first + 1), BLOCK)]
        return torch.cat(blocks)[start - first : stop - first].mul_(self.changes[name].scale)

    def _read_factors(self, name: str) -> tuple[Tensor, Tensor]:
        """The change of a weight as a product [rows, rank] @ [rank, columns], still without its scale."""
        change = self.changes[name]
        down, up = self.adapter.read(change.down).float(), self.adapter.read(change.up).float()
        return (down.T.contiguous(), up.T.contiguous()) if change.transposed else (up, down)


def check_config(adapter: Checkpoint) -> None:
    """CheckpointError unless W + scale·B·A, whole tensors and rows of tokens are all there is to the adapter."""
    if reason := unsupported(adapter.config):
        _refuse(adapter, reason)


def _refuse(adapter: Checkpoint, reason: str) -> None:
    raise CheckpointError(
        f"{adapter.label} {reason}, which merger cannot add to a model; "
        "merge it with peft's merge_and_unload, and give the model that comes of it"
    )


def _match(model: Checkpoint, adapter: Checkpoint) -> AdapterMatch:
    """Returns the change of each tensor of the model, and of a tied head that the checkpoint does not store."""
    kinds = tensor_kinds(model.tensors, model.config, model.equal)
    embedding, head = kinds.embedding, kinds.head
    tied = [embedding, *(n for n, original in kinds.copies.items() if original == embedding)] if embedding else []
    has_absent_name = (kinds.tied and head is None) or model.config.get("is_encoder_decoder")
    if embedding is None or not has_absent_name:
        match = _matched(model.tensors, tied, adapter)
    else:
        match = _match_absent_name(model, embedding, tied, adapter)
    if embedding is not None and head is not None and model.tensors[embedding].shape == model.tensors[head].shape:
        _check_vocabulary(match.tensors, embedding, head, adapter)
    return match


def _match_absent_name(model: Checkpoint, embedding: str, tied: Sequence[str], adapter: Checkpoint) -> AdapterMatch:
    """The match where the model in memory has its embedding under a name that the checkpoint leaves out."""
    name = head_name(embedding, model.config) or _NAMELESS
    match = _matched({**model.tensors, name: model.tensors[embedding]}, [*tied, name], adapter)
    if not match.tells_apart(embedding, name):
        match.drop(name)
    elif name == _NAMELESS:
        _refuse(adapter, f"changes {embedding} alone, though the model has that tensor under other names too")
    return match


def _matched(tensors: Mapping[str, Info], tied: Sequence[str], adapter: Checkpoint) -> AdapterMatch:
    try:
        return match_adapter(tensors, tied, adapter)
    except (ValueError, OverflowError, re.error) as error:
        raise CheckpointError(f"{adapter.label}: {error}") from None


def _check_vocabulary(tensors: Mapping[str, Info], embedding: str, head: str, adapter: Checkpoint) -> None:
    """CheckpointError if the adapter adds tokens to one of embedding and head, and lost the other's new rows."""
    rows = {name: tensors[name].shape[0] for name in (embedding, head)}
    if rows[embedding] != rows[head]:
        longer, shorter = (embedding, head) if rows[embedding] > rows[head] else (head, embedding)
        raise CheckpointError(
            f"{adapter.label}: has {rows[longer]} rows for {longer}, but {shorter} has {rows[shorter]}; "
            "an adapter that adds tokens must store both"
        )
