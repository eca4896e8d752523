"""The result of an inspection: plain data, the same in Python and in JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass, make_dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import ConfigDict, Field, TypeAdapter, with_config

from merger._display import html_table, name_list
from merger.inspection.counters import Subject
from merger.inspection.statistic import Statistic, statistics

FORMAT = 1
"""Rises when a key changes its meaning or goes; new keys may come at any time."""

CurvesByExpert = dict[str, list[float]]
CurvesByPair = dict[str, dict[str, list[float]]]

_DESCRIBED = ConfigDict(use_attribute_docstrings=True)


# --- what the declared statistics make ------------------------------------------------------------


class Values:
    """The statistics of some tensors: an attribute for each that is declared of the subject."""

    elements: int
    if TYPE_CHECKING:

        def __init__(self, elements: int, **values: Any) -> None:
            """Takes the value of each declared statistic by its name."""

        def __getattr__(self, name: str) -> Any:
            """Returns the value of a declared statistic."""


if TYPE_CHECKING:

    class Facts(Values):
        """The statistics of several task vectors over some tensors."""

    class Merged(Values):
        """The statistics of one merged vector over some tensors."""

else:

    def _key(entry: Statistic) -> tuple[str, Any]:
        annotation = entry.form.annotation
        optional = annotation if entry.view is None and entry.request is None else annotation | None
        place = "" if entry.symmetric else f"``{entry.name}[A][B]``: "
        description = f"{place}{entry.explanation} Formula: {entry.formula}."
        return entry.name, Annotated[optional, Field(description=description)]

    def _record(name: str, subject: Subject) -> type[Values]:
        namespace = {"__module__": __name__}  # so that pickle finds the class
        keys = [("elements", int), *map(_key, statistics(subject))]
        return with_config(_DESCRIBED)(make_dataclass(name, keys, bases=(Values,), frozen=True, namespace=namespace))

    Facts = _record("Facts", "experts")
    Merged = _record("Merged", "merged")


# --- views, maps and curves -----------------------------------------------------------------------


@with_config(_DESCRIBED)
@dataclass(frozen=True)
class View:
    """The whole model at one point of the pipeline: task vectors before a merge, between its stages, or merged."""

    name: str
    """``task_vectors``, a stage's name, ``rule1.NAME`` for a stage of rule 1, or ``result``."""
    about: Literal["experts", "merged"]
    whole: Facts | Merged
    kinds: dict[str, Facts | Merged]
    """By the kind of tensor: linear, embedding, vector, ..."""
    layers: dict[str, Facts | Merged]
    """By transformer block; a tensor outside any block is its own layer."""
    projections: dict[str, Facts | Merged]
    """By the tensor's name within a block: self_attn.q_proj."""
    cells: dict[str, dict[str, Facts | Merged]]
    """By layer and projection."""
    tensors: dict[str, Facts | Merged]


@with_config(_DESCRIBED)
@dataclass(frozen=True)
class Picture:
    """A map of one tensor's positions: the density of equal cells of the matrix."""

    tensor: str
    view: str
    density: dict[str, list[list[float]]]
    """By expert, top row first."""


@with_config(_DESCRIBED)
@dataclass(frozen=True)
class Curve:
    """Task vectors pruned to several densities, tensor by tensor: a number for each density."""

    densities: list[float]
    """Share of all positions; magnitude keeps no more than the positions that are not zero."""
    overlap: CurvesByPair
    """``overlap[a][b]`` of the positions that magnitude keeps."""
    overlap_random: CurvesByPair
    """The average overlap of random masks over as many changed positions."""
    uneven_rows: CurvesByExpert
    """Standard deviation over mean of the positions that magnitude keeps in each row; mean over matrices."""
    uneven_rows_random: CurvesByExpert
    """The same of random masks, from the average of their squared counts."""


@with_config(_DESCRIBED)
@dataclass(frozen=True)
class Curves:
    """Overlap and balance against density."""

    whole: Curve
    kinds: dict[str, Curve]


@with_config(_DESCRIBED)
@dataclass(frozen=True)
class MergeFacts:
    """What is merged, how, and into what."""

    method: str
    """The method, or the stages of the pipeline with + between them."""
    rules: int
    """The number of rules that treat some tensors in another way."""
    inputs: dict[str, str]
    """The location of the base and of each expert, by label."""
    output: str


@with_config(_DESCRIBED)
@dataclass(frozen=True)
class Inspection:
    """The result of an inspection."""

    format: int
    subject: Literal["recipe", "merge", "model"]
    base: str
    """The model that all others are compared with."""
    experts: list[str]
    views: list[View]
    pictures: list[Picture]
    copied: dict[str, str]
    """Tensors that are copied, and from which model."""
    notes: list[str]
    curves: Curves | None = None
    """Null unless asked for."""
    made: dict[str, Any] | None = None
    """Of a finished merge: a summary of its manifest."""
    merge: MergeFacts | None = None
    """Null where one fine-tune is compared with its base."""
    seconds: float = 0.0
    bytes_read: int = 0
    peak_memory_bytes: int = 0

    def __repr__(self) -> str:
        views = ", ".join(view.name for view in self.views) or "none"
        return f"Inspection(of a {self.subject}: {name_list(self.experts)} against {self.base}; views: {views})"

    def _repr_html_(self) -> str:
        metrics = ("norm", "relative_size", "density")
        facts = next((view.whole for view in self.views if view.about == "experts"), None)
        columns = [] if facts is None else [getattr(facts, metric) or {} for metric in metrics]
        rows = [
            (expert, *(f"{values[expert]:.3f}" if expert in values else "" for values in columns))
            for expert in self.experts
        ]
        return html_table(repr(self), ("expert", *metrics[: len(columns)]), rows)

    def view(self, name: str) -> View:
        """The view of that name; KeyError if there is none."""
        for view in self.views:
            if view.name == name:
                return view
        raise KeyError(name)

    def merging(self) -> list[View]:
        """The views of what the mergers take: the last of the experts in the recipe's pipeline and in each rule's."""
        last = {view.name.rpartition(".")[0]: view for view in self.views[1:] if view.about == "experts"}
        return list(last.values()) or [view for view in self.views[:1] if view.about == "experts"]

    def as_json(self) -> dict[str, Any]:
        """A plain dictionary for machines."""
        return asdict(self)


def json_schema() -> dict[str, Any]:
    """The JSON Schema of an inspection, for machines that read it."""
    schema = TypeAdapter(Inspection).json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "merger inspection"}
