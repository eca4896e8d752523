"""The tensors of a merge's output that have a row for each token."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches

from merger.checkpoint.tensor_kinds import TensorKinds
from merger.pipeline.registry import Stage, entry_of
from merger.pipeline.stages import expand
from merger.planning.output_names import Choices
from merger.planning.plan import ExtraRows
from merger.planning.shared_tensors import SharedTensors
from merger.planning.vocabulary import Table, TableRows, Vocabulary, round_up
from merger.recipe.recipe import Recipe


def vocabulary_tables(
    choices: Choices, names: Iterable[str], kinds: Mapping[str, TensorKinds], shared_tensors: SharedTensors
) -> dict[str, Table]:
    """Returns the output's tensors with a row for each token in all models, by name."""
    tables: dict[str, Table] = {}
    for name in names:
        holder = next(kind for kind in kinds.values() if name in kind.tensors)
        if not holder.has_vocabulary(name):
            continue
        choice, kind = choices.of(name, holder), holder.kind(name)
        labels = choices.models(name, choice)
        stored = {label: tensor for label in labels if (tensor := shared_tensors.stored_name(label, name)) is not None}
        if all(kinds[label].has_vocabulary(tensor) for label, tensor in stored.items()):
            rows = {label: kinds[label].tensors[tensor].shape[0] for label, tensor in stored.items()}
            packed = _is_packed((choices.recipe if choice is None else choice).stages, kind, labels[1:])
            tables[name] = Table(name, kind, rows, source=None if choice is None else choice.use, packed=packed)
    return tables


def table_rows(
    tables: Mapping[str, Table], vocabulary: Vocabulary, *, drop: bool, multiple: int
) -> dict[str, TableRows]:
    """The rows of the output's tables by name; those of a copied table, and zeros up to a ``multiple``."""
    alike: dict[tuple[tuple[str, int], ...], TableRows] = {}  # embedding and head have the same rows
    rows = {}
    for name, table in tables.items():
        if table.source is not None:
            length = table.rows.get(table.source, 0)
            padded = round_up(length, multiple)
            rows[name] = TableRows(padded, length, extra=(ExtraRows(length, padded, ()),) if length < padded else ())
            continue
        key = tuple(table.rows.items())
        if key not in alike:
            alike[key] = vocabulary.table_rows(table.rows, drop=drop, multiple=multiple)
        rows[name] = alike[key]
    return rows


def row_faults(tables: Mapping[str, Table], rows: Mapping[str, TableRows]) -> list[str]:
    """The fault of tables that are copied from models with different numbers of rows, so that no model could load."""
    counts = {name: table_rows.count for name, table_rows in rows.items()}
    if len(set(counts.values())) < 2 or not any(table.source for table in tables.values()):
        return []
    parts = [f"{name} has {counts[name]:,} rows of {tables[name].source or 'all models'}" for name in tables]
    sources = [table.source for table in tables.values() if table.source is not None]
    remedy = f"take all of them from one, as by the first rule {{kinds: [embedding, tied, head], use: {sources[0]}}}"
    return [f"{'; '.join(parts)}; {remedy}"]


def source_faults(recipe: Recipe, vocabulary: Vocabulary) -> list[str]:
    """The faults of the recipe's `tokens`: those that the output lacks, and sources without them."""
    faults = []
    names = set(vocabulary.meaning.values())
    for token, row in recipe.tokens.items():
        holders = [label for label, tokens in vocabulary.tokens.items() if token in tokens.values()]
        if token not in names:
            near = get_close_matches(token, sorted(names), n=1)
            suggestion = f"; did you mean {near[0]!r}?" if near else f", {len(names):,} in number"
            message = f"is no token of the output, which has the tokens of {vocabulary.label}{suggestion}"
            faults.append(recipe.fault(("tokens", token), message))
        elif row.source not in ("mean", "zero", *holders):
            message = f"{row.source} has no row for {token!r}; take it from {' or '.join(holders) or 'zero'}"
            faults.append(recipe.fault(("tokens", token, "from"), message))
    return faults


def describe_unpackable(name: str, pack: str, rows: TableRows) -> str:
    """The fault of a table whose rows are not those with the same numbers of all models."""
    if not rows.extra:
        labels = " and ".join(rows.row_maps)
        return f"{name}: {pack} cannot hold rows whose numbers in {labels} are other tokens; leave `tokenizer` out"
    labels = " and ".join(rows.extra[-1].models)
    if not labels:
        return f"{name}: {pack} cannot hold rows that no model has; add a rule that uses base for it"
    remedy = "set extra_rows: drop" if rows.extra[0].start >= rows.merged else f"add a rule that uses {labels} for it"
    return f"{name}: {pack} cannot hold rows that only {labels} has; {remedy}"


def _is_packed(stages: Iterable[Stage], kind: str, experts: Sequence[str]) -> bool:
    """Whether the last stage of a method stores several experts at once."""
    expanded = [inner_stage for stage in stages for inner_stage in expand(stage, kind, experts)]
    return bool(expanded) and entry_of(expanded[-1].func).packing is not None
