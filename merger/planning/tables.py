"""The tensors of a merge's output that have a row for each token."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from merger.checkpoint.tensor_kinds import TensorKinds
from merger.pipeline.registry import Stage, entry_of
from merger.pipeline.stages import expand
from merger.planning.output_names import matching_rule
from merger.planning.shared_tensors import SharedTensors
from merger.planning.vocabulary import Table
from merger.recipe.recipe import Recipe


def vocabulary_tables(
    recipe: Recipe, names: Iterable[str], kinds: Mapping[str, TensorKinds], shared_tensors: SharedTensors
) -> dict[str, Table]:
    """Returns the output's tensors with a row for each token in all models, by name."""
    tables: dict[str, Table] = {}
    for name in names:
        holder = next(kind for kind in kinds.values() if name in kind.tensors)
        if not holder.has_vocabulary(name):
            continue
        stored = {label: tensor for label in kinds if (tensor := shared_tensors.stored_name(label, name)) is not None}
        if all(kinds[label].has_vocabulary(tensor) for label, tensor in stored.items()):
            rule, kind = matching_rule(recipe, name, holder), holder.kind(name)
            rows = {label: kinds[label].tensors[tensor].shape[0] for label, tensor in stored.items()}
            packed = _is_packed((recipe if rule is None else rule).stages, kind, list(recipe.experts))
            tables[name] = Table(name, kind, rows, source=None if rule is None else rule.use, packed=packed)
    return tables


def _is_packed(stages: Iterable[Stage], kind: str, experts: Sequence[str]) -> bool:
    """Whether the last stage of a method stores several experts at once."""
    expanded = [inner_stage for stage in stages for inner_stage in expand(stage, kind, experts)]
    return bool(expanded) and entry_of(expanded[-1].func).packing is not None
