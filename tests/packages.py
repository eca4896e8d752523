"""Copies of the package in which files may be added, spoilt or removed, and commands that run them."""

import os
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "merger"


def linked_package(folder, room):
    """A package in ``folder`` whose files are links, with real folders on the way to ``room``; returns that room."""
    source, target = PACKAGE, Path(folder) / "merger"
    for part in (*Path(room).parts, None):
        target.mkdir(parents=True)
        for path in source.iterdir():
            if path.name not in (part, "__pycache__"):
                (target / path.name).symlink_to(path)
        if part is not None:
            source, target = source / part, target / part
    return target


def run_package(folder, *arguments, cwd):
    """`merger` of a package in ``folder``, in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    command = [sys.executable, "-m", "merger", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=environment)
