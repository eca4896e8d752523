"""The types of parameters in words."""

from __future__ import annotations

from typing import Annotated, Literal

import pytest
from pydantic import Field

from merger.cli._parameter_words import takes
from merger.pipeline import parameters as kinds


@pytest.mark.parametrize(
    ("annotation", "words"),
    [
        (float, "a number"),
        (Annotated[float, Field(ge=0)], "a number"),
        (int, "a whole number"),
        (int | None, "a whole number or nothing"),
        (bool, "true or false"),
        (str, "text"),
        (Literal["a", "b"], "a | b"),
        (kinds.NumberOrAuto, "auto, a number, or a list over depth"),
        (kinds.ShareOrAuto, "auto, a share in [0, 1], or a list over depth"),
        (list, "a value of type list"),
    ],
)
def test_what_a_parameter_takes_is_told_by_its_type(annotation, words):
    assert takes(annotation) == words
