"""Valid parameters for any registered function, drawn from its own signature."""

from fractions import Fraction
from typing import Annotated, Literal, get_args, get_origin

from hypothesis import strategies as st

import merger.methods  # noqa: F401 registers every method
from merger.pipeline.parameters import (
    Number,
    NumberOrAuto,
    Numbers,
    Share,
    ShareOrAuto,
    Shares,
    SharesOrAuto,
    Stretch,
    Towards,
    is_order,
)
from merger.pipeline.registry import ENTRIES, SCORES, Anchor, CoreInner, Inner, Score, parameters

NUMBERS = st.sampled_from([0, 1, 2, -1, 0.3, "1/3", 1.2])
SHARES = st.sampled_from([0, 1, 0.5, "1/3", 0.29, 0.2, "1/8"])


def numbers(number, experts):
    """A number as recipes write it: one, several over the depth, or by expert."""
    lists = st.lists(number, min_size=2, max_size=3)
    return number | lists | st.fixed_dictionaries(dict.fromkeys(experts, number | lists))


def values_of(annotation, default, experts):
    """What a recipe may write for a parameter; its default alone for a kind that is not known here."""
    if annotation in (Number, Share):
        number = SHARES if annotation == Share else NUMBERS
        return number | st.lists(number, min_size=2, max_size=3)
    if annotation in (Numbers, Shares):
        return numbers(SHARES if annotation == Shares else NUMBERS, experts)
    if annotation == SharesOrAuto:
        return st.just("auto") | st.just(str(Fraction(1, len(experts)))) | numbers(SHARES, experts)
    if annotation == ShareOrAuto:
        return st.just("auto") | SHARES | st.lists(SHARES, min_size=2, max_size=3)
    if annotation in (NumberOrAuto, Stretch, Towards):
        words = {NumberOrAuto: ["auto"], Stretch: ["fit"], Towards: ["fit", "mean", "sum"]}[annotation]
        return st.sampled_from(words) | NUMBERS | st.lists(NUMBERS, min_size=2, max_size=3)
    if annotation == Anchor:
        return st.sampled_from(["mean", "ties", "wudi", "slerp" if len(experts) == 2 else "sce"])
    if annotation == Inner:
        return st.sampled_from(["ties", "mean", "dare_linear", "obim", "cabs", "iso_c"])
    if annotation == CoreInner:
        return st.sampled_from(["ties", "mean", "dare_linear", "cabs", "iso_c"])
    if annotation == Score:
        return st.sampled_from(sorted(SCORES))
    if is_order(annotation):
        ends = [{"first": experts[-1]}, {"last": experts[0], "rest": "listed"}]
        return st.sampled_from(["listed", "rotation", *ends]) | st.permutations(experts)
    if annotation is bool:
        return st.booleans()
    if get_origin(annotation) is Literal:
        return st.sampled_from(get_args(annotation))
    if get_origin(annotation) is Annotated and get_args(annotation)[0] is int:
        bounds = [bound for mark in get_args(annotation)[1:] for bound in mark.metadata]
        minimum = max((bound.ge for bound in bounds if hasattr(bound, "ge")), default=0)
        return st.integers(minimum, min((bound.le for bound in bounds if hasattr(bound, "le")), default=minimum + 8))
    return st.just(default)


def parameters_of(name, experts):
    """Valid values for some of a function's parameters; the others are left out."""
    annotations = {} if name in ENTRIES else dict(parameters(SCORES[name].function))
    annotations |= parameters(ENTRIES[name if name in ENTRIES else "top"].function)
    if name in SCORES:
        del annotations["score"]
    values = {key.rstrip("_"): values_of(*details, experts) for key, details in annotations.items()}
    steps = {"steps": st.integers(1, 4)} if values.pop("steps", None) is not None else {}  # all of them take long
    return st.fixed_dictionaries(steps, optional=values)
