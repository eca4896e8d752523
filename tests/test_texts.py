"""Calibration data: from files of any form to batches of tokens."""

import json
import random
import sys

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from merger.calibration import Settings, batches
from merger.calibration.samples import (
    Text,
    choose,
    load_samples,
    load_tokenizer,
    pad_samples,
    tokenise,
)
from merger.errors import CheckpointError
from merger.recipe.sections import TextSource

CHAT = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def made(**options):
    """A tokenizer of single characters that begins each text with <s>."""
    alphabet = ["<s>", *map(chr, range(32, 127)), *options.pop("extra", [])]
    core = Tokenizer(models.BPE({token: i for i, token in enumerate(alphabet)}, [], unk_token="?"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    core.decoder = decoders.Fuse()
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", unk_token="?", **options)


@pytest.fixture(scope="module")
def tokenizer():
    return made(chat_template=CHAT)


def written(folder, name, content):
    path = folder / name
    path.write_text(content, encoding="utf-8")
    return path


def lines(*records):
    return "".join(json.dumps(record) + "\n" for record in records)


@pytest.fixture
def texts(tmp_path, tokenizer):
    """Loads a data file with this content, and gives the texts that came of it, sorted."""

    def texts(name, content, **settings):
        written(tmp_path, name, content)
        samples = load_samples(name, tmp_path, tokenizer, Settings(**settings))
        return sorted(tokenizer.decode(tokens) for tokens in samples.tokens)

    return texts


@pytest.fixture
def refusal(texts):
    def refusal(*args, **settings):
        with pytest.raises(CheckpointError) as error:
            texts(*args, **settings)
        return str(error.value)

    return refusal


# --- files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", lines({"text": "one"}, {"text": "two"})),
        ("a.jsonl", '"one"\n\n"two"\n'),
        ("a.ndjson", lines({"text": "one"}, {"text": "two"})),
        ("a.json", json.dumps([{"text": "one"}, {"text": "two"}])),
        ("a.json", json.dumps({"version": 1, "data": [{"text": "one"}, "two"]})),
        ("a.txt", "one\n\n \ntwo\n"),
        ("a.unknown", "one\n\ntwo"),
        ("a.jsonl", "\ufeff" + lines({"text": "one"}, {"text": "two"})),
    ],
)
def test_files_of_any_form_give_the_same_texts(texts, name, content):
    assert texts(name, content) == ["<s>one", "<s>two"]


def test_a_parquet_file_gives_its_rows(texts, tmp_path, tokenizer):
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.table({"text": ["one", "two"]}), tmp_path / "a.parquet")
    assert len(load_samples("a.parquet", tmp_path, tokenizer, Settings()).tokens) == 2


def test_parquet_without_pyarrow_says_what_to_install(refusal, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert refusal("a.parquet", "").endswith("Parquet needs pyarrow: pip install 'merger[data]'")


def test_a_hub_dataset_without_datasets_says_what_to_install(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(CheckpointError, match="a dataset of the Hub needs datasets"):
        load_samples("org/name:train", tmp_path, tokenizer, Settings())


def test_a_hub_dataset_is_read_by_name_config_and_split(tmp_path, tokenizer, monkeypatch):
    calls = []

    class Hub:
        class exceptions:
            DatasetsError = RuntimeError

        @staticmethod
        def load_dataset(*args, **options):
            calls.append((args, options))
            return iter([{"text": "one"}])

    monkeypatch.setitem(sys.modules, "datasets", Hub)
    assert len(load_samples("org/name:small:test", tmp_path, tokenizer, Settings()).tokens) == 1
    assert calls == [(("org/name", "small"), {"split": "test", "streaming": True})]


@pytest.mark.parametrize("name", ["missing.jsonl", "./missing", "no such thing"])
def test_a_missing_file_is_named(tmp_path, tokenizer, name):
    with pytest.raises(CheckpointError, match=r"there is no such file of text"):
        load_samples(name, tmp_path, tokenizer, Settings())


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", lines({"text": "one"}) + "{", "a.jsonl:2: is not valid JSON"),
        ("a.json", "[1", "a.json: is not valid JSON"),
        ("a.json", '{"a": [], "b": []}', "a.json: expected a list of records"),
        ("a.jsonl", "3", "a.jsonl:1: expected an object or a string, found a int"),
        ("a.jsonl", lines({"q": "?", "a": "!"}), "needs a field messages, prompt or text; found a, q"),
        ("a.jsonl", lines({"text": ""}), "a.jsonl: has no text; all its records are empty"),
        ("a.jsonl", "", "a.jsonl: has no text; all its records are empty"),
        ("a.jsonl", lines({"messages": ["hello"]}), "a.jsonl:1: messages need to be objects with role and content"),
        ("a.parquet", "not parquet", "a.parquet: is not a Parquet file"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_file_is_said_with_its_place(refusal, name, content, message):
    assert message in refusal(name, content)


def test_a_file_that_is_not_text_is_refused(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_bytes(b"ab\xff")
    with pytest.raises(CheckpointError, match="is not UTF-8 text"):
        load_samples("a.txt", tmp_path, tokenizer, Settings())


# --- fields ---------------------------------------------------------------------------------------


def test_only_inputs_are_used_unless_targets_are_asked_for(texts):
    records = lines({"prompt": "2+2=", "completion": "4", "text": "2+2=4"}, {"prompt": "3+3=", "answer": "6"})
    assert texts("a.jsonl", records) == ["<s>2+2=", "<s>3+3="]
    assert texts("a.jsonl", records, calib_text="input+target") == ["<s>2+2=4", "<s>3+3=6"]


CONVERSATION = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]


@pytest.mark.parametrize(
    "record", [{"messages": CONVERSATION}, {"prompt": CONVERSATION[:1], "completion": CONVERSATION[1:]}]
)
def test_a_conversation_goes_through_the_chat_template_up_to_its_answer(texts, record):
    assert texts("a.jsonl", lines(record)) == ["[user]hi[assistant]"]
    assert texts("a.jsonl", lines(record), calib_text="input+target") == ["[user]hi[assistant]yo"]


def test_messages_need_a_chat_template(tmp_path):
    written(tmp_path, "a.jsonl", lines({"messages": CONVERSATION}))
    with pytest.raises(CheckpointError, match=r"a.jsonl:1: has messages, but the tokenizer has no chat template"):
        load_samples("a.jsonl", tmp_path, made(), Settings())


# --- the choice -----------------------------------------------------------------------------------

MANY = [Text(f"text {i}") for i in range(50)]


def test_the_choice_depends_on_neither_order_nor_repetition():
    shuffled = random.Random(1).sample(MANY, 50) + MANY[:7]
    assert choose(shuffled, 10, 0) == choose(MANY, 10, 0)


def test_a_smaller_choice_is_part_of_a_larger_one():
    assert choose(MANY, 20, 0)[:10] == choose(MANY, 10, 0)


def test_the_choice_depends_on_the_seed():
    assert set(choose(MANY, 10, 0)) != set(choose(MANY, 10, 1))


def test_the_hash_of_the_data_tells_other_texts_apart(tmp_path, tokenizer):
    def digest(name, *texts, **settings):
        written(tmp_path, name, lines(*({"text": text} for text in texts)))
        return load_samples(name, tmp_path, tokenizer, Settings(**settings)).data

    assert digest("a.jsonl", "x", "y") == digest("b.jsonl", "y", "x", "y")
    assert digest("a.jsonl", "x", "y") != digest("a.jsonl", "x", "z")
    assert digest("a.jsonl", "xy") != digest("a.jsonl", "x", "y")


# --- several sources, and their columns -----------------------------------------------------------


@pytest.fixture
def mixed(tmp_path, tokenizer):
    """Two files of ten texts each: the samples of the sources that are given."""
    for name in "ab":
        written(tmp_path, f"{name}.jsonl", lines(*({"text": f"{name}{i}"} for i in range(10))))

    def mixed(*sources, **settings):
        text_sources = [source if isinstance(source, str) else TextSource(**source) for source in sources]
        return load_samples(text_sources, tmp_path, tokenizer, Settings(**settings))

    return mixed


def counts(samples, tokenizer):
    names = [tokenizer.decode(tokens)[3] for tokens in samples.tokens]
    return {name: names.count(name) for name in "ab"}


@pytest.mark.parametrize(
    ("sources", "samples", "expected"),
    [
        ([{"file": "a.jsonl", "samples": 3}, {"file": "b.jsonl", "samples": 5}], 1, {"a": 3, "b": 5}),
        ([{"file": "a.jsonl", "samples": 3}, "b.jsonl"], 4, {"a": 3, "b": 4}),
        ([{"file": "a.jsonl", "samples": 30}], 1, {"a": 10, "b": 0}),
        (["a.jsonl", "b.jsonl"], 100, {"a": 10, "b": 10}),
        ([{"file": "a.jsonl"}], 4, {"a": 4, "b": 0}),
    ],
)
def test_a_source_gives_as_many_samples_as_its_count(mixed, tokenizer, sources, samples, expected):
    assert counts(mixed(*sources, samples=samples), tokenizer) == expected


def test_sources_without_a_count_share_that_of_the_section(mixed):
    assert len(mixed("a.jsonl", "b.jsonl", samples=7).tokens) == 7


def test_a_source_with_a_count_gives_the_samples_that_the_section_would_choose(mixed):
    assert mixed({"file": "a.jsonl", "samples": 4}) == mixed("a.jsonl", samples=4)


def test_a_text_that_two_sources_hold_goes_through_the_model_once(mixed):
    twice = mixed({"file": "a.jsonl", "samples": 10}, {"file": "a.jsonl", "samples": 10})
    assert twice == mixed("a.jsonl", samples=10)


def test_the_hash_of_the_data_covers_every_source_and_its_count(mixed, tmp_path):
    def digest(a, b):
        return mixed({"file": "a.jsonl", "samples": a}, {"file": "b.jsonl", "samples": b}).data

    hash_before = digest(3, 5)
    assert len({hash_before, digest(4, 5), digest(3, 6), digest(5, 3)}) == 4
    written(tmp_path, "b.jsonl", lines(*({"text": f"b{i}!"} for i in range(10))))
    assert digest(3, 5) != hash_before


@pytest.mark.parametrize(
    ("record", "fields", "settings", "text"),
    [
        ({"question": "1+1=", "answer": "2"}, {"prompt": "question"}, {}, "1+1="),
        ({"question": "1+1=", "answer": "2"}, {"prompt": "question"}, {"calib_text": "input+target"}, "1+1=2"),
        (
            {"instruction": "go", "output": "gone", "solution": "x"},
            {"prompt": "instruction", "target": "solution"},
            {"calib_text": "input+target"},
            "gox",
        ),
        (
            {"text": "task", "code": "x=1"},
            {"prompt": "text", "target": "code"},
            {"calib_text": "input+target"},
            "taskx=1",
        ),
        ({"text": "t", "body": "b"}, {"text": "body"}, {}, "b"),
        ({"prompt": "hidden", "body": "b"}, {"text": "body"}, {}, "b"),
        ({"turns": [{"role": "user", "content": "a"}]}, {"messages": "turns"}, {}, "[user]a[assistant]"),
    ],
)
def test_columns_are_taken_for_what_the_recipe_says(tmp_path, tokenizer, record, fields, settings, text):
    written(tmp_path, "a.jsonl", lines(record))
    source = TextSource(file="a.jsonl", fields=fields)
    (tokens,) = load_samples(source, tmp_path, tokenizer, Settings(**settings)).tokens
    assert tokenizer.decode(tokens).removeprefix("<s>") == text


def test_a_column_that_a_record_lacks_is_named_with_its_place(tmp_path, tokenizer):
    written(tmp_path, "a.jsonl", lines({"question": "q"}, {"query": "q", "answer": "a"}))
    with pytest.raises(CheckpointError) as error:
        load_samples(TextSource(file="a.jsonl", fields={"prompt": "question"}), tmp_path, tokenizer, Settings())
    assert str(error.value) == (
        f"{tmp_path}/a.jsonl:2: has no field question, which `fields` names; found answer, query"
    )


def test_a_source_without_text_is_named_though_others_have_some(mixed, tmp_path):
    written(tmp_path, "c.jsonl", "\n")
    with pytest.raises(CheckpointError, match=r"^c.jsonl: has no text"):
        mixed("a.jsonl", "c.jsonl")


# --- tokens and batches ---------------------------------------------------------------------------


def test_texts_are_cut_to_the_number_of_tokens(tokenizer):
    assert [len(ids) for ids in tokenise([Text("abcdefgh"), Text("ab")], tokenizer, 5)] == [5, 3]


def test_texts_are_cut_to_what_the_model_takes():
    assert [len(ids) for ids in tokenise([Text("abcdefgh")], made(model_max_length=4), 100)] == [4]


def test_a_template_writes_its_own_special_tokens(tokenizer):
    (ids,) = tokenise([Text("ab", templated=True)], tokenizer, 10)
    assert tokenizer.decode(ids) == "ab"


def test_batches_hold_every_sample_once_and_little_padding():
    samples = [tuple(range(1, n + 1)) for n in (3, 40, 41, 100, 7, 100, 64, 3, 12)]
    result = batches(samples, 128)
    rows = [tuple(ids[mask].tolist()) for batch in result for ids, mask in zip(batch.ids, batch.mask, strict=True)]
    assert sorted(rows) == sorted(samples)
    assert all(batch.ids.numel() <= 128 for batch in result)
    assert all((~batch.mask).sum(1).max() <= max(16, batch.mask.shape[1] // 4) for batch in result)


def test_a_sample_longer_than_a_batch_has_one_to_itself():
    assert [batch.ids.shape for batch in batches([(1,) * 300, (1,) * 290], 128)] == [(1, 300), (1, 290)]


def test_padding_is_on_the_right_and_masked():
    batch = pad_samples([(5, 6, 7), (8,)])
    assert batch.ids.tolist() == [[5, 6, 7], [8, 0, 0]]
    assert batch.mask.tolist() == [[True, True, True], [True, False, False]]
    assert torch.equal(batch.counted_tokens(1), torch.tensor([[False, True, True], [False, False, False]]))


# --- tokenizers -----------------------------------------------------------------------------------


def test_a_tokenizer_is_loaded_from_its_folder(tmp_path, tokenizer):
    tokenizer.save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path, "math").get_vocab() == tokenizer.get_vocab()


def test_a_folder_without_a_tokenizer_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"math: .* has no tokenizer"):
        load_tokenizer(tmp_path, "math")


def test_a_broken_tokenizer_is_refused(tmp_path):
    written(tmp_path, "tokenizer_config.json", "{")
    written(tmp_path, "vocab.txt", "a")
    with pytest.raises(CheckpointError, match="math: its tokenizer cannot be loaded"):
        load_tokenizer(tmp_path, "math")
