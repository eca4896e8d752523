"""The JSON Schema of recipes, for editors."""

from __future__ import annotations

from typing import Any

import merger.methods  # noqa: F401 registers every method
from merger.pipeline.registry import ENTRIES, SCORES, schema
from merger.recipe.open_values import MARK
from merger.recipe.recipe import Recipe
from merger.recipe.stages import stage_table


def json_schema() -> dict[str, Any]:
    """The JSON Schema of a recipe: each method's parameters are checked as the method's own."""
    whole = Recipe.model_json_schema()
    whole["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    whole["title"] = "merger recipe"
    definitions = whole.setdefault("$defs", {})
    for entry in (*ENTRIES.values(), *SCORES.values()):
        one = schema(entry).model_json_schema(ref_template="#/$defs/{model}")
        definitions |= one.pop("$defs", {})
        one["properties"] = {name: _or_mark(each) for name, each in one.get("properties", {}).items()}
        definitions[f"parameters.{entry.name}"] = one
    of_top = definitions["parameters.top"]["properties"]
    for name in SCORES:  # a score's name stands for `top` with that score
        own = definitions[f"parameters.{name}"]
        ranked = {**of_top, "scope": {**of_top["scope"], "default": SCORES[name].scope}}
        own["properties"] = {**{key: each for key, each in ranked.items() if key != "score"}, **own["properties"]}
    definitions["search mark"] = MARK
    definitions["stage"] = {
        "anyOf": [
            {"enum": sorted(stage_table())},
            {
                "type": "object",
                "minProperties": 1,
                "maxProperties": 1,
                "additionalProperties": False,
                "properties": {
                    name: {"anyOf": [{"$ref": f"#/$defs/parameters.{name}"}, {"type": "null"}]}
                    for name in sorted(stage_table())
                },
            },
        ],
        "description": "A stage's name, or {stage: {parameter: value}}.",
    }
    methods = sorted({**ENTRIES, **SCORES})
    for holder in (whole, definitions["Rule"]):
        named = {"enum": methods, "description": "A method, or a single stage."}
        holder["properties"]["method"] = _or_mark(named)
        holder["properties"]["pipeline"] = {"type": "array", "items": {"$ref": "#/$defs/stage"}}
        holder["allOf"] = [
            {
                "if": {"properties": {"method": {"const": name}}, "required": ["method"]},
                "then": {"properties": {"parameters": {"$ref": f"#/$defs/parameters.{name}"}}},
            }
            for name in methods
        ]
    return whole


_OPEN = {"$ref": "#/$defs/search mark"}


def _or_mark(schema: dict[str, Any]) -> dict[str, Any]:
    """A value, or the mark that leaves it, or one expert's, to a search."""
    for several in ("anyOf", "oneOf"):
        if several in schema:
            return {**schema, several: [*map(_with_open_entries, schema[several]), _OPEN]}
    return {"anyOf": [_with_open_entries(schema), _OPEN], **{k: schema[k] for k in _SHOWN if k in schema}}


_SHOWN = ("default", "description", "title")
"""What editors look for at the top of a value's schema."""


def _with_open_entries(schema: dict[str, Any]) -> dict[str, Any]:
    """The same, where each value of a map may be left open."""
    entries = schema.get("additionalProperties")
    return {**schema, "additionalProperties": _or_mark(entries)} if isinstance(entries, dict) else schema
