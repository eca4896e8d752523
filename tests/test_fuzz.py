"""A few of the mutated headers, indexes and recipes of scripts/fuzz.py, which feeds many more."""

import importlib.util
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "fuzz.py"


@pytest.fixture(scope="module")
def fuzz():
    spec = importlib.util.spec_from_file_location("fuzz", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["fuzz"] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("kind", "cases"), [("headers", 500), ("indexes", 200), ("recipes", 150)])
def test_what_is_mutated_is_read_or_refused_in_a_line(fuzz, tmp_path, kind, cases):
    report = fuzz.fuzz(kind, cases, seed=1, folder=tmp_path)
    assert report.failures == []
    assert report.endings["read"] > 0
    assert report.endings["refused"] > cases / 2


def test_a_file_outside_the_models_folder_would_be_noticed(fuzz, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "secret").touch()
    ending, reason = fuzz.outcome(lambda: (tmp_path / "secret").read_bytes(), tmp_path / "model")
    assert (ending, reason) == ("failed", f"opened {tmp_path}/secret")


def test_a_traceback_would_be_noticed(fuzz, tmp_path):
    assert fuzz.outcome(lambda: {}["a"], tmp_path) == ("failed", "KeyError: 'a'")
