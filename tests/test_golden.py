"""Every golden value, each on the whole tensor and on slices of one row."""

from fractions import Fraction

import pytest
import torch
from tiny import Inputs, Rows, inputs_of, kept, merge, sliced, sparse, tensor

from merger.methods.magprune import magprune
from merger.methods.obm import obm
from merger.methods.random import random
from merger.methods.regmean import regmean
from merger.methods.rescale import rescale
from merger.ops.arithmetic import uniforms
from merger.ops.selection import select
from merger.pipeline.in_memory import merge_stages
from merger.pipeline.parameters import Pinned, Place, order_of
from merger.pipeline.registry import checked

EXPERTS = ("a", "b", "c")


@pytest.fixture(params=[1 << 20, 4], ids=["whole", "by-row"])
def slice_elements(request):
    return request.param


@pytest.fixture
def merged(golden, slice_elements):
    """Merges a golden case's experts with a method of ours."""

    def run(case, method, parameters, **options):
        inputs = golden[case]["inputs"]
        statistics = inputs_of(inputs["X"].values()) if "X" in inputs else None
        return merge(
            checked(method, parameters),
            inputs["deltas"],
            base=inputs["base"],
            inputs=statistics,
            slice_elements=slice_elements,
            **options,
        )

    return run


@pytest.fixture
def claimed(golden, slice_elements):
    """The masks of iterative merging, which `sparse` cannot tell where a claimed delta is 0."""

    def run(case, density, order, **options):
        inputs = golden[case]["inputs"]
        deltas = stacked(inputs["deltas"])
        scores = deltas.abs()
        if "X" in inputs:
            scores = inputs_of(inputs["X"].values()).second_moment.unsqueeze(1) * deltas.square()
        shares = [Fraction(density[name]) for name in inputs["deltas"]]
        indices = [list(inputs["deltas"]).index(name) for name in order]
        rows = 2 if slice_elements > 4 else 1
        flow = lambda i, part: select(scores[:, part], shares, order=indices, **options)  # noqa: E731
        (masks,) = sliced(flow, [scores], rows)
        return dict(zip(inputs["deltas"], masks, strict=True))

    return run


def stacked(by_expert):
    return torch.stack([tensor(values) for values in by_expert.values()])


def assert_close(result, expected):
    torch.testing.assert_close(result, tensor(expected), rtol=0, atol=2e-6)


def assert_masks(result, expected):
    assert {name: mask.tolist() for name, mask in result.items()} == expected


# --- basic merging --------------------------------------------------------------------------------


def test_average(golden, merged):
    assert_close(merged("average", "linear", {}), golden["average"]["outputs"]["merged"])
    assert_close(merged("average", "mean", {}), golden["average"]["outputs"]["merged"])


def test_weighted_average(golden, merged):
    weight = dict(zip(EXPERTS, golden["linear_weighted"]["params"]["weights"], strict=True))
    result = merged("linear_weighted", "linear", {"weight": weight})
    assert_close(result, golden["linear_weighted"]["outputs"]["merged"])


def test_task_arithmetic(golden, merged):
    result = merged("task_arithmetic", "task_arithmetic", {"lambda": 0.5})
    assert_close(result, golden["task_arithmetic"]["outputs"]["merged"])


@pytest.mark.parametrize("case", ["slerp_right_angle", "slerp_quarter", "slerp_colinear"])
@pytest.mark.parametrize("base", [0, 1])
def test_slerp_of_weights(golden, slice_elements, case, base):
    inputs, start = golden[case]["inputs"], torch.full((2, 1), float(base))
    deltas = {name: tensor(inputs[name]).view(2, 1) - base for name in ("v0", "v1")}
    stage = checked("slerp", {"t": golden[case]["params"]["t"], "space": "weights"})
    result = merge(stage, deltas, base=start, slice_elements=slice_elements // 4)
    assert_close(result.flatten(), golden[case]["outputs"]["merged"])


@pytest.mark.parametrize("scope", ["tensor", "global"])
def test_slerp_of_task_vectors(golden, merged, scope):
    result = merged("slerp_delta_space", "slerp", {"scope": scope})
    assert_close(result, golden["slerp_delta_space"]["outputs"]["merged"])


@pytest.mark.parametrize("method", ["multislerp", "karcher"])
@pytest.mark.parametrize("vectors", ["axes", "three"])
@pytest.mark.parametrize("base", [0, 1])
def test_means_on_the_sphere(golden, slice_elements, method, vectors, base):
    case = golden[f"{method}_{vectors}"]
    deltas = {e: tensor(v).view(3, 1) - base for e, v in zip(EXPERTS, case["inputs"]["v"], strict=True)}
    stage = checked(method, {"space": "weights"})
    result = merge(stage, deltas, base=torch.full((3, 1), float(base)), slice_elements=slice_elements // 4)
    assert_close(result.flatten(), case["outputs"]["merged"])


# --- TIES, DARE, DELLA, Breadcrumbs ---------------------------------------------------------------


def test_ties_at_half_density(golden, merged):
    result = merged("ties_tensor_half", "ties", {"density": 0.5, "scope": "tensor"})
    assert_close(result, golden["ties_tensor_half"]["outputs"]["merged"])
    assert (result - 1).sign().tolist() == golden["ties_tensor_half"]["outputs"]["sign"]


def test_ties_trims_equal_magnitudes_by_lower_index(golden, slice_elements):
    inputs, outputs = golden["ties_tensor_half"]["inputs"], golden["ties_tensor_half"]["outputs"]
    sparse_deltas = sparse(checked("top", {"density": 0.5}), inputs["deltas"], slice_elements=slice_elements)
    assert {name: delta.tolist() for name, delta in sparse_deltas.items()} == outputs["trimmed"]


@pytest.mark.parametrize("zero_sign", ["zero", "positive", "majority"])
def test_ties_settles_cancelled_positions(golden, merged, zero_sign):
    case = f"ties_zero_sign_{zero_sign}"
    result = merged(case, "ties", {"density": 1, "zero_sign": zero_sign})
    assert_close(result, golden[case]["outputs"]["merged"])


@pytest.mark.parametrize("scope", ["tensor", "global"])
def test_trimming_by_tensor_and_over_the_whole_model(golden, slice_elements, scope):
    case = golden["trim_global_vs_tensor"]
    deltas = {name: tensor(delta) for name, delta in case["inputs"]["delta"].items()}
    zero = {name: torch.zeros(2, 2) for name in deltas}
    stages = [checked("top", {"density": 0.5, "scope": scope}), checked("sum", {})]
    result = merge_stages(stages, zero, {"a": deltas}, slice_elements=slice_elements // 2)
    assert_masks({name: value != 0 for name, value in result.items()}, case["outputs"][scope])


@pytest.mark.parametrize(("divisor", "output"), [("inverse", "sparse"), ("none", "sparse_no_rescale")])
def test_dare_with_a_given_mask(golden, divisor, output):
    case = golden["dare_given_mask"]
    draws = tensor(case["inputs"]["keep"]) * 0.5  # 0.5 is kept at a drop rate of 0.5, 0 is not
    deltas = tensor(case["inputs"]["delta"])[None]
    result = random(deltas, lambda purpose: draws[None], density=[Fraction(1, 2)], rescale=divisor)
    assert_close(result[0], case["outputs"][output])


def test_l1_rescaling_after_a_given_mask(golden, slice_elements):
    case = golden["dare_given_mask"]
    delta, keep = tensor(case["inputs"]["delta"])[None], tensor(case["inputs"]["keep"])
    flow = lambda i, part: rescale(delta[:, part] * keep[part], delta[:, part], by="l1")  # noqa: E731
    (result,) = sliced(flow, [delta], slice_elements // 4)
    assert_close(result[0], case["outputs"]["sparse_l1"])


def test_random_stream_of_float32(golden):
    case = golden["rng_stream"]
    key = tuple(case["params"].values())
    assert_close(uniforms(key, 0, 8), case["outputs"]["first8_float32"])


def test_random_stream_decides_what_dare_keeps(golden):
    case = golden["rng_stream"]
    name, expert = case["params"]["tensor"], case["params"]["expert"]
    unit_values, zeros = {name: torch.ones(2, 4)}, {name: torch.zeros(2, 4)}
    stages = [checked("random", {"density": 0.5}), checked("sum", {})]
    for size in (8, 4):
        result = merge_stages(stages, zeros, {expert: unit_values}, seed=0, slice_elements=size)[name]
        assert (result != 0).flatten().tolist() == case["outputs"]["keep_at_drop_0.5"]


def test_random_stream_of_float64(golden):
    case = golden["rng_stream_f64"]
    result = uniforms(tuple(case["params"].values()), 0, 4, double=True)
    assert result.tolist() == pytest.approx(case["outputs"]["first4_float64"], abs=1e-11)


@pytest.mark.parametrize(("rank_norm", "output"), [("n", "drop_n"), ("n-1", "drop_n_minus_1")])
def test_della_drop_probabilities(golden, rank_norm, output):
    case = golden["della_probabilities"]
    scores = tensor(case["inputs"]["row"]).abs().view(1, 1, 4)
    rescaled = magprune(
        torch.ones(1, 1, 4),
        scores,
        lambda purpose: torch.ones(1, 1, 4),  # everything is kept
        density=[Fraction(1, 2)],
        epsilon=[Fraction(2, 5)],
        rank_norm=rank_norm,
    )
    assert_close(1 - 1 / rescaled.flatten(), case["outputs"][output])


def test_breadcrumbs(golden, merged):
    result = merged("breadcrumbs", "breadcrumbs", {"drop_low": 0.5, "drop_high": 0.125})
    assert_close(result, golden["breadcrumbs"]["outputs"]["merged"])


def test_breadcrumbs_masks(golden, slice_elements):
    case = golden["breadcrumbs"]
    stage = checked("band", {"drop_low": 0.5, "drop_high": 0.125})
    masks = kept(stage, case["inputs"]["deltas"], slice_elements=slice_elements)
    assert_masks(masks, case["outputs"]["masks"])


def test_consensus_of_task_vectors(golden, merged):
    result = merged("consensus_ta", "consensus_ta", {"lambda_t": 0.4, "k": 2, "lambda": 0.3})
    assert_close(result, golden["consensus_ta"]["outputs"]["merged"])


@pytest.mark.parametrize("k", range(5))
def test_consensus_counts_the_experts_that_hold_a_position(golden, slice_elements, k):
    case = golden["consensus_ta"]
    stages = [checked("sum", {}), checked("consensus", {"k": k, "lambda_t": case["params"]["lambda_t"]})]
    result = merge(stages, case["inputs"]["deltas"], slice_elements=slice_elements)
    summed = stacked(case["inputs"]["deltas"]).sum(0)
    assert torch.equal(result, summed * (tensor(case["outputs"]["count"]) >= k))


# --- Localize-and-Stitch, SCE ---------------------------------------------------------------------


def test_localize_and_stitch(golden, merged, slice_elements):
    case = golden["localize_stitch_dataless"]
    result = merged("localize_stitch_dataless", "localize_stitch", case["params"])
    assert_close(result, case["outputs"]["merged"])
    masks = kept(checked("top", {"density": 0.25}), case["inputs"]["deltas"], slice_elements=slice_elements)
    assert_masks(masks, case["outputs"]["masks"])


@pytest.mark.parametrize(("in_merge", "output"), [(True, "merged"), (False, "merged_authors_code")])
def test_sce(golden, merged, in_merge, output):
    result = merged("sce", "sce", {**golden["sce"]["params"], "select_in_merge": in_merge})
    assert_close(result, golden["sce"]["outputs"][output])


# --- PCB ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("case", "share"), [("pcb_paper", "keep"), ("pcb_official", "ratio")])
def test_pcb(golden, merged, case, share):
    params = golden[case]["params"]
    result = merged(case, "pcb", {"variant": params["variant"], "density": params[share], "scope": params["scope"]})
    assert_close(result - 1, golden[case]["outputs"]["merged_delta"])


# --- weights from norms and angles ----------------------------------------------------------------


@pytest.mark.parametrize("method", ["metagpt", "nan"])
def test_weights_from_norms(golden, merged, method):
    case = golden[method]
    assert_close(merged(method, method, case["params"]), case["outputs"]["merged"])


def test_model_stock(golden, slice_elements):
    case = golden["model_stock"]
    result = merge(checked("model_stock", {}), case["inputs"]["deltas"], slice_elements=slice_elements // 2)
    assert_close(result, case["outputs"]["merged_delta"])


# --- OBIM -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hessian", "output"), [("second_moment", "saliency"), ("mean_square", "saliency_mean_square")]
)
def test_obm_saliency(golden, hessian, output):
    case = golden["obm_saliency"]
    inputs = inputs_of(case["inputs"]["X"].values())
    deltas = stacked(case["inputs"]["deltas"])
    result = obm(deltas, inputs.second_moment[:, None], inputs.mean[:, None], None, None, "linear", hessian=hessian)
    assert_close(result, stacked(case["outputs"][output]))


def test_second_moments_of_the_tokens(golden):
    case = golden["obm_saliency"]
    inputs = inputs_of(case["inputs"]["X"].values())
    assert_close(inputs.second_moment, stacked(case["outputs"]["h"]))
    assert_close(inputs.mean.square(), stacked(case["outputs"]["h_mean_square"]))


def test_obim_in_a_fixed_order(golden, merged, claimed):
    case = golden["obim_fixed_order"]
    n, order = case["params"]["n"], case["params"]["order"]
    result = merged("obim_fixed_order", "obim", {"density": n, "order": order})
    assert_close(result, case["outputs"]["merged"])
    assert_masks(claimed("obim_fixed_order", n, order), case["outputs"]["masks"])


@pytest.mark.parametrize("index", [0, 1, 2])
def test_obim_rotates_by_block(golden, merged, claimed, index):
    case = golden["obim_rotation"]
    expected = case["outputs"]["by_rotation_index"][str(index)]
    result = merged("obim_rotation", "obim", {"density": case["params"]["n"]}, place=Place(EXPERTS, block=index))
    assert_close(result, expected["merged"])
    masks = claimed("obim_rotation", case["params"]["n"], expected["order"])
    assert_masks(masks, expected["masks"])


def test_obim_with_even_shares_leaves_what_does_not_divide_at_the_base(golden, merged, claimed):
    case = golden["obim_one_over_k"]
    result = merged("obim_one_over_k", "obim", {"density": "auto", "order": "listed"})
    assert_close(result, case["outputs"]["merged"])
    masks = claimed("obim_one_over_k", dict.fromkeys(EXPERTS, "1/3"), EXPERTS)
    assert_masks(masks, case["outputs"]["masks"])
    assert {name: int(mask.sum()) for name, mask in masks.items()} == case["outputs"]["counts"]
    assert int((~sum(masks.values()).bool()).sum()) == case["outputs"]["unassigned"]


def test_im_with_shares_of_what_remains(golden, merged, claimed):
    case = golden["im_ratio_of_remaining"]
    masks = claimed("im_ratio_of_remaining", dict.fromkeys(EXPERTS, "1/2"), EXPERTS, ratio_of="remaining")
    assert_masks(masks, case["outputs"]["masks"])
    assert {name: int(mask.sum()) for name, mask in masks.items()} == case["outputs"]["sizes"]
    result = merged(
        "im_ratio_of_remaining",
        "im",
        {"density": 0.5, "ratio_of": "remaining", "order": "listed", "score": "obm"},
    )
    deltas = {name: tensor(delta) for name, delta in case["inputs"]["deltas"].items()}
    assert_close(result, 1 + sum(deltas[name] * masks[name] for name in EXPERTS))


@pytest.mark.parametrize(
    ("output", "order"),
    [("rotation", "rotation"), ("first_a", Pinned(first="a")), ("last_c", Pinned(last="c"))],
)
def test_orders(golden, output, order):
    expected = golden["im_orders"]["outputs"][output]
    orders = [order_of(order, Place(EXPERTS, block=block)) for block in range(len(expected))]
    assert [[EXPERTS[k] for k in indices] for indices in orders] == expected


def test_ties_obm(golden, merged):
    result = merged("ties_obm", "ties_obm", {"density": 0.5})
    assert_close(result, golden["ties_obm"]["outputs"]["merged"])
    assert (result - 1).sign().tolist() == golden["ties_obm"]["outputs"]["sign"]


def test_ties_obm_trims_by_saliency(golden, slice_elements):
    inputs, outputs = golden["ties_obm"]["inputs"], golden["ties_obm"]["outputs"]
    statistics = inputs_of(inputs["X"].values())
    stage = checked("obm", {"density": 0.5})
    sparse_deltas = sparse(stage, inputs["deltas"], inputs=statistics, slice_elements=slice_elements)
    assert {name: delta.tolist() for name, delta in sparse_deltas.items()} == outputs["trimmed"]


@pytest.mark.parametrize("scope", ["global", "tensor"])
def test_ties_im(golden, merged, claimed, scope):
    case = golden["ties_im"]
    n, order = case["params"]["n"], case["params"]["order"]
    result = merged("ties_im", "ties_im", {"density": n, "order": order, "scope": scope})
    assert_close(result, case["outputs"]["merged"])
    assert_masks(claimed("ties_im", n, order, scope=scope), case["outputs"]["masks"])


# --- CABS -----------------------------------------------------------------------------------------


def test_balanced_sparsification(golden, slice_elements):
    case = golden["cabs_bs"]
    delta = {"a": case["inputs"]["delta"]}
    result = sparse(checked("bs", case["params"]), delta, slice_elements=slice_elements)["a"]
    assert result.tolist() == case["outputs"]["sparse"]
    assert (result != 0).tolist() == case["outputs"]["mask"]


def test_cabs(golden, merged):
    case = golden["cabs_2_of_4"]
    parameters = {key: case["params"][key] for key in ("n", "m", "order")}
    weights = dict(zip("ab", case["params"]["lambda"], strict=True))
    assert_close(merged("cabs_2_of_4", "cabs", {**parameters, "lambda": weights}), case["outputs"]["merged"])


def test_cabs_masks(golden, slice_elements):
    case = golden["cabs_2_of_4"]
    stage = checked("bs", {"n": 2, "m": 4, "exclusive": case["params"]["order"]})
    masks = kept(stage, case["inputs"]["deltas"], slice_elements=slice_elements)
    assert_masks(masks, case["outputs"]["masks"])


def test_cabs_with_the_least_overlap(golden, merged, slice_elements):
    case = golden["cabs_low_overlap_3_of_4"]
    parameters = {key: case["params"][key] for key in ("n", "m", "order")}
    weights = dict(zip("ab", case["params"]["lambda"], strict=True))
    result = merged("cabs_low_overlap_3_of_4", "cabs_low_overlap", {**parameters, "lambda": weights})
    assert_close(result, case["outputs"]["merged"])
    masks = kept(checked("low_overlap", parameters), case["inputs"]["deltas"], slice_elements=slice_elements)
    assert_masks(masks, case["outputs"]["masks"])


@pytest.mark.parametrize("tail", ["proportional", "drop"])
def test_a_short_last_block(golden, tail):
    case = golden["cabs_tail"]
    stage = checked("bs", {**case["params"], "tail": tail})
    result = kept(stage, {"a": case["inputs"]["delta"]})["a"]
    assert result.tolist() == case["outputs"][f"tail_{tail}"]


# --- weights from gradients -----------------------------------------------------------------------


def test_fisher(golden, slice_elements):
    case = golden["fisher"]
    inputs, stage = case["inputs"], checked("fisher", {"normalize": False})
    rows = {"fisher": Rows(stacked(inputs["fisher"]))}
    result = merge(stage, inputs["deltas"], base=inputs["base"], inputs=rows, slice_elements=slice_elements)
    assert_close(result, case["outputs"]["merged"])


# --- regression -----------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", ["1.0", "0.9", "0.0"])
@pytest.mark.parametrize("base", [0.0, 0.75])
def test_regmean(golden, alpha, base):
    case = golden[f"regmean_alpha_{alpha}"]
    weights, grams = (
        torch.stack([tensor(values) for values in case["inputs"][key].values()]) for key in ("weights", "gram")
    )
    start = torch.full_like(weights[0], base)
    settings = {"alpha": Fraction(alpha), "weight": [Fraction(1)] * 2}
    stages = regmean(weights - base, start, mean_of, grams, None, **settings)
    with pytest.raises(StopIteration) as end:  # it asks no question
        next(stages)
    assert_close(base + end.value.value, case["outputs"]["merged"])


def mean_of(deltas):
    """An anchor."""
    yield from ()
    return deltas.mean(0)


# --- singular values ------------------------------------------------------------------------------


@pytest.fixture
def matrix(golden, slice_elements):
    """The matrix that a method of ours makes of a golden case's task vectors, on a base of zeros."""

    def run(case, method, parameters, deltas="deltas"):
        return merge(checked(method, parameters), golden[case]["inputs"][deltas], slice_elements=slice_elements)

    return run


@pytest.mark.parametrize("case", ["tsv_m_orthogonal", "tsv_m_overlap", "tsv_m_general", "tsv_m_low_rank"])
def test_tsv_m(golden, matrix, case):
    result = matrix(case, "tsv_m", {"lambda": golden[case]["params"]["alpha"]})
    assert_close(result, golden[case]["outputs"]["merged_delta"])


@pytest.mark.parametrize("case", ["iso_c", "iso_c_rank_deficient"])
def test_iso_c(golden, matrix, case):
    result = matrix(case, "iso_c", {"lambda": golden[case]["params"]["alpha"]})
    assert_close(result, golden[case]["outputs"]["merged_delta"])


def test_iso_cts(golden, matrix):
    params, outputs = golden["iso_cts"]["params"], golden["iso_cts"]["outputs"]
    result = matrix("iso_cts", "iso_cts", {"common": params["common_space_fraction"], "lambda": params["alpha"]})
    assert_close(result, outputs["merged_delta"])
    assert torch.linalg.matrix_norm(result, 2) == pytest.approx(outputs["sigma_bar"], rel=1e-6)


def test_cart(golden, matrix):
    rank = golden["cart"]["params"]["rank"]
    result = matrix("cart", "cart", {"rank_share": f"{rank}/4", "lambda": golden["cart"]["params"]["lambda"]}, "thetas")
    assert_close(result, golden["cart"]["outputs"]["merged"])


@pytest.mark.parametrize("eta", [40, 60])
def test_star(golden, slice_elements, eta):
    case = golden["star"]
    result = merge(checked("star", {"eta": eta}), {"a": case["inputs"]["delta"]}, slice_elements=slice_elements)
    assert_close(result, case["outputs"][f"eta{eta}"]["delta"])


@pytest.mark.parametrize("scope", ["global", "tensor"])
def test_opcm(golden, matrix, scope):
    params, outputs = golden["opcm_two_tasks"]["params"], golden["opcm_two_tasks"]["outputs"]
    result = matrix("opcm_two_tasks", "opcm", {**params, "scope": scope})
    assert_close(result, outputs["merged_delta"])


def test_knots_around_a_sum(golden, matrix):
    assert_close(matrix("knots_ties", "knots", {"inner": "sum"}), golden["knots_ties"]["outputs"]["linear_sum"])


def test_knots_around_ties(golden, matrix):
    """But for the second column, of which expert a has nothing: there its 1e-17 of rounding had a vote and halved b."""
    case = golden["knots_ties"]
    parameters = {key: case["params"][key] for key in ("density", "scope")}
    result, expected = (
        matrix("knots_ties", "knots", {"inner": {"ties": parameters}}),
        tensor(case["outputs"]["merged_delta"]),
    )
    expected[:, 1] = tensor(case["inputs"]["deltas"]["b"])[:, 1]
    assert_close(result, expected)


# --- regression -----------------------------------------------------------------------------------


def test_regmean_without_what_is_off_the_diagonal(golden, slice_elements):
    case = golden["regmean_alpha_0.0"]
    inputs = Inputs(second_moment=torch.stack([tensor(gram).diagonal() for gram in case["inputs"]["gram"].values()]))
    stage = checked("regmean_diag", {})
    result = merge(stage, case["inputs"]["weights"], inputs=inputs, slice_elements=slice_elements // 2)
    assert_close(result, case["outputs"]["merged"])


def test_wudi(golden, matrix):
    case = golden["wudi_closed_form"]
    result = matrix("wudi_closed_form", "wudi", {"omega": case["params"]["omega"]})
    assert_close(result, case["outputs"]["merged_delta"])
    deltas = stacked(case["inputs"]["deltas"])
    assert interference(result, deltas) == pytest.approx(case["outputs"]["loss"], rel=1e-6)
    assert interference(deltas.sum(0), deltas) == pytest.approx(case["outputs"]["loss_of_sum"], rel=1e-6)


def interference(tau, deltas):
    return float(sum(((tau - delta) @ delta.T).square().sum() / delta.square().sum() for delta in deltas))
