"""The compiled loops of an inspection count what their twins in torch count."""

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from pretended import Pretence

from merger.ops import kernels
from merger.ops.kernels import counting
from merger.ops.kernels.counting import Counting, Counts, NativeCounting

pytestmark = pytest.mark.skipif(not kernels.compiled(), reason="the compiled loops were not built here")

native, twin = NativeCounting(), Counting()
FEW = st.sampled_from([0.0, -0.0, 0.5, -0.5, 1.0, -2.0, 1e-30, -1e-30])
ANY = st.floats(width=32, allow_nan=False, allow_infinity=False, min_value=-(2.0**60), max_value=2.0**60)


@st.composite
def stacks(draw: st.DrawFn) -> torch.Tensor:
    """Of up to four experts; some longer than a vector, with a rest. [k r c]"""
    shape = draw(st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 70)))
    return torch.from_numpy(draw(arrays(numpy.float32, shape, elements=draw(st.sampled_from([FEW, ANY])))))


def test_what_c_can_read_is_counted_in_c() -> None:
    assert isinstance(counting.of(torch.zeros(2, 1, 3)), NativeCounting)
    assert isinstance(counting.of(torch.zeros(3, dtype=torch.bfloat16)), NativeCounting)
    assert not isinstance(counting.of(torch.zeros(3, dtype=torch.float64)), NativeCounting)


def counted(loops: Counting, deltas: torch.Tensor, first: int) -> list[torch.Tensor]:
    """All that is counted of task vectors, twice for it is added up."""
    counts = Counts.zeros(len(deltas), deltas.shape[2])
    for _ in range(2):
        result = loops.vectors(deltas, first, 8, counts)
    return [*vars(counts).values(), *result]


@given(stacks(), st.integers(0, 7))
def test_task_vectors_have_the_same_counts_and_products_to_the_bit(deltas: torch.Tensor, first: int) -> None:
    assert all(map(torch.equal, counted(native, deltas, first), counted(twin, deltas, first)))


@given(stacks())
def test_a_merged_vector_has_the_same_counts_and_products_to_the_bit(deltas: torch.Tensor) -> None:
    (count, products), (same_count, same_products) = (loops.merged(deltas[0], deltas) for loops in (native, twin))
    assert count == same_count
    assert torch.equal(products, same_products)


@pytest.mark.parametrize("bits", [16, 32])
@given(deltas=stacks())
def test_the_same_values_are_found_once_each(deltas: torch.Tensor, bits: int) -> None:
    deltas = deltas.bfloat16().float() if bits == 16 else deltas
    for compiled, twin_values, values in zip(
        native.distinct_values(deltas), twin.distinct_values(deltas), deltas, strict=True
    ):
        assert sorted(compiled.tolist()) == sorted(twin_values.tolist())
        assert len(compiled) == len(set(values.flatten().tolist()) - {0.0})


def test_a_table_that_fills_up_is_made_larger() -> None:
    values = torch.arange(1, 100_001, dtype=torch.float32) / 3
    (result,) = native.distinct_values(values.repeat(3).unsqueeze(0))
    assert torch.equal(result.view(torch.float32).sort().values, values)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@given(values=stacks(), pick=st.integers(0, 3), based=st.booleans())
def test_positions_end_at_the_same_inputs(values: torch.Tensor, dtype: torch.dtype, pick: int, based: bool) -> None:
    experts = values.to(dtype)
    result = torch.where(values[0] > 0.2, experts[pick % len(experts)], experts.flip(-1)[0])
    base = experts[0].flip(0) if based else None
    assert torch.equal(native.endings(result, base, experts), twin.endings(result, base, experts))


def test_more_elements_than_one_look_takes_are_counted() -> None:
    generator = torch.Generator().manual_seed(0)
    deltas = torch.randint(-1, 2, (3, 9, 1000), generator=generator).float()
    assert all(map(torch.equal, counted(native, deltas, 3), counted(twin, deltas, 3)))
    assert torch.equal(native.endings(deltas[0], None, deltas), twin.endings(deltas[0], None, deltas))


def test_vectors_on_a_device_are_counted_there_and_only_counts_come_back() -> None:
    generator = torch.Generator().manual_seed(0)
    deltas = torch.randint(-2, 3, (3, 5, 40), generator=generator).float()
    expected = (
        counted(native, deltas, 3),
        native.endings(deltas[0], deltas[1], deltas),
        native.merged(deltas[0], deltas),
    )
    with Pretence():
        remote = deltas.to("cuda:0")
        loops = counting.of(remote)
        result = counted(loops, remote, 3), loops.endings(remote[0], remote[1], remote), loops.merged(remote[0], remote)
        assert all(
            str(values.device) == "cpu"
            for values in [*result[0], result[1], result[2][1], *loops.distinct_values(remote)]
        )
    assert all(map(torch.equal, result[0], expected[0]))
    assert torch.equal(result[1], expected[1])
    assert result[2][0] == expected[2][0]
    assert torch.equal(result[2][1], expected[2][1])
