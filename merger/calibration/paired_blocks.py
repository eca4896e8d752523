"""Two models on the same text, block by block: a merge in progress, and the expert that it is to answer like.

FeatCal, https://arxiv.org/abs/2605.13030, section 4: the block that is to be merged is observed as a draft, behind the
merged blocks, beside the expert's own block behind the expert's own blocks.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from merger.calibration.block_runner import (
    EMBEDDING,
    BlockRunner,
    HiddenStates,
    Results,
    UnsupportedBlocks,
    batch_counter,
    check_blocks_are_separate,
    run_batch,
    run_block,
)
from merger.calibration.input_observer import InputObserver, RowObserver
from merger.calibration.observed_model import ObservedModel
from merger.errors import CheckpointError

if TYPE_CHECKING:
    from merger.calibration.moments import Moments
    from merger.calibration.samples import Batch
    from merger.calibration.settings import Settings
    from merger.calibration.weights import TensorSource
    from merger.checkpoint.checkpoint import Checkpoint


def collect_pairs(
    expert: Checkpoint,
    draft: TensorSource,
    merged: TensorSource,
    batches: Sequence[Batch],
    settings: Settings,
    *,
    device: str | torch.device,
    hidden_memory: int | None,
    trust_remote_code: bool,
    notice: Callable[[str], None],
    progress: Callable[[int, int], None],
) -> Iterator[tuple[str, dict[str, Moments]]]:
    """Yields each block's name with the moments of the merge's inputs, and their products with the expert's.

    ``draft`` has the blocks as they are observed, ``merged`` as hidden states pass through them once the caller asks
    for the next block. Modules outside the blocks come last, under the name ``""``, without products. Raises
    CheckpointError where blocks cannot be run one at a time, or an activation is not finite.
    """

    def model(outer_weights: TensorSource, observer: Callable[..., InputObserver]) -> ObservedModel:
        arguments = batches, settings, device, None, trust_remote_code, functools.cache(notice)
        return ObservedModel(expert, outer_weights, *arguments, observer)

    teacher = model(expert, RowObserver)
    assert isinstance(teacher.observer, RowObserver)
    student = model(merged, functools.partial(InputObserver, gram=True, teacher=teacher.observer))
    try:
        yield from _run_pairs(teacher, student, draft, merged, hidden_memory, progress)
    except UnsupportedBlocks as error:
        raise CheckpointError(
            f"{expert.label}: its blocks cannot be run one at a time ({error}), so there are no merged ones before "
            "the next; use regmean with inputs: own"
        ) from None


def _run_pairs(
    teacher: ObservedModel,
    student: ObservedModel,
    draft: TensorSource,
    merged: TensorSource,
    hidden_memory: int | None,
    progress: Callable[[int, int], None],
) -> Results:
    for model in (teacher, student):
        check_blocks_are_separate(model)
    memory = None if hidden_memory is None else hidden_memory // 2
    with tempfile.TemporaryDirectory(prefix="merger-") as folder:
        runners = {}
        for role, model in (("teacher", teacher), ("student", student)):
            states = Path(folder) / role
            states.mkdir()
            runners[role] = BlockRunner(model.blocks, model.observer, HiddenStates(memory, states))
            for number, batch in enumerate(model.batches):
                run_batch(model, runners[role], EMBEDDING, number, batch, "both")
        count_batch = batch_counter(2 * len(student.block_names) * len(student.batches), progress)
        for block, name in enumerate(student.block_names):
            for model, source in ((teacher, teacher.weights), (student, draft)):
                model.randomise_embedding(seed=block)
                model.loader.load(name, source)
            for number, batch in enumerate(student.batches):
                run_batch(teacher, runners["teacher"], block, number, batch, "both")
                run_batch(student, runners["student"], block, number, batch, "observe")
                count_batch()
            teacher.observer.begin(student.batches[0], teacher.loader.device)  # its last rows belong to no other batch
            moments = student.take(name)
            for model in (teacher, student):
                model.loader.drop(name)
            yield student.unit_name(name), moments
            run_block(student, runners["student"], block, merged, "carry", count_batch)
            student.loader.drop(name)
        yield "", student.outer_moments()
