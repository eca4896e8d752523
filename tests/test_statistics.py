"""Statistics files: found again, checked against what they are used for, whole or absent."""

import dataclasses
import errno

import pytest
import torch
from safetensors.torch import save_file

from merger.calibration import Moments, Settings
from merger.calibration.settings import ForwardPass
from merger.calibration.statistics_files import StatisticsKey, find, load, save
from merger.errors import CheckpointError, ResourceError

FORWARD = ForwardPass("cpu", "float32", torch="2.6.0", transformers="5.0.0")
KEY = StatisticsKey(checkpoint="c0ffee", data="da7a", tokenizer="70ken", settings=Settings(samples=10), forward=FORWARD)
MOMENTS = {
    "layers.0.w.weight": Moments(torch.tensor(7), torch.tensor([1.0, 2.0]), torch.tensor([-0.5, 0.5])),
    "layers.0.experts.w": Moments(torch.tensor([3, 0]), torch.ones(2, 4), torch.zeros(2, 4)),
    "embed.weight": Moments(torch.tensor(7), token_share=torch.tensor([0.25, 0.75])),
}


@pytest.fixture
def path(tmp_path):
    save(tmp_path / "math.stats.safetensors", MOMENTS, KEY)
    return tmp_path / "math.stats.safetensors"


def refusal(path, **expected):
    with pytest.raises(CheckpointError) as error:
        load(path, **expected)
    return str(error.value)


def test_what_was_saved_is_loaded(path):
    loaded = load(path, layers=MOMENTS, **KEY.fields())
    assert set(loaded) == set(MOMENTS)
    for name, moments in MOMENTS.items():
        for field in dataclasses.fields(Moments):
            expected, result = getattr(moments, field.name), getattr(loaded[name], field.name)
            assert expected is result is None or torch.equal(expected, result)


def test_gram_matrices_are_not_kept(tmp_path):
    square = Moments(torch.tensor(1), torch.ones(2), torch.ones(2), gram=torch.ones(2, 2))
    save(tmp_path / "a", {"w": square}, KEY)
    assert load(tmp_path / "a")["w"].gram is None


def test_the_same_statistics_are_the_same_bytes(tmp_path, path):
    save(tmp_path / "again", MOMENTS, KEY)
    assert (tmp_path / "again").read_bytes() == path.read_bytes()


def test_nothing_else_is_left_in_the_folder(path):
    assert list(path.parent.iterdir()) == [path]


def test_a_failed_write_leaves_no_file(tmp_path, monkeypatch):
    def full(tensors, path, metadata):
        path.write_bytes(b"half of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(ResourceError, match=r"a\.stats\.safetensors: the disk is full"):
        save(tmp_path / "a.stats.safetensors", MOMENTS, KEY)
    assert not list(tmp_path.iterdir())


def test_tensors_may_share_their_moments(tmp_path):
    moments = MOMENTS["layers.0.w.weight"]
    save(tmp_path / "a", {"gate.weight": moments, "up.weight": moments}, KEY)
    assert set(load(tmp_path / "a")) == {"gate.weight", "up.weight"}


@pytest.mark.parametrize(
    "key",
    [
        dataclasses.replace(KEY, checkpoint="other"),
        dataclasses.replace(KEY, data="other"),
        dataclasses.replace(KEY, tokenizer="other"),
        dataclasses.replace(KEY, settings=Settings(samples=10, skip_first_tokens=1)),
        *(
            dataclasses.replace(KEY, forward=dataclasses.replace(FORWARD, **{field.name: "other"}))
            for field in dataclasses.fields(ForwardPass)
        ),
    ],
)
def test_a_file_is_found_by_its_key_alone(tmp_path, key):
    save(tmp_path / "cache" / KEY.file_name(), MOMENTS, KEY)
    assert find(tmp_path / "cache", KEY) == tmp_path / "cache" / KEY.file_name()
    assert find(tmp_path / "cache", key) is None


def test_statistics_of_another_model_are_refused(path):
    message = refusal(path, checkpoint="decaf")
    assert "was made for another model (weights or config.json): its checkpoint is c0ffee, expected decaf" in message


def test_the_part_of_the_key_that_differs_is_named(path):
    key = dataclasses.replace(KEY, settings=Settings(samples=20))
    assert "other data or settings: its settings.samples is 10, expected 20" in refusal(path, **key.fields())


def test_a_missing_layer_is_named(path):
    message = refusal(path, layers=["layers.0.w.weight", "layers.1.w.weight", "layers.2.w.weight"])
    assert "has no statistics of layers.1.w.weight, nor of 1 others" in message


def test_a_file_that_is_missing_or_something_else_is_refused(tmp_path):
    assert "there is no such statistics file" in refusal(tmp_path / "a")
    (tmp_path / "b").write_bytes(b"not safetensors at all")
    assert "is not a statistics file" in refusal(tmp_path / "b")
    save_file({"a": torch.ones(1)}, tmp_path / "c")
    assert "is a safetensors file, but not one of statistics" in refusal(tmp_path / "c")
