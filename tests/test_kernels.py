"""The compiled loops give the bits of their twins in torch."""

from __future__ import annotations

import numpy
import pytest
import torch
from checkpoints import llama, save
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from merger.engine.merge import merge
from merger.ops import kernels
from merger.ops.kernels import Native, Reference
from merger.ops.kernels.lazy import plain
from merger.options import RunOptions
from merger.recipe.recipe import Recipe

pytestmark = pytest.mark.skipif(not kernels.compiled(), reason="the compiled loops were not built here")

native, reference = Native(), Reference()
FEW = st.sampled_from([0.0, 0.5, -0.5, 1.0, -1.0, 2.0, 1e-30, -3e38])  # many equal ones, and both ends
ANY = st.floats(width=32, allow_nan=False, allow_infinity=False)


@st.composite
def stacks(draw: st.DrawFn) -> torch.Tensor:
    """Of up to four experts, and of few elements, or as many as take several pieces and a rest. [k r c]"""
    shape = draw(st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 70)))
    values = torch.from_numpy(draw(arrays(numpy.float32, shape, elements=draw(st.sampled_from([FEW, ANY])))))
    return values.repeat(1, 1, draw(st.sampled_from([1, 1 + 2200 // shape[2]])))


def masks_of(scores: torch.Tensor, draw: st.DataObject) -> torch.Tensor | None:
    """Which positions are free: bool [k r c], or None for all of them."""
    if not draw.draw(st.booleans()):
        return None
    return torch.from_numpy(draw.draw(arrays(numpy.bool_, tuple(scores.shape))))


class NotFiniteError(Exception):
    """What a merge would tell of values that are not finite."""


def refuse() -> None:
    raise NotFiniteError


def finite(stored: torch.Tensor) -> bool:
    """Whether all changes to the base are finite."""
    return bool(torch.isfinite(stored[1:].float() - stored[0].float()).all())


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors have the same type and bits; -0 is not 0."""
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b) and torch.equal(a.signbit(), b.signbit())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@given(values=stacks())
def test_reading_gives_the_same_deltas(values: torch.Tensor, dtype: torch.dtype) -> None:
    stored = torch.cat([values, values.flip(-1)]).to(dtype)
    if not finite(stored):
        for loops in (native, reference):
            with pytest.raises(NotFiniteError):
                loops.difference(stored, refuse)[1].numpy()
        return
    base, deltas = native.difference(stored, refuse)
    expected_base, expected = reference.difference(stored, refuse)
    assert same_bits(base, expected_base)
    assert same_bits(deltas, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@given(values=stacks(), pick=st.integers(0, 5))
def test_writing_rounds_and_restores_the_same_bits(values: torch.Tensor, dtype: torch.dtype, pick: int) -> None:
    stored = torch.cat([values, values.flip(-1)]).to(dtype)
    if not finite(stored):
        return
    base, deltas = reference.difference(stored, refuse)
    delta = [*deltas, deltas.mean(0), torch.zeros_like(base)][pick % (len(deltas) + 2)]
    merged, is_whole = native.restored(stored, base, deltas, delta)
    expected, expected_whole = reference.restored(stored, base, deltas, delta)
    assert is_whole == (expected_whole and bool(torch.isfinite(delta).all()))
    assert not is_whole or same_bits(merged, expected)


@given(scores=stacks(), data=st.data())
def test_selection_counts_and_marks_the_same(scores: torch.Tensor, data: st.DataObject) -> None:
    free = masks_of(scores, data)
    keys, native_keys = reference.keys_of(scores), native.keys_of(scores)
    last = [data.draw(st.sampled_from(key.flatten().tolist())) & 0x7FFFFFFF for key in keys]
    room = [data.draw(st.integers(-1, 5)) for _ in keys]
    buckets = [level >> 16 for level in last]
    width = data.draw(st.integers(1, 100_000))
    first = [max(0, level - data.draw(st.integers(0, width))) for level in last]
    for bins, count, *arguments in (
        (kernels.HIGH, "tally_high"),
        (kernels.LOW, "tally_low", buckets),
        (1 + width, "tally_near", first),
    ):
        tally, twin = (torch.ones(len(keys), bins, dtype=torch.int64) for _ in range(2))
        getattr(native, count)(native_keys, free, *arguments, tally)
        getattr(reference, count)(keys, free, *arguments, twin)
        assert torch.equal(tally, twin)
    assert torch.equal(native.count_equal(native_keys, free, last), reference.count_equal(keys, free, last))
    assert same_bits(native.mark_top(native_keys, free, last, room), reference.mark_top(keys, free, last, room))


@given(scores=stacks(), data=st.data())
def test_rows_keep_and_rank_the_same(scores: torch.Tensor, data: st.DataObject) -> None:
    free = masks_of(scores, data)
    open_ = torch.ones_like(scores, dtype=torch.bool) if free is None else free
    counts = torch.from_numpy(data.draw(arrays(numpy.int64, tuple(scores.shape[:2]), elements=st.integers(0, 80))))
    assert same_bits(native.top_of_rows(scores, counts, open_), reference.top_of_rows(scores, counts, open_))
    assert same_bits(plain(native.ranks_of_rows(scores)), reference.ranks_of_rows(scores))


@given(scores=stacks(), data=st.data())
def test_blocks_keep_the_same(scores: torch.Tensor, data: st.DataObject) -> None:
    free = masks_of(scores, data)
    m = data.draw(st.sampled_from([1, 4, 64, 256, 1024, 3, 100]))
    n, tail = data.draw(st.integers(0, m + 1)), data.draw(st.integers(0, m))
    mask, twin = (loops.top_of_blocks(scores, n, m, free, tail) for loops in (native, reference))
    assert same_bits(plain(mask), twin)


@given(deltas=stacks(), data=st.data())
def test_sums_over_the_experts_are_the_same(deltas: torch.Tensor, data: st.DataObject) -> None:
    weights = torch.tensor(
        data.draw(st.lists(FEW.filter(lambda w: abs(w) < 10), min_size=len(deltas), max_size=len(deltas)))
    )
    elected = reference.weighted_sum(deltas, weights)
    assert same_bits(native.weighted_sum(deltas, weights), elected)
    assert same_bits(native.anchored_sum(deltas, weights), reference.anchored_sum(deltas, weights))
    mask_array = data.draw(arrays(numpy.bool_, tuple(deltas.shape)))
    assert same_bits(
        native.keep(deltas, torch.from_numpy(mask_array)), reference.keep(deltas, torch.from_numpy(mask_array))
    )
    if torch.isfinite(elected).all():
        mean, twin = (loops.mean_of_agreeing(deltas, elected, weights) for loops in (native, reference))
        assert torch.equal(mean.nan_to_num(), twin.nan_to_num())


@given(key=st.binary(min_size=16, max_size=16), start=st.integers(0, 1 << 40), size=st.integers(0, 40))
def test_draws_are_those_of_numpys_philox(key: bytes, start: int, size: int) -> None:
    shape = (2, size)
    for double in (False, True):
        drawn = native.uniforms(key, start, shape, double=double)
        assert same_bits(drawn, reference.uniforms(key, start, shape, double=double))


def test_a_merge_without_the_compiled_loops_says_that_it_is_slow(tmp_path, monkeypatch) -> None:
    for seed, name in enumerate(("base", "code")):
        save(tmp_path / name, llama(seed))
    recipe = Recipe.parse(
        {"base": "base", "experts": {"code": "code"}, "method": "sum", "output": {"path": "out"}}, tmp_path
    )
    monkeypatch.setattr(kernels, "compiled", lambda: False)
    message: list[str] = []
    merge(recipe, RunOptions(device="cpu", notice=message.append))
    assert [note for note in message if "compiled loops" in note]
