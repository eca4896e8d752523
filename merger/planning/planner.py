"""The plan: what will be done to every tensor, from headers and configs alone."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from merger.checkpoint.anatomy import Anatomy, study, text_config
from merger.checkpoint.checkpoint import Checkpoint
from merger.checkpoint.opening import open_checkpoint
from merger.checkpoint.packed_experts import COLUMNS
from merger.checkpoint.safetensors_header import SAFETENSORS_NAMES, Info
from merger.errors import CheckpointError, RecipeError
from merger.pipeline.parameters import Number, Place, resolve
from merger.pipeline.registry import Stage, entry_of
from merger.pipeline.stages import Bound, bind, expand, natural
from merger.planning.differences import differences
from merger.planning.linear_order import describe_aliasing, linear_turns, number_layers
from merger.planning.parts import describe_unknown_axes, needs_input_axis, parts_of
from merger.planning.plan import ExtraRows, Plan, TensorPlan
from merger.recipe.recipe import Recipe, Rule


def plan(recipe: Recipe, *, offline: bool = False, headers_only: bool = True) -> Plan:
    """Opens the inputs' headers and decides what happens to every tensor; nothing is written.

    With ``headers_only`` a Hub repository's weights are not downloaded. Raises CheckpointError for
    inputs that do not fit together, all misfits of a kind at once.
    """
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
    """Opens the base and the experts, in recipe order."""
    models: dict[str, Checkpoint] = {}
    for label, source in {"base": recipe.base, **recipe.experts}.items():
        models[label] = open_checkpoint(
            source.model,
            source.adapter,
            label=label,
            folder=recipe.folder,
            offline=offline,
            headers_only=headers_only,
            base=models.get("base"),
        )
    return models


class _Planner:
    """Gathers what is wrong over all tensors before it complains."""

    def __init__(self, recipe: Recipe, models: dict[str, Checkpoint]) -> None:
        self.recipe = recipe
        self.models = models
        self.anatomies = {label: study(model.tensors, model.config) for label, model in models.items()}
        self.anatomy = self.anatomies["base"]
        self.faults: list[str] = []
        self.notes: list[str] = []
        self.dropped: dict[str, dict[str, str]] = {label: {} for label in models}
        self.unoriented: dict[str, list[str]] = {}  # packed experts of which a stage must know more than shapes show
        self.head: str | None = None  # the output's own head, though the base ties its own
        # a mixture of experts has tens of thousands of tensors, but only hundreds of places and bound stages
        self.turns = [linear_turns(choice.stages, len(recipe.experts)) for choice in recipe.choices()]
        self.places: dict[tuple[str, int], Place] = {}
        self.bound: dict[tuple[int, str, str, int], tuple[Bound, ...]] = {}

    def plan(self) -> Plan:
        names = sorted(self._output_names(), key=natural)
        twin = self._twin()
        heads = {anatomy.head for anatomy in self.anatomies.values()} - {twin}
        self.head = next((name for name in names if name in heads), None) if self.anatomy.tied else None
        numbers = number_layers(names, self.anatomy_of) if max(self.turns) > 1 else {}
        planned: dict[str, TensorPlan] = {}
        for name in names:
            if name != twin and (tensor := self._tensor(name, numbers.get(name, 0))) is not None:
                planned[name] = tensor
        self.faults += [describe_unknown_axes(names, stage) for stage, names in self.unoriented.items()]
        if self.faults:
            raise CheckpointError("\n".join(_shortened(self.faults)))
        if twin is not None and self.anatomy.embedding is not None:
            embedding = planned[self.anatomy.embedding]
            planned[twin] = replace(embedding, name=twin, parts=(), extra=(), tied_to=embedding.name)
        tensors = [planned[name] for name in names]
        self._unmatched_rules(tensors)
        tokenizer = self.recipe.output.tokenizer or self._longest_vocabulary(tensors)
        return Plan(
            recipe=self.recipe,
            models=self.models,
            tensors=tuple(tensors),
            dropped=self.dropped,
            notes=(*self.notes, *_remarks(tensors), *self._aliased_orders(names), *differences(self.models)),
            config=self._config(tensors),
            tokenizer=tokenizer,
        )

    # --- names ---

    def _output_names(self) -> Iterator[str]:
        """The base's tensors, the head of an expert that untied it, and what rules take from an expert."""
        yield from self.anatomy.tensors
        experts = list(self.models.items())[1:]
        extra = dict.fromkeys(n for _, m in experts for n in m.tensors if n not in self.anatomy.tensors)
        for name in extra:
            holders = [label for label, model in experts if name in model.tensors]
            rule = self._rule(name, self.anatomies[holders[0]])
            untied = [label for label in holders if name == self.anatomies[label].head]
            if rule is not None and rule.use in holders:
                yield name
            elif rule is not None and rule.use == "base":
                self._drop(name, holders, f"rule {self.recipe.rules.index(rule) + 1} keeps the base, which has none")
            elif untied and self.anatomy.tied and any(not self.anatomies[label].tied for label in untied):
                yield name
            elif untied and all(self.anatomies[label].tied for label in untied):
                self._drop(name, holders, "its config says it is tied to the embedding")
            else:
                self.faults.append(
                    f"{holders[0]}: has {name}, which the base lacks; leave it out with a rule "
                    f"{{tensors: '^{name}$', use: base}}, or take it with use: {holders[0]}"
                )

    def _drop(self, name: str, holders: Iterable[str], why: str) -> None:
        for label in holders:
            self.dropped[label][name] = why

    def anatomy_of(self, name: str) -> Anatomy:
        """The anatomy of the first model that holds the tensor; tied only where the output is."""
        anatomy = next(a for a in self.anatomies.values() if name in a.tensors)
        return anatomy if self.head is None else replace(anatomy, tied=False)

    def _twin(self) -> str | None:
        """The head that the base stores though it is its embedding, unless an expert has a head of its own."""
        head, embedding = self.anatomy.head, self.anatomy.embedding
        if head is None or embedding is None or not self.anatomy.tied:
            return None
        same = all(self._stands_for(label, head) == self._stands_for(label, embedding) for label in self.models)
        return head if same else None

    def _stands_for(self, label: str, name: str) -> str | None:
        """The tensor of a model that is to be read for the output tensor ``name``."""
        anatomy = self.anatomies[label]
        if name == anatomy.head and anatomy.tied:
            return anatomy.embedding
        if name in anatomy.tensors:
            return name
        head = next((a.head for a in self.anatomies.values() if a.head), None)
        return anatomy.embedding if name == head and anatomy.tied else None

    def _rule(self, name: str, anatomy: Anatomy) -> Rule | None:
        return next((rule for rule in self.recipe.rules if rule.matches(name, anatomy.kind(name))), None)

    # --- one tensor ---

    def _tensor(self, name: str, number: int) -> TensorPlan | None:
        anatomy = self.anatomy_of(name)
        kind = anatomy.kind(name)
        rule = self._rule(name, anatomy)
        source = rule.use if rule is not None and rule.use else "base"
        copied = kind == "buffer" or (rule is not None and rule.use is not None)
        reads = {label: self._stands_for(label, name) for label in self.models}
        if copied:
            return self._copy(name, kind, source, reads)
        if not self._complete(name, reads):
            return None
        infos = {label: self.models[label].tensors[read] for label, read in reads.items() if read is not None}
        fitted = self._fit(name, kind, infos)
        if fitted is None:
            return None
        shape, common, extra = fitted
        group = 0 if rule is None else self.recipe.rules.index(rule) + 1
        unit = anatomy.unit(name)
        place = self._place(name, unit, anatomy, number % self.turns[group])
        stages = self._stages(group, kind, unit, place)
        if extra and stages[-1].entry.packing is not None:
            pack, whose = stages[-1].entry.name, " and ".join(extra[-1].models)
            self.faults.append(f"{name}: {pack} cannot hold rows that only {whose} has; set extra_rows: drop")
            return None
        dtype = SAFETENSORS_NAMES[self.recipe.output.dtype] if self.recipe.output.dtype else infos["base"].dtype
        axis, looking = anatomy.input_axis(name), needs_input_axis(stages)
        if axis is None and looking is not None:
            self.unoriented.setdefault(looking, []).append(name)
        return TensorPlan(
            name=name,
            info=Info(dtype, shape),
            kind=kind,
            unit=unit,
            place=place,
            group=group,
            stages=stages,
            source="base",
            reads=reads,
            parts=parts_of(name, kind, common, axis, stages),
            extra=extra,
        )

    def _place(self, name: str, unit: str, anatomy: Anatomy, linear: int) -> Place:
        """Where a tensor stands: the same object for all tensors of a block."""
        if (unit, linear) not in self.places:
            depth, experts = anatomy.depth(name), self.recipe.experts
            weights = tuple(resolve(Number, expert.weight, Place((), depth=depth)) for expert in experts.values())
            self.places[unit, linear] = Place(tuple(experts), weights, depth, anatomy.rotation(name), linear)
        return self.places[unit, linear]

    def _stages(self, group: int, kind: str, unit: str, place: Place) -> tuple[Bound, ...]:
        """The stages that the method of a group has for tensors of a kind in a block, bound once for all of them."""
        key = group, kind, unit, place.linear
        if key not in self.bound:
            choice = self.recipe.rules[group - 1] if group else self.recipe
            self.bound[key] = _bind(choice.stages, kind, place)
        return self.bound[key]

    def _copy(self, name: str, kind: str, source: str, reads: Mapping[str, str | None]) -> TensorPlan | None:
        read = reads[source]
        if read is None:
            self.faults.append(f"{source}: has no {name}, which a rule takes from it")
            return None
        info = self.models[source].tensors[read]
        dtype = (
            SAFETENSORS_NAMES[self.recipe.output.dtype] if self.recipe.output.dtype and info.is_float else info.dtype
        )
        # an expert's buffer is read only to tell whether it differs
        needed = {label: each for label, each in reads.items() if label == source or (kind == "buffer" and each)}
        return TensorPlan(
            name=name,
            info=Info(dtype, info.shape),
            kind=kind,
            unit=self.anatomy_of(name).unit(name),
            place=Place(()),
            group=0,
            stages=(),
            source=source,
            reads=needed,
            parts=parts_of(name, "copied", info.shape, COLUMNS, ()),
        )

    def _complete(self, name: str, reads: Mapping[str, str | None]) -> bool:
        absent = [label for label, read in reads.items() if read is None]
        if not absent or ("base" not in absent and self.recipe.missing == "zero"):
            return True
        for label in absent:
            self.faults.append(
                f"{label}: has no {name}; set `missing: zero` to leave such tensors at the base, "
                f"or name them in a rule {{tensors: ..., use: base}}"
            )
        return False

    def _fit(
        self, name: str, kind: str, infos: Mapping[str, Info]
    ) -> tuple[tuple[int, ...], tuple[int, ...], tuple[ExtraRows, ...]] | None:
        """The output's shape, the shape that all models share, and rows beyond that."""
        shapes = {label: info.shape for label, info in infos.items()}
        base = shapes["base"]
        whole = [label for label, info in infos.items() if not info.is_float]
        if whole:
            self.faults.append(f"{whole[0]}: {name} holds {infos[whole[0]].dtype}, but {infos['base'].dtype} in base")
            return None
        if len(set(shapes.values())) == 1:
            return base, base, ()
        vocabulary = all(self.anatomies[label].has_vocabulary(self._stands_for(label, name) or "") for label in infos)
        if not vocabulary or len({shape[1:] for shape in shapes.values()}) > 1:
            self.faults += [
                f"{label}: {name} is {list(shape)}, but {list(base)} in base"
                for label, shape in shapes.items()
                if shape != base
            ]
            return None
        common = min(shape[0] for shape in shapes.values())
        if self.recipe.extra_rows == "drop":
            self.notes.append(f"{name}: rows from {common} on are dropped (extra_rows: drop)")
            return (common, *base[1:]), (common, *base[1:]), ()
        extra = tuple(_extra_rows(common, {label: shape[0] for label, shape in shapes.items()}))
        self.notes += [
            f"{name}: rows {each.start} to {each.stop - 1} are those of {' and '.join(each.models)}" for each in extra
        ]
        return (extra[-1].stop, *base[1:]), (common, *base[1:]), extra

    # --- the whole ---

    def _unmatched_rules(self, tensors: list[TensorPlan]) -> None:
        names = {name for anatomy in self.anatomies.values() for name in anatomy.tensors}
        for i, rule in enumerate(self.recipe.rules):
            if not any(rule.matches(name, self.anatomy_of(name).kind(name)) for name in names):
                self.notes.append(f"rule {i + 1} ({rule.tensors or rule.kinds}) matches no tensor")

    def _aliased_orders(self, names: Sequence[str]) -> list[str]:
        turns = dict.fromkeys(turn for turn in self.turns if turn > 1)
        return [note for turn in turns for note in describe_aliasing(names, self.anatomy_of, turn)]

    def _longest_vocabulary(self, tensors: list[TensorPlan]) -> str:
        """The base's tokenizer, unless an expert's rows were added to the vocabulary."""
        for tensor in tensors:
            if tensor.kind in ("embedding", "tied", "head") and tensor.extra:
                return next(iter(tensor.extra[-1].models))
        return "base"

    def _config(self, tensors: list[TensorPlan]) -> dict[str, Any]:
        """The base's config, agreeing with the tensors: dtype, tied head, rows of the vocabulary."""
        config = dict(self.models["base"].config)
        inner = dict(text_config(config)) if text_config(config) is not config else config
        by_name = {tensor.name: tensor for tensor in tensors}
        embedding = by_name.get(self.anatomy.embedding or "")
        if embedding is not None and "vocab_size" in inner and embedding.info.shape[0] != self._rows("base"):
            inner["vocab_size"] = embedding.info.shape[0]
        if self.head is not None:
            inner["tie_word_embeddings"] = False
            config |= {key: False for key in config if key == "tie_word_embeddings"}
        if self.recipe.output.dtype:
            for key in {"dtype", "torch_dtype"} & set(config) or {"dtype"}:
                config[key] = self.recipe.output.dtype
        if inner is not config:
            config["text_config"] = inner
        return config

    def _rows(self, label: str) -> int:
        name = self.anatomies[label].embedding
        return self.anatomies[label].tensors[name].shape[0] if name else 0


def _bind(chosen: Sequence[Stage], kind: str, place: Place) -> tuple[Bound, ...]:
    """The stages of a method for tensors of a kind at a place; RecipeError names the method whose parameters clash."""
    try:
        return tuple(bind(each, place) for stage in chosen for each in expand(stage, kind, place.experts))
    except ValueError as error:
        raise RecipeError(f"{entry_of(chosen[0].func).name}: {error}") from None


def _remarks(tensors: Iterable[TensorPlan]) -> Iterable[str]:
    """What there is to say of the stages' parameters, each thing once."""
    said: dict[str, None] = {}
    for tensor in {(id(tensor.stages), tensor.place.weights): tensor for tensor in tensors}.values():
        remarks = {
            stage.entry.name: stage.entry.remark(len(tensor.place.experts), **stage.values) for stage in tensor.stages
        }
        said |= dict.fromkeys(f"{name}: {remark}" for name, remark in remarks.items() if remark)
        if (
            remarks
            and set(tensor.place.weights) != {1}
            and not any("weight" in stage.values for stage in tensor.stages)
        ):
            said[f"{', '.join(remarks)}: takes no weight, so the experts' own have no effect"] = None
    return said


def _extra_rows(common: int, rows: Mapping[str, int]) -> Iterator[ExtraRows]:
    """Beyond the rows that all have: experts that have more, or the base where no expert does."""
    start = common
    for stop in sorted(set(rows.values()) - {common}):
        experts = tuple(label for label, n in rows.items() if n >= stop and label != "base")
        yield ExtraRows(start, stop, experts or ("base",))
        start = stop


def _shortened(faults: list[str], most: int = 20) -> list[str]:
    return faults if len(faults) <= most else [*faults[:most], f"... and {len(faults) - most} more like these"]


# --- what differs between the models --------------------------------------------------------------
