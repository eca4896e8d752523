"""What is particular to the methods that solve a least-squares problem."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import Inputs, merge

from merger.pipeline.registry import checked


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def deltas_of(k, *shape, seed=0):
    return dict(zip("abcde", randn(k, *shape, seed=seed), strict=False))


def merged(method, deltas, parameters=None, **options):
    return merge(checked(method, parameters or {}), deltas, **options)


def moments(values):
    return Inputs(second_moment=torch.as_tensor(values, dtype=torch.float32))


def assert_close(result, expected, tolerance=1e-5):
    torch.testing.assert_close(result, expected, rtol=tolerance, atol=tolerance)


# --- RegMean with diagonals alone -----------------------------------------------------------------


def test_regmean_diag_oracle():
    deltas, h = deltas_of(3, 4, 5), randn(3, 5, seed=1).square()
    weight = {"a": 1, "b": 0.5, "c": 2}
    result = merged("regmean_diag", deltas, {"weight": weight, "lambda": 0.7}, inputs=moments(h))
    expected = torch.zeros(4, 5)
    for j in range(5):
        shares = [w * float(h[k, j]) for k, w in enumerate(weight.values())]
        for k, delta in enumerate(deltas.values()):
            expected[:, j] += 0.7 * shares[k] / sum(shares) * delta[:, j]
    assert_close(result, expected)


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
    base, weights = randn(4, 5), randn(4, 5, seed=1)
    result = merged(
        "regmean_diag", dict.fromkeys("abc", weights - base), base=base, inputs=moments(randn(3, 5).square())
    )
    assert torch.equal(result, base + (weights - base))


def test_an_input_that_only_one_expert_sees_is_that_experts():
    deltas = deltas_of(2, 3, 2)
    result = merged("regmean_diag", deltas, inputs=moments([[1, 0], [0, 1]]))
    assert_close(result, torch.stack([deltas["a"][:, 0], deltas["b"][:, 1]], 1))


def test_an_input_that_nobody_sees_gets_the_mean():
    deltas = deltas_of(2, 3, 2)
    result = merged("regmean_diag", deltas, {"weight": {"a": 3, "b": 1}}, inputs=moments([[0, 1], [0, 1]]))
    assert_close(result, 0.75 * deltas["a"] + 0.25 * deltas["b"])


def test_an_expert_that_no_token_reached_has_no_say():
    deltas = deltas_of(2, 3, 2)
    assert torch.equal(merged("regmean_diag", deltas, inputs=moments([[1, 2], [0, 0]])), deltas["a"])


def test_a_matrix_that_is_stored_by_its_inputs_is_weighed_by_them_too():
    deltas, inputs = deltas_of(2, 3, 5), moments(randn(2, 5, seed=1).square())
    stored = {expert: delta.T for expert, delta in deltas.items()}
    result = merged("regmean_diag", stored, inputs=inputs, kind="conv1d", slice_elements=6)
    assert torch.equal(result, merged("regmean_diag", deltas, inputs=inputs).T)


@pytest.mark.parametrize("kind", ["vector", "embedding"])
def test_tensors_without_inputs_get_the_mean_times_lambda(kind):
    deltas = deltas_of(3, 4, 5)
    result = merged("regmean_diag", deltas, {"lambda": 0.5}, kind=kind)
    assert_close(result, 0.5 * merged("mean", deltas))


@pytest.mark.parametrize("method", ["regmean_diag", "regmean"])
def test_a_negative_weight_of_squared_errors_is_refused(method):
    with pytest.raises(ValueError, match="a weight is -1"):
        merged(method, deltas_of(2, 3, 2), {"weight": {"a": 2, "b": -1}}, inputs=moments([[1, 1], [1, 1]]))


# --- RegMean ----------------------------------------------------------------------------------------


def grams_of(k, columns, tokens, seed=5):
    """What calibration knows of experts that so many random tokens reached: all moments, [k c c] among them."""
    x = randn(k, tokens, columns, seed=seed)
    return Inputs(x.square().mean(1), x.mean(1), x.mT @ x / tokens)


def turned_inputs(inputs, turn):
    """The same of tokens that were turned."""
    return Inputs(inputs.second_moment, inputs.mean, turn.T @ inputs.gram @ turn)


@pytest.mark.parametrize("alpha", [0, 0.3, 0.9, 1])
@pytest.mark.parametrize("shape", [(4, 6), (9, 6)])
def test_the_errors_of_regmeans_outputs_balance(shape, alpha):
    """The sum of (W - W_k) G_k is zero, which is where the squared error is least."""
    deltas, inputs = deltas_of(3, *shape), grams_of(3, shape[1], 50)
    best = merged("regmean", deltas, {"alpha": alpha}, inputs=inputs).double()
    grams = [alpha * g.double() + (1 - alpha) * g.double().diagonal().diag() for g in inputs.gram]
    errors = [(best - delta.double()) @ g for delta, g in zip(deltas.values(), grams, strict=True)]
    assert float(sum(errors).norm()) < 1e-5 * sum(float(error.norm()) for error in errors)


@pytest.mark.parametrize("k", [1, 3])
def test_regmean_of_equal_experts_is_the_expert_bit_for_bit(k):
    delta = randn(4, 6)
    assert torch.equal(merged("regmean", dict.fromkeys("abc"[:k], delta), inputs=grams_of(k, 6, 50)), delta)


def test_regmean_of_inputs_alike_in_all_directions_is_the_mean():
    eye = torch.eye(6).expand(3, 6, 6)
    inputs = Inputs(torch.ones(3, 6), torch.zeros(3, 6), eye)
    assert_close(merged("regmean", deltas_of(3, 4, 6), inputs=inputs), merged("mean", deltas_of(3, 4, 6)))


def test_regmean_without_correlations_is_regmean_diag():
    deltas, inputs = deltas_of(3, 4, 6), grams_of(3, 6, 50)
    result = merged("regmean", deltas, {"alpha": 0}, inputs=inputs)
    assert_close(result, merged("regmean_diag", deltas, inputs=inputs))


def test_regmean_of_fewer_tokens_than_inputs_still_has_an_answer():
    deltas, inputs = deltas_of(2, 4, 6), grams_of(2, 6, 2)
    result = merged("regmean", deltas, {"alpha": 1}, inputs=inputs)
    for delta, gram in zip(deltas.values(), inputs.gram, strict=True):  # each is answered as it was, where 4 < 6
        assert_close((result - delta) @ gram, torch.zeros(4, 6), 1e-4)


@given(seed=st.integers(0, 1000), k=st.sampled_from([2, 3]), shape=st.sampled_from([(4, 6), (9, 6), (6, 6)]))
def test_turning_outputs_turns_what_regmean_merges_and_so_does_turning_inputs(seed, k, shape):
    deltas, inputs = deltas_of(k, *shape, seed=seed), grams_of(k, shape[1], 50, seed=seed)
    left_vectors, right_vectors = (torch.linalg.qr(randn(n, n, seed=seed + 1))[0] for n in shape)
    turned = {expert: left_vectors @ delta @ right_vectors for expert, delta in deltas.items()}
    parameters = {"alpha": 1}
    result = merged("regmean", turned, parameters, inputs=turned_inputs(inputs, right_vectors))
    assert_close(result, left_vectors @ merged("regmean", deltas, parameters, inputs=inputs) @ right_vectors, 1e-4)


@given(seed=st.integers(0, 1000))
def test_regmean_does_not_care_for_the_order_of_experts(seed):
    deltas, inputs = deltas_of(3, 5, 6, seed=seed), grams_of(3, 6, 50, seed=seed)
    backwards = Inputs(inputs.second_moment.flip(0), inputs.mean.flip(0), inputs.gram.flip(0))
    result = merged("regmean", dict(reversed(deltas.items())), inputs=backwards)
    assert_close(result, merged("regmean", deltas, inputs=inputs))


# --- WUDI -----------------------------------------------------------------------------------------

NO_RIDGE = {"omega": 0}


def interference(tau, deltas, omega=0.0, ridge="relative"):
    loss = 0.0
    for delta in deltas.values():
        d, t = delta.double(), tau.double()
        ridge_term = omega * d.square().sum() / d.shape[1] if ridge == "relative" else omega
        loss += float((((t - d) @ d.T).square().sum() + ridge_term * (t - d).square().sum()) / d.square().sum())
    return loss


@pytest.mark.parametrize("ridge", ["relative", "absolute"])
@pytest.mark.parametrize("omega", [0, 0.1, 1])
@pytest.mark.parametrize("shape", [(4, 6), (9, 6)])
def test_no_other_task_vector_interferes_less_than_wudis(shape, omega, ridge):
    deltas = deltas_of(3, *shape)
    best = merged("wudi", deltas, {"omega": omega, "ridge": ridge})
    minimum = interference(best, deltas, omega, ridge)
    assert minimum < interference(sum(deltas.values()), deltas, omega, ridge)
    assert all(minimum < interference(best + 0.01 * randn(*shape, seed=i), deltas, omega, ridge) for i in range(20))


@pytest.mark.parametrize("ridge", ["relative", "absolute"])
def test_wudi_oracle(ridge):
    deltas, eye = {e: delta.double() for e, delta in deltas_of(3, 5, 7).items()}, torch.eye(7).double()
    over = under = 0
    for scale, delta in zip((1, 2, 5), deltas.values(), strict=True):
        delta *= scale
        squares = delta.square().sum()
        omega = 0.5 * squares / 7 if ridge == "relative" else 0.5
        importance = (delta.T @ delta + omega * eye) / squares
        over, under = over + delta @ importance, under + importance
    result = merged("wudi", deltas, {"omega": 0.5, "lambda": 0.7, "ridge": ridge})
    assert_close(result, (0.7 * over @ torch.linalg.inv(under)).float())


@pytest.mark.parametrize(("ridge", "value"), [("absolute", 12 / 7), ("relative", 2.0)])
def test_wudis_ridge_by_hand(ridge, value):
    # equation 20: (1 (1 + 1) / 1 + 3 (9 + 1) / 9) / ((1 + 1) / 1 + (9 + 1) / 9)
    deltas = {"a": torch.ones(1, 1), "b": torch.full((1, 1), 3.0)}
    assert_close(merged("wudi", deltas, {"omega": 1, "ridge": ridge}), torch.full((1, 1), value))


def test_a_large_absolute_ridge_makes_wudi_the_mean_by_inverse_squared_norm():
    deltas = {"a": randn(5, 7), "b": 3 * randn(5, 7, seed=1)}
    shares = {expert: 1 / delta.square().sum() for expert, delta in deltas.items()}
    mean = sum(shares[expert] * delta for expert, delta in deltas.items()) / sum(shares.values())
    assert_close(merged("wudi", deltas, {"omega": 1e9, "ridge": "absolute"}), mean)


def test_only_an_absolute_ridge_depends_on_the_unit_of_the_weights():
    deltas = deltas_of(3, 5, 7)
    smaller = {expert: 0.01 * delta for expert, delta in deltas.items()}
    assert_close(100 * merged("wudi", smaller, {"omega": 1}), merged("wudi", deltas, {"omega": 1}))
    rescaled = 100 * merged("wudi", smaller, {"omega": 1, "ridge": "absolute"})
    assert (rescaled - merged("wudi", deltas, {"omega": 1, "ridge": "absolute"})).abs().max() > 0.1


@pytest.mark.parametrize("parameters", [{}, NO_RIDGE, {"ridge": "absolute"}])
@pytest.mark.parametrize("k", [1, 3])
def test_wudi_of_identical_experts_is_the_expert_bit_for_bit(k, parameters):
    low_rank = randn(6, 2) @ randn(2, 9)
    assert torch.equal(merged("wudi", dict.fromkeys("abc"[:k], low_rank), parameters), low_rank)


def test_wudi_adds_what_is_in_different_rows():
    rows = torch.linalg.qr(randn(8, 8))[0]
    deltas = {"a": randn(5, 3) @ rows[:3], "b": randn(5, 2, seed=1) @ rows[3:5]}
    assert_close(merged("wudi", deltas, NO_RIDGE), sum(deltas.values()))


def test_a_large_ridge_makes_wudi_the_mean():
    deltas = deltas_of(3, 5, 7)
    assert_close(merged("wudi", deltas, {"omega": 1e9}), merged("mean", deltas))


@pytest.mark.parametrize("parameters", [{}, NO_RIDGE, {"ridge": "absolute"}])
@given(seed=st.integers(0, 1000))
def test_turning_outputs_turns_what_wudi_merges_and_so_does_turning_inputs(parameters, seed):
    deltas = deltas_of(3, 9, 6, seed=seed)
    left_vectors, right_vectors = (torch.linalg.qr(randn(n, n, seed=seed + 1))[0] for n in (9, 6))
    turned = {expert: left_vectors @ delta @ right_vectors for expert, delta in deltas.items()}
    assert_close(
        merged("wudi", turned, parameters), left_vectors @ merged("wudi", deltas, parameters) @ right_vectors, 1e-4
    )


def test_wudi_does_not_care_for_the_order_of_experts():
    deltas = deltas_of(3, 9, 6)
    assert_close(merged("wudi", dict(reversed(deltas.items()))), merged("wudi", deltas))


def test_an_expert_that_changed_nothing_has_no_say_in_wudi():
    deltas = deltas_of(2, 9, 6)
    assert torch.equal(merged("wudi", {**deltas, "c": torch.zeros(9, 6)}), merged("wudi", deltas))


def test_wudi_refuses_a_negative_ridge():
    with pytest.raises(ValueError, match="omega is -1"):
        merged("wudi", deltas_of(2, 3, 2), {"omega": -1})


@pytest.mark.parametrize(("kind", "head"), [("vector", True), ("embedding", True), ("head", False), ("tied", False)])
def test_wudi_averages_tensors_without_a_matrix(kind, head):
    deltas = deltas_of(3, 4, 5)
    assert_close(merged("wudi", deltas, {"lambda": 0.5, "head": head}, kind=kind), 0.5 * merged("mean", deltas))


@pytest.mark.parametrize("kind", ["head", "tied"])
def test_a_head_is_a_matrix_to_wudi_if_asked_whether_or_not_it_is_the_embedding(kind):
    deltas = deltas_of(3, 4, 5)
    assert torch.equal(merged("wudi", deltas, {"head": True}, kind=kind), merged("wudi", deltas))


# --- ACTMat ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(5, 7), (9, 6)])
def test_actmat_oracle(shape):
    deltas = {e: delta * scale for scale, (e, delta) in zip((1, 2, 5), deltas_of(3, *shape).items(), strict=True)}
    exact = [delta.double() for delta in deltas.values()]
    products = sum(delta @ delta.T @ delta for delta in exact)
    expected = 0.7 * products @ torch.linalg.pinv(sum(delta.T @ delta for delta in exact))
    assert_close(merged("actmat", deltas, {"omega": 0, "lambda": 0.7}), expected.float())


def test_actmats_ridge_draws_to_the_mean_by_squared_norms():
    deltas = {"a": randn(5, 7), "b": 3 * randn(5, 7, seed=1)}
    squares = {expert: delta.square().sum() for expert, delta in deltas.items()}
    mean = sum(squares[expert] * delta for expert, delta in deltas.items()) / sum(squares.values())
    assert_close(merged("actmat", deltas, {"omega": 1e9}), mean)


def test_actmat_of_task_vectors_of_equal_norm_is_wudi():
    deltas = {expert: delta / delta.norm() for expert, delta in deltas_of(3, 9, 6).items()}
    assert_close(merged("actmat", deltas, {"omega": 0.3}), merged("wudi", deltas, {"omega": 0.3}))


def test_wudi_without_normalising_has_an_absolute_ridge_in_the_unit_of_the_gram_matrix():
    deltas = {"a": torch.ones(1, 1), "b": torch.full((1, 1), 3.0)}
    settings = {"omega": 1, "ridge": "absolute", "normalize": "none"}
    # (1 (1 + 1) + 3 (9 + 1)) / ((1 + 1) + (9 + 1))
    assert_close(merged("wudi", deltas, settings), torch.full((1, 1), 32 / 12))


# --- anchors, ridges and filters ------------------------------------------------------------------


def divided_by_norm(moments):
    return [matrix.double() / matrix.double().norm() for matrix in moments]


def test_regmean_with_ridge_and_anchor_oracle():
    deltas, known = deltas_of(3, 5, 7), grams_of(3, 7, 50)
    grams = divided_by_norm(known.gram)
    anchor = 1.3 * sum(deltas.values()).double()
    products = sum(delta.double() @ gram for delta, gram in zip(deltas.values(), grams, strict=True))
    expected = (products + 0.2 * anchor) @ torch.linalg.inv(sum(grams) + 0.2 * torch.eye(7).double())
    settings = {"alpha": 1, "normalize": "frobenius", "ridge": 0.2, "anchor": "sum", "stretch": 1.3}
    assert_close(merged("regmean", deltas, settings, inputs=known), expected.float())


@pytest.mark.parametrize("normalize", ["frobenius", "trace"])
def test_a_normalised_gram_matrix_has_no_unit(normalize):
    deltas, known = deltas_of(2, 5, 6), grams_of(2, 6, 50)
    louder = Inputs(known.second_moment, known.mean, torch.stack([known.gram[0], 100 * known.gram[1]]))
    settings = {"normalize": normalize, "ridge": 0.1}
    result = merged("regmean", deltas, settings, inputs=known)
    assert_close(merged("regmean", deltas, settings, inputs=louder), result)


def test_a_large_ridge_makes_regmean_the_stretched_anchor():
    deltas, known = deltas_of(3, 5, 6), grams_of(3, 6, 50)
    settings = {"ridge": 1e12, "anchor": {"ties": {"density": 0.5}}, "stretch": 2}
    assert_close(
        merged("regmean", deltas, settings, inputs=known), 2 * merged("ties", deltas, {"density": 0.5}, inputs=known)
    )


def test_a_matrix_that_no_input_reached_is_the_anchor():
    deltas, known = deltas_of(3, 5, 6), grams_of(3, 6, 50)
    silent = Inputs(known.second_moment, known.mean, torch.zeros_like(known.gram))
    assert torch.equal(merged("regmean", deltas, {"anchor": "ties"}, inputs=silent), merged("ties", deltas, {}))


def test_the_stretch_that_fits_errs_least():
    deltas, known = deltas_of(3, 5, 6), grams_of(3, 6, 50)

    def error(factor):
        anchor = factor * sum(deltas.values()).double() / 3
        pairs = zip(deltas.values(), known.gram, strict=True)
        return float(sum(((anchor - delta) @ gram.double() * (anchor - delta)).sum() for delta, gram in pairs))

    settings = {"alpha": 1, "ridge": 1e12, "stretch": "fit"}
    mean = merged("mean", deltas)
    factor = float((merged("regmean", deltas, settings, inputs=known) / mean).mean())
    assert error(factor) < min(error(factor - 0.01), error(factor + 0.01))


def test_directions_without_inputs_go_to_the_mean_and_not_to_the_first_expert():
    deltas = deltas_of(2, 4, 6)
    gram = torch.zeros(2, 6, 6)
    gram[:, :3, :3] = grams_of(2, 3, 50).gram
    known = Inputs(gram.diagonal(dim1=1, dim2=2), gram.diagonal(dim1=1, dim2=2), gram)
    assert_close(merged("regmean", deltas, inputs=known)[:, 3:], merged("mean", deltas)[:, 3:])


@pytest.mark.parametrize("ridge", [-1, -0.1])
def test_regmean_refuses_a_negative_ridge(ridge):
    with pytest.raises(ValueError, match="a ridge cannot be negative"):
        merged("regmean", deltas_of(2, 3, 2), {"ridge": ridge}, inputs=grams_of(2, 2, 9))


@pytest.mark.parametrize(("towards", "factor"), [("mean", 1), ("sum", 3), (1.5, 1.5)])
@pytest.mark.parametrize("filter_", ["ridge", "exp", "rank"])
def test_wudis_filters_oracle(towards, factor, filter_):
    deltas = {expert: delta.double() for expert, delta in deltas_of(3, 5, 7).items()}
    total = sum(delta.T @ delta / delta.square().sum() for delta in deltas.values())
    products = sum(delta @ delta.T @ delta / delta.square().sum() for delta in deltas.values())
    rho = 3 * 0.5 / 7
    values, vectors = torch.linalg.eigh(total)
    values = values.clamp(min=1e-12)
    filters = {
        "ridge": values / (values + rho),
        "exp": 1 - torch.exp(-values / rho),
        "rank": (values > rho).double(),
    }
    target = factor * sum(deltas.values()) / 3
    expected = target + (products - target @ total) @ vectors @ (filters[filter_] / values).diag() @ vectors.T
    settings = {"omega": 0.5, "filter": filter_, "towards": towards}
    floats = {expert: delta.float() for expert, delta in deltas.items()}
    assert_close(merged("wudi", floats, settings), expected.float())


@pytest.mark.parametrize("filter_", ["ridge", "exp", "rank"])
def test_wudi_towards_the_factor_that_fits_is_exact_for_identical_experts(filter_):
    low_rank = randn(6, 2) @ randn(2, 9)
    settings = {"towards": "fit", "filter": filter_}
    assert_close(merged("wudi", dict.fromkeys("abc", low_rank), settings), low_rank)


def test_the_factor_that_fits_is_the_number_of_experts_where_none_share_a_direction():
    rows = torch.linalg.qr(randn(8, 8))[0]
    deltas = {"a": randn(5, 3) @ rows[:3], "b": randn(5, 3, seed=1) @ rows[3:6]}
    assert_close(merged("wudi", deltas, {"towards": "fit", "omega": 1e6}), sum(deltas.values()), 1e-4)
