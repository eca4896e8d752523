"""What a plan says of every tensor, from headers and configs alone: no file here holds any weights."""

import json
import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import pytest
import yaml
from architectures import ALL, config, expected, shapes
from checkpoints import save_headers

from merger.errors import CheckpointError, RecipeError
from merger.planning import planner
from merger.planning.planner import plan
from merger.recipe.recipe import Recipe

RECIPES = Path(__file__).parent.parent / "recipes"
CAUSAL = {"architectures": ["LlamaForCausalLM"], "vocab_size": 16, "tie_word_embeddings": False}
BODY = {
    "model.embed_tokens.weight": (16, 8),
    "model.layers.0.mlp.up_proj.weight": (24, 8),
    "model.layers.1.mlp.up_proj.weight": (24, 8),
    "model.norm.weight": (8,),
}
EMBEDDING, HEAD, UP = "model.embed_tokens.weight", "lm_head.weight", "model.layers.0.mlp.up_proj.weight"
LLAMA = {**BODY, HEAD: (16, 8)}


@pytest.fixture
def planned(tmp_path):
    """A plan of models given as their shapes, or as (shapes, config): ``planned(base, lm, math, method=...)``."""

    def make(*models, **recipe):
        names = ["base", "lm", "math", "code"][: len(models)]
        for name, model in zip(names, models, strict=True):
            tensors, its_config = model if isinstance(model, tuple) else (model, CAUSAL)
            own_head = () if its_config.get("tie_word_embeddings") else [HEAD]
            save_headers(tmp_path / name, tensors, its_config, distinct=own_head)
        choice = {} if recipe.keys() & {"method", "pipeline"} else {"method": "linear"}
        content = {"base": "base", "experts": {name: name for name in names[1:]}, "output": {"path": "out"}}
        merge_plan = plan(Recipe.parse({**content, **choice, **recipe}, tmp_path))
        merge_plan.close()
        return merge_plan

    return make


def by_name(merge_plan):
    return {tensor.name: tensor for tensor in merge_plan.tensors}


def faults(caught):
    return str(caught.value).splitlines()


# --- architectures --------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ALL.values(), ids=ALL)
def test_every_architecture_is_merged_whole(planned, architecture):
    model = (shapes(architecture), config(architecture))

    tensors = by_name(planned(model, model, model, method="ties"))

    assert {name: tensor.kind for name, tensor in tensors.items()} == expected(architecture, "kind")
    for tensor in tensors.values():
        assert bool(tensor.stages) == (tensor.kind != "buffer")


@pytest.mark.parametrize(
    ("choice", "note"),
    [
        ({"method": "consensus_ta"}, "consensus: k is 2, more than there are experts (1), so all stays at the base"),
        ({"method": "consensus_ta", "parameters": {"k": 1}}, None),
        ({"method": "sce"}, "sce: one expert differs from no other, so all stays at the base"),
        ({"method": "sce", "parameters": {"select_topk": 1}}, None),
    ],
)
def test_a_plan_notes_parameters_that_leave_everything_at_the_base(planned, choice, note):
    assert planned(LLAMA, LLAMA, **choice).notes == ((note,) if note else ())


def test_a_plan_notes_every_stage_of_a_name(planned):
    stages = ["sum", *({"consensus": {"k": k}} for k in (3, 4, 1))]
    assert planned(LLAMA, LLAMA, LLAMA, pipeline=stages).notes == tuple(
        f"consensus: k is {k}, more than there are experts (2), so all stays at the base" for k in (3, 4)
    )


@pytest.mark.parametrize(
    ("method", "notes"),
    [("metagpt", ("metagpt: takes no weight, so the experts' own have no effect",)), ("task_arithmetic", ())],
)
def test_a_plan_notes_weights_that_nothing_takes(planned, method, notes):
    experts = {"lm": {"model": "lm", "weight": 2}, "math": "math"}
    assert planned(LLAMA, LLAMA, LLAMA, method=method, experts=experts).notes == notes


def test_an_order_rotates_from_block_to_block_as_in_the_golden_values(planned, golden):
    orders = golden["obim_rotation"]["outputs"]["by_rotation_index"]
    units = set()

    for tensor in planned(LLAMA, LLAMA, LLAMA, LLAMA, method="im").tensors:
        letters = dict(zip(("lm", "math", "code"), "abc", strict=True))
        order = [letters[tensor.place.experts[k]] for k in tensor.stages[0].values["exclusive"]]
        assert order == orders[str(tensor.place.block % 3)]["order"]
        units.add((tensor.unit, tensor.place.block))

    assert units == {
        (EMBEDDING, 0),
        ("model.layers.0", 1),
        ("model.layers.1", 2),
        ("model.norm.weight", 3),
        (HEAD, 3),
    }


PROJECTIONS = {
    **{f"self_attn.{leaf}_proj.weight": (8, 8) for leaf in "kqvo"},
    **{f"mlp.{leaf}_proj.weight": (8, 8) for leaf in ("up", "gate", "down")},
}
SEVEN = {EMBEDDING: (16, 8), HEAD: (16, 8), "model.norm.weight": (8,)} | {
    f"model.layers.{i}.{leaf}": shape for i in (0, 1) for leaf, shape in PROJECTIONS.items()
}
LINEAR = {"method": "im", "parameters": {"order": {"unit": "linear"}, "claim_zeros": False}}


def first_experts(merge_plan):
    """The expert that comes first in each tensor, by its initial."""
    return {
        tensor.name: tensor.place.experts[tensor.stages[0].values["exclusive"][0]][0]
        for tensor in merge_plan.tensors
        if tensor.stages
    }


def test_an_order_by_linear_layers_follows_the_forward_pass(planned):
    first = first_experts(planned(SEVEN, SEVEN, SEVEN, SEVEN, **LINEAR))

    leaves = [f"self_attn.{leaf}_proj" for leaf in "qkvo"] + [f"mlp.{leaf}_proj" for leaf in ("gate", "up", "down")]
    layers = [f"model.layers.{i}.{leaf}.weight" for i in (0, 1) for leaf in leaves]
    assert "".join(first[layer] for layer in [*layers, HEAD]) == "lmc" * 5
    assert (first[EMBEDDING], first["model.norm.weight"]) == ("l", "m")  # as the layer before: none, and down


def test_an_order_by_linear_layers_is_told_to_repeat_where_a_block_has_a_multiple_of_them(planned):
    eight = {**SEVEN, **{f"model.layers.{i}.mlp.extra.weight": (8, 8) for i in (0, 1)}}
    notes = planned(eight, eight, eight, **LINEAR).notes
    assert notes == (
        "order: {unit: linear} turns 2 experts, and 2 of 2 blocks have 8 linear layers, a multiple of that: "
        "the same layer of each begins with the same expert; unit: block has no such pattern",
    )


@pytest.mark.parametrize(
    "parameters", [{"order": {"unit": "linear"}}, {"order": {"unit": "linear", "rest": "listed"}}, {}]
)
def test_an_order_that_does_not_repeat_is_not_remarked_on(planned, parameters):
    parameters = {**parameters, "claim_zeros": False}
    assert planned(SEVEN, SEVEN, SEVEN, method="im", parameters=parameters).notes == ()


def test_an_order_with_a_pinned_expert_turns_the_others(planned):
    order = {"unit": "linear", "first": "code"}
    merge_plan = planned(SEVEN, SEVEN, SEVEN, SEVEN, method="im", parameters={"order": order})
    middle_expert = {t.name: t.place.experts[t.stages[0].values["exclusive"][1]] for t in merge_plan.tensors}
    block = "model.layers.0.self_attn"
    assert [middle_expert[f"{block}.{leaf}_proj.weight"] for leaf in "qkvo"] == ["lm", "math", "lm", "math"]


def test_tensors_of_a_block_share_their_bound_stages(planned):
    tensors = by_name(planned(SEVEN, SEVEN, SEVEN, method="im"))
    stages = {id(tensor.stages) for tensor in tensors.values() if tensor.unit == "model.layers.1"}
    assert len(stages) == 1


def test_a_list_of_numbers_is_interpolated_over_the_depth(planned):
    tensors = by_name(planned(LLAMA, LLAMA, method="task_arithmetic", parameters={"weight": [0, 1]}))

    weights = {name: float(tensor.stages[0].values["weight"][0]) for name, tensor in tensors.items()}

    assert weights == {EMBEDDING: 0, UP: 0, UP.replace("0", "1"): 1, "model.norm.weight": 1, HEAD: 1}


def test_an_experts_own_weight_multiplies_and_may_vary_over_depth_too(planned):
    experts = {"lm": {"model": "lm", "weight": [1, 3]}}
    merge_plan = planned(LLAMA, LLAMA, method="task_arithmetic", parameters={"weight": 0.5}, experts=experts)
    assert [float(by_name(merge_plan)[name].stages[0].values["weight"][0]) for name in (UP, HEAD)] == [0.5, 1.5]


def test_packed_experts_are_merged_slice_by_slice(planned):
    packed = {"layers.0.mlp.experts.down_proj": (3, 6, 8)}
    (tensor,) = planned(packed, packed, method="ties").tensors
    assert [(part.name, part.row, part.rows, part.columns) for part in tensor.parts] == [
        (f"layers.0.mlp.experts.down_proj[{e}]", 6 * e, 6, 8) for e in range(3)
    ]


@pytest.mark.parametrize(("method", "turned"), [("della", True), ("ties", False), ("linear", False)])
def test_a_conv1d_is_turned_only_for_stages_that_see_rows(planned, method, turned):
    conv1d = {"h.0.c_fc.weight": (8, 32), "h.0.c_fc.bias": (32,)}

    part = by_name(planned(conv1d, conv1d, method=method))["h.0.c_fc.weight"].parts[0]

    assert part.transposed is turned
    assert (part.rows, part.columns) == ((32, 8) if turned else (8, 32))


@pytest.mark.parametrize("shape", [(), (1,), (0,), (3, 0), (1, 1), (2, 3, 4, 5)])
def test_any_shape_keeps_its_shape(planned, shape):
    (tensor,) = planned({"x": shape}, {"x": shape}, method="ties").tensors
    assert tensor.info.shape == shape
    assert tensor.elements == tensor.info.elements


# --- rules ----------------------------------------------------------------------------------------


def test_the_first_rule_that_matches_wins_and_the_rest_takes_the_recipes_method(planned):
    merge_plan = planned(
        LLAMA,
        LLAMA,
        method="ties",
        rules=[
            {"tensors": "norm", "use": "lm"},
            {"kinds": ["vector", "embedding"], "method": "linear"},
            {"tensors": "embed", "use": "base"},
        ],
    )

    tensors = by_name(merge_plan)
    assert {name: (t.group, t.source, len(t.stages)) for name, t in tensors.items()} == {
        "model.norm.weight": (0, "lm", 0),
        EMBEDDING: (2, "base", 1),
        UP: (0, "base", 3),
        UP.replace("0", "1"): (0, "base", 3),
        HEAD: (0, "base", 3),
    }
    assert merge_plan.notes == ()


def test_a_rule_that_matches_nothing_is_noted(planned):
    merge_plan = planned(LLAMA, LLAMA, rules=[{"tensors": "rotary", "use": "base"}])
    assert "rule 1 (tensors: rotary) matches no tensor" in merge_plan.notes


def test_only_what_is_copied_from_is_read(planned):
    merge_plan = planned(LLAMA, LLAMA, LLAMA, rules=[{"tensors": "", "use": "math"}])
    assert all(tensor.reads == {"math": tensor.name} for tensor in merge_plan.tensors)
    assert merge_plan.bytes_read == merge_plan.bytes_written


# --- heads: the base's by the expert's ------------------------------------------------------------

TIED = (BODY, {**CAUSAL, "tie_word_embeddings": True})
DOUBLED = (LLAMA, {**CAUSAL, "tie_word_embeddings": True})  # tied, and stored all the same
UNTIED = (LLAMA, CAUSAL)


@pytest.mark.parametrize(
    ("base", "expert", "head", "embedding", "reads", "ties"),
    [
        pytest.param(UNTIED, UNTIED, "head", "embedding", (HEAD, HEAD), False, id="both untied"),
        pytest.param(UNTIED, TIED, "head", "embedding", (HEAD, EMBEDDING), False, id="the expert ties"),
        pytest.param(UNTIED, DOUBLED, "head", "embedding", (HEAD, EMBEDDING), False, id="the expert ties its own"),
        pytest.param(TIED, UNTIED, "head", "embedding", (EMBEDDING, HEAD), False, id="the expert unties"),
        pytest.param(DOUBLED, UNTIED, "head", "embedding", (EMBEDDING, HEAD), False, id="the expert unties it"),
        pytest.param(TIED, TIED, None, "tied", None, True, id="both tied"),
        pytest.param(TIED, DOUBLED, None, "tied", None, True, id="both tied, the expert's stored"),
        pytest.param(DOUBLED, TIED, "tied", "tied", (EMBEDDING, EMBEDDING), True, id="both tied, the base's stored"),
        pytest.param(DOUBLED, DOUBLED, "tied", "tied", (EMBEDDING, EMBEDDING), True, id="both tied, both stored"),
    ],
)
def test_tied_and_untied_heads_meet(planned, base, expert, head, embedding, reads, ties):
    merge_plan = planned(base, expert)
    tensors = by_name(merge_plan)

    assert (tensors[HEAD].kind if HEAD in tensors else None) == head
    assert tensors[EMBEDDING].kind == embedding
    assert merge_plan.config["tie_word_embeddings"] is ties
    if reads:
        assert tensors[HEAD].reads == dict(zip(("base", "lm"), reads, strict=True))
        assert tensors[HEAD].place.depth == (0 if head == "tied" else 1)


def test_an_experts_copy_of_a_tied_head_is_dropped_and_said(planned):
    assert planned(TIED, DOUBLED).dropped["lm"] == {HEAD: f"is {EMBEDDING}, stored once more"}


def test_a_stored_tied_head_is_merged_once_with_its_embedding(planned):
    merge_plan = planned(DOUBLED, DOUBLED, method="ties")
    head, tied_plan = by_name(merge_plan)[HEAD], planned(TIED, TIED, method="ties")

    assert head.tied_to == EMBEDDING
    assert head.parts == ()
    assert merge_plan.bytes_read == tied_plan.bytes_read
    assert merge_plan.bytes_written == tied_plan.bytes_written + head.info.nbytes


@pytest.mark.parametrize("base", [TIED, DOUBLED], ids=["stored by the expert", "stored by both"])
def test_a_rule_for_a_stored_tied_head_alone_has_no_effect_and_is_noted(planned, base):
    merge_plan = planned(base, DOUBLED, rules=[{"tensors": "^lm_head", "use": "lm"}])
    assert (HEAD in by_name(merge_plan)) is (base is DOUBLED)
    assert by_name(merge_plan)[EMBEDDING].stages != ()
    assert merge_plan.notes == (
        f"rule 1 (tensors: ^lm_head) has no effect: {HEAD} is {EMBEDDING}, stored once more, and follows its rule",
    )


def test_a_rule_that_names_a_tied_table_by_both_its_names_is_that_of_the_table(planned):
    merge_plan = planned(DOUBLED, DOUBLED, rules=[{"tensors": "lm_head|embed", "use": "lm"}])
    assert [by_name(merge_plan)[name].source for name in (EMBEDDING, HEAD)] == ["lm", "lm"]
    assert merge_plan.notes == ()


def test_a_nested_config_is_untied_where_it_says_tied(planned):
    nested = {"architectures": ["XForConditionalGeneration"], "text_config": {"tie_word_embeddings": True}}
    top = {**nested, "tie_word_embeddings": True}
    merge_plan = planned((BODY, top), (LLAMA, {"text_config": {"tie_word_embeddings": False}}))
    assert merge_plan.config["tie_word_embeddings"] is False
    assert merge_plan.config["text_config"]["tie_word_embeddings"] is False


# --- rows that only some have ---------------------------------------------------------------------


def rows(count, **tensors):
    return {**BODY, EMBEDDING: (count, 8), HEAD: (count, 8), **tensors}, {**CAUSAL, "vocab_size": count}


def test_rows_that_one_expert_added_are_kept(planned):
    merge_plan = planned(rows(16), rows(17), rows(16))

    for name in (EMBEDDING, HEAD):
        tensor = by_name(merge_plan)[name]
        assert tensor.info.shape == (17, 8)
        assert tensor.elements == 16 * 8
        assert [(span.start, span.stop, span.models) for span in tensor.extra] == [(16, 17, ("lm",))]
    assert merge_plan.config["vocab_size"] == 17
    assert f"{HEAD}: rows 16 to 16 are those of lm" in merge_plan.notes
    assert merge_plan.tokenizer == "lm"


def test_rows_that_several_added_are_shared_by_those_that_have_them(planned):
    extra = by_name(planned(rows(16), rows(18), rows(20), rows(16)))[EMBEDDING].extra
    assert [(span.start, span.stop, span.models) for span in extra] == [
        (16, 18, ("lm", "math")),
        (18, 20, ("math",)),
    ]


def test_rows_that_only_the_base_has_stay_the_bases(planned):
    tensor = by_name(planned(rows(20), rows(16), rows(16)))[EMBEDDING]
    assert tensor.info.shape == (20, 8)
    assert [(span.start, span.stop, span.models) for span in tensor.extra] == [(16, 20, ("base",))]


def test_rows_are_dropped_on_request(planned):
    merge_plan = planned(rows(16), rows(17), extra_rows="drop")
    assert by_name(merge_plan)[HEAD].info.shape == (16, 8)
    assert by_name(merge_plan)[HEAD].extra == ()
    assert f"{HEAD}: rows from 16 on are dropped (extra_rows: drop)" in merge_plan.notes
    assert (merge_plan.config["vocab_size"], merge_plan.tokenizer) == (16, "base")


def test_dropping_what_only_the_base_has_shrinks_the_vocabulary(planned):
    assert planned(rows(20), rows(16), extra_rows="drop").config["vocab_size"] == 16


def test_a_heads_bias_grows_with_its_head(planned):
    bias = planned(rows(16, **{"lm_head.bias": (16,)}), rows(17, **{"lm_head.bias": (17,)}))
    tensor = by_name(bias)["lm_head.bias"]
    assert tensor.info.shape == (17,)
    assert [(span.start, span.stop) for span in tensor.extra] == [(16, 17)]


def test_a_nested_vocabulary_grows_too(planned):
    def nested(count):
        return {**BODY, EMBEDDING: (count, 8), HEAD: (count, 8)}, {"text_config": {"vocab_size": count}}

    assert planned(nested(16), nested(17)).config["text_config"]["vocab_size"] == 17


@pytest.mark.parametrize(
    ("name", "base", "expert"),
    [
        pytest.param(EMBEDDING, (16, 8), (17, 9), id="another width"),
        pytest.param("wpe.weight", (12, 8), (14, 8), id="positions"),
        pytest.param("classifier.weight", (2, 8), (3, 8), id="labels"),
        pytest.param("model.norm.weight", (8,), (9,), id="features"),
        pytest.param(UP, (24, 8), (26, 8), id="neurons"),
        pytest.param("scalar", (), (1,), id="no axes"),
    ],
)
def test_rows_that_are_no_tokens_are_not_added(planned, name, base, expert):
    with pytest.raises(CheckpointError) as caught:
        planned({**LLAMA, name: base}, {**LLAMA, name: expert})
    assert (
        f"lm: {name} is {list(expert)}, but {list(base)} in base; name it in a rule {{tensors: ..., use: base}}"
        in faults(caught)
    )


# --- tensors that only some have ------------------------------------------------------------------


def without(name):
    return {key: shape for key, shape in LLAMA.items() if key != name}


def test_all_that_does_not_fit_is_told_at_once(planned):
    with pytest.raises(CheckpointError) as caught:
        planned(LLAMA, without(UP), {**LLAMA, "model.norm.weight": (9,), "x": (1,)})
    assert [line.partition(";")[0] for line in faults(caught)] == [
        "math: has x, which the base lacks",
        f"lm: has no {UP}",
        "math: model.norm.weight is [9], but [8] in base",
    ]


def test_all_experts_that_hold_integers_for_floats_are_named(planned):
    name = "steps"
    integers = {**LLAMA, name: ("I64", (4,))}
    with pytest.raises(CheckpointError) as caught:
        planned({**LLAMA, name: (4,)}, integers, integers)
    remedy = "name it in a rule {tensors: ..., use: base}"
    assert faults(caught) == [f"{label}: {name} holds I64, but BF16 in base; {remedy}" for label in ("lm", "math")]


def test_of_many_faults_of_a_kind_twenty_are_told(planned):
    layers = {f"layers.{i}.w.weight": (2, 2) for i in range(30)}
    with pytest.raises(CheckpointError) as caught:
        planned({**LLAMA, **layers}, LLAMA)
    assert len(faults(caught)) == 21
    assert faults(caught)[-1] == "... and 10 more like these"


def test_a_missing_tensor_counts_as_unchanged_on_request(planned):
    tensor = by_name(planned(LLAMA, without(UP), LLAMA, missing="zero"))[UP]
    assert tensor.reads == {"base": UP, "lm": None, "math": UP}
    assert tensor.stages


def test_a_rule_may_leave_an_experts_extra_tensor_out(planned):
    merge_plan = planned(LLAMA, {**LLAMA, "x": (3,)}, LLAMA, rules=[{"tensors": "^x$", "use": "base"}])
    assert "x" not in by_name(merge_plan)
    assert merge_plan.dropped["lm"] == {"x": "rule 1 keeps the base, which has none"}


def test_a_rule_may_take_an_experts_extra_tensor(planned):
    merge_plan = planned(LLAMA, {**LLAMA, "x": (3,)}, LLAMA, rules=[{"tensors": "^x$", "use": "lm"}])
    tensor = by_name(merge_plan)["x"]
    assert (tensor.info.shape, tensor.source, dict(tensor.reads)) == ((3,), "lm", {"lm": "x"})


def test_a_rule_cannot_take_a_tensor_from_who_lacks_it(planned):
    with pytest.raises(CheckpointError, match=f"math: has no {UP}, which rule 1 takes from it"):
        planned(LLAMA, LLAMA, without(UP), rules=[{"tensors": "up_proj", "use": "math"}])


def test_integers_are_copied_and_compared(planned):
    ids = {**LLAMA, "position_ids": ("I64", (1, 12))}
    tensor = by_name(planned(ids, ids, LLAMA, output={"path": "out", "dtype": "float16"}))["position_ids"]
    assert (tensor.kind, tensor.stages, tensor.source) == ("buffer", (), "base")
    assert tensor.info.dtype == "I64"
    assert dict(tensor.reads) == {"base": "position_ids", "lm": "position_ids"}


# --- the whole ------------------------------------------------------------------------------------


def test_tensors_come_in_natural_order(planned):
    layers = {f"layers.{i}.w.weight": (2, 2) for i in (10, 2, 1)}
    assert list(by_name(planned(layers, layers))) == [f"layers.{i}.w.weight" for i in (1, 2, 10)]


def test_bytes_are_those_of_the_tensors(planned):
    merge_plan = planned(LLAMA, LLAMA, LLAMA)
    assert merge_plan.bytes_written == 2 * sum(a * (b[0] if b else 1) for a, *b in LLAMA.values())
    assert merge_plan.bytes_read == 3 * merge_plan.bytes_written


def test_a_dtype_of_its_own_is_in_tensors_and_config(planned):
    merge_plan = planned(LLAMA, LLAMA, output={"path": "out", "dtype": "float32"})
    assert {tensor.info.dtype for tensor in merge_plan.tensors} == {"F32"}
    assert merge_plan.config["dtype"] == "float32"
    assert merge_plan.bytes_written == merge_plan.bytes_read


def test_an_older_config_names_its_dtype_as_it_did(planned):
    older = (LLAMA, {**CAUSAL, "torch_dtype": "bfloat16"})
    merge_plan = planned(older, older, output={"path": "out", "dtype": "float16"})
    assert merge_plan.config["torch_dtype"] == "float16"
    assert "dtype" not in merge_plan.config


def test_differences_between_configs_are_noted(planned):
    merge_plan = planned(LLAMA, (LLAMA, {**CAUSAL, "rope_theta": 1e6, "use_cache": False}), LLAMA)
    assert merge_plan.notes == ("lm: config differs from the base: rope_theta None -> 1000000.0",)


def test_the_recipe_may_choose_the_tokenizer(planned):
    assert planned(rows(16), rows(17), rows(16), output={"path": "out", "tokenizer": "math"}).tokenizer == "math"


def test_parameters_that_fail_only_here_are_told_with_their_method(planned):
    experts = {"lm": {"model": "lm", "weight": [1, -1, 1, 1, 1]}}  # zero at depth 1/8
    nine = {f"layers.{i}.w.weight": (2, 2) for i in range(9)}
    with pytest.raises(RecipeError, match="linear: the weights sum to zero"):
        planned(nine, nine, experts=experts)


def blocks(hidden, inner, layers, *, narrow=None, biases=False):
    """The tensors of a Llama or Qwen2 of this size, without embedding and head."""
    narrow = narrow or hidden
    block = {
        **dict.fromkeys(["self_attn.q_proj.weight", "self_attn.o_proj.weight"], (hidden, hidden)),
        **dict.fromkeys(["self_attn.k_proj.weight", "self_attn.v_proj.weight"], (narrow, hidden)),
        **dict.fromkeys(["mlp.gate_proj.weight", "mlp.up_proj.weight"], (inner, hidden)),
        "mlp.down_proj.weight": (hidden, inner),
        **dict.fromkeys(["input_layernorm.weight", "post_attention_layernorm.weight"], (hidden,)),
    }
    if biases:
        block |= {
            "self_attn.q_proj.bias": (hidden,),
            **dict.fromkeys([f"self_attn.{x}_proj.bias" for x in "kv"], (narrow,)),
        }
    tensors = {f"model.layers.{i}.{name}": shape for i in range(layers) for name, shape in block.items()}
    return tensors | {"model.norm.weight": (hidden,)}


def vocabulary(rows, hidden):
    return {EMBEDDING: (rows, hidden), HEAD: (rows, hidden)}


LLAMA_13B, QWEN_7B = blocks(5120, 13824, 40), blocks(3584, 18944, 28, narrow=512, biases=True)
MISTRAL_7B = blocks(4096, 14336, 32, narrow=1024) | vocabulary(32000, 4096)
LLAMA_3B = blocks(3072, 8192, 28, narrow=1024) | {EMBEDDING: (128256, 3072)}
PAPERS = {
    "featcal-llama3.2-3b-mergebench": [LLAMA_3B] * 6,
    "wudi_svc-llama3.2-3b-mergebench": [LLAMA_3B] * 6,
    "obim-llama2-13b": [LLAMA_13B | vocabulary(rows, 5120) for rows in (32000, 32000, 32001, 32000)],
    "ties_obm-llama2-13b": [LLAMA_13B | vocabulary(rows, 5120) for rows in (32000, 32000, 32001, 32000)],
    "ties_im-llama2-13b": [LLAMA_13B | vocabulary(rows, 5120) for rows in (32000, 32000, 32001, 32000)],
    "obim-qwen2-7b-checkpoints": [QWEN_7B | vocabulary(152064, 3584)] * 4,
    "cabs-mistral-7b": [MISTRAL_7B] * 3,
    "cabs_low_overlap-mistral-7b": [MISTRAL_7B] * 3,
}


@pytest.mark.parametrize("name", PAPERS)
def test_the_papers_recipes_plan_on_models_of_the_papers_shapes(tmp_path, name):
    content = yaml.safe_load((RECIPES / f"{name}.yaml").read_text())
    labels = ["base", *content["experts"]]
    for label, tensors in zip(labels, PAPERS[name], strict=True):
        save_headers(tmp_path / label, tensors, {**CAUSAL, "tie_word_embeddings": HEAD not in tensors})
    content |= {"base": "base", "experts": {label: label for label in labels[1:]}}
    recipe = Recipe.parse(content, tmp_path)
    for sources in [] if recipe.calibration is None else map(recipe.calibration.sources, recipe.experts):
        for text in sources:
            (tmp_path / text.file).parent.mkdir(exist_ok=True)
            (tmp_path / text.file).touch()
    merge_plan = plan(recipe)
    merge_plan.close()
    assert {tensor.name for tensor in merge_plan.tensors} == set(PAPERS[name][0])
    assert bool(merge_plan.inputs) == any(method in name for method in ("obm", "obim", "featcal"))
    kinds = {"linear", "head", "tied", "embedding", "vector"}
    assert {tensor.kind for tensor in merge_plan.tensors if tensor.inputs} <= kinds
    rows = max(tensors[EMBEDDING][0] for tensors in PAPERS[name])
    assert by_name(merge_plan)[EMBEDDING].info.shape[0] == rows
    if name == "obim-llama2-13b":
        up = by_name(merge_plan)["model.layers.7.mlp.up_proj.weight"].stages[0]
        assert up.values["density"] == [Fraction("0.4"), Fraction("0.45"), Fraction("0.1")]
        assert up.values["exclusive"][-1] == 2  # code last


def test_four_models_of_7b_are_planned_without_torch(tmp_path):
    tensors = blocks(4096, 11008, 32) | vocabulary(32000, 4096)
    for name in ("base", "lm", "math", "code"):
        save_headers(tmp_path / name, tensors, CAUSAL)
    content = {"base": "base", "experts": {name: name for name in ("lm", "math", "code")}, "method": "ties"}
    (tmp_path / "recipe.yaml").write_text(json.dumps({**content, "output": {"path": "out"}}))
    program = (
        "import shutil, sys, types; from merger.cli import main\n"
        "sys.argv = ['merger', 'plan', 'recipe.yaml', '--json']\n"
        "shutil.disk_usage = lambda path: types.SimpleNamespace(free=1 << 40)\n"  # however small this disk
        "try: main()\n"
        "finally: assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    )

    ran = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True)

    record = json.loads(ran.stdout)
    assert record["tensors"] == 291
    assert record["bytes_written"] == 13_476_831_232
    assert record["bytes_read"] == 4 * record["bytes_written"]
    assert sum(os.stat(path).st_blocks for path in tmp_path.glob("*/model.safetensors")) < 4096  # no data here


@pytest.mark.parametrize("method", ["ties", "obim", "tsv_m", "linear"])
def test_a_tensor_is_planned_after_its_like_as_it_would_be_by_itself(tmp_path, monkeypatch, method):
    names = [f"experts.{expert}.{leaf}" for expert in range(3) for leaf in ("w1", "w2", "w3")] + ["gate"]
    shapes = {
        f"model.layers.{block}.mlp.{name}.weight": (6, 4) if name.endswith("w2") else (4, 6)
        for block in range(3)
        for name in names
    }
    shapes["model.layers.1.mlp.experts.1.w1.weight"] = ("F32", (4, 6))
    for label in ("base", "a", "b"):
        save_headers(tmp_path / label, {**shapes, EMBEDDING: (16, 6), HEAD: (16, 6), "model.norm.weight": (6,)})
        (tmp_path / f"{label}.jsonl").touch()
    content = {
        "base": "base",
        "experts": {"a": "a", "b": {"model": "b", "weight": [1, 2]}},
        "method": method,
        "output": {"path": "out"},
        "calibration": {"data": {"a": "a.jsonl", "b": "b.jsonl"}},
    }
    with_likes = plan(Recipe.parse(content, tmp_path))
    monkeypatch.setattr(planner._Planner, "_likeness", lambda self, name: None)
    alone = plan(Recipe.parse(content, tmp_path))
    assert [vars(tensor) for tensor in with_likes.tensors] == [vars(tensor) for tensor in alone.tensors]
    assert with_likes.bytes_read == alone.bytes_read
    assert len(alone.tensors) == len(shapes) + 3
