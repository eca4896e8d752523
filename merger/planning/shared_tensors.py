"""Shared tensors of a merge: which names mean one tensor in every model, and which stored tensor a name stands for.

A checkpoint may store a tied head, or an encoder's copy of the embedding, or leave it out; one expert may have a head
of its own where the others tie theirs. Two names are one tensor of the output where they are one in every model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from merger.checkpoint.checkpoint import Checkpoint
from merger.checkpoint.tensor_kinds import TensorKinds
from merger.checkpoint.tied_weights import disagrees, tie_word, with_tie_word


class SharedTensors:
    """The tensors that the models of a merge, base first, hold once under several names."""

    def __init__(self, models: Mapping[str, Checkpoint], kinds: Mapping[str, TensorKinds]) -> None:
        self._models, self._kinds = models, kinds
        self._heads = {kind.head for kind in kinds.values() if kind.head is not None}
        self._embeddings = {kind.embedding for kind in kinds.values() if kind.embedding is not None}
        copies = {name for kind in kinds.values() for pair in kind.copies.items() for name in pair}
        self._names = copies | self._heads | self._embeddings
        self._untied_copies = {label for label in models if self._stores_untied_copy(label)}

    def is_shared(self, name: str) -> bool:
        """Whether some model holds the tensor of this name under another name too, or it is an embedding or a head."""
        return name in self._names

    def stored_names(self, name: str) -> dict[str, str | None]:
        """The stored tensor of each model that stands for the output tensor ``name``."""
        if name not in self._names:
            return {label: name if name in kinds.tensors else None for label, kinds in self._kinds.items()}
        return {label: self.stored_name(label, name) for label in self._models}

    def stored_name(self, label: str, name: str) -> str | None:
        """The stored tensor of a model that stands for the output tensor ``name``; None if the model has none."""
        kinds = self._kinds[label]
        if name not in self._names:
            return name if name in kinds.tensors else None
        if name in kinds.tensors:
            is_copy = name == kinds.head and label in self._untied_copies
            return kinds.embedding if is_copy else kinds.copies.get(name, name)
        if name in self._heads:
            return kinds.embedding if kinds.tied else None
        twins = (twin for twin in self._twins(name) if twin in kinds.tensors)
        return next(
            (kinds.copies.get(twin, twin) for twin in twins),
            kinds.head if kinds.tied and kinds.embedding is None and name in self._embeddings else None,
        )

    def originals(self, names: Iterable[str]) -> dict[str, str]:
        """For each of the output's ``names`` that repeats another one, the name under which the tensor is merged."""
        groups: dict[tuple[str | None, ...], list[str]] = {}
        for name in names:
            if name in self._names:
                groups.setdefault(self._stored_names(name), []).append(name)
        originals: dict[str, str] = {}
        for group in groups.values():
            first = min(group, key=lambda name: (name in self._heads, len(name)))
            originals |= {name: first for name in group if name != first}
        return originals

    def repeated(self, name: str, holders: Iterable[str]) -> str | None:
        """The base's tensor that a tensor of the experts ``holders``, which the base does not store, merely repeats."""
        if name not in self._names:
            return None
        base, stored = self._kinds["base"].tensors, self._stored_names(name)
        copied = {self._kinds[label].copies.get(name) for label in holders}
        originals = (n for n in sorted(self._names) if n in base and (copied == {n} or self._stored_names(n) == stored))
        return next(originals, None)

    def own_head(self, names: Iterable[str]) -> str | None:
        """The head among the output's ``names`` that is no longer the embedding, though the base ties the two."""
        if not self._kinds["base"].tied:
            return None
        embeddings = [self._stored_names(name) for name in self._embeddings]
        heads = ((name, self._stored_names(name)) for name in names if name in self._heads)
        return next((name for name, stored in heads if stored[0] is not None and stored not in embeddings), None)

    def config(self, own_head: str | None) -> dict[str, Any]:
        """Returns the base's config.json with tie_word_embeddings as in the output's tensors."""
        base, config = self._kinds["base"], self._models["base"].config
        if base.tied and own_head is None:
            return with_tie_word(config, True) if disagrees(config, True) else dict(config)
        has_head = own_head is not None or (base.head is not None and base.embedding is not None)
        untie = has_head and (base.tied or disagrees(config, False))
        return with_tie_word(config, False) if untie else dict(config)

    def notes(self) -> Iterable[str]:
        """The models whose config calls a head tied that is stored with values of its own."""
        for label, kinds in self._kinds.items():
            config = self._models[label].config
            stands_alone = kinds.head is not None and kinds.embedding is not None and not kinds.tied
            if stands_alone and tie_word(config) and not config.get("is_encoder_decoder"):
                yield (
                    f"{label}: {kinds.head} differs from {kinds.embedding}, though config.json ties them; "
                    "it is merged as a head of its own, which is how transformers 5 and peft load it"
                )

    def _stored_names(self, name: str) -> tuple[str | None, ...]:
        """The stored tensor that stands for ``name``, model by model."""
        return tuple(self.stored_names(name).values())

    def _twins(self, name: str) -> Iterable[str]:
        """Other names under which some checkpoint stores the same table once more."""
        for kinds in self._kinds.values():
            original = kinds.copies.get(name, name)
            if original in kinds.tensors:
                yield original
                yield from (twin for twin, of in kinds.copies.items() if of == original and twin not in self._heads)

    def _stores_untied_copy(self, label: str) -> bool:
        """Whether a model's config unties a head that holds the embedding's very bits, while the base ties its own."""
        kinds = self._kinds[label]
        if not self._kinds["base"].tied or kinds.tied or kinds.head is None or kinds.embedding is None:
            return False
        return self._models[label].equal(kinds.embedding, kinds.head) is True
