"""Plans the operation on every tensor from headers and configs alone."""

from __future__ import annotations

import gc
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from merger._order import natural
from merger.checkpoint.checkpoint import Checkpoint
from merger.checkpoint.opening import open_checkpoint
from merger.checkpoint.packed_experts import COLUMNS
from merger.checkpoint.renaming import RenameError
from merger.checkpoint.side_files import uncopied_notes
from merger.checkpoint.tensor_info import SAFETENSORS_NAMES, Info
from merger.checkpoint.tensor_kinds import BLOCK_COUNTS, TensorKinds, tensor_kinds
from merger.checkpoint.tokenizers import open_tokenizers, tokenizer_folder
from merger.errors import CheckpointError
from merger.pipeline.parameters import Place
from merger.planning.block_map import NO_ENTRY, block_map
from merger.planning.differences import config_differences, summarize_misfits, tokenizer_differences
from merger.planning.linear_order import describe_aliasing, number_layers
from merger.planning.model_limits import encoder_decoder_limit
from merger.planning.output_config import BlockSettings, config_dtype, with_size
from merger.planning.output_names import Choices, output_names
from merger.planning.parts import describe_unknown_axes, needs_input_axis, parts_of
from merger.planning.plan import Plan, TensorPlan
from merger.planning.shared_tensors import SharedTensors
from merger.planning.side_files import plan_side_files
from merger.planning.special_ids import special_ids, with_special_ids
from merger.planning.stage_binder import StageBinder
from merger.planning.stage_notes import stage_notes
from merger.planning.tables import describe_unpackable, row_faults, source_faults, table_rows, vocabulary_tables
from merger.planning.tensor_faults import missing_faults, shape_faults
from merger.planning.tokenizer_choice import choose_tokenizer
from merger.planning.towers import tower_notes, tower_tensors
from merger.planning.vocabulary import TableRows, Vocabulary, describe_rows
from merger.recipe.calibration_faults import is_calibrated
from merger.recipe.input_locations import check_inputs
from merger.recipe.layers import Layer
from merger.recipe.places import element_name
from merger.recipe.recipe import Recipe, as_recipe
from merger.recipe.sections import Rule

_NO_DIGITS = str.maketrans("", "", "0123456789")
FAULTS = 20
"""The most faults of a plan that are shown."""


def plan(recipe: Recipe | str | Path, *, offline: bool = False, headers_only: bool = True) -> Plan:
    """Opens the inputs' headers and plans every tensor; writes nothing.

    ``recipe`` may be the path of its file. Without ``headers_only`` a Hub repository's weights are downloaded after the
    plan succeeds. Raises CheckpointError for inputs that are not there, before any network, and for inputs that do not
    fit together, with all misfits of a kind at once.
    """
    recipe = as_recipe(recipe)
    check_inputs(recipe)
    draft = _plan(recipe, offline=offline, headers_only=True)
    checkpoints = [part for model in draft.models.values() for part in (model, model.adapter) if part is not None]
    if headers_only or all(info.file is not None for part in checkpoints for info in part.tensors.values()):
        return draft
    draft.close()
    return _plan(recipe, offline=offline, headers_only=False)


def _plan(recipe: Recipe, *, offline: bool, headers_only: bool) -> Plan:
    with _collector_paused():
        models = open_models(recipe, offline=offline, headers_only=headers_only)
        try:
            return _Planner(recipe, models).plan()
        except BaseException:
            for model in models.values():
                model.close()
            raise


@contextmanager
def _collector_paused() -> Iterator[None]:
    """Pauses Python's cyclic garbage collector.

    A plan of 45,000 tensors is made of a million objects, all of which stay. The collector would go through them over
    and over, which took a third of the time.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def open_models(recipe: Recipe, *, offline: bool, headers_only: bool) -> dict[str, Checkpoint]:
    """Opens the base and the experts, in recipe order; raises CheckpointError with all that cannot be opened."""
    models: dict[str, Checkpoint] = {}
    errors: list[CheckpointError] = []
    for label, source in {"base": recipe.base, **recipe.experts}.items():
        try:
            models[label] = open_checkpoint(
                source.model,
                source.adapter,
                label=label,
                folder=recipe.folder,
                offline=offline,
                headers_only=headers_only,
                base=models.get("base"),
                rename=source.rename,
            )
        except RenameError as error:
            place = ("base",) if label == "base" else ("experts", label)
            entry = () if error.pattern is None else (error.pattern,)
            errors.append(CheckpointError(recipe.fault((*place, "rename", *entry), error.reason)))
        except CheckpointError as error:
            errors.append(error)
    if not errors:
        return models
    for model in models.values():
        model.close()
    if len(errors) == 1:
        raise errors[0]
    raise CheckpointError("\n".join(dict.fromkeys(map(str, errors))))


class _Planner:
    """Collects the faults of all tensors before it raises."""

    def __init__(self, recipe: Recipe, models: dict[str, Checkpoint]) -> None:
        self.recipe = recipe
        self.models = models
        stored = {label: tensor_kinds(model.tensors, model.config, model.equal) for label, model in models.items()}
        self.blocks = block_map(recipe, stored)
        self.kinds = {label: self.blocks.arranged(label, kinds) for label, kinds in stored.items()}
        self.shared = SharedTensors(models, self.kinds)
        self.choices = Choices(recipe, self.blocks)
        self.output = output_names(self.choices, self.kinds, self.shared)
        for label, kinds in stored.items():
            for name in self.blocks.unused(label, kinds):
                self.output.drop(name, [label], NO_ENTRY)
        notes, faults = encoder_decoder_limit(models["base"].config, needs_text=is_calibrated(recipe))
        self.faults = [*faults, *self.output.faults]
        self.notes = [*notes, *(remark for model in models.values() for remark in model.remarks)]
        self.notes += self.blocks.notes(recipe, stored)
        self.towers = tower_tensors(self.kinds)
        self.notes += tower_notes(self.towers)
        self.tokenizers = open_tokenizers({label: tokenizer_folder(model) for label, model in models.items()})
        self.tables: dict[str, TableRows] = {}  # the rows of the output's tensors with a row for each token
        self.vocabulary = Vocabulary("base")
        self.unoriented: dict[str, list[str]] = {}  # packed experts of which a stage must know more than shapes show
        self.stages = StageBinder(self.choices)
        self.examples: dict[Hashable, TensorPlan] = {}

    def plan(self) -> Plan:
        names = sorted(self.output.names, key=natural)
        originals = self.shared.originals(names)
        own_head = self.shared.own_head(names)
        if own_head is not None:
            self.kinds = {label: kinds.untied() for label, kinds in self.kinds.items()}
        numbers = number_layers(names, self.kinds_of) if max(self.stages.turns) > 1 else {}
        self._choose_tokenizer(name for name in names if name not in originals)
        planned: dict[str, TensorPlan] = {}
        for name in names:
            if name not in originals and (tensor := self._planned(name, numbers.get(name, 0))) is not None:
                planned[name] = tensor
        self.faults += [describe_unknown_axes(names, stage) for stage, names in self.unoriented.items()]
        settings = BlockSettings(self.blocks.blocks, {label: model.config for label, model in self.models.items()})
        base_config = settings.rewritten(self.shared.config(own_head))
        self.faults += settings.faults
        self.notes += settings.notes
        if self.faults:
            free_sizes = BLOCK_COUNTS if self.recipe.layers else ()
            faults = summarize_misfits(self.faults, self.models, free_sizes, self.recipe.experts)
            raise CheckpointError("\n".join(_shorten(faults)))
        for name, original in originals.items():
            planned[name] = replace(planned[original], name=name, parts=(), extra=(), tied_to=original)
        tensors = [planned[name] for name in names]
        config, tokenizer_label = self._config(base_config, tensors), self.vocabulary.tokenizer
        base, model, tokenizer = self.models["base"], self.models[tokenizer_label], self.tokenizers[tokenizer_label]
        return Plan(
            recipe=self.recipe,
            models=self.models,
            tensors=tuple(tensors),
            dropped=self.output.dropped,
            notes=(
                *self.notes,
                *self.shared.notes(),
                *self._idle_rules({**self.output.repeated, **originals}),
                *stage_notes(tensors),
                *self._aliased_orders(names),
                *config_differences(self.models),
                *tokenizer_differences(self.tokenizers, tokenizer_label, self.vocabulary.added),
                *uncopied_notes(base.directory, tokenizer.folder),
            ),
            config=config,
            tokenizer=tokenizer_label,
            side_files=plan_side_files(base, model, tokenizer, config, self.vocabulary.flags),
        )

    def _choose_tokenizer(self, names: Iterable[str]) -> None:
        """Decides the tokens of the output's rows before any tensor is planned."""
        tables = vocabulary_tables(self.choices, names, self.kinds, self.shared)
        drop, multiple = self.recipe.extra_rows == "drop", self.recipe.output.pad_rows_to or 1
        self.vocabulary, faults = choose_tokenizer(
            self.tokenizers,
            list(tables.values()),
            requested=self.recipe.named_tokenizer,
            drop=drop,
            sources={token: row.source for token, row in self.recipe.tokens.items()},
        )
        self.faults += faults or source_faults(self.recipe, self.vocabulary)
        self.tables = table_rows(tables, self.vocabulary, drop=drop, multiple=multiple)
        self.faults += [] if faults else row_faults(tables, self.tables)

    def kinds_of(self, name: str) -> TensorKinds:
        """The kinds of the first model that holds the tensor."""
        base = self.kinds["base"]
        return base if name in base.tensors else next(kinds for kinds in self.kinds.values() if name in kinds.tensors)

    # --- one tensor ---

    def _planned(self, name: str, number: int) -> TensorPlan | None:
        """The plan of a tensor, after that of its like: the same matrix of another expert of a mixture, for example."""
        key = None if self.recipe.rules or number or self.blocks.copies(name) else self._likeness(name)
        if key in self.examples:
            example = self.examples[key]
            return example.renamed(name, {label: self.blocks.stored_name(label, name) for label in example.reads})
        tensor = self._tensor(name, number)
        if key is not None and tensor is not None:
            self.examples[key] = tensor
        return tensor

    def _likeness(self, name: str) -> Hashable:
        """What decides the plan of a plain matrix in a block: its block, name without numbers, dtypes and shapes."""
        kinds = self.kinds["base"]
        unit = kinds.unit(name)
        if unit == name or kinds.conv1d or name in self.tables or self.shared.is_shared(name):
            return None
        infos = [info for kinds in self.kinds.values() if (info := kinds.tensors.get(name)) is not None]
        if len(infos) < len(self.kinds) or len(infos[0].shape) != 2:
            return None
        return unit, name[len(unit) :].translate(_NO_DIGITS), *[(info.dtype, info.shape) for info in infos]

    def _tensor(self, name: str, number: int) -> TensorPlan | None:
        kinds = self.kinds_of(name)
        kind = kinds.kind(name)
        choice = self.choices.of(name, kinds)
        reads = self._reads(name, choice)
        if name in self.towers and (choice is None or choice.use is None):
            return self._copy(name, kind, None, {"base": reads["base"]})
        if kind == "buffer" or (choice is not None and choice.use is not None):
            return self._copy(name, kind, choice, reads)
        if faults := missing_faults(name, reads, zero=self.recipe.missing == "zero"):
            self.faults += faults
            return None
        infos = {label: self.models[label].tensors[read] for label, read in reads.items() if read is not None}
        if faults := shape_faults(name, infos, is_table=name in self.tables):
            self.faults += faults
            return None
        shape = infos["base"].shape
        rows = self.tables.get(name) or TableRows.of(shape)
        self._note_rows(name, rows, infos)
        group = self.choices.group(choice)
        unit = kinds.unit(name)
        place = self.stages.place(name, kinds, choice, number)
        stages = self.stages.bound(choice, kind, unit, place)
        if stages[-1].entry.packing is not None and not rows.is_plain:
            self.faults.append(describe_unpackable(name, stages[-1].entry.name, rows))
            return None
        axis = kinds.input_axis(name)
        if axis is None and (stage := needs_input_axis(stages)) is not None:
            self.unoriented.setdefault(stage, []).append(name)
        return TensorPlan(
            name=name,
            info=Info(self._output_dtype(infos["base"]), rows.shape(shape)),
            kind=kind,
            unit=unit,
            place=place,
            group=group,
            stages=stages,
            source="base",
            reads=reads,
            item_bytes=sum(info.stored_size for info in infos.values()),
            parts=parts_of(name, kind, rows.merged_shape(shape), axis, stages),
            extra=rows.extra,
            row_maps=rows.row_maps,
            choice=self.choices.name(choice),
        )

    def _reads(self, name: str, choice: Rule | Layer | None) -> dict[str, str | None]:
        """The stored tensors that stand for a tensor of the output in the models that have a part in it."""
        stored = self.shared.stored_names(name)
        labels = self.choices.models(name, choice)
        names = {label: self.blocks.stored_name(label, name) for label in labels if stored[label] == name}
        return {label: names.get(label, stored[label]) for label in labels}

    def _copy(
        self, name: str, kind: str, choice: Rule | Layer | None, reads: Mapping[str, str | None]
    ) -> TensorPlan | None:
        source = "base" if choice is None or choice.use is None else choice.use
        read = reads.get(source)
        if read is None:
            self.faults.append(f"{source}: has no {name}, which {self.choices.name(choice)} takes from it")
            return None
        info = self.models[source].tensors[read]
        rows = self.tables.get(name) or TableRows.of(info.shape)
        # an expert's buffer is read only to tell whether it differs
        needed = {
            label: stored_name
            for label, stored_name in reads.items()
            if label == source or (kind == "buffer" and stored_name)
        }
        return TensorPlan(
            name=name,
            info=Info(self._output_dtype(info), rows.shape(info.shape)),
            kind=kind,
            unit=self.kinds_of(name).unit(name),
            place=Place(()),
            group=0,
            stages=(),
            source=source,
            reads=needed,
            item_bytes=sum(self._item_size(label, stored) for label, stored in needed.items() if stored),
            parts=parts_of(name, "copied", info.shape, COLUMNS, ()),
            extra=rows.extra,
            scale=self._scale(name, info),
        )

    def _scale(self, name: str, info: Info) -> float:
        """The factor of a copied tensor; those outside the blocks, and those that hold no floats, have none."""
        block = self.blocks.block(name)
        return float(block.layer.scale_of(name, block.depth)) if block is not None and info.is_float else 1.0

    def _item_size(self, label: str, stored: str) -> float:
        return self.models[label].tensors[stored].stored_size

    def _output_dtype(self, info: Info) -> str:
        """The dtype in which a tensor of an input is written."""
        dtype = self.recipe.output.dtype or (None if info.code is None else config_dtype(self.models["base"].config))
        return SAFETENSORS_NAMES[dtype] if dtype and info.is_float else info.dtype

    def _note_rows(self, name: str, rows: TableRows, infos: Mapping[str, Info]) -> None:
        """Notes the rows of a table that are dropped or not merged."""
        if name in self.tables:
            if self.recipe.extra_rows == "drop" and rows.merged < max(info.shape[0] for info in infos.values()):
                self.notes.append(f"{name}: rows from {rows.merged} on are dropped (extra_rows: drop)")
            self.notes += describe_rows(name, rows.extra, self.vocabulary.meaning)

    # --- the whole ---

    def _idle_rules(self, originals: Mapping[str, str]) -> Iterator[str]:
        """Notes on rules that match no tensor, or only further names of one that is merged under its first name."""
        all_names = dict.fromkeys(name for kinds in self.kinds.values() for name in kinds.tensors)
        names = [name for name in all_names if not self.blocks.copies(name)]
        for i, rule in enumerate(self.recipe.rules):
            rule_name = element_name("rules", i, rule.model_dump())
            matches = (name for name in names if rule.matches(name, self.kinds_of(name).kind(name)))
            if (name := next(matches, None)) is None:
                yield f"{rule_name} matches no tensor"
            elif name in originals and all(name in originals for name in matches):
                of = originals[name]
                yield f"{rule_name} has no effect: {name} is {of}, stored once more, and follows its rule"

    def _aliased_orders(self, names: Sequence[str]) -> list[str]:
        turns = dict.fromkeys(turn for turn in self.stages.turns if turn > 1)
        return [note for turn in turns for note in describe_aliasing(names, self.kinds_of, turn)]

    def _config(self, config: Mapping[str, Any], tensors: Iterable[TensorPlan]) -> dict[str, Any]:
        """Returns a config adjusted to the tensors: dtype, rows of the vocabulary, special tokens."""
        kinds, label = self.kinds["base"], self.vocabulary.tokenizer
        rows = next((tensor.info.shape[0] for tensor in tensors if tensor.name == kinds.embedding), None)
        if kinds.embedding is not None and rows == kinds.tensors[kinds.embedding].shape[0]:
            rows = None
        config = with_size(config, dtype=self.recipe.output.dtype, rows=rows)
        if label == "base":
            return config
        return with_special_ids(config, special_ids(self.tokenizers[label], self.models[label].config))


def _shorten(faults: list[str]) -> list[str]:
    """The first `FAULTS` faults, and how many there are beyond."""
    return faults if len(faults) <= FAULTS else [*faults[:FAULTS], f"... and {len(faults) - FAULTS} more like these"]
