"""What is particular to the methods of whole matrices, and each formula written slowly."""

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import Inputs, merge, sparse, tensor

from merger.pipeline.in_memory import merge_stages
from merger.pipeline.registry import checked

K = [1, 2, 3, 5]
SHAPES = [(1, 6), (6, 1), (4, 4), (9, 6), (6, 9), (280, 5)]


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def deltas_of(k, *shape, seed=0):
    return dict(zip("abcde", randn(k, *shape, seed=seed), strict=False))


def low_rank_deltas(k, m, n, rank=1):
    return {e: randn(m, rank, seed=i) @ randn(rank, n, seed=i + 9) for i, e in enumerate("abcde"[:k])}


def merged(method, deltas, parameters=None, **options):
    return merge(checked(method, parameters or {}), deltas, **options)


def assert_close(result, expected, tolerance=1e-5):
    expected = tensor(expected)
    scale = max(1e-30, float(expected.abs().max()))
    torch.testing.assert_close(result, expected, rtol=0, atol=tolerance * scale)


def values_of(matrix):
    """The singular values that are there."""
    values = torch.linalg.svdvals(matrix.double())
    return values[values > 1e-5 * values[0]]


def orthogonal(size, seed):
    return torch.linalg.qr(randn(size, size, seed=seed).double())[0].float()


# --- the formulas, slowly -------------------------------------------------------------------------


def thin(matrix):
    left_vectors, values, right_vectors = numpy.linalg.svd(matrix, full_matrices=False)
    strong = values > max(matrix.shape) * 2.0**-23 * values[0]
    return left_vectors[:, strong], values[strong], right_vectors[strong]


def truncated(matrix, rank):
    left_vectors, values, right_vectors = thin(matrix)
    return left_vectors[:, :rank] * values[:rank] @ right_vectors[:rank]


def nearest_orthogonal(columns):
    left_vectors, _, right_vectors = thin(columns)
    return left_vectors @ right_vectors


def slow_tsv_m(deltas):
    rank = max(1, min(deltas[0].shape) // len(deltas))
    factors = [[factor[..., :rank] if i < 2 else factor[:rank].T for i, factor in enumerate(thin(d))] for d in deltas]
    left_vectors, values, right_vectors = (
        numpy.concatenate([expert_factors[i] for expert_factors in factors], -1) for i in range(3)
    )
    return nearest_orthogonal(left_vectors) @ numpy.diag(values) @ nearest_orthogonal(right_vectors).T


def slow_iso_c(deltas):
    left_vectors, values, right_vectors = thin(sum(deltas))
    return values.mean() * left_vectors @ right_vectors


def slow_iso_cts(deltas, common=0.8):
    full = min(deltas[0].shape)
    expert_rank = round((full - int(common * full)) / len(deltas))
    left_vectors, values, right_vectors = ([factor] for factor in thin(sum(deltas)))
    k = full - expert_rank * len(deltas)
    left_vectors[0], values[0], right_vectors[0] = left_vectors[0][:, :k], values[0][:k], right_vectors[0][:k]
    for delta in deltas:
        u, s, v = thin(delta - left_vectors[0] @ left_vectors[0].T @ delta)
        left_vectors.append(u[:, :expert_rank])
        values.append(s[:expert_rank])
        right_vectors.append(v[:expert_rank])
    u, v = (
        nearest_orthogonal(numpy.concatenate(left_vectors, 1)),
        nearest_orthogonal(numpy.concatenate(right_vectors).T),
    )
    return numpy.concatenate(values).mean() * u @ v.T


def slow_star(deltas, eta=40):
    total = 0
    for delta in deltas:
        left_vectors, values, right_vectors = thin(delta)
        rank = next(k for k in range(1, len(values) + 1) if values[:k].sum() >= eta / 100 * values.sum() * (1 - 1e-12))
        total = (
            total + left_vectors[:, :rank] * values[:rank] @ right_vectors[:rank] * values.sum() / values[:rank].sum()
        )
    return total / len(deltas)


def slow_cart(deltas, share=0.08, factor=1):
    centre = sum(deltas) / len(deltas)
    rank = max(1, int(share * min(centre.shape)))
    return centre + factor * sum(truncated(delta - centre, rank) for delta in deltas)


ORACLES = {
    "tsv_m": (slow_tsv_m, {}),
    "iso_c": (slow_iso_c, {}),
    "iso_cts": (slow_iso_cts, {}),
    "star": (slow_star, {}),
    "cart": (slow_cart, {}),
}


@pytest.mark.parametrize("shape", [(12, 7), (7, 12), (300, 20), (20, 300)])
@pytest.mark.parametrize("k", [2, 3])
@pytest.mark.parametrize("method", ORACLES)
def test_a_merge_is_what_a_plain_svd_gives(method, k, shape):
    deltas = deltas_of(k, *shape)
    slow, parameters = ORACLES[method]
    expected = slow([delta.double().numpy() for delta in deltas.values()])
    assert_close(merged(method, deltas, parameters), expected)


SPECTRAL = ["tsv_m", "iso_c", "iso_cts", "star", "cart"]


# --- laws of all of them --------------------------------------------------------------------------


@pytest.mark.parametrize("method", SPECTRAL)
@given(data=st.data())
def test_orthogonal_transforms_of_outputs_and_inputs_commute_with_the_merge(method, data):
    shape = data.draw(st.sampled_from([(5, 8), (8, 5), (6, 6)]))
    seed = data.draw(st.integers(0, 100))
    deltas = deltas_of(data.draw(st.sampled_from([2, 3])), *shape, seed=seed)
    left_vectors, right_vectors = orthogonal(shape[0], seed + 1), orthogonal(shape[1], seed + 2)
    turned = {expert: left_vectors @ delta @ right_vectors for expert, delta in deltas.items()}
    assert_close(merged(method, turned), left_vectors @ merged(method, deltas) @ right_vectors, 1e-4)


@pytest.mark.parametrize("method", SPECTRAL)
@given(seed=st.integers(0, 100), k=st.sampled_from([2, 3, 5]))
def test_the_order_of_experts_does_not_matter(method, seed, k):
    deltas = deltas_of(k, 6, 8, seed=seed)
    turned = dict(reversed(deltas.items()))
    assert_close(merged(method, turned), merged(method, deltas))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("k", K)
@pytest.mark.parametrize("method", SPECTRAL)
def test_experts_that_changed_nothing_leave_the_base(method, k, shape):
    base = randn(*shape)
    untrained = dict.fromkeys("abcde"[:k], torch.zeros(shape))
    assert torch.equal(merged(method, untrained, base=base), base)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("k", K)
@pytest.mark.parametrize("method", SPECTRAL)
def test_task_vectors_of_rank_one_stay_in_the_directions_they_have(method, k, shape):
    deltas = low_rank_deltas(k, *shape)
    result = merged(method, deltas).double()
    assert result.isfinite().all()
    span = torch.linalg.qr(torch.cat([d.double() for d in deltas.values()], 1))
    for matrix, columns in (
        (result, torch.cat(list(deltas.values()), 1)),
        (result.T, torch.cat([d.T for d in deltas.values()], 1)),
    ):
        left_vectors, values, _ = torch.linalg.svd(columns.double(), full_matrices=False)
        span = left_vectors[:, values > 1e-5 * values[0]]
        assert_close((span @ (span.T @ matrix)).float(), matrix)


@pytest.mark.parametrize("method", SPECTRAL)
@pytest.mark.parametrize("kind", ["vector", "embedding", "tied", "head", "other"])
def test_tensors_without_a_matrix_get_the_mean_times_the_scale(method, kind):
    deltas = deltas_of(3, 6, 8)
    factor = 1 if method == "cart" else 0.7  # the scale of CART is not that of its mean
    expected = sum(deltas.values()) / 3 * factor
    assert_close(merged(method, deltas, {"lambda": 0.7}, kind=kind), expected)


@pytest.mark.parametrize("method", SPECTRAL)
@pytest.mark.parametrize("kind", ["head", "tied"])
def test_the_head_is_a_matrix_if_asked(method, kind):
    deltas = deltas_of(3, 6, 8)
    result = merged(method, deltas, {"head": True}, kind=kind)
    assert torch.equal(result, merged(method, deltas))


@pytest.mark.parametrize("method", ["tsv_m", "iso_c", "iso_cts"])
@pytest.mark.parametrize("kind", ["linear", "vector"])
def test_a_weight_multiplies_an_experts_task_vector(method, kind):
    deltas = deltas_of(3, 6, 8)
    weighted = {"a": deltas["a"] * 2, "b": deltas["b"] * 0.5, "c": -deltas["c"]}
    result = merged(method, deltas, {"weight": {"a": 2, "b": 0.5, "c": -1}}, kind=kind)
    assert_close(result, merged(method, weighted, kind=kind))


@pytest.mark.parametrize("method", ["star", "cart"])
def test_a_weight_of_zero_leaves_an_expert_out(method):
    deltas = deltas_of(3, 6, 8)
    pair = {expert: deltas[expert] for expert in "ab"}
    result = merged(method, deltas, {"weight": {"a": 1, "b": 1, "c": 0}})
    assert_close(result, merged(method, pair))


# --- TSV-M ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_tsv_m_of_one_expert_is_the_expert(shape):
    deltas = deltas_of(1, *shape)
    assert torch.equal(merged("tsv_m", deltas), deltas["a"])


@pytest.mark.parametrize("shape", [(9, 6), (6, 9), (300, 12)])
@pytest.mark.parametrize("k", [2, 3])
def test_tsv_m_of_identical_experts_is_their_truncation_once(k, shape):
    delta = randn(*shape)
    expected = truncated(delta.double().numpy(), min(shape) // k)
    assert_close(merged("tsv_m", dict.fromkeys("abc"[:k], delta)), expected)


def test_tsv_m_has_the_singular_values_that_the_experts_kept():
    deltas = deltas_of(3, 12, 10)
    strongest = torch.cat([torch.linalg.svdvals(delta.double())[:3] for delta in deltas.values()])
    torch.testing.assert_close(
        values_of(merged("tsv_m", deltas)), strongest.sort(descending=True)[0], rtol=1e-5, atol=0
    )


def test_tsv_m_of_an_expert_that_changed_nothing_and_another_is_the_others_half():
    delta = randn(6, 8)
    expected = truncated(delta.double().numpy(), 3)
    assert_close(merged("tsv_m", {"a": delta, "b": torch.zeros(6, 8)}), expected)


# --- Iso-C and Iso-CTS ----------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["iso_c", "iso_cts"])
def test_iso_makes_all_singular_values_equal(method):
    values = values_of(merged(method, deltas_of(3, 20, 30)))
    torch.testing.assert_close(values, values.mean().expand_as(values), rtol=1e-5, atol=0)


@pytest.mark.parametrize("deltas", [deltas_of(3, 8, 12), low_rank_deltas(3, 8, 12)], ids=["full", "low rank"])
def test_iso_c_keeps_the_nuclear_norm_of_the_sum(deltas):
    nuclear = values_of(merged("iso_c", deltas)).sum()
    torch.testing.assert_close(nuclear, values_of(sum(deltas.values())).sum(), rtol=1e-5, atol=0)


def test_iso_c_of_identical_experts_is_that_many_times_the_flattened_one():
    delta = randn(6, 8)
    assert_close(merged("iso_c", dict.fromkeys("abc", delta)), 3 * merged("iso_c", {"a": delta}))


@pytest.mark.parametrize(("shape", "parameters"), [((6, 8), {"common": 1}), ((2, 8), {}), ((1, 8), {})])
def test_iso_cts_without_room_for_experts_is_iso_c(shape, parameters):
    deltas = deltas_of(3, *shape)
    assert torch.equal(merged("iso_cts", deltas, parameters), merged("iso_c", deltas))


def test_iso_cts_of_identical_experts_has_no_direction_that_they_lack():
    """What is left of a common direction when it is projected out is rounding, not a direction."""
    low = low_rank_deltas(1, 20, 30, rank=4)["a"]
    result = merged("iso_cts", {"a": low, "b": low})
    assert_close(result, merged("iso_c", {"a": low, "b": low}))


# --- STAR and CART --------------------------------------------------------------------------------


@pytest.mark.parametrize("eta", [1, 40, 99.5])
def test_star_keeps_an_experts_nuclear_norm(eta):
    delta = randn(9, 12)
    nuclear = values_of(sparse(checked("nuclear", {"eta": eta}), {"a": delta})["a"]).sum()
    torch.testing.assert_close(nuclear, values_of(delta).sum(), rtol=1e-5, atol=0)


def test_star_at_a_hundred_percent_is_the_average_bit_for_bit():
    deltas = deltas_of(3, 9, 12)
    assert torch.equal(merged("star", deltas, {"eta": 100}), merged("linear", deltas))


@pytest.mark.parametrize("eta", [0, -1, 101])
def test_star_refuses_what_is_no_percentage(eta):
    with pytest.raises(ValueError, match=r"eta is .*a percentage above 0 and at most 100"):
        merged("star", deltas_of(2, 3, 3), {"eta": eta})


def test_cart_does_not_depend_on_the_base():
    experts, base = deltas_of(3, 6, 8), randn(6, 8, seed=5)
    moved = merged("cart", {e: weights - base for e, weights in experts.items()}, base=base)
    assert_close(moved, merged("cart", experts))


@pytest.mark.parametrize("parameters", [{"rank_share": 1}, {"lambda": 0}])
def test_cart_is_the_mean_where_nothing_or_everything_is_added(parameters):
    deltas = deltas_of(3, 6, 8)
    assert torch.equal(merged("cart", deltas, parameters), merged("linear", deltas))


def test_cart_of_identical_experts_is_the_expert():
    delta = randn(6, 8)
    assert torch.equal(merged("cart", dict.fromkeys("abc", delta)), delta)


# --- SVC ------------------------------------------------------------------------------------------


def calibrated(deltas, merger="sum", parameters=None, **options):
    return merge([checked(merger, {}), checked("svc", parameters or {})], deltas, **options)


def slow_svc(deltas, tau, alpha):
    left_vectors, values, right_vectors = thin(tau)
    total = 0
    for u, value, v in zip(left_vectors.T, values, right_vectors, strict=True):
        counts = [(value * v) @ (u @ delta) / ((u @ delta) @ (u @ delta)) for delta in deltas]
        factor = len(deltas) / sum(max(alpha, count) for count in counts)
        total = total + factor * value * numpy.outer(u, v)
    return total


@pytest.mark.parametrize(("parameters", "alpha"), [({}, 1 / 3), ({"alpha": 1}, 1), ({"alpha": 0.1}, 0.1)])
@pytest.mark.parametrize("shape", [(12, 7), (7, 12), (300, 20)])
def test_svc_oracle(shape, parameters, alpha):
    deltas = deltas_of(3, *shape)
    exact = [delta.double().numpy() for delta in deltas.values()]
    assert_close(calibrated(deltas, parameters=parameters), slow_svc(exact, sum(exact), alpha))


def test_svc_counts_once_what_all_experts_share_and_leaves_what_one_has():
    shared, apart = torch.tensor([[1.0, 0], [0, 0]]), torch.tensor([[0.0, 0], [0, 1]])
    assert_close(calibrated({"a": shared, "b": shared + apart}), shared + apart)


def test_svc_does_not_depend_on_the_scale_of_the_merge_where_every_count_is_above_alpha():
    deltas = {expert: 0.2 * delta + randn(6, 8, seed=9) for expert, delta in deltas_of(3, 6, 8).items()}
    assert_close(calibrated(deltas, "mean", {"alpha": 0}), calibrated(deltas, "sum", {"alpha": 0}))


def test_svc_at_one_lets_no_singular_value_grow():
    deltas = deltas_of(3, 6, 8)
    before, after = values_of(merged("sum", deltas)), values_of(calibrated(deltas, parameters={"alpha": 1}))
    assert after.norm() < before.norm()
    assert bool((after <= before + 1e-6).all())


def test_svc_keeps_directions_that_no_expert_counts_positively():
    delta = randn(6, 8)
    stages = [checked("sum", {}), checked("scale", {"lambda": -1}), checked("svc", {"alpha": 0})]
    assert_close(merge(stages, {"a": delta, "b": delta}), -2 * delta)


@pytest.mark.parametrize("kind", ["vector", "embedding", "tied", "head", "other"])
def test_svc_leaves_tensors_without_a_matrix_as_they_were_merged(kind):
    deltas = deltas_of(3, 6, 8)
    assert torch.equal(calibrated(deltas, kind=kind), merged("sum", deltas, kind=kind))


@pytest.mark.parametrize("kind", ["tied", "head"])
def test_svc_takes_the_head_if_asked(kind):
    deltas = deltas_of(3, 6, 8)
    assert torch.equal(calibrated(deltas, parameters={"head": True}, kind=kind), calibrated(deltas))


def test_svc_leaves_out_an_expert_of_weight_zero():
    deltas = deltas_of(3, 6, 8)
    weight = {"a": 1, "b": 1, "c": 0}
    stages = [checked("sum", {"weight": weight}), checked("svc", {"weight": weight, "alpha": 0.5})]
    assert_close(merge(stages, deltas), calibrated({expert: deltas[expert] for expert in "ab"}))


def test_wudi_svc_is_wudi_and_then_svc():
    deltas = deltas_of(3, 6, 8)
    stages = [checked("wudi", {"omega": 0.1}), checked("svc", {"alpha": 0.2}), checked("scale", {"lambda": 0.7})]
    assert torch.equal(merged("wudi_svc", deltas, {"omega": 0.1, "alpha": 0.2, "lambda": 0.7}), merge(stages, deltas))


def test_svc_calibrates_the_anchor_of_a_regression():
    deltas = deltas_of(3, 6, 8)
    anchored = merged("regmean", deltas, {"anchor": "wudi_svc"})  # no text reached the matrix
    assert_close(anchored, merged("wudi_svc", deltas))


# --- subspace boosting ----------------------------------------------------------------------------


def boosted(deltas, beta, **options):
    return merge([checked("sum", {}), checked("subspace_boost", {"beta": beta})], deltas, **options)


@pytest.mark.parametrize("beta", [0, 0.01, 0.3, 0.8, 1])
@pytest.mark.parametrize("shape", [(9, 12), (12, 9)])
def test_subspace_boost_raises_what_follows_the_share(shape, beta):
    deltas = deltas_of(3, *shape)
    left_vectors, values, right_vectors = thin(sum(deltas.values()).double().numpy())
    floor = values[min(numpy.searchsorted(values.cumsum(), beta * values.sum()), len(values) - 1)]
    assert_close(boosted(deltas, beta), left_vectors * numpy.maximum(values, floor) @ right_vectors)


def test_subspace_boost_leaves_empty_what_the_merge_has_no_direction_in():
    assert_close(
        boosted({"a": torch.diag(torch.tensor([5.0, 3, 1, 0]))}, 0.6), torch.diag(torch.tensor([5.0, 3, 3, 0]))
    )
    assert not boosted({"a": torch.zeros(3, 4)}, 0.5).any()


@pytest.mark.parametrize("kind", ["vector", "embedding", "tied", "head", "other"])
def test_subspace_boost_leaves_tensors_without_a_matrix_as_they_were_merged(kind):
    deltas = deltas_of(3, 6, 8)
    assert torch.equal(boosted(deltas, 0, kind=kind), merged("sum", deltas, kind=kind))


# --- rank truncation ------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0, 0.3, "1/2"])
def test_truncation_leaves_out_the_smallest_singular_values(share):
    delta = randn(9, 12)
    rank = max(1, int(9 * eval(str(share))))
    truncated_delta = sparse(checked("truncate", {"rank_share": share}), {"a": delta})["a"]
    assert_close(truncated_delta, truncated(delta.double().numpy(), rank))


def test_truncation_to_the_rank_that_is_there_changes_no_bit():
    low = low_rank_deltas(1, 9, 12, rank=3)
    assert torch.equal(sparse(checked("truncate", {"rank_share": "1/3"}), low)["a"], low["a"])


def test_truncation_leaves_vectors_as_they_are():
    deltas = deltas_of(2, 12)
    stages = [checked("truncate", {"rank_share": 0.1}), checked("sum", {})]
    assert torch.equal(merge(stages, deltas, kind="vector"), merge(checked("sum", {}), deltas))


def test_truncation_may_stand_before_any_merger():
    deltas = deltas_of(3, 12, 9)
    stages = [checked("truncate", {"rank_share": "1/3"}), checked("sign_elect", {})]
    cut = {e: tensor(truncated(delta.double().numpy(), 3)) for e, delta in deltas.items()}
    assert_close(merge(stages, deltas), merge(checked("sign_elect", {}), cut))


# --- OPCM -----------------------------------------------------------------------------------------


def slow_opcm(models, alpha=0.5):
    """The recursion as it is written, over a whole model: [expert][tensor] -> [tensor]."""
    names, total, factor = list(models[0]), dict(models[0]), 1.0
    norm = lambda tensors: sum((values**2).sum() for values in tensors.values()) ** 0.5  # noqa: E731
    for t, model in enumerate(models[1:], 1):
        for name in names:
            cleaned = model[name]
            if min(cleaned.shape) > 1:
                u, s, v = thin(total[name])
                rank = next(i + 1 for i in range(len(s)) if s[: i + 1].sum() / s.sum() > alpha)
                coefficients = u.T @ cleaned @ v.T
                for i in range(len(s)):
                    for j in range(len(s)):
                        if i == j or max(i, j) < rank:
                            cleaned = cleaned - coefficients[i, j] * numpy.outer(u[:, i], v[j])
            total[name] = factor * total[name] + cleaned
        factor = norm(total) / (sum(norm(values) for values in models[: t + 1]) / (t + 1))
        total = {name: values / factor for name, values in total.items()}
    return total


def test_opcm_oracle():
    shapes = {"layers.0.w": (9, 6), "layers.1.w": (6, 9), "norm": (1, 7)}
    base = {name: torch.zeros(shape) for name, shape in shapes.items()}
    expert_weights = {
        e: {name: randn(*shape, seed=7 * i + j) for j, (name, shape) in enumerate(shapes.items())}
        for i, e in enumerate("abc")
    }
    kinds = {"layers.0.w": "linear", "layers.1.w": "linear", "norm": "vector"}
    result = merge_stages(checked("opcm", {}), base, expert_weights, kinds=kinds)
    expected = slow_opcm([{n: w.double().numpy() for n, w in model.items()} for model in expert_weights.values()])
    for name in shapes:
        assert_close(result[name], expected[name])


@pytest.mark.parametrize("shape", SHAPES)
def test_opcm_of_one_expert_is_the_expert(shape):
    deltas = deltas_of(1, *shape)
    assert torch.equal(merged("opcm", deltas), deltas["a"])


@pytest.mark.parametrize("deltas", [deltas_of(3, 9, 6), low_rank_deltas(3, 9, 6)], ids=["full", "low rank"])
def test_opcm_has_the_mean_norm_of_the_experts(deltas):
    norms = [float(delta.norm()) for delta in deltas.values()]
    assert float(merged("opcm", deltas, {"scope": "tensor"}).norm()) == pytest.approx(sum(norms) / 3, rel=1e-5)


def test_opcm_of_identical_experts_is_the_expert():
    delta = randn(9, 6)
    assert_close(merged("opcm", dict.fromkeys("abc", delta)), delta)


@given(seed=st.integers(0, 1000), shape=st.sampled_from([(5, 8), (8, 5), (6, 6)]))
def test_turning_outputs_and_inputs_turns_what_opcm_merges(seed, shape):
    deltas = deltas_of(3, *shape, seed=seed)
    left_vectors, right_vectors = orthogonal(shape[0], seed + 1), orthogonal(shape[1], seed + 2)
    turned = {expert: left_vectors @ delta @ right_vectors for expert, delta in deltas.items()}
    assert_close(merged("opcm", turned), left_vectors @ merged("opcm", deltas) @ right_vectors, 1e-3)


def test_knots_of_adapters_is_ties_in_their_few_directions():
    """Rank 4 of 300: the shared directions are found from a sketch of the product, to the bits of float32."""
    deltas = low_rank_deltas(2, 300, 400, rank=4)
    left_vectors, _, _ = torch.linalg.svd(torch.cat([d.double() for d in deltas.values()], 1), full_matrices=False)
    left_vectors = (
        left_vectors[:, :8] * left_vectors[:, :8].gather(0, left_vectors[:, :8].abs().argmax(0, keepdim=True)).sign()
    )
    inside = {expert: (left_vectors.T @ delta.double()).float() for expert, delta in deltas.items()}
    expected = left_vectors @ merged("ties", inside, {"density": 1}).double()
    assert_close(merged("knots", deltas), expected.float(), 1e-4)


def test_opcm_takes_experts_in_the_order_that_is_asked():
    deltas = deltas_of(3, 6, 8)
    turned = dict(reversed(deltas.items()))
    assert_close(merged("opcm", deltas, {"order": ["c", "b", "a"]}), merged("opcm", turned))


def test_opcm_adds_tensors_without_a_matrix():
    deltas = deltas_of(2, 12)
    total = sum(deltas.values())
    norm = sum(float(delta.norm()) for delta in deltas.values()) / 2
    assert_close(merged("opcm", deltas), total / float(total.norm()) * norm)


# --- KnOTS ----------------------------------------------------------------------------------------


def slow_ties(deltas, density):
    """Trim, elect, mean of those that agree, on arrays [k r n]."""
    trimmed = numpy.zeros_like(deltas)
    for k, delta in enumerate(deltas):
        top = numpy.argsort(-abs(delta).ravel(), kind="stable")[: int(density * delta.size)]
        trimmed[k].ravel()[top] = delta.ravel()[top]
    agree = numpy.sign(trimmed) == numpy.sign(trimmed.sum(0))
    return (trimmed * agree).sum(0) / numpy.maximum((agree & (trimmed != 0)).sum(0), 1)


@pytest.mark.parametrize("deltas", [deltas_of(3, 9, 6), low_rank_deltas(3, 9, 6)], ids=["full", "low rank"])
@pytest.mark.parametrize("density", [1, 0.5])
def test_knots_oracle(deltas, density):
    exact = numpy.stack([delta.double().numpy() for delta in deltas.values()])
    left_vectors, _, _ = thin(numpy.concatenate(list(exact), 1))
    expected = left_vectors @ slow_ties(left_vectors.T @ exact, density)
    assert_close(merged("knots", deltas, {"inner": {"ties": {"density": density}}}), expected)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("k", K)
def test_knots_around_a_sum_is_task_arithmetic(k, shape):
    deltas = deltas_of(k, *shape)
    weight = dict(zip(deltas, [1, 0.5, -2, 3, 1], strict=False))
    result = merged("knots", deltas, {"inner": {"task_arithmetic": {"lambda": 0.7, "weight": weight}}})
    assert_close(result, merged("task_arithmetic", deltas, {"lambda": 0.7, "weight": weight}))


@pytest.mark.parametrize("inner", ["ties", "mean", {"cabs": {"n": 2, "m": 4}}])
def test_turning_the_outputs_turns_what_knots_merges(inner):
    deltas, turn = deltas_of(3, 9, 6), orthogonal(9, 5)
    turned = {expert: turn @ delta for expert, delta in deltas.items()}
    assert_close(merged("knots", turned, {"inner": inner}), turn @ merged("knots", deltas, {"inner": inner}), 1e-4)


def test_knots_of_experts_that_changed_nothing_is_the_base():
    base = randn(4, 5)
    assert torch.equal(merged("knots", dict.fromkeys("ab", torch.zeros(4, 5)), base=base), base)


def test_knots_can_run_a_method_with_random_draws_where_there_are_few_directions():
    deltas = low_rank_deltas(2, 9, 6)
    result = merged("knots", deltas, {"inner": {"dare_linear": {"density": 0.5}}})
    assert torch.linalg.matrix_rank(result) == 2
    assert_close(result, merged("knots", deltas, {"inner": {"dare_linear": {"density": 0.5}}}))


def test_knots_can_run_a_method_that_looks_at_inputs():
    deltas, inputs = deltas_of(2, 6, 8), Inputs(second_moment=randn(2, 8).square(), mean=randn(2, 8))
    by_saliency = merged("knots", deltas, {"inner": "obim"}, inputs=inputs)
    assert not torch.equal(
        by_saliency, merged("knots", deltas, {"inner": {"obim": {"hessian": "none"}}}, inputs=inputs)
    )


@pytest.mark.parametrize("kind", ["vector", "embedding"])
def test_knots_leaves_tensors_without_a_matrix_to_its_inner_method(kind):
    deltas = deltas_of(3, 6, 8)
    inner = {"ties": {"density": 0.5, "scope": "tensor"}}
    assert torch.equal(merged("knots", deltas, {"inner": inner}, kind=kind), merged("ties", deltas, inner["ties"]))


@pytest.mark.parametrize(
    ("inner", "message"),
    [("linear", "inner: linear looks at the base's weights"), ({"ties": {"scope": "global"}}, "write scope: tensor")],
)
def test_knots_refuses_an_inner_method_that_cannot_run_there(inner, message):
    with pytest.raises(ValueError, match=message):
        merged("knots", deltas_of(2, 3, 3), {"inner": inner})


def test_an_expert_has_no_vote_in_directions_that_are_anothers_alone():
    deltas = {expert: (4 * delta).round() for expert, delta in deltas_of(2, 4, 300).items()}
    deltas["a"][:2], deltas["b"][2:] = 0, 0
    hadamard = tensor([[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]])
    turned = {expert: hadamard @ delta for expert, delta in deltas.items()}  # whole numbers, so without rounding
    assert_close(merged("knots", turned), sum(turned.values()))


# --- Core Space -----------------------------------------------------------------------------------


def adapters_of(k, rows, columns, rank=2):
    """The products of random factors, as adapters have them."""
    return low_rank_deltas(k, rows, columns, rank=rank)


def slow_core_space(deltas, merge_cores):
    """By way of stacked factors: each is its task vector's singular vectors times the roots of its values."""
    factors = [thin(delta) for delta in deltas]
    ups, downs = (
        [f[i] * numpy.sqrt(f[1]) if i == 0 else numpy.sqrt(f[1])[:, None] * f[2] for f in factors] for i in (0, 1)
    )
    left_vectors, _, _ = thin(numpy.concatenate(ups, 1))
    _, _, right_vectors = thin(numpy.concatenate(downs, 0))
    cores = [left_vectors.T @ up @ down @ right_vectors.T for up, down in zip(ups, downs, strict=True)]
    return left_vectors @ merge_cores(numpy.stack(cores)) @ right_vectors


@pytest.mark.parametrize("shape", [(9, 6), (6, 9), (300, 20), (20, 300)])
@pytest.mark.parametrize("density", [1, 0.5])
@pytest.mark.parametrize("make", [adapters_of, deltas_of])
def test_core_space_merges_the_core_matrices(make, density, shape):
    deltas = make(3, *shape)
    expected = slow_core_space(
        [delta.double().numpy() for delta in deltas.values()], lambda cores: slow_ties(cores, density)
    )
    assert_close(merged("core_space", deltas, {"inner": {"ties": {"density": density}}}), expected)


@pytest.mark.parametrize("make", [adapters_of, deltas_of])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("k", K)
def test_core_space_around_a_sum_is_task_arithmetic(k, shape, make):
    deltas = make(k, *shape)
    weight = dict(zip(deltas, [1, 0.5, -2, 3, 1], strict=False))
    result = merged("core_space", deltas, {"inner": {"task_arithmetic": {"lambda": 0.7, "weight": weight}}})
    assert_close(result, merged("task_arithmetic", deltas, {"lambda": 0.7, "weight": weight}))


def test_core_space_keeps_a_merge_of_adapters_within_their_ranks_together():
    assert torch.linalg.matrix_rank(merged("core_space", adapters_of(3, 30, 40))) == 6


@pytest.mark.parametrize("inner", ["ties", "iso_c", {"cabs": {"n": 1, "m": 2}}])
def test_turning_outputs_and_inputs_turns_what_core_space_merges(inner):
    deltas, left_vectors, right_vectors = adapters_of(3, 9, 6), orthogonal(9, 5), orthogonal(6, 7)
    turned = {expert: left_vectors @ delta @ right_vectors for expert, delta in deltas.items()}
    expected = left_vectors @ merged("core_space", deltas, {"inner": inner}) @ right_vectors
    assert_close(merged("core_space", turned, {"inner": inner}), expected, 1e-4)


def test_core_space_of_experts_that_changed_nothing_is_the_base():
    base = randn(4, 5)
    assert torch.equal(merged("core_space", dict.fromkeys("ab", torch.zeros(4, 5)), base=base), base)


def test_core_space_can_run_a_method_with_random_draws():
    deltas = adapters_of(2, 9, 7)
    result = merged("core_space", deltas, {"inner": {"dare_linear": {"density": 0.5}}})
    assert torch.linalg.matrix_rank(result) <= 4
    assert not torch.allclose(result, merged("core_space", deltas, {"inner": "mean"}))


def test_an_expert_has_no_vote_in_core_directions_that_are_anothers_alone():
    deltas = adapters_of(2, 12, 300)
    deltas["a"][:6], deltas["b"][6:] = 0, 0
    deltas["a"][:, :150], deltas["b"][:, 150:] = 0, 0
    assert_close(merged("core_space", deltas), sum(deltas.values()))


@pytest.mark.parametrize("kind", ["vector", "embedding"])
def test_core_space_leaves_tensors_without_a_matrix_to_its_inner_method(kind):
    deltas = deltas_of(3, 6, 8)
    inner = {"ties": {"density": 0.5, "scope": "tensor"}}
    assert torch.equal(merged("core_space", deltas, {"inner": inner}, kind=kind), merged("ties", deltas, inner["ties"]))


@pytest.mark.parametrize(
    ("inner", "message"),
    [
        ("linear", "inner: linear looks at the base's weights"),
        ("obim", "inner: top looks at layer inputs, which are not among the directions"),
        ({"ties": {"scope": "global"}}, "write scope: tensor"),
    ],
)
def test_core_space_refuses_an_inner_method_that_cannot_run_there(inner, message):
    with pytest.raises(ValueError, match=message):
        merged("core_space", deltas_of(2, 3, 3), {"inner": inner})
