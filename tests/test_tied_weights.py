"""Tied weights: what transformers loads as one tensor stays one through a merge, and what it loads as two stays two."""

import json

import pytest
import torch
from checkpoints import load, same_bits
from safetensors.torch import save_file
from tiny_models import bert, gpt2, llama, llava, t5

from merger import merge
from merger.calibration.model import build
from merger.calibration.moment_source import MomentSource
from merger.calibration.moments import Moments
from merger.checkpoint.opening import open_checkpoint
from merger.planning.planner import plan
from merger.recipe.recipe import Recipe

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers, about heads that its config calls tied

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
T5_TABLES = ("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
IDS = torch.tensor([[3, 9, 20, 4]])
RANDOM = {"method": "dare_linear", "parameters": {"density": 0.5}}


class Models:
    """Checkpoint folders of one architecture, and merges of them."""

    def __init__(self, folder, make):
        self.folder, self.make = folder, make
        for seed, name in enumerate(("base", "a", "b")):
            torch.manual_seed(seed)
            model = make()
            for parameter in model.parameters():
                torch.nn.init.normal_(parameter, std=0.2)
            model.save_pretrained(folder / name)

    def store(self, name, *, drop=(), config=None, **tensors):
        """Stores further tensors in a checkpoint, or others of the same names; sets keys of its config.json."""
        named_tensors = {key.replace("__", "."): tensor for key, tensor in tensors.items()}
        stored = {
            key: tensor for key, tensor in {**load(self.folder / name), **named_tensors}.items() if key not in drop
        }
        save_file(
            {key: tensor.clone() for key, tensor in stored.items()},
            self.folder / name / "model.safetensors",
            {"format": "pt"},
        )
        self.configure(name, **(config or {}))

    def configure(self, name, **keys):
        """Sets keys of config.json; ``text_config`` is updated, and None removes a key."""
        path = self.folder / name / "config.json"
        config = json.loads(path.read_text())
        config.get("text_config", {}).update(keys.pop("text_config", {}))
        config |= keys
        path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))

    def pickle(self, name):
        """Stores a checkpoint as pytorch_model.bin, with every name of every tensor."""
        torch.save(self.loaded(name).state_dict(), self.folder / name / "pytorch_model.bin")
        (self.folder / name / "model.safetensors").unlink()

    def merged(self, *experts, base="base", **recipe):
        """The notes, tensors and config of a merge."""
        method = {} if recipe.keys() & {"method"} else {"method": "linear"}
        document = {"base": base, "experts": {name: name for name in experts}, "output": {"path": "out"}}
        result = merge(Recipe.parse({**document, **method, **recipe}, self.folder), force=True)
        config = json.loads((self.folder / "out" / "config.json").read_text())
        return result.notes, load(self.folder / "out"), config

    def loaded(self, name):
        """The model as transformers loads it, without a missing or an unexpected tensor."""
        kind = type(self.make())
        model, info = kind.from_pretrained(self.folder / name, output_loading_info=True)
        assert not any(info.values()), info
        return model

    def logits(self, name):
        model = self.loaded(name)
        decoder = {"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {}
        with torch.no_grad():
            return model(input_ids=IDS, **decoder).logits


@pytest.fixture
def models(tmp_path):
    return lambda make: Models(tmp_path, make)


def other(rows=40):
    return torch.randn(rows, 16, generator=torch.Generator().manual_seed(7))


# --- a head of its own, whatever config.json says -----------------------------------------------------


@pytest.mark.parametrize("make", [llama, gpt2, t5], ids=["llama", "gpt2", "t5"])
def test_an_expert_with_a_head_of_its_own_keeps_it_though_its_config_says_tied(models, make):
    family = models(make)
    family.store("a", lm_head__weight=other())

    notes, tensors, _ = family.merged("a")

    assert same_bits(tensors[HEAD], other())
    assert torch.equal(family.logits("out"), family.logits("a"))
    note = (
        f"a: {HEAD} differs from {'transformer.wte.weight' if make is gpt2 else EMBEDDING}, though config.json ties "
        "them; it is merged as a head of its own, which is how transformers 5 and peft load it"
    )
    assert (note in notes) is (make is not t5)  # whose config does not speak of the head alone


def test_a_head_of_its_own_is_merged_with_the_embeddings_of_those_that_tie(models):
    family = models(llama)
    family.store("a", lm_head__weight=other())

    _, tensors, config = family.merged("a", "b", method="task_arithmetic")

    base, b = (load(family.folder / name)[EMBEDDING] for name in ("base", "b"))
    torch.testing.assert_close(tensors[HEAD], other() + b - base)
    assert config["tie_word_embeddings"] is False
    family.loaded("out")


def test_a_base_with_a_head_of_its_own_keeps_it_though_its_config_says_tied(models):
    family = models(llama)
    family.store("base", lm_head__weight=other())

    _, tensors, config = family.merged("a", rules=[{"kinds": ["head"], "use": "base"}])

    assert same_bits(tensors[HEAD], other())
    assert config["tie_word_embeddings"] is False


def test_t5_keeps_its_word_on_tying_for_it_scales_the_decoder_by_it(models):
    family = models(t5)
    family.store("a", lm_head__weight=other())
    _, _, config = family.merged("a")
    assert config["tie_word_embeddings"] is True
    assert family.loaded("out").config.scale_decoder_outputs is True


# --- a copy of a tied head ----------------------------------------------------------------------------


@pytest.mark.parametrize("word", [True, False, None], ids=["says tied", "says untied", "says nothing"])
def test_a_stored_copy_of_a_tied_head_does_not_untie_the_merge(models, word):
    family = models(llama)
    family.store("a", lm_head__weight=load(family.folder / "a")[EMBEDDING], config={"tie_word_embeddings": word})

    _, tensors, config = family.merged("a", "b", **RANDOM)

    assert HEAD not in tensors
    assert config["tie_word_embeddings"] is True
    family.loaded("out")


def test_a_copy_that_the_base_stores_is_written_as_the_embedding_whether_or_not_its_config_says_so(models):
    family = models(llama)
    embedding = load(family.folder / "base")[EMBEDDING]
    _, once, _ = family.merged("a", "b", **RANDOM)
    for word in (True, None):
        family.store("base", lm_head__weight=embedding, config={"tie_word_embeddings": word})
        _, twice, _ = family.merged("a", "b", **RANDOM)
        assert same_bits(twice, {**once, HEAD: once[EMBEDDING]})


def test_two_equal_tables_are_two_where_the_base_says_that_they_are_not_tied(models):
    family = models(lambda: llama(tied=False))
    for name in ("base", "a", "b"):
        family.store(name, lm_head__weight=load(family.folder / name)[EMBEDDING])

    _, tensors, config = family.merged("a", "b", **RANDOM)

    assert not torch.equal(tensors[HEAD], tensors[EMBEDDING])
    assert config["tie_word_embeddings"] is False


@pytest.mark.parametrize("label", ["a", "base"])
def test_a_tied_table_may_be_stored_under_the_name_of_the_head_alone(models, label):
    """safetensors.torch.save_model keeps the first of the names in the alphabet."""
    family = models(llama)
    _, expected, _ = family.merged("a", "b", method="task_arithmetic")
    family.store(label, drop=[EMBEDDING], lm_head__weight=load(family.folder / label)[EMBEDDING])

    _, tensors, _ = family.merged("a", "b", method="task_arithmetic")

    stored = HEAD if label == "base" else EMBEDDING
    assert {EMBEDDING, HEAD} & tensors.keys() == {stored}
    assert same_bits(tensors[stored], expected[EMBEDDING])
    family.loaded("out")


# --- one table under more names -------------------------------------------------------------------------


@pytest.mark.parametrize("thrice", [("base",), ("a",), ("base", "a"), ("base", "a", "b")], ids="+".join)
def test_t5s_table_is_one_whoever_stores_it_under_three_names(models, thrice):
    family = models(t5)
    _, once, _ = family.merged("a", "b", **RANDOM)
    for name in thrice:
        table = load(family.folder / name)["shared.weight"]
        family.store(name, encoder__embed_tokens__weight=table, decoder__embed_tokens__weight=table)

    _, tensors, _ = family.merged("a", "b", **RANDOM)

    names = T5_TABLES if "base" in thrice else T5_TABLES[:1]
    assert same_bits(tensors, {**once, **dict.fromkeys(names, once["shared.weight"])})
    model = family.loaded("out")
    assert model.shared.weight is model.encoder.embed_tokens.weight is model.decoder.embed_tokens.weight


def test_t5s_table_is_one_beside_an_untied_head(models):
    family = models(t5)
    for name in ("base", "a", "b"):
        table = load(family.folder / name)["shared.weight"]
        family.store(
            name,
            encoder__embed_tokens__weight=table,
            decoder__embed_tokens__weight=table,
            lm_head__weight=table.flip(0),
            config={"tie_word_embeddings": False},
        )

    _, tensors, config = family.merged("a", "b", **RANDOM)

    assert all(same_bits(tensors[name], tensors["shared.weight"]) for name in T5_TABLES)
    assert not torch.equal(tensors[HEAD], tensors["shared.weight"])
    assert config["tie_word_embeddings"] is False
    assert torch.equal(family.loaded("out").lm_head.weight, tensors[HEAD])


def test_a_table_that_one_expert_stores_apart_is_merged_apart(models):
    family = models(t5)
    for name in ("base", "a"):
        table = load(family.folder / name)["shared.weight"]
        encoder = table if name == "base" else other()
        family.store(name, encoder__embed_tokens__weight=encoder, decoder__embed_tokens__weight=table)

    _, tensors, _ = family.merged("a")

    assert same_bits(tensors["encoder.embed_tokens.weight"], other())
    assert same_bits(tensors["decoder.embed_tokens.weight"], tensors["shared.weight"])
    assert torch.equal(family.logits("out"), family.logits("a"))


@pytest.mark.parametrize("make", [bert, t5, gpt2], ids=["bert", "t5", "gpt2"])
@pytest.mark.parametrize("pickled", [("base",), ("base", "a", "b"), ("b",)], ids="+".join)
def test_names_of_one_storage_of_a_pickle_are_one_tensor(models, make, pickled):
    family = models(make)
    _, once, _ = family.merged("a", "b", **RANDOM)
    for name in pickled:
        family.pickle(name)

    _, tensors, _ = family.merged("a", "b", **RANDOM)

    assert same_bits({name: tensors[name] for name in once}, once)
    assert (tensors.keys() == once.keys()) is ("base" not in pickled)
    family.loaded("out")


# --- what two parts of a config say -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("top", "text"), [(True, True), (True, False), (False, True), (None, True)], ids=lambda word: str(word)
)
def test_a_vision_language_model_without_a_head_is_tied_if_either_part_says_so(models, top, text):
    family = models(llava)
    for name in ("base", "a"):
        family.configure(name, tie_word_embeddings=top, text_config={"tie_word_embeddings": text})

    _, tensors, config = family.merged("a")

    assert not [name for name in tensors if name.endswith(HEAD)]
    assert config.get("tie_word_embeddings") is not False
    assert config["text_config"]["tie_word_embeddings"] is True
    assert torch.equal(family.logits("out"), family.logits("a"))


@pytest.mark.parametrize("text", [True, False], ids=["text tied", "text untied"])
@pytest.mark.parametrize("top", [True, False], ids=["tied", "untied"])
def test_a_vision_language_model_keeps_its_own_head_whatever_its_config_says(models, top, text):
    family = models(lambda: llava(tied=False))
    for name in ("base", "a"):
        family.configure(name, tie_word_embeddings=top, text_config={"tie_word_embeddings": text})

    _, tensors, config = family.merged("a")

    assert same_bits(tensors, load(family.folder / "a"))
    assert (config["tie_word_embeddings"], config["text_config"]["tie_word_embeddings"]) == (False, False)
    assert torch.equal(family.logits("out"), family.logits("a"))


# --- the model that calibration and evaluation run ---------------------------------------------------------


@pytest.mark.parametrize("own_head", [True, False], ids=["its own", "a copy"])
def test_a_model_is_built_with_the_head_that_transformers_loads(models, own_head):
    family = models(llama)
    head = other() if own_head else load(family.folder / "a")[EMBEDDING]
    family.store("a", lm_head__weight=head)
    with open_checkpoint("a", None, label="a", folder=family.folder) as checkpoint:
        model = build(checkpoint, trust_remote_code=False)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is not own_head


def inputs(family, name):
    """The names of the inputs that OBIM gets for a tensor, of experts that have moments of their embedding and head."""
    document = {
        "base": "base",
        "experts": {"a": "a"},
        "method": "obim",
        "calibration": {"stats": {"a": "unread"}},
        "output": {"path": "out"},
    }
    (family.folder / "unread").touch()
    planned = plan(Recipe.parse(document, family.folder))
    planned.close()
    tensor = next(tensor for tensor in planned.tensors if tensor.name == name)
    moments = Moments(torch.tensor(4), torch.ones(16), torch.ones(16), token_share=torch.ones(40) / 40)
    source = MomentSource({"a": {EMBEDDING: moments, HEAD: moments}})
    return set(source.of_part(tensor, tensor.parts[0], print))


def test_a_tied_table_is_judged_by_what_enters_the_head(models):
    assert inputs(models(llama), EMBEDDING) == {"second_moment", "mean_input", "reached"}


def test_an_untied_table_is_judged_by_its_tokens_though_the_expert_ties_its_own(models):
    family = models(llama)
    family.store("base", lm_head__weight=other())
    assert inputs(family, EMBEDDING) == {"token_share"}
    assert inputs(family, HEAD) == {"second_moment", "mean_input", "reached"}
