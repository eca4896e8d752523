"""Tokens matched as strings: unions of vocabularies, tokenizers with other ids, rows from a model of one's choice."""

import json
import re
import shutil

import pytest
import torch
from checkpoints import load, same_bits
from families import BIAS, EMBEDDING, HEAD, NORM, Family, N
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tasks import TASKS, demo_folder, recipe_of, text_of  # noqa: F401 a fixture
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer
from vocabularies import WORDS, bpe_json, save_tokenizer, sentencepiece, tokenizer_json, write

import merger as library
from merger.calibration.block_grams import PartlyMergedModel
from merger.checkpoint.side_files import write_side_files
from merger.checkpoint.tokenizers import open_tokenizers
from merger.checkpoint.united_tokenizer import united_files
from merger.engine.manifest import Manifest, decisive
from merger.engine.merge import merge
from merger.engine.recorded_recipe import recipe_with_merge
from merger.errors import RecipeError
from merger.evaluation import evaluate
from merger.outputs.lock import check_lock, lock
from merger.outputs.verify import DeepCheck, verify
from merger.planning.planner import plan
from merger.recipe.recipe import Recipe

TABLES = (EMBEDDING, HEAD)
SHUFFLED = [*WORDS[6:], *WORDS[:6]]


@pytest.fixture
def family(tmp_path):
    return Family(tmp_path)


@pytest.fixture
def clash(family):
    """Two experts that add different tokens at the same ids."""
    return family.add("base").add("a", N + 2, ["<tool>", "</tool>"]).add("b", N + 2, ["<think>", "</think>"])


def extra(merge_plan, name=EMBEDDING):
    tensor = next(tensor for tensor in merge_plan.tensors if tensor.name == name)
    return [(rows.start, rows.stop, rows.models) for rows in tensor.extra]


def row_maps(merge_plan, name=EMBEDDING):
    tensor = next(tensor for tensor in merge_plan.tensors if tensor.name == name)
    return {label: [tuple(run) for run in row_map.runs] for label, row_map in tensor.row_maps.items()}


def ids_in(folder):
    """The id of each token, as the library `tokenizers` loads the file."""
    return Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab()


def task_arithmetic(base, *experts):
    return base + sum(expert - base for expert in experts)


# --- the union ------------------------------------------------------------------------------------


def test_a_union_has_the_tokens_of_the_base_and_then_those_of_the_experts_in_their_order(clash):
    clash.merge(tokenizer="union")
    added = {"<tool>": 12, "</tool>": 13, "<think>": 14, "</think>": 15}
    assert ids_in(clash.folder / "out") == {**{word: i for i, word in enumerate(WORDS)}, **added}
    assert clash.output("config.json")["vocab_size"] == 16


def test_in_a_union_every_added_token_has_the_row_of_the_expert_that_has_it(clash):
    merged, a, b = clash.merge(tokenizer="union"), clash.tensors["a"], clash.tensors["b"]
    for name in TABLES:
        assert same_bits(merged[name][12:14], a[name][12:])
        assert same_bits(merged[name][14:16], b[name][12:])


def test_rows_of_common_tokens_are_merged_as_if_no_token_had_been_added(clash):
    merged = clash.merge(tokenizer="union")
    expected = clash.merge(extra_rows="drop", output={"path": "plain"}, folder="plain")
    for name in TABLES:
        assert same_bits(merged[name][:N], expected[name])


def test_a_token_that_two_experts_add_at_different_ids_is_the_mean_of_both(family):
    family.add("base").add("a", N + 2, ["<x>", "<y>"]).add("b", N + 2, ["<y>", "<z>"])
    merged, a, b = family.merge(tokenizer="union"), family.tensors["a"], family.tensors["b"]
    mean = (a[EMBEDDING][13].double() + b[EMBEDDING][12].double()) / 2
    assert same_bits(merged[EMBEDDING][13], mean.float())
    assert same_bits(merged[EMBEDDING][14], b[EMBEDDING][13])


def test_a_token_that_an_expert_lacks_is_changed_by_the_other_experts_alone(family):
    family.add("base", added=["<x>"], rows=13).add("a", added=["<x>"], rows=13).add("b", 13, ["<y>"])
    merged = family.merge(tokenizer="union")
    for name in TABLES:
        assert same_bits(merged[name][12], family.tensors["a"][name][12])
        assert same_bits(merged[name][13], family.tensors["b"][name][12])


def test_an_expert_with_a_shorter_table_leaves_the_other_rows_to_the_others(family):
    family.add("base", 14).add("a", 14).add("b", 12)
    merged = family.merge(tokenizer="base")
    for name in TABLES:
        assert same_bits(merged[name][12:], family.tensors["a"][name][12:])


def test_models_with_one_vocabulary_are_read_without_a_map_to_the_same_bytes(family):
    family.add("base", 16).add("a", 16).add("b", 16)
    plain = family.merge()
    merged = family.merge(tokenizer="union", output={"path": "union"}, folder="union")
    assert row_maps(family.plan(tokenizer="union")) == {}
    assert all(same_bits(merged[name], plain[name]) for name in plain)


def test_added_tokens_come_into_the_padding_of_the_base(family):
    family.add("base", 16, bias=True).add("a", 16, ["<x>"], bias=True).add("b", 16, ["<y>"], bias=True)
    merge_plan = family.plan(tokenizer="union")
    assert extra(merge_plan) == [(12, 13, ("a",)), (13, 14, ("b",))]
    merged, tensors = family.merge(tokenizer="union"), family.tensors
    for name in (*TABLES, BIAS):
        assert same_bits(merged[name][12], tensors["a"][name][12])
        assert same_bits(merged[name][13], tensors["b"][name][12])
        assert same_bits(merged[name][14:], task_arithmetic(*(tensors[label][name][14:] for label in tensors)))


def test_rows_are_padded_to_a_multiple_with_zeros_where_that_is_asked_for(clash):
    merged = clash.merge(tokenizer="union", output={"path": "out", "pad_rows_to": 10})
    for name in TABLES:
        assert merged[name].shape == (20, 8)
        assert not merged[name][16:].any()
    assert clash.output("config.json")["vocab_size"] == 20
    assert clash.output("merger.json")["tensors"][EMBEDDING]["rows"] == {
        "12 to 13": ["a"], "14 to 15": ["b"], "16 to 19": [],
    }  # fmt: skip


def test_a_tied_table_is_united_like_any(family):
    for name, added in (("base", []), ("a", ["<x>"]), ("b", ["<y>"])):
        family.add(name, N + len(added), added, tied=True)
    merged = family.merge(tokenizer="union")
    assert HEAD not in merged
    assert same_bits(merged[EMBEDDING][12], family.tensors["a"][EMBEDDING][12])
    assert same_bits(merged[EMBEDDING][13], family.tensors["b"][EMBEDDING][12])


def test_the_bytes_do_not_depend_on_slices(family, monkeypatch):
    family.add("base").add("a", N + 1, ["<x>"], words=SHUFFLED).add("b", N + 1, ["<y>"])
    options = {"pipeline": [{"magnitude": {"density": 0.3}}, "sum"], "tokenizer": "union"}
    whole = family.merge(**options)
    monkeypatch.setattr("merger.engine.memory.SLICE", 24)
    sliced = family.merge(**options, output={"path": "sliced"}, folder="sliced")
    assert all(same_bits(sliced[name], whole[name]) for name in whole)


def test_flags_of_an_added_token_and_its_place_in_all_files_are_those_of_its_expert(family):
    family.add("base", pad_token="<pad>", added_tokens_decoder={}).add("a", N + 1, ["<x>"])
    write(family.folder / "a" / "tokenizer.json", with_added({"content": "<x>", "lstrip": True, "special": False}))
    family.merge(tokenizer="union")
    flags = {"single_word": False, "lstrip": True, "rstrip": False, "normalized": True, "special": False}
    entries = family.output("tokenizer.json")["added_tokens"]
    assert [(entry["id"], entry["content"]) for entry in entries] == [(12, "<pad>"), (13, "<x>")]
    assert entries[1] == {"id": 13, "content": "<x>", **flags}
    assert family.output("tokenizer_config.json")["added_tokens_decoder"]["13"] == {"content": "<x>", **flags}


def with_added(*entries):
    return {**tokenizer_json(), "added_tokens": [{"id": N + i, **entry} for i, entry in enumerate(entries)]}


def test_a_tokenizer_without_tokenizer_json_gets_added_tokens_through_its_config(tmp_path):
    content, roles = bpe_json(), {f"{role}_token": "d" for role in ("unk", "bos", "eos")}
    for name, added in (("base", {}), ("a", {"<x>": 6})):
        write(tmp_path / name / "vocab.json", content["model"]["vocab"])
        write(tmp_path / name / "merges.txt", "#version: 0.2\na b\nab c\n")
        write(tmp_path / name / "tokenizer_config.json", {"tokenizer_class": "GPT2Tokenizer", **roles})
        write(tmp_path / name / "added_tokens.json", added)
    tokenizers = open_tokenizers({name: tmp_path / name for name in ("base", "a")})
    (tmp_path / "out").mkdir()
    write_side_files(united_files(tokenizers["base"], tokenizers["a"].added_tokens), tmp_path / "out")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert loaded.convert_tokens_to_ids(["a", "abc", "<x>"]) == [0, 5, 6]
    assert loaded.tokenize("ab<x>c") == ["ab", "<x>", "c"]


def test_a_sentencepiece_model_gets_added_tokens_through_its_config(family):
    pieces = sentencepiece(["<unk>", "a", "b"])
    for name, added in (("base", []), ("a", ["<x>"]), ("b", ["<y>"])):
        family.add(name, 3 + len(added), tokenizer=False)
        write(family.folder / name / "tokenizer.model", pieces)
        write(family.folder / name / "added_tokens.json", dict.fromkeys(added, 3))
    merged = family.merge(tokenizer="union")
    decoder = family.output("tokenizer_config.json")["added_tokens_decoder"]
    assert {i: entry["content"] for i, entry in decoder.items()} == {"3": "<x>", "4": "<y>"}
    assert open_tokenizers({"out": family.folder / "out"})["out"].tokens[4] == "<y>"
    assert same_bits(merged[EMBEDDING][4], family.tensors["b"][EMBEDDING][3])


def test_rows_are_padded_to_a_multiple_without_any_other_key(family):
    family.add("base", tied=True).add("a", tied=True)
    merged = family.merge(output={"path": "out", "pad_rows_to": 8})
    assert same_bits(merged[EMBEDDING][:N], family.tensors["a"][EMBEDDING])
    assert (merged[EMBEDDING].shape, int(merged[EMBEDDING][N:].count_nonzero())) == ((16, 8), 0)


# --- the tokenizer of one model -------------------------------------------------------------------


def test_rows_are_those_of_the_tokens_of_the_named_tokenizer(family):
    family.add("base").add("a", words=SHUFFLED).add("b")
    merged, base, a, b = family.merge(tokenizer="a"), *(family.tensors[label] for label in ("base", "a", "b"))
    assert ids_in(family.folder / "out") == {word: i for i, word in enumerate(SHUFFLED)}
    numbers = [WORDS.index(word) for word in SHUFFLED]
    for name in TABLES:
        assert same_bits(merged[name], task_arithmetic(base[name][numbers], a[name], b[name][numbers]))


def test_the_older_place_of_the_key_means_the_same(family):
    family.add("base").add("a", words=SHUFFLED).add("b")
    merged = family.merge(tokenizer="a")
    older = family.merge(output={"path": "older", "tokenizer": "a"}, folder="older")
    assert all(same_bits(older[name], merged[name]) for name in merged)


def test_pieces_that_the_named_vocabulary_lacks_are_left_out_and_those_of_the_base_alone_stay(family):
    family.add("base").add("a", words=[*WORDS[3:], "x", "y", "z"])
    merged, base, a = family.merge(tokenizer="base"), family.tensors["base"], family.tensors["a"]
    for name in TABLES:
        assert same_bits(merged[name][:3], base[name][:3])
        assert same_bits(merged[name][3:], a[name][: N - 3])


def test_changes_are_ranked_over_the_rows_that_are_merged(family):
    """A row that is in no table of the base takes no place among the changes that are kept."""
    family.add("base").add("a", N + 1, ["<x>"], words=SHUFFLED)
    merged = family.merge(pipeline=[{"magnitude": {"density": "1/12"}}, "sum"], tokenizer="union")
    changed = merged[EMBEDDING][:N] != family.tensors["base"][EMBEDDING]
    assert int(changed.sum()) == 8


@settings(max_examples=15)
@given(st.permutations(range(N + 2)), st.sampled_from(["sum", "ties", "slerp"]), st.booleans())
def test_another_numbering_of_an_experts_vocabulary_changes_no_row_of_a_token(tmp_path_factory, order, method, tied):
    """The words of `a` and an added token of it, in any order of ids, with its tables in the same order."""
    family = Family(tmp_path_factory.mktemp("family"))
    words = [*WORDS, "<x>", "<y>"]
    family.add("base", tied=tied, bias=not tied).add("a", N + 2, words=words, tied=tied, bias=not tied)
    family.add("b", tied=tied, bias=not tied)
    for name in ("base", "a"):
        added = [{"content": token} for token in words[N:]] if name == "a" else []
        write(family.folder / name / "tokenizer.json", permuted_json(words if name == "a" else WORDS, added))
    merged = family.merge(tokenizer="union", method=method)
    write(family.folder / "a" / "tokenizer.json", permuted_json([words[i] for i in order], added))
    tensors = {name: tensor if name == NORM else tensor[list(order)] for name, tensor in family.tensors["a"].items()}
    save_file(tensors, family.folder / "a" / "model.safetensors", {"format": "pt"})
    again = family.merge(tokenizer="union", method=method, output={"path": "again"}, folder="again")
    rows = {name: ids_in(family.folder / folder) for name, folder in (("out", "out"), ("again", "again"))}
    for token in words:
        for name in merged.keys() - {NORM}:
            assert same_bits(merged[name][rows["out"][token]], again[name][rows["again"][token]])


def permuted_json(words, added):
    """A word-level tokenizer.json in whose vocabulary added tokens may have any id."""
    vocabulary = tokenizer_json(words)
    entries = [{**dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False), "special": True, **entry}
               for entry in added]  # fmt: skip
    return {**vocabulary, "added_tokens": [{"id": words.index(entry["content"]), **entry} for entry in entries]}


# --- rows from a model of one's choice ------------------------------------------------------------


@pytest.mark.parametrize(
    ("token", "source", "expected"),
    [
        ("<x>", "zero", lambda t: torch.zeros(8)),
        ("<x>", "b", lambda t: t["b"][12]),
        ("<x>", "mean", lambda t: ((t["a"][12].double() + t["b"][12].double()) / 2).float()),
        ("w3", "a", lambda t: t["a"][3]),
        ("w3", "base", lambda t: t["base"][3]),
        ("w3", "mean", lambda t: ((t["a"][3].double() + t["b"][3].double()) / 2).float()),
    ],
)
def test_the_row_of_a_token_comes_from_where_the_recipe_says(family, token, source, expected):
    family.add("base").add("a", N + 1, ["<x>"]).add("b", N + 1, ["<x>"])
    merged = family.merge(tokenizer="union", tokens={token: {"from": source}})
    row = ids_in(family.folder / "out")[token]
    for name in TABLES:
        assert same_bits(merged[name][row], expected({label: table[name] for label, table in family.tensors.items()}))
    assert family.output("merger.json")["recipe"]["tokens"] == {token: {"from": source}}


# --- faults ---------------------------------------------------------------------------------------


def faults(family, **options):
    with pytest.raises(RecipeError) as caught:
        family.recipe(**options)
    return caught.value.faults


def test_keys_that_contradict_each_other_are_faults_of_the_recipe(clash):
    assert faults(clash, tokenizer="c") == ["recipe: tokenizer: there is no expert 'c'; choose from a, b, base, union"]
    assert faults(clash, tokenizer="a", output={"path": "out", "tokenizer": "b"}) == [
        "recipe: output.tokenizer: is the older place of `tokenizer`, which is there too; leave it out"
    ]
    assert faults(clash, tokenizer="union", extra_rows="drop") == [
        "recipe: extra_rows: drop leaves out tokens that not all models have, which `tokenizer: union` keeps"
    ]
    assert faults(clash, tokens={"<tool>": {"from": "a"}}) == [
        "recipe: tokens: needs a tokenizer that has these tokens; add `tokenizer: base`, an expert or `union`"
    ]
    assert faults(clash, tokenizer="union", tokens={"<tool>": {"from": "meen"}}) == [
        "recipe: tokens.<tool>.from: there is no expert 'meen'; did you mean 'mean'?"
    ]
    assert faults(clash, tokenizer="union", tokens={"<tool>": {"form": "a"}}) == [
        "recipe: tokens.<tool>.from: is missing",
        "recipe: tokens.<tool>.form: unknown key; did you mean 'from'?",
    ]


def test_a_token_without_a_near_one_is_told_with_their_number(clash):
    (fault,) = clash.refusal(tokenizer="union", tokens={"qqqqqqq": {"from": "a"}}).splitlines()
    expected = "recipe: tokens.qqqqqqq: is no token of the output, which has the tokens of all models, "
    assert re.fullmatch(rf"{re.escape(expected)}\d+ in number", fault)


def test_tokens_that_the_output_or_a_source_lacks_are_named(clash):
    tokens = {"<tol>": {"from": "a"}, "<tool>": {"from": "b"}}
    assert clash.refusal(tokenizer="union", tokens=tokens).splitlines() == [
        "recipe: tokens.<tol>: is no token of the output, which has the tokens of all models; did you mean '<tool>'?",
        "recipe: tokens.<tool>.from: b has no row for '<tool>'; take it from a",
    ]


def test_different_vocabularies_are_not_united(family):
    family.add("base").add("a", N + 1, words=[*WORDS[3:], "x", "y", "z", "v"])
    assert family.refusal(tokenizer="union") == (
        "a: its vocabulary has 'x', 'y', 'z' and 1 more, which are no added tokens, and one tokenizer cannot split "
        "text as two vocabularies do; write `tokenizer: base` (or a) to keep the tokens of one model"
    )
    assert "tokenizer: union`" not in family.refusal()


def test_a_base_without_a_tokenizer_unites_nothing(family):
    family.add("base", tokenizer=False).add("a", N + 1, ["<x>"])
    assert family.refusal(tokenizer="union").startswith(
        "tokenizer: union adds tokens to the base's tokenizer, and base has none; write `tokenizer: a`"
    )


def test_ids_with_gaps_into_which_added_tokens_would_come_are_refused(family):
    family.add("base", 16, tokenizer=False).add("a", 16, ["<x>"])
    content = tokenizer_json()
    content["model"]["vocab"] = {word: i + (i > 5) for i, word in enumerate(WORDS)}
    write(family.folder / "base" / "tokenizer.json", content)
    assert family.refusal(tokenizer="union").startswith(
        "base: its ids have gaps, into which the library `tokenizers` would put added tokens; write `tokenizer: base`"
    )


def test_a_table_that_is_copied_must_have_the_rows_of_the_union(clash):
    refusal = clash.refusal(tokenizer="union", rules=[{"kinds": ["embedding"], "use": "base"}])
    assert refusal.startswith(f"{EMBEDDING} is copied from base, which has no row for '<tool>' (12), '</tool>' (13), ")


def test_a_pack_holds_no_rows_with_other_numbers(family):
    family.add("base").add("a", words=SHUFFLED)
    assert family.refusal(tokenizer="base", method="emr").splitlines() == [
        f"{name}: emr cannot hold rows whose numbers in a are other tokens; leave `tokenizer` out"
        for name in (HEAD, EMBEDDING)
    ]


# --- what else reads a plan -----------------------------------------------------------------------


def test_a_union_verifies_deeply_and_is_inspected_beside_its_inputs(family):
    family.add("base").add("a", N + 1, ["<x>"], words=SHUFFLED).add("b", N + 1, ["<y>"])
    family.merge(tokenizer="union", tokens={"<x>": {"from": "zero"}})
    verification = verify(family.folder / "out", deep=DeepCheck(sample=100))
    assert (verification.differences, len(verification.recomputed)) == ((), 3)
    manifest = Manifest.read(family.folder / "out")
    with_merge = plan(recipe_with_merge(manifest, family.folder / "out", "merge", family.folder))
    with_merge.close()
    assert row_maps(with_merge)["a"] == [(0, 6, 6), (6, 12, 0), (12, 13, 12)]
    assert "merge" not in row_maps(with_merge)


def test_ids_are_part_of_a_lock_and_of_what_an_unfinished_merge_was_made_of(family):
    family.add("base").add("a", words=SHUFFLED)
    recipe = family.recipe(tokenizer="base")
    inputs_before = decisive(family.plan(tokenizer="base"), "cpu", {})
    lock(recipe, family.folder / "recipe.lock")
    save_tokenizer(family.folder / "a", SHUFFLED[::-1])
    inputs_after = decisive(family.plan(tokenizer="base"), "cpu", {})
    assert [key for key in inputs_before if inputs_before[key] != inputs_after[key]] == ["tensors"]
    with pytest.raises(RecipeError, match="tensors was"):
        check_lock(recipe, family.folder / "recipe.lock")


def test_a_lock_names_the_files_of_the_union(clash):
    recipe = clash.recipe(tokenizer="union")
    locked = lock(recipe, clash.folder / "recipe.lock")
    merge(recipe)
    assert locked["files"] == clash.output("merger.json")["files"]


def test_behind_merged_blocks_an_expert_reads_the_merge_by_its_own_ids(family):
    family.add("base").add("a", N + 1, ["<x>"], words=SHUFFLED)
    merge_plan = family.plan(tokenizer="base")
    merged = torch.arange(13.0)[:, None].expand(13, 8)
    table = PartlyMergedModel(merge_plan, "a", {EMBEDDING: merged}.get).read(EMBEDDING)
    assert table[:, 0].tolist() == [*range(6, 12), *range(6), 12]
    merge_plan.close()


def test_an_adapter_with_tokens_of_its_own_is_read_by_their_strings(family):
    family.add("base", 16).add("a", 16, ["<x>"])
    adapter = family.folder / "adapter"
    save_tokenizer(adapter, added=["<y>"])
    write(adapter / "adapter_config.json", {"peft_type": "LORA", "r": 1, "lora_alpha": 1})
    factors = {"lora_embedding_A": torch.ones(1, 16), "lora_embedding_B": torch.full((8, 1), 2.0**-20)}
    save_file({f"base_model.model.model.embed_tokens.{key}": value for key, value in factors.items()},
              adapter / "adapter_model.safetensors")  # fmt: skip
    family.experts["b"] = {"model": "base", "adapter": "adapter"}
    merged = family.merge(tokenizer="union", method="linear", parameters={"weight": {"a": 0, "b": 1}})
    base = family.tensors["base"][EMBEDDING]
    assert same_bits(merged[EMBEDDING][13], base[12] + 2.0**-20)
    torch.testing.assert_close(merged[EMBEDDING][:N], base[:N] + 2.0**-20)


# --- real models ----------------------------------------------------------------------------------


def renumber(folder, order):
    """Gives the tokens of a model in ``folder`` other ids, in its tokenizer, its tables and its config."""
    content = json.loads((folder / "tokenizer.json").read_text())
    tokens = sorted(content["model"]["vocab"], key=content["model"]["vocab"].get)
    ids = {tokens[number]: i for i, number in enumerate(order)}
    content["model"]["vocab"] = ids
    for entry in content["added_tokens"]:
        entry["id"] = ids[entry["content"]]
    write(folder / "tokenizer.json", content)
    config = json.loads((folder / "config.json").read_text())
    write(folder / "config.json", {**config, "eos_token_id": ids["<eos>"], "pad_token_id": ids["<pad>"]})
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, EMBEDDING: tensors[EMBEDDING][list(order)]}, folder / "model.safetensors", {"format": "pt"})


@pytest.fixture
def renumbered(demo_folder, tmp_path):  # noqa: F811
    """The demo's models, with one expert whose tokens have other ids, beside the expert as it was."""
    shutil.copytree(demo_folder, tmp_path / "demo")
    shutil.copytree(tmp_path / "demo" / "models" / "shift", tmp_path / "demo" / "models" / "as_it_was")
    order = torch.randperm(58, generator=torch.Generator().manual_seed(1)).tolist()
    renumber(tmp_path / "demo" / "models" / "shift", order)
    return tmp_path / "demo"


@pytest.mark.parametrize("method", ["obim", "regmean_pp", "featcal"])
def test_calibration_runs_an_expert_with_its_own_ids(renumbered, method):
    folders = {}
    for source in ("shift", "as_it_was"):
        content = text_of(renumbered, tasks=("shift", "upper"), method=method, tokenizer="base", evaluation=None)
        content["experts"]["shift"] = str(renumbered / "models" / source)
        folders[source] = renumbered / f"out-{source}"
        merge(Recipe.parse({**content, "output": {"path": str(folders[source]), "dtype": "float32"}}, renumbered))
    merged, expected = (load(folder) for folder in folders.values())
    for name in expected:
        torch.testing.assert_close(merged[name], expected[name], rtol=2e-3, atol=2e-4)


def test_a_united_model_loads_with_its_tokens(renumbered):
    content = json.loads((renumbered / "models" / "upper" / "tokenizer.json").read_text())
    content["added_tokens"].append({**content["added_tokens"][0], "id": 58, "content": "<|im_end|>"})
    write(renumbered / "models" / "upper" / "tokenizer.json", content)
    expert = AutoModelForCausalLM.from_pretrained(renumbered / "models" / "upper")
    expert.resize_token_embeddings(59)
    expert.save_pretrained(renumbered / "models" / "upper")
    library.merge(recipe_of(renumbered, tasks=("shift", "upper"), method="task_arithmetic", tokenizer="union"))
    tokenizer = AutoTokenizer.from_pretrained(renumbered / "merged")
    model = AutoModelForCausalLM.from_pretrained(renumbered / "merged")
    assert tokenizer.tokenize("up<|im_end|>") == ["u", "p", "<|im_end|>"]
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") == 58
    table = load(renumbered / "models" / "upper")[EMBEDDING]
    assert same_bits(model.get_input_embeddings().weight[58], table[58].to(model.dtype))


def test_a_merge_in_memory_is_judged_by_the_tokens_of_its_output(renumbered):
    recipe = recipe_of(renumbered, "texts", tasks=("shift",), method="linear", calibration=None, tokenizer="shift")
    losses = {row.model: row.tasks["shift"].value for row in evaluate({"merge": recipe}).rows}
    assert losses["merge"] == pytest.approx(losses["shift"], abs=1e-5)
    shutil.copytree(renumbered / "models" / "as_it_was", renumbered / "models" / "shift", dirs_exist_ok=True)
    as_it_was = {row.model: row.tasks["shift"].value for row in evaluate({"merge": recipe}).rows}
    assert losses == pytest.approx(as_it_was, abs=1e-5)
