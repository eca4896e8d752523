"""A checkpoint being written: its layout, its bytes, and that it is whole or absent."""

import hashlib
import json
import os
import subprocess
import sys
from concurrent.futures import wait

import pytest
import torch
from checkpoints import load, same_bits
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from merger.checkpoint import placement, writer
from merger.checkpoint.formats.safetensors import FORMAT
from merger.checkpoint.layout import layout
from merger.checkpoint.placement import check_output
from merger.checkpoint.tensor_info import ITEM_SIZE, Info
from merger.checkpoint.writer import Writer
from merger.errors import RecipeError, ResourceError

TENSORS = {
    "a": torch.arange(6, dtype=torch.float32).view(2, 3),
    "b": torch.arange(5, dtype=torch.int64),
    "c": torch.ones(3, dtype=torch.bfloat16),
    "d": torch.tensor(True),
    "e": torch.zeros(0, 4),
}
DTYPES = {torch.float32: "F32", torch.int64: "I64", torch.bfloat16: "BF16", torch.bool: "BOOL"}


def infos(tensors):
    return {name: Info(DTYPES[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items()}


def begun(path, tensors=TENSORS, shard_size=10**9):
    described = infos(tensors)
    writer = Writer(path, layout(list(described.items()), shard_size), described, {"recipe": "1"})
    try:
        writer.open()
    except BaseException:
        writer.abandon()
        raise
    return writer


def fill(writer, tensors=TENSORS):
    for name, tensor in tensors.items():
        writer.write(name, 0, tensor.contiguous().flatten().view(torch.uint8).numpy().data)
        writer.finish_tensor(name)


def write(path, tensors=TENSORS, shard_size=10**9, *, force=False):
    writer = begun(path, tensors, shard_size)
    try:
        fill(writer, tensors)
        digests = writer.digests()
        writer.finish(force=force)
    except BaseException:
        writer.abandon()
        raise
    return digests


# --- layout ---------------------------------------------------------------------------------------


def test_one_shard_is_one_file_without_an_index(tmp_path):
    write(tmp_path / "out")
    assert os.listdir(tmp_path / "out") == ["model.safetensors"]


def test_several_shards_are_numbered_and_indexed_as_transformers_does(tmp_path):
    write(tmp_path / "out", shard_size=40)

    assert sorted(os.listdir(tmp_path / "out")) == [
        "model-00001-of-00003.safetensors",
        "model-00002-of-00003.safetensors",
        "model-00003-of-00003.safetensors",
        "model.safetensors.index.json",
    ]
    assert json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text()) == {
        "metadata": {"total_size": 24 + 40 + 6 + 1},
        "weight_map": {
            "a": "model-00001-of-00003.safetensors",
            "b": "model-00002-of-00003.safetensors",
            "c": "model-00003-of-00003.safetensors",
            "d": "model-00003-of-00003.safetensors",
            "e": "model-00003-of-00003.safetensors",
        },
    }


tensors_of_some_sizes = st.lists(
    st.tuples(st.sampled_from(sorted(ITEM_SIZE)), st.lists(st.integers(0, 5), max_size=3)), min_size=1, max_size=12
).map(lambda found: [(f"t{i}", Info(dtype, tuple(shape))) for i, (dtype, shape) in enumerate(found)])


@given(tensors_of_some_sizes, st.integers(1, 400))
def test_a_shard_holds_at_most_its_size_or_one_larger_tensor_in_order(tensors, size):
    shards = layout(tensors, size)

    names = [name for shard in shards for name in sorted(shard.offsets, key=lambda name: int(name[1:]))]
    assert names == [name for name, _ in tensors]
    for shard in shards:
        sizes = [info.nbytes for name, info in tensors if name in shard.offsets]
        assert sum(sizes) <= size or len([n for n in sizes if n]) == 1


@given(tensors_of_some_sizes, st.integers(1, 400))
def test_every_tensor_lies_at_a_multiple_of_its_width_without_gaps(tensors, size):
    by_name = dict(tensors)
    for shard in layout(tensors, size):
        position = len(shard.header)
        assert position % 8 == 0
        for name, offset in shard.offsets.items():
            assert offset == position
            assert offset % ITEM_SIZE[by_name[name].dtype] == 0
            position += by_name[name].nbytes
        assert position == shard.size


@given(tensors_of_some_sizes)
def test_a_header_reads_back_as_what_was_laid_out(tmp_path_factory, tensors):
    path = tmp_path_factory.mktemp("shard") / "x.safetensors"
    (shard,) = layout(tensors, 10**9)
    path.write_bytes(shard.header + bytes(shard.size - len(shard.header)))

    header = FORMAT.header(path)

    assert {name: (info.dtype, info.shape) for name, info in header.items()} == {
        name: (info.dtype, info.shape) for name, info in tensors
    }
    assert {name: info.offset for name, info in header.items()} == dict(shard.offsets)


def test_names_in_any_script_survive(tmp_path):
    tensors = {"слой.0.вес": torch.ones(2), "層.重み": torch.zeros(2)}
    write(tmp_path / "out", tensors)
    assert same_bits(load(tmp_path / "out"), tensors)


# --- bytes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shard_size", [1, 40, 10**9])
def test_what_is_written_is_read_by_safetensors_bit_for_bit(tmp_path, shard_size):
    write(tmp_path / "out", shard_size=shard_size)
    assert same_bits(load(tmp_path / "out"), TENSORS)


def test_tensors_may_come_in_any_order_and_in_pieces(tmp_path):
    writer = begun(tmp_path / "out")
    for name, tensor in reversed(TENSORS.items()):
        data = tensor.contiguous().flatten().view(torch.uint8).numpy().data
        middle = len(data) // 2
        writer.write(name, middle, data[middle:])
        writer.write(name, 0, data[:middle])
        writer.finish_tensor(name)
    writer.digests()
    writer.finish(force=False)
    assert same_bits(load_file(tmp_path / "out" / "model.safetensors"), TENSORS)


def test_a_digest_is_that_of_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "CHUNK", 7)
    digests = write(tmp_path / "out", shard_size=40)
    assert digests == {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (tmp_path / "out").glob("*.safetensors")
    }


# --- whole or absent ------------------------------------------------------------------------------


def test_until_it_is_finished_there_is_only_a_partial_folder_of_full_size(tmp_path):
    writer = begun(tmp_path / "out")

    assert os.listdir(tmp_path) == ["out.partial"]
    (shard,) = layout(list(infos(TENSORS).items()), 10**9)
    assert (tmp_path / "out.partial" / "model" / "model.safetensors").stat().st_size == shard.size

    writer.abandon()
    assert os.listdir(tmp_path) == []


def test_folders_made_on_the_way_go_with_it(tmp_path):
    (tmp_path / "kept").mkdir()
    begun(tmp_path / "kept" / "new" / "out").abandon()
    assert os.listdir(tmp_path) == ["kept"]
    assert os.listdir(tmp_path / "kept") == []


def test_a_folder_that_someone_else_uses_meanwhile_stays(tmp_path):
    writer = begun(tmp_path / "new" / "out")
    (tmp_path / "new" / "note").touch()
    writer.abandon()
    assert os.listdir(tmp_path / "new") == ["note"]


def test_what_a_dead_run_left_is_removed(tmp_path):
    (tmp_path / "out.partial" / "model" / "folder").mkdir(parents=True)
    (tmp_path / "out.partial" / "journal").touch()
    (tmp_path / "out.partial" / "model" / "model-00001-of-00009.safetensors").touch()
    (tmp_path / "out.partial" / "replaced").mkdir()
    write(tmp_path / "out")
    assert os.listdir(tmp_path) == ["out"]
    assert os.listdir(tmp_path / "out") == ["model.safetensors"]


def test_a_partial_folder_of_another_run_is_refused_and_left_alone(tmp_path):
    writer = begun(tmp_path / "out")
    with pytest.raises(RecipeError, match=r"out\.partial: another run is writing it; wait for it or stop it"):
        begun(tmp_path / "out")
    fill(writer)
    writer.digests()
    writer.finish(force=False)
    assert same_bits(load(tmp_path / "out"), TENSORS)


@pytest.mark.parametrize("kind", ["folder", "file", "link"])
def test_what_merely_has_the_partial_folders_name_is_left_alone(tmp_path, kind):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "work").write_text("mine")
    if kind == "link":
        (tmp_path / "out.partial").symlink_to("precious")
    else:
        (tmp_path / "precious" / ("" if kind == "folder" else "work")).rename(tmp_path / "out.partial")
    paths = sorted(tmp_path.rglob("*"))

    with pytest.raises(RecipeError, match="no run of merger left it; move it away"):
        begun(tmp_path / "out")

    assert sorted(tmp_path.rglob("*")) == paths


@pytest.mark.parametrize("files", [{"journal": "Dear diary,\n"}, {"journal": '{"plan": {}}\n', "notes.txt": "mine"}])
def test_a_folder_with_a_journal_that_no_run_wrote_is_left_alone(tmp_path, files):
    (tmp_path / "out.partial").mkdir()
    for name, content in files.items():
        (tmp_path / "out.partial" / name).write_text(content)

    with pytest.raises(RecipeError, match=r"out\.partial: .*no run of merger left it; move it away"):
        begun(tmp_path / "out")

    assert {path.name: path.read_text() for path in (tmp_path / "out.partial").iterdir()} == files


def test_an_old_output_is_back_where_a_run_was_killed_between_two_renames(tmp_path):
    (tmp_path / "out.partial" / "replaced").mkdir(parents=True)
    (tmp_path / "out.partial" / "replaced" / "work").write_text("old")
    (tmp_path / "out.partial" / "journal").write_text('{"plan": {}}\n')
    begun(tmp_path / "out").abandon()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "work").read_text() == "old"


def test_an_empty_folder_is_a_place_to_write(tmp_path):
    (tmp_path / "out").mkdir()
    check_output(tmp_path / "out", [], force=False)
    write(tmp_path / "out")
    assert same_bits(load(tmp_path / "out"), TENSORS)


def test_a_folder_that_was_filled_meanwhile_is_not_replaced(tmp_path):
    writer = begun(tmp_path / "out")
    fill(writer)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "work").touch()

    with pytest.raises(RecipeError, match="is there already"):
        writer.finish(force=False)
    writer.abandon()

    assert os.listdir(tmp_path) == ["out"]
    assert os.listdir(tmp_path / "out") == ["work"]


@pytest.mark.parametrize("swapped", [True, False], ids=["in one step", "in two"])
@pytest.mark.parametrize("kind", ["folder", "file", "link"])
def test_force_replaces_what_was_there_and_nothing_behind_it(tmp_path, monkeypatch, kind, swapped):
    if not swapped:
        monkeypatch.setattr(placement, "_exchange", lambda source, target: False)
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "work").touch()
    if kind == "folder":
        (tmp_path / "old").rename(tmp_path / "out")
    elif kind == "file":
        (tmp_path / "old" / "work").rename(tmp_path / "out")
    else:
        (tmp_path / "out").symlink_to("old")

    write(tmp_path / "out", force=True)

    assert os.listdir(tmp_path / "out") == ["model.safetensors"]
    expected = {"folder": [], "file": [], "link": [tmp_path / "old" / "work"]}[kind]
    assert list((tmp_path / "old").glob("*")) == expected
    assert sorted(os.listdir(tmp_path)) == (["out"] if kind == "folder" else ["old", "out"])


def test_what_force_replaces_is_back_if_the_new_one_cannot_take_its_place(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "work").touch()
    rename = os.rename

    def failing(source, target):
        if str(source).endswith("out.partial/model"):
            raise OSError(5, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(placement, "_exchange", lambda source, target: False)
    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(ResourceError, match="out: cannot be written: Input/output error"):
        write(tmp_path / "out", force=True)

    assert os.listdir(tmp_path) == ["out"]
    assert os.listdir(tmp_path / "out") == ["work"]


# --- a full disk ----------------------------------------------------------------------------------


def test_a_full_disk_is_found_before_the_work(tmp_path):
    program = (
        "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))\n"
        "from pathlib import Path\n"
        "from merger.checkpoint.tensor_info import Info\n"
        "from merger.checkpoint.layout import layout\n"
        "from merger.checkpoint.writer import Writer\n"
        "from merger.errors import ResourceError\n"
        "infos = {'w': Info('F32', (1 << 19,))}\n"
        "opened = Writer(Path('new/out'), layout(list(infos.items()), 1 << 30), infos, {})\n"
        "try: opened.open()\n"
        "except ResourceError as error: print(error.exit_code, error)\n"
        "finally: opened.abandon()\n"
    )
    ran = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert ran.stdout == (
        "4 new/out.partial/model/model.safetensors: the disk is full (2,097,256 bytes are needed for it); "
        "free some space, or write elsewhere\n"
    )
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("call", ["pwrite", "preadv", "fsync"])
def test_a_disk_that_fails_later_is_a_resource_error_too(tmp_path, monkeypatch, call):
    writer = begun(tmp_path / "out")

    def failing(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, call, failing)

    def work():
        fill(writer)
        writer.digests()

    with pytest.raises(ResourceError, match=r"model\.safetensors: cannot be written: Input/output error"):
        work()
    writer.abandon()
    assert os.listdir(tmp_path) == []


def test_a_disk_that_fails_while_it_is_hashed_stops_the_next_write(tmp_path, monkeypatch):
    names = ["x", "y", "z"]
    shards_of_one = {name: torch.arange(4.0) for name in names}
    writer = begun(tmp_path / "out", shards_of_one, shard_size=16)

    def failing(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", failing)
    fill(writer, {"x": shards_of_one["x"]})
    wait([writer._hashing])

    with pytest.raises(ResourceError, match=r"model-00001-.*: cannot be written: Input/output error"):
        fill(writer, {"y": shards_of_one["y"]})
    writer.abandon()
