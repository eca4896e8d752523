"""Selection against a plain stable sort, and draws against themselves."""

import math
import shutil
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import bits, sliced, tensor

from merger.ops import kernels
from merger.ops.arithmetic import count, summed, uniforms
from merger.ops.questions import Max
from merger.ops.radix import ordered
from merger.ops.selection import exclusive, ranks_of_rows, select, top_of_blocks, top_of_rows

DENSITIES = [Fraction(text) for text in ("0", "1/8", "0.29", "1/3", "1/2", "0.9", "1")]
NEAR_ONE = 1 + 2**-23  # differs from 1 in the last bit alone
SCORES = [0.0, 1e-45, 0.25, 1.0, NEAR_ONE, 3e38]


# --- counts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("share", "of", "expected"),
    [("0.29", 100, 29), ("1/3", 3, 1), ("1/3", 10, 3), ("0.7", 10, 7), ("0", 5, 0), ("1", 5, 5), ("0.9", 1, 0)],
)
def test_a_share_is_rounded_down_exactly(share, of, expected):
    assert count(Fraction(share), of) == expected


# --- selection ------------------------------------------------------------------------------------


def brute(scores, density, scope="tensor", order=None, eligible=None, ratio_of="total"):
    """`select` by sorting: the positions of each unit by falling score, the earlier first among equals."""
    positions = [
        (i, r, c) for i, score in enumerate(scores) for r in range(score.shape[1]) for c in range(score.shape[2])
    ]
    unit_of = {"global": lambda p: 0, "tensor": lambda p: p[0], "row": lambda p: p[:2]}[scope]
    units = [[p for p in positions if unit_of(p) == unit] for unit in sorted({unit_of(p) for p in positions})]
    masks = [torch.zeros_like(score, dtype=torch.bool) for score in scores]
    claims = set()
    for k in order if order is not None else range(len(density)):
        for unit in units:
            free = [p for p in unit if eligible is None or eligible[p[0]][k, p[1], p[2]]]
            free = [p for p in free if order is None or p not in claims]
            share = density[k] * len(free if ratio_of == "remaining" else unit)
            count = math.floor(share)
            for i, r, c in sorted(free, key=lambda p: -scores[p[0]][k, p[1], p[2]].item())[:count]:
                masks[i][k, r, c] = True
                claims.add((i, r, c))
    return masks


@st.composite
def selections(draw):
    """One or two score tensors and how to select from them."""
    k = draw(st.integers(1, 4))
    shapes = draw(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 6)), min_size=1, max_size=2))
    score_values = draw(st.lists(st.sampled_from(SCORES), min_size=1, max_size=4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))

    def drawn(values):
        return [tensor(values)[torch.randint(len(values), (k, *shape), generator=generator)] for shape in shapes]

    options = {
        "scope": draw(st.sampled_from(["tensor", "row", "global"])),
        "order": draw(st.none() | st.permutations(range(k))),
        "ratio_of": draw(st.sampled_from(["total", "remaining"])),
    }
    density = draw(st.lists(st.sampled_from(DENSITIES), min_size=k, max_size=k))
    eligible = [sample > 0 for sample in drawn([0.0, 1.0, 1.0])] if draw(st.booleans()) else None
    return drawn(score_values), density, eligible, options


@settings(max_examples=60)
@given(selections(), st.integers(1, 5))
def test_selection_is_that_of_a_stable_sort(selection, rows):
    scores, density, eligible, options = selection

    def begin(i, part):
        allowed = None if eligible is None else eligible[i][:, part]
        return select(scores[i][:, part], density, eligible=allowed, **options)

    result = sliced(begin, scores, rows)
    expected = brute(scores, density, eligible=eligible, **options)
    assert [mask.tolist() for mask in result] == [mask.tolist() for mask in expected]


def selected(scores, *density, rows=1, **options):
    """The flat mask of the first expert's selection, and the others'."""
    scores = tensor(scores)
    scores = scores if scores.dim() == 3 else scores[:, None]
    shares = [Fraction(share) for share in density]
    (masks,) = sliced(lambda i, part: select(scores[:, part], shares, **options), [scores], rows)
    return masks.flatten(1).int().tolist()


def test_equal_scores_go_to_the_lower_index():
    assert selected([[1, 2, 1, 2, 2]], "2/5") == [[0, 1, 0, 1, 0]]


def test_scores_that_differ_in_the_last_bit_are_not_equal():
    assert selected([[1, NEAR_ONE, 1]], "1/3") == [[0, 1, 0]]


def test_scores_are_compared_as_float32():
    scores = torch.tensor([[[1.0, 1 + 1e-12]]], dtype=torch.float64)
    (masks,) = sliced(lambda i, part: select(scores[:, part], [Fraction(1, 2)]), [scores])
    assert masks.flatten().tolist() == [True, False]


def test_zeros_are_selected_when_the_count_asks_for_them():
    assert selected([[0, 0, 3, 0]], "1/2") == [[1, 0, 1, 0]]


def test_ties_are_handed_out_in_order_across_slices():
    assert selected([[[1, 1], [1, 1], [1, 1]]], "1/2") == [[1, 1, 1, 0, 0, 0]]


def test_experts_choose_from_what_earlier_ones_left():
    assert selected([[3, 2, 1], [3, 2, 1]], "1/3", "1/3", order=[1, 0]) == [[0, 1, 0], [1, 0, 0]]


def test_without_an_order_masks_may_overlap():
    assert selected([[3, 2, 1], [3, 2, 1]], "1/3", "1/3") == [[1, 0, 0], [1, 0, 0]]


def test_a_share_of_what_remains_shrinks():
    masks = selected([[4, 3, 2, 1]] * 2, "1/2", "1/2", order=[0, 1], ratio_of="remaining")
    assert masks == [[1, 1, 0, 0], [0, 0, 1, 0]]


def test_all_of_the_eligible_are_taken_when_there_are_fewer_than_wanted():
    masks = selected([[4, 3, 2, 1]] * 2, "3/4", "3/4", order=[0, 1])
    assert masks == [[1, 1, 1, 0], [0, 0, 0, 1]]


def test_rows_are_ranked_apart():
    assert selected([[[1, 2], [9, 8]]], "1/2", scope="row") == [[0, 1, 1, 0]]


def test_tensors_are_ranked_together_at_global_scope():
    scores = [tensor([[[1, 2]]]), tensor([[[9, 2]]])]
    flow = lambda i, part: select(scores[i][:, part], [Fraction(1, 2)], scope="global")  # noqa: E731
    assert [mask.flatten().tolist() for mask in sliced(flow, scores)] == [[False, True], [True, False]]


@pytest.mark.parametrize("n", [0, 1, 7, 5000, 10000])
def test_a_large_selection_keeps_exactly_what_was_asked(n):
    scores = torch.randint(50, (1, 100, 100), generator=torch.Generator().manual_seed(0)).float()
    (mask,) = sliced(lambda i, part: select(scores[:, part], [Fraction(n, 10000)]), [scores], 9)
    order = torch.sort(scores.flatten(), descending=True, stable=True).indices
    assert mask.flatten().nonzero().flatten().tolist() == sorted(order[:n].tolist())


# --- rows and blocks ------------------------------------------------------------------------------


@st.composite
def rows_of_scores(draw):
    """Scores [k r c] with many ties, and which positions are free."""
    shape = draw(st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 9)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    scores = tensor(SCORES)[torch.randint(draw(st.integers(1, 6)), shape, generator=generator)]
    return scores, torch.rand(shape, generator=generator) < draw(st.sampled_from([0.0, 0.5, 1.0]))


def best(scores, free, count):
    """The mask of the ``target`` highest free scores of one list, the first ones among equals."""
    ranked = sorted((i for i, open_ in enumerate(free) if open_), key=lambda i: -scores[i])
    return [i in ranked[:count] for i in range(len(scores))]


@settings(max_examples=40)
@given(rows_of_scores(), st.integers(0, 10))
def test_the_top_of_each_row(drawn, wanted):
    scores, free = drawn
    masks = top_of_rows(scores, torch.full(scores.shape[:2], wanted), free)
    for row, open_, mask in zip(scores.flatten(0, 1), free.flatten(0, 1), masks.flatten(0, 1), strict=True):
        assert mask.tolist() == best(row.tolist(), open_.tolist(), wanted)


def test_every_row_may_want_another_number():
    scores = tensor([[[1, 2, 3], [1, 2, 3], [1, 2, 3]]])
    masks = top_of_rows(scores, torch.tensor([[0, 1, 5]]), torch.ones(1, 3, 3, dtype=torch.bool))
    assert masks.int().tolist() == [[[0, 0, 0], [0, 0, 1], [1, 1, 1]]]


@settings(max_examples=40)
@given(rows_of_scores(), st.integers(1, 7), st.data())
def test_the_top_of_each_block_of_the_flat_slice(drawn, m, data):
    scores, free = drawn
    n, tail = data.draw(st.integers(0, m)), data.draw(st.integers(0, m))
    masks = top_of_blocks(scores, n, m, free, tail)
    for flat, open_, mask in zip(scores.flatten(1), free.flatten(1), masks.flatten(1), strict=True):
        expected = []
        for start in range(0, len(flat), m):
            block = flat[start : start + m].tolist()
            expected += best(block, open_[start : start + m].tolist(), n if len(block) == m else tail)
        assert mask.tolist() == expected


@settings(max_examples=40)
@given(rows_of_scores())
def test_ranks_count_from_the_highest_and_break_ties_by_column(drawn):
    scores, _ = drawn
    for row, ranks in zip(scores.flatten(0, 1), ranks_of_rows(scores).flatten(0, 1), strict=True):
        order = sorted(range(len(row)), key=lambda i: -row[i].item())
        assert [order.index(i) for i in range(len(row))] == ranks.tolist()


def test_a_shared_position_is_left_to_the_first_expert_in_the_order():
    masks = torch.tensor([[[1, 1, 0]], [[1, 0, 1]]]).bool()
    assert exclusive(masks, [1, 0]).int().tolist() == [[[0, 1, 0]], [[1, 0, 1]]]


def test_the_masks_that_were_given_stay_as_they_were():
    masks = torch.ones(2, 1, 2, dtype=torch.bool)
    exclusive(masks, [0, 1])
    assert masks.all()


# --- sums and draws -------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 2, 5, 8, 11])
@pytest.mark.parametrize("cut", [(1, 1), (1, 3), (3, 5), (2, 64)])
def test_a_sum_over_experts_does_not_depend_on_the_slice(k, cut):
    terms = torch.randn(k, 64, 64, generator=torch.Generator().manual_seed(0))
    rows, columns = cut
    part = summed(terms[:, :rows, :columns].contiguous())
    assert torch.equal(bits(part), bits(summed(terms)[:rows, :columns]))


@given(st.integers(0, 100), st.integers(0, 50), st.booleans())
def test_draws_do_not_depend_on_where_a_slice_starts(start, size, double):
    key = (0, "dare", "w", "a")
    stream = uniforms(key, 0, start + size, double=double)
    assert torch.equal(uniforms(key, start, size, double=double), stream[start:])


@pytest.mark.parametrize("key", [(1, "dare", "w", "a"), (0, "della", "w", "a"), (0, "dare", "v", "a")])
def test_every_name_in_the_key_gives_another_stream(key):
    assert not torch.equal(uniforms((0, "dare", "w", "a"), 0, 8), uniforms(key, 0, 8))


def test_names_do_not_run_into_each_other():
    assert not torch.equal(uniforms((0, "dare", "w", "ab"), 0, 8), uniforms((0, "dare", "wa", "b"), 0, 8))


@pytest.mark.parametrize(("double", "dtype"), [(False, torch.float32), (True, torch.float64)])
def test_draws_lie_in_the_unit_interval(double, dtype):
    draws = uniforms((0, "dare", "w", "a"), 0, 10000, double=double)
    assert draws.dtype == dtype
    assert 0 <= draws.min() < draws.mean() < draws.max() < 1


# --- places in the ascending order, and the largest of all -----------------------------------------


@given(st.integers(0, 1000), st.sampled_from(["tensor", "global"]), st.booleans())
def test_the_values_at_places_of_the_order_are_those_of_a_sort(seed, scope, coarse):
    generator = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(2, rows, 5, generator=generator) for rows in (3, 4)]
    tensors = [matrix.round() if coarse else matrix for matrix in tensors]
    size = 15 if scope == "tensor" else 35
    places = [[0, size // 2, size - 1], [1, size - 2, size // 3]]

    def begin(i, part):
        values = yield from ordered(tensors[i][:, part], places, scope)
        return values.view(3, 2)

    scope_tensors = tensors[:1] if scope == "tensor" else tensors
    ranked = torch.cat([matrix.flatten(1) for matrix in scope_tensors], 1).sort(-1).values
    result = sliced(begin, scope_tensors)[0][:3]
    assert torch.equal(result, torch.stack([ranked[k, places[k]] for k in (0, 1)], 1))


@pytest.mark.parametrize(("scope", "expected"), [("tensor", [[5, -1], [7, 9]]), ("global", [[7, 9], [7, 9]])])
def test_the_largest_of_all_slices_is_asked_for_element_by_element(scope, expected):
    tensors = [tensor([[[5, -2], [-4, -1]]]), tensor([[[7, 0], [1, 9]]])]

    def begin(i, part):
        highest = yield Max(tensors[i][0, part].amax(0), scope)
        return highest.view(1, 2)

    assert [value[0].tolist() for value in sliced(begin, tensors)] == expected


def test_the_loops_are_compiled_where_there_is_a_compiler():
    assert kernels.compiled() or shutil.which("cc") is None
