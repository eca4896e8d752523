"""pytorch_model.bin: read like torch reads it, without torch, and never obeyed."""

import contextlib
import os
import pickle
import pickletools
import subprocess
import sys
import zipfile

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from merger.checkpoint.checkpoint import Checkpoint
from merger.checkpoint.formats.pickle import FORMAT
from merger.checkpoint.opening import open_checkpoint
from merger.errors import CheckpointError

SHARED = torch.arange(24.0)
STATE = {
    "bfloat16": torch.randn(3, 5).bfloat16(),
    "float64": torch.randn(2, 3, 4, dtype=torch.float64),
    "int64": torch.arange(7),
    "bool": torch.tensor([True, False]),
    "complex": torch.tensor([1 + 2j]),
    "scalar": torch.tensor(3.5, dtype=torch.float16),
    "empty": torch.empty(0, 4),
    "narrow": torch.empty(4, 0),
    "tied": SHARED.view(4, 6),
    "tied again": SHARED.view(4, 6),
    "part": SHARED.view(4, 6)[1:3],
    "transposed": SHARED.view(4, 6).T,
    "every second": SHARED[::2],
    "permuted": SHARED.view(2, 3, 4).permute(2, 0, 1),
    "columns": SHARED.view(4, 6)[:, 1:3],
    "parameter": torch.nn.Parameter(torch.ones(2, 2)),
}


def saved(path, state, legacy=False, **options):
    torch.save(state, path, _use_new_zipfile_serialization=not legacy, **options)
    return path


def checkpoint(path):
    return Checkpoint("m", path.parent, FORMAT.header(path), {})


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("protocol", [2, 4])
def test_every_tensor_is_what_torch_loads(tmp_path, legacy, protocol):
    path = saved(tmp_path / "m.bin", STATE, legacy, pickle_protocol=protocol)
    loaded = torch.load(path, weights_only=protocol == 2)  # torch knows no other
    with checkpoint(path) as model:
        assert list(model.tensors) == list(loaded)
        for name, expected in loaded.items():
            result = model.read(name)
            assert (result.dtype, result.shape) == (expected.dtype, expected.shape)
            assert torch.equal(result, expected), name


@pytest.mark.parametrize("name", ["bfloat16", "float64", "part", "transposed", "permuted", "columns"])
@given(data=st.data())
def test_rows_are_rows_of_the_whole(tmp_path_factory, name, data):
    folder = tmp_path_factory.getbasetemp() / "rows"
    folder.mkdir(exist_ok=True)
    with checkpoint(saved(folder / "m.bin", STATE)) as model:
        matrix = STATE[name].reshape(model.tensors[name].matrix)
        start = data.draw(st.integers(0, len(matrix)))
        stop = data.draw(st.integers(start, len(matrix)))
        assert torch.equal(model.read_rows(name, start, stop), matrix[start:stop])


def test_a_module_saved_with_its_metadata_is_read(tmp_path):
    layer = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.LayerNorm(2))
    with checkpoint(saved(tmp_path / "m.bin", layer.state_dict())) as model:
        assert torch.equal(model.read("0.weight"), layer[0].weight)


def test_shards_are_read_by_their_index(tmp_path):
    saved(tmp_path / "x-1.bin", {"a": torch.ones(2)})
    saved(tmp_path / "x-2.bin", {"b": torch.zeros(2)}, legacy=True)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin.index.json").write_text('{"weight_map": {"a": "x-1.bin", "b": "x-2.bin"}}')
    with open_checkpoint(".", None, label="m", folder=tmp_path) as model:
        assert torch.equal(model.read("a"), torch.ones(2))
        assert [file.name for file in model.files] == ["x-1.bin", "x-2.bin"]


def test_reading_needs_neither_torch_nor_memory_for_the_file(tmp_path):
    path = saved(tmp_path / "m.bin", {f"layer{i}": torch.zeros(1 << 20) for i in range(16)})  # 64 MB
    program = (
        "import resource, sys; from pathlib import Path; from merger.checkpoint.formats.pickle import FORMAT\n"
        "from merger.checkpoint.checkpoint import Checkpoint\n"
        f"header = FORMAT.header(Path({str(path)!r}))\n"
        "model = Checkpoint('m', Path(), header, {}); assert 'torch' not in sys.modules\n"
        "model.read_rows('layer0', 0, 1); before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "for name in model.tensors: model.read(name)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    completed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert int(completed.stdout) < 20_000  # KB


# --- what is refused ---


class Calls:
    """Pickles as a call of ``function``."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


HOSTILE = {
    "os.system": lambda marker: {"w": Calls(os.system, f"touch {marker}")},
    "eval": lambda marker: {"w": Calls(eval, f"open({str(marker)!r}, 'w')")},
    "in a name": lambda marker: {Calls(os.system, f"touch {marker}"): torch.ones(1)},
    "behind a tensor": lambda marker: {"a": torch.ones(1), "w": [Calls(os.mkdir, str(marker))]},
    "getattr": lambda marker: {"w": Calls(getattr, "w", "upper")},
}


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_pickle_is_refused_and_not_obeyed(tmp_path, name, legacy):
    marker = tmp_path / "executed"
    path = saved(tmp_path / "m.bin", HOSTILE[name](marker), legacy)
    with pytest.raises(CheckpointError, match=r"it asks for \S+, which is no part of a plain tensor"):
        FORMAT.header(path)
    assert not marker.exists()


def archive(path, data, members=(), compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as file:
        file.writestr("x/data.pkl", data)
        for name, content in members:
            file.writestr(f"x/{name}", content)
    return path


STORAGE = "(S'storage'\nctorch\nFloatStorage\nS'0'\nS'cpu'\nI{count}\ntQ"


def tensor_pickle(start=0, shape="I2\n", strides="I1\n", count=2, storage=STORAGE):
    """A state dict of one tensor, in the pickle language."""
    view = f"(({storage.format(count=count)}".replace("((", "(") + f"I{start}\n({shape}t({strides}tI00\nNt"
    return f"(dS'w'\nctorch._utils\n_rebuild_tensor_v2\n{view}Rs.".encode()


BROKEN = {
    "empty": (lambda p: p.write_bytes(b""), "EOF|no bytes|damaged"),
    "text": (lambda p: p.write_text("<html>not found</html>"), "damaged"),
    "cut": (lambda p: p.write_bytes(saved(p, STATE).read_bytes()[:-300]), "damaged"),
    "legacy, cut": (lambda p: p.write_bytes(saved(p, STATE, True).read_bytes()[:-3]), "it is truncated"),
    "no data.pkl": (lambda p: zipfile.ZipFile(p, "w").close(), "damaged"),
    "compressed": (lambda p: archive(p, b"N." * 99, compression=zipfile.ZIP_DEFLATED), "members are compressed"),
    "big-endian": (lambda p: archive(p, b"N.", [("byteorder", "big")]), "big-endian"),
    "a list": (lambda p: saved(p, [torch.ones(1)]), "no state dict, but an object of type list"),
    "nested": (lambda p: saved(p, {"model": {"w": torch.ones(1)}}), "'model' is no tensor, but .* type dict"),
    "a number": (lambda p: saved(p, {"step": 3}), "'step' is no tensor, but an object of type int"),
    "a module": (lambda p: saved(p, torch.nn.Linear(1, 1)), "torch.nn.modules.linear.Linear"),
    "quantised": (
        lambda p: saved(p, {"w": torch.zeros(2, dtype=torch.float8_e4m3fn)}),
        "_rebuild_tensor_v3|float8",
    ),
    "a name to fool a terminal": (lambda p: saved(p, {"a\x1b[2J": torch.ones(1)}), "cannot be printed"),
    "storage too short": (lambda p: archive(p, tensor_pickle(), [("data/0", b"1234")]), "should have 8 bytes"),
    "storage missing": (lambda p: archive(p, tensor_pickle()), "data/0"),
    "beyond the storage": (lambda p: archive(p, tensor_pickle(start=1), [("data/0", bytes(8))]), "reaches beyond"),
    "a number repeated": (
        lambda p: archive(p, tensor_pickle(shape="I9\n", strides="I0\n"), [("data/0", bytes(8))]),
        "reaches beyond",
    ),
    "negative stride": (lambda p: archive(p, tensor_pickle(strides="I-1\n"), [("data/0", bytes(8))]), "whole number"),
    "memo of 64 GB": (lambda p: archive(p, b"Nr\xff\xff\xff\x7f."), "its memo has an index"),
    "string of 4 GB": (lambda p: archive(p, b"X\xff\xff\xff\xff."), "damaged"),
    "state on a name": (lambda p: archive(p, b"ccollections\nOrderedDict\nN}S'x'\nI1\ns\x86b."), "damaged"),
}


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_one_line(tmp_path, name):
    make, message = BROKEN[name]
    path = tmp_path / "m.bin"
    make(path)
    with pytest.raises(CheckpointError, match=message) as caught:
        FORMAT.header(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_hand_written_pickle_is_good_but_for_what_each_case_breaks(tmp_path):
    path = archive(tmp_path / "m.bin", tensor_pickle(), [("data/0", torch.tensor([1.0, 2.0]).numpy().tobytes())])
    assert torch.equal(checkpoint(path).read("w"), torch.tensor([1.0, 2.0]))


@given(data=st.data(), legacy=st.booleans())
def test_damage_gives_tensors_or_one_line(tmp_path_factory, data, legacy):
    """Any bytes of a good file changed, or some lost."""
    folder = tmp_path_factory.getbasetemp() / "fuzz"
    folder.mkdir(exist_ok=True)
    path = saved(folder / "m.bin", {"a.weight": torch.ones(2, 3), "b": torch.zeros(4).half()}, legacy)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    del content[data.draw(st.integers(1, 2 * len(content))) :]
    path.write_bytes(content)
    with contextlib.suppress(CheckpointError), checkpoint(path) as model:
        for name in model.tensors:
            model.read(name)


@given(data=st.binary(max_size=40))
def test_any_pickle_is_read_or_refused(tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp() / "pickles"
    folder.mkdir(exist_ok=True)
    with pytest.raises(CheckpointError):
        FORMAT.header(archive(folder / "m.bin", data + b"."))


def test_a_stand_in_cannot_be_changed_for_the_next_file(tmp_path):
    """A pickle may set attributes on what it is given; that must not outlive its own reading."""
    spoiled = b"ctorch._utils\n_rebuild_tensor_v2\nN}S'__defaults__'\nN\x85s\x86b."
    assert any(opcode.name == "BUILD" for opcode, _, _ in pickletools.genops(spoiled))
    with pytest.raises(CheckpointError, match="no state dict"):
        FORMAT.header(archive(tmp_path / "bad.bin", spoiled))
    assert pickle.loads(pickle.dumps(1)) == 1
    assert FORMAT.header(saved(tmp_path / "good.bin", STATE))
