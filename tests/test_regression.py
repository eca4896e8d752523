"""What is particular to the methods that solve a least-squares problem (methods.md, section 10)."""

import pytest
import torch
from tiny import merge

from merger.methods._registry import checked
from merger.pipeline import Inputs


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def deltas_of(k, *shape, seed=0):
    return dict(zip("abcde", randn(k, *shape, seed=seed), strict=False))


def merged(method, deltas, written=None, **more):
    return merge(checked(method, written or {}), deltas, **more)


def moments(values):
    return Inputs(second_moment=torch.as_tensor(values, dtype=torch.float32))


def assert_close(got, expected, tolerance=1e-5):
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


# --- RegMean with diagonals alone -----------------------------------------------------------------


def test_regmean_diag_oracle():
    deltas, h = deltas_of(3, 4, 5), randn(3, 5, seed=1).square()
    weight = {"a": 1, "b": 0.5, "c": 2}
    got = merged("regmean_diag", deltas, {"weight": weight, "lambda": 0.7}, inputs=moments(h))
    expected = torch.zeros(4, 5)
    for j in range(5):
        shares = [w * float(h[k, j]) for k, w in enumerate(weight.values())]
        for k, delta in enumerate(deltas.values()):
            expected[:, j] += 0.7 * shares[k] / sum(shares) * delta[:, j]
    assert_close(got, expected)


def test_regmean_diag_minimizes_the_change_of_the_layers_outputs():
    deltas, h = deltas_of(3, 4, 5), randn(3, 5, seed=1).square()

    def loss(tau):
        return sum(((tau - delta).square() * h[k]).sum() for k, delta in enumerate(deltas.values()))

    best = merged("regmean_diag", deltas, inputs=moments(h))
    assert all(loss(best) < loss(best + 0.01 * randn(4, 5, seed=i)) for i in range(20))


def test_regmean_diag_of_equal_inputs_is_the_mean():
    deltas = deltas_of(3, 4, 5)
    assert_close(merged("regmean_diag", deltas, inputs=moments(torch.full((3, 5), 4.0))), merged("mean", deltas))


def test_regmean_diag_returns_equal_weights_bit_for_bit():
    base, own = randn(4, 5), randn(4, 5, seed=1)
    got = merged("regmean_diag", dict.fromkeys("abc", own - base), base=base, inputs=moments(randn(3, 5).square()))
    assert torch.equal(got, base + (own - base))


def test_an_input_that_only_one_expert_sees_is_that_experts():
    deltas = deltas_of(2, 3, 2)
    got = merged("regmean_diag", deltas, inputs=moments([[1, 0], [0, 1]]))
    assert_close(got, torch.stack([deltas["a"][:, 0], deltas["b"][:, 1]], 1))


def test_an_input_that_nobody_sees_gets_the_mean():
    deltas = deltas_of(2, 3, 2)
    got = merged("regmean_diag", deltas, {"weight": {"a": 3, "b": 1}}, inputs=moments([[0, 1], [0, 1]]))
    assert_close(got, 0.75 * deltas["a"] + 0.25 * deltas["b"])


def test_an_expert_that_no_token_reached_has_no_say():
    deltas = deltas_of(2, 3, 2)
    assert torch.equal(merged("regmean_diag", deltas, inputs=moments([[1, 2], [0, 0]])), deltas["a"])


def test_a_matrix_that_is_stored_by_its_inputs_is_weighed_by_them_too():
    deltas, known = deltas_of(2, 3, 5), moments(randn(2, 5, seed=1).square())
    stored = {expert: delta.T for expert, delta in deltas.items()}
    got = merged("regmean_diag", stored, inputs=known, kind="conv1d", slice_elements=6)
    assert torch.equal(got, merged("regmean_diag", deltas, inputs=known).T)


@pytest.mark.parametrize("kind", ["vector", "embedding"])
def test_tensors_without_inputs_get_the_mean_times_lambda(kind):
    deltas = deltas_of(3, 4, 5)
    got = merged("regmean_diag", deltas, {"lambda": 0.5}, kind=kind)
    assert_close(got, 0.5 * merged("mean", deltas))


def test_regmean_diag_refuses_a_negative_weight():
    with pytest.raises(ValueError, match="a weight is -1"):
        merged("regmean_diag", deltas_of(2, 3, 2), {"weight": {"a": 2, "b": -1}}, inputs=moments([[1, 1], [1, 1]]))
