"""What each tensor is, told from names, shapes and config alone, for architectures as they are stored."""

from fractions import Fraction

import pytest
from architectures import ALL, BEFORE, described, expected

from merger.checkpoint.tensor_info import Info
from merger.checkpoint.tensor_kinds import tensor_kinds

architectures = pytest.mark.parametrize("architecture", ALL.values(), ids=ALL)


def anatomy(shapes, **config):
    infos = {name: Info(*(given if isinstance(given[0], str) else ("F32", given))) for name, given in shapes.items()}
    return tensor_kinds(infos, config)


@architectures
def test_every_tensor_has_its_kind(architecture):
    found = tensor_kinds(*described(architecture))
    assert {name: found.kind(name) for name in found.tensors} == expected(architecture, "kind")


@architectures
def test_a_block_is_a_unit_and_what_lies_outside_is_its_own(architecture):
    found = tensor_kinds(*described(architecture))
    assert {name: found.unit(name) for name in found.tensors} == expected(architecture, "unit")


@architectures
def test_depth_goes_from_the_first_block_to_the_last(architecture):
    found = tensor_kinds(*described(architecture, blocks=3))
    for name, where in expected(architecture, "where", blocks=3).items():
        outside = Fraction(0) if where == BEFORE else Fraction(1)
        assert found.depth(name) == (Fraction(where, 2) if isinstance(where, int) else outside), name


@architectures
def test_the_rotation_index_counts_embeddings_blocks_and_what_follows(architecture):
    found = tensor_kinds(*described(architecture, blocks=3))
    for name, where in expected(architecture, "where", blocks=3).items():
        assert found.rotation(name) == (where + 1 if isinstance(where, int) else 0 if where == BEFORE else 4), name


def test_a_single_block_has_depth_zero():
    assert anatomy({"layers.0.w.weight": (4, 4)}).depth("layers.0.w.weight") == 0


def test_blocks_are_counted_by_their_highest_number():
    found = anatomy({f"layers.{i}.w.weight": (4, 4) for i in (0, 2, 10)})
    assert found.depth("layers.2.w.weight") == Fraction(1, 5)


def test_a_square_conv1d_is_known_by_its_namesake():
    shapes = {"h.0.mlp.c_proj.weight": (32, 8), "h.0.mlp.c_proj.bias": (8,)}
    square = {"h.0.attn.c_proj.weight": (8, 8), "h.0.attn.c_proj.bias": (8,)}

    assert anatomy({**shapes, **square}).kind("h.0.attn.c_proj.weight") == "conv1d"
    assert anatomy(square).kind("h.0.attn.c_proj.weight") == "linear"


def test_a_linear_layer_of_the_same_names_is_no_conv1d():
    shapes = {"h.0.attn.c_attn.weight": (24, 8), "h.0.attn.c_attn.bias": (24,)}  # GPTBigCode
    assert anatomy(shapes).kind("h.0.attn.c_attn.weight") == "linear"


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

    found = anatomy(shapes, **config)

    assert found.tied is tied
    assert found.kind("embed_tokens.weight") == ("tied" if tied else "embedding")
    if head:
        assert found.kind("lm_head.weight") == ("tied" if tied else "head")


def test_a_classifier_is_never_the_embedding_whatever_its_config_says_of_tying():
    shapes = {"bert.embeddings.word_embeddings.weight": (16, 8), "classifier.weight": (2, 8)}

    found = anatomy(shapes, architectures=["BertForSequenceClassification"], tie_word_embeddings=True)

    assert found.kind("classifier.weight") == "head"
    assert found.kind("bert.embeddings.word_embeddings.weight") == "embedding"


def test_the_input_embedding_is_the_table_with_a_row_for_each_token():
    shapes = {"wpe.weight": (64, 8), "wte.weight": (16, 8)}
    assert anatomy(shapes, vocab_size=16).embedding == "wte.weight"
    assert anatomy(shapes).embedding == "wpe.weight"  # the most rows, where the config does not tell


@pytest.mark.parametrize(
    ("shape", "kind"),
    [(("F32", ()), "vector"), (("F32", (1,)), "vector"), (("I64", (1, 4)), "buffer"), (("BOOL", ()), "buffer")],
)
def test_scalars_are_vectors_and_integers_are_buffers(shape, kind):
    assert anatomy({"x": shape}).kind("x") == kind
