"""The record of a search: a line for everything that was computed, so that a search that was stopped goes on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from merger.checkpoint.disk import disk_error, sync_open
from merger.checkpoint.locks import Lock
from merger.errors import RecipeError
from merger.evaluation.measures import Outcome, Outcomes

FORMAT = 1
_BEGINNING = b'{"format": '


class Record:
    """Lines of JSON in a file: first what decides the search, then what was found, each line written at once."""

    def __init__(self, path: Path, decisive: Mapping[str, Any], *, force: bool = False) -> None:
        """Goes on with the file if it is of the same search.

        RecipeError if another search is writing it, if it is no record, or if it is of another search, unless
        ``force`` starts that anew.
        """
        self.path = path
        self.lines: list[dict[str, Any]] = []
        try:
            self._file = path.open("ab")
        except OSError as error:
            raise disk_error(path, error) from None
        try:
            self._lock = Lock(self._file.fileno(), path, path.with_name(f"{path.name}.owner"))
        except BaseException:
            self._file.close()
            raise
        try:
            self._go_on({"format": FORMAT, **decisive}, force=force)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Lets another search have the record."""
        self._lock.release()
        self._file.close()

    def _go_on(self, first: Mapping[str, Any], *, force: bool) -> None:
        content = self.path.read_bytes()
        if content[: len(_BEGINNING)] != _BEGINNING[: len(content)]:
            raise RecipeError(
                f"{self.path}: is no record of a search; give another folder with to=FOLDER, or move it away"
            )
        complete = b"" if force else content[: content.rfind(b"\n") + 1]  # the last line was being written at a kill
        self.lines = _lines_of(complete, self.path)
        self._check(first)
        self._file.truncate(len(complete))
        if not self.lines:
            self.add(first)

    def _check(self, first: Mapping[str, Any]) -> None:
        if not self.lines:
            return
        header = self.lines[0]
        if differing_keys := [key for key in {**header, **first} if header.get(key) != first.get(key)]:
            raise RecipeError(
                f"{self.path}: is the record of another search: {', '.join(differing_keys)} differ; "
                "give another folder with to=FOLDER, or start over with force=True"
            )

    def add(self, line: Mapping[str, Any]) -> None:
        """Puts a line on the disk."""
        self.lines.append(dict(line))
        try:
            self._file.write(json.dumps(line).encode() + b"\n")
            self._file.flush()
            sync_open(self._file.fileno())
        except OSError as error:
            raise disk_error(self.path, error) from None

    def trials(self, variant: str) -> list[dict[str, Any]]:
        """The trials of one variant, in order."""
        return [line for line in self.lines if "trial" in line and line["variant"] == variant]

    def outcomes(self, key: str) -> dict[str, Outcome] | None:
        """Returns the recorded outcomes of the model ``key``; None if there are none."""
        for line in self.lines:
            if line.get("judged") == key:
                return {
                    task: Outcome(np.array(sums["total"]), np.array(sums["weight"]))
                    for task, sums in line["outcomes"].items()
                }
        return None

    def add_outcomes(self, key: str, outcomes: Outcomes) -> None:
        """Records the outcomes of the model ``key``."""
        sums_by_task = {
            task: {"total": outcome.total.tolist(), "weight": outcome.weight.tolist()}
            for task, outcome in outcomes.items()
        }
        self.add({"judged": key, "outcomes": sums_by_task})


def _lines_of(content: bytes, path: Path) -> list[dict[str, Any]]:
    try:
        lines = [json.loads(line) for line in content.decode().splitlines()]
    except ValueError:
        lines = [None]
    if not all(isinstance(line, dict) for line in lines) or (lines and lines[0].get("format") != FORMAT):
        raise RecipeError(
            f"{path}: is damaged, or of another version of merger; give another folder with to=FOLDER, "
            "or start over with force=True"
        )
    return lines
