"""The bar that a notebook shows without being asked."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from merger._notebook import NotebookBar
from merger.options import RunOptions, ignore


@pytest.fixture
def screen():
    """What was shown, one list for each bar."""
    return []


@pytest.fixture
def bar(screen):
    """A bar on this screen, whose clock is set by its attribute ``seconds``."""

    def display(text):
        shown = [text]
        screen.append(shown)
        return shown.append

    bar = NotebookBar(display, lambda: bar.seconds)
    bar.seconds = 0.0
    return bar


def test_the_time_left_is_told_after_two_seconds(bar, screen):
    for seconds, done in ((0.0, 0), (1.5, 10), (2.0, 25), (50.0, 50), (100.0, 100)):
        bar.seconds = seconds
        bar("merging", done, 100)
    (shown,) = screen
    assert shown == [
        "merging <progress max='1' value='0.000'></progress> 0%",
        "merging <progress max='1' value='0.100'></progress> 10%",
        "merging <progress max='1' value='0.250'></progress> 25%, 0:06 left",
        "merging <progress max='1' value='0.500'></progress> 50%, 0:50 left",
        "merging <progress max='1' value='1.000'></progress> 100%",
    ]


def test_each_step_has_a_bar_and_a_step_that_begins_again_another(bar, screen):
    for step, done in (("checking", 1), ("merging", 0), ("merging", 1), ("merging", 0)):
        bar(step, done, 1)
    assert [len(shown) for shown in screen] == [1, 2, 1]


def test_a_notebook_is_not_flooded(bar, screen):
    for done in range(100):
        bar.seconds += 0.01
        bar("merging", done, 100)
    assert len(screen[0]) == 5


def test_a_notebook_has_a_bar_by_default_and_other_programs_have_none(monkeypatch):
    assert RunOptions().progress is ignore
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: SimpleNamespace(kernel=None)))
    assert isinstance(RunOptions().progress, NotebookBar)
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: SimpleNamespace()))
    assert RunOptions().progress is ignore
