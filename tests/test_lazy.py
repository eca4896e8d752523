"""Expressions over slices: they give the bits of torch, and compute what is looked at, once and no more."""

from __future__ import annotations

import gc
import operator
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from merger.ops import kernels
from merger.ops.kernels.lazy import Lazy
from merger.ops.kernels.steps import InPlaceError

pytestmark = pytest.mark.skipif(not kernels.compiled(), reason="the compiled loops were not built here")

K, R, C = 3, 5, 700  # elements of several pieces and a rest
DELTAS = torch.randn(K, R, C, generator=torch.Generator().manual_seed(0))
OTHER = torch.randn(K, R, C, generator=torch.Generator().manual_seed(1))
MASK = OTHER > 0
OPERATIONS: dict[str, Callable[[Any], Any]] = {
    "times a number": lambda x: x * 0.3,
    "times one": lambda x: x * 1.0,
    "a number times": lambda x: 3 * x,
    "times a number for each expert": lambda x: x * torch.tensor([0.5, 2, 0]).view(K, 1, 1),
    "a number for each feature times": lambda x: OTHER[:, :1] * x,
    "times a number for each feature of all": lambda x: x * OTHER[:1, :1],
    "times a stack": lambda x: x * OTHER,
    "divided by a stack": lambda x: x / OTHER,
    "divided by a number": lambda x: x / 3,
    "plus a matrix": lambda x: x + OTHER[0],
    "minus a stack": lambda x: x - OTHER,
    "plus what it was": lambda x: x + x.square(),
    "the first from all": lambda x: x[0] - x,
    "turned round": lambda x: torch.stack([x[2], x[1], x[0]]),
    "less of it, and more": lambda x: torch.cat([x[1:], x[:1]]),
    "squared": lambda x: x.square(),
    "without signs": lambda x: x.abs(),
    "negated": lambda x: -x,
    "one from it": lambda x: 1 - x,
    "where a mask": lambda x: x.where(MASK, 0),
    "where it is not zero": lambda x: x * (x != 0),
    "where it is one or the other": lambda x: x * ((x != 0) & MASK | ~MASK),
    "in double and back": lambda x: x.double().float(),
}


def same_bits(actual: Any, expected: torch.Tensor) -> bool:
    """Whether a value, made now at the latest, has a tensor's form and bits."""
    values = actual.tensor() if isinstance(actual, Lazy) else actual
    return values.shape == expected.shape and torch.equal(
        values.view(torch.int32), expected.contiguous().view(torch.int32)
    )


def stored() -> torch.Tensor:
    """Base and experts, in memory of their own."""
    return torch.cat([torch.zeros(1, R, C), DELTAS])


def refuse() -> None:
    raise ValueError("not finite")


def deltas_of(values: torch.Tensor) -> Any:
    """The task vectors of what is stored, as an expression."""
    return kernels.for_stored(values).difference(values, refuse)[1]


@given(st.lists(st.sampled_from(sorted(OPERATIONS)), max_size=6))
def test_an_expression_has_the_bits_that_torch_has_step_by_step(names: list[str]) -> None:
    lazy, eager = deltas_of(stored()), DELTAS
    for name in names:
        lazy, eager = OPERATIONS[name](lazy), OPERATIONS[name](eager)
    assert same_bits(lazy, eager)


@given(st.lists(st.sampled_from(sorted(OPERATIONS)), min_size=2, max_size=5), st.integers(0, 4))
def test_looking_at_what_is_between_changes_nothing(names: list[str], when: int) -> None:
    lazy, eager = deltas_of(stored()), DELTAS
    for i, name in enumerate(names):
        if i == when and isinstance(lazy, Lazy):
            lazy.tensor()
        lazy, eager = OPERATIONS[name](lazy), OPERATIONS[name](eager)
    assert same_bits(lazy, eager)


def test_what_nobody_looks_at_is_not_computed() -> None:
    values = stored()
    values[2] = torch.nan
    deltas = deltas_of(values)
    assert torch.equal(deltas[0].tensor(), DELTAS[0])
    with pytest.raises(ValueError, match="not finite"):
        (deltas[0] + deltas[1]).tensor()


def test_a_slice_that_was_worked_on_goes_when_nobody_holds_it() -> None:
    values = stored()
    reference = weakref.ref(values)
    gc.disable()  # nothing may need the collector of cycles
    try:
        deltas = deltas_of(values)
        loops = kernels.of(deltas)
        loops.mean_of_agreeing(loops.keep(deltas, deltas != 0), deltas[0], torch.ones(K)).tensor()
        del deltas, loops, values
        assert reference() is None
    finally:
        gc.enable()


def test_who_brings_tensors_gets_tensors() -> None:
    loops = kernels.of(DELTAS)
    assert isinstance(loops.weighted_sum(DELTAS, torch.ones(K)), torch.Tensor)
    assert isinstance(loops.keep(DELTAS, MASK), torch.Tensor)
    assert isinstance(kernels.for_draws(DELTAS).uniforms(bytes(16), 0, (R, C), double=False), torch.Tensor)


def test_thousands_of_experts_are_added_as_torch_adds_them() -> None:
    deltas = DELTAS[:1, :1].expand(3000, 1, C).contiguous()
    weights = torch.linspace(-1, 1, 3000)
    lazy = kernels.Native().weighted_sum(Lazy.of(deltas), weights)
    assert same_bits(lazy, kernels.Reference().weighted_sum(deltas, weights))


IN_PLACE = sorted(
    name
    for name in dir(torch.Tensor)
    if name.endswith("_") and not name.endswith("__") and callable(getattr(torch.Tensor, name))
)
OPERATORS = sorted(name for name in dir(operator) if name.startswith("__i") and hasattr(torch.Tensor, name))


@pytest.mark.parametrize("name", [*IN_PLACE, *sorted(set(OPERATORS) - {"__index__", "__invert__"})])
def test_no_method_changes_an_expression_in_place(name: str) -> None:
    with pytest.raises(InPlaceError, match=f"{name} would change an array that other expressions may read"):
        getattr(deltas_of(stored()), name)


def test_no_function_of_torch_changes_an_expression_in_place() -> None:
    deltas = deltas_of(stored())
    with pytest.raises(InPlaceError, match="assign the result to a new name"):
        torch.add(DELTAS, DELTAS, out=deltas)
    with pytest.raises(InPlaceError, match="assign the result to a new name"):
        torch.relu_(deltas)
    with pytest.raises(InPlaceError, match="assign the result to a new name"):
        deltas[0] = 1


@pytest.mark.parametrize("view", [lambda x: x.flatten(), lambda x: x.transpose(1, 2), lambda x: x[:, 0]])
def test_a_change_through_a_view_is_refused_where_an_expression_reads_it(view: Callable[[Any], Any]) -> None:
    deltas = deltas_of(stored())
    scores = deltas.abs()
    view(deltas).mul_(10)
    with pytest.raises(InPlaceError, match="an array that an expression reads was changed in place"):
        scores.tensor()


def test_a_change_of_what_was_read_from_the_file_is_refused() -> None:
    values = stored()
    deltas = deltas_of(values)
    values[1].mul_(10)
    with pytest.raises(InPlaceError, match="an array that an expression reads was changed in place"):
        deltas.tensor()


def test_augmented_assignment_makes_a_new_array() -> None:
    deltas = deltas_of(stored())
    scores = deltas.abs()
    deltas *= 10
    assert same_bits(scores, DELTAS.abs())
    assert same_bits(deltas, DELTAS * 10)


def test_an_expression_may_be_added_to_a_tensor_in_place() -> None:
    total = torch.zeros(K, R, C)
    total += deltas_of(stored())
    assert torch.equal(total, DELTAS)
