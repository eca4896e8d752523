"""Calibration: statistics of the inputs of each matrix of a model that runs on text, one block at a time."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Container, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from merger.calibration.moments import Moments
from merger.calibration.samples import Batch, Samples, batches
from merger.calibration.settings import Settings

if TYPE_CHECKING:
    import torch

    from merger.calibration.weights import TensorSource
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
    hidden_memory: int | None = None,
    merged_weights: TensorSource | None = None,
    finished_units: Container[str] = (),
    trust_remote_code: bool = False,
    notice: Callable[[str], None] = warnings.warn,
    progress: Callable[[int, int], None] = lambda count, total: None,
) -> Iterator[tuple[str, dict[str, Moments]]]:
    """Runs a checkpoint on batches of tokens and yields each block's name with the moments of its tensors' inputs.

    Names are the checkpoint's own. Modules outside the blocks come last, under the name ``""``: the head's input, and
    the share of each token for the embedding. ``dtype`` is the dtype of the computation: by default float32 on a
    CPU, else the checkpoint's. Hidden states above ``hidden_memory`` bytes wait in files. ``notice`` receives warnings,
    ``progress`` the number of batch passes that are done and their total.

    With ``merged_weights`` each block is observed with the checkpoint's weights, but hidden states continue through the
    merged block, which is read when the caller asks for the next block; modules outside the blocks are read at the
    start. Blocks in ``finished_units`` only carry hidden states and are not yielded.

    Raises CheckpointError where the model cannot be run, or an activation is not finite, and UnsupportedBlocks where
    there are ``merged_weights`` but the model cannot be run one block at a time.
    """
    from merger.calibration.block_runner import UnsupportedBlocks, run_blocks, run_whole_model
    from merger.calibration.input_observer import InputObserver
    from merger.calibration.observed_model import ObservedModel

    notice_once = functools.cache(notice)  # repeats no warning

    def observed_model() -> ObservedModel:
        outer_weights = merged_weights or weights
        observer = functools.partial(InputObserver, gram=gram)
        return ObservedModel(
            weights, outer_weights, batches, settings, device, dtype, trust_remote_code, notice_once, observer
        )

    finished_names: set[str] = set()
    try:
        for unit, moments in run_blocks(observed_model(), hidden_memory, progress, merged_weights, finished_units):
            finished_names.update(moments)
            yield unit, moments
        return
    except UnsupportedBlocks as error:
        if merged_weights is not None:
            raise
        reason = str(error)  # and let go of the error, whose frames hold the model
    notice_once(
        f"{weights.label}: its blocks cannot be run one at a time ({reason}), so each batch runs the whole model"
    )
    for unit, moments in run_whole_model(observed_model(), progress):
        yield unit, {name: tensor_moments for name, tensor_moments in moments.items() if name not in finished_names}


def collect_all(
    weights: Checkpoint, batches: Sequence[Batch], settings: Settings, **options: Any
) -> dict[str, Moments]:
    """The moments of all tensors at once; ``options`` are those of `collect`."""
    return {
        name: tensor_moments
        for _, moments in collect(weights, batches, settings, **options)
        for name, tensor_moments in moments.items()
    }
