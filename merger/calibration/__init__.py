"""Calibration: what enters each matrix of a model when text goes through it, found one block at a time."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Container, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from merger.calibration.moments import Moments
from merger.calibration.samples import Batch, Samples, batches
from merger.calibration.settings import Settings
from merger.errors import CheckpointError

if TYPE_CHECKING:
    import torch

    from merger.calibration.weights import Readable
    from merger.checkpoint.checkpoint import Checkpoint

__all__ = ["Batch", "Moments", "Samples", "Settings", "batches", "collect", "collect_all"]


def collect(
    weights: Checkpoint,
    batches: Sequence[Batch],
    settings: Settings,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    gram: bool = False,
    host_memory: int | None = None,
    onward: Readable | None = None,
    known: Container[str] = (),
    trust_remote_code: bool = False,
    notice: Callable[[str], None] = warnings.warn,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Iterator[tuple[str, dict[str, Moments]]]:
    """Runs a checkpoint on batches of tokens, block by block: (block, moments of its tensors' inputs).

    Names are the checkpoint's own. What lies outside the blocks comes last, under the name ``""``: the head's
    input, and for the embedding the share of each token. ``dtype`` is that of the computation: by default float32
    on a CPU, else that of the checkpoint. Hidden states above ``host_memory`` bytes wait in files. ``notice`` is
    told what did not go as it should; ``progress`` how many of how many batch passes are done.

    With ``onward`` each block is watched with the checkpoint's weights, but hidden states go on through that model's:
    a block of it is read when the next is asked for, and what is outside the blocks at the start. Blocks that are
    ``known`` already are gone through and not given.

    Raises CheckpointError where the model cannot be run, or an activation is not finite.
    """
    from merger.calibration.block_runner import Unfit, by_block, whole
    from merger.calibration.model_host import Rig

    say = functools.cache(notice)  # each thing once

    def rig() -> Rig:
        return Rig(weights, onward or weights, batches, settings, device, dtype, gram, trust_remote_code, say)

    done: set[str] = set()
    try:
        for unit, moments in by_block(rig(), host_memory, progress, onward, known):
            done.update(moments)
            yield unit, moments
        return
    except Unfit as error:
        reason = str(error)  # and let go of the error, whose frames hold the model
    if onward is not None:
        raise CheckpointError(
            f"{weights.label}: its blocks cannot be run one at a time ({reason}), so there are no merged ones before "
            "the next; write inputs: own"
        )
    say(f"{weights.label}: its blocks cannot be run one at a time ({reason}), so each batch runs the whole model")
    for unit, moments in whole(rig(), progress):
        yield unit, {name: each for name, each in moments.items() if name not in done}


def collect_all(
    weights: Checkpoint, batches: Sequence[Batch], settings: Settings, **options: Any
) -> dict[str, Moments]:
    """The moments of all tensors at once; ``options`` are those of `collect`."""
    return {
        name: each for _, moments in collect(weights, batches, settings, **options) for name, each in moments.items()
    }
