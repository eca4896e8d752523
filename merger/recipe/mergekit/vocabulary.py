"""mergekit's settings of the vocabulary: tokenizer_source, or tokenizer with rows of single tokens and padding."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from merger.recipe.document import KeyPath
from merger.recipe.mergekit.references import Faults, Reference, reference
from merger.recipe.places import place_name
from merger.recipe.sections import UNION


class Vocabulary:
    """The settings of one configuration; ``names`` are the recipe's names of its models."""

    def __init__(
        self, config: Mapping[str, Any], names: Mapping[Reference, str], faults: Faults, notes: list[str]
    ) -> None:
        self._names, self._faults, self._notes = names, faults, notes
        self._source: Any = config.get("tokenizer_source")
        self._path: KeyPath = ("tokenizer_source",)
        section = config.get("tokenizer")
        if not isinstance(section, Mapping | None):
            faults.append((("tokenizer",), "expected keys and values, as in {source: base}"))
        self._section: Mapping[str, Any] = section if isinstance(section, Mapping) else {}
        if self._source is None and isinstance(section, Mapping):
            self._source, self._path = section.get("source", UNION), ("tokenizer", "source")

    def sections(self) -> Iterator[tuple[KeyPath, Mapping[str, Any], set[str]]]:
        """Yields the mappings of the section `tokenizer`, with their paths and the keys that mergekit reads."""
        yield ("tokenizer",), self._section, {"source", "tokens", "pad_to_multiple_of"}
        tokens = self._section.get("tokens")
        for token, settings in tokens.items() if isinstance(tokens, Mapping) else ():
            if isinstance(settings, Mapping):
                yield ("tokenizer", "tokens", str(token)), settings, {"source", "force"}

    def recipe_keys(self) -> dict[str, Any]:
        """The recipe's keys `tokenizer` and `tokens`."""
        if self._source is None:
            return {}
        words = {"base": "base", UNION: UNION}
        name = words.get(self._source) if isinstance(self._source, str) else None
        tokens = dict(self._tokens())
        return {"tokenizer": name or self._name(self._source, self._path), **({"tokens": tokens} if tokens else {})}

    def output_keys(self) -> dict[str, Any]:
        """The key `pad_rows_to` of the recipe's output."""
        multiple = self._section.get("pad_to_multiple_of")
        if multiple is None:
            return {}
        if type(multiple) is not int or multiple < 1:
            path = ("tokenizer", "pad_to_multiple_of")
            self._faults.append((path, f"is {str(multiple)[:80]}, expected a whole number from 1 on"))
            return {}
        return {"pad_rows_to": multiple}

    def _tokens(self) -> Iterator[tuple[str, dict[str, str]]]:
        """The source of the row of each token that has one of its own."""
        tokens = self._section.get("tokens") or {}
        if not isinstance(tokens, Mapping):
            example = "{<pad>: {source: {kind: zero}}}"
            self._faults.append((("tokenizer", "tokens"), f"expected tokens with their sources, as in {example}"))
            return
        for token, settings in tokens.items():
            path: KeyPath = ("tokenizer", "tokens", str(token))
            if not isinstance(settings, Mapping):
                self._faults.append((path, "expected a source, as in {source: model, force: true}"))
            elif settings.get("source") is not None:
                name = self._row_source(token, settings["source"], (*path, "source"))
                if not settings.get("force"):
                    self._notes.append(
                        f"{place_name(path, {})}: without force, mergekit merges the rows of all models that have "
                        f"the token; here its row is that of {name}."
                    )
                yield str(token), {"from": name}

    def _row_source(self, token: Any, source: Any, path: KeyPath) -> str:
        """The model of a row, or zero."""
        if not isinstance(source, Mapping) or "kind" not in source:
            return self._name(source, path)
        if source["kind"] == "zero":
            return "zero"
        if source["kind"] != "model_token" or source.get("token") != token:
            reason = "the row of another token has no equivalent; a token's row is that of the same token"
            self._faults.append((path, reason))
        return self._name(source.get("model"), (*path, "model"))

    def _name(self, value: Any, path: KeyPath) -> str:
        """The recipe's name of a model; a fault for a model that is not merged."""
        model = reference(value, path, self._faults)
        if model is not None and model not in self._names:
            self._faults.append((path, f"{value!r} is none of the models that are merged"))
        return "base" if model is None else self._names.get(model, "base")
