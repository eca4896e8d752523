"""The hashes of weight files: read once, remembered only while nothing says that the file changed."""

import hashlib
import os
import time

import pytest

from merger.checkpoint.cache import recall, remember
from merger.checkpoint.hashes import sha256
from merger.errors import CheckpointError

CONTENT = b"weights" * 1000
DIGEST = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def file(tmp_path, monkeypatch):
    """A file that was not touched lately, and a cache of its own."""
    monkeypatch.setenv("MERGER_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "model.safetensors"
    path.write_bytes(CONTENT)
    now = time.time()
    monkeypatch.setattr("merger.checkpoint.hashes.time.time", lambda: now + 10)
    return path


def swap_remembered(tmp_path):
    """Replaces every remembered digest, so that one that is used shows."""
    for entry in (tmp_path / "cache" / "sha256").iterdir():
        entry.write_text("f" * 64)


def test_it_is_the_digest_of_the_content(file):
    assert sha256(file) == DIGEST


def test_a_file_that_did_not_change_is_not_read_again(file, tmp_path):
    sha256(file)
    swap_remembered(tmp_path)
    assert sha256(file) == "f" * 64


@pytest.mark.parametrize("times", [None, (0, 0)], ids=["another time", "its old time put back"])
def test_a_file_that_changed_is(file, tmp_path, times):
    stat_before = os.stat(file)
    sha256(file)
    swap_remembered(tmp_path)
    file.write_bytes(CONTENT[::-1])
    if times is not None:
        os.utime(file, ns=(stat_before.st_atime_ns, stat_before.st_mtime_ns))
    assert sha256(file) == hashlib.sha256(CONTENT[::-1]).hexdigest()


def test_a_file_that_was_written_a_moment_ago_is_not_remembered(file, tmp_path, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setenv("MERGER_CACHE", str(tmp_path / "cache"))
    assert sha256(file) == DIGEST
    assert not (tmp_path / "cache").exists()


def test_what_is_remembered_wrongly_is_not_believed(file, tmp_path):
    sha256(file)
    for entry in (tmp_path / "cache" / "sha256").iterdir():
        entry.write_text("../x")
    assert sha256(file) == DIGEST


def test_a_blob_of_the_hub_cache_is_named_by_its_hash(tmp_path):
    blob = tmp_path / "blobs" / ("a" * 64)
    blob.parent.mkdir()
    blob.touch()
    link = tmp_path / "model.safetensors"
    link.symlink_to(blob)
    assert sha256(link) == "a" * 64


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"gone\.safetensors: cannot be read: No such file"):
        sha256(tmp_path / "gone.safetensors")


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path, monkeypatch):
    occupied = tmp_path / "occupied"
    occupied.touch()
    monkeypatch.setenv("MERGER_CACHE", str(occupied))
    remember("sha256", "key", "text")
    assert recall("sha256", "key") is None
