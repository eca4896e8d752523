"""Fisher information of weights, and the merge that averages by it."""

import json
import math

import pytest
import torch
import transformers
from checkpoints import load
from safetensors import safe_open
from tiny import Rows
from transformers import GemmaConfig, GPT2Config, GPTNeoXConfig, GraniteMoeConfig, LlamaConfig, MixtralConfig

import merger
from merger.errors import CheckpointError, RecipeError
from merger.ops.arithmetic import uniforms
from merger.pipeline.in_memory import merge_stages
from merger.pipeline.registry import checked

EXPERTS = ("code", "wiki")
TEXTS = {"code": ["abcab", "bca", "abcabcabcab"], "wiki": ["ccba", "bacbac"]}
VOCABULARY = {"[UNK]": 0, "a": 1, "b": 2, "c": 3}
SIZES = {"vocab_size": 6, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
STORED_NAMES = {"lm_head.weight": "embed_out.weight"}  # of GPT-NeoX
LLAMA = LlamaConfig(**SIZES, intermediate_size=16, num_key_value_heads=1, tie_word_embeddings=False)


def write_tokenizer(folder):
    from tokenizers import Regex, Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Split

    tokenizer = Tokenizer(WordLevel(VOCABULARY, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Split(Regex("."), "isolated")
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))


def write_models(folder, config=LLAMA):
    """A base and two experts of this config with random weights, and their text."""
    for seed, name in enumerate(("base", *EXPERTS)):
        torch.manual_seed(seed)
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder / name)
        write_tokenizer(folder / name)
    for name, texts in TEXTS.items():
        (folder / f"{name}.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder for models and text, and a cache of its own."""
    monkeypatch.setenv("MERGER_CACHE", str(tmp_path / "cache"))
    return tmp_path


def recipe(place, method="fisher", *, calibration=None, **options):
    content = {
        "base": "base",
        "experts": {name: name for name in EXPERTS},
        **({} if method is None else {"method": method}),
        "calibration": calibration or {"data": {name: f"{name}.jsonl" for name in EXPERTS}},
        "output": {"path": "out"},
        **options,
    }
    return merger.Recipe.parse(content, folder=place)


def fisher_files(place, **options):
    return merger.calibrate(recipe(place, **options), to=place / "fisher")


def whole_model_fisher(folder, texts, order):
    """The mean over samples of the squared gradient of drawn tokens' log-likelihood, by the model at once."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    squares = {name: torch.zeros_like(value) for name, value in model.named_parameters()}
    for number, text in enumerate(order):
        model.zero_grad()
        ids = torch.tensor([[VOCABULARY[letter] for letter in text]])
        logits = model(input_ids=ids).logits[0]
        cumulative = logits.detach().double().softmax(-1).cumsum(-1)
        draws = uniforms((0, "fisher", number), 0, len(logits), 1, double=True)
        tokens = (cumulative < draws * cumulative[:, -1:]).sum(-1)
        logits.log_softmax(-1)[torch.arange(len(tokens)), tokens].sum().backward()
        for name, value in model.named_parameters():
            squares[name] += value.grad.square()
    return {name: total / len(texts) for name, total in squares.items()}


def samples_in_order(place, name):
    """The texts as calibration chooses and orders them."""
    from merger.calibration import Settings
    from merger.calibration.samples import Text, choose

    return [text.content for text in choose(map(Text, TEXTS[name]), Settings().samples, 0)]


@pytest.mark.parametrize(
    "config",
    [
        LLAMA,
        LlamaConfig(**SIZES, intermediate_size=16, tie_word_embeddings=True),
        GPT2Config(vocab_size=6, n_positions=16, n_embd=8, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0),
        GPTNeoXConfig(**SIZES, intermediate_size=16),
        GemmaConfig(**SIZES, intermediate_size=16, num_key_value_heads=1, head_dim=4),
    ],
    ids=["llama", "tied llama", "gpt2", "gpt_neox", "gemma"],
)
def test_block_by_block_it_is_that_of_the_whole_model(place, config):
    write_models(place, config)
    is_neox = config.model_type == "gpt_neox"
    for name, path in fisher_files(place).items():
        expected = whole_model_fisher(place / name, TEXTS[name], samples_in_order(place, name))
        found = load_file(path)
        expected = {
            (STORED_NAMES if is_neox else {}).get(tensor, tensor): values for tensor, values in expected.items()
        }
        assert found.keys() == expected.keys() == load(place / name).keys()
        for tensor, values in expected.items():
            assert values.norm() > 0, tensor
            assert (found[tensor] - values).norm() <= 1e-5 * values.norm(), tensor


def load_file(path):
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 a file is no dict


def test_a_merge_averages_each_element_by_it(place):
    write_models(place)
    files = {name: load_file(path) for name, path in fisher_files(place).items()}
    norms = {name: math.sqrt(sum(v.double().square().sum() for v in file.values())) for name, file in files.items()}
    merger.merge(recipe(place))
    experts, merged = {name: load(place / name) for name in EXPERTS}, load(place / "out")
    for tensor, values in merged.items():
        shares = {name: files[name][tensor].double() / norms[name] for name in EXPERTS}
        total = sum(shares.values())
        mean = sum(experts[name][tensor].double() for name in EXPERTS) / 2
        weighted = sum(experts[name][tensor].double() * shares[name] for name in EXPERTS) / total
        torch.testing.assert_close(values.double(), weighted.where(total > 0, mean), rtol=0, atol=1e-6)


def test_a_rebuild_from_its_files_needs_neither_text_nor_gradients(place, monkeypatch):
    write_models(place)
    merger.merge(recipe(place))
    first = (place / "out" / "model.safetensors").read_bytes()
    files = fisher_files(place)
    assert {path.name for path in files.values()} == {"code.fisher.safetensors", "wiki.fisher.safetensors"}
    for name in EXPERTS:
        (place / f"{name}.jsonl").unlink()
    monkeypatch.setenv("MERGER_CACHE", str(place / "another"))
    stats = {"stats": {name: f"fisher/{name}.fisher.safetensors" for name in EXPERTS}}
    merger.merge(recipe(place, calibration=stats), force=True)
    assert (place / "out" / "model.safetensors").read_bytes() == first


def test_gradients_are_made_once(place, monkeypatch):
    write_models(place)
    merger.merge(recipe(place))

    def forbidden(*_, **__):
        raise AssertionError("gradients were made again")

    monkeypatch.setattr("merger.calibration.fisher.fisher_blocks", forbidden)
    merger.merge(recipe(place, parameters={"scope": "tensor"}), force=True)


def test_a_run_that_is_killed_among_the_gradients_leaves_nothing_and_starts_again(place, monkeypatch):
    write_models(place)
    from merger.calibration.backward_passes import BackwardPasses

    class Killed(BaseException):
        pass

    def killed(*_):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(BackwardPasses, "outside", killed)
        with pytest.raises(Killed):
            merger.merge(recipe(place))
    assert list((place / "cache").rglob("*.safetensors")) == []
    merger.merge(recipe(place))
    assert len(list((place / "cache").rglob("*.fisher.safetensors"))) == 2


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (MixtralConfig, "model.layers.0.block_sparse_moe.experts.0.w1.weight"),
        (GraniteMoeConfig, "model.layers.0.block_sparse_moe.input_linear.weight"),  # stored as it is packed
    ],
)
def test_experts_that_are_packed_get_the_mean_and_a_note_says_so(place, config, name):
    write_models(place, config(**SIZES, intermediate_size=16, num_key_value_heads=1, num_local_experts=2))
    result = merger.merge(recipe(place))
    merged, experts = load(place / "out"), [load(place / name) for name in EXPERTS]
    torch.testing.assert_close(merged[name], (experts[0][name] + experts[1][name]) / 2)
    note = (
        "some tensors of model.layers: transformers does not compute with them as they are stored; "
        "they are merged by their mean"
    )
    assert result.notes.count(note) == 1


def test_a_model_that_predicts_no_tokens_is_told(place):
    write_models(place)
    for name in ("base", *EXPERTS):
        config = json.loads((place / name / "config.json").read_text())
        (place / name / "config.json").write_text(json.dumps({**config, "architectures": ["LlamaModel"]}))
    message = "code: predicts no tokens, so there are no gradients of them"
    with pytest.raises(CheckpointError, match=message):
        merger.merge(recipe(place))
    assert not (place / "out").exists()


def test_files_of_another_kind_are_told_apart(place):
    write_models(place)
    fisher_files(place)
    statistics = merger.calibrate(recipe(place, "obim"), to=place / "inputs")
    stats = {name: str(path) for name, path in statistics.items()}
    with pytest.raises(
        CheckpointError, match="holds statistics of inputs, and what is needed is the Fisher information of"
    ):
        merger.merge(recipe(place, calibration={"stats": stats}))
    stats = {name: f"fisher/{name}.fisher.safetensors" for name in EXPERTS}
    with pytest.raises(
        CheckpointError, match="holds the Fisher information of weights, and what is needed is statistics of"
    ):
        merger.merge(recipe(place, "obim", calibration={"stats": stats}))


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"weight": {"code": -1, "wiki": 2}}, "weight is -1, but is a factor of squares and cannot be negative"),
        ({"floor": -1}, "floor is -1, but squares are never below 0"),
    ],
)
def test_parameters_that_mean_nothing_are_refused(place, parameters, message):
    with pytest.raises(RecipeError) as refused:
        recipe(place, parameters=parameters)
    assert message in str(refused.value)


def in_memory(deltas, fisher, method="fisher", **parameters):
    base = {"w": torch.zeros(1, 2)}
    experts = {name: {"w": torch.tensor([delta])} for name, delta in zip("ab", deltas, strict=True)}
    inputs = {"w": {"fisher": Rows(torch.tensor(fisher)[:, None])}}
    return merge_stages(checked(method, parameters), base, experts, inputs=inputs)["w"].tolist()


DELTAS = ((4.0, -3.0), (-2.0, -4.0))


def test_elements_count_by_it_for_each_expert_apart():
    merged = in_memory(DELTAS, ((3.0, 4.0), (0.0, 5.0)))  # norms 5 and 5: shares 3/5 and 4/5 against 0 and 1
    assert merged == [[4.0, pytest.approx(-(3 * 4 / 5 + 4) / (4 / 5 + 1))]]


def test_where_nothing_matters_to_anyone_it_is_the_mean_by_weight():
    merged = in_memory(DELTAS, ((0.0, 1.0), (0.0, 1.0)), weight={"a": 3, "b": 1})
    assert merged == [[pytest.approx((3 * 4 - 2) / 4), pytest.approx((3 * -3 - 4) / 4)]]


def test_a_floor_leaves_small_values_to_the_mean():
    merged = in_memory(DELTAS, ((0.001, 1.0), (0.0, 1.0)), floor=0.01)
    assert merged == [[pytest.approx(1.0, abs=1e-6), pytest.approx(-3.5)]]


def ugm(deltas, fisher, **parameters):
    (merged,) = in_memory(deltas, fisher, "ugm", **parameters)
    return merged


def test_elements_count_by_curvature_with_that_of_the_base():
    assert ugm(((4.0, -3.0), (0.0, -4.0)), ((3.0, 0.0), (0.0, 0.0)), prior=1) == [4.0, -7.0]
    merged = ugm(DELTAS, ((2.0, 1.0), (1.0, 0.0)), prior=0.5, size={"a": 3, "b": 1}, weight={"a": 1, "b": 0.5})
    first = (0.5 + 6) / (0.5 + 6 + 0.5) * 4 + 0.5 * (0.5 + 1) / (0.5 + 6 + 0.5) * -2
    second = (0.5 + 3) / (0.5 + 3) * -3 + 0.5 * 0.5 / (0.5 + 3) * -4
    assert merged == [pytest.approx(first), pytest.approx(second)]


def test_the_curvature_of_the_base_is_the_mean_of_the_experts_by_default():
    fisher = ((2.0, 1.0), (1.0, 0.0))
    assert ugm(DELTAS, fisher) == ugm(DELTAS, fisher, prior=1)


def test_without_curvature_it_is_the_weighted_sum():
    assert ugm(DELTAS, ((0.0, 0.0), (0.0, 0.0)), weight=0.5) == [1.0, -3.5]


def test_the_plan_tells_what_the_cache_will_take(place):
    from typer.testing import CliRunner

    from merger.cli import app

    write_models(place)
    content = {
        "base": "base",
        "experts": {name: name for name in EXPERTS},
        "method": "fisher",
        "calibration": {"data": {name: f"{name}.jsonl" for name in EXPERTS}},
        "output": {"path": "out"},
    }
    (place / "recipe.json").write_text(json.dumps(content))
    told = CliRunner().invoke(app, ["plan", str(place / "recipe.json")])
    assert told.exit_code == 0, told.output
    message = (
        "what backward passes find is as large as the experts in float32: 0.00 GB in the cache, unless "
        "calibration.stats names files of it"
    )
    assert message in told.output


@pytest.mark.parametrize("per", ["element", "row", "matrix"])
def test_packed_experts_keep_the_start_of_coefficients_that_blocks_learn(place, per):
    write_models(place, GraniteMoeConfig(**SIZES, intermediate_size=16, num_key_value_heads=1, num_local_experts=2))
    result = merger.merge(recipe(place, "prodistill", parameters={"steps": 2, "per": per}))
    base, merged, experts = load(place / "base"), load(place / "out"), [load(place / name) for name in EXPERTS]
    packed, attention = (
        f"model.layers.0.{name}.weight" for name in ("block_sparse_moe.input_linear", "self_attn.q_proj")
    )
    at_start = {name: base[name] + 0.3 * sum(expert[name] - base[name] for expert in experts) for name in base}
    torch.testing.assert_close(merged[packed], at_start[packed], rtol=0, atol=1e-6)
    assert float((merged[attention] - at_start[attention]).abs().max()) > 1e-3
    assert any("they are not learned" in note for note in result.notes)
