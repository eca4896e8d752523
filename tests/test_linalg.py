"""Singular values and vectors, against LAPACK's own SVD in float64."""

import pytest
import torch

from merger.ops.linalg import SKETCH, Factors, decorrelated, gram, isotropic, low_rank, strongest, svd, tolerance

SHAPES = [(1, 1), (1, 7), (7, 1), (6, 9), (9, 6), (8, 8), (300, 40), (40, 300), (260, 260)]


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def of_rank(rank, m, n):
    return randn(m, rank, seed=1) @ randn(rank, n, seed=2)


def decaying(m, n):
    """A matrix whose singular values fall from 1 to 1e-6."""
    left_vectors, _ = torch.linalg.qr(randn(m, min(m, n), seed=3))
    right_vectors, _ = torch.linalg.qr(randn(n, min(m, n), seed=4))
    return left_vectors * torch.logspace(0, -6, min(m, n), dtype=torch.float64) @ right_vectors.T


def assert_close(result, expected, tolerance):
    torch.testing.assert_close(result, expected, rtol=0, atol=tolerance * float(expected.abs().max()))


@pytest.mark.parametrize("shape", SHAPES)
def test_the_factors_multiply_to_the_matrix_and_are_orthonormal(shape):
    matrix = randn(*shape)
    left_vectors, values, right_vectors = factors = svd(matrix)
    assert_close(factors.product(), matrix, 1e-9)
    eye = torch.eye(min(shape), dtype=torch.float64)
    assert_close(left_vectors.T @ left_vectors, eye, 1e-7)
    assert_close(right_vectors.T @ right_vectors, eye, 1e-7)
    assert values.diff().le(0).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_the_singular_values_are_those_of_lapack(shape):
    matrix = randn(*shape)
    torch.testing.assert_close(svd(matrix).values, torch.linalg.svdvals(matrix), rtol=1e-8, atol=0)


@pytest.mark.parametrize("shape", [(256, 64), (64, 256), (400, 300), (60, 60)])
def test_small_singular_values_are_right_as_far_as_the_tolerance(shape):
    matrix = decaying(*shape)
    expected = torch.linalg.svdvals(matrix)
    expected = expected[expected > tolerance(matrix) * expected[0]]
    torch.testing.assert_close(svd(matrix).values, expected, rtol=2e-7, atol=0)


@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (300, 40), (40, 300)])
@pytest.mark.parametrize("rank", [1, 3])
def test_directions_that_a_matrix_does_not_have_are_left_out(shape, rank):
    matrix = of_rank(rank, *shape)
    left_vectors, values, right_vectors = factors = svd(matrix.float())
    assert (left_vectors.shape[1], len(values), right_vectors.shape[1]) == (rank, rank, rank)
    assert_close(factors.product(), matrix, 1e-6)


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (300, 2)])
def test_a_zero_matrix_has_no_directions(shape):
    factors = svd(torch.zeros(shape))
    assert len(factors.values) == 0
    assert torch.equal(factors.product(), torch.zeros(shape, dtype=torch.float64))


def test_the_largest_entry_of_a_left_vector_is_positive():
    for shape in ((6, 9), (300, 40), (40, 300)):
        left_vectors = svd(-randn(*shape)).left
        assert (left_vectors.gather(0, left_vectors.abs().argmax(0, keepdim=True)) > 0).all()


def test_directions_no_larger_than_rounding_are_left_out():
    assert svd(torch.diag(torch.tensor([4.0, 2.0, 1e-3])), rounding=1e-2).values.tolist() == [4, 2]


def polar(columns):
    left_vectors, _, right_vectors = torch.linalg.svd(columns, full_matrices=False)
    return left_vectors @ right_vectors


@pytest.mark.parametrize(("rows", "columns", "rank"), [(6, 5, 4), (300, 400, 40), (40, 300, 40)])
def test_decorrelated_directions_are_the_nearest_orthonormal_ones(rows, columns, rank):
    left_vectors, right_vectors = randn(rows, rank), randn(columns, rank, seed=1)
    values = torch.linspace(2, 1, rank).double()
    assert_close(
        decorrelated(Factors(left_vectors, values, right_vectors)),
        polar(left_vectors) * values @ polar(right_vectors).T,
        1e-8,
    )


def test_a_repeated_direction_is_there_once():
    twice = Factors(torch.tensor([[1.0, 1], [0, 0], [0, 0]]), torch.tensor([3.0, 5]), torch.tensor([[1.0, 1], [0, 0]]))
    assert_close(
        decorrelated(Factors(*(factor.double() for factor in twice))),
        torch.diag(torch.tensor([4.0, 0])).double()[[0, 1, 1]],
        1e-12,
    )


def test_no_directions_make_nothing():
    nothing = Factors(torch.zeros(5, 0), torch.zeros(0), torch.zeros(3, 0))
    assert torch.equal(decorrelated(nothing), torch.zeros(5, 3))


@pytest.mark.parametrize("shape", [(9, 6), (40, 300)])
def test_what_low_rank_leaves_out_are_the_smallest_singular_values(shape):
    matrix = randn(*shape)
    error = (matrix - low_rank(matrix, 3)).square().sum()
    torch.testing.assert_close(error, torch.linalg.svdvals(matrix)[3:].square().sum())


def test_a_matrix_of_low_rank_is_its_own_low_rank():
    matrix = of_rank(2, 9, 6).float()
    assert torch.equal(low_rank(matrix, 2), matrix.double())


@pytest.mark.parametrize("height", [1, 5, 64, 65, 300])
def test_a_gram_matrix_has_the_products_of_all_rows(height):
    rows = randn(height, 7)
    torch.testing.assert_close(gram(rows), rows @ rows.T)


# --- matrices of low rank, which a sketch tells ------------------------------------------------------

LOW = [(400, 300), (300, 400), (260, 260)]


@pytest.mark.parametrize("shape", LOW)
@pytest.mark.parametrize("rank", [1, 16, SKETCH - 1, SKETCH, SKETCH + 1, 200])
def test_the_factors_of_a_product_are_those_of_lapack(shape, rank):
    matrix = of_rank(rank, *shape).float()
    factors = svd(matrix)
    torch.testing.assert_close(factors.values, torch.linalg.svdvals(matrix.double())[:rank], rtol=1e-7, atol=0)
    assert_close(factors.product(), matrix.double(), 1e-6)


@pytest.mark.parametrize("shape", LOW)
@pytest.mark.parametrize("floor", [1e-3, 2e-4])
def test_a_tail_that_exists_is_not_taken_for_rounding(shape, floor):
    """A sketch of the strong directions alone would leave it out."""
    strong, tail = of_rank(8, *shape), randn(*shape, seed=5)
    matrix = strong / strong.norm() + floor * tail / torch.linalg.matrix_norm(tail, 2)
    values = torch.linalg.svdvals(matrix)
    assert len(svd(matrix).values) == int((values > tolerance(matrix) * values[0]).sum()) > 200


@pytest.mark.parametrize("shape", [*LOW, (20, 30)])
@pytest.mark.parametrize("rank", [5, 20])
def test_isotropic_is_the_polar_factor_times_the_mean_singular_value(shape, rank):
    matrix = of_rank(rank, *shape).float()
    left_vectors, values, right_vectors = torch.linalg.svd(matrix.double(), full_matrices=False)
    left_vectors, values, right_vectors = left_vectors[:, :rank], values[:rank], right_vectors[:rank].T
    assert_close(isotropic(matrix), left_vectors @ right_vectors.T * values.mean(), 1e-6)


def test_the_same_matrix_has_the_same_factors_bit_for_bit():
    for matrix in (of_rank(16, 400, 300), randn(400, 300)):
        assert torch.equal(svd(matrix).left, svd(matrix.clone()).left)
        assert torch.equal(strongest(matrix, 4).left, strongest(matrix.clone(), 4).left)


# --- a few directions of many ------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(400, 300), (300, 400), (30, 20)])
@pytest.mark.parametrize("rank", [1, 8, 40, 200])
@pytest.mark.parametrize("make", [randn, decaying], ids=["flat", "decaying"])
def test_the_strongest_directions_leave_hardly_more_than_the_least_possible(shape, rank, make):
    matrix = make(*shape)
    factors = strongest(matrix, rank)
    remainder = (matrix - factors.product()).norm()
    minimum = torch.linalg.svdvals(matrix)[rank:].norm()
    assert remainder <= 1.001 * minimum + tolerance(matrix) * matrix.norm()


def test_the_strongest_directions_of_nothing_are_none():
    assert strongest(torch.zeros(300, 400), 4).values.tolist() == []
