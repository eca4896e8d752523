"""How stages are carried over tensors: names, shapes, slices, copies, and questions about the whole."""

import pytest
import torch
from tiny import NAME, bits, merge, tensor

from merger._order import natural
from merger.pipeline.in_memory import merge_stages
from merger.pipeline.parameters import Place
from merger.pipeline.registry import checked, entry_of
from merger.pipeline.stages import bind, expand, step_rows


def test_names_are_sorted_with_their_numbers_as_numbers():
    names = ["layers.10.w", "layers.2.w", "layers.2.b", "embed"]
    assert sorted(names, key=natural) == ["embed", "layers.2.b", "layers.2.w", "layers.10.w"]


def test_equal_scores_of_two_tensors_go_to_the_one_that_sorts_first():
    base = {"layers.10.w": torch.zeros(2), "layers.2.w": torch.zeros(2)}
    experts = {"a": {name: torch.ones(2) for name in base}}
    merged = merge_stages(checked("ties", {"density": 0.5}), base, experts)
    assert {name: values.tolist() for name, values in merged.items()} == {"layers.2.w": [1, 1], "layers.10.w": [0, 0]}


@pytest.mark.parametrize("name", ["sum", "ties"])
def test_a_tensor_may_be_stored_in_any_order_of_axes(name):
    base, expert = torch.zeros(2, 3, 4).permute(2, 0, 1), torch.arange(24.0).view(2, 3, 4).permute(2, 0, 1)
    stage = checked(name, {"density": 1} if name == "ties" else {})
    assert torch.equal(merge_stages(stage, {"w": base}, {"a": {"w": expert}})["w"], expert)


@pytest.mark.parametrize("shape", [(0,), (0, 4), (3, 0), (2, 0, 4)])
def test_a_tensor_without_elements_stays_as_it_is(shape):
    base = {"empty": torch.zeros(shape), "w": torch.zeros(2)}
    experts = {"a": {"empty": torch.zeros(shape), "w": torch.ones(2)}}
    merged = merge_stages(checked("ties", {"density": 1}), base, experts)
    assert merged["empty"].shape == shape
    assert merged["w"].tolist() == [1, 1]


def test_a_scalar_is_a_tensor_of_one():
    assert merge(checked("ties", {"density": 1}), {"a": 3.0}).tolist() == 3.0


def test_half_precision_comes_back_as_float32():
    base, expert = torch.ones(3, dtype=torch.bfloat16), torch.full((3,), 1.5, dtype=torch.bfloat16)
    merged = merge_stages(checked("sum", {}), {"w": base}, {"a": {"w": expert}})["w"]
    assert merged.dtype == torch.float32
    assert merged.tolist() == [1.5] * 3


def test_stages_run_in_the_order_of_the_pipeline():
    stages = [
        checked("top", {"density": 0.5}),
        checked("top", {"density": 0.25}),
        checked("scale", {"lambda": 2}),
        checked("sum", {}),
        checked("scale", {"lambda": 10}),
    ]
    assert merge(stages, {"a": [1, 2, 3, 4]}).tolist() == [0, 0, 0, 80]


def test_rescaling_looks_back_to_the_task_vectors_before_the_first_stage():
    stages = [checked("top", {"density": 0.5}), checked("scale", {"lambda": 3}), checked("rescale", {})]
    assert merge([*stages, checked("sum", {})], {"a": [4, 0, 4, 4]}).tolist() == [6, 0, 6, 0]


def test_a_stage_is_a_pipeline_of_itself():
    stage = checked("top", {"density": 0.5})
    assert expand(stage, "linear", ["a"]) == [stage]


def test_a_method_may_be_other_stages_for_another_kind_of_tensor():
    method = checked("obim", {"nonlinear": "average"})
    names = {
        kind: [bind(stage, Place(("a", "b"))).entry.name for stage in expand(method, kind, ["a", "b"])]
        for kind in ("linear", "vector")
    }
    assert names == {"linear": ["top", "sum", "scale"], "vector": ["mean", "scale"]}


def test_a_stage_for_matrices_makes_way_for_others_elsewhere():
    stages = {
        "linear": ["tsv_m"],
        "expert3d": ["tsv_m"],
        "head": ["plain_mean", "scale"],
        "tied": ["plain_mean", "scale"],
    }
    for kind, names in stages.items():
        assert [entry_of(stage.func).name for stage in expand(checked("tsv_m", {}), kind, ["a"])] == names


def test_so_does_a_stage_of_a_method():
    stages = expand(checked("star", {}), "vector", ["a"])
    assert [entry_of(stage.func).name for stage in stages] == ["mean", "scale"]


@pytest.mark.parametrize(
    ("columns", "block", "elements", "rows"),
    [(10, 1, 35, 3), (10, 1, 5, 1), (8, 4, 20, 2), (6, 4, 30, 4), (7, 4, 30, 4), (7, 4, 90, 12)],
)
def test_slices_are_whole_rows_that_begin_where_a_block_does(columns, block, elements, rows):
    stages = [bind(checked("bs", {"n": 1, "m": block}), Place(("a",)))]
    assert step_rows(columns, stages, elements) == rows


# --- copies are copies ----------------------------------------------------------------------------


@pytest.fixture(params=["sum", "im"])
def far_from_base(request):
    """Experts whose task vectors lose their last bits, merged by a method that chooses among them."""
    base = tensor([1e8, -0.0, 1e-40, 3.14])
    experts = {"a": tensor([3.3, 0.1, 1e-40, 1e-9]), "b": base}
    parameters = {"sum": {"weight": {"a": 1, "b": 5}}, "im": {"density": {"a": 1, "b": 0}, "order": "listed"}}
    stage = checked(request.param, parameters[request.param])
    return base, experts, stage


def test_an_experts_weights_are_copied_bit_for_bit(far_from_base):
    base, experts, stage = far_from_base
    merged = merge_stages(stage, {"w": base}, {name: {"w": values} for name, values in experts.items()})["w"]
    assert torch.equal(bits(merged), bits(experts["a"]))


def test_what_no_expert_changes_keeps_the_bits_of_the_base(far_from_base):
    base, experts, stage = far_from_base
    merged = merge_stages(stage, {"w": base}, {name: {"w": base} for name in experts})["w"]
    assert torch.equal(bits(merged), bits(base))


def test_any_other_delta_is_added():
    assert merge(checked("sum", {}), {"a": [0.5, 1], "b": [1, -3]}, base=[1, 2]).tolist() == [2.5, 0]


def test_an_expert_with_a_net_factor_of_one_is_copied():
    base, experts = {NAME: tensor([1e8, 5.0])}, {"a": {NAME: tensor([3.3, 0.1])}}
    merged = merge_stages(checked("task_arithmetic", {"weight": 2, "lambda": 0.5}), base, experts)
    assert torch.equal(merged[NAME], experts["a"][NAME])
