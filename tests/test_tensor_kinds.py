"""What each tensor is, told from names, shapes and config alone, for architectures as they are stored."""

from fractions import Fraction

import pytest
from architectures import ALL, BEFORE, described, expected

from merger.checkpoint.tensor_info import Info
from merger.checkpoint.tensor_kinds import tensor_kinds

architectures = pytest.mark.parametrize("architecture", ALL.values(), ids=ALL)


def kinds_of(shapes, **config):
    infos = {name: Info(*(entry if isinstance(entry[0], str) else ("F32", entry))) for name, entry in shapes.items()}
    return tensor_kinds(infos, config)


@architectures
def test_every_tensor_has_its_kind(architecture):
    kinds = tensor_kinds(*described(architecture))
    assert {name: kinds.kind(name) for name in kinds.tensors} == expected(architecture, "kind")


@architectures
def test_a_block_is_a_unit_and_what_lies_outside_is_its_own(architecture):
    kinds = tensor_kinds(*described(architecture))
    assert {name: kinds.unit(name) for name in kinds.tensors} == expected(architecture, "unit")


@architectures
def test_depth_goes_from_the_first_block_to_the_last(architecture):
    kinds = tensor_kinds(*described(architecture, blocks=3))
    for name, position in expected(architecture, "where", blocks=3).items():
        end_depth = Fraction(0) if position == BEFORE else Fraction(1)
        assert kinds.depth(name) == (Fraction(position, 2) if isinstance(position, int) else end_depth), name


@architectures
def test_the_rotation_index_counts_embeddings_blocks_and_what_follows(architecture):
    kinds = tensor_kinds(*described(architecture, blocks=3))
    for name, position in expected(architecture, "where", blocks=3).items():
        assert kinds.rotation(name) == (
            position + 1 if isinstance(position, int) else 0 if position == BEFORE else 4
        ), name


def test_a_single_block_has_depth_zero():
    assert kinds_of({"layers.0.w.weight": (4, 4)}).depth("layers.0.w.weight") == 0


def test_blocks_are_counted_by_their_highest_number():
    kinds = kinds_of({f"layers.{i}.w.weight": (4, 4) for i in (0, 2, 10)})
    assert kinds.depth("layers.2.w.weight") == Fraction(1, 5)


def test_a_square_conv1d_is_known_by_its_namesake():
    shapes = {"h.0.mlp.c_proj.weight": (32, 8), "h.0.mlp.c_proj.bias": (8,)}
    square = {"h.0.attn.c_proj.weight": (8, 8), "h.0.attn.c_proj.bias": (8,)}

    assert kinds_of({**shapes, **square}).kind("h.0.attn.c_proj.weight") == "conv1d"
    assert kinds_of(square).kind("h.0.attn.c_proj.weight") == "linear"


def test_a_linear_layer_of_the_same_names_is_no_conv1d():
    shapes = {"h.0.attn.c_attn.weight": (24, 8), "h.0.attn.c_attn.bias": (24,)}  # GPTBigCode
    assert kinds_of(shapes).kind("h.0.attn.c_attn.weight") == "linear"


@pytest.mark.parametrize(
    ("head", "config", "tied"),
    [
        ([], {"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True}, True),
        ([], {"architectures": ["GPT2LMHeadModel"]}, True),
        ([], {"architectures": ["T5ForConditionalGeneration"]}, True),
        ([], {"architectures": ["LlamaModel"]}, False),
        ([], {"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": False}, False),
        ([], {"architectures": 7}, False),
        ([], {}, False),
        ([16, 8], {"tie_word_embeddings": True}, True),
        ([16, 8], {"text_config": {"tie_word_embeddings": True}}, True),
        ([16, 8], {}, False),
        ([12, 8], {"tie_word_embeddings": True}, False),  # it cannot be
    ],
)
def test_a_head_is_tied_by_its_config_or_by_being_absent(head, config, tied):
    shapes = {"embed_tokens.weight": (16, 8), **({"lm_head.weight": tuple(head)} if head else {})}

    kinds = kinds_of(shapes, **config)

    assert kinds.tied is tied
    assert kinds.kind("embed_tokens.weight") == ("tied" if tied else "embedding")
    if head:
        assert kinds.kind("lm_head.weight") == ("tied" if tied else "head")


def test_a_classifier_is_never_the_embedding_whatever_its_config_says_of_tying():
    shapes = {"bert.embeddings.word_embeddings.weight": (16, 8), "classifier.weight": (2, 8)}

    kinds = kinds_of(shapes, architectures=["BertForSequenceClassification"], tie_word_embeddings=True)

    assert kinds.kind("classifier.weight") == "head"
    assert kinds.kind("bert.embeddings.word_embeddings.weight") == "embedding"


def test_the_input_embedding_is_the_table_with_a_row_for_each_token():
    shapes = {"wpe.weight": (64, 8), "wte.weight": (16, 8)}
    assert kinds_of(shapes, vocab_size=16).embedding == "wte.weight"
    assert kinds_of(shapes).embedding == "wpe.weight"  # the most rows, where the config does not tell


@pytest.mark.parametrize(
    ("shape", "kind"),
    [(("F32", ()), "vector"), (("F32", (1,)), "vector"), (("I64", (1, 4)), "buffer"), (("BOOL", ()), "buffer")],
)
def test_scalars_are_vectors_and_integers_are_buffers(shape, kind):
    assert kinds_of({"x": shape}).kind("x") == kind


@pytest.mark.parametrize(("equal", "tied"), [(True, True), (False, False), (None, True)])
def test_a_stored_head_that_its_config_ties_is_tied_if_it_holds_the_embeddings_values(equal, tied):
    shapes = {"embed_tokens.weight": Info("F32", (16, 8)), "lm_head.weight": Info("F32", (16, 8))}
    kinds = tensor_kinds(shapes, {"tie_word_embeddings": True}, lambda *_: equal)
    assert kinds.tied is tied
    assert kinds.copies == ({"lm_head.weight": "embed_tokens.weight"} if tied else {})


@pytest.mark.parametrize(("top", "text", "tied"), [(True, False, True), (False, True, True), (False, False, False)])
def test_of_two_words_on_tying_true_is_the_one_that_counts(top, text, tied):
    config = {"architectures": ["LlavaForConditionalGeneration"], "tie_word_embeddings": top}
    kinds = kinds_of({"embed_tokens.weight": (16, 8)}, **config, text_config={"tie_word_embeddings": text})
    assert kinds.tied is tied


def test_the_head_is_the_matrix_in_the_embeddings_shape():
    shapes = {"vision.output.weight": (8, 8), "embed_tokens.weight": (16, 8), "lm_head.weight": (16, 8)}
    assert kinds_of(shapes).head == "lm_head.weight"


def test_copies_are_those_of_the_shortest_name():
    names = ("decoder.embed_tokens.weight", "encoder.embed_tokens.weight", "shared.weight")
    kinds = tensor_kinds({name: Info("F32", (16, 8)) for name in names}, {}, lambda *_: True)
    assert kinds.embedding == "shared.weight"
    assert kinds.copies == dict.fromkeys(names[:2], "shared.weight")
    assert {kinds.kind(name) for name in names} == {"embedding"}


def test_a_copy_of_a_heads_bias_is_one_with_it():
    shapes = {"wte.weight": (16, 8), "cls.predictions.bias": (16,), "cls.predictions.decoder.bias": (16,)}
    infos = {name: Info("F32", shape) for name, shape in shapes.items()}
    kinds = tensor_kinds(infos, {}, lambda *_: True)
    assert kinds.copies == {"cls.predictions.decoder.bias": "cls.predictions.bias"}
