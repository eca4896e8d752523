"""What is particular to each method, and each one's formula written slowly."""

import math
from fractions import Fraction
from itertools import pairwise

import numpy
import pytest
import torch
from tiny import NAME, Inputs, bits, inputs_of, kept, merge, sparse, tensor

from merger.methods.magprune import magprune
from merger.ops.arithmetic import uniforms
from merger.pipeline.in_memory import merge_stages
from merger.pipeline.parameters import Place
from merger.pipeline.registry import checked
from merger.pipeline.stages import bind, expand

NAMES = "abcdefgh"


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def deltas_of(k, *shape, seed=0):
    """Task vectors of k experts; no two numbers are equal."""
    return dict(zip(NAMES, randn(k, *shape, seed=seed), strict=False))


def claims(merged, deltas):
    """Which positions of a merge onto zeros each expert holds; each must be one expert's own, or zero."""
    masks = {expert: merged == delta for expert, delta in deltas.items()}
    assert (sum(mask.int() for mask in masks.values()) + (merged == 0) == 1).all()
    return masks


def held_by(method, deltas, parameters, **options):
    return claims(merge(checked(method, parameters), deltas, **options), deltas)


def assert_masks(result, expected):
    assert {e: mask.tolist() for e, mask in result.items()} == {e: mask.tolist() for e, mask in expected.items()}


def assert_close(result, expected, tolerance=1e-5):
    torch.testing.assert_close(result, tensor(expected), rtol=tolerance, atol=tolerance)


def refused(method, parameters, experts="ab"):
    """What is said about parameters that each are valid but do not go together."""
    place = Place(tuple(experts))
    stage = checked(method, parameters)
    with pytest.raises(ValueError) as caught:  # noqa: PT011 the caller looks at the text
        [bind(expansion, place) for expansion in expand(stage, "linear", place.experts)]
    return str(caught.value)


# --- OBM saliency ---------------------------------------------------------------------------------


def moments(k, columns, seed=9):
    return Inputs(second_moment=randn(k, columns, seed=seed).square(), mean=randn(k, columns, seed=seed))


def test_saliency_ranks_the_same_for_any_positive_factor():
    deltas, inputs = deltas_of(2, 6, 8), moments(2, 8)
    scaled = Inputs(second_moment=inputs.second_moment * 64, mean=inputs.mean)
    stage = checked("obm", {"density": 0.3})
    assert_masks(kept(stage, deltas, inputs=scaled), kept(stage, deltas, inputs=inputs))


def test_saliency_of_equal_inputs_is_magnitude():
    deltas, inputs = deltas_of(2, 6, 8), Inputs(second_moment=torch.full((2, 8), 4.0), mean=torch.ones(2, 8))
    by_saliency = kept(checked("obm", {"density": 0.3}), deltas, inputs=inputs)
    assert_masks(by_saliency, kept(checked("magnitude", {"density": 0.3}), deltas))


def test_saliency_without_a_hessian_is_magnitude():
    deltas = deltas_of(2, 6, 8)
    by_saliency = kept(checked("obm", {"density": 0.3, "hessian": "none"}), deltas, inputs=moments(2, 8))
    assert_masks(by_saliency, kept(checked("magnitude", {"density": 0.3}), deltas))


def test_saliency_of_an_expert_that_no_token_reached_is_magnitude():
    deltas, inputs = deltas_of(2, 6, 8), moments(2, 8)
    inputs.second_moment[1] = 0
    inputs = Inputs(second_moment=inputs.second_moment, mean=inputs.mean)
    by_saliency = kept(checked("obm", {"density": 0.3}), deltas, inputs=inputs)
    by_magnitude = kept(checked("magnitude", {"density": 0.3}), deltas)
    assert torch.equal(by_saliency["b"], by_magnitude["b"])
    assert not torch.equal(by_saliency["a"], by_magnitude["a"])


def test_an_input_that_stays_zero_earns_nothing_in_either_orientation():
    inputs = Inputs(second_moment=tensor([[0, 1, 1]]), mean=torch.ones(1, 3))
    stage = checked("obm", {"density": "1/3"})
    mask = kept(stage, {"a": [[9, 1, 1], [9, 2, 1]]}, inputs=inputs)["a"]
    assert mask.tolist() == [[False, True, False], [False, True, False]]
    stored = kept(stage, {"a": [[9, 9], [1, 2], [1, 1]]}, inputs=inputs, kind="conv1d", slice_elements=2)["a"]
    assert torch.equal(stored, mask.T)


def test_saliency_follows_a_permutation_of_the_inputs():
    deltas, inputs = deltas_of(1, 6, 8), moments(1, 8)
    turn = torch.randperm(8, generator=torch.Generator().manual_seed(1))
    turned = Inputs(second_moment=inputs.second_moment[:, turn], mean=inputs.mean[:, turn])
    stage = checked("obm", {"density": 0.3})
    mask = kept(stage, {"a": deltas["a"][:, turn]}, inputs=turned)["a"]
    assert torch.equal(mask, kept(stage, deltas, inputs=inputs)["a"][:, turn])


def test_a_saliency_of_zero_can_still_be_claimed_by_index():
    inputs = Inputs(second_moment=tensor([[0, 0, 1]]), mean=torch.ones(1, 3))
    mask = kept(checked("obm", {"density": "2/3"}), {"a": [[5, 6, 7]]}, inputs=inputs)["a"]
    assert mask.tolist() == [[True, False, True]]


def test_rows_of_an_embedding_may_be_scored_by_how_often_they_are_looked_up():
    inputs = Inputs(token_share=tensor([[0.1, 0.9]]))
    stage = checked("obm", {"density": 0.5, "embedding": "token_freq"})
    mask = kept(stage, {"a": [[2, 2], [1, 1]]}, inputs=inputs, kind="embedding")["a"]
    assert mask.tolist() == [[False, False], [True, True]]


def test_a_vector_is_claimed_at_random_or_by_magnitude():
    deltas = deltas_of(1, 50)
    parameters = {"density": 0.3, "nonlinear": "magnitude"}
    by_magnitude = kept(checked("magnitude", {"density": 0.3}), deltas)
    assert_masks(kept(checked("obm", parameters), deltas), by_magnitude)
    at_random = kept(checked("uniform", {"density": 0.3}), deltas)
    assert_masks(kept(checked("obm", {"density": 0.3}), deltas), at_random)
    assert not torch.equal(at_random["a"], by_magnitude["a"])


@pytest.mark.parametrize(("method", "options"), [("top", {}), ("ties", {}), ("im", {"order": "listed"})])
def test_saliencies_of_different_tensors_cannot_be_ranked_together(method, options):
    message = refused(method, {"scope": "global", "score": "obm", **options})
    assert "obm depends on a layer's own inputs" in message
    assert "scope: tensor" in message


def test_scores_without_inputs_may_be_ranked_over_the_whole_model():
    deltas = deltas_of(2, 6, 8)
    parameters = {"density": 0.3, "scope": "global"}
    by_saliency = kept(checked("obm", {**parameters, "hessian": "none"}), deltas)
    assert_masks(by_saliency, kept(checked("magnitude", parameters), deltas))


# --- Wanda and magnitude --------------------------------------------------------------------------


def test_wanda_scores_a_change_by_its_size_and_the_norm_of_its_input():
    inputs = Inputs(second_moment=tensor([[1, 4, 0, 9]]), mean=torch.zeros(1, 4))
    sparse_deltas = sparse(checked("wanda", {"density": 0.5}), {"a": [[4, -3, 1, 1], [0, 1, 9, 5]]}, inputs=inputs)
    assert sparse_deltas["a"].tolist() == [[4, -3, 0, 0], [0, 1, 0, 5]]


def test_wanda_over_a_tensor_keeps_what_obm_keeps():
    deltas, inputs = deltas_of(2, 6, 8), moments(2, 8)
    by_wanda = kept(checked("wanda", {"density": 0.3, "scope": "tensor"}), deltas, inputs=inputs)
    assert_masks(by_wanda, kept(checked("obm", {"density": 0.3}), deltas, inputs=inputs))


@pytest.mark.parametrize("shape", [(6, 8), (8,)])
def test_wanda_without_inputs_is_magnitude(shape):
    deltas = deltas_of(2, *shape)
    by_magnitude = kept(checked("magnitude", {"density": 0.3, "scope": "row"}), deltas)
    assert_masks(kept(checked("wanda", {"density": 0.3}), deltas), by_magnitude)


def test_wanda_may_choose_within_blocks_and_between_experts():
    deltas, inputs = deltas_of(2, 6, 8), moments(2, 8)
    masks = kept(checked("bs", {"n": 2, "m": 4, "score": "wanda", "exclusive": "listed"}), deltas, inputs=inputs)
    assert not (masks["a"] & masks["b"]).any()
    assert [mask.view(-1, 4).sum(1).tolist() for mask in masks.values()] == [[2] * 12] * 2


@pytest.mark.parametrize(("scope", "by_row"), [("tensor", [3, 0]), ("row", [1, 1])])
def test_magnitude_may_rank_the_tensor_or_each_row(scope, by_row):
    delta = {"a": [[9, 8, 7, 6, 5], [4, 3, 2, 0, 0]]}
    assert kept(checked("magnitude", {"density": 0.3, "scope": scope}), delta)["a"].sum(1).tolist() == by_row


# --- iterative merging ----------------------------------------------------------------------------


@pytest.mark.parametrize("k", range(1, 9))
@pytest.mark.parametrize("score", ["magnitude", "uniform"])
def test_im_gives_each_expert_exactly_its_share_and_no_position_twice(k, score):
    shares = ["0.29", "1/7", "0.05", "1/9", "0.1", "0.01", "1/8", "0.1"][:k]
    deltas = deltas_of(k, 9, 11)
    claimed_masks = held_by("im", deltas, {"density": dict(zip(deltas, shares, strict=True)), "score": score})
    assert [int(mask.sum()) for mask in claimed_masks.values()] == [math.floor(Fraction(s) * 99) for s in shares]


@pytest.mark.parametrize("k", range(1, 9))
def test_im_divides_a_tensor_evenly_by_default(k):
    deltas = deltas_of(k, 9, 11)
    assert {int(mask.sum()) for mask in held_by("im", deltas, {}).values()} == {99 // k}


def test_im_leaves_the_base_a_share_when_it_is_counted():
    claimed_masks = held_by("im", deltas_of(3, 12), {"count_base": True})
    assert [int(mask.sum()) for mask in claimed_masks.values()] == [3, 3, 3]


def test_im_copies_the_bits_of_the_base_or_of_one_expert():
    base, experts = randn(40, 40, seed=1) * 1e4, {e: delta * 1e-3 for e, delta in deltas_of(3, 40, 40).items()}
    merged = merge_stages(checked("im", {"density": "0.3"}), {NAME: base}, {e: {NAME: w} for e, w in experts.items()})
    sources = torch.stack([base, *experts.values()])
    assert (bits(sources) == bits(merged[NAME])).any(0).all()


@pytest.mark.parametrize("method", ["im", "ties_im", "obim"])
def test_one_expert_with_all_of_the_density_comes_back_bit_for_bit(method):
    base, weights = randn(7, 9, seed=1) * 1e6, randn(7, 9)
    merged = merge_stages(checked(method, {"density": 1}), {NAME: base}, {"a": {NAME: weights}})
    assert torch.equal(bits(merged[NAME]), bits(weights))


def test_im_does_not_look_at_names():
    deltas, order = deltas_of(3, 6, 8), ["b", "c", "a"]
    renamed = dict(zip("xyz", deltas.values(), strict=True))
    parameters = {"density": 0.3, "order": order}
    swapped = {"density": 0.3, "order": ["y", "z", "x"]}
    assert torch.equal(merge(checked("im", parameters), deltas), merge(checked("im", swapped), renamed))


def test_im_takes_experts_in_the_listed_order_whatever_order_they_are_given_in():
    deltas, stage = deltas_of(3, 6, 8), checked("im", {"density": 0.3, "order": ["b", "c", "a"]})
    assert torch.equal(merge(stage, deltas), merge(stage, dict(reversed(deltas.items()))))


@pytest.mark.parametrize("block", [0, 1, 2])
def test_rotation_repeats_after_as_many_blocks_as_experts(block):
    deltas = deltas_of(3, 6, 8)
    place, later_place = Place(tuple(deltas), block=block), Place(tuple(deltas), block=block + 3)
    assert_masks(held_by("im", deltas, {}, place=later_place), held_by("im", deltas, {}, place=place))


def test_rotation_lets_each_expert_lead_once_in_as_many_blocks():
    deltas = deltas_of(4, 6, 8)
    independent = {e: held_by("im", {e: delta}, {"density": "1/4"})[e] for e, delta in deltas.items()}
    leaders = []
    for block in range(2, 6):
        claimed_masks = held_by("im", deltas, {}, place=Place(tuple(deltas), block=block))
        leaders += [e for e in deltas if torch.equal(claimed_masks[e], independent[e])]
    assert leaders == ["c", "d", "a", "b"]


def test_rotation_may_count_linear_tensors_instead_of_blocks():
    deltas = deltas_of(2, 6, 8)
    parameters = {"order": {"unit": "linear"}}
    turned = held_by("im", deltas, parameters, place=Place(("a", "b"), block=0, linear=1))
    assert_masks(turned, held_by("im", deltas, {"order": ["b", "a"]}))


def test_more_for_a_later_expert_takes_nothing_from_an_earlier_one():
    deltas = deltas_of(3, 6, 8)
    masks = [
        held_by("im", deltas, {"density": {"a": 0.3, "b": n, "c": 0.1}, "order": "listed"}) for n in (0.1, 0.3, 0.6)
    ]
    assert torch.equal(masks[0]["a"], masks[2]["a"])
    assert (masks[1]["b"] | ~masks[0]["b"]).all()
    assert (masks[2]["b"] | ~masks[1]["b"]).all()


# An expert that left its first three positions unchanged, and one that changed all, the first most.
UNCHANGED = {"a": [0, 0, 0, 5], "b": [9, 2, 3, 4]}


def test_an_unchanged_position_can_be_claimed_and_is_then_lost_to_later_experts():
    stage = checked("im", {"density": 0.5, "order": "listed"})
    assert merge(stage, UNCHANGED).tolist() == [0, 2, 3, 5]


def test_unchanged_positions_may_be_left_to_later_experts():
    stage = checked("im", {"density": 0.5, "order": "listed", "claim_zeros": False})
    assert merge(stage, UNCHANGED).tolist() == [9, 0, 3, 5]


def test_im_refuses_shares_that_add_up_to_more_than_the_whole():
    assert "add up to 1.2" in refused("im", {"density": 0.6})


def test_im_adds_up_shares_at_each_depth():
    crossing = {"density": {"a": [0.7, 0.1], "b": [0.1, 0.7]}}
    assert len(expand(checked("im", crossing), "linear", ("a", "b"))) == 3
    assert "add up to 1.1" in refused("im", {"density": {"a": [0.1, 0.9, 0.1], "b": 0.2}})


def test_im_takes_any_shares_of_what_remains():
    claimed_masks = held_by("im", deltas_of(2, 8), {"density": 1, "ratio_of": "remaining", "order": "listed"})
    assert [int(mask.sum()) for mask in claimed_masks.values()] == [8, 0]


@pytest.mark.parametrize("order", ["rotation", {"first": "b"}])
def test_an_order_that_rotates_cannot_rank_the_whole_model_at_once(order):
    assert "scope: global" in refused("im", {"scope": "global", "order": order})


def test_random_claims_fall_on_all_positions_alike():
    mask = held_by("im", deltas_of(1, 10000), {"density": 0.3, "score": "uniform"})["a"]
    hits = mask.view(100, 100).sum(1).double()
    chi_square = ((hits - 30) ** 2 / (30 * 0.7)).sum()
    assert 50 < chi_square < 160  # 99 degrees of freedom: 99 +- 14


def test_another_seed_claims_other_positions():
    deltas, stage = deltas_of(1, 100), checked("im", {"density": 0.3, "score": "uniform"})
    assert not torch.equal(merge(stage, deltas, seed=0), merge(stage, deltas, seed=1))


@pytest.mark.parametrize(("nonlinear", "factor"), [("average", 0.5), ("base", 0)])
def test_obim_may_average_vectors_or_leave_them(nonlinear, factor):
    deltas = deltas_of(2, 8)
    merged = merge(checked("obim", {"nonlinear": nonlinear}), deltas)
    assert_close(merged, sum(deltas.values()) * factor)


def test_obim_leaves_vectors_at_the_base_for_any_weights():
    parameters = {"nonlinear": "base", "weight": {"a": 1, "b": -1}}
    assert merge(checked("obim", parameters), deltas_of(2, 8)).tolist() == [0] * 8


def test_obim_multiplies_what_it_claims():
    deltas, inputs = deltas_of(2, 6, 8), moments(2, 8)
    once = merge(checked("obim", {}), deltas, inputs=inputs)
    thrice = merge(checked("obim", {"lambda": 1.5, "weight": 2}), deltas, inputs=inputs)
    assert_close(thrice, once * 3)


def test_ties_obm_with_equal_inputs_is_ties():
    deltas, inputs = deltas_of(3, 6, 8), Inputs(second_moment=torch.ones(3, 8), mean=torch.ones(3, 8))
    by_saliency = merge(checked("ties_obm", {"density": 0.4}), deltas, inputs=inputs)
    assert torch.equal(by_saliency, merge(checked("ties", {"density": 0.4, "scope": "tensor"}), deltas))


def test_ties_obm_of_one_expert_is_obim():
    deltas, inputs = deltas_of(1, 6, 8), moments(1, 8)
    merged = [merge(checked(m, {"density": 0.4}), deltas, inputs=inputs) for m in ("ties_obm", "obim")]
    assert torch.equal(*merged)


def test_ties_im_counts_over_the_whole_model():
    shapes = {"layers.2.w": (4, 5), "layers.10.w": (7,), "norm": (3, 3)}
    base = {name: torch.zeros(shape) for name, shape in shapes.items()}
    experts = {e: {name: randn(*shape, seed=i) for name, shape in shapes.items()} for i, e in enumerate("ab")}
    merged = merge_stages(checked("ties_im", {"density": {"a": 0.4, "b": "1/3"}}), base, experts)
    for expert, share in (("a", Fraction(2, 5)), ("b", Fraction(1, 3))):
        assert sum(int((merged[n] == experts[expert][n]).sum()) for n in shapes) == math.floor(share * 36)


def test_ties_im_of_one_tensor_is_obim_with_equal_inputs():
    deltas, inputs = deltas_of(3, 6, 8), Inputs(second_moment=torch.ones(3, 8), mean=torch.ones(3, 8))
    by_saliency = merge(checked("obim", {"density": 0.2, "order": "listed"}), deltas, inputs=inputs)
    assert torch.equal(by_saliency, merge(checked("ties_im", {"density": 0.2}), deltas))


# --- CABS -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "m"), [(0, 4), (1, 4), (3, 4), (2, 8), (5, 16)])
def test_bs_keeps_n_of_every_full_block(n, m):
    mask = kept(checked("bs", {"n": n, "m": m}), deltas_of(1, 6, 11))["a"].flatten()
    full = mask[: 66 // m * m].view(-1, m)
    assert full.sum(1).tolist() == [n] * len(full)
    assert int(mask.sum()) == n * len(full) + n * (66 % m) // m


def test_bs_keeps_everything_when_n_is_m():
    delta = deltas_of(1, 6, 11)
    assert torch.equal(sparse(checked("bs", {"n": 4, "m": 4}), delta)["a"], delta["a"])


def test_bs_with_one_block_is_the_top_of_the_tensor():
    delta = deltas_of(1, 6, 11)
    one_block = kept(checked("bs", {"n": 22, "m": 66}), delta)
    assert_masks(one_block, kept(checked("top", {"density": "1/3"}), delta))


def test_bs_breaks_ties_by_index():
    assert kept(checked("bs", {"n": 2, "m": 4}), {"a": [1, -1, 1, 1]})["a"].tolist() == [True, True, False, False]


def test_bs_keeps_everything_when_n_is_more_than_a_block_holds():
    delta = deltas_of(1, 6, 11)
    assert torch.equal(sparse(checked("bs", {"n": 5, "m": 4}), delta)["a"], delta["a"])


def test_cabs_of_more_than_a_block_holds_leaves_nothing_to_later_experts():
    deltas = deltas_of(2, 6, 11)
    assert torch.equal(merge(checked("cabs", {"n": 5, "m": 4}), deltas), deltas["a"])


EXCLUSIVE = {
    "top": {"density": 0.4},
    "bs": {"n": 2, "m": 5},
    "band": {"drop_low": 0.3, "drop_high": 0.1},
    "sparsegpt": {"density": 0.4},
    "random": {"density": 0.5},
    "magprune": {"density": 0.5},
}


@pytest.mark.parametrize("name", EXCLUSIVE)
def test_exclusive_masks_are_disjoint(name):
    deltas = deltas_of(3, 6, 10)
    masks = kept(checked(name, {**EXCLUSIVE[name], "exclusive": ["c", "a", "b"]}), deltas)
    assert int(sum(mask.int() for mask in masks.values()).max()) == 1


@pytest.mark.parametrize("name", EXCLUSIVE)
def test_the_first_expert_of_an_exclusive_order_keeps_what_it_would_alone(name):
    deltas = deltas_of(3, 6, 10)
    independent = kept(checked(name, EXCLUSIVE[name]), deltas)
    masks = kept(checked(name, {**EXCLUSIVE[name], "exclusive": ["c", "a", "b"]}), deltas)
    assert torch.equal(masks["c"], independent["c"])


@pytest.mark.parametrize("name", ["random", "magprune", "band"])
def test_an_exclusive_draw_loses_only_what_earlier_experts_hold(name):
    deltas = deltas_of(2, 6, 10)
    independent = kept(checked(name, EXCLUSIVE[name]), deltas)
    masks = kept(checked(name, {**EXCLUSIVE[name], "exclusive": "listed"}), deltas)
    assert torch.equal(masks["b"], independent["b"] & ~independent["a"])


def test_cabs_keeps_n_of_every_block_for_each_expert_while_they_fit():
    masks = kept(checked("bs", {"n": 2, "m": 6, "exclusive": "listed"}), deltas_of(3, 6, 6))
    for mask in masks.values():
        assert mask.view(-1, 6).sum(1).tolist() == [2] * 6


def test_cabs_gives_later_experts_what_is_left_when_they_do_not_fit():
    masks = kept(checked("bs", {"n": 4, "m": 6, "exclusive": "listed"}), deltas_of(3, 6, 6))
    assert [int(mask.sum()) for mask in masks.values()] == [24, 12, 0]


def test_cabs_adds_orthogonal_task_vectors():
    deltas = deltas_of(2, 6, 8)
    merged = merge(checked("cabs", {"n": 2, "m": 4}), deltas)
    sparse_deltas = sparse(checked("bs", {"n": 2, "m": 4, "exclusive": "listed"}), deltas)
    assert float((sparse_deltas["a"] * sparse_deltas["b"]).sum()) == 0
    assert_close(merged.square().sum(), sum(delta.square().sum() for delta in sparse_deltas.values()))


def test_cabs_of_one_expert_that_keeps_all_is_the_expert():
    base, weights = randn(4, 8, seed=1) * 1e6, randn(4, 8)
    merged = merge_stages(checked("cabs", {"n": 4, "m": 4}), {NAME: base}, {"a": {NAME: weights}})
    assert torch.equal(bits(merged[NAME]), bits(weights))


def test_cabs_lets_unchanged_positions_occupy_their_block():
    assert merge(checked("cabs", {"n": 2, "m": 4}), UNCHANGED).tolist() == [0, 2, 3, 5]


def test_cabs_may_leave_unchanged_positions_to_later_experts():
    stage = checked("cabs", {"n": 2, "m": 4, "claim_zeros": False})
    assert merge(stage, UNCHANGED).tolist() == [9, 0, 3, 5]


@pytest.mark.parametrize(("n", "m"), [(4, 6), (5, 6), (6, 6), (9, 6), (3, 4)])
def test_low_overlap_keeps_n_of_every_block_and_shares_as_little_as_it_can(n, m):
    masks = kept(checked("low_overlap", {"n": n, "m": m}), deltas_of(2, 6, 8))
    for mask in masks.values():
        assert mask.view(-1, m).sum(1).tolist() == [min(n, m)] * (48 // m)
    assert int((masks["a"] & masks["b"]).sum()) == (2 * min(n, m) - m) * (48 // m)


@pytest.mark.parametrize(("n", "m"), [(2, 6), (1, 4), (2, 7)])
def test_cabs_low_overlap_is_cabs_while_all_experts_fit_into_a_block(n, m):
    deltas, parameters = deltas_of(3, 6, 8), {"n": n, "m": m, "order": ["c", "a", "b"]}
    merged = merge(checked("cabs_low_overlap", parameters), deltas)
    assert torch.equal(merged, merge(checked("cabs", parameters), deltas))


def test_low_overlap_leaves_unchanged_positions_when_told_to():
    experts = {"a": [0, 0, 0, 5], "b": [9, 2, 3, 4]}
    merged = merge(checked("cabs_low_overlap", {"n": 3, "m": 4, "claim_zeros": False}), experts)
    assert merged.tolist() == [9, 2, 3, 5]


# --- averages and sums ----------------------------------------------------------------------------


def test_linear_does_not_care_for_the_order_of_models():
    deltas, weight = deltas_of(3, 6, 8), {"a": 1, "b": 2, "c": 0.5}
    stage = checked("linear", {"weight": weight})
    assert_close(merge(stage, dict(reversed(deltas.items()))), merge(stage, deltas), 1e-6)


@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_linear_returns_equal_models_bit_for_bit(k):
    base, weights = randn(6, 8, seed=1) * 1e3, randn(6, 8)
    merged = merge_stages(checked("linear", {}), {NAME: base}, {e: {NAME: weights} for e in NAMES[:k]})
    assert torch.equal(bits(merged[NAME]), bits(weights))


def test_linear_looks_only_at_the_proportions_of_weights():
    deltas = deltas_of(2, 6, 8)
    once, thrice = ({"weight": {"a": 1 * c, "b": 2 * c}} for c in (1, 3))
    assert torch.equal(merge(checked("linear", once), deltas), merge(checked("linear", thrice), deltas))


def test_linear_does_not_depend_on_the_base():
    deltas = deltas_of(2, 6, 8)
    base = randn(6, 8, seed=1)
    moved = merge(checked("linear", {}), {e: delta - base for e, delta in deltas.items()}, base=base)
    assert_close(moved, merge(checked("linear", {}), deltas))


def test_linear_without_normalizing_is_the_plain_weighted_sum():
    base, deltas = randn(6, 8, seed=1), deltas_of(2, 6, 8)
    stage = checked("linear", {"normalize": False, "weight": {"a": 0.5, "b": 2}})
    expected = 0.5 * (base + deltas["a"]) + 2 * (base + deltas["b"])
    assert_close(merge(stage, deltas, base=base), expected)


@pytest.mark.parametrize("method", ["linear", "mean"])
def test_weights_that_sum_to_zero_have_no_mean(method):
    assert "sum to zero" in refused(method, {"weight": {"a": 1, "b": -1}})


def test_task_arithmetic_at_one_over_k_is_linear():
    deltas = deltas_of(3, 6, 8)
    merged = merge(checked("task_arithmetic", {"lambda": "1/3"}), deltas)
    assert_close(merged, merge(checked("linear", {}), deltas), 1e-6)


def test_adding_and_forgetting_the_same_expert_is_the_base():
    base, delta = randn(6, 8, seed=1), randn(6, 8)
    stage = checked("task_arithmetic", {"weight": {"a": 1, "b": -1}})
    assert torch.equal(bits(merge(stage, {"a": delta, "b": delta}, base=base)), bits(base))


def test_task_arithmetic_is_linear_in_lambda():
    deltas = deltas_of(3, 6, 8)
    low, high = (merge(checked("task_arithmetic", {"lambda": x}), deltas) for x in (0.25, 1))
    assert torch.equal(low * 4, high)


def test_an_experts_own_weight_multiplies_that_of_the_method():
    place = Place(("a", "b"), weights=(Fraction(2), Fraction(1, 2)))
    stage = checked("task_arithmetic", {"weight": {"a": 3, "b": 4}})
    assert merge(stage, {"a": [1], "b": [10]}, place=place).tolist() == [26]


def test_one_expert_alone_is_copied_by_task_arithmetic():
    base, weights = randn(6, 8, seed=1) * 1e6, randn(6, 8)
    merged = merge_stages(checked("task_arithmetic", {}), {NAME: base}, {"a": {NAME: weights}})
    assert torch.equal(bits(merged[NAME]), bits(weights))


# --- SLERP ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("space", ["delta", "weights"])
@pytest.mark.parametrize(("t", "end"), [(0, "a"), (1, "b")])
def test_slerp_ends_at_the_experts_bit_for_bit(space, t, end):
    base, experts = randn(6, 8, seed=1) * 1e6, deltas_of(2, 6, 8)
    stage = checked("slerp", {"t": t, "space": space})
    merged = merge_stages(stage, {NAME: base}, {e: {NAME: w} for e, w in experts.items()})
    assert torch.equal(bits(merged[NAME]), bits(experts[end]))


@pytest.mark.parametrize("t", [0.1, 0.5, 0.8])
def test_slerp_stays_on_the_unit_sphere(t):
    units = {e: delta / delta.norm() for e, delta in deltas_of(2, 6, 8).items()}
    assert_close(merge(checked("slerp", {"t": t}), units).norm(), 1.0)


def test_slerp_is_the_same_from_the_other_end():
    deltas = deltas_of(2, 6, 8)
    reversed_merge = merge(checked("slerp", {"t": 0.7}), {"b": deltas["b"], "a": deltas["a"]})
    assert_close(reversed_merge, merge(checked("slerp", {"t": 0.3}), deltas))


@pytest.mark.parametrize("t", [0.1, 0.3, "1/3"])
def test_slerp_returns_equal_weights_bit_for_bit(t):
    base, weights = randn(6, 8, seed=1), randn(6, 8)
    stage = checked("slerp", {"t": t, "space": "weights"})
    untouched = merge_stages(stage, {NAME: base}, {"a": {NAME: base}, "b": {NAME: base}})
    assert torch.equal(bits(untouched[NAME]), bits(base))
    merged = merge_stages(stage, {NAME: base}, {"a": {NAME: weights}, "b": {NAME: weights}})
    assert_close(merged[NAME], weights, 1e-6)


@pytest.mark.parametrize("delta", [[-3.0, 0], [3.001, 0.01], [0, 0]], ids=["opposite", "parallel", "zero"])
def test_slerp_takes_the_line_where_there_is_no_arc(delta):
    merged = merge(checked("slerp", {"t": 0.25}), {"a": [3, 0], "b": delta})
    assert_close(merged, 0.75 * tensor([3, 0]) + 0.25 * tensor(delta))


def test_slerp_over_the_whole_model_uses_one_angle():
    base = {name: torch.zeros(2) for name in ("v", "w")}
    experts = {
        "a": {"v": tensor([1, 0]), "w": tensor([0, 0])},
        "b": {"v": tensor([1, 0]), "w": tensor([0, 1])},
    }
    merged = merge_stages(checked("slerp", {"scope": "global"}), base, experts)
    angle = math.acos(1 / math.sqrt(2))
    share = math.sin(angle / 2) / math.sin(angle)
    assert_close(torch.cat([merged["v"], merged["w"]]), [2 * share, 0, 0, share])


# --- Multi-SLERP, Karcher, NuSLERP ----------------------------------------------------------------

SPHERICAL = pytest.mark.parametrize("method", ["multislerp", "karcher"])


@SPHERICAL
def test_the_spherical_mean_of_two_of_equal_norm_is_slerp_half_way(method):
    units = {e: 2 * delta / delta.norm() for e, delta in deltas_of(2, 6, 8).items()}
    assert_close(merge(checked(method, {}), units), merge(checked("slerp", {}), units))


@SPHERICAL
def test_the_spherical_mean_is_as_long_as_the_experts_on_average(method):
    deltas = deltas_of(3, 6, 8)
    weights = {"a": 0.25, "b": 0.25, "c": 0.5}
    merged = merge(checked(method, {"weight": weights}), deltas)
    assert_close(merged.norm(), sum(w * deltas[e].norm() for e, w in weights.items()))


@SPHERICAL
def test_the_spherical_mean_looks_only_at_the_proportions_of_weights(method):
    deltas = deltas_of(3, 6, 8)
    once, thrice = ({"weight": {"a": c, "b": 2 * c, "c": c}} for c in (1, 3))
    assert torch.equal(merge(checked(method, once), deltas), merge(checked(method, thrice), deltas))


@pytest.mark.parametrize("space", ["delta", "weights"])
def test_multislerp_may_grow_with_the_sum_of_its_weights(space):
    deltas, weights = deltas_of(3, 4, 5), {"a": 1, "b": 0.5, "c": 0.5}
    stage = {"weight": weights, "space": space}
    once = merge(checked("multislerp", stage), deltas)
    assert_close(merge(checked("multislerp", {**stage, "normalize": False}), deltas), 2 * once)


@SPHERICAL
def test_the_spherical_mean_does_not_care_for_the_order_of_experts(method):
    deltas, stage = deltas_of(3, 6, 8), checked(method, {})
    assert_close(merge(stage, dict(reversed(deltas.items()))), merge(stage, deltas))


@SPHERICAL
def test_the_spherical_mean_turns_with_its_inputs(method):
    turn, _ = torch.linalg.qr(randn(8, 8, seed=3))
    deltas, stage = deltas_of(3, 6, 8), checked(method, {})
    assert_close(merge(stage, {e: delta @ turn for e, delta in deltas.items()}), merge(stage, deltas) @ turn)


@SPHERICAL
@pytest.mark.parametrize("k", [1, 2, 3])
def test_the_spherical_mean_returns_equal_weights_bit_for_bit(method, k):
    base, weights = randn(6, 8, seed=1), randn(6, 8)
    for space, start in (("delta", torch.zeros(6, 8)), ("weights", base)):
        experts = {e: {NAME: weights} for e in NAMES[:k]}
        merged = merge_stages(checked(method, {"space": space}), {NAME: start}, experts)
        assert_close(merged[NAME], weights, 1e-6)
    untouched = merge_stages(checked(method, {"space": "weights"}), {NAME: base}, {e: {NAME: base} for e in "abc"})
    assert torch.equal(bits(untouched[NAME]), bits(base))


@SPHERICAL
def test_an_expert_that_changed_nothing_shortens_the_spherical_mean_but_does_not_turn_it(method):
    assert_close(merge(checked(method, {}), {"a": [3, 0], "b": [0, 3], "c": [0, 0]}), [math.sqrt(2), math.sqrt(2)])


@SPHERICAL
def test_directions_that_cancel_are_averaged_on_the_line(method):
    assert_close(merge(checked(method, {}), {"a": [3, 0], "b": [-1, 0]}), [1, 0])
    assert_close(merge(checked(method, {"weight": {"a": 1, "b": 3}}), {"a": [0, 0], "b": [0, 0]}), [0, 0])


@SPHERICAL
def test_the_spherical_mean_over_the_whole_model_uses_the_models_angles(method):
    base = {"v": torch.zeros(6, 3), "w": torch.zeros(6, 5)}
    deltas = deltas_of(3, 6, 8)
    expert_weights = {e: {"v": delta[:, :3], "w": delta[:, 3:]} for e, delta in deltas.items()}
    merged = merge_stages(checked(method, {"scope": "global"}), base, expert_weights)
    assert_close(torch.cat([merged["v"], merged["w"]], 1), merge(checked(method, {}), deltas))


@pytest.mark.parametrize("spread", [1, 0.01, 0.0001])
def test_at_the_karcher_mean_the_arcs_to_all_experts_balance(spread):
    deltas = {e: delta * spread + randn(6, 8, seed=5) for e, delta in deltas_of(3, 6, 8).items()}
    weights = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
    merged = merge(checked("karcher", {"weight": dict(zip("abc", [2, 3, 5], strict=True))}), deltas)
    middle = merged.double() / merged.double().norm()
    arcs = 0
    for w, delta in zip(weights, deltas.values(), strict=True):
        unit = delta.double() / delta.double().norm()
        across = unit - (unit * middle).sum() * middle
        arcs = arcs + w * torch.atan2(across.norm(), (unit * middle).sum()) * across / across.norm()
    assert float(arcs.norm()) < 1e-6


def test_karcher_that_may_not_search_is_multislerp():
    deltas = deltas_of(3, 6, 8)
    stopped = merge(checked("karcher", {"tol": 1}), deltas)
    assert torch.equal(stopped, merge(checked("multislerp", {}), deltas))


@pytest.mark.parametrize("space", ["delta", "weights"])
def test_nuslerp_of_a_tensor_is_slerp_with_t_from_the_weights(space):
    deltas, base = deltas_of(2, 6, 8), randn(6, 8, seed=1)
    merged = merge(checked("nuslerp", {"weight": {"a": 3, "b": 1}, "space": space}), deltas, base=base)
    assert_close(merged, merge(checked("slerp", {"t": 0.25, "space": space}), deltas, base=base))


@pytest.mark.parametrize("scope", ["row", "column"])
def test_nuslerp_may_go_row_by_row_or_column_by_column(scope):
    deltas = deltas_of(2, 6, 8)
    turned = deltas if scope == "row" else {e: delta.T for e, delta in deltas.items()}
    merged = merge(checked("nuslerp", {"scope": scope}), deltas, slice_elements=16)
    for i, row in enumerate(merged if scope == "row" else merged.T):
        assert_close(row, merge(checked("slerp", {}), {e: delta[i] for e, delta in turned.items()}))


@pytest.mark.parametrize("scope", ["tensor", "row", "column"])
def test_nuslerp_takes_a_vector_as_a_whole(scope):
    deltas = deltas_of(2, 8)
    assert_close(merge(checked("nuslerp", {"scope": scope}), deltas), merge(checked("slerp", {}), deltas))


def test_nuslerp_of_nearly_parallel_vectors_still_follows_the_arc():
    deltas = {"a": [1.0, 0], "b": [math.cos(0.001) * 4, math.sin(0.001) * 4]}
    share = math.sin(0.0005) / math.sin(0.001)
    assert_close(merge(checked("nuslerp", {}), deltas), [share * (1 + 4 * math.cos(0.001)), share * 4e-3], 1e-6)


@pytest.mark.parametrize("delta", [[-3.0, 0], [6, 0], [0, 0]], ids=["opposite", "parallel", "zero"])
def test_nuslerp_takes_the_line_where_there_is_no_arc(delta):
    merged = merge(checked("nuslerp", {"weight": {"a": 3, "b": 1}}), {"a": [3, 0], "b": delta})
    assert_close(merged, 0.75 * tensor([3, 0]) + 0.25 * tensor(delta))


@pytest.mark.parametrize("method", ["nuslerp", "multislerp", "karcher"])
def test_weights_that_sum_to_zero_have_no_place_on_the_sphere(method):
    assert "sum to zero" in refused(method, {"weight": {"a": 1, "b": -1}})


# --- nearswap, Arcee Fusion, RAM ------------------------------------------------------------------


def test_nearswap_interpolates_by_t_over_the_distance():
    base, delta = randn(6, 8, seed=1), deltas_of(1, 6, 8)["a"]
    share = (0.5 / delta.abs()).clamp(0, 1)
    expected = share * (base + delta) + (1 - share) * base
    assert_close(merge(checked("nearswap", {"t": 0.5}), {"a": delta}, base=base), expected)


def test_nearswap_copies_what_is_near():
    base, weights = randn(6, 8, seed=1) * 1e4, randn(6, 8)
    merged = merge_stages(checked("nearswap", {"t": 1e6}), {NAME: base}, {"a": {NAME: weights}})
    assert torch.equal(bits(merged[NAME]), bits(weights))


def test_nearswap_refuses_to_move_away():
    assert "t is -1" in refused("nearswap", {"t": -1}, "a")


def test_arcee_fusion_takes_outliers_of_a_row():
    merged = merge(checked("arcee_fusion", {}), {"a": [9, 0, 0, 1, 1]})
    assert merged.tolist() == [9, 0, 0, 0, 0]


def test_arcee_fusion_of_a_tensor_in_which_every_row_only_moved_as_a_whole_is_the_expert():
    assert merge(checked("arcee_fusion", {}), {"a": torch.full((2, 4), 3.0)}).tolist() == [[3] * 4] * 2


@pytest.mark.parametrize("r", [0, 0.1])
def test_ram_of_one_expert_is_what_it_changed(r):
    deltas = {"a": [5.0, -1e-6, 0, -2]}
    assert merge(checked("ram", {"r": r}), deltas).tolist() == [5, 0, 0, -2]


def test_ram_averages_over_the_experts_that_changed_a_position():
    deltas = {"a": [4, -3, 0, 0], "b": [2, 0, 0, 1e-6], "c": [0, 0, 0, 1]}
    assert merge(checked("ram", {}), deltas).tolist() == [3, -3, 0, 1]


@pytest.mark.parametrize(("scope", "boosts"), [("tensor", [1.5, 1.0]), ("global", [1.125, 1.125])])
def test_ram_plus_scales_what_an_expert_has_alone_by_how_much_it_shares(scope, boosts):
    base = {"v": torch.zeros(2), "w": torch.zeros(3)}
    experts = {
        "a": {"v": tensor([2, 8]), "w": tensor([8, 8, 8])},
        "b": {"v": tensor([4, 0]), "w": tensor([0, 0, 0])},
    }
    merged = merge_stages(checked("ram", {"r": 0.5, "alpha": 1, "scope": scope}), base, experts)
    assert merged["v"].tolist() == [3, 8 * boosts[0]]
    assert merged["w"].tolist() == [8 * boosts[1]] * 3


def test_ram_plus_scales_by_no_more_than_alpha_allows():
    deltas = {"a": [2, 8], "b": [4, 0]}
    assert_close(merge(checked("ram", {"r": 0.1}), deltas), [3, 8 * 1.02])


# --- TIES -----------------------------------------------------------------------------------------


def test_ties_of_agreeing_experts_is_their_mean():
    deltas = {e: delta.abs() for e, delta in deltas_of(3, 6, 8).items()}
    merged = merge(checked("ties", {"density": 1}), deltas)
    assert_close(merged, merge(checked("linear", {}), deltas))


def test_ties_merges_towards_the_elected_sign_and_no_further_than_its_members():
    deltas = deltas_of(3, 6, 8)
    merged = merge(checked("ties", {"density": 1}), deltas)
    assert torch.equal(merged.sign(), sum(deltas.values()).sign())
    assert (merged.abs() <= torch.stack(list(deltas.values())).abs().amax(0) * (1 + 1e-6)).all()


@pytest.mark.parametrize("density", [0, "0.29", "1/3", 1])
def test_ties_keeps_exactly_the_count(density):
    delta = torch.randint(1, 4, (6, 8), generator=torch.Generator().manual_seed(0)).float()
    merged = merge(checked("ties", {"density": density}), {"a": delta})
    assert int((merged != 0).sum()) == math.floor(Fraction(str(density)) * 48)


@pytest.mark.parametrize(("scope", "expected"), [("tensor", 2), ("row", 6)])
def test_a_small_tensor_may_keep_more_than_its_share(scope, expected):
    stage = checked("top", {"density": 0.01, "at_least": 2, "scope": scope})
    assert int(kept(stage, deltas_of(1, 3, 8))["a"].sum()) == expected


def test_nothing_is_kept_at_density_zero_whatever_the_least():
    assert not kept(checked("top", {"density": 0, "at_least": 2}), deltas_of(1, 3, 8))["a"].any()


def test_ties_of_one_whole_expert_is_the_expert():
    base, weights = randn(6, 8, seed=1) * 1e6, randn(6, 8)
    merged = merge_stages(checked("ties", {"density": 1}), {NAME: base}, {"a": {NAME: weights}})
    assert torch.equal(bits(merged[NAME]), bits(weights))


def test_ties_does_not_care_for_the_order_of_experts():
    deltas, stage = deltas_of(3, 6, 8), checked("ties", {"density": 0.5})
    assert_close(merge(stage, dict(reversed(deltas.items()))), merge(stage, deltas), 1e-6)


@pytest.mark.parametrize("choice", ["mean", "sum", "max"])
def test_an_expert_that_changed_nothing_changes_nothing(choice):
    deltas, stage = deltas_of(2, 6, 8), checked("ties", {"density": 0.5, "merge": choice})
    assert torch.equal(merge(stage, {**deltas, "c": torch.zeros(6, 8)}), merge(stage, deltas))


@pytest.mark.parametrize(("choice", "expected"), [("mean", 3), ("sum", 6), ("max", 4)])
def test_what_becomes_of_the_experts_that_agree(choice, expected):
    deltas = {"a": [2], "b": [4], "c": [-5]}
    assert merge(checked("ties", {"density": 1, "merge": choice}), deltas).tolist() == [expected]


@pytest.mark.parametrize(
    ("zero_sign", "expected"), [("zero", [-3, 0, 0]), ("positive", [-3, 1, 0]), ("majority", [-3, -1, 0])]
)
def test_who_wins_where_the_signs_cancel(zero_sign, expected):
    deltas = {"a": [-3, 1, 0], "b": [0, -1, 0]}
    assert merge(checked("ties", {"density": 1, "zero_sign": zero_sign}), deltas).tolist() == expected


@pytest.mark.parametrize(("scope", "expected"), [("tensor", [1.0]), ("global", [-1.0])])
def test_the_majority_may_be_that_of_the_tensor_or_of_the_model(scope, expected):
    base = {"v": torch.zeros(3), "w": torch.zeros(2)}
    experts = {
        "a": {"v": tensor([-1, -1, -1]), "w": tensor([1, 1])},
        "b": {"v": tensor([-1, -1, -1]), "w": tensor([1, -1])},
    }
    stage = checked("ties", {"density": 1, "zero_sign": "majority", "scope": scope})
    assert merge_stages(stage, base, experts)["w"][1:].tolist() == expected


def test_when_every_position_cancels_the_majority_is_nobody():
    stage = checked("ties", {"density": 1, "zero_sign": "majority"})
    assert merge(stage, {"a": [1, -2], "b": [-1, 2]}).tolist() == [0, 0]


def test_an_expert_of_weight_zero_has_no_say():
    stage = checked("ties", {"density": 1, "weight": 0})
    assert merge(stage, {"a": [1, -2]}, base=[5, 5]).tolist() == [5, 5]


def test_weights_enter_the_election():
    stage = checked("ties", {"density": 1, "weight": {"a": 1, "b": 3}})
    assert merge(stage, {"a": [2.0], "b": [-1.0]}).tolist() == [-1]


# --- consensus ------------------------------------------------------------------------------------


def test_consensus_of_any_number_is_task_arithmetic():
    deltas = deltas_of(3, 6, 8)
    merged = merge(checked("consensus_ta", {"k": 0, "lambda": 0.7}), deltas)
    assert torch.equal(merged, merge(checked("task_arithmetic", {"lambda": 0.7}), deltas))


@pytest.mark.parametrize("method", ["consensus_ta", "consensus_ties"])
def test_consensus_of_more_than_all_is_the_base(method):
    assert not merge(checked(method, {"k": 4}), deltas_of(3, 6, 8)).any()


@pytest.mark.parametrize("method", ["consensus_ta", "consensus_ties"])
def test_consensus_holds_fewer_positions_the_more_must_agree(method):
    masks = [merge(checked(method, {"k": k, "lambda_t": 0.3}), deltas_of(3, 6, 8)) != 0 for k in range(5)]
    counts = [int(mask.sum()) for mask in masks]
    assert counts == sorted(counts, reverse=True)
    assert len(set(counts)) > 2
    assert all((subset <= superset).all() for superset, subset in pairwise(masks))


def test_a_smaller_lambda_never_takes_a_position_from_the_consensus():
    strict, loose = (merge(checked("consensus_ta", {"lambda_t": x}), deltas_of(3, 6, 8)) != 0 for x in (0.6, 0.2))
    assert (strict <= loose).all()
    assert int(strict.sum()) < int(loose.sum())


def test_an_expert_of_weight_zero_does_not_count_for_the_consensus():
    deltas = {"a": [5.0, 1], "b": [4.0, 0], "c": [4.0, 3]}
    merged = merge(checked("consensus_ta", {"weight": {"a": 1, "b": 1, "c": 0}, "lambda": 1}), deltas)
    assert merged.tolist() == [9, 0]


# --- Localize-and-Stitch, SCE ---------------------------------------------------------------------


def test_localize_and_stitch_of_everything_is_linear():
    deltas = {**deltas_of(2, 6, 8), "c": torch.zeros(6, 8)}
    merged = merge(checked("localize_stitch", {"density": 1}), deltas)
    assert_close(merged, merge(checked("linear", {}), deltas), 1e-6)


def test_localize_and_stitch_adds_what_does_not_overlap():
    deltas = {"a": [9, 8, 1, 0], "b": [0, 1, -7, -6]}
    assert merge(checked("localize_stitch", {"density": 0.5}), deltas).tolist() == [9, 8, -7, -6]


def test_localize_and_stitch_returns_equal_experts_bit_for_bit():
    delta = randn(6, 8)
    merged = merge(checked("localize_stitch", {"density": 0.3}), dict.fromkeys(NAMES[:3], delta))
    assert torch.equal(merged, sparse(checked("top", {"density": 0.3}), {"a": delta})["a"])


def test_localize_and_stitch_takes_an_unchanged_position_when_nothing_else_is_left():
    merged = merge(checked("localize_stitch", {"density": 1}), {"a": [2, 0], "b": [4, 6]})
    assert merged.tolist() == [3, 3]


def test_sce_of_equal_experts_is_the_expert_or_when_it_must_choose_the_base():
    deltas = dict.fromkeys(NAMES[:3], randn(6, 8))
    assert_close(merge(checked("sce", {"select_topk": 1}), deltas), deltas["a"], 1e-6)
    assert not merge(checked("sce", {"select_topk": 0.5}), deltas).any()


def test_sce_of_one_expert_has_nothing_to_choose_from():
    assert not merge(checked("sce", {"select_topk": 0.5}), deltas_of(1, 6, 8)).any()


def test_sce_elects_plus_where_the_signs_cancel():
    merged = merge(checked("sce", {"select_topk": 1}), {"a": [2, -3], "b": [-2, 3]})
    assert merged.tolist() == [2, 3]


def test_sce_takes_its_share_of_the_positions_where_experts_differ():
    deltas = {"a": [5, 5, 5, 5, 1, 2, 3, 4], "b": [5, 5, 5, 5, 0, 0, 0, 0]}
    merged = merge(checked("sce", {"select_topk": 0.5}), deltas)
    assert merged.tolist() == [0, 0, 0, 0, 0, 0, 3, 4]


def test_sce_may_weigh_small_task_vectors_evenly():
    deltas = {"a": [3e-4, 1e-4], "b": [1e-4, 1e-4]}  # mean squares of 5e-8 and 1e-8
    assert_close(merge(checked("sce", {"select_topk": 1, "even_below": 1e-6}), deltas) * 1e4, [2, 1])
    assert_close(merge(checked("sce", {"select_topk": 1, "even_below": 1e-8}), deltas) * 1e4, [16 / 6, 1])


def test_sce_weighs_small_task_vectors_by_their_squares_too():
    deltas = {"a": [3e-6, 1e-6], "b": [1e-6, 1e-6]}
    assert_close(merge(checked("sce", {"select_topk": 1}), deltas) * 1e6, [(10 * 3 + 2 * 1) / 12, 1])


# --- PCB ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["paper", "official"])
def test_pcb_stays_between_the_experts_and_leaves_the_rest_at_the_base(variant):
    deltas = deltas_of(3, 6, 8)
    merged = merge(checked("pcb", {"density": 0.2, "variant": variant}), deltas)
    vectors = torch.stack(list(deltas.values()))
    mask = merged != 0
    assert 48 * 0.2 < int(mask.sum()) < 48 * 0.6 + 1
    assert (merged[mask] <= vectors.amax(0)[mask] + 1e-6).all()
    assert (merged[mask] >= vectors.amin(0)[mask] - 1e-6).all()


@pytest.mark.parametrize("variant", ["paper", "official"])
def test_pcb_does_not_care_for_the_order_of_experts(variant):
    deltas, stage = deltas_of(3, 6, 8), checked("pcb", {"density": 0.4, "variant": variant})
    assert_close(merge(stage, dict(reversed(deltas.items()))), merge(stage, deltas))


def test_pcb_of_one_expert_is_what_it_keeps():
    deltas = deltas_of(1, 6, 8)
    merged = merge(checked("pcb", {"density": 0.3}), deltas)
    assert torch.equal(merged, sparse(checked("top", {"density": 0.3}), deltas)["a"])


@pytest.mark.parametrize("variant", ["paper", "official"])
def test_pcb_may_balance_over_the_whole_model(variant):
    base = {"layers.2.w": torch.zeros(3, 4), "layers.10.w": torch.zeros(5, 4)}
    deltas = deltas_of(3, 8, 4)
    experts = {e: {"layers.2.w": delta[:3], "layers.10.w": delta[3:]} for e, delta in deltas.items()}
    parameters = {"density": 0.4, "variant": variant}
    merged = merge_stages(checked("pcb", {**parameters, "scope": "global"}), base, experts, slice_elements=4)
    expected = merge(checked("pcb", {**parameters, "scope": "tensor"}), deltas)
    assert torch.equal(torch.cat([merged["layers.2.w"], merged["layers.10.w"]]), expected)


def test_pcb_of_equal_changes_has_no_winner():
    merged = merge(checked("pcb", {"density": 0.5}), {"a": [2, 2, 2, 2], "b": [2, 2, 2, 2]})
    assert merged.tolist() == [2, 2, 0, 0]
    assert not merge(checked("pcb", {"density": 0.5, "variant": "official"}), {"a": [2, 2], "b": [2, 2]}).any()


# --- weights from norms and angles ----------------------------------------------------------------


def coefficients(method, parameters, k=3):
    """What a weighting gives each of k task vectors that share no position; each is 1, 2, .. k long."""
    deltas = {e: torch.diag(torch.eye(k)[i] * (i + 1)) for i, e in enumerate(NAMES[:k])}
    merged = merge(checked(method, parameters), deltas, slice_elements=k)
    return merged.diagonal() / torch.arange(1, k + 1)


def test_metagpt_weighs_by_the_squared_norm():
    assert_close(coefficients("metagpt", {}), [1 / 14, 4 / 14, 9 / 14])


def test_metagpt_over_the_model_and_by_tensor():
    base = {"v": torch.zeros(1), "w": torch.zeros(1)}
    experts = {"a": {"v": tensor([1]), "w": tensor([2])}, "b": {"v": tensor([3]), "w": tensor([0])}}
    by_model = merge_stages(checked("metagpt", {}), base, experts)
    assert_close(torch.cat([by_model["v"], by_model["w"]]), [(5 * 1 + 9 * 3) / 14, 5 * 2 / 14])
    by_tensor = merge_stages(checked("metagpt", {"scope": "tensor"}), base, experts)
    assert_close(torch.cat([by_tensor["v"], by_tensor["w"]]), [(1 * 1 + 9 * 3) / 10, 2])


@pytest.mark.parametrize("method", ["metagpt", "model_stock"])
@pytest.mark.parametrize("k", [2, 3, 5])
def test_equal_experts_come_back_bit_for_bit(method, k):
    base, weights = randn(6, 8, seed=1), randn(6, 8)
    merged = merge_stages(checked(method, {}), {NAME: base}, {e: {NAME: weights} for e in NAMES[:k]})
    assert torch.equal(bits(merged[NAME]), bits(weights))


def test_nan_weighs_by_the_inverse_norm_and_its_coefficients_add_up_to_half_the_experts():
    result = coefficients("nan", {})
    assert_close(result, [1.5 * 6 / 11, 1.5 * 3 / 11, 1.5 * 2 / 11])
    assert_close(result.sum(), 1.5)


def test_nan_of_equal_norms_is_half_of_each():
    units = {e: delta / delta.norm() for e, delta in deltas_of(4, 6, 8).items()}
    assert_close(merge(checked("nan", {}), units), sum(units.values()) / 2)


def test_nan_of_another_power_weighs_more_steeply():
    assert_close(coefficients("nan", {"power": 2}, 2), [4 / 5, 1 / 5])


def test_nan_leaves_out_an_expert_that_changed_nothing():
    merged = merge(checked("nan", {}), {"a": [3, 0], "b": [0, 6], "c": [0, 0]})
    assert_close(merged, [3, 3])


def test_nan_may_measure_the_weights_themselves():
    merged = merge(checked("nan", {"norm_of": "weights"}), {"a": [2.0, 0], "b": [0, 3]}, base=[1.0, 0])
    norms = 3, math.sqrt(1 + 9)
    assert_close(merged - tensor([1, 0]), [2 * norms[1] / sum(norms), 3 * norms[0] / sum(norms)])


def test_model_stock_of_orthogonal_task_vectors_is_the_base():
    assert not merge(checked("model_stock", {}), {"a": [1, 0, 0], "b": [0, 2, 0], "c": [0, 0, 3]}).any()


@pytest.mark.parametrize("scope", ["tensor", "row"])
def test_model_stock_turns_with_its_inputs(scope):
    turn, _ = torch.linalg.qr(randn(8, 8, seed=3))
    deltas = {e: delta + 1 for e, delta in deltas_of(3, 6, 8).items()}
    stage = checked("model_stock", {"scope": scope})
    turned = merge(stage, {e: delta @ turn for e, delta in deltas.items()})
    assert_close(turned, merge(stage, deltas) @ turn)


def test_model_stock_by_row_is_model_stock_of_each_row():
    deltas = deltas_of(3, 6, 8)
    merged = merge(checked("model_stock", {"scope": "row"}), deltas, slice_elements=16)
    for i, row in enumerate(merged):
        expected = merge(checked("model_stock", {}), {e: delta[i] for e, delta in deltas.items()})
        assert_close(row, expected, 1e-6)


def test_model_stock_by_column_is_model_stock_of_each_column():
    deltas, stage = deltas_of(3, 6, 8), checked("model_stock", {"scope": "column"})
    by_row = merge(checked("model_stock", {"scope": "row"}), {e: delta.T.contiguous() for e, delta in deltas.items()})
    assert_close(merge(stage, deltas, slice_elements=16), by_row.T, 1e-6)


@pytest.mark.parametrize("scope", ["row", "column"])
def test_model_stock_takes_a_vector_as_a_whole(scope):
    deltas = deltas_of(3, 8)
    assert_close(
        merge(checked("model_stock", {"scope": scope}), deltas), merge(checked("model_stock", {}), deltas), 1e-6
    )


@pytest.mark.parametrize(("clamp", "t"), [(False, -3), (True, 0)])
def test_model_stock_of_opposed_task_vectors_goes_back_unless_clamped(clamp, t):
    merged = merge(checked("model_stock", {"clamp": clamp}), {"a": [2.5, 0], "b": [-0.3, 0.4]})
    assert_close(merged, t * tensor([1.1, 0.2]))  # the cosine is -0.6


def test_model_stock_stays_at_the_base_where_the_line_has_no_length():
    assert not merge(checked("model_stock", {}), {"a": [2, 0], "b": [-1, 0]}).any()


# --- DARE and DELLA -------------------------------------------------------------------------------


def test_dare_divides_what_it_keeps_by_the_density():
    deltas = deltas_of(1, 20, 20)
    thinned = sparse(checked("random", {"density": 0.3}), deltas)["a"]
    assert torch.equal(thinned, torch.where(thinned != 0, deltas["a"] / 0.3, 0))


@pytest.mark.parametrize("density", [0.1, 0.5, 0.9])
def test_dare_keeps_about_the_density(density):
    mask = kept(checked("random", {"density": density}), deltas_of(1, 100, 100))["a"]
    assert abs(mask.float().mean() - density) < 4 * math.sqrt(density * (1 - density) / 10000)


@pytest.mark.parametrize("method", ["dare_linear", "della_linear"])
def test_dropping_at_random_is_right_on_average(method):
    delta = tensor([[4, -3, 1, 0.5]])
    copies = {f"seed {i}": delta for i in range(2000)}
    parameters = {"density": 0.5, "weight": "1/2000", "lambda": 1}
    assert_close(merge(checked(method, parameters), copies), delta, 0.1)


def test_dare_at_full_density_is_the_identity():
    deltas = deltas_of(2, 6, 8)
    assert torch.equal(merge(checked("dare_linear", {"density": 1}), deltas), merge(checked("sum", {}), deltas))


@pytest.mark.parametrize("rescale", ["inverse", "l1", "l2", "none"])
def test_dare_at_density_zero_is_the_base(rescale):
    parameters = {"density": 0, "rescale": rescale}
    assert merge(checked("dare_linear", parameters), deltas_of(2, 8)).tolist() == [0] * 8


def test_an_experts_draws_do_not_depend_on_the_others():
    deltas, stage = deltas_of(3, 6, 8), checked("random", {"density": 0.5})
    assert torch.equal(kept(stage, deltas)["b"], kept(stage, {"b": deltas["b"]})["b"])


@pytest.mark.parametrize(("by", "power"), [("l1", 1), ("l2", 2)])
def test_a_thinned_task_vector_gets_its_norm_back(by, power):
    deltas = deltas_of(1, 6, 8)
    merged = merge(checked("dare_linear", {"density": 0.5, "rescale": by}), deltas)
    assert_close(merged.norm(power), deltas["a"].norm(power))


def test_dare_ties_elects_among_what_was_kept():
    deltas = deltas_of(3, 6, 8)
    sparse_deltas = sparse(checked("random", {"density": 0.5}), deltas)
    merged = merge(checked("dare_ties", {"density": 0.5}), deltas)
    assert torch.equal(merged, merge(checked("sign_elect", {}), sparse_deltas))


def drop_rates(delta, density, epsilon, **options):
    """DELLA's drop probabilities, read off the rescaling of ones that are all kept."""
    unit = torch.ones(1, *delta.shape)
    shares = [Fraction(density)]
    rescaled = magprune(
        unit,
        delta[None].abs(),
        lambda purpose: unit,
        density=shares,
        epsilon=[Fraction(epsilon)],
        **options,
    )
    return 1 - 1 / rescaled[0]


def test_della_drops_small_deltas_more_often():
    delta = randn(5, 9)
    rates = drop_rates(delta, "0.6", "0.3")
    for row, drop in zip(delta.abs(), rates, strict=True):
        assert (drop[row.argsort()].diff() <= 0).all()


@pytest.mark.parametrize("rank_norm", ["n", "n-1"])
def test_della_drops_within_its_window(rank_norm):
    rates = drop_rates(randn(5, 9), "0.6", "0.3", rank_norm=rank_norm)
    assert rates.min() > 0.25 - 1e-6
    assert rates.max() < 0.55 + 1e-6


def test_della_spaced_by_n_minus_1_drops_the_density_on_average():
    assert_close(drop_rates(randn(5, 9), "0.6", "0.3", rank_norm="n-1").mean(1), [0.4] * 5)


def test_della_may_rank_the_whole_tensor():
    delta = randn(5, 9)
    rates = drop_rates(delta, "0.6", "0.3", scope="tensor").flatten()
    assert (rates[delta.abs().flatten().argsort()].diff() < 0).all()


@pytest.mark.parametrize(("rank_norm", "expected"), [("n", 0.25), ("n-1", 0.4)])
def test_della_of_a_row_of_one(rank_norm, expected):
    assert_close(drop_rates(tensor([[7]]), "0.6", "0.3", rank_norm=rank_norm), [[expected]])


def test_della_without_a_window_keeps_as_dare_does():
    mask = kept(checked("magprune", {"density": 0.7, "epsilon": 0}), deltas_of(1, 30, 30))["a"]
    draws = uniforms((0, "della", NAME, "a"), 0, 900).view(30, 30)
    assert torch.equal(mask, draws >= torch.tensor(0.3))


def test_della_may_have_a_window_for_each_expert():
    stage = checked("magprune", {"density": {"a": 1, "b": 0.5}, "epsilon": {"a": 0, "b": 0.4}, "rescale": "none"})
    masks = kept(stage, deltas_of(2, 30, 30))
    assert masks["a"].all()
    assert 0.45 < masks["b"].float().mean() < 0.55


@pytest.mark.parametrize("density", [1, 0.95, 0.05, 0])
def test_della_refuses_a_window_that_leaves_the_unit_interval(density):
    assert "drop rates from" in refused("della", {"density": density, "epsilon": 0.2})


# --- Breadcrumbs ----------------------------------------------------------------------------------


@pytest.mark.parametrize("d", [1, 7, 48, 300])
@pytest.mark.parametrize(("low", "high"), [("0.85", "0.01"), ("1/3", "0.29"), ("0", "0.5")])
def test_breadcrumbs_keeps_what_neither_end_takes(d, low, high):
    mask = kept(checked("band", {"drop_low": low, "drop_high": high}), deltas_of(1, d))["a"]
    expected = d - math.floor(Fraction(low) * d) - math.floor(Fraction(high) * d)
    assert int(mask.sum()) == expected > 0


def test_breadcrumbs_keeps_the_middle():
    delta = deltas_of(1, 100)["a"]
    mask = kept(checked("band", {"drop_low": 0.5, "drop_high": 0.1}), {"a": delta})["a"]
    ranked = delta.abs().sort(descending=True).values
    assert delta[mask].abs().max() == ranked[10]
    assert delta[mask].abs().min() == ranked[49]


def test_breadcrumbs_without_outliers_is_magnitude():
    deltas = deltas_of(2, 6, 8)
    masks = kept(checked("band", {"drop_low": 0.7, "drop_high": 0}), deltas)
    assert_masks(masks, kept(checked("top", {"density": 0.3125}), deltas))  # 48 - floor(33.6) = 15 of 48


def test_breadcrumbs_may_work_row_by_row():
    masks = kept(checked("band", {"drop_low": 0.5, "drop_high": 0.25, "scope": "row"}), deltas_of(1, 6, 8))
    assert masks["a"].sum(1).tolist() == [2] * 6


@pytest.mark.parametrize("d", [1, 7, 64, 300])
@pytest.mark.parametrize(
    ("density", "high"), [("0.9", "0.01"), ("0.29", "1/3"), ("0.95", "0.5"), ("0", "0.1"), ("1", "1")]
)
def test_the_middle_is_exactly_the_density(d, density, high):
    delta = deltas_of(1, d)["a"]
    mask = kept(checked("middle", {"density": density, "drop_high": high}), {"a": delta})["a"]
    keep = math.floor(Fraction(density) * d)
    above = min(math.floor(Fraction(high) * d), d - keep)
    assert mask.tolist() == [i in delta.abs().argsort(descending=True)[above : above + keep] for i in range(d)]


def test_the_middle_may_be_that_of_each_row():
    masks = kept(checked("middle", {"density": 0.5, "drop_high": 0.25, "scope": "row"}), deltas_of(1, 6, 8))
    assert masks["a"].sum(1).tolist() == [4] * 6


def test_breadcrumbs_refuses_to_drop_everything():
    assert "leave nothing" in refused("breadcrumbs", {"drop_low": 0.9, "drop_high": 0.1})


# --- oracles: the formula, one element at a time ----------------------------------------------------


def top_of(scores, count, free=None):
    """Flat positions of the highest scores, the earlier first among equals."""
    positions = range(len(scores)) if free is None else free
    return sorted(positions, key=lambda i: -scores[i])[:count]


def claimed_in_turn(scores, counts, order):
    claims, masks = set(), [[] for _ in scores]
    for k in order:
        masks[k] = top_of(scores[k], counts[k], [i for i in range(len(scores[k])) if i not in claims])
        claims |= set(masks[k])
    return masks


def kept_only(deltas, masks):
    sparse = numpy.zeros_like(deltas)
    for k, mask in enumerate(masks):
        sparse[k, mask] = deltas[k, mask]
    return sparse


def elect(deltas, weights, rule="mean"):
    merged = numpy.zeros(deltas.shape[1])
    for i in range(deltas.shape[1]):
        sign = numpy.sign(sum(w * d for w, d in zip(weights, deltas[:, i], strict=True)))
        agree = [(w, d) for w, d in zip(weights, deltas[:, i], strict=True) if d != 0 and numpy.sign(d) == sign]
        if not agree:
            continue
        total = sum(w * d for w, d in agree)
        values = {
            "sum": total,
            "mean": total / sum(w for w, _ in agree),
            "max": sign * max(abs(d) for _, d in agree),
        }
        merged[i] = values[rule]
    return merged


@pytest.fixture(params=[0, 1, 2])
def drawn(request):
    """Task vectors of three experts with a few equal magnitudes, as a dictionary and as [k n] float64."""
    coarse = (randn(3, 7, 10, seed=request.param) * 8).round() / 8
    deltas = dict(zip("abc", coarse, strict=True))
    return deltas, coarse.flatten(1).double().numpy()


WEIGHTS = {"a": 1, "b": 0.5, "c": 2}


def test_linear_oracle(drawn):
    deltas, flat = drawn
    expected = (flat[0] + 0.5 * flat[1] + 2 * flat[2]) / 3.5
    assert_close(merge(checked("linear", {"weight": WEIGHTS}), deltas).flatten(), expected)


def test_task_arithmetic_oracle(drawn):
    deltas, flat = drawn
    expected = 0.7 * (flat[0] + 0.5 * flat[1] + 2 * flat[2])
    stage = checked("task_arithmetic", {"weight": WEIGHTS, "lambda": 0.7})
    assert_close(merge(stage, deltas).flatten(), expected)


@pytest.mark.parametrize("t", [0.2, 0.5])
def test_slerp_oracle(drawn, t):
    deltas, flat = drawn
    norms = [math.sqrt(sum(x * x for x in flat[k])) for k in (0, 1)]
    angle = math.acos(sum(x * y for x, y in zip(flat[0], flat[1], strict=True)) / (norms[0] * norms[1]))
    expected = (math.sin((1 - t) * angle) * flat[0] + math.sin(t * angle) * flat[1]) / math.sin(angle)
    pair = {"a": deltas["a"], "b": deltas["b"]}
    assert_close(merge(checked("slerp", {"t": t}), pair, slice_elements=30).flatten(), expected)


@pytest.mark.parametrize("rule", ["mean", "sum", "max"])
def test_ties_oracle(drawn, rule):
    deltas, flat = drawn
    trimmed = kept_only(flat, [top_of(abs(vector), 28) for vector in flat])
    stage = checked("ties", {"density": 0.4, "weight": WEIGHTS, "lambda": 0.7, "merge": rule})
    expected = 0.7 * elect(trimmed, WEIGHTS.values(), rule)
    assert_close(merge(stage, deltas, slice_elements=20).flatten(), expected)


def test_ties_obm_oracle(drawn):
    deltas, flat = drawn
    tokens = randn(3, 12, 10, seed=5)
    h = tokens.double().square().mean(1).repeat(1, 7).numpy()
    trimmed = kept_only(flat, [top_of(numpy.float32(h[k] * flat[k] ** 2), 28) for k in range(3)])
    merged = merge(checked("ties_obm", {"density": 0.4}), deltas, inputs=inputs_of(tokens))
    assert_close(merged.flatten(), elect(trimmed, [1, 1, 1]))


def test_obim_oracle(drawn):
    deltas, flat = drawn
    tokens = randn(3, 12, 10, seed=5)
    h = tokens.double().square().mean(1).repeat(1, 7).numpy()
    masks = claimed_in_turn([numpy.float32(h[k] * flat[k] ** 2) for k in range(3)], [14, 23, 28], [1, 2, 0])
    stage = checked("obim", {"density": {"a": 0.2, "b": "1/3", "c": 0.4}})
    place = Place(("a", "b", "c"), block=4)
    merged = merge(stage, deltas, inputs=inputs_of(tokens), place=place, slice_elements=20)
    assert merged.flatten().tolist() == kept_only(flat, masks).sum(0).tolist()


def test_im_at_random_oracle(drawn):
    deltas, flat = drawn
    scores = [uniforms((7, "im-random", NAME, e), 0, 70, double=True).float().tolist() for e in "abc"]
    masks = claimed_in_turn(scores, [23, 23, 23], [0, 1, 2])
    merged = merge(checked("im", {"score": "uniform"}), deltas, seed=7, slice_elements=20)
    assert merged.flatten().tolist() == kept_only(flat, masks).sum(0).tolist()


def test_ties_im_oracle(drawn):
    _, flat = drawn
    expert_weights = {
        e: {"layers.2.w": tensor(vector[:40]).view(4, 10), "layers.10.w": tensor(vector[40:]).view(3, 10)}
        for e, vector in zip("abc", flat, strict=True)
    }
    base = {name: torch.zeros_like(values) for name, values in expert_weights["a"].items()}
    masks = claimed_in_turn([abs(vector) for vector in flat], [21, 21, 21], [2, 0, 1])
    stage = checked("ties_im", {"density": 0.3, "order": ["c", "a", "b"]})
    merged = merge_stages(stage, base, expert_weights, slice_elements=20)
    merged_values = torch.cat([merged["layers.2.w"].flatten(), merged["layers.10.w"].flatten()])
    assert merged_values.tolist() == kept_only(flat, masks).sum(0).tolist()


def test_dare_oracle(drawn):
    deltas, flat = drawn
    expected = numpy.zeros(70)
    for k, expert in enumerate("abc"):
        draws = uniforms((3, "dare", NAME, expert), 0, 70).tolist()
        expected += [delta / 0.25 if u >= 0.75 else 0 for u, delta in zip(draws, flat[k], strict=True)]
    merged = merge(checked("dare_linear", {"density": 0.25}), deltas, seed=3, slice_elements=20)
    assert_close(merged.flatten(), expected)


def test_della_oracle(drawn):
    deltas, flat = drawn
    pruned = numpy.zeros_like(flat)
    for k, expert in enumerate("abc"):
        draws = uniforms((0, "della", NAME, expert), 0, 70).tolist()
        for row in range(7):
            ranked = top_of(abs(flat[k]), 10, range(10 * row, 10 * row + 10))
            for rank, i in enumerate(ranked):
                drop = 0.4 - 0.3 / 2 + 0.3 * rank / 10
                pruned[k, i] = flat[k, i] / (1 - drop) if draws[i] >= drop else 0
    stage = checked("della", {"density": 0.6, "epsilon": 0.3})
    assert_close(merge(stage, deltas, slice_elements=20).flatten(), 1.1 * elect(pruned, [1, 1, 1]))


def test_breadcrumbs_oracle(drawn):
    deltas, flat = drawn
    masks = [top_of(abs(vector), 70 - 42)[7:] for vector in flat]
    stage = checked("breadcrumbs", {"drop_low": 0.6, "drop_high": 0.1, "lambda": 0.5})
    expected = 0.5 * kept_only(flat, masks).sum(0)
    assert_close(merge(stage, deltas, slice_elements=20).flatten(), expected)


def test_cabs_oracle(drawn):
    deltas, flat = drawn
    masks, claims = [[], [], []], set()
    for k in (2, 0, 1):
        for start in range(0, 70, 8):
            block = [i for i in range(start, min(start + 8, 70)) if i not in claims]
            masks[k] += top_of(abs(flat[k]), 3 if start + 8 <= 70 else 3 * 6 // 8, block)
        claims |= set(masks[k])
    stage = checked("cabs", {"n": 3, "m": 8, "order": ["c", "a", "b"], "lambda": {"a": 1, "b": 2, "c": 0.5}})
    sparse_deltas = kept_only(flat, masks)
    expected = sparse_deltas[0] + 2 * sparse_deltas[1] + 0.5 * sparse_deltas[2]
    assert_close(merge(stage, deltas, slice_elements=40).flatten(), expected)


def test_cabs_low_overlap_oracle(drawn):
    deltas, flat = drawn
    masks, claims = [[], [], []], set()
    for k in (2, 0, 1):
        for start in range(0, 70, 8):
            block = range(start, min(start + 8, 70))
            count = 5 if len(block) == 8 else 5 * 6 // 8
            first_choice = top_of(abs(flat[k]), count, [i for i in block if i not in claims])
            masks[k] += first_choice + top_of(
                abs(flat[k]), count - len(first_choice), [i for i in block if i in claims]
            )
        claims |= set(masks[k])
    sparse_deltas = kept_only(flat, masks)
    stage = checked(
        "cabs_low_overlap", {"n": 5, "m": 8, "order": ["c", "a", "b"], "lambda": {"a": 1, "b": 2, "c": 0.5}}
    )
    assert_close(
        merge(stage, deltas, slice_elements=40).flatten(),
        sparse_deltas[0] + 2 * sparse_deltas[1] + 0.5 * sparse_deltas[2],
    )


def in_consensus(deltas, merged, share, minimum):
    """Where at least ``minimum`` of the deltas are no smaller than their ``share`` of what the others make of it."""
    return [
        sum(abs(d) >= share * abs(m - d) for d in column) >= minimum for column, m in zip(deltas.T, merged, strict=True)
    ]


def test_consensus_ta_oracle(drawn):
    deltas, flat = drawn
    weighted = flat * [[1], [0.5], [2]]
    merged = weighted.sum(0)
    expected = 0.3 * merged * in_consensus(weighted, merged, 0.4, 2)
    stage = checked("consensus_ta", {"weight": WEIGHTS})
    assert_close(merge(stage, deltas, slice_elements=20).flatten(), expected)


def test_consensus_ties_oracle(drawn):
    deltas, flat = drawn
    merged = elect(kept_only(flat, [top_of(abs(vector), 14) for vector in flat]), [1, 1, 1], "sum")
    expected = 0.7 * merged * in_consensus(flat, merged, 0.5, 2)
    stage = checked("consensus_ties", {"lambda_t": 0.5, "lambda": 0.7})
    assert_close(merge(stage, deltas, slice_elements=20).flatten(), expected)


def test_localize_and_stitch_oracle(drawn):
    deltas, flat = drawn
    masks = [top_of(abs(vector), count) for vector, count in zip(flat, [14, 28, 23], strict=True)]
    expected = numpy.zeros(70)
    for i in range(70):
        held = [flat[k, i] for k in range(3) if i in masks[k]]
        expected[i] = sum(held) / len(held) if held else 0
    stage = checked("localize_stitch", {"density": {"a": 0.2, "b": 0.4, "c": "1/3"}})
    assert_close(merge(stage, deltas, slice_elements=20).flatten(), expected)


@pytest.mark.parametrize("in_merge", [True, False])
def test_sce_oracle(drawn, in_merge):
    deltas, flat = drawn
    variance = flat.var(0)
    selection = kept_only(flat, [top_of(numpy.float32(variance), int((variance > 0).sum() * 0.4))] * 3)
    weights = (selection**2).mean(1) / (selection**2).mean(1).sum()
    expected = numpy.zeros(70)
    for i, column in enumerate((selection if in_merge else flat).T):
        agree = [(w, d) for w, d in zip(weights, column, strict=True) if (d > 0 if column.sum() >= 0 else d < 0)]
        expected[i] = sum(w * d for w, d in agree) / sum(w for w, _ in agree) if agree else 0
    stage = checked("sce", {"select_topk": 0.4, "select_in_merge": in_merge})
    assert_close(merge(stage, deltas, slice_elements=20).flatten(), expected)


def to_unit(values):
    span = values.max() - values.min()
    return (values - values.min()) / span if span else values * 0


def softmax(values):
    return numpy.exp(values) / numpy.exp(values).sum()


def test_pcb_paper_oracle(drawn):
    deltas, flat = drawn
    beta = [softmax(3 * to_unit(d**2)) * sum(softmax(to_unit(d * vector)) for vector in flat) for d in flat]
    sparse_scores = kept_only(numpy.array(beta), [top_of(numpy.float32(row), 28) for row in beta])
    total = sparse_scores.sum(0)
    expected = 0.7 * (sparse_scores * flat).sum(0) / numpy.where(total > 0, total, 1)
    stage = checked("pcb", {"density": 0.4, "lambda": 0.7})
    assert_close(merge(stage, deltas, slice_elements=20).flatten(), expected)


def test_pcb_official_oracle(drawn):
    deltas, flat = drawn
    clamped = numpy.sign(flat) * [numpy.clip(abs(d), sorted(abs(d))[0], sorted(abs(d))[68]) for d in flat]
    weights = numpy.zeros_like(flat)
    for k, magnitude in enumerate(abs(clamped)):
        score = numpy.exp(3 * to_unit(magnitude) ** 2) * numpy.tanh(flat[k] * flat.sum(0))
        weights[k] = to_unit(numpy.maximum(score, sorted(score)[42]))
    expected = (weights * clamped).sum(0) / numpy.maximum(weights.sum(0), 1e-12)
    stage = checked("pcb", {"density": 0.4, "variant": "official"})
    assert_close(merge(stage, deltas, slice_elements=20).flatten(), expected)


def test_metagpt_oracle(drawn):
    deltas, flat = drawn
    squares = (flat**2).sum(1)
    expected = (squares[:, None] * flat).sum(0) / squares.sum()
    assert_close(merge(checked("metagpt", {}), deltas, slice_elements=20).flatten(), expected)


def test_nan_oracle(drawn):
    deltas, flat = drawn
    inverse = 1 / numpy.sqrt((flat**2).sum(1))
    expected = 1.5 * (inverse[:, None] * flat).sum(0) / inverse.sum()
    assert_close(merge(checked("nan", {}), deltas, slice_elements=20).flatten(), expected)


def test_model_stock_oracle(drawn):
    deltas, flat = drawn
    flat = flat + 0.5
    moved = {e: delta + 0.5 for e, delta in deltas.items()}
    units = flat / numpy.sqrt((flat**2).sum(1, keepdims=True))
    c = (units[0] @ units[1] + units[0] @ units[2] + units[1] @ units[2]) / 3
    expected = 3 * c / (1 + 2 * c) * flat.mean(0)
    assert_close(merge(checked("model_stock", {}), moved, slice_elements=20).flatten(), expected)


def test_arcee_fusion_oracle(drawn):
    deltas, flat = drawn
    base = randn(7, 10, seed=4)
    divergence = []
    for weights, delta in zip(base.double().numpy(), flat[0].reshape(7, 10), strict=True):
        p, q = softmax(weights + delta) + 1e-8, softmax(weights) + 1e-8
        divergence.append((p * numpy.log(p / q)).sum())
    importance = numpy.float32(abs(flat[0]) * numpy.repeat(divergence, 10))
    ranked = sorted(importance)
    mask = importance >= ranked[34] + 1.5 * (ranked[51] - ranked[17])
    merged = merge(checked("arcee_fusion", {}), {"a": deltas["a"]}, base=base, slice_elements=20)
    assert 0 < mask.sum() < 70
    assert_close((merged - base).flatten(), flat[0] * mask)


def test_ram_oracle(drawn):
    deltas, flat = drawn
    changed = abs(flat) > 0.5
    holders = changed.sum(0)
    expected = (flat * changed).sum(0) / numpy.maximum(holders, 1)
    assert_close(merge(checked("ram", {"epsilon": 0.5}), deltas, slice_elements=20).flatten(), expected)
    for k in range(3):
        overlap, unshared = (changed[k] & (holders > 1)).sum(), changed[k] & (holders == 1)
        expected[unshared] *= 1 + 0.3 * min(overlap / unshared.sum(), 3)
    stage = checked("ram", {"epsilon": 0.5, "r": 0.3, "alpha": 3})
    assert_close(merge(stage, deltas, slice_elements=20).flatten(), expected)


def test_wanda_oracle(drawn):
    deltas, flat = drawn
    tokens = randn(3, 12, 10, seed=5)
    norms = numpy.sqrt(tokens.double().square().mean(1).numpy())
    masks = [
        [10 * row + i for row in range(7) for i in top_of(numpy.float32(abs(vector[10 * row :][:10]) * norm), 4)]
        for vector, norm in zip(flat, norms, strict=True)
    ]
    stages = [checked("wanda", {"density": 0.4}), checked("sum", {})]
    merged = merge(stages, deltas, inputs=inputs_of(tokens), slice_elements=20)
    assert_close(merged.flatten(), kept_only(flat, masks).sum(0))
