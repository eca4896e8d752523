"""Limits of the architecture of a plan's models, as a note or as a fault of a recipe that meets them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from merger.recipe.recommendations import WEIGHTS


def encoder_decoder_limit(config: Mapping[str, Any], *, needs_text: bool) -> tuple[list[str], list[str]]:
    """Returns the notes and the faults of a base with an encoder and a decoder; none for any other.

    Its forward pass takes two texts, and calibration and evaluation have one.
    """
    if config.get("is_encoder_decoder") is not True:
        return [], []
    kind = f"base is {config.get('model_type') or 'a model'}, with an encoder and a decoder"
    if not needs_text:
        return [f"{kind}: methods without text merge it, but calibration and merger eval do not run it"], []
    remedy = f"take a method that needs no text, such as {WEIGHTS.method} (merger methods lists them)"
    return [], [f"{kind}, which calibration does not run; {remedy}"]
