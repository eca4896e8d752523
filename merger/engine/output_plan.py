"""The plan of a merge in the form of its output: a model as the planner has it, or an adapter for the base."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from merger._lazy import torch
from merger.checkpoint.adapter_config import CONFIG, lora_config
from merger.checkpoint.adapter_names import factor_names
from merger.checkpoint.tensor_info import SAFETENSORS_NAMES, Info
from merger.checkpoint.tensor_kinds import TensorKinds, tensor_kinds
from merger.engine.linear_modules import linear_modules
from merger.errors import CheckpointError, RecipeError
from merger.ops.factor_pair import FactorPair, factor_pair
from merger.ops.linalg import strongest
from merger.pipeline.registry import Entry
from merger.pipeline.stages import Bound
from merger.planning import planner
from merger.planning.parts import parts_of
from merger.planning.plan import Plan, TensorPlan
from merger.recipe.recipe import Recipe, portable_location

if TYPE_CHECKING:
    from torch import Tensor

_DTYPE = "float32"
"""The dtype of an adapter's factors where the recipe names none, as peft saves what it trained."""


def plan(
    recipe: Recipe | str | Path, *, offline: bool = False, headers_only: bool = True, trust_remote_code: bool = False
) -> Plan:
    """Opens the inputs' headers and plans every tensor of the output; writes nothing.

    ``recipe`` may be the path of its file. Without ``headers_only`` a Hub repository's weights are downloaded after the
    plan succeeds. ``trust_remote_code`` matters to an adapter, for which the base is built without its weights. Raises
    CheckpointError for inputs that do not fit together, and RecipeError for a form that cannot hold the merge.
    """
    model_plan = planner.plan(recipe, offline=offline, headers_only=headers_only)
    if model_plan.recipe.output.form == "model":
        return model_plan
    try:
        return _adapter_plan(model_plan, trust_remote_code=trust_remote_code)
    except BaseException:
        model_plan.close()
        raise


def _adapter_plan(model_plan: Plan, *, trust_remote_code: bool) -> Plan:
    """The same merge, of which the changes of linear layers are written as factors."""
    recipe, base = model_plan.recipe, model_plan.base
    _check_vocabulary(model_plan)
    modules = linear_modules(base, trust_remote_code=trust_remote_code)
    kinds = tensor_kinds(base.tensors, base.config, base.equal)
    form = _AdapterForm(model_plan, modules, kinds, SAFETENSORS_NAMES[recipe.output.dtype or _DTYPE])
    tensors = tuple(form.of(tensor) for tensor in model_plan.tensors)
    ranks = {modules[tensor.name]: min(shape) for tensor, shape in _factor_shapes(tensors)}
    if not ranks:
        raise CheckpointError("no expert changes a linear layer, so an adapter would be empty; write `form: model`")
    source, on_hub = portable_location(recipe.base.model), base.commit is not None
    config = lora_config(source, ranks, on_hub=on_hub, fan_in_fan_out=bool(kinds.conv1d))
    return replace(model_plan, tensors=tensors, side_files={CONFIG: config})


def _factor_shapes(tensors: Sequence[TensorPlan]) -> Iterator[tuple[TensorPlan, tuple[int, ...]]]:
    """Each tensor with factors, and the shape [rank in] of its lora_A."""
    return ((tensor, next(iter(tensor.factors.values())).shape) for tensor in tensors if tensor.factors)


def _check_vocabulary(model_plan: Plan) -> None:
    """RecipeError if the merge has other tokens than the base, which an adapter cannot hold."""
    recipe, base = model_plan.recipe, model_plan.base
    changed = next(
        (
            tensor.name
            for tensor in model_plan.tensors
            if tensor.row_maps or (tensor.name in base.tensors and tensor.info.shape != base.tensors[tensor.name].shape)
        ),
        None,
    )
    if changed is not None or model_plan.tokenizer != "base":
        reason = f"{changed} has other rows" if changed else f"the tokenizer is that of {model_plan.tokenizer}"
        message = f"an adapter keeps the tokens of the base, but {reason}; write `tokenizer: base`, or `form: model`"
        raise RecipeError(recipe.fault(("output", "form"), message))


@dataclass(frozen=True)
class _AdapterForm:
    """The adapter's part in each tensor of a merge."""

    model_plan: Plan
    modules: Mapping[str, str]  # the linear layers of the model in memory, by the checkpoint's weight names
    kinds: TensorKinds
    dtype: str  # of the factors, as safetensors writes it
    _stages: dict[tuple[int, int], tuple[Bound, ...]] = field(default_factory=dict)

    def of(self, tensor: TensorPlan) -> TensorPlan:
        """The operation on a tensor: its change is factored, left out and measured, or known to be none."""
        may_change = any(rank != 0 for rank in self._change_ranks(tensor).values())
        if not tensor.stages or tensor.tied_to is not None or not (may_change or tensor.ranked):
            return replace(tensor, stages=(), parts=(), extra=(), factors={})
        return self._factored(tensor) if may_change and tensor.name in self.modules else replace(tensor, factors={})

    def _change_ranks(self, tensor: TensorPlan) -> dict[str, int | None]:
        """By expert, the largest rank that the change of a tensor can have; None where headers do not bound it."""
        models, base = self.model_plan.models, self.model_plan.base
        reads = ((label, tensor.reads[label]) for label in tensor.place.experts)
        base_name = tensor.reads["base"]
        assert base_name is not None, "the planner refuses tensors that the base lacks"
        return {label: 0 if name is None else models[label].change_rank(name, base, base_name) for label, name in reads}

    def _factored(self, tensor: TensorPlan) -> TensorPlan:
        kind, shape = tensor.kind, tensor.info.shape
        (part,) = parts_of(tensor.name, kind, shape, self.kinds.input_axis(tensor.name), (_factoring(1, self.dtype),))
        rank = min(self._rank(tensor), part.rows, part.columns)
        down, up = factor_names(self.modules[tensor.name])
        factors = {down: Info(self.dtype, (rank, part.columns)), up: Info(self.dtype, (part.rows, rank))}
        return replace(tensor, stages=self._with_factoring(tensor.stages, rank), parts=(part,), factors=factors)

    def _rank(self, tensor: TensorPlan) -> int:
        """The recipe's rank, or the sum of the ranks of all experts' changes, which holds every sum of them."""
        recipe = self.model_plan.recipe
        if recipe.output.rank is not None:
            return recipe.output.rank
        ranks = self._change_ranks(tensor)
        unbounded = [label for label, rank in ranks.items() if rank is None]
        if unbounded:
            message = (
                f"needs a rank, as in `rank: 64`, since {unbounded[0]} is no adapter on the base "
                f"that bounds the rank of its change of {tensor.name}"
            )
            raise RecipeError(recipe.fault(("output",), message))
        return sum(rank for rank in ranks.values() if rank is not None)

    def _with_factoring(self, stages: tuple[Bound, ...], rank: int) -> tuple[Bound, ...]:
        """The stages and the factoring: one tuple for all tensors that share their stages."""
        key = id(stages), rank
        if key not in self._stages:
            self._stages[key] = (*stages, _factoring(rank, self.dtype))
        return self._stages[key]


def _factoring(rank: int, dtype: str) -> Bound:
    """The last stage of a matrix of an adapter."""
    return Bound(_FACTORING, {"rank": rank, "dtype": dtype})


def _factor(deltas: Tensor, *, rank: int, dtype: str) -> FactorPair:
    """Cuts a merged task vector [r c] to its ``rank`` strongest directions."""
    names = {stored: name for name, stored in SAFETENSORS_NAMES.items()}
    return factor_pair(deltas, strongest(deltas, rank), min_rank=rank, dtype=getattr(torch, names[dtype]))


_FACTORING = Entry("adapter", "pack", _factor, takes=lambda **_: "matrix", exact=False)
