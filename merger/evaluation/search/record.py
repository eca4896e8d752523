"""The record of a search: a line for everything that was computed, so that a search that was stopped goes on."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from merger.errors import RecipeError
from merger.evaluation.measures import Outcome, Outcomes

FORMAT = 1


class Record:
    """Lines of JSON in a file: first what decides the search, then what was found, each line written at once."""

    def __init__(self, path: Path, decisive: Mapping[str, Any], *, force: bool = False) -> None:
        """Goes on with the file if it is of the same search; RecipeError if not, unless ``force`` starts it anew."""
        self.path = path
        self.lines: list[dict[str, Any]] = []
        first = {"format": FORMAT, **decisive}
        if path.exists() and not force:
            self.lines = _complete_lines(path)
            self._check(first)
        if not self.lines:
            path.write_text("")
            self.add(first)

    def _check(self, first: Mapping[str, Any]) -> None:
        if not self.lines:
            return
        header = self.lines[0]
        if differing_keys := [key for key in {**header, **first} if header.get(key) != first.get(key)]:
            raise RecipeError(
                f"{self.path}: is the record of another search: {', '.join(differing_keys)} differ; "
                "give another folder with --to, or start over with --force"
            )

    def add(self, line: Mapping[str, Any]) -> None:
        """Puts a line on the disk."""
        self.lines.append(dict(line))
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def trials(self, variant: str) -> list[dict[str, Any]]:
        """The trials of one variant, in order."""
        return [line for line in self.lines if "trial" in line and line["variant"] == variant]

    def outcomes(self, key: str) -> dict[str, Outcome] | None:
        """What the model ``key`` did, if it was judged already."""
        for line in self.lines:
            if line.get("judged") == key:
                return {
                    task: Outcome(np.array(sums["total"]), np.array(sums["weight"]))
                    for task, sums in line["outcomes"].items()
                }
        return None

    def add_outcomes(self, key: str, outcomes: Outcomes) -> None:
        """Keeps what the model ``key`` did with every example."""
        sums_by_task = {
            task: {"total": outcome.total.tolist(), "weight": outcome.weight.tolist()}
            for task, outcome in outcomes.items()
        }
        self.add({"judged": key, "outcomes": sums_by_task})


def _complete_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a record; the last one is cut off if it was being written when the machine stopped."""
    content = path.read_bytes()
    complete_bytes = content[: content.rfind(b"\n") + 1]
    if len(complete_bytes) < len(content):
        with path.open("r+b") as file:
            file.truncate(len(complete_bytes))
    try:
        lines = [json.loads(line) for line in complete_bytes.decode().splitlines()]
    except ValueError:
        lines = [None]
    if not all(isinstance(line, dict) for line in lines) or (lines and lines[0].get("format") != FORMAT):
        raise RecipeError(
            f"{path}: is no record of a search; give another folder with --to, or start over with --force"
        )
    return lines
