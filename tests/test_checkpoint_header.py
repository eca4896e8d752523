"""The header of a safetensors file: what is read is what was written, and a broken one is a sentence."""

import contextlib
import io
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save

from merger.checkpoint.formats.safetensors import FORMAT, MAX_HEADER
from merger.errors import CheckpointError

GOOD = save({"a.weight": torch.ones(2, 3), "b": torch.zeros(4).half()})


def parsed(content, size=None):
    return FORMAT.parse(io.BytesIO(content), len(content) if size is None else size, Path("m.safetensors"))


def file(header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def tensor(dtype="F32", shape=(1,), begin=0, end=4):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def test_every_tensor_has_its_dtype_shape_and_place():
    tensors = parsed(GOOD)
    assert {name: (info.dtype, info.shape) for name, info in tensors.items()} == {
        "a.weight": ("F32", (2, 3)),
        "b": ("F16", (4,)),
    }
    a, b = tensors["a.weight"], tensors["b"]
    assert GOOD[a.offset : a.offset + a.nbytes] == torch.ones(6).numpy().tobytes()
    assert GOOD[b.offset : b.offset + b.nbytes] == bytes(8)


@pytest.mark.parametrize(
    ("shape", "matrix"), [((), (1, 1)), ((5,), (1, 5)), ((2, 3), (2, 3)), ((2, 3, 4), (6, 4)), ((0, 4), (0, 4))]
)
def test_all_axes_but_the_last_are_rows(shape, matrix):
    assert parsed(save({"w": torch.zeros(shape)}))["w"].matrix == matrix


def test_metadata_is_no_tensor():
    assert list(parsed(save({"w": torch.ones(1)}, metadata={"format": "pt"}))) == ["w"]


BROKEN = {
    "empty": (b"", "is 0 bytes, too short"),
    "seven bytes": (b"1234567", "too short"),
    "header longer than the format allows": (b"\xff" * 64, "more than the format allows"),
    "header longer than the file": (file({})[:9], "claims 2 bytes but the file has 9"),
    "no JSON": (file(b"<html>"), "its header is broken"),
    "no UTF-8": (file(b'{"\xff": 1}'), "its header is broken"),
    "UTF-16": (file(json.dumps({"w": tensor()}).encode("utf-16"), bytes(4)), "its header is broken"),
    "a list": (file([]), "no JSON object"),
    "nested for ever": (file(b"[" * 100_000), "its header is broken"),
    "a name twice": (file(b'{"w": {}, "w": {}}'), "a name stands in it twice"),
    "a name with an escape sequence": (file({"w\x1b[2J": tensor()}, bytes(4)), "cannot be printed"),
    "a name with a line break": (file({"w\nmath: fine": tensor()}, bytes(4)), "cannot be printed"),
    "a name with half a character": (file(b'{"\\ud800": {}}'), "cannot be printed"),
    "an entry that is a number": (file({"w": 3}), "expected dtype, shape and data_offsets, found '3'"),
    "no dtype": (file({"w": {"shape": [], "data_offsets": [0, 4]}}), "expected dtype, shape"),
    "three offsets": (file({"w": {**tensor(), "data_offsets": [0, 1, 2]}}), "expected dtype, shape"),
    "a dtype nobody knows": (file({"w": tensor("F37")}), "the dtype 'F37' is unknown"),
    "a dtype that is a list": (file({"w": tensor(["F32"])}), "is unknown"),
    "a shape that is a number": (file({"w": {**tensor(), "shape": 1}}), "whole numbers"),
    "a negative size": (file({"w": tensor(shape=(-1, -1))}), "whole numbers"),
    "half a row": (file({"w": tensor(shape=(0.5, 2))}), "whole numbers"),
    "true as a size": (file({"w": tensor(shape=(True,))}, bytes(4)), "whole numbers"),
    "a size without end": (file({"w": tensor(shape=(10**40,))}), "whole numbers"),
    "offsets that do not fit the shape": (file({"w": tensor(shape=(2,))}, bytes(4)), "does not take the 4 bytes"),
    "offsets that run backwards": (file({"w": tensor(begin=8, end=4)}), "does not take"),
    "sizes whose product overflows 64 bits": (file({"w": tensor(shape=(2**62, 4))}), "does not take"),
    "overlapping tensors": (file({"v": tensor(), "w": tensor()}, bytes(4)), "w overlaps the one before it"),
    "a gap": (file({"w": tensor(begin=4, end=8)}, bytes(8)), "w leaves a gap before it"),
    "truncated": (GOOD[:-1], "the file is truncated"),
    "longer than its tensors": (GOOD + b"x", "longer than its tensors"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_one_line_that_names_it(tmp_path, name):
    content, message = BROKEN[name]
    path = tmp_path / "m.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        FORMAT.header(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


class Watched(io.BytesIO):
    """Remembers the most that was ever asked of it."""

    asked = 0

    def read(self, size=-1):
        self.asked = max(self.asked, size)
        return super().read(size)


@given(length=st.integers(9, 2**64 - 1))
def test_a_claimed_length_is_checked_before_it_is_read(length):
    stream = Watched(length.to_bytes(8, "little") + b"{}")
    with pytest.raises(CheckpointError):
        FORMAT.parse(stream, 10, Path("m"))
    assert stream.asked == 8
    assert MAX_HEADER <= 100_000_000


def test_a_folder_in_place_of_a_file_is_a_sentence(tmp_path):
    with pytest.raises(CheckpointError, match="cannot be read: Is a directory"):
        FORMAT.header(tmp_path)


def tiles(tensors, content):
    """Whether the tensors lie side by side up to the end of the file."""
    position = 8 + int.from_bytes(content[:8], "little")
    for info in sorted(tensors.values(), key=lambda info: (info.offset, info.nbytes)):
        if info.offset != position:
            return False
        position += info.nbytes
    return position == len(content)


@given(data=st.data())
def test_damage_gives_sound_tensors_or_one_line(data):
    """Any bytes of a good file changed, lost or doubled."""
    content = bytearray(GOOD)
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(content) - 1))
        content[place : place + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    with contextlib.suppress(CheckpointError):
        assert tiles(parsed(bytes(content)), content)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "BOOL", "?"]) | json_values,
        "shape": st.lists(st.integers(-1, 3)) | json_values,
        "data_offsets": st.lists(st.integers(-1, 16), min_size=2, max_size=2) | json_values,
    }
)


@given(header=st.dictionaries(st.text(max_size=3), entries | json_values, max_size=3), data=st.binary(max_size=16))
def test_any_json_gives_sound_tensors_or_one_line(header, data):
    content = file(header, data)
    with contextlib.suppress(CheckpointError):
        assert tiles(parsed(content), content)
