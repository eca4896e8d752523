"""Progress in a notebook: one bar per step below the cell, without any package beside the notebook's own."""

from __future__ import annotations

import html
import sys
import time
from collections.abc import Callable
from importlib import import_module
from typing import Any

Display = Callable[[str], Callable[[str], None]]
"""Shows HTML below the cell that runs, and returns a function that replaces it."""

ETA_AFTER = 2.0
"""Seconds of a step before which its rate says little."""
_PAUSE = 0.2
"""Seconds between two changes of a bar, so that a notebook keeps up."""


class NotebookBar:
    """Shows a bar for each step of a command; a step that begins again has a new one."""

    def __init__(self, display: Display, clock: Callable[[], float] = time.monotonic) -> None:
        self._display, self._clock = display, clock
        self._step = ""
        self._done, self._began, self._shown = 0, 0.0, 0.0
        self._replace: Callable[[str], None] = lambda text: None

    def __call__(self, step: str, done: int, total: int) -> None:
        """Shows how far a step is."""
        now = self._clock()
        if step != self._step or done < self._done:
            self._began, self._shown = now, now
            self._replace = self._display(self._bar(step, done, total, 0.0))
        elif now - self._shown >= _PAUSE or done >= total:
            self._shown = now
            self._replace(self._bar(step, done, total, now - self._began))
        self._step, self._done = step, done

    def _bar(self, step: str, done: int, total: int, seconds: float) -> str:
        share = min(done / total, 1.0) if total else 1.0
        text = f"{html.escape(step)} <progress max='1' value='{share:.3f}'></progress> {share:.0%}"
        if seconds < ETA_AFTER or not done or share == 1:
            return text
        left = round(seconds * (total - done) / done)
        return f"{text}, {left // 60}:{left % 60:02} left"


def notebook_bar() -> NotebookBar | None:
    """The bar of the notebook that this process runs, or None elsewhere; imports nothing."""
    module = sys.modules.get("IPython")
    shell = module.get_ipython() if module is not None else None
    return NotebookBar(_show) if shell is not None and hasattr(shell, "kernel") else None


def _show(text: str) -> Callable[[str], None]:
    ipython: Any = import_module("IPython.display")
    handle = ipython.display(ipython.HTML(text), display_id=True)
    return lambda new_text: handle.update(ipython.HTML(new_text))
