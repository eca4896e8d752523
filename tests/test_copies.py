"""A position that ends at an input's value has that input's bits, whatever the values."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from merger.ops.rounding import restored

SIXTEEN = [torch.bfloat16, torch.float16]


def finite(bits, dtype, output):
    """Values of these bit patterns, without NaN and infinity, nor any whose differences the output cannot hold."""
    values = bits.to(torch.int16).view(dtype)
    return torch.where(values.float().abs() <= torch.finfo(output).max / 4, values, torch.zeros((), dtype=dtype))


def drawn(seed, dtype, output, experts=3, count=4096):
    """Base and experts of any bit patterns at all; experts near the base, near zero, and -0 among them."""
    generator = torch.Generator().manual_seed(seed)
    bits = torch.randint(-(1 << 15), 1 << 15, (1 + experts, 1, count), generator=generator)
    neighbours = bits[0] + torch.randint(-300, 300, (experts, 1, count), generator=generator)
    small = torch.randint(0, 2, (experts, 1, count), generator=generator) << 15
    kind = torch.randint(0, 4, (experts, 1, count), generator=generator)
    bits[1:] = torch.where(kind == 0, neighbours.clamp(-(1 << 15), (1 << 15) - 1), bits[1:])
    bits[1:] = torch.where(kind == 1, small, bits[1:])
    return finite(bits, dtype, output), generator


def by_definition(stored, base, deltas, delta, dtype):
    """The rule at every position, one at a time."""
    merged = (base + delta).to(dtype)
    for expert, expert_delta in zip(stored[1:], deltas, strict=True):
        merged = torch.where(delta == expert_delta, expert.to(dtype), merged)
    return torch.where(delta == 0, stored[0].to(dtype), merged)


@pytest.mark.parametrize("dtype", SIXTEEN, ids=str)
@pytest.mark.parametrize("output", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@given(seed=st.integers(0, 1 << 32))
def test_copies_have_the_bits_of_what_they_are_copies_of(dtype, output, seed):
    stored, generator = drawn(seed, dtype, output)
    values = stored.float()
    base, deltas = values[0], values[1:] - values[0]
    choice = torch.randint(0, 5, base.shape, generator=generator)  # an expert's, none, or a mean of two
    options = torch.stack([*deltas, torch.zeros_like(base), (deltas[0] + deltas[1]) / 2])
    delta = options.gather(0, choice.unsqueeze(0))[0]
    expected = by_definition(stored, base, deltas, delta, output)
    restored_values = restored(stored, base, deltas, delta, output)
    bits = {2: torch.int16, 4: torch.int32}[expected.element_size()]
    assert torch.equal(restored_values.view(bits), expected.view(bits))


@pytest.mark.parametrize("dtype", [*SIXTEEN, torch.float32], ids=str)
def test_what_the_output_cannot_hold_is_an_overflow(dtype):
    stored = torch.full((2, 1, 3), torch.finfo(dtype).max / 2, dtype=dtype)
    stored[1] = 0
    base, delta = stored[0].float(), stored[0].float() * 3
    with pytest.raises(OverflowError, match="overflow torch"):
        restored(stored, base, stored[1:].float() - base, delta, dtype)


def test_a_value_too_small_for_the_sum_comes_back():
    stored = torch.tensor([[[1.0]], [[1e-9]]], dtype=torch.bfloat16)
    base = stored[0].float()
    deltas = stored[1:].float() - base
    assert (base + deltas[0]).item() == 0
    assert torch.equal(restored(stored, base, deltas, deltas[0], torch.bfloat16), stored[1])


@pytest.mark.parametrize("values", [(-0.0, 1.0), (0.0, -0.0), (2.0, -0.0)])
def test_minus_zero_keeps_its_sign(values):
    stored = torch.tensor(values, dtype=torch.float16).view(2, 1, 1)
    base = stored[0].float()
    deltas = stored[1:].float() - base
    for delta, expected in ((deltas[0], stored[1]), (torch.zeros(1, 1), stored[0])):
        expected = stored[0] if delta == 0 else expected
        restored_values = restored(stored, base, deltas, delta, torch.float16)
        assert torch.equal(restored_values.view(torch.int16), expected.view(torch.int16))
