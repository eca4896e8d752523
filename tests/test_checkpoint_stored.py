"""Folders of safetensors: which files are read, that reads are exact, and how a bad folder is told."""

import contextlib
import json
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from merger.checkpoint.opening import open_checkpoint
from merger.errors import CheckpointError

STATE = {
    "a.weight": torch.arange(12.0).view(4, 3),
    "b": torch.arange(5).bfloat16(),
    "scalar": torch.tensor(2.5, dtype=torch.float64),
    "one": torch.tensor([7]),
    "empty": torch.empty(0, 3),
    "narrow": torch.empty(3, 0),
    "packed": torch.arange(24.0).view(2, 3, 4).half(),
    "flags": torch.tensor([True, False]),
    "bytes": torch.arange(4, dtype=torch.uint8),
}
SHARDS = {"model-1.safetensors": ["a.weight", "b", "empty"], "model-2.safetensors": ["scalar", "one", "packed"]}


@pytest.fixture
def single(tmp_path):
    save_file(STATE, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    return tmp_path


@pytest.fixture
def sharded(tmp_path):
    return write_shards(tmp_path)


def write_shards(folder, **index):
    for file, names in SHARDS.items():
        save_file({name: STATE[name] for name in names}, folder / file)
    weight_map = {name: file for file, names in SHARDS.items() for name in names}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map | index}))
    (folder / "config.json").write_text("{}")
    return folder


def opened(folder, **options):
    return open_checkpoint(".", None, label="math", folder=folder, **options)


def refusal(folder, source="."):
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(source, None, label="math", folder=folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", STATE)
def test_a_tensor_is_read_as_it_was_written(single, name):
    with opened(single) as model:
        result = model.read(name)
        assert (result.dtype, result.shape) == (STATE[name].dtype, STATE[name].shape)
        assert torch.equal(result, STATE[name])


@given(data=st.data(), name=st.sampled_from(sorted(STATE)))
def test_rows_are_rows_of_the_whole(tmp_path_factory, data, name):
    folder = tmp_path_factory.getbasetemp() / "rows"
    folder.mkdir(exist_ok=True)
    save_file(STATE, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    with opened(folder) as model:
        rows, columns = model.tensors[name].matrix
        start = data.draw(st.integers(0, rows))
        stop = data.draw(st.integers(start, rows))
        expected = STATE[name].reshape(rows, columns)[start:stop]
        assert torch.equal(model.read_rows(name, start, stop), expected)


@pytest.mark.parametrize(("name", "rows"), [("a.weight", slice(1, 3)), ("b", slice(0, 1)), ("packed", slice(2, 5))])
def test_rows_can_be_read_into_memory_of_a_wider_dtype(single, name, rows):
    with opened(single) as model:
        expected = STATE[name].reshape(model.tensors[name].matrix)[rows]
        for dtype in (model.dtype(name), torch.float64):
            into = torch.full(expected.shape, 0.5, dtype=dtype)
            model.read_into(into, name, rows.start, rows.stop)
            assert torch.equal(into, expected.to(dtype))


def test_shards_are_read_by_their_index(sharded):
    with opened(sharded) as model:
        assert [file.name for file in model.files] == list(SHARDS)
        assert torch.equal(model.read("packed"), STATE["packed"])


def test_what_an_index_forgets_is_a_tensor_of_the_model_all_the_same(sharded):
    index = sharded / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    index.write_text(json.dumps({"weight_map": {name: file for name, file in weight_map.items() if name != "one"}}))
    assert set(opened(sharded).tensors) == set(weight_map)


def test_links_to_files_elsewhere_are_followed_as_in_a_hub_cache(sharded, tmp_path_factory):
    blobs = tmp_path_factory.mktemp("blobs")
    for file in SHARDS:
        os.rename(sharded / file, blobs / file)
        (sharded / file).symlink_to(blobs / file)
    with opened(sharded) as model:
        assert torch.equal(model.read("b"), STATE["b"])


def test_safetensors_come_before_pickles_and_one_file_before_shards(sharded):
    save_file({"only": torch.ones(1)}, sharded / "model.safetensors")
    (sharded / "pytorch_model.bin").write_bytes(b"never opened")
    assert list(opened(sharded).tensors) == ["only"]


def test_a_path_is_relative_to_the_recipe_or_to_home(single, monkeypatch):
    monkeypatch.setenv("HOME", str(single.parent))
    for folder, source in ((single.parent, single.name), (single.parent, str(single)), (single, f"~/{single.name}")):
        assert open_checkpoint(source, None, label="m", folder=folder).tensors


def test_a_file_that_shrinks_while_it_is_open_is_a_sentence(single):
    with opened(single) as model:
        os.truncate(single / "model.safetensors", model.tensors["packed"].offset + 1)
        with pytest.raises(CheckpointError, match=r"ended at byte .* while it was being read"):
            model.read("packed")


def test_opening_imports_no_heavy_library():
    heavy = "torch", "numpy", "huggingface_hub", "transformers", "safetensors"
    program = f"import sys, merger.checkpoint.opening; print([m for m in {heavy} if m in sys.modules])"
    completed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert completed.stdout.strip() == "[]"


# --- bad folders ---


def removed(file):
    return lambda folder: (folder / file).unlink()


def written(file, content):
    return lambda folder: (folder / file).write_text(content)


def directory(file):
    return lambda folder: ((folder / file).unlink(missing_ok=True), (folder / file).mkdir())


def config(**options):
    return written("config.json", json.dumps(options))


INDEX = "model.safetensors.index.json"
BAD = {
    "no config": (removed("config.json"), "has no config.json; is it a model's folder?"),
    "config that is no JSON": (written("config.json", "{"), "config.json: is not valid JSON"),
    "config that is a list": (written("config.json", "[]"), "config.json: expected a JSON object"),
    "config that is a folder": (directory("config.json"), "config.json: cannot be read: Is a directory"),
    "config that nests for ever": (written("config.json", "[" * 100_000), "is not valid JSON"),
    "config of GPTQ": (config(quantization_config={"quant_method": "gptq"}), "quantization_config gptq"),
    "index without a map": (written(INDEX, "{}"), "has no weight_map"),
    "index with an empty map": (written(INDEX, '{"weight_map": {}}'), "has no weight_map"),
    "shard missing": (removed("model-2.safetensors"), "names 'model-2.safetensors', which is missing"),
    "shard that is a folder": (directory("model-2.safetensors"), "which is missing"),
    "shard truncated": (lambda f: os.truncate(f / "model-1.safetensors", 300), "model-1.safetensors: its header"),
    **{
        f"shard named {file!r}": (lambda f, file=file: write_shards(f, b=file), "which is not a file in its folder")
        for file in ("../../x", "/etc/passwd", "sub/x", "..", ".", "", "a\\b", 3, None, ["x"])
    },
    "tensor in no shard": (lambda f: write_shards(f, c="model-1.safetensors"), "has no tensor c, which the index says"),
    "tensor in another shard": (lambda f: write_shards(f, b="model-2.safetensors"), "2.safetensors: has no tensor b"),
    "tensor with a name for terminals": (
        lambda f: write_shards(f, **{"\x1b": "model-1.safetensors"}),
        "cannot be printed",
    ),
    "no tensors": (lambda f: save_file({}, f / "model.safetensors"), "its weights hold no tensor"),
    "fp8": (
        lambda f: save_file({"w": torch.zeros(2, dtype=torch.float8_e4m3fn)}, f / "model.safetensors"),
        "is quantised (w is F8_E4M3)",
    ),
    "AWQ without a config": (
        lambda f: save_file({"w.qweight": torch.zeros(2, dtype=torch.int32)}, f / "model.safetensors"),
        "is quantised (it has w.qweight)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_bad_folder_is_one_line_that_says_what_is_wrong(sharded, name):
    spoil, text = BAD[name]
    spoil(sharded)
    message = refusal(sharded)
    assert text in message
    assert str(sharded) in message or "is quantised" in message


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "has no model.safetensors or pytorch_model.bin; save the model there with save_pretrained"),
        (["tf_model.h5"], "pytorch_model.bin, only tf_model.h5;"),
        (["flax_model.msgpack", "model.Q4_K_M.gguf"], "only flax_model.msgpack, model.Q4_K_M.gguf;"),
        (["consolidated.00.pth"], "only consolidated.00.pth;"),
    ],
)
def test_a_folder_without_readable_weights_says_what_it_has(tmp_path, files, message):
    (tmp_path / "config.json").write_text("{}")
    for file in files:
        (tmp_path / file).touch()
    assert message in refusal(tmp_path)


def test_a_file_in_place_of_a_folder_is_a_sentence(single):
    assert "is a file; give the folder that it lies in" in refusal(single, "model.safetensors")


def test_a_pipe_is_not_waited_for(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    os.mkfifo(tmp_path / "model.safetensors")
    assert "has no model.safetensors" in refusal(tmp_path)


@given(content=st.binary(max_size=40) | st.text(max_size=40).map(str.encode))
def test_any_index_is_one_line(tmp_path_factory, content):
    folder = tmp_path_factory.getbasetemp() / "index"
    folder.mkdir(exist_ok=True)
    write_shards(folder)
    (folder / INDEX).write_bytes(content)
    refusal(folder)


@given(data=st.data())
def test_a_damaged_index_is_read_or_one_line(tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp() / "damaged"
    folder.mkdir(exist_ok=True)
    write_shards(folder)
    content = bytearray((folder / INDEX).read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(content) - 1))
        content[place : place + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    (folder / INDEX).write_bytes(content)
    with contextlib.suppress(CheckpointError):
        assert opened(folder).tensors
