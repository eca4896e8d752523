"""Coefficients that are learned through the whole model, against a model that holds all of it at once."""

import json

import pytest
import torch
import transformers
from checkpoints import load
from safetensors.torch import save_file
from test_fisher import EXPERTS, LLAMA, SIZES, TEXTS, VOCABULARY, load_file, place, recipe, write_models  # noqa: F401
from transformers import GPT2Config, LlamaConfig

import merger
from merger.calibration import Settings
from merger.calibration import batches as split_into_batches
from merger.calibration.merging_coefficients import _useful
from merger.engine.prepare import prepare
from merger.errors import CheckpointError, RecipeError
from merger.evaluation.shared_inputs import InputCache, SharedInputs
from merger.options import RunOptions

SETTINGS = {"steps": 3, "rate": 0.05}
CONFIGS = {
    "llama": LLAMA,
    "tied llama": LlamaConfig(**SIZES, intermediate_size=16, tie_word_embeddings=True),
    "gpt2": GPT2Config(vocab_size=6, n_positions=16, n_embd=8, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0),
}


def batch_of(texts):
    """All texts of an expert, padded on the right, the longest first: they are one batch."""
    ordered = sorted(texts, key=lambda text: (-len(text), [VOCABULARY[letter] for letter in text]))
    ids = torch.zeros(len(texts), len(ordered[0]), dtype=torch.long)
    mask = torch.zeros_like(ids, dtype=torch.bool)
    for row, text in enumerate(ordered):
        ids[row, : len(text)] = torch.tensor([VOCABULARY[letter] for letter in text])
        mask[row, : len(text)] = True
    return ids, mask


def objective_of(logits, ids, mask, objective):
    if objective == "entropy":
        return torch.distributions.Categorical(logits=logits[mask]).entropy().mean()
    return torch.nn.functional.cross_entropy(logits[:, :-1][mask[:, 1:]], ids[:, 1:][mask[:, 1:]])


def whole_model_coefficients(folder, *, objective, per, steps, rate, start=0.3, clamp=True, batches=None, of_base=()):
    """Adam on the coefficients of all parameters of one model but those ``of_base``, by torch's own functional call."""
    batches = batches or {name: [batch_of(texts)] for name, texts in TEXTS.items()}
    base, *experts = (transformers.AutoModelForCausalLM.from_pretrained(folder / name) for name in ("base", *EXPERTS))
    names = [name for name, _ in base.named_parameters()]
    deltas = {name: [expert.get_parameter(name) - base.get_parameter(name) for expert in experts] for name in names}
    deltas = {name: torch.stack(values).detach() for name, values in deltas.items()}
    values = torch.full((len(experts), len(names) if per == "tensor" else 1), start, requires_grad=True)
    optimizer = torch.optim.Adam([values], lr=rate)
    for name in of_base:
        deltas[name] *= 0
    for step in range(steps):
        optimizer.zero_grad()
        with torch.enable_grad():
            weights = {
                name: base.get_parameter(name).detach()
                + torch.tensordot(values[:, i % values.shape[1]], deltas[name], 1)
                for i, name in enumerate(names)
            }
            loss = 0
            for expert_batches in batches.values():
                ids, mask = expert_batches[step % len(expert_batches)]
                arguments = {"input_ids": ids, "attention_mask": mask.long()}
                logits = torch.func.functional_call(base, weights, (), arguments).logits
                loss = loss + objective_of(logits, ids, mask, objective)
            loss.backward()
        optimizer.step()
        if clamp:
            values.data.clamp_(0, 1)
    return {name: values.detach()[:, i % values.shape[1]] for i, name in enumerate(names)}


def coefficient_files(place, **options):  # noqa: F811
    return merger.calibrate(recipe(place, "adamerging", **options), to=place / "learned")


@pytest.mark.parametrize("objective", ["entropy", "loss"])
@pytest.mark.parametrize("per", ["tensor", "model"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_block_by_block_they_are_those_of_the_whole_model(place, config, per, objective):  # noqa: F811
    write_models(place, config)
    settings = {**SETTINGS, "per": per, "objective": objective}
    files = coefficient_files(place, parameters=settings)
    learned = {name: load_file(path) for name, path in files.items()}
    expected = whole_model_coefficients(place, **settings)
    assert learned["code"].keys() == expected.keys() == load(place / "code").keys()
    for tensor, values in expected.items():
        found = torch.cat([learned[name][tensor] for name in EXPERTS])
        torch.testing.assert_close(found, values, rtol=0, atol=1e-4)
    changed = [values for values in expected.values() if float((values - 0.3).abs().max()) > 0.01]
    assert len(changed) >= len(expected) / 4  # norms and biases have no task vectors here


def test_a_merge_adds_the_task_vectors_times_them(place):  # noqa: F811
    write_models(place)
    merger.merge(recipe(place, "adamerging", parameters=SETTINGS))
    learned = {name: load_file(path) for name, path in coefficient_files(place, parameters=SETTINGS).items()}
    base, experts, merged = load(place / "base"), {name: load(place / name) for name in EXPERTS}, load(place / "out")
    for tensor, values in merged.items():
        changes = (learned[name][tensor] * (experts[name][tensor] - base[tensor]) for name in EXPERTS)
        torch.testing.assert_close(values, base[tensor] + sum(changes), rtol=0, atol=1e-6)


def test_without_clamp_they_may_leave_the_interval(place):  # noqa: F811
    write_models(place)
    settings = {"steps": 3, "rate": 1, "start": 0.9, "objective": "loss"}
    free = coefficient_files(place, parameters={**settings, "clamp": False})
    values = torch.cat([value for path in free.values() for value in load_file(path).values()])
    assert float(values.max()) > 1 or float(values.min()) < 0
    bound = merger.calibrate(recipe(place, "adamerging", parameters=settings), to=place / "bound")
    values = torch.cat([value for path in bound.values() for value in load_file(path).values()])
    assert 0 <= float(values.min()) <= float(values.max()) <= 1


def test_a_rebuild_from_the_files_needs_neither_text_nor_gradients(place, monkeypatch):  # noqa: F811
    write_models(place)
    merger.merge(recipe(place, "adamerging", parameters=SETTINGS))
    first = (place / "out" / "model.safetensors").read_bytes()
    files = coefficient_files(place, parameters=SETTINGS)
    assert {path.name for path in files.values()} == {f"{name}.coefficients.safetensors" for name in EXPERTS}
    for name in EXPERTS:
        (place / f"{name}.jsonl").unlink()
    monkeypatch.setenv("MERGER_CACHE", str(place / "another"))
    stats = {"stats": {name: f"learned/{name}.coefficients.safetensors" for name in EXPERTS}}
    merger.merge(recipe(place, "adamerging", calibration=stats), force=True)
    assert (place / "out" / "model.safetensors").read_bytes() == first


def test_they_are_learned_once_and_again_where_a_parameter_decides_them(place, monkeypatch):  # noqa: F811
    write_models(place)
    merger.merge(recipe(place, "adamerging", parameters=SETTINGS))

    def forbidden(*_, **__):
        raise AssertionError("coefficients are learned again")

    monkeypatch.setattr("merger.calibration.merging_coefficients.learn_coefficients", forbidden)
    merger.merge(recipe(place, "adamerging", parameters=SETTINGS), force=True)
    with pytest.raises(AssertionError, match="learned again"):
        merger.merge(recipe(place, "adamerging", parameters={**SETTINGS, "start": 0.4}), force=True)


def test_files_of_some_experts_alone_are_refused(place):  # noqa: F811
    write_models(place)
    coefficient_files(place, parameters=SETTINGS)
    calibration = {"stats": {"code": "learned/code.coefficients.safetensors"}, "data": {"wiki": "wiki.jsonl"}}
    message = (
        "calibration.stats: has no wiki; coefficients are learned together: name the files of all experts, or of none"
    )
    with pytest.raises(RecipeError) as refused:
        merger.merge(recipe(place, "adamerging", calibration=calibration))
    assert str(refused.value) == message


def test_an_objective_that_is_no_number_is_told_with_its_step(place):  # noqa: F811
    write_models(place)
    settings = {"rate": 1e30, "clamp": False, "steps": 3}
    with pytest.raises(CheckpointError, match=r"code: .*(no number at step 2; lower rate|not finite)"):
        merger.merge(recipe(place, "adamerging", parameters=settings))
    assert not (place / "out").exists()


def test_steps_of_no_length_are_refused(place):  # noqa: F811
    with pytest.raises(RecipeError, match="rate is 0, but steps of no length learn nothing"):
        recipe(place, "adamerging", parameters={"rate": 0})


@pytest.mark.parametrize("stage", ["adamerging", "prodistill"])
@pytest.mark.parametrize("first", [{"top": {"density": 0.5}}, {"scale": {"lambda": 0.5}}])
def test_no_stage_may_change_the_task_vectors_that_coefficients_are_learned_of(place, stage, first):  # noqa: F811
    message = f"{stage}: its coefficients are learned of whole task vectors, so no stage can come before it"
    with pytest.raises(RecipeError) as refused:
        recipe(place, None, pipeline=[first, stage])
    assert message in str(refused.value)
    recipe(place, None, pipeline=[stage, {"scale": {"lambda": 0.5}}])


def test_layers_in_another_order_are_refused(place):  # noqa: F811
    layers = [{"model": "code", "range": [0, 2]}, {"model": "wiki", "range": [0, 2]}]
    with pytest.raises(RecipeError, match="takes model_coefficients behind the merged blocks"):
        recipe(place, "adamerging", layers=layers)


def test_what_an_expert_lacks_stays_at_the_start(place):  # noqa: F811
    write_models(place)
    weights = load(place / "code")
    name = "model.layers.0.input_layernorm.weight"
    lone = {f"{name}.of_base": torch.ones(3)}
    save_file(load(place / "base") | lone, place / "base" / "model.safetensors", metadata={"format": "pt"})
    save_file(weights, place / "code" / "model.safetensors", metadata={"format": "pt"})
    merger.merge(recipe(place, "adamerging", parameters=SETTINGS, missing="zero"))
    assert torch.equal(load(place / "out")[f"{name}.of_base"], torch.ones(3))


def test_a_table_with_more_rows_in_an_expert_is_learned_by_the_rows_of_the_base(place):  # noqa: F811
    write_models(place)
    base, code, wiki = (load(place / name) for name in ("base", *EXPERTS))
    name = "model.embed_tokens.weight"
    longer = code | {name: torch.cat([code[name], torch.ones(2, 8)])}
    save_file(longer, place / "code" / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((place / "code" / "config.json").read_text())
    (place / "code" / "config.json").write_text(json.dumps({**config, "vocab_size": 8}))
    head = "lm_head.weight"
    longer[head] = torch.cat([code[head], torch.ones(2, 8)])
    save_file(longer, place / "code" / "model.safetensors", metadata={"format": "pt"})
    merger.merge(recipe(place, "adamerging", parameters=SETTINGS, extra_rows="drop"))
    learned = {
        expert: load_file(path)[name]
        for expert, path in coefficient_files(place, parameters=SETTINGS, extra_rows="drop").items()
    }
    assert all(float(abs(values - 0.3)) > 0.01 for values in learned.values())
    changes = learned["code"] * (code[name] - base[name]) + learned["wiki"] * (wiki[name] - base[name])
    torch.testing.assert_close(load(place / "out")[name], base[name] + changes)


def test_each_step_takes_another_batch_of_another_shape(place, monkeypatch):  # noqa: F811
    write_models(place)
    monkeypatch.setattr("merger.calibration.merging_coefficients.BATCH", 6)
    settings = {"steps": 4, "rate": 0.05, "per": "tensor", "objective": "entropy"}
    batches = {}
    for name, texts in TEXTS.items():
        tokens = [[VOCABULARY[letter] for letter in text] for text in texts]
        useful = _useful(name, split_into_batches(tokens, 6), Settings(), 0)
        batches[name] = [(batch.ids, batch.mask) for batch in useful]
    assert len({ids.shape for ids, _ in batches["code"]}) > 1
    learned = {name: load_file(path) for name, path in coefficient_files(place, parameters=settings).items()}
    for tensor, values in whole_model_coefficients(place, **settings, batches=batches).items():
        found = torch.cat([learned[name][tensor] for name in EXPERTS])
        torch.testing.assert_close(found, values, rtol=0, atol=1e-4)


def test_what_rules_copy_is_copied_while_the_rest_is_learned(place):  # noqa: F811
    write_models(place)
    settings = {**SETTINGS, "per": "tensor", "objective": "entropy"}
    rules = [{"kinds": ["embedding", "head"], "use": "base"}]
    learned = {
        name: load_file(path) for name, path in coefficient_files(place, parameters=settings, rules=rules).items()
    }
    of_base = ["model.embed_tokens.weight", "lm_head.weight"]
    expected = whole_model_coefficients(place, **settings, of_base=of_base)
    assert learned["code"].keys() == expected.keys() - set(of_base)
    for tensor in learned["code"]:
        found = torch.cat([learned[name][tensor] for name in EXPERTS])
        torch.testing.assert_close(found, expected[tensor], rtol=0, atol=1e-4)


def test_another_method_for_some_tensors_is_refused(place):  # noqa: F811
    write_models(place)
    rules = [{"kinds": ["head"], "method": "linear"}]
    message = "lm_head.weight: is merged by another method, but coefficients are learned through the whole merged model"
    with pytest.raises(RecipeError, match=message):
        merger.merge(recipe(place, "adamerging", parameters=SETTINGS, rules=rules))


def test_experts_in_another_order_have_their_own_coefficients(place):  # noqa: F811
    write_models(place)
    settings = {**SETTINGS, "objective": "loss"}
    first = {name: load_file(path) for name, path in coefficient_files(place, parameters=settings).items()}
    turned = recipe(place, "adamerging", parameters=settings, experts={name: name for name in reversed(EXPERTS)})
    second = {name: load_file(path) for name, path in merger.calibrate(turned, to=place / "turned").items()}
    for name in EXPERTS:
        for tensor, values in first[name].items():
            torch.testing.assert_close(second[name][tensor], values, rtol=0, atol=1e-4)


def test_merges_in_memory_take_the_coefficients_of_their_own_settings(place):  # noqa: F811
    write_models(place)
    caches = InputCache()
    files = []
    for steps in (1, 2):
        with prepare(recipe(place, "adamerging", parameters={"steps": steps}), RunOptions()) as prepared:
            shared = SharedInputs(prepared.plan, prepared.options, None, caches)
            files.append(dict(shared.files))
    assert files[0] != files[1]


def test_files_for_another_base_or_from_another_run_are_refused(place):  # noqa: F811
    write_models(place)
    files = coefficient_files(place, parameters=SETTINGS)
    longer = merger.calibrate(recipe(place, "adamerging", parameters={**SETTINGS, "steps": 4}), to=place / "longer")
    mixture = {"code": str(files["code"]), "wiki": str(longer["wiki"])}
    with pytest.raises(CheckpointError, match="was made from other data or settings: its learned is"):
        merger.merge(recipe(place, "adamerging", calibration={"stats": mixture}))
    with pytest.raises(CheckpointError, match="its base is"):
        merger.merge(
            recipe(
                place,
                "adamerging",
                base="wiki",
                calibration={"stats": {name: str(path) for name, path in files.items()}},
            )
        )


def test_one_start_for_each_depth_needs_a_coefficient_for_each_tensor(place):  # noqa: F811
    write_models(place)
    with pytest.raises(RecipeError, match="start: varies, but with per: model an expert has one coefficient"):
        merger.merge(recipe(place, "adamerging", parameters={"per": "model", "start": [0.2, 0.4], "steps": 1}))
    merger.calibrate(recipe(place, "adamerging", parameters={"start": [0.2, 0.4], "steps": 1}))


def test_texts_of_which_no_token_counts_are_told_before_learning(place):  # noqa: F811
    write_models(place)
    calibration = {"data": {name: f"{name}.jsonl" for name in EXPERTS}, "skip_first_tokens": 50}
    with pytest.raises(CheckpointError, match="code: no token of its text counts that comes after another one"):
        merger.merge(recipe(place, "adamerging", parameters=SETTINGS, calibration=calibration))


@pytest.mark.parametrize(
    ("method", "anchor"), [("distill", "adamerging"), ("distill", "fisher"), ("regmean", "fisher")]
)
def test_what_is_made_for_the_whole_model_is_no_anchor_of_what_is_made_block_by_block(place, method, anchor):  # noqa: F811
    with pytest.raises(RecipeError, match=r"takes .*, made for the whole model before the merge, but .* takes"):
        recipe(place, method, parameters={"anchor": anchor})
