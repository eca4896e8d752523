"""Writes the tables of a recipe's keys in docs/recipe-reference.md from the models that check recipes.

python scripts/recipe_reference.py            # rewrites the tables
python scripts/recipe_reference.py --check    # exits with 1 if they differ
"""

import sys
from pathlib import Path
from typing import Any

from generated import rewrite

from merger.recipe.json_schema import json_schema
from merger.recipe.layers import Layer
from merger.recipe.recipe import Recipe
from merger.recipe.sections import Calibration, Evaluation, Expert, Output, Rule, Search, Section, TextSource, TokenRow
from merger.recipe.trajectory import Trajectory

DOCS = Path(__file__).parents[1] / "docs" / "recipe-reference.md"
BEGIN, END = "<!-- keys: written by scripts/recipe_reference.py -->\n", "<!-- end of keys -->\n"
SECTIONS: dict[str, tuple[type[Section], str]] = {
    "The recipe": (Recipe, ""),
    "`base`, and each of `experts`": (Expert, "A location alone is `{model: LOCATION}`. The base has no weight."),
    "`experts` of one run": (
        Trajectory,
        "Checkpoints of one training run, which need no base: without one it is the last of them.",
    ),
    "`output`": (Output, "A path alone is `{path: PATH}`."),
    "Each of `tokens`": (TokenRow, "[Tokenizers](vocabulary.md) says where a row comes from otherwise."),
    "Each of `rules`": (Rule, "Give `tensors` or `kinds`, or both; and `use`, a method or a pipeline."),
    "Each of `layers`": (
        Layer,
        "[Layers](layers.md) has examples. Give `model`, or a method, or leave it to the recipe's.",
    ),
    "`calibration`": (Calibration, "[Calibration text](calibration.md) has an example of each key."),
    "A source of text": (
        TextSource,
        "In `calibration.data` and `evaluation.data`. A location alone is `{file: LOCATION}`.",
    ),
    "`evaluation`": (Evaluation, "[Did it work](evaluation.md) says what is measured."),
    "`search`": (Search, "[What would work better](search.md) says what the strategies do."),
}
REFERENCES = {
    "Calibration": "`calibration`",
    "Evaluation": "`evaluation`",
    "Search": "`search`",
    "Output": "an output",
    "Rule": "rules",
    "Layer": "layers",
    "Source": "a model",
    "Expert": "an expert",
    "TextSource": "a source of text",
    "TokenRow": "its source",
    "Trajectory": "a pattern of them",
    "MovingAverage": "`{ema: SHARE}`",
}


def tables() -> str:
    schema = json_schema()
    properties = {name: definition.get("properties", {}) for name, definition in schema["$defs"].items()}
    properties["Recipe"] = schema["properties"]
    parts = []
    for heading, (model, remark) in SECTIONS.items():
        keys = sorted(
            (field.alias or name for name, field in model.model_fields.items()),
            key=lambda key: key not in required(model),
        )
        rows = [row(key, key in required(model), properties[model.__name__][key]) for key in keys]
        lines = [f"### {heading}", "", *([remark, ""] if remark else []), "| key | value | default | |"]
        lines.append("|---|---|---|---|")
        parts.append("\n".join([*lines, *rows]))
    return "\n\n".join(parts) + "\n"


def required(model: type[Section]) -> set[str]:
    return {field.alias or name for name, field in model.model_fields.items() if field.is_required()}


def row(key: str, is_required: bool, schema: dict[str, Any]) -> str:
    cells = [f"`{key}`", value_text(schema), default_text(is_required, schema), description(key, schema)]
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def description(key: str, schema: dict[str, Any]) -> str:
    if "description" not in schema:
        sys.exit(f"{key} has no description in merger/recipe")
    return str(schema["description"])


def default_text(is_required: bool, schema: dict[str, Any]) -> str:
    default = schema.get("default")
    if is_required:
        return "required"
    return "" if default is None else f"`{default}`"


def value_text(schema: dict[str, Any], joint: str = ", or ") -> str:
    """What may be written as a value, in words; ``joint`` stands between alternatives."""
    for keyword in ("anyOf", "oneOf"):
        if keyword in schema:
            options = [value_text(option, joint) for option in schema[keyword] if option.get("type") != "null"]
            return joint.join(dict.fromkeys(option for option in options if option))
    if "$ref" in schema:
        return REFERENCES.get(schema["$ref"].rpartition("/")[2], "")
    if "enum" in schema:
        return "any method" if len(schema["enum"]) > 20 else ", ".join(f"`{value}`" for value in schema["enum"])
    if schema.get("type") == "array":
        return f"list of {value_text(schema['items'], ' / ') or 'stages'}"
    if schema.get("type") == "object":
        entries = schema.get("additionalProperties")
        kinds = value_text(entries, " / ") if isinstance(entries, dict) else ""
        return f"map to {kinds}" if kinds else "map"
    names = {"string": "text", "integer": "whole number", "number": "number", "boolean": "yes or no"}
    least = f" from {schema['minimum']}" if "minimum" in schema else ""
    return names.get(schema.get("type", ""), "") + least


if __name__ == "__main__":
    rewrite(DOCS, BEGIN, END, tables(), "merger/recipe")
