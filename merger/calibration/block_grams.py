"""Gram matrices of each block's inputs, made for all experts together while the model is merged."""

from __future__ import annotations

from collections.abc import Collection, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING

from merger.calibration import batches
from merger.calibration import statistics_files as files
from merger.calibration.input_fit import check_blocks
from merger.calibration.moments import Moments, Statistics
from merger.calibration.origins import fingerprint
from merger.calibration.statistics import expert_blocks, expert_samples
from merger.checkpoint.cache import cache_folder
from merger.errors import CheckpointError
from merger.options import RunOptions
from merger.planning.plan import Plan, TensorPlan
from merger.planning.row_map import Run
from merger.recipe.calibration_faults import methods_behind_merge

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from merger.calibration.paired_blocks import Pair
    from merger.calibration.provider import MergedTensors, PartialMerge
    from merger.calibration.samples import Batch, Samples
    from merger.calibration.settings import Settings
    from merger.pipeline.inputs import Stream


_Blocks = Generator[tuple[str, dict[str, Moments]], None, None]
"""The moments of an expert's blocks, one after the other, each with the block's name."""


class PartlyMergedModel:
    """The merged model under an expert's names; tensors that are not merged yet are the expert's own."""

    def __init__(self, plan: Plan, expert: str, merged: MergedTensors) -> None:
        self._model, self._merged = plan.models[expert], merged
        originals = {tensor.name: tensor for tensor in plan.tensors if tensor.tied_to is None}
        stored = {name: tensor for tensor in originals.values() if (name := tensor.reads.get(expert)) is not None}
        self._tensors = originals | stored  # a copy of another model's tensor is not read of the expert
        self._expert = expert

    def read(self, name: str) -> Tensor:
        """Returns a whole tensor in the expert's own shape and by its own token ids.

        Tensors and rows of tokens that the output lacks stay the expert's.
        """
        tensor = self._tensors.get(name)
        merged = None if tensor is None else self._merged(tensor.name)
        if tensor is None or merged is None:
            return self._model.read(name)
        row_map = tensor.row_maps.get(self._expert)
        if merged.shape == self._model.tensors[name].shape and row_map is None:
            return merged
        values = self._model.read(name).to(merged.dtype, copy=True)
        runs = [Run(0, min(len(values), len(merged)), 0)] if row_map is None else row_map.runs
        for run in runs:
            values[run.first : run.last] = merged[run.start : run.stop]
        return values


class Drafts:
    """The tensors of a merge in progress, with drafts of those that wait for inputs of their block.

    That is also so for tensors that an earlier run has completed, so that a resumed run ends in the same bytes.
    ``outer`` names the waiting tensors outside the blocks: they are merged after the last block, but a table that the
    head shares with the embedding is needed before the first.
    """

    def __init__(self, merge: PartialMerge, outer: Collection[str]) -> None:
        self._merge, self._outer = merge, outer
        self._drafts: dict[str, Tensor | None] = {}

    def read(self, name: str) -> Tensor | None:
        """Returns the draft of a tensor, which is made once, or a tensor that waits for no block."""
        if name not in self._drafts:
            self._drafts[name] = self._merge.draft(name)
        draft = self._drafts[name]
        return self._merge.read(name) if draft is None else draft

    def read_behind(self, name: str) -> Tensor | None:
        """Returns a tensor as later blocks meet it: merged, or drafted where it waits for the last of them."""
        return self.read(name) if name in self._outer else self._merge.read(name)

    def clear(self) -> None:
        """Drops the drafts of a block."""
        self._drafts.clear()


def grams(
    plan: Plan, options: RunOptions, hidden_memory: int | None, merge: PartialMerge, stream: Stream
) -> Iterator[tuple[list[TensorPlan], Mapping[str, Statistics]]]:
    """Yields the tensors that take Gram matrices, with these matrices; all experts advance together, block by block.

    A block's matrices are dropped when the caller asks for the next block. Where text goes through merged blocks,
    ``merge`` has the tensors of these blocks by then. Tensors that no input reached come last, without matrices.
    Raises as `calibrate` does.
    """
    waiting = [tensor for tensor in plan.tensors if tensor.lockstep]
    experts = tuple(plan.recipe.experts) if waiting else ()
    drafts = Drafts(merge, {tensor.name for tensor in waiting if tensor.follows_blocks})
    memory = hidden_memory and hidden_memory // len(plan.recipe.experts)
    gram_folders = _gram_folders(plan, options) if waiting and stream == "own" else {}
    sample_sets = {name: expert_samples(plan, name, options) for name in experts if name not in gram_folders}
    arguments = {name: (plan, name, *sample_sets[name], options, memory) for name in sample_sets}
    with ExitStack() as stack:  # where one expert's blocks fail, those of the others end too
        streams: dict[str, _Blocks] = {}
        for name in experts:
            if name in gram_folders:
                blocks = files.blocks(gram_folders[name], checkpoint=fingerprint(plan.models[name]))
                streams[name] = check_blocks(plan, name, blocks)
            elif stream == "draft":
                streams[name] = _draft_blocks(*arguments[name], drafts)
            elif stream == "merged":
                streams[name] = _blocks_behind_merge(*arguments[name], drafts)
            else:
                streams[name] = expert_blocks(*arguments[name], gram=True)
            stack.enter_context(closing(streams[name]))
        for block in together(waiting, streams):
            drafts.clear()
            yield block


def together(
    tensors: Sequence[TensorPlan], streams: Mapping[str, Iterator[tuple[str, dict[str, Moments]]]]
) -> Iterator[tuple[list[TensorPlan], Mapping[str, Statistics]]]:
    """Yields the tensors whose moments all experts' ``streams`` have given, with the moments by expert.

    Tensors that no input reached come last, without moments.
    """
    waiting = list(tensors)
    moments_by_expert: dict[str, dict[str, Moments]] = {name: {} for name in streams}
    for next_blocks in zip_longest(*streams.values(), fillvalue=("", {})):
        for expert_moments, (_, moments) in zip(moments_by_expert.values(), next_blocks, strict=True):
            expert_moments.update(moments)
        complete_tensors = [
            t for t in waiting if all(t.reads[name] in moments_by_expert[name] for name in t.place.experts)
        ]
        yield complete_tensors, moments_by_expert
        for tensor in complete_tensors:
            waiting.remove(tensor)
            for name, expert_moments in moments_by_expert.items():
                expert_moments.pop(tensor.reads.get(name) or "", None)
    yield waiting, {name: {} for name in moments_by_expert}


def _blocks_behind_merge(
    plan: Plan,
    name: str,
    key: files.StatisticsKey,
    samples: Samples,
    options: RunOptions,
    hidden_memory: int | None,
    drafts: Drafts,
) -> _Blocks:
    merged = PartlyMergedModel(plan, name, drafts.read_behind)
    with _separate_blocks(plan, name):
        yield from expert_blocks(plan, name, key, samples, options, hidden_memory, gram=True, merged_weights=merged)


def _draft_blocks(
    plan: Plan,
    name: str,
    key: files.StatisticsKey,
    samples: Samples,
    options: RunOptions,
    hidden_memory: int | None,
    drafts: Drafts,
) -> _Blocks:
    with pair_with_expert(plan, name, batches(samples.tokens), key.settings, options, hidden_memory, drafts) as pair:
        yield from pair_blocks(plan, name, pair, options)


def pair_blocks(plan: Plan, expert: str, pair: Pair, options: RunOptions) -> _Blocks:
    """Yields the moments of an expert's pair block by block; raises as `pair_with_expert` does."""
    with _separate_blocks(plan, expert):
        yield from check_blocks(plan, expert, pair.blocks(partial(options.progress, f"calibrating {expert}")))


@contextmanager
def pair_with_expert(
    plan: Plan,
    name: str,
    text: Sequence[Batch],
    settings: Settings,
    options: RunOptions,
    hidden_memory: int | None,
    drafts: Drafts,
    *,
    gram: bool = True,
    dtype: torch.dtype | None = None,
) -> Iterator[Pair]:
    """Opens the merge in progress and an expert, both on the expert's text, by `open_pair`.

    Raises CheckpointError where blocks cannot be run one at a time, or an activation is not finite.
    """
    from merger.calibration.paired_blocks import open_pair  # it imports torch

    draft, merged = (PartlyMergedModel(plan, name, read) for read in (drafts.read, drafts.read_behind))
    arguments = plan.models[name], draft, merged, text, settings, options
    with (
        _separate_blocks(plan, name),
        open_pair(*arguments, hidden_memory=hidden_memory, gram=gram, dtype=dtype) as pair,
    ):
        yield pair


@contextmanager
def _separate_blocks(plan: Plan, expert: str) -> Iterator[None]:
    """Turns UnsupportedBlocks of an expert's model into a CheckpointError that says what to write in the recipe."""
    from merger.calibration.block_runner import UnsupportedBlocks  # it imports torch

    try:
        yield
    except UnsupportedBlocks as error:
        method = methods_behind_merge(plan.recipe)[0]
        remedy = (
            "give regmean the parameter inputs: own"
            if method == "regmean"
            else f"take the method regmean in place of {method}"
        )
        raise CheckpointError(
            f"{expert}: its blocks cannot be run one at a time ({error}), so none can be merged before the next one "
            f"runs, as {method} needs it; {remedy}"
        ) from None


def _gram_folders(plan: Plan, options: RunOptions) -> dict[str, Path]:
    """Returns the folders of Gram matrices that the recipe names, or that `keep_grams` made from the same text."""
    calibration = plan.recipe.calibration
    assert calibration is not None, "the recipe was checked for it"
    folders = {}
    for name in plan.recipe.experts:
        if name in calibration.stats:
            folders[name] = plan.recipe.folder / Path(calibration.stats[name]).expanduser()
        else:
            key, _ = expert_samples(plan, name, options)
            folder = cache_folder() / key.folder_name()
            if files.is_complete(folder):
                folders[name] = folder
    return folders
