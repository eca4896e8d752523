"""What a stage returns is checked before compiled loops read it."""

import pytest
import torch

import merger
from merger.errors import RecipeError
from merger.pipeline.registry import ENTRIES, Entry

BASE = {"w": torch.zeros(4, 3)}
EXPERTS = {name: {"w": torch.full((4, 3), value)} for name, value in (("a", 1.0), ("b", 2.0), ("c", 6.0))}


def median(deltas):
    return deltas.median(0).values


def first_column(deltas):
    return deltas.sum(0)[:, :1]


def thin_column(deltas):
    return deltas[:, :, :1]


def turned(deltas):
    return deltas.sum(0).T


def unmerged(deltas):
    return deltas


def named_values(deltas):
    return deltas.median(0)


def nothing(deltas):
    """Forgets to return."""


def merged_by(monkeypatch, function, kind="merger"):
    monkeypatch.setitem(ENTRIES, function.__name__, Entry(function.__name__, kind, function))
    pipeline = [function.__name__] if kind == "merger" else [function.__name__, "sum"]
    return merger.merge_tensors(pipeline, BASE, EXPERTS)


def test_a_method_of_the_right_shape_merges(monkeypatch):
    assert merged_by(monkeypatch, median)["w"].tolist() == [[2.0] * 3] * 4


@pytest.mark.parametrize(
    ("function", "kind", "found", "expected"),
    [
        (first_column, "merger", "[4, 1]", "[4, 3]"),
        (turned, "merger", "[3, 4]", "[4, 3]"),
        (unmerged, "merger", "[3, 4, 3]", "[4, 3]"),
        (named_values, "merger", "a median", "[4, 3]"),
        (nothing, "merger", "a NoneType", "[4, 3]"),
        (thin_column, "sparsifier", "[3, 4, 1]", "[3, 4, 3]"),
    ],
)
def test_a_result_of_another_shape_is_told_with_the_place_of_the_method(monkeypatch, function, kind, found, expected):
    with pytest.raises(RecipeError) as refused:
        merged_by(monkeypatch, function, kind)
    place = f"{__file__}:{function.__code__.co_firstlineno}"
    assert str(refused.value) == (f"stage {function.__name__}: returns {found}, expected a tensor {expected} ({place})")


def without_star(deltas, share=3):
    return deltas.sum(0) * share


def test_a_name_that_nothing_supplies_is_a_fault_of_the_recipe(monkeypatch):
    with pytest.raises(RecipeError, match="nothing supplies 'share', which stands before the \\* of a stage"):
        merged_by(monkeypatch, without_star)
