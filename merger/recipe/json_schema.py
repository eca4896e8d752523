"""The JSON Schema of recipes, for editors."""

from __future__ import annotations

from typing import Any

import merger.methods  # noqa: F401 registers every method
from merger.pipeline.registry import ENTRIES, SCORES, schema
from merger.recipe.open_values import MARK
from merger.recipe.recipe import Recipe
from merger.recipe.stages import stage_table


def json_schema() -> dict[str, Any]:
    """Returns the JSON Schema of a recipe; the parameters of a method have that method's own schema."""
    recipe_schema = Recipe.model_json_schema()
    recipe_schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    recipe_schema["title"] = "merger recipe"
    recipe_schema["anyOf"] = [
        {"required": ["experts"], "properties": {"experts": {"minProperties": 1}}},
        {"required": ["layers"], "properties": {"layers": {"minItems": 1}}},
    ]
    definitions = recipe_schema.setdefault("$defs", {})
    for entry in (*ENTRIES.values(), *SCORES.values()):
        parameters = schema(entry).model_json_schema(ref_template="#/$defs/{model}")
        definitions |= parameters.pop("$defs", {})
        parameters["properties"] = {
            name: _allow_mark(value_schema) for name, value_schema in parameters.get("properties", {}).items()
        }
        definitions[f"parameters.{entry.name}"] = parameters
    of_top = definitions["parameters.top"]["properties"]
    for name in SCORES:  # a score's name stands for `top` with that score
        definition = definitions[f"parameters.{name}"]
        ranked = {**of_top, "scope": {**of_top["scope"], "default": SCORES[name].scope}}
        definition["properties"] = {
            **{key: value_schema for key, value_schema in ranked.items() if key != "score"},
            **definition["properties"],
        }
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
    for holder in (recipe_schema, definitions["Rule"], definitions["Layer"]):
        properties = holder["properties"]
        properties["method"] = _allow_mark({"enum": methods, "description": properties["method"]["description"]})
        properties["pipeline"] |= {"type": "array", "items": {"$ref": "#/$defs/stage"}}
        del properties["pipeline"]["anyOf"]
        holder["allOf"] = [
            {
                "if": {"properties": {"method": {"const": name}}, "required": ["method"]},
                "then": {"properties": {"parameters": {"$ref": f"#/$defs/parameters.{name}"}}},
            }
            for name in methods
        ]
    recipe_schema["required"].remove("base")
    recipe_schema["allOf"].append({"if": _IS_ONE_RUN, "else": {"required": ["base"]}})
    return recipe_schema


_IS_ONE_RUN = {"properties": {"experts": {"type": "object", "required": ["glob"]}}}
"""The schema of recipes whose experts are a pattern, which need no base."""


_OPEN = {"$ref": "#/$defs/search mark"}


def _allow_mark(schema: dict[str, Any]) -> dict[str, Any]:
    """Returns the schema of a value or a search mark, also for the entries of a map."""
    for keyword in ("anyOf", "oneOf"):
        if keyword in schema:
            return {**schema, keyword: [*map(_allow_marked_entries, schema[keyword]), _OPEN]}
    return {"anyOf": [_allow_marked_entries(schema), _OPEN], **{k: schema[k] for k in _SHOWN if k in schema}}


_SHOWN = ("default", "description", "title")
"""The keys that editors read at the top of a value's schema."""


def _allow_marked_entries(schema: dict[str, Any]) -> dict[str, Any]:
    """Returns the schema of a map in which each value may be a search mark."""
    entries = schema.get("additionalProperties")
    return {**schema, "additionalProperties": _allow_mark(entries)} if isinstance(entries, dict) else schema
