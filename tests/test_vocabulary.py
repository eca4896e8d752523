"""Whose tokenizer an output gets, whose rows its tokens have, and what is refused because rows would be mixed."""

import json
import re

import pytest
import torch
from checkpoints import CONFIG, load, same_bits, save, save_headers
from families import BIAS, EMBEDDING, HEAD, NORM, Family, N
from safetensors.torch import save_file
from vocabularies import WORDS, bpe_json, save_tokenizer, sentencepiece, tokenizer_json, write

from merger.calibration.block_grams import PartlyMergedModel
from merger.engine.manifest import Manifest, decisive
from merger.engine.merge import merge
from merger.engine.recorded_recipe import recipe_with_merge
from merger.errors import CheckpointError, RecipeError
from merger.outputs.lock import check_lock, lock
from merger.outputs.verify import DeepCheck, verify
from merger.planning.planner import plan


@pytest.fixture
def family(tmp_path):
    return Family(tmp_path)


@pytest.fixture
def clash(family):
    """Two experts that add different tokens at the same ids."""
    return family.add("base").add("a", N + 2, ["<tool>", "</tool>"]).add("b", N + 2, ["<think>", "</think>"])


def named(name):
    return {"path": "out", "tokenizer": name}


def extra(merge_plan, name=EMBEDDING):
    tensor = next(tensor for tensor in merge_plan.tensors if tensor.name == name)
    return [(rows.start, rows.stop, rows.models) for rows in tensor.extra]


# --- different tokens at one id -------------------------------------------------------------------


def test_different_tokens_at_one_id_are_refused_by_name(clash):
    assert clash.refusal() == (
        "the models' tokenizers give one id to different tokens: 12 is '<tool>' in a and '<think>' in b and "
        "13 is '</tool>' in a and '</think>' in b; write `tokenizer: union` to keep the tokens of all models, "
        "or `tokenizer: base` (or a or b) to keep the tokens of one model, or `extra_rows: drop` to leave out the "
        "tokens that not all models have, or `{kinds: [embedding, head], use: base}` (or a or b) as the first rule"
    )


def test_the_refusal_comes_with_all_others_and_before_anything_is_written(clash):
    save(clash.folder / "b", {**clash.tensors["b"], NORM: torch.ones(9)}, {**CONFIG, "vocab_size": N + 2})
    with pytest.raises(CheckpointError) as caught:
        merge(clash.recipe())
    first, shape_fault = str(caught.value).splitlines()
    assert first.startswith("the models' tokenizers give one id")
    assert shape_fault.startswith("b: model.norm.weight is [9], but [8] in base;")
    assert sorted(path.name for path in clash.folder.iterdir()) == ["a", "b", "base"]


@pytest.mark.parametrize(
    ("remedy", "tokenizer", "rows"),
    [
        ({"output": named("a")}, "a", [(12, 14, ("a",))]),
        ({"output": named("b")}, "b", [(12, 14, ("b",))]),
        ({"output": named("base")}, "base", [(12, 14, ("a",))]),
        ({"extra_rows": "drop"}, "base", []),
        ({"rules": [{"kinds": ["embedding", "head"], "use": "base"}]}, "base", []),
        ({"rules": [{"kinds": ["embedding", "head"], "use": "a"}]}, "a", []),
        ({"rules": [{"kinds": ["embedding", "head"], "use": "b"}]}, "b", []),
    ],
)
def test_every_remedy_that_is_named_works(clash, remedy, tokenizer, rows):
    merge_plan = clash.plan(**remedy)
    assert (merge_plan.tokenizer, extra(merge_plan)) == (tokenizer, rows)


def test_the_tokenizer_that_is_named_decides_whose_rows_are_taken(clash):
    merged = clash.merge(output=named("b"))
    for name in (EMBEDDING, HEAD):
        assert same_bits(merged[name][N:], clash.tensors["b"][name][N:])
    assert [token["content"] for token in clash.output("tokenizer.json")["added_tokens"]] == ["<think>", "</think>"]
    assert (
        "a: its tokens '<tool>' (12), '</tool>' (13) are not in the output, which gets the tokenizer of b"
        in (clash.output("merger.json")["notes"])
    )


def test_the_same_tokens_in_another_order_are_refused(family):
    family.add("base").add("a", N + 2, ["<x>", "<y>"]).add("b", N + 2, ["<y>", "<x>"])
    assert "12 is '<x>' in a and '<y>' in b" in family.refusal()


def test_many_different_tokens_are_counted(family):
    family.add("base").add("a", words=[*WORDS[:2], *WORDS[:1:-1]])
    assert "2 is 'w2' in base and 'w11' in a, 3 is 'w3' in base and 'w10' in a, 4 is" in family.refusal()
    assert "and 7 more; write" in family.refusal()


def test_a_token_that_an_expert_renamed_is_refused_and_its_own_where_it_is_asked_for(family):
    family.add("base", words=[*WORDS, "<unused>", "x"], rows=14).add("a", words=[*WORDS, "<tool>", "x"], rows=14)
    assert "12 is '<unused>' in base and '<tool>' in a" in family.refusal()
    merged, base, a = family.merge(output=named("a")), family.tensors["base"], family.tensors["a"]
    assert same_bits(merged[EMBEDDING][12], a[EMBEDDING][12])
    other_rows = [*range(12), 13]
    torch.testing.assert_close(merged[EMBEDDING][other_rows], a[EMBEDDING][other_rows])
    assert not same_bits(base[EMBEDDING][other_rows], a[EMBEDDING][other_rows])


def test_rows_of_other_tokens_do_not_count_where_changes_are_ranked(family):
    """A tenth of the changes is kept; the row that is another token in `a` changed most, and is none of them."""
    words = [*WORDS, "<unused>", "x"]
    family.add("base", words=words, rows=14).add("a", words=[*WORDS, "<tool>", "x"], rows=14)
    base = {**family.tensors["base"], BIAS: torch.zeros(14)}
    expert = {name: tensor + 0.01 for name, tensor in base.items()}
    for name, places in ((EMBEDDING, [(3, 0), (5, 1)]), (HEAD, [(7, 2)]), (BIAS, [(4,)])):
        for place in places:
            expert[name][place] += 1
        expert[name][12] = 99
    for name, tensors in (("base", base), ("a", expert)):
        save_file(tensors, family.folder / name / "model.safetensors", {"format": "pt"})
    options = {"pipeline": [{"magnitude": {"density": "1/14"}}, "sum"], "output": named("a")}
    merged = family.merge(**options)
    for name in (EMBEDDING, HEAD, BIAS):
        assert same_bits(merged[name][12], expert[name][12])
        row_changes = (merged[name] != base[name]).reshape(14, -1)
        count = base[name].numel() // 14
        assert int(row_changes[[*range(12), 13]].sum()) == count
    assert (merged[BIAS][4] != base[BIAS][4]).all()


# --- tokens in the padding of a table -------------------------------------------------------------


@pytest.fixture
def padded(family):
    """A padded table, in which one of two experts names two rows."""
    return family.add("base", 16).add("a", 16, ["<tool>", "</tool>"]).add("b", 16)


def test_a_token_added_in_padding_comes_from_the_expert_that_has_it(padded):
    merged = padded.merge()
    for name in (EMBEDDING, HEAD):
        assert same_bits(merged[name][12:14], padded.tensors["a"][name][12:14])
    assert [token["content"] for token in padded.output("tokenizer.json")["added_tokens"]] == ["<tool>", "</tool>"]
    assert f"{EMBEDDING}: rows 12 to 13 ('<tool>', '</tool>') are those of a" in padded.output("merger.json")["notes"]
    assert padded.output("merger.json")["tensors"][EMBEDDING]["rows"] == {"12 to 13": ["a"]}


def test_other_rows_are_merged_as_if_no_token_had_been_added(padded):
    merged = padded.merge()
    for name in ("base", "a", "b"):
        save_tokenizer(padded.folder / name)
    padded.merge(output={"path": "plain"})
    expected = load(padded.folder / "plain")
    other_rows = [*range(12), 14, 15]
    for name in (EMBEDDING, HEAD):
        assert same_bits(merged[name][other_rows], expected[name][other_rows])


def test_a_token_that_two_experts_added_is_the_mean_of_both(family):
    family.add("base", 16).add("a", 16, ["<tool>"]).add("b", 16, ["<tool>"]).add("c", 16)
    merged, a, b = family.merge(), family.tensors["a"], family.tensors["b"]
    mean = (a[EMBEDDING][12].double() + b[EMBEDDING][12].double()) / 2
    assert same_bits(merged[EMBEDDING][12], mean.float())


def test_a_head_with_a_bias_gets_the_same_rows(family):
    family.add("base", 16, bias=True).add("a", 16, ["<tool>"], bias=True)
    merged, base, a = family.merge(method="linear"), family.tensors["base"], family.tensors["a"]
    assert same_bits(merged[BIAS][12], a[BIAS][12])
    assert extra(family.plan(), BIAS) == [(12, 13, ("a",))]
    assert not same_bits(base[BIAS][12], a[BIAS][12])


def test_tokens_that_no_tokenizer_has_together_are_refused(family):
    family.add("base", 16).add("a", 16, ["<x>"]).add("b", 16, words=[*WORDS, "<x>", "<y>"])
    assert family.plan().tokenizer == "b"
    write(family.folder / "b" / "tokenizer.json", tokenizer_json([*WORDS, "w12"], ["<y>"]))
    write(family.folder / "a" / "tokenizer.json", tokenizer_json([*WORDS, "w12", "w13"], ["<x>"]))
    assert "13 is 'w13' in a and '<y>' in b" in family.refusal()
    vocabulary = {**{word: i for i, word in enumerate(WORDS)}, "<x>": 14}
    write(family.folder / "a" / "vocab.json", vocabulary)
    (family.folder / "a" / "tokenizer.json").unlink()
    refusal = family.refusal()
    assert "the tokenizer of a lacks 'w12' (12) and '<y>' (13) of b" in refusal
    assert "the tokenizer of b lacks '<x>' (14) of a" in refusal
    assert family.plan(output=named("b")).tokenizer == "b"


def test_what_the_base_names_and_an_expert_does_not_is_merged_as_ever(family):
    family.add("base", 16, ["<tool>"]).add("a", 16)
    merge_plan = family.plan()
    assert (merge_plan.tokenizer, extra(merge_plan)) == ("base", [])


# --- extra_rows: drop -----------------------------------------------------------------------------


def test_dropping_leaves_out_what_only_some_have(clash):
    merged = clash.merge(extra_rows="drop")
    assert merged[EMBEDDING].shape == (N, 8)
    assert clash.output("tokenizer.json")["added_tokens"] == []
    assert (
        "b: its tokens '<think>' (12), '</think>' (13) are not in the output, which gets the tokenizer of base"
        in (clash.output("merger.json")["notes"])
    )


def test_dropping_keeps_no_tokenizer_that_names_a_dropped_row(family):
    family.add("base", 14, ["<x>", "<y>"]).add("a", 12)
    assert family.plan(extra_rows="drop").tokenizer == "a"
    refusal = family.refusal(extra_rows="drop", output=named("base"))
    assert refusal.startswith("extra_rows: drop leaves out the rows of '<x>' (12) and '<y>' (13), which the tokenizer")
    assert "write `tokenizer: a`" in refusal


def test_dropping_does_not_mix_what_is_left(family):
    family.add("base", 14, words=[*WORDS, "<unused>"]).add("a", 15, words=[*WORDS, "<tool>"])
    refusal = family.refusal(extra_rows="drop")
    assert "12 is '<unused>' in base and '<tool>' in a" in refusal
    assert "write `extra_rows" not in refusal


# --- rules ----------------------------------------------------------------------------------------


def test_tables_of_one_model_come_with_its_tokenizer(clash):
    merge_plan = clash.plan(rules=[{"kinds": ["embedding", "head"], "use": "b"}])
    assert merge_plan.tokenizer == "b"
    assert (
        "a: its tokens '<tool>' (12), '</tool>' (13) are not in the output, which gets the tokenizer of b"
        in merge_plan.notes
    )


def test_a_copied_table_must_have_the_rows_of_the_tokenizer(clash):
    rules = [{"kinds": ["embedding", "head"], "use": "b"}]
    refusal = clash.refusal(rules=rules, output=named("a"))
    assert "lm_head.weight is copied from b, which has no row for '<tool>' (12) and '</tool>' (13) of a" in refusal
    assert "write `tokenizer: b` to keep" in refusal
    assert clash.plan(rules=rules, output=named("b")).tokenizer == "b"


def test_an_embedding_that_stays_the_bases_beside_a_merged_head_is_refused(padded):
    rules = [{"kinds": ["embedding"], "use": "base"}]
    refusal = padded.refusal(rules=rules)
    assert "the tokenizer of base lacks '<tool>' (12) and '</tool>' (13) of a" in refusal
    assert f"{EMBEDDING} is copied from base, which has no row for '<tool>' (12) and '</tool>' (13) of a" in refusal
    assert padded.plan(rules=rules, output=named("base")).tokenizer == "base"


def test_a_rule_by_name_is_offered_where_kinds_do_not_reach(family):
    family.add("base", bias=True).add("a", 13, ["<x>"], bias=True).add("b", 13, ["<y>"], bias=True)
    refusal = family.refusal()
    pattern = re.search(r"`\{tensors: '(.+)', use: base\}` \(or a or b\)", refusal)[1]
    assert family.plan(rules=[{"tensors": pattern, "use": "a"}]).tokenizer == "a"


def test_a_pack_is_offered_only_what_it_can_hold(clash):
    refusal = clash.refusal(method="emr")
    assert "write `extra_rows: drop` to leave out the tokens that not all models have, or `{kinds:" in refusal
    assert clash.plan(method="emr", extra_rows="drop").tokenizer == "base"
    assert clash.plan(method="emr", rules=[{"kinds": ["embedding", "head"], "use": "a"}]).tokenizer == "a"


def test_a_pack_cannot_hold_a_token_that_stands_in_padding(padded):
    refusal = padded.refusal(method="emr")
    assert f"{EMBEDDING}: emr cannot hold rows that only a has; add a rule" in refusal
    assert padded.plan(method="emr", rules=[{"kinds": ["embedding", "head"], "use": "a"}]).tokenizer == "a"


# --- models without a tokenizer, and other files --------------------------------------------------


def test_an_expert_without_a_tokenizer_has_the_bases_tokens(family):
    family.add("base", 16).add("a", 16, ["<tool>"]).add("b", 16, tokenizer=False)
    merge_plan = family.plan()
    assert (merge_plan.tokenizer, extra(merge_plan)) == ("a", [(12, 13, ("a",))])
    note = "b: has no tokenizer; its rows are taken for the tokens that the other models have there"
    assert note in merge_plan.notes


def test_a_base_without_a_tokenizer_has_the_tokens_that_experts_agree_on(family):
    family.add("base", 16, tokenizer=False).add("a", 16, ["<tool>"]).add("b", 16)
    merge_plan = family.plan()
    assert (merge_plan.tokenizer, extra(merge_plan)) == ("a", [(12, 13, ("a",))])


def test_the_only_tokenizer_is_not_lost(family):
    family.add("base", tokenizer=False).add("a")
    family.merge()
    assert family.output("tokenizer.json") == tokenizer_json()


def test_a_model_without_a_tokenizer_cannot_give_the_outputs(family):
    family.add("base").add("a", tokenizer=False)
    assert family.refusal(output=named("a")).startswith("tokenizer: a has no tokenizer; write `tokenizer: base`")


def test_without_any_tokenizer_rows_alone_count(family):
    family.add("base", tokenizer=False).add("a", N + 1, tokenizer=False)
    merge_plan = family.plan()
    assert (extra(merge_plan), merge_plan.notes) == (
        [(12, 13, ("a",))],
        (*(f"{x}: rows 12 to 12 are those of a" for x in (HEAD, EMBEDDING)),),
    )


def test_tokens_beyond_a_models_rows_are_no_tokens_of_it(family):
    family.add("base").add("a", added=["<x>"]).add("b", added=["<y>"])
    assert family.plan().tokenizer == "base"


SLOW = {"vocab.json": bpe_json()["model"]["vocab"], "merges.txt": "#version: 0.2\na b\nab c\n"}


@pytest.mark.parametrize(
    ("base", "expert"),
    [
        pytest.param({"tokenizer.json": bpe_json()}, {"tokenizer.json": bpe_json(as_text=True)}, id="merges as text"),
        pytest.param({"tokenizer.json": bpe_json()}, SLOW, id="slow files"),
        pytest.param(SLOW, {"tokenizer.json": bpe_json()}, id="slow files of the base"),
        pytest.param(
            {"tokenizer.json": tokenizer_json(added=["<x>"])},
            {"tokenizer.json": tokenizer_json(), "added_tokens.json": {"<x>": 12}},
            id="an added token in another file",
        ),
        pytest.param(
            {"vocab.txt": "a\nb\n"},
            {"vocab.txt": "a\nb\n", "tokenizer_config.json": {"added_tokens_decoder": {"1": {"content": "b"}}}},
            id="a token named twice",
        ),
        pytest.param(
            {"tokenizer.model": sentencepiece(["a", "b"])}, {"vocab.json": {"b": 1, "a": 0}}, id="sentencepiece alone"
        ),
        pytest.param({"tekken.json": {"a": 1}}, {"tekken.json": {"a": 1}}, id="files that cannot be read"),
    ],
)  # fmt: skip
def test_the_same_tokenizer_in_other_files_is_no_difference(family, base, expert):
    family.add("base", 16, tokenizer=False).add("a", 16, tokenizer=False)
    for name, files in (("base", base), ("a", expert)):
        for file, content in files.items():
            write(family.folder / name / file, content)
    merge_plan = family.plan()
    assert (merge_plan.tokenizer, merge_plan.notes, extra(merge_plan)) == ("base", (), [])


@pytest.mark.parametrize(
    ("base", "expert", "complaint"),
    [
        pytest.param(SLOW, {**SLOW, "vocab.json": {"a": 1, "b": 0}}, "0 is 'a' in base and 'b' in a", id="vocab.json"),
        pytest.param({"vocab.txt": "a\nb"}, {"vocab.txt": "b\na"}, "0 is 'a' in base and 'b' in a", id="vocab.txt"),
        pytest.param(
            {"tokenizer.model": sentencepiece(["a", "b"])},
            {"tokenizer.model": sentencepiece(["b", "a"])},
            "0 is 'a' in base and 'b' in a",
            id="sentencepiece",
        ),
        pytest.param(
            {"tokenizer.model": b"one" * 99},
            {"tokenizer.model": b"two" * 99},
            "a: its tokenizer is not that of base, and merger cannot compare their tokens in tokenizer.model",
            id="files that cannot be read",
        ),
        pytest.param(
            {"tokenizer.json": tokenizer_json()},
            {"tekken.json": {}},
            "merger cannot compare their tokens in tokenizer.json and tekken.json",
            id="one file that cannot be read",
        ),
        pytest.param(
            {"tokenizer.json": tokenizer_json(), "added_tokens.json": {"<x>": 12}},
            {"tokenizer.json": tokenizer_json(), "added_tokens.json": {"<y>": 12}},
            "12 is '<x>' in base and '<y>' in a",
            id="added_tokens.json",
        ),
        pytest.param(
            {"tokenizer.json": tokenizer_json(), "special_tokens_map.json": {"pad_token": "<x>"}},
            {"tokenizer.json": tokenizer_json(), "special_tokens_map.json": {"pad_token": "<y>"}},
            "12 is '<x>' in base and '<y>' in a",
            id="special_tokens_map.json",
        ),
        pytest.param(
            {"tokenizer.json": tokenizer_json(), "tokenizer_config.json": {"added_tokens_decoder": {"12": "<x>"}}},
            {"tokenizer.json": tokenizer_json(), "tokenizer_config.json": {"added_tokens_decoder": {"12": "<y>"}}},
            "12 is '<x>' in base and '<y>' in a",
            id="tokenizer_config.json",
        ),
    ],
)
def test_another_tokenizer_is_told_in_whatever_file_it_stands(family, base, expert, complaint):
    family.add("base", 16, tokenizer=False).add("a", 16, tokenizer=False)
    for name, files in (("base", base), ("a", expert)):
        for file, content in files.items():
            write(family.folder / name / file, content)
    assert complaint in family.refusal()
    assert family.plan(output=named("base")).tokenizer == "base"
    assert family.plan(rules=[{"kinds": ["embedding", "head"], "use": "a"}]).tokenizer == "a"


# --- harmless differences -------------------------------------------------------------------------


def test_a_chat_template_and_an_end_token_are_noted(family):
    family.add("base", eos_token="w1").add("a", eos_token="w2", chat_template="{{ messages }}")
    assert family.plan().notes == (
        "a: its tokenizer differs from that of the output, which gets the tokenizer of base, in chat template, "
        "eos_token ('w2' instead of 'w1'); "
        "`output: {tokenizer: a}` takes its own",
    )


def test_another_way_to_split_text_is_noted(family):
    family.add("base", tokenizer=False).add("a", tokenizer=False)
    for name, normalizer in (("base", None), ("a", {"type": "Lowercase"})):
        letters = ["W", "w", "T", "t", "H", "h", "?"]
        write(family.folder / name / "tokenizer.json", bpe_json(letters, (), normalizer=normalizer))
    (note,) = family.plan().notes
    assert "which gets the tokenizer of base, in normalizer; `output: {tokenizer: a}`" in note


def test_a_file_that_is_only_formatted_differently_is_not_noted(family):
    family.add("base").add("a")
    file = family.folder / "a" / "tokenizer.json"
    write(file, json.dumps(json.loads(file.read_text()), indent=3))
    assert family.plan().notes == ()


# --- the end of a generation ----------------------------------------------------------------------


def chat(family, eos, config, generation):
    """A base that ends at w1, and an expert with another end token."""
    family.add("base", eos_token="w1", config={"eos_token_id": 1})
    write(family.folder / "base" / "generation_config.json", {"eos_token_id": 1, "temperature": 0.5})
    family.add("chat", eos_token=eos, config=config)
    if generation is not None:
        write(family.folder / "chat" / "generation_config.json", generation)
    family.merge(output=named("chat"))
    return family.output("config.json"), family.output("generation_config.json")


@pytest.mark.parametrize(
    ("eos", "config", "generation", "in_config", "in_generation"),
    [
        pytest.param("w9", {"eos_token_id": 9}, {"eos_token_id": [9, 1]}, 9, [9, 1], id="a list"),
        pytest.param("w9", {"eos_token_id": 9}, {"eos_token_id": 9}, 9, 9, id="one id"),
        pytest.param("w9", {"eos_token_id": [9, 3]}, None, [9, 3], [9, 3], id="no generation config"),
        pytest.param("w9", {}, None, 9, 9, id="only the tokenizer says it"),
        pytest.param("w9", {"eos_token_id": 1}, {"eos_token_id": 1}, [1, 9], [1, 9], id="files that disagree"),
        pytest.param("w9", {"eos_token_id": None}, {"top_k": 5}, 9, 9, id="a generation config without it"),
        pytest.param({"content": "w9"}, {"eos_token_id": 9}, {}, 9, 9, id="a token with flags"),
    ],
)
def test_the_end_token_of_the_tokenizer_ends_a_generation(family, eos, config, generation, in_config, in_generation):
    model_config, settings = chat(family, eos, config, generation)
    assert (model_config["eos_token_id"], settings["eos_token_id"]) == (in_config, in_generation)


def test_settings_for_generation_come_with_the_tokenizer(family):
    _, settings = chat(family, "w9", {"eos_token_id": 9}, {"eos_token_id": 9, "top_k": 5})
    assert settings == {"eos_token_id": 9, "top_k": 5}


def test_a_padding_token_comes_with_the_tokenizer(family):
    family.add("base", config={"eos_token_id": 1, "pad_token_id": None, "bos_token_id": 2})
    family.add("a", N + 1, ["[PAD]"], pad_token="[PAD]", config={"eos_token_id": 1, "pad_token_id": 12})
    family.merge()
    config = family.output("config.json")
    assert {key: config[key] for key in config if "token_id" in key} == {
        "eos_token_id": 1, "pad_token_id": 12, "bos_token_id": 2,
    }  # fmt: skip


def test_a_nested_config_names_the_ids_where_it_did(family):
    inner = {"vocab_size": N, "eos_token_id": 1}
    family.add("base", config={"text_config": inner, "eos_token_id": 1})
    family.add("chat", eos_token="w9", config={"text_config": {**inner, "eos_token_id": 9}})
    config = family.plan(output=named("chat")).config
    assert (config["eos_token_id"], config["text_config"]["eos_token_id"]) == (9, 9)


def test_the_bases_files_are_left_as_they_are_where_its_tokenizer_is_written(family):
    family.add("base", eos_token="w9", config={"eos_token_id": 1}).add("a", eos_token="w3", config={"eos_token_id": 3})
    write(family.folder / "base" / "generation_config.json", '{"eos_token_id":   1}')
    family.merge()
    assert family.output("config.json")["eos_token_id"] == 1
    assert (family.folder / "out" / "generation_config.json").read_text() == '{"eos_token_id":   1}'


def test_a_lock_names_what_will_be_written(family):
    family.add("base", eos_token="w1").add("chat", eos_token="w9", config={"eos_token_id": 9})
    write(family.folder / "base" / "generation_config.json", {"eos_token_id": 1})
    recipe = family.recipe(output=named("chat"))
    locked = lock(recipe, family.folder / "recipe.lock")
    merge(recipe)
    assert locked["files"] == family.output("merger.json")["files"]


# --- adapters -------------------------------------------------------------------------------------


def test_an_adapters_tokenizer_and_rows_are_not_lost(family):
    family.add("base")
    table = torch.randn(N + 1, 8, generator=torch.Generator().manual_seed(9))
    adapter = family.folder / "adapter"
    save_tokenizer(adapter, added=["<tool>"], eos_token="<tool>")
    write(adapter / "adapter_config.json", {"peft_type": "LORA", "r": 1, "lora_alpha": 1})
    tensors = {f"base_model.model.{name}": table * scale for name, scale in ((EMBEDDING, 1), (HEAD, 2))}
    save_file(tensors, adapter / "adapter_model.safetensors")
    family.experts["a"] = {"model": "base", "adapter": "adapter"}
    merged = family.merge()
    assert same_bits(merged[EMBEDDING][N], table[N])
    assert same_bits(merged[HEAD][N], 2 * table[N])
    assert [token["content"] for token in family.output("tokenizer.json")["added_tokens"]] == ["<tool>"]
    assert (family.output("config.json")["vocab_size"], family.output("config.json")["eos_token_id"]) == (N + 1, N)


def test_adapters_that_add_different_tokens_are_refused(family):
    family.add("base", 16)
    for name, token in (("a", "<x>"), ("b", "<y>")):
        save_tokenizer(family.folder / f"{name}-adapter", added=[token])
        write(family.folder / f"{name}-adapter" / "adapter_config.json", {"peft_type": "LORA", "r": 1, "lora_alpha": 1})
        factors = {"lora_embedding_A": torch.ones(1, 16), "lora_embedding_B": torch.ones(8, 1)}
        tensors = {f"base_model.model.model.embed_tokens.{key}": value for key, value in factors.items()}
        save_file(tensors, family.folder / f"{name}-adapter" / "adapter_model.safetensors")
        family.experts[name] = {"model": "base", "adapter": f"{name}-adapter"}
    assert "12 is '<x>' in a and '<y>' in b" in family.refusal()
    merged = family.merge(output=named("b"))
    torch.testing.assert_close(merged[EMBEDDING][12], family.tensors["base"][EMBEDDING][12] + 1)


# --- what else reads a plan -----------------------------------------------------------------------


def test_a_merge_with_a_tokenizer_that_was_named_verifies_and_is_inspected(clash):
    clash.merge(output=named("a"))
    verification = verify(clash.folder / "out", deep=DeepCheck(sample=100))
    assert (verification.differences, len(verification.recomputed)) == ((), 3)
    manifest = Manifest.read(clash.folder / "out")
    with_merge = plan(recipe_with_merge(manifest, clash.folder / "out", "merge", clash.folder))
    with_merge.close()
    assert (with_merge.tokenizer, list(with_merge.models)) == ("a", ["base", "a", "b", "merge"])


def test_tokens_are_part_of_what_an_unfinished_merge_was_made_of(padded):
    inputs_before = decisive(padded.plan(), "cpu", {})
    save_tokenizer(padded.folder / "a")
    inputs_after = decisive(padded.plan(), "cpu", {})
    assert [key for key in inputs_before if inputs_before[key] != inputs_after[key]] == ["tensors"]


def test_a_locked_recipe_sees_that_an_experts_tokens_changed(padded):
    lock(padded.recipe(), padded.folder / "recipe.lock")
    save_tokenizer(padded.folder / "b", added=["<tool>"])
    with pytest.raises(RecipeError, match="tensors was"):
        check_lock(padded.recipe(), padded.folder / "recipe.lock")


def test_behind_merged_blocks_an_expert_keeps_rows_that_are_another_token(clash):
    merge_plan = clash.plan(output=named("a"))
    merged = {EMBEDDING: torch.zeros(N + 2, 8)}
    models = {name: merge_plan.models[name].read(EMBEDDING) for name in ("a", "b")}
    tables = {name: PartlyMergedModel(merge_plan, name, merged.get).read(EMBEDDING) for name in models}
    assert same_bits(tables["a"], merged[EMBEDDING])
    assert same_bits(tables["b"], torch.cat([merged[EMBEDDING][:N], models["b"][N:]]))
    merge_plan.close()


def test_a_tied_embedding_is_treated_like_any(family):
    for name, added in (("base", []), ("a", ["<x>"]), ("b", ["<y>"])):
        family.add(name, N + len(added), added, config={"tie_word_embeddings": True})
        family.tensors[name].pop(HEAD)
        save(family.folder / name, family.tensors[name], {**CONFIG, "vocab_size": N, "tie_word_embeddings": True})
    assert "`{kinds: [tied], use: base}` (or a or b) as the first rule" in family.refusal()
    merged = family.merge(output=named("b"))
    assert same_bits(merged[EMBEDDING][N], family.tensors["b"][EMBEDDING][N])
    assert HEAD not in merged


# --- a vocabulary as large as real ones -----------------------------------------------------------


def test_a_large_vocabulary_is_told_apart_quickly_enough_to_plan(tmp_path):
    words = [f"w{i}" for i in range(50_000)]
    shapes = {EMBEDDING: (50_048, 8), HEAD: (50_048, 8)}
    for name, added in (("base", []), ("a", ["<x>"]), ("b", ["<x>", "<y>"])):
        save_headers(tmp_path / name, shapes, {**CONFIG, "vocab_size": 50_048})
        save_tokenizer(tmp_path / name, words, added)
    family = Family(tmp_path)
    family.experts = {"a": "a", "b": "b"}
    merge_plan = family.plan()
    assert (merge_plan.tokenizer, extra(merge_plan)) == ("b", [(50_000, 50_001, ("a", "b")), (50_001, 50_002, ("b",))])
