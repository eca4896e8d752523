"""What `merger inspect` says, against slow plain numpy on models that are small enough to look through."""

import itertools
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from checkpoints import llama, load, save
from hypothesis import given
from hypothesis import strategies as st

import merger.engine.machine
import merger.inspection
from merger import Recipe, inspect, inspect_merge, inspect_model, merge
from merger._order import natural
from merger.errors import RecipeError
from merger.inspection.counters import ExpertSlice, MatrixShape, MergedSlice
from merger.inspection.counters.merged import MergedCounter, count_endings
from merger.inspection.counters.vectors import VectorCounter
from merger.inspection.density_map import positions_by_cell
from merger.inspection.part_counts import ViewCounters
from merger.inspection.statistics.distinct import ValueCounter
from merger.inspection.views import statistics_of
from merger.options import RunOptions

EXPERTS = ("code", "math", "wiki")
UP = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture
def models(tmp_path):
    """A Llama and three experts that leave about half of it as it is; their tensors by name, in float32."""
    tensors = {"base": llama(0, rows=24, hidden=16)}
    for seed, name in enumerate(EXPERTS, 1):
        generator = torch.Generator().manual_seed(seed)
        tensors[name] = {
            key: torch.where(torch.rand(values.shape, generator=generator) < 0.5, values, tuned)
            for (key, values), tuned in zip(
                tensors["base"].items(), llama(seed, rows=24, hidden=16).values(), strict=True
            )
        }
    for name, model in tensors.items():
        save(tmp_path / name, model)
    return tensors


@pytest.fixture
def recipe(tmp_path, models):
    """Makes recipes of a method, or of a pipeline, for these models."""

    def make(method=None, parameters=None, **options):
        choice = {"method": method, "parameters": parameters or {}} if method else {}
        experts = {name: name for name in EXPERTS}
        return Recipe.parse(
            {"base": "base", "experts": experts, "output": {"path": "out"}, **choice, **options}, tmp_path
        )

    return make


def deltas(models, name):
    """The task vectors of one tensor, as a list of arrays."""
    return [(models[expert][name] - models["base"][name]).numpy() for expert in EXPERTS]


def largest(values, share):
    """The largest of an array by magnitude, the rest zero; equal ones by their place."""
    flat = values.ravel()
    order = sorted(range(flat.size), key=lambda i: (-abs(flat[i]), i))[: int(share * flat.size)]
    result = np.zeros_like(flat)
    result[order] = flat[order]
    return result.reshape(values.shape)


def slowly(task_vectors):
    """All that facts say of task vectors, each given as a list of arrays, by loops over positions."""
    flat = [[float(x) for array in arrays for x in array.ravel()] for arrays in task_vectors]
    size = len(flat[0])
    statistics = {
        "density": [sum(x != 0 for x in vector) / size for vector in flat],
        "norm": [math.sqrt(sum(x * x for x in vector)) for vector in flat],
        "holders": [sum(sum(x != 0 for x in at) == n for at in zip(*flat, strict=True)) / size for n in range(4)],
    }
    for i, j in itertools.permutations(range(3), 2):
        pairs = [(x, y) for x, y in zip(flat[i], flat[j], strict=True) if x != 0 and y != 0]
        either = sum(x != 0 or y != 0 for x, y in zip(flat[i], flat[j], strict=True))
        dot = sum(x * y for x, y in zip(flat[i], flat[j], strict=True))
        statistics[i, j] = {
            "overlap": len(pairs) / sum(x != 0 for x in flat[i]),
            "jaccard": len(pairs) / either,
            "sign_conflict": sum(x * y < 0 for x, y in pairs) / max(len(pairs), 1),
            "cosine": dot / (statistics["norm"][i] * statistics["norm"][j]),
        }
    return statistics


def spread(array):
    """Standard deviation over mean of what the rows of an array keep."""
    counts = (array != 0).sum(1)
    return counts.std() / counts.mean()


def agree(result, arrays):
    """Whether facts are what loops over positions find."""
    expected = slowly(arrays)
    assert list(result.density.values()) == pytest.approx(expected["density"])
    assert list(result.norm.values()) == pytest.approx(expected["norm"])
    assert result.holders == pytest.approx(expected["holders"])
    for (i, expert), (j, peer) in itertools.permutations(enumerate(EXPERTS), 2):
        for key, value in expected[i, j].items():
            assert getattr(result, key)[expert][peer] == pytest.approx(value)


# --- the experts before the merge -----------------------------------------------------------------


def test_task_vectors_are_what_loops_over_positions_find(models, recipe):
    view = inspect(recipe("linear")).view("task_vectors")
    vectors = [[values for name in models["base"] for values in [deltas(models, name)[k]]] for k in range(3)]
    agree(view.whole, vectors)
    agree(view.tensors[UP], [[delta] for delta in deltas(models, UP)])


def test_a_layer_a_projection_and_a_kind_are_sums_over_their_tensors(models, recipe):
    view = inspect(recipe("linear")).view("task_vectors")
    groups = {
        "model.layers.1": view.layers,
        "mlp.up_proj": view.projections,
        "vector": view.kinds,
    }
    members = {
        "model.layers.1": [name for name in models["base"] if name.startswith("model.layers.1.")],
        "mlp.up_proj": [name for name in models["base"] if "up_proj" in name],
        "vector": [name for name in models["base"] if "norm" in name],
    }
    for group, by_name in groups.items():
        agree(by_name[group], [[deltas(models, name)[k] for name in members[group]] for k in range(3)])
    assert view.cells["model.layers.0"]["mlp.up_proj"] == view.tensors[UP]
    assert view.layers["lm_head.weight"] == view.projections["lm_head"] == view.tensors["lm_head.weight"]


def test_unevenness_is_the_deviation_over_the_mean_of_what_lines_keep(models, recipe):
    facts = inspect(recipe("linear")).view("task_vectors").tensors[UP]
    expert_deltas = deltas(models, UP)
    assert list(facts.uneven_rows.values()) == pytest.approx([spread(delta) for delta in expert_deltas])
    assert list(facts.uneven_columns.values()) == pytest.approx([spread(delta.T) for delta in expert_deltas])


def test_a_models_unevenness_is_the_mean_over_its_matrices_by_their_size(models, recipe):
    unevenness = inspect(recipe("linear")).view("task_vectors").whole.uneven_rows["code"]
    matrices = [
        expert_deltas[0]
        for expert_deltas in (deltas(models, name) for name in models["base"])
        if expert_deltas[0].ndim == 2
    ]
    weights = [matrix.size for matrix in matrices]
    assert unevenness == pytest.approx(np.average([spread(matrix) for matrix in matrices], weights=weights))


def test_blocks_run_across_the_ends_of_rows_and_a_short_last_one_is_left_out(models, recipe, monkeypatch):
    monkeypatch.setattr("merger.inspection.counters.balance.BLOCK", 24)
    result = inspect(recipe("linear")).view("task_vectors").tensors[UP].uneven_blocks
    blocks = [delta.ravel()[: 512 // 24 * 24].reshape(-1, 24) for delta in deltas(models, UP)]
    assert list(result.values()) == pytest.approx([spread(block) for block in blocks])


def test_distinct_values_are_those_of_the_tensor_that_has_most(models, recipe):
    view = inspect(recipe("linear")).view("task_vectors")
    counts = {name: len(np.unique(delta[delta != 0])) for name in models["base"] for delta in deltas(models, name)[:1]}
    assert {name: facts.distinct["code"] for name, facts in view.tensors.items()} == counts
    assert view.whole.distinct["code"] == max(counts.values())


def test_values_of_several_slices_are_counted_once(tmp_path, monkeypatch):
    base = llama(0, rows=24, hidden=16)
    tuned = {name: values + torch.arange(values.numel()).view(values.shape) % 5 for name, values in base.items()}
    for name, tensors in (("base", base), ("tune", tuned)):
        save(tmp_path / name, {key: values.bfloat16().float().round() for key, values in tensors.items()})
    monkeypatch.setattr(merger.engine.memory, "SLICE", 64)
    inspection = inspect_model(str(tmp_path / "tune"), str(tmp_path / "base"))
    change = load(tmp_path / "tune")[UP] - load(tmp_path / "base")[UP]
    assert inspection.view("task_vectors").tensors[UP].distinct == {"tune": len(change[change != 0].unique())}


def test_more_values_than_are_told_apart_are_one_more(recipe, monkeypatch):
    monkeypatch.setattr("merger.inspection.statistics.distinct.LIMIT", 100)
    monkeypatch.setattr(merger.engine.memory, "SLICE", 64)
    view = inspect(recipe("linear")).view("task_vectors")
    assert set(view.tensors[UP].distinct.values()) == {101}
    assert all(count < 17 for count in view.tensors["model.norm.weight"].distinct.values())


def test_values_that_every_slice_repeats_are_no_more_than_they_are(monkeypatch):
    monkeypatch.setattr("merger.inspection.statistics.distinct.LIMIT", 6)
    deltas = torch.arange(1.0, 6).repeat(20, 1).unsqueeze(0)
    counters = ViewCounters([ValueCounter(MatrixShape(1, 20, 5))])
    for row in range(20):
        counters.count(ExpertSlice(row, torch.zeros(1, 5), deltas[:, row : row + 1]))
    assert counters.sums()[ValueCounter].counts == (5,)


# --- ranks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [UP, "model.layers.0.mlp.down_proj.weight"])  # tall and wide
def test_the_effective_rank_is_the_exponent_of_the_entropy_of_singular_values(models, recipe, monkeypatch, name):
    monkeypatch.setattr(merger.engine.memory, "SLICE", 64)
    result = inspect(recipe("linear"), rank=True).view("task_vectors").tensors[name].effective_rank
    shares = [
        s / s.sum() for s in (np.linalg.svd(delta.astype("f8"), compute_uv=False) for delta in deltas(models, name))
    ]
    assert list(result.values()) == pytest.approx([np.exp(-(p * np.log(p)).sum()) for p in shares], rel=1e-6)


def test_a_matrix_of_rank_one_has_effective_rank_one_and_an_untouched_one_none(tmp_path):
    base = {"a.weight": torch.zeros(6, 4), "b.weight": torch.zeros(4, 6), "c.weight": torch.zeros(4)}
    save(tmp_path / "base", base)
    save(tmp_path / "tune", {**base, "a.weight": torch.arange(1.0, 7).outer(torch.arange(1.0, 5))})
    inspection = inspect_model(str(tmp_path / "tune"), str(tmp_path / "base"), rank=True)
    ranks = {name: facts.effective_rank for name, facts in inspection.view("task_vectors").tensors.items()}
    assert ranks == {"a.weight": {"tune": pytest.approx(1)}, "b.weight": {"tune": 0}, "c.weight": None}


def test_nobody_waits_for_ranks_or_curves_that_were_not_asked_for(recipe):
    inspection = inspect(recipe("linear"))
    assert (inspection.view("task_vectors").whole.effective_rank, inspection.curves) == (None, None)


# --- against density ------------------------------------------------------------------------------


@pytest.mark.parametrize("density", [0.05, 0.2, 0.5, 1])
def test_a_curve_goes_through_what_the_stage_top_leaves(recipe, monkeypatch, density):
    monkeypatch.setattr(merger.engine.memory, "SLICE", 64)
    inspection = inspect(recipe(pipeline=[{"top": {"density": density}}, "sum"]), curves=True)
    at, top_facts = inspection.curves.whole.densities.index(density), inspection.view("top").whole
    for expert, peer in itertools.permutations(EXPERTS, 2):
        assert inspection.curves.whole.overlap[expert][peer][at] == pytest.approx(top_facts.overlap[expert][peer])
    for name in EXPERTS:
        assert inspection.curves.whole.uneven_rows[name][at] == pytest.approx(top_facts.uneven_rows[name])


def test_equal_values_are_kept_by_a_curve_as_by_the_stage(tmp_path):
    for seed, name in enumerate(("base", *EXPERTS)):
        save(tmp_path / name, {key: values.sign() for key, values in llama(seed, rows=24, hidden=16).items()})
    content = {"base": "base", "experts": {name: name for name in EXPERTS}, "output": {"path": "out"}}
    merge_recipe = Recipe.parse({**content, "pipeline": [{"top": {"density": 0.3}}, "sum"]}, tmp_path)
    inspection = inspect(merge_recipe, curves=True)
    assert inspection.view("task_vectors").whole.distinct == dict.fromkeys(EXPERTS, 2)
    at, top_facts = inspection.curves.whole.densities.index(0.3), inspection.view("top").whole
    assert [inspection.curves.whole.overlap["code"][name][at] for name in EXPERTS[1:]] == pytest.approx(
        [top_facts.overlap["code"][name] for name in EXPERTS[1:]]
    )


def test_random_masks_do_on_average_what_a_curve_says_of_them(tmp_path):
    generator = torch.Generator().manual_seed(0)
    for name in ("base", "code", "math"):
        changed = torch.rand(400, 300, generator=generator) < torch.linspace(0.2, 1, 400).view(-1, 1)
        save(
            tmp_path / name,
            {"a.weight": torch.randn(400, 300, generator=generator) * (changed if name != "base" else 0)},
        )
    drawn = [{"top": {"density": 0.3, "score": "uniform", "claim_zeros": False}}, "sum"]
    content = {"base": "base", "experts": {"code": "code", "math": "math"}, "output": {"path": "out"}}
    inspection = inspect(Recipe.parse({**content, "pipeline": drawn}, tmp_path), curves=True)
    at, top_facts = inspection.curves.whole.densities.index(0.3), inspection.view("top").whole
    expected = inspection.curves.whole.overlap_random["code"]["math"][at]
    error = math.sqrt(expected * (1 - expected) / (0.3 * 400 * 300))
    assert top_facts.overlap["code"]["math"] == pytest.approx(expected, abs=4 * error)
    assert expected > 0.3 + 10 * error  # more than among all positions: both change the lower rows
    assert top_facts.uneven_rows["code"] == pytest.approx(
        inspection.curves.whole.uneven_rows_random["code"][at], rel=0.02
    )


# --- between the stages ---------------------------------------------------------------------------


def test_what_a_stage_leaves_is_seen_before_it_is_merged(models, recipe):
    inspection = inspect(recipe(pipeline=[{"top": {"density": 0.25}}, {"scale": {"lambda": 2}}, "sum"]))
    scaled_deltas = [[2 * largest(delta, 0.25)] for delta in deltas(models, UP)]
    assert [view.name for view in inspection.views] == ["task_vectors", "top", "scale", "result"]
    agree(inspection.view("scale").tensors[UP], scaled_deltas)


def test_a_method_shows_the_stages_it_is_made_of(recipe):
    inspection = inspect(recipe("ties", {"density": 0.3}))
    assert [(view.name, view.about) for view in inspection.views] == [
        ("task_vectors", "experts"),
        ("top", "experts"),
        ("sign_elect", "merged"),
        ("result", "merged"),
    ]
    assert [view.name for view in inspection.merging()] == ["top"]


def test_a_stage_that_comes_twice_is_numbered_and_a_rules_own_is_named_for_it(recipe):
    rules = [{"kinds": ["vector"], "pipeline": [{"top": {"density": 0.5}}, "sum"]}]
    pipeline = [{"top": {"density": 0.5}}, {"top": {"density": 0.25}}, "sum"]
    inspection = inspect(recipe(pipeline=pipeline, rules=rules))
    assert [view.name for view in inspection.views] == ["task_vectors", "top", "top2", "rule1.top", "result"]
    assert [view.name for view in inspection.merging()] == ["top2", "rule1.top"]
    assert set(inspection.view("rule1.top").kinds) == {"vector"}


def test_a_ranking_of_the_whole_model_is_counted_once(models, recipe):
    facts = inspect(recipe("ties", {"density": 0.25})).view("top").whole
    names = sorted(models["base"], key=lambda name: natural(name))
    flat = [np.concatenate([deltas(models, name)[k].ravel() for name in names]) for k in range(3)]
    agree(facts, [[largest(vector, 0.25)] for vector in flat])


@pytest.mark.parametrize("method", ["ties", "cabs", "dare_linear"])
def test_facts_do_not_depend_on_how_a_tensor_is_cut(recipe, monkeypatch, method):
    def counted():
        inspection = inspect(recipe(method), rank=True, curves=True)
        return [*(facts for view in inspection.views for facts in view.tensors.values()), inspection.curves.whole]

    expected = counted()
    monkeypatch.setattr(merger.engine.memory, "SLICE", 64)
    monkeypatch.setattr(merger.engine.memory, "HOLD", 0)
    for reference, sliced in zip(expected, counted(), strict=True):
        assert flattened(reference) == pytest.approx(flattened(sliced), rel=1e-6)


def sums(deltas, cut=None):
    """The sums of task vectors [k r c] by counter, counted whole or in two slices."""
    k, rows, columns = deltas.shape
    shape = MatrixShape(k, rows, columns)
    counters = ViewCounters([VectorCounter(shape), ValueCounter(shape)])
    for first, stop in itertools.pairwise(sorted({0, cut or rows, rows})):
        counters.count(ExpertSlice(first, torch.zeros(stop - first, columns), deltas[:, first:stop]))
    return counters.sums()


def facts(deltas, experts):
    """The statistics of task vectors [k r c]."""
    return statistics_of("experts", sums(deltas), experts)


def flattened(facts):
    """All numbers of facts, in order."""
    values = [facts.__dict__]
    numbers = []
    while values:
        value = values.pop()
        nested = isinstance(value, dict | list)
        values.extend(value.values() if isinstance(value, dict) else value if nested else ())
        numbers.extend([] if nested or value is None else [value])
    return numbers


def test_what_a_rule_copies_is_named_and_not_counted(recipe):
    inspection = inspect(recipe("linear", rules=[{"tensors": "norm", "use": "code"}]))
    assert inspection.copied["model.norm.weight"] == "code"
    assert "model.norm.weight" not in inspection.view("task_vectors").tensors


@pytest.fixture
def other_forms(tmp_path):
    """Models with a matrix stored [in, out] and with packed experts; their tensors, and a recipe by a pipeline."""
    shapes = {"h.0.c_fc.weight": (4, 6), "h.0.c_fc.bias": (6,), "h.0.experts.up.weight": (3, 4, 5)}
    tensors = {}
    for seed, name in enumerate(("base", *EXPERTS)):
        generator = torch.Generator().manual_seed(seed)
        drawn = {key: torch.randn(shape, generator=generator) for key, shape in shapes.items()}
        if name == "code":
            drawn["h.0.c_fc.weight"][0] = tensors["base"]["h.0.c_fc.weight"][0]  # no neuron's first input changes
        tensors[name] = drawn
        save(tmp_path / name, tensors[name], {"model_type": "gpt2", "hidden_size": 5})
    pipeline = [{"top": {"density": 0.5, "scope": "row"}}, "sum"]
    experts = {name: name for name in EXPERTS}
    content = {"base": "base", "experts": experts, "pipeline": pipeline, "output": {"path": "out"}}
    return tensors, Recipe.parse(content, tmp_path)


def test_rows_are_those_of_a_neuron_however_it_is_stored(other_forms):
    _, merge_recipe = other_forms
    name = "h.0.c_fc.weight"
    forecast = inspect(merge_recipe)
    top_facts = forecast.view("top").tensors[name]
    assert top_facts.uneven_rows == dict.fromkeys(EXPERTS, 0)  # 2 of each neuron's 4 inputs
    assert all(value > 0 for value in top_facts.uneven_columns.values())
    merge(merge_recipe)
    outcome = inspect_merge(merge_recipe.folder / "out")  # which looks at the matrix as it is stored
    for view, tolerance in (("task_vectors", None), ("result", 1e-6)):
        expected, actual = (flattened(inspection.view(view).tensors[name]) for inspection in (forecast, outcome))
        assert expected == pytest.approx(actual, rel=tolerance)


def test_packed_experts_add_up_to_their_tensor(other_forms):
    tensors, merge_recipe = other_forms
    name = "h.0.experts.up.weight"
    facts = inspect(merge_recipe).view("task_vectors").tensors[name]
    agree(facts, [[delta] for delta in deltas(tensors, name)])
    picture = inspect(merge_recipe, picture=name).pictures[0]
    assert (picture.tensor, len(picture.density["code"]), len(picture.density["code"][0])) == (f"{name}[0]", 4, 5)


# --- what comes of it -----------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["ties", "im", "cabs", "task_arithmetic"])
def test_positions_end_where_the_merged_file_says(models, recipe, method):
    merge_recipe = recipe(method)
    facts = inspect(merge_recipe).view("result").whole
    merge(merge_recipe)
    tensors = load(merge_recipe.folder / "out")
    ends = dict.fromkeys(("base", *EXPERTS, "blend"), 0)
    for name, values in tensors.items():
        for i, value in enumerate(values.flatten().tolist()):
            matches = (label for label in ("base", *EXPERTS) if models[label][name].flatten()[i].item() == value)
            ends[next(matches, "blend")] += 1
    size = sum(ends.values())
    assert [facts.at_base, *facts.at_expert.values(), facts.blend] == [n / size for n in ends.values()]


def test_the_merged_vector_is_compared_with_those_it_came_from(models, recipe):
    facts = inspect(recipe("task_arithmetic", {"lambda": 0.5})).view("result").tensors[UP]
    expert_deltas = deltas(models, UP)
    merged = 0.5 * sum(expert_deltas)
    norm = np.linalg.norm
    assert facts.norm == pytest.approx(norm(merged))
    assert facts.density == np.mean(merged != 0)
    cosines = [(merged * delta).sum() / norm(merged) / norm(delta) for delta in expert_deltas]
    assert list(facts.cosine.values()) == pytest.approx(cosines, rel=1e-6)


# --- what the papers say --------------------------------------------------------------------------


def test_overlap_is_the_shared_part_of_the_first_and_jaccard_of_both():
    statistics = facts(torch.tensor([[[1.0, 1, 0, 1]], [[0, 1, 1, 1]], [[0, 0, 0, 1]]]), ("a", "b", "c"))
    assert (statistics.overlap["a"]["b"], statistics.jaccard["a"]["b"]) == (pytest.approx(2 / 3), 0.5)
    assert (statistics.overlap["a"]["c"], statistics.overlap["c"]["a"]) == (pytest.approx(1 / 3), 1)


def test_random_masks_overlap_as_much_as_they_are_dense():
    masks = [torch.rand(1, 400, 500, generator=torch.Generator().manual_seed(k)) < 0.3 for k in range(2)]
    statistics = facts(torch.cat(masks).float(), ("a", "b"))
    error = math.sqrt(0.3 * 0.7 / (0.3 * 200_000))
    assert statistics.overlap["a"]["b"] == pytest.approx(0.3, abs=4 * error)
    assert statistics.jaccard["a"]["b"] == pytest.approx(0.3 / (2 - 0.3), abs=4 * error)


def test_random_masks_are_as_uneven_as_a_binomial():
    masks = (torch.rand(1, 4000, 500, generator=torch.Generator().manual_seed(1)) < 0.2).float()
    statistics = facts(masks, ("a",))
    assert statistics.uneven_rows["a"] == pytest.approx(math.sqrt(0.8 / (0.2 * 500)), rel=0.05)


@pytest.mark.parametrize(
    ("method", "parameters", "shares"),
    [
        ("im", {"density": {"code": 0.2, "math": 0.3, "wiki": 0.4}, "claim_zeros": False}, [0.2, 0.3, 0.4]),
        ("cabs", {"n": 1, "m": 4}, [0.25] * 3),
        ("obim", {"hessian": "none", "nonlinear": "magnitude"}, [1 / 3] * 3),
    ],
)
def test_exclusive_masks_never_overlap_and_their_union_is_the_sum(models, recipe, method, parameters, shares):
    inspection = inspect(recipe(method, parameters))
    for view in inspection.merging():
        for facts in (view.whole, *view.tensors.values()):
            assert all(value == 0 for row in facts.overlap.values() for value in row.values())
            assert sum(facts.holders[1:]) == pytest.approx(sum(facts.density.values()))
            assert facts.holders[2:] == [0, 0]
            assert all(d <= share + 1e-9 for d, share in zip(facts.density.values(), shares, strict=True))


def test_blocks_that_fill_whole_rows_are_kept_in_perfect_balance(tmp_path):
    models = {name: llama(seed, hidden=16) for seed, name in enumerate(("base", *EXPERTS))}
    for name, tensors in models.items():
        save(tmp_path / name, tensors)
    content = {"base": "base", "experts": {name: name for name in EXPERTS}, "output": {"path": "out"}}
    pipeline = [{"bs": {"n": 2, "m": 8}}, "sum"]
    view = inspect(Recipe.parse({**content, "pipeline": pipeline}, tmp_path)).view("bs")
    assert view.whole.uneven_rows == dict.fromkeys(EXPERTS, 0)
    assert all(value > 0.1 for value in view.whole.uneven_columns.values())


# --- the sums themselves --------------------------------------------------------------------------

matrices = st.integers(1, 4).flatmap(
    lambda k: st.lists(st.sampled_from([0.0, -0.0, 1.0, -2.0, 1e-30, -1e-30]), min_size=k * 12, max_size=k * 12).map(
        lambda values: torch.tensor(values).view(k, 4, 3)
    )
)


@given(matrices, st.integers(1, 3))
def test_sums_of_slices_are_sums_of_the_whole(deltas, cut):
    expected, added = sums(deltas), sums(deltas, cut)
    assert added[ValueCounter] == expected[ValueCounter]
    expected, added = expected[VectorCounter], added[VectorCounter]
    assert np.allclose(added.products, expected.products)
    assert replace(added, products=()) == replace(expected, products=())


@given(matrices)
def test_every_position_is_held_by_some_number_of_experts_and_ends_somewhere(deltas):
    counts = sums(deltas)[VectorCounter]
    assert sum(counts.holders) == counts.elements == 12
    positions = [counts.joint[k][k] for k in range(len(deltas))]
    assert sum(n * number for n, number in enumerate(counts.holders)) == sum(positions)
    assert sum(count_endings(deltas.sum(0), torch.zeros(4, 3), deltas)) == 12


@given(matrices)
def test_signs_differ_even_where_a_product_would_vanish(deltas):
    counts = sums(deltas)[VectorCounter]
    for i, j in itertools.combinations(range(len(deltas)), 2):
        pairs = zip(deltas[i].flatten().tolist(), deltas[j].flatten().tolist(), strict=True)
        assert counts.conflicts[i][j] == sum(x < 0 < y or y < 0 < x for x, y in pairs)


def test_equal_experts_share_a_position_with_the_first_of_them():
    experts = torch.tensor([[1.0, 0, 3, 4], [1, 7, 2, 4]])
    assert count_endings(torch.tensor([1.0, 0, 2, 5]), torch.zeros(4), experts) == (1, 1, 1, 1)


def test_nothing_at_all_has_shares_of_zero():
    zeros = torch.zeros(2, 1, 3)
    statistics = facts(zeros, ("a", "b"))
    assert (statistics.overlap["a"]["b"], statistics.cosine["a"]["b"], statistics.density["a"]) == (0, 0, 0)
    counters = ViewCounters([MergedCounter(MatrixShape(2, 1, 3))])
    counters.count(MergedSlice(0, zeros[0], zeros, zeros[0], zeros[0], zeros))
    merged = statistics_of("merged", {**sums(zeros), **counters.sums()}, ("a", "b"))
    assert (merged.at_base, merged.blend, merged.cosine) == (1, 0, {"a": 0, "b": 0})


@pytest.mark.parametrize(("rows", "columns"), [(5, 3), (8, 12), (10, 7)])
def test_a_picture_counts_every_kept_position_in_one_piece(rows, columns):
    values = torch.randint(0, 2, (2, rows, columns), generator=torch.Generator().manual_seed(0)).float()
    halves = [positions_by_cell(values[:, :3], 0, rows, 4), positions_by_cell(values[:, 3:], 3, rows, 4)]
    slow = torch.zeros(2, min(rows, 4), min(columns, 4))
    for k, i, j in values.nonzero().tolist():
        slow[k, i * min(rows, 4) // rows, j * min(columns, 4) // columns] += 1
    assert torch.equal(sum(halves).float(), slow)


def test_a_chosen_tensor_is_mapped_before_and_after_every_stage(models, recipe):
    pictures = inspect(recipe("ties", {"density": 0.25, "scope": "tensor"}), picture=UP).pictures
    assert [(picture.tensor, picture.view) for picture in pictures] == [(UP, "task_vectors"), (UP, "top")]
    for k, expert in enumerate(EXPERTS):
        mask = largest(deltas(models, UP)[k], 0.25) != 0
        assert np.array_equal(pictures[1].density[expert], mask)  # 32 x 16: a piece for each element


def test_an_unknown_tensor_offers_the_near_one(recipe):
    with pytest.raises(RecipeError, match=r"picture='model.norm': no such tensor is merged; did you mean 'model.norm"):
        inspect(recipe("linear"), picture="model.norm")


def test_what_is_seen_is_plain_data(recipe):
    inspection = inspect(recipe("ties"))
    content = json.loads(json.dumps(inspection.as_json()))
    assert (content["format"], content["subject"], content["experts"]) == (1, "recipe", list(EXPERTS))
    assert content["views"][0]["whole"]["density"] == inspection.view("task_vectors").whole.density
    assert content["bytes_read"] > 0


@pytest.mark.parametrize("subject", ["a recipe", "a finished merge", "a fine-tune"])
def test_what_several_devices_see_is_what_one_sees(recipe, tmp_path, devices, monkeypatch, subject):
    merge(recipe("ties"))
    devices("cpu")
    monkeypatch.setattr(merger.engine.memory, "SLICE", 192)
    choices = []

    def use(*names):
        for module in (merger.engine.machine, merger.inspection):
            monkeypatch.setattr(module, "select_devices", lambda choice: choices.append(choice) or names)

    def inspection():
        options = RunOptions(device="cuda")
        if subject == "a recipe":
            return inspect(recipe("ties"), options, rank=True, picture=UP)
        if subject == "a finished merge":
            return inspect_merge(tmp_path / "out", options, rank=True, picture=UP)
        return inspect_model(str(tmp_path / "code"), str(tmp_path / "base"), options, rank=True, picture=UP)

    use("cpu")
    on_cpu = inspection()
    use("cuda:0", "cuda:1")
    on_devices = inspection()
    assert set(choices) == {"cuda"}
    assert on_cpu.views
    assert (on_devices.views, on_devices.pictures) == (on_cpu.views, on_cpu.pictures)
