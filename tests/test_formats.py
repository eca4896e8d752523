"""The formats of checkpoints: one interface, and a further format is one file among them."""

import json

import pytest
import torch
from checkpoints import load, same_bits, trio
from packages import linked_package, run_package
from safetensors.torch import load_file

from merger.checkpoint.formats import FORMATS, format_of

BIG_ENDIAN = '''
"""Numbers in the byte order of networks, behind a line of JSON."""
import json
import numpy as np
import torch
from merger.checkpoint.formats.interface import Format, Scan, count_not_finite
from merger.checkpoint.tensor_info import Info


class BigEndian(Format):
    order, suffix, model, adapter = 2, ".be", "model.be", "adapter_model.be"

    def parse(self, file, size, path, *, placed=True):
        shapes = json.loads(file.readline())
        position, tensors = file.tell(), {}
        for name, shape in shapes.items():
            tensors[name] = Info("F32", tuple(shape), path, position)
            position += tensors[name].nbytes
        return tensors

    def read_into(self, rows, info, start, stop, fill):
        width = 4 * info.matrix[1]
        content = bytearray((stop - start) * width)
        fill(info.offset + start * width, memoryview(content))
        rows.copy_(torch.from_numpy(np.frombuffer(content, ">f4").astype("f4")).view(rows.shape))

    def scan(self, path, header, tell):
        content = path.read_bytes()
        values = {
            name: torch.from_numpy(np.frombuffer(content, ">f4", info.elements, info.offset).astype("f4"))
            for name, info in header.items()
        }
        return Scan(None, {name: count for name, each in values.items() if (count := count_not_finite(each))})


FORMAT = BigEndian()
'''


def big_endian(folder):
    """Stores a model in the other format."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    with (folder / "model.be").open("wb") as file:
        file.write(json.dumps({name: list(tensor.shape) for name, tensor in tensors.items()}).encode() + b"\n")
        for tensor in tensors.values():
            file.write(tensor.numpy().astype(">f4").tobytes())


@pytest.fixture
def site(tmp_path):
    """A package with a further format; a recipe and its models lie beside it."""
    (linked_package(tmp_path / "site", "checkpoint/formats") / "big_endian.py").write_text(BIG_ENDIAN)
    trio(tmp_path)
    text = "base: base\nexperts: {code: code, math: math}\nmethod: linear\noutput: {path: %s}\n"
    for name in ("usual", "other"):
        (tmp_path / f"{name}.yaml").write_text(text % name)
    return tmp_path / "site"


def test_a_further_format_is_one_file(site, tmp_path):
    assert run_package(site, "run", "usual.yaml", cwd=tmp_path).returncode == 0
    big_endian(tmp_path / "code")
    ran = run_package(site, "run", "other.yaml", cwd=tmp_path)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert same_bits(load(tmp_path / "other"), load(tmp_path / "usual"))


def test_a_model_of_a_further_format_is_verified(site, tmp_path):
    big_endian(tmp_path / "code")
    intact = run_package(site, "verify", "code", cwd=tmp_path)
    content = (tmp_path / "code" / "model.be").read_bytes()
    (tmp_path / "code" / "model.be").write_bytes(
        content[:-4] + torch.tensor(float("nan")).numpy().astype(">f4").tobytes()
    )
    spoilt = run_package(site, "verify", "code", cwd=tmp_path)
    assert intact.returncode == 0, intact.stderr
    assert spoilt.returncode == 5
    assert spoilt.stderr.endswith("holds 1 value of NaN or infinity\n")


def test_the_preferred_format_is_the_one_that_transformers_prefers():
    assert [format_.model for format_ in FORMATS] == ["model.safetensors", "pytorch_model.bin"]
    assert format_of("model-00001-of-00002.safetensors") is FORMATS[0]
    assert format_of("pytorch_model.bin") is FORMATS[1]
    assert format_of("model.gguf") is None


def test_an_index_that_names_files_of_no_format_is_refused(merger, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trio(tmp_path)
    (tmp_path / "recipe.yaml").write_text("base: base\nexperts: {code: code}\nmethod: linear\noutput: {path: out}\n")
    (tmp_path / "code" / "model.safetensors").rename(tmp_path / "code" / "weights.gguf")
    index = {"weight_map": dict.fromkeys(load(tmp_path / "base"), "weights.gguf")}
    (tmp_path / "code" / "model.safetensors.index.json").write_text(json.dumps(index))
    ran = merger("plan", "recipe.yaml")
    assert ran.code == 3
    assert "code holds weights.gguf, weights in GGUF, which is made for inference and is not merged" in ran.err
