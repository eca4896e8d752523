"""What several files of tests share."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

# Threads that wait for each other on busy cores make a merge of ten numbers take half a second.
torch.set_num_threads(1)

# `pytest --hypothesis-profile=thorough` looks further, at other examples each time.
settings.register_profile(
    "quick",
    max_examples=10,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow],
)
settings.register_profile("thorough", settings.get_profile("quick"), max_examples=100, derandomize=False)
settings.load_profile("quick")


@pytest.fixture(scope="session")
def golden():
    """Cases by name, {method, params, inputs, outputs}, from an independent float64 program."""
    return json.loads((Path(__file__).parent / "golden.json").read_text())
