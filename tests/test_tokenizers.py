"""What is read from tokenizer files, against transformers itself, and what counts as the same tokenizer."""

import json
import subprocess
import sys

import pytest
from tokenizers import Tokenizer as Library
from tokenizers import models
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from vocabularies import WORDS, added_token, bpe_json, save_tokenizer, sentencepiece, tokenizer_json, write

from merger.checkpoint.adapter import Adapted
from merger.checkpoint.checkpoint import Checkpoint
from merger.checkpoint.tokenizers import Tokenizer, splitting_differences, tokenizer_files, tokenizer_folder

NAMED = {"content": "[PAD]", "lstrip": False, "rstrip": False, "normalized": False, "single_word": False}


@pytest.mark.parametrize(
    ("added", "files"),
    [
        pytest.param([], {}, id="words alone"),
        pytest.param([(3, "<x>"), (4, "<y>")], {}, id="added in order"),
        pytest.param([(4, "<y>"), (3, "<x>")], {}, id="added out of order"),
        pytest.param([(7, "<x>")], {}, id="a hole before an added token"),
        pytest.param([(1, "w1")], {}, id="an added token that is a word"),
        pytest.param([], {"tokenizer_config.json": {"eos_token": "</s>", "pad_token": "[PAD]"}}, id="special tokens"),
        pytest.param([(3, "<x>")], {"tokenizer_config.json": {"eos_token": "<x>"}}, id="a special token that is added"),
        pytest.param(
            [],
            {"tokenizer_config.json": {"eos_token": "</s>", "image_token": "<i>", "extra_special_tokens": ["<a>"]}},
            id="extra special tokens",
        ),
        pytest.param([], {"special_tokens_map.json": {"eos_token": "</s>", "pad_token": NAMED}}, id="a map"),
        pytest.param(
            [],
            {"tokenizer_config.json": {"added_tokens_decoder": {}}, "special_tokens_map.json": {"eos_token": "</s>"}},
            id="a map that is no longer read",
        ),
        pytest.param(
            [], {"tokenizer_config.json": {"added_tokens_decoder": {"3": {"content": "<x>", "special": True}}}},
            id="tokens of the config",
        ),
        pytest.param([], {"added_tokens.json": {"<q>": 3, "<r>": 5}}, id="added_tokens.json"),
        pytest.param(
            [],
            {
                "tokenizer_config.json": {"added_tokens_decoder": {"3": {"content": "<x>"}}},
                "added_tokens.json": {"<q>": 3},
            },
            id="added_tokens.json that is no longer read",
        ),
    ],
)  # fmt: skip
def test_tokens_are_those_that_transformers_has(tmp_path, added, files):
    save_tokenizer(tmp_path, WORDS[:3])
    write(
        tmp_path / "tokenizer.json",
        tokenizer_json(WORDS[:3], added_tokens=[added_token(*arguments) for arguments in added]),
    )
    for name, content in files.items():
        write(
            tmp_path / name, {"tokenizer_class": "PreTrainedTokenizerFast", **content} if "config" in name else content
        )
    expected = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer = Tokenizer(tmp_path)
    assert tokenizer.tokens == {i: token for token, i in expected.get_vocab().items()}
    assert tokenizer.special_id("eos_token") == expected.eos_token_id
    assert tokenizer.special_id("pad_token") == expected.pad_token_id


def test_what_transformers_saves_is_read_as_it_was(tmp_path):
    core = Library(models.Unigram([("<unk>", 0.0), ("a", -1.0), ("b", -2.0)], 0))
    saved = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", eos_token="</s>")
    saved.add_tokens(["<tool>"])
    saved.chat_template = "{{ messages }}"
    saved.save_pretrained(tmp_path)
    tokenizer = Tokenizer(tmp_path)
    assert tokenizer.tokens == {0: "<unk>", 1: "a", 2: "b", 3: "</s>", 4: "<tool>"}
    assert tokenizer.special_tokens == {"eos_token": "</s>", "unk_token": "<unk>"}
    assert tokenizer.chat_templates == {"default": "{{ messages }}"}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("vocab.json", {"a": 0, "b": 1, "c": 2}),
        ("vocab.txt", "a\nb\nc\n"),
        ("vocab.txt", "a\r\nb\r\nc"),
        ("tokenizer.model", sentencepiece(["a", "b", "c"])),
        ("spiece.model", sentencepiece(["a", "b", "c"])),
        ("tokenizer.json", {"model": {"vocab": [["a", 0.0], ["b", -1.5], ["c", -2]]}}),
    ],
)
def test_each_kind_of_vocabulary_is_read(tmp_path, name, content):
    write(tmp_path / name, content)
    write(tmp_path / "added_tokens.json", {"<tool>": 3})
    assert Tokenizer(tmp_path).tokens == {0: "a", 1: "b", 2: "c", 3: "<tool>"}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", "{"),
        ("tokenizer.json", "[" * 100_000),
        ("tokenizer.json", []),
        ("tokenizer.json", {"model": "BPE"}),
        ("tokenizer.json", {"model": {"vocab": {"a": [0]}}}),
        ("tokenizer.json", {"model": {"vocab": {"a": -1}}}),
        ("vocab.json", {"a": {"b": 1}}),
        ("tokenizer.model", b"one" * 99),
        ("tokenizer.model", sentencepiece(["a", "b"])[:-9]),
        ("sentencepiece.bpe.model", sentencepiece(["a", "b"])),
        ("tekken.json", {"vocab": []}),
        ("qwen.tiktoken", b"IQ== 0\n"),
    ],
)
def test_a_vocabulary_that_cannot_be_read_is_known_as_such(tmp_path, name, content):
    write(tmp_path / name, content)
    tokenizer = Tokenizer(tmp_path)
    assert (tokenizer.exists, tokenizer.is_readable, dict(tokenizer.tokens)) == (True, False, {})


def test_a_folder_may_have_no_tokenizer(tmp_path):
    write(tmp_path / "tokenizer_config.json", {"eos_token": "</s>"})
    write(tmp_path / "chat_template.jinja", "{{ messages }}")
    assert not Tokenizer(tmp_path).exists


def test_the_files_are_those_that_transformers_reads_but_no_code(tmp_path):
    names = [
        "additional_chat_templates/tool_use.jinja",
        "chat_template.jinja",
        "tekken.json",
        "tokenizer.json",
        "vocab.txt",
    ]
    for name in (*names, "tokenizer_code.py", "model.safetensors", "additional_chat_templates/x.py"):
        write(tmp_path / name, "{}")
    assert list(tokenizer_files(tmp_path)) == names


# --- what is the same -----------------------------------------------------------------------------


def compared(tmp_path, contents, changed_contents):
    """The parts in which two tokenizers, given as their files, split text differently."""
    for folder, files in (("one", contents), ("two", changed_contents)):
        for name, content in files.items():
            write(tmp_path / folder / name, content)
    return splitting_differences(Tokenizer(tmp_path / "one"), Tokenizer(tmp_path / "two"))


MERGES_TXT = "#version: 0.2\na b\nab c\n"
VOCABULARY = bpe_json()["model"]["vocab"]


def test_merges_are_the_same_as_pairs_and_as_texts(tmp_path):
    assert compared(tmp_path, {"tokenizer.json": bpe_json()}, {"tokenizer.json": bpe_json(as_text=True)}) == []


def test_slow_files_are_the_same_as_a_tokenizer_json_of_them(tmp_path):
    slow = {"vocab.json": VOCABULARY, "merges.txt": MERGES_TXT}
    assert compared(tmp_path, {"tokenizer.json": bpe_json()}, slow) == []
    assert Tokenizer(tmp_path / "one").tokens == Tokenizer(tmp_path / "two").tokens


def test_merges_in_another_order_split_differently(tmp_path):
    files = {"vocab.json": VOCABULARY, "merges.txt": MERGES_TXT}
    assert compared(tmp_path, files, {"vocab.json": VOCABULARY, "merges.txt": "ab c\na b\n"}) == ["merges"]


def test_scores_are_compared(tmp_path):
    files, changed_files = (
        {"tokenizer.json": {"model": {"vocab": [["a", 0.0], ["b", score]]}}} for score in (-1.0, -2.0)
    )
    assert compared(tmp_path, files, changed_files) == ["scores"]


def test_a_normalizer_that_is_only_written_differently_is_the_same(tmp_path):
    lowercase = {"type": "Lowercase"}
    sequence = {"type": "Sequence", "normalizers": [lowercase]}
    assert compared(
        tmp_path, {"tokenizer.json": bpe_json(normalizer=lowercase)}, {"tokenizer.json": bpe_json(normalizer=sequence)}
    ) == []  # fmt: skip


def test_another_normalizer_splits_differently(tmp_path):
    letters = [chr(i) for i in range(32, 127)]
    files, changed_files = (
        {"tokenizer.json": bpe_json(letters, (), normalizer=normalizer)} for normalizer in (None, {"type": "Lowercase"})
    )
    assert compared(tmp_path, files, changed_files) == ["normalizer"]


def test_llamas_tokenizer_is_the_same_as_transformers_4_and_5_write_it(tmp_path):
    letters = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", *map(chr, range(33, 127)), "▁h"]
    spaces = [{"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]
    model = {"type": "BPE", "unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True, "merges": ["▁ h"]}
    four = {
        **tokenizer_json(added_tokens=[added_token(i, letters[i]) for i in range(3)]),
        "normalizer": {"type": "Sequence", "normalizers": spaces},
        "pre_tokenizer": None,
        "model": {**model, "vocab": {letter: i for i, letter in enumerate(letters)}},
    }
    write(tmp_path / "one" / "tokenizer.json", four)
    write(tmp_path / "one" / "tokenizer_config.json", {"tokenizer_class": "LlamaTokenizer", "eos_token": "</s>"})
    AutoTokenizer.from_pretrained(tmp_path / "one").save_pretrained(tmp_path / "two")
    five = json.loads((tmp_path / "two" / "tokenizer.json").read_text())
    assert (five["normalizer"], five["model"]["merges"]) == (None, [["▁", "h"]])
    assert compared(tmp_path, {}, {}) == []
    assert Tokenizer(tmp_path / "one").tokens == Tokenizer(tmp_path / "two").tokens


def test_chat_templates_are_the_same_in_whatever_file_they_stand(tmp_path):
    tool = [{"name": "default", "template": "a"}, {"name": "tool_use", "template": "b"}]
    write(tmp_path / "one" / "tokenizer_config.json", {"chat_template": tool})
    write(tmp_path / "two" / "chat_template.jinja", "a")
    write(tmp_path / "two" / "additional_chat_templates" / "tool_use.jinja", "b")
    write(tmp_path / "three" / "chat_template.json", {"chat_template": "a"})
    templates, same_templates, other_templates = (
        Tokenizer(tmp_path / name).chat_templates for name in ("one", "two", "three")
    )
    assert templates == same_templates == {"default": "a", "tool_use": "b"}
    assert other_templates == {"default": "a"}


def test_equal_files_have_equal_digests(tmp_path):
    for name, words in (("one", WORDS), ("two", WORDS), ("three", WORDS[::-1])):
        save_tokenizer(tmp_path / name, words)
    digest, same_digest, other_digest = (Tokenizer(tmp_path / name).digest for name in ("one", "two", "three"))
    assert digest == same_digest != other_digest


# --- adapters, and what is imported ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "expected"),
    [("tokenizer.json", "adapter"), ("tokenizer_config.json", "model"), ("chat_template.jinja", "model")],
)
def test_an_adapter_that_came_with_a_tokenizer_has_its_own(tmp_path, file, expected):
    save_tokenizer(tmp_path / "model")
    write(tmp_path / "adapter" / file, tokenizer_json())
    lora = {"peft_type": "LORA", "r": 1, "lora_alpha": 1}
    model = Adapted(
        Checkpoint("math", tmp_path / "model", {}, {}), Checkpoint("its adapter", tmp_path / "adapter", {}, lora)
    )
    assert tokenizer_folder(model) == tmp_path / expected


def test_tokenizers_are_read_without_transformers(tmp_path):
    save_tokenizer(tmp_path)
    code = (
        "import sys; from pathlib import Path; from merger.checkpoint.tokenizers import Tokenizer; "
        f"print(len(Tokenizer(Path({str(tmp_path)!r})).tokens), "
        "{'transformers', 'tokenizers', 'torch'} & set(sys.modules))"
    )
    completed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert completed.stdout == "12 set()\n"
