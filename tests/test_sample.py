"""A sample of the weights before a merge: how far each expert is from the base, and what it claims unchanged."""

import json

import pytest
import torch
from checkpoints import llama, save, trio

from merger.engine.merge import merge
from merger.planning.planner import plan
from merger.planning.sample import ELEMENTS, sample_changes, sample_notes
from merger.recipe.recipe import Recipe

UP, DOWN = "model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.down_proj.weight"
NORM = "model.norm.weight"


def weights(*, seed=0, shape=(64, 64), dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    drawn = {name: torch.randn(*shape, generator=generator).to(dtype) for name in (UP, DOWN)}
    return {**drawn, NORM: torch.ones(shape[-1], dtype=dtype)}


def changed(base, share, factor=1.25):
    """A fine-tune that multiplies every ``1/share``-th element of the matrices."""
    step = round(1 / share)
    tuned = {name: values.clone() for name, values in base.items()}
    for name in (UP, DOWN):
        tuned[name].view(-1)[::step] *= factor
    return tuned


@pytest.fixture
def sampled(tmp_path):
    """The sampled changes of experts by name, merged as a recipe says."""

    def sample(base, /, *, experts, **recipe):
        save(tmp_path / "base", base)
        for name, tensors in experts.items():
            save(tmp_path / name, tensors)
        choice = {} if recipe else {"method": "linear"}
        content = {"base": "base", "experts": {name: name for name in experts}, "output": {"path": "out"}}
        merge_plan = plan(Recipe.parse({**content, **choice, **recipe}, tmp_path))
        try:
            return sample_changes(merge_plan)
        finally:
            merge_plan.close()

    return sample


def test_a_sample_says_how_large_a_change_is_beside_the_base_and_how_many_elements_it_touches(sampled):
    base = weights()
    changes = sampled(base, experts={"all": changed(base, 1), "half": changed(base, 1 / 2), "none": base})

    assert changes["all"].relative_size == pytest.approx(0.25)
    assert (changes["all"].changed, changes["half"].changed, changes["none"].changed) == (1, 0.5, 0)
    assert changes["half"].relative_size == pytest.approx(0.25 * 0.5**0.5, rel=0.05)
    assert changes["none"].relative_size == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("expert_dtype", [torch.float32, torch.bfloat16])
def test_a_sample_is_of_the_middle_of_every_matrix_in_any_dtype(sampled, dtype, expert_dtype):
    base, expert = weights(dtype=dtype), weights(seed=1, dtype=expert_dtype)
    (change,) = sampled(base, experts={"a": expert}).values()

    first = (64 * 64 - ELEMENTS) // 2
    middle = slice(first, first + ELEMENTS)
    b, e = (torch.cat([model[n].view(-1)[middle].double() for n in (UP, DOWN)]) for model in (base, expert))
    assert change.relative_size == pytest.approx(float((e - b).norm() / b.norm()), rel=1e-12)
    assert change.changed == float((e != b).double().mean())


def test_unrelated_models_differ_by_the_root_of_two_and_are_noted(sampled):
    changes = sampled(weights(), experts={"stranger": weights(seed=1), "tuned": changed(weights(), 1, 1.01)})

    assert changes["stranger"].relative_size == pytest.approx(2**0.5, rel=0.05)
    assert list(sample_notes(changes)) == [
        f"stranger: differs from the base by {changes['stranger'].relative_size:.2f} of the base's size in a sample of "
        "the weights, where fine-tunes differ by less than 0.1; was it trained from this base?"
    ]


def test_an_unrelated_model_with_small_weights_is_noted_too(sampled):
    small = {name: values / 8 for name, values in weights(seed=1).items()}
    assert sampled(weights(), experts={"small": small})["small"].relative_size == pytest.approx(1, rel=0.05)


IM = {"density": {"sparse": "1/3", "dense": "1/3"}, "order": ["sparse", "dense"]}


@pytest.mark.parametrize(
    ("choice", "claimed"),
    [
        ({"method": "im", "parameters": IM}, 1 / 3 - 0.01),
        ({"method": "im", "parameters": {**IM, "claim_zeros": False}}, 0),
        ({"method": "im", "parameters": {**IM, "order": ["dense", "sparse"]}}, 0),  # nobody chooses after it
        ({"method": "im", "parameters": {**IM, "density": {"sparse": 0.01, "dense": 0.5}}}, 0),
        ({"method": "im", "parameters": {**IM, "scope": "global"}}, 1 / 3 - 0.01),
        ({"method": "ties_im", "parameters": {"order": ["sparse", "dense"]}}, 0.2 - 0.01),
        ({"method": "im", "parameters": {**IM, "density": "1/2", "ratio_of": "remaining"}}, 1 / 2 - 0.01),
        ({"method": "cabs", "parameters": {"n": 64, "m": 256}}, 1 / 4 - 0.01),
        ({"method": "cabs", "parameters": {"n": 64, "m": 256, "claim_zeros": False}}, 0),
        ({"method": "cabs_low_overlap", "parameters": {"n": 160, "m": 256}}, 160 / 256 - 0.01),
        ({"method": "ties", "parameters": {"density": 0.5}}, 0),  # what one trims is closed to nobody
        ({"pipeline": [{"bs": {"n": 1, "m": 4, "exclusive": "listed"}}, "sum"]}, 1 / 4 - 0.01),
    ],
)
def test_a_sample_says_which_share_an_expert_claims_without_having_changed_it(sampled, choice, claimed):
    base = weights()
    changes = sampled(base, experts={"sparse": changed(base, 1 / 100), "dense": changed(base, 1)}, **choice)

    assert changes["sparse"].claimed_unchanged == pytest.approx(claimed, abs=0.001)
    assert changes["dense"].claimed_unchanged == 0


def test_claims_are_compared_matrix_by_matrix(sampled):
    base = weights()
    half = {**base, UP: base[UP] * 1.25}  # all of one matrix, nothing of the other
    changes = sampled(base, experts={"sparse": half, "dense": changed(base, 1)}, method="im", parameters=IM)
    assert changes["sparse"].claimed_unchanged == pytest.approx(1 / 6)


def test_claims_of_a_ranking_over_the_whole_model_are_compared_over_the_whole_model(sampled):
    base = weights()
    half = {**base, UP: base[UP] * 1.25}
    ranked = {**IM, "scope": "global"}
    changes = sampled(base, experts={"sparse": half, "dense": changed(base, 1)}, method="im", parameters=ranked)
    assert changes["sparse"].claimed_unchanged == 0


def test_an_expert_without_weights_here_is_left_out(sampled, tmp_path):
    assert sampled(weights(shape=(4, 4)), experts={"a": weights(seed=1, shape=(4, 4))}) == {}


def test_weights_that_are_not_finite_are_left_to_the_merge(sampled):
    damaged = weights()
    damaged[UP][32, 0] = float("nan")
    changes = sampled(weights(), experts={"broken": damaged, "good": changed(weights(), 1)})
    assert list(changes) == ["good"]


# --- where it is told -----------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base = weights()
    experts = {"sparse": changed(base, 1 / 100), "stranger": weights(seed=1)}
    for name, tensors in {"base": base, **experts}.items():
        save(name, tensors)
    (tmp_path / "recipe.yaml").write_text(
        "base: base\nexperts: {sparse: sparse, stranger: stranger}\nmethod: im\nparameters: {order: listed}\n"
        "output: {path: out}\n"
    )
    return tmp_path


CLAIM = (
    "sparse: changed 1.0% of a sample of the weights, and claims 49.0% of them without having changed them, which "
    "keeps these at the base; claim_zeros: false leaves them to the next expert"
)


def test_plan_shows_the_changes_and_notes_what_is_wrong_with_them(merger, folder):
    output = merger("plan", "recipe.yaml").out
    assert "|delta| / |base|" in output
    assert f"note: {CLAIM}" in output
    assert "note: stranger: differs from the base by 1." in output


def test_the_plan_for_machines_has_the_changes(merger, folder):
    content = json.loads(merger("plan", "recipe.yaml", "--json").out)
    assert content["changes"]["sparse"]["changed"] == pytest.approx(0.01, abs=0.001)
    assert CLAIM in content["notes"]


def test_a_run_notes_the_same_and_its_manifest_keeps_it(folder):
    result = merge(Recipe.load("recipe.yaml"))
    assert CLAIM in result.notes
    assert any(note.startswith("stranger: differs from the base by 1.") for note in result.notes)
    assert CLAIM in json.loads((folder / "out/merger.json").read_text())["notes"]


def test_every_plan_with_exclusive_claims_says_what_claim_zeros_does(merger, folder):
    note = "note: top: claim_zeros is true, so an expert claims its share even of positions that it did not change"
    assert note in merger("plan", "recipe.yaml").out
    assert note not in merger("plan", "recipe.yaml", "--set", "parameters.claim_zeros=false").out
    assert note not in merger("plan", "recipe.yaml", "--set", "method=ties", "--set", "parameters={}").out


def test_random_experts_of_a_small_model_are_not_judged(tmp_path):
    trio(tmp_path)
    content = {"base": "base", "experts": {"code": "code", "math": "math"}, "method": "linear", "output": {"path": "o"}}
    assert merge(Recipe.parse(content, tmp_path)).notes == []
    assert sum(values.numel() for name, values in llama().items() if "proj" in name) < 512
