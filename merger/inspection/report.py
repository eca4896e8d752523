"""What an inspection says: plain data, the same in Python and in JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from pydantic import ConfigDict, TypeAdapter, with_config

from merger._lazy import torch
from merger.inspection import curves
from merger.inspection.sums import Outcome, Vectors

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = 1
"""Rises when a key changes its meaning or goes; new keys may come at any time."""

ByExpert = dict[str, float]
ByPair = dict[str, dict[str, float]]
CurvesByExpert = dict[str, list[float]]
CurvesByPair = dict[str, dict[str, list[float]]]

_DESCRIBED = ConfigDict(use_attribute_docstrings=True)


@with_config(_DESCRIBED)
@dataclass(frozen=True)
class Facts:
    """Several task vectors over some tensors."""

    elements: int
    density: ByExpert
    """Share of positions that are not zero."""
    norm: ByExpert
    """The euclidean length."""
    overlap: ByPair
    """``overlap[a][b]``: share of what a keeps that b keeps too, |A and B| / |A|."""
    jaccard: ByPair
    """|A and B| / |A or B|."""
    sign_conflict: ByPair
    """Share of what both keep where their signs differ."""
    cosine: ByPair
    holders: list[float]
    """Share of positions kept by exactly 0, 1, .. of the experts."""
    uneven_rows: ByExpert
    """Standard deviation over mean of what the rows of a matrix keep, mean over matrices."""
    uneven_columns: ByExpert
    uneven_blocks: ByExpert
    """The same of every 256 consecutive elements of a matrix."""
    distinct: dict[str, int]
    """How many different values other than zero the tensor that has most has; 1048577: more than 1048576."""
    effective_rank: ByExpert | None
    """e to the entropy of a matrix's singular values as shares, mean over matrices; null where nobody asked for it."""


@with_config(_DESCRIBED)
@dataclass(frozen=True)
class Merged:
    """One merged task vector over some tensors."""

    elements: int
    density: float
    norm: float
    at_base: float
    """Share of positions that end at the base's value."""
    at_expert: ByExpert
    """At exactly one expert's value; the first of them where several have the same."""
    blend: float
    """Share of positions that end at no single input's value."""
    cosine: ByExpert
    """With each expert's task vector."""


@with_config(_DESCRIBED)
@dataclass(frozen=True)
class View:
    """One look at the whole model: task vectors before a merge, between its stages, or merged."""

    name: str
    """``task_vectors``, a stage's name, ``rule1.NAME`` for a stage of rule 1, or ``result``."""
    about: Literal["experts", "merged"]
    whole: Facts | Merged
    kinds: dict[str, Facts | Merged]
    """By the kind of tensor: linear, embedding, vector, ..."""
    layers: dict[str, Facts | Merged]
    """By transformer block; a tensor outside any is its own."""
    projections: dict[str, Facts | Merged]
    """By what a block calls it: self_attn.q_proj."""
    cells: dict[str, dict[str, Facts | Merged]]
    """By layer and projection."""
    tensors: dict[str, Facts | Merged]


@with_config(_DESCRIBED)
@dataclass(frozen=True)
class Picture:
    """Where the kept positions of one tensor lie: its density in equal pieces of the matrix."""

    tensor: str
    view: str
    density: dict[str, list[list[float]]]
    """By expert, top row first."""


@with_config(_DESCRIBED)
@dataclass(frozen=True)
class Curve:
    """Task vectors pruned to several densities, tensor by tensor: a number for each density."""

    densities: list[float]
    """Share of all positions; no more than what is not zero is kept."""
    overlap: CurvesByPair
    """``overlap[a][b]`` of what magnitude keeps."""
    overlap_random: CurvesByPair
    """What random masks of as many changed positions have on average."""
    uneven_rows: CurvesByExpert
    """Standard deviation over mean of what magnitude keeps of the rows of a matrix, mean over matrices."""
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
class Inspection:
    """All that was seen."""

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
    """Where they were asked for."""
    made: dict[str, Any] | None = None
    """Of a finished merge: what its manifest says."""
    seconds: float = 0.0
    bytes_read: int = 0
    peak_memory_bytes: int = 0

    def view(self, name: str) -> View:
        """The view of that name; KeyError if there is none."""
        for view in self.views:
            if view.name == name:
                return view
        raise KeyError(name)

    def merging(self) -> list[View]:
        """What the mergers are given: the last view of the experts in the recipe's pipeline and in each rule's."""
        last = {view.name.rpartition(".")[0]: view for view in self.views[1:] if view.about == "experts"}
        return list(last.values()) or [view for view in self.views[:1] if view.about == "experts"]

    def as_json(self) -> dict[str, Any]:
        """A plain dictionary for machines."""
        return asdict(self)


def json_schema() -> dict[str, Any]:
    """The JSON Schema of an inspection, for machines that read it."""
    whole = TypeAdapter(Inspection).json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **whole, "title": "merger inspection"}


# --- from sums to facts ---------------------------------------------------------------------------


def facts(sums: Vectors | Outcome, experts: Sequence[str]) -> Facts | Merged:
    """Shares, rates and norms of what was counted; a share of nothing is 0."""
    return _of_vectors(sums, experts) if isinstance(sums, Vectors) else _of_outcome(sums, experts)


def _of_vectors(sums: Vectors, experts: Sequence[str]) -> Facts:
    both, products = torch.tensor(sums.both), _floats(sums.products)
    kept, lengths = both.diagonal(), products.diagonal().sqrt()
    rows, columns, blocks = _share(_floats(sums.uneven), torch.tensor(sums.in_matrices).view(-1, 1))
    return Facts(
        elements=sums.elements,
        density=_named(_share(kept, sums.elements), experts),
        norm=_named(lengths, experts),
        overlap=_paired(_share(both, kept.view(-1, 1)), experts),
        jaccard=_paired(_share(both, kept.view(-1, 1) + kept - both), experts),
        sign_conflict=_paired(_share(torch.tensor(sums.opposed), both), experts),
        cosine=_paired(_share(products, lengths.view(-1, 1) * lengths), experts),
        holders=_share(torch.tensor(sums.holders), sums.elements).tolist(),
        uneven_rows=_named(rows, experts),
        uneven_columns=_named(columns, experts),
        uneven_blocks=_named(blocks, experts),
        distinct=dict(zip(experts, sums.distinct, strict=True)),
        effective_rank=_named(_share(_floats(sums.ranks), sums.ranked), experts) if sums.ranked else None,
    )


def _of_outcome(sums: Outcome, experts: Sequence[str]) -> Merged:
    ends, along, squares = map(_floats, (sums.ends, sums.along, sums.squares))
    at_base, *at_experts, elsewhere = _share(ends, sums.elements).tolist()
    return Merged(
        elements=sums.elements,
        density=sums.kept / max(sums.elements, 1),
        norm=sums.square**0.5,
        at_base=at_base,
        at_expert=dict(zip(experts, at_experts, strict=True)),
        blend=elsewhere,
        cosine=_named(_share(along, sums.square**0.5 * squares.sqrt()), experts),
    )


def curve(sums: curves.Curves, experts: Sequence[str]) -> Curve:
    """Overlap rates and balance of what was counted at each density."""
    kept = torch.tensor(sums.kept).unsqueeze(1)

    def pairs(both: Any) -> CurvesByPair:
        return _paired(_share(_floats(both), kept), experts)

    def each(uneven: Any) -> CurvesByExpert:
        return _named(_share(_floats(uneven), sums.in_matrices), experts)

    return Curve(
        densities=[float(share) for share in curves.DENSITIES],
        overlap=pairs(sums.both),
        overlap_random=pairs(sums.both_random),
        uneven_rows=each(sums.uneven),
        uneven_rows_random=each(sums.uneven_random),
    )


def _share(part: Tensor, whole: Tensor | float) -> Tensor:
    """part / whole in float64, 0 where there is no whole."""
    of = torch.as_tensor(whole, dtype=torch.float64)
    return (part.double() / of.where(of != 0, 1)).where(of != 0, 0)


def _floats(numbers: Any) -> Tensor:
    """Nested tuples of numbers in float64."""
    return torch.tensor(numbers, dtype=torch.float64)


def _named(values: Tensor, experts: Sequence[str]) -> dict[str, Any]:
    return dict(zip(experts, values.tolist(), strict=True))


def _paired(values: Tensor, experts: Sequence[str]) -> dict[str, dict[str, Any]]:
    """A matrix by two names, without its diagonal."""
    named = {one: _named(row, experts) for one, row in zip(experts, values, strict=True)}
    return {one: {other: value for other, value in row.items() if other != one} for one, row in named.items()}
