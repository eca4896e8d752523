"""Checkpoints of one training run as experts: `experts: {glob: PATTERN, weights: SCHEME}`.

A mean of checkpoints at a constant learning rate stands for a decay of the rate: WSM, https://arxiv.org/abs/2507.17634,
section 3. Where a decay leaves the share w_i of update i, checkpoint j counts c_j = w_j - w_(j+1).
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, ValidationError

from merger._order import natural
from merger.checkpoint.near_paths import names_in
from merger.errors import nearest
from merger.recipe.document import Document, KeyPath
from merger.recipe.faults import translate_errors
from merger.recipe.sections import Section, unused_expert_name

_DECAYS: Mapping[str, Callable[[float], float]] = {
    "minus_sqrt": lambda x: 1 - math.sqrt(x),
    "cosine": lambda x: (1 + math.cos(math.pi * x)) / 2,
}
"""What a decay leaves of the learning rate, from the first checkpoint at 0 to the end of the decay at 1."""


class MovingAverage(Section):
    """An exponential moving average of checkpoints."""

    ema: float = Field(gt=0, lt=1, description="The share that each later checkpoint leaves of the average.")


_Scheme = Literal["uniform", "minus_sqrt", "cosine", "linear"]
_Weights = Annotated[
    Annotated[_Scheme, Tag("scheme")] | Annotated[MovingAverage, Tag("average")],
    Discriminator(lambda value: "average" if isinstance(value, Mapping | MovingAverage) else "scheme"),
]


class Trajectory(Section):
    """Checkpoints of one run by a pattern of their folders, in the natural order of their names."""

    glob: str = Field(min_length=1, description="A pattern of folders, as in ckpts/step-*.")
    weights: _Weights = Field(
        "uniform",
        description="What checkpoints count: all the same, which stands for a linear decay of the learning rate; as a "
        "1 - sqrt or a cosine decay would have it; 1, 2, 3 and so on (linear); or {ema: SHARE}.",
    )

    def folders(self, start: Path) -> list[str]:
        """The folders that match, relative to ``start`` where the pattern is."""
        path = Path(os.path.expanduser(self.glob))
        root = Path(path.anchor) if path.is_absolute() else start
        matches = root.glob(str(path.relative_to(path.anchor)))
        shown = root if path.is_absolute() else None
        return sorted((str(m if shown else m.relative_to(start)) for m in matches if m.is_dir()), key=natural)

    def shares(self, count: int) -> list[float]:
        """What each of so many checkpoints counts, the earliest first; only their ratios matter."""
        if self.weights == "uniform":
            return [1.0] * count
        if self.weights == "linear":
            return [float(j + 1) for j in range(count)]
        if isinstance(self.weights, MovingAverage):
            keep = self.weights.ema
            return [keep ** (count - 1), *((1 - keep) * keep ** (count - 1 - j) for j in range(1, count))]
        left = [*(_DECAYS[self.weights](i / count) for i in range(count)), 0.0]
        return [left[j] - left[j + 1] for j in range(count)]


def is_trajectory(experts: Any) -> bool:
    """Whether the experts of a document are written as a pattern."""
    return isinstance(experts, Mapping) and "glob" in experts and experts.keys() <= Trajectory.model_fields.keys()


def with_checkpoints(document: Document) -> Document:
    """The document with the checkpoints of its trajectory by name, and the last one as the base where there is none.

    Unchanged where `trajectory_faults` has any.
    """
    experts = document.value.get("experts")
    if not is_trajectory(experts) or trajectory_faults(document):
        return document
    trajectory = Trajectory.model_validate(experts)
    folders = trajectory.folders(document.folder)
    named: dict[str, Any] = {}
    for location, share in zip(folders, trajectory.shares(len(folders)), strict=True):
        named[unused_expert_name(location, named)] = {"model": location, "weight": share}
    return replace(document, value={"base": folders[-1], **document.value, "experts": named})


def trajectory_faults(document: Document) -> list[tuple[KeyPath, str]]:
    """The faults of the experts of a document that are written as a pattern."""
    experts = document.value.get("experts")
    if not is_trajectory(experts):
        return []
    try:
        trajectory = Trajectory.model_validate(experts)
    except ValidationError as error:
        faults = translate_errors(error, lambda _: set(Trajectory.model_fields), experts)
        return [(("experts", *path), message) for path, message in faults]
    if trajectory.folders(document.folder):
        return []
    parent = document.folder / Path(os.path.expanduser(trajectory.glob)).parent
    names = names_in(parent, Path.is_dir)
    folders = f"in {parent} {nearest(Path(trajectory.glob).name, names)}" if names else f"{parent} has no folders"
    return [(("experts", "glob"), f"no folder matches {trajectory.glob}; {folders}")]
