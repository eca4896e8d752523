"""The types of a method's parameters in words."""

from __future__ import annotations

from fractions import Fraction
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from merger.pipeline import parameters as kinds
from merger.pipeline.registry import SCORES, Anchor, CoreInner, Inner, Score


def takes(annotation: Any) -> str:
    """A few words on what a recipe may write for a parameter."""
    descriptions = {
        kinds.Number: "a number, or a list over depth",
        kinds.NumberOrAuto: "auto, a number, or a list over depth",
        kinds.Share: "a share in [0, 1], or a list over depth",
        kinds.ShareOrAuto: "auto, a share in [0, 1], or a list over depth",
        kinds.Numbers: "a number, a list over depth, or a map by expert",
        kinds.Shares: "a share in [0, 1], a list over depth, or a map by expert",
        kinds.SharesOrAuto: "auto, a share, a list over depth, or a map by expert",
        kinds.Stretch: "fit, a number, or a list over depth",
        kinds.Towards: "mean, sum, fit, a number, or a list over depth",
        Score: f"a score: {', '.join(SCORES)}",
        Anchor: "a method, or {method: {parameter: value}}",
        Inner: "a method, or {method: {parameter: value}}",
        CoreInner: "a method, or {method: {parameter: value}}",
    }
    for kind, words in descriptions.items():
        if annotation == kind:
            return words
    if kinds.is_order(annotation):
        return "rotation, listed, a list of experts, {first: x} or {last: x}"
    return _takes_plain(annotation)


_PLAIN_TYPES = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    Fraction: "a number, or a fraction such as 1/3",
    str: "text",
    type(None): "nothing",
}


def _takes_plain(annotation: Any) -> str:
    """What a recipe may write for a parameter with a type of Python."""
    for plain_type, words in _PLAIN_TYPES.items():
        if annotation is plain_type:
            return words
    choices = get_args(annotation)
    if get_origin(annotation) is Annotated:
        return _takes_plain(choices[0])
    if choices and all(isinstance(choice, str) for choice in choices):
        return " | ".join(choices)
    if get_origin(annotation) in (Union, UnionType):
        return " or ".join(map(takes, choices))
    return f"a value of type {getattr(annotation, '__name__', annotation)}"
