"""SparseGPT on task vectors, against the update written slowly, and what it is for: less error in the outputs."""

import json
import shutil
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from checkpoints import load
from tiny import Inputs, merge, tensor

import merger
from merger.demo import tasks as demo_tasks
from merger.methods._thinning import BLOCK
from merger.pipeline.parameters import Place
from merger.pipeline.registry import checked
from merger.pipeline.stages import bind

MODELS = Path(merger.__file__).parent / "demo" / "models"


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def correlated(columns, seed=0):
    """Inputs [t c] that depend on each other."""
    return randn(4 * columns, columns, seed=seed) @ randn(columns, columns, seed=seed + 1)


def inputs_of(*inputs):
    """What calibration knows of experts whose inputs [t c] are given."""
    grams = torch.stack([x.T @ x / len(x) for x in inputs])
    return Inputs(second_moment=grams.diagonal(dim1=1, dim2=2), mean=torch.zeros(grams.shape[:2]), gram=grams)


def thinned(delta, x, density, damping="0.01"):
    """What is left of one expert's task vector."""
    stages = [checked("sparsegpt", {"density": density, "damping": damping}), checked("sum", {})]
    return merge(stages, {"a": delta}, inputs=inputs_of(x))


def slowly(delta, gram, density, damping=0.01):
    """Column by column, with the inverse of what is left of H, made anew for each."""
    delta, rows, columns = delta.double().clone(), *delta.shape
    h = gram.double() + damping * gram.diagonal().mean() * torch.eye(columns)
    inverse = [torch.linalg.inv(h[j:, j:]) for j in range(columns)]
    for first in range(0, columns, BLOCK):
        last = min(first + BLOCK, columns)
        scores = torch.stack([delta[:, j] ** 2 / inverse[j][0, 0] for j in range(first, last)], 1)
        count = int(density * rows * last) - int(density * rows * first)
        selection = torch.zeros(scores.numel(), dtype=torch.bool)
        selection[scores.flatten().argsort(descending=True)[:count]] = True
        for j, column in zip(range(first, last), selection.view_as(scores).T, strict=True):
            error = delta[:, j].masked_fill(column, 0) / inverse[j][0, 0]
            delta[:, j:] -= torch.outer(error, inverse[j][0])
            delta[:, j].masked_fill_(~column, 0)
    return delta.float()


@pytest.mark.parametrize("columns", [5, BLOCK, BLOCK + 9])
@pytest.mark.parametrize("density", [Fraction(1, 4), Fraction(1, 2)])
def test_it_is_the_paper_s_update(columns, density):
    delta, x = randn(6, columns), correlated(columns, seed=3)
    expected = slowly(delta, inputs_of(x).gram[0], density)
    torch.testing.assert_close(thinned(delta, x, str(density)), expected, rtol=1e-3, atol=1e-4)


def test_the_example_worked_by_hand():
    inputs = Inputs(second_moment=tensor([[2, 2]]), mean=torch.zeros(1, 2), gram=tensor([[[2, 1], [1, 2]]]))
    result = merge([checked("sparsegpt", {}), checked("sum", {})], {"a": [[1.0, 3.0]]}, inputs=inputs)
    torch.testing.assert_close(result, tensor([[0, 3 + 1 / 2.02]]))


@pytest.mark.parametrize("density", ["0", "0.1", "1/3", "1"])
def test_it_keeps_exactly_its_share(density):
    result = thinned(randn(7, 2 * BLOCK + 3), correlated(2 * BLOCK + 3), density)
    assert int((result != 0).sum()) == int(Fraction(density) * 7 * (2 * BLOCK + 3))


def test_what_is_kept_whole_is_not_changed():
    delta = randn(4, 9)
    assert torch.equal(thinned(delta, correlated(9), "1"), delta)


def test_inputs_that_do_not_depend_on_each_other_keep_what_obm_keeps():
    delta, size = randn(6, 8), torch.arange(1.0, 9)
    x = torch.diag(size)
    obm = merge([checked("obm", {"density": 0.5}), checked("sum", {})], {"a": delta}, inputs=inputs_of(x))
    torch.testing.assert_close(thinned(delta, x, "0.5", damping="0.000001"), obm)


def test_outputs_come_closer_than_by_dropping_the_same_entries():
    delta, x = randn(16, 24), correlated(24, seed=5)
    result = thinned(delta, x, "0.5")
    dropped = delta * (result != 0)
    assert ((result - delta) @ x.T).norm() < 0.9 * ((dropped - delta) @ x.T).norm()


def test_an_expert_whose_inputs_were_never_seen_is_thinned_by_magnitude():
    deltas = dict(zip("ab", randn(2, 4, 6), strict=True))
    inputs = inputs_of(torch.zeros(5, 6), correlated(6))
    result = merge([checked("sparsegpt", {}), checked("sum", {"weight": {"a": 1, "b": 0}})], deltas, inputs=inputs)
    by_size = merge([checked("top", {"density": 0.5}), checked("sum", {"weight": {"a": 1, "b": 0}})], deltas)
    assert torch.equal(result, by_size)


def test_exclusive_experts_hold_no_position_twice_and_the_first_chooses_as_if_alone():
    deltas = dict(zip("abc", randn(3, 8, 12), strict=True))
    inputs = inputs_of(*(correlated(12, seed=i) for i in range(3)))

    def left(expert, **options):
        only = {name: int(name == expert) for name in deltas}
        stages = [checked("sparsegpt", {"density": "1/3", **options}), checked("sum", {"weight": only})]
        return merge(stages, deltas, inputs=inputs)

    masks = {name: left(name, exclusive=["b", "a", "c"]) != 0 for name in deltas}
    assert torch.equal(sum(mask.int() for mask in masks.values()), torch.ones(8, 12, dtype=torch.int32))
    assert torch.equal(left("b", exclusive=["b", "a", "c"]), left("b"))


@pytest.mark.parametrize("kind", ["vector", "embedding"])
def test_tensors_without_inputs_are_thinned_by_magnitude(kind):
    delta = randn(1 if kind == "vector" else 4, 6)
    result, by_size = (
        merge([checked(name, {"density": 0.5}), checked("sum", {})], {"a": delta}, kind=kind)
        for name in ("sparsegpt", "top")
    )
    assert torch.equal(result, by_size)


def test_gram_matrices_are_left_as_they_were():
    inputs = inputs_of(correlated(6).double())
    gram = inputs.gram.clone()
    merge([checked("sparsegpt", {}), checked("sum", {})], {"a": randn(4, 6)}, inputs=inputs)
    assert torch.equal(inputs.gram, gram)


def test_damping_that_leaves_h_without_an_inverse_is_refused():
    with pytest.raises(ValueError, match="damping: is 0, expected at least 1e-06"):
        bind(checked("sparsegpt", {"damping": 0}), Place(("a",)))


def test_it_runs_block_by_block_on_a_real_model(tmp_path, monkeypatch):
    monkeypatch.setenv("MERGER_CACHE", str(tmp_path / "cache"))
    shutil.copytree(MODELS, tmp_path / "models")
    lines = (json.dumps({"text": p + a}) for p, a in demo_tasks.examples("upper", "calibration", 8))
    (tmp_path / "upper.jsonl").write_text("\n".join(lines))
    content = {
        "base": "models/base",
        "experts": {"upper": "models/upper"},
        "pipeline": [{"sparsegpt": {"density": 0.25}}, "sum"],
        "calibration": {"data": "upper.jsonl", "samples": 8},
        "output": {"path": "out", "dtype": "float32"},
    }
    merger.merge(merger.Recipe.parse(content, folder=tmp_path))
    merged, base = load(tmp_path / "out"), load(MODELS / "base")
    name = "model.layers.1.mlp.up_proj.weight"
    changed = merged[name] != base[name].float()
    assert int(changed.sum()) == changed.numel() // 4


# --- tailor ---------------------------------------------------------------------------------------


def tailored(deltas, base, xs, density=0.25):
    stages = [checked("tailor", {"density": density}), checked("sum", {})]
    return merge(stages, deltas, base=base, inputs=inputs_of(*xs)) - base


def slow_tailor(delta, base, gram, density):
    """As `slowly`, of one block of columns, by the score of Model Tailor."""
    delta, base, columns = delta.double().clone(), base.double(), delta.shape[1]
    h = gram.double() + 0.01 * gram.diagonal().mean() * torch.eye(columns)
    inverse = [torch.linalg.inv(h[j:, j:]) for j in range(columns)]
    saliency = torch.stack([(base + delta)[:, j] ** 2 / inverse[j][0, 0] for j in range(columns)], 1)

    def z(values):
        return (values - values.mean(1, keepdim=True)) / values.std(1, correction=0, keepdim=True)

    scores = (z(delta.abs()) + z(saliency)) / 2
    stays = torch.zeros(delta.numel(), dtype=torch.bool)
    stays[scores.flatten().argsort(descending=True)[: int(density * delta.numel())]] = True
    for j, column in zip(range(columns), stays.view_as(delta).T, strict=True):
        error = delta[:, j].masked_fill(column, 0) / inverse[j][0, 0]
        delta[:, j:] -= torch.outer(error, inverse[j][0])
        delta[:, j].masked_fill_(~column, 0)
    return delta.float()


def test_tailor_keeps_by_change_and_weight_and_makes_up_for_the_rest():
    delta, base, x = randn(6, 20), 3 * randn(6, 20, seed=5), correlated(20, seed=3)
    expected = slow_tailor(delta, base, inputs_of(x).gram[0], Fraction(1, 4))
    torch.testing.assert_close(tailored({"a": delta}, base, [x]), expected, rtol=1e-3, atol=1e-4)


def test_model_tailor_adds_the_patches():
    deltas, base = {"a": randn(6, 20), "b": randn(6, 20, seed=1)}, randn(6, 20, seed=5)
    xs = [correlated(20, seed=3), correlated(20, seed=4)]
    patches = [tailored({expert: delta}, base, [x]) for (expert, delta), x in zip(deltas.items(), xs, strict=True)]
    stage = checked("model_tailor", {"density": 0.25, "lambda": 0.5})
    result = merge(stage, deltas, base=base, inputs=inputs_of(*xs)) - base
    torch.testing.assert_close(result, 0.5 * sum(patches), rtol=0, atol=1e-5)


def test_tailor_without_inputs_keeps_the_largest_changes():
    stages = [checked("tailor", {"density": 0.5}), checked("sum", {})]
    assert torch.equal(merge(stages, {"a": [[4.0, -3, 1, 0]]}), tensor([[4, -3, 0, 0]]))
