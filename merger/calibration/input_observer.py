"""Seeing every product of activations with a stored weight, whichever module computes it.

A layer is not asked what it is. ``torch`` is asked, function by function, what a forward pass does: where
the second factor of a product lies in the memory of a loaded parameter, the first factor is that
parameter's input. So linear layers, GPT-2's Conv1D, routers that hold a bare parameter and packed
experts (whose products take a slice of one) are all seen by the same few lines.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, MutableMapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from merger.calibration.moments import Sums

if TYPE_CHECKING:
    from torch import Tensor

    from merger.calibration.samples import Batch
    from merger.calibration.settings import Settings

# where the activations stand among the arguments, followed by the weight, and the axis of the weight that they meet
_PRODUCTS: dict[Any, tuple[int, int]] = {
    torch.nn.functional.linear: (0, -1),
    torch.addmm: (1, -2),
    **dict.fromkeys((torch.mm, torch.matmul, torch.bmm), (0, -2)),
    **dict.fromkeys((torch.Tensor.mm, torch.Tensor.matmul, torch.Tensor.bmm, torch.Tensor.__matmul__), (0, -2)),
}
_CASTS = (torch.Tensor.to, torch.Tensor.type, torch.Tensor.float)  # what a router may do to its weight before
_PICKS = (torch.Tensor.__getitem__, torch.Tensor.index_select, torch.index_select)
_SPLITS = (torch.Tensor.split, torch.split, torch.Tensor.chunk, torch.chunk)
_JOINS = (torch.cat, torch.concat, torch.concatenate)


class Key(NamedTuple):
    """A matrix: a parameter's name, and which of its slices if it packs several."""

    name: str
    slot: int | None = None


class Watch(TorchFunctionMode):
    """Sums what enters each matrix while it is active and ``on``.

    ``find`` tells the parameter that a tensor is, or is a part of, by its name and itself.
    """

    def __init__(
        self,
        find: Callable[[Tensor], tuple[str, Tensor] | None],
        settings: Settings,
        *,
        gram: bool,
        notice: Callable[[str], None],
    ) -> None:
        super().__init__()
        self.on = False
        self.axes: dict[str, int | None] = {}  # of each parameter, the one that its inputs met: -1, -2, or 0 for both
        self._sums: dict[Key, Sums] = {}
        self._others: dict[Key, Sums] = {}  # of what is no token, such as a table of relative positions
        self.gram = gram
        self._find, self._settings, self._notice = find, settings, notice
        self._last: tuple[Tensor, Sums, bool] | None = None
        self._cast: MutableMapping[Tensor, tuple[str, Tensor]] = WeakTensorKeyDictionary()

    def begin(self, batch: Batch, device: torch.device) -> None:
        """Says which tokens the next forward pass is about."""
        counted = batch.counted(self._settings.skip_first_tokens)
        self._samples, self._length = counted.shape
        self._counted = counted.flatten().to(device)
        self._all = torch.arange(len(self._counted), device=device)
        self._plain = self._settings.weighting == "token" and bool(counted.all())
        self._lengths = batch.mask.sum(1).to(device)
        # of an activation: which token each of its rows is
        self._ids: MutableMapping[Tensor, Tensor] = WeakTensorKeyDictionary()
        self._last = None

    def take(self, prefix: str) -> dict[Key, Sums]:
        """Hands over the sums of the parameters whose names begin so: those of tokens, or else of what there was."""
        taken = {}
        for key in [key for key in self._sums | self._others if key.name.startswith(prefix)]:
            tokens, others = self._sums.pop(key, None), self._others.pop(key, None)
            if tokens is None:
                self._notice(
                    f"what enters {key.name} is not tokens; each row counts once, and padding is not told apart"
                )
            if sums := tokens or others:
                taken[key] = sums
        return taken

    def __torch_function__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not self.on:
            return func(*args, **kwargs)
        if func in _PRODUCTS:
            place, axis = _PRODUCTS[func]
            inputs, weight = (*args, *kwargs.values())[place:][:2]
            self._see(inputs, weight, axis)
        result = func(*args, **kwargs)
        if func in _CASTS and result is not args[0] and (found := self._find(args[0])):
            self._cast[result] = found
        if args and isinstance(args[0], torch.Tensor):
            self._follow(func, args, result)
        elif func in _JOINS:
            self._join(args[0], result)
        return result

    # --- products ---------------------------------------------------------------------------------

    def _see(self, inputs: Tensor, weight: Any, axis: int) -> None:
        if not isinstance(weight, torch.Tensor):
            return
        found = self._cast.get(weight) or self._find(weight)
        if found is None:
            return
        name, parameter = found
        axis_met = _axis_met(parameter, weight, axis)
        if parameter.dim() < 3:
            self.record(Key(name), inputs, axis_met)
        elif weight.dim() < 3:
            self.record(Key(name, weight.storage_offset() // parameter.stride(0)), inputs, axis_met)
        else:
            for slot, part in enumerate(inputs):  # all experts at once: zeros are sent to those not chosen
                self.record(Key(name, slot), part, axis_met, part.any(-1))

    def record(self, key: Key, inputs: Tensor, axis: int | None, sent: Tensor | None = None) -> None:
        """Adds the rows of ``inputs``, or those that are ``sent``, to what entered a matrix along one of its axes."""
        before = self.axes.get(key.name)
        if axis is not None and before not in (None, axis):
            self.axes[key.name] = 0
            return
        self.axes[key.name] = before if axis is None else axis
        if self._last is None or self._last[0] is not inputs:  # q, k and v share one, which is reduced once
            known_by_count = (
                key.slot is None or sent is not None
            )  # an expert's rows are some of the tokens, in any order
            self._last = inputs, *self._reduce(inputs, sent, known_by_count)
        _, sums, are_tokens = self._last
        total = self._sums if are_tokens else self._others
        if key not in total:
            total[key] = Sums.zero(inputs.shape[-1], gram=self.gram, device=inputs.device)
        total[key].add(sums)

    def _reduce(self, inputs: Tensor, sent: Tensor | None, known_by_count: bool) -> tuple[Sums, bool]:
        ids = self._tokens(inputs) if known_by_count else self._ids.get(inputs)
        rows, kept = inputs.reshape(-1, inputs.shape[-1]), sent
        if ids is None:
            return Sums.of(rows, None, gram=self.gram), False
        if not self._plain:
            kept = self._counted[ids] if sent is None else self._counted[ids] & sent
        if kept is not None and not kept.all():
            rows, ids = rows[kept], ids[kept]
        return Sums.of(rows, self._weights(ids), gram=self.gram), True

    def _weights(self, ids: Tensor) -> Tensor | None:
        """What each of these tokens counts: a sample's tokens count 1 together, or each of them does."""
        if self._settings.weighting == "token":
            return None
        samples = ids // self._length
        return 1 / torch.bincount(samples, minlength=self._samples)[samples]

    # --- rows: which token is which -----------------------------------------------------------------

    def _tokens(self, inputs: Tensor) -> Tensor | None:
        """The tokens that the rows of an activation are, or None if they are something else."""
        known = self._ids.get(inputs)
        rows = inputs[..., 0].numel()
        if known is not None:
            return known
        if rows == len(self._all):
            return self._all
        if rows == self._samples:  # one vector per sample, such as a pooler's: let it stand for its last token
            return self._all[:: self._length] + self._lengths - 1
        return None

    def _follow(self, func: Any, args: tuple[Any, ...], result: Any) -> None:
        """Keeps track of tokens that were picked out of a batch, as a router does, through what is computed of them."""
        ids = self._ids.get(args[0])
        if func in _PICKS:
            ids = self._picked(args, ids, result)
        if ids is None:
            return
        tensors = [each for each in (result if isinstance(result, (tuple, list)) else (result,)) if _has_rows(each)]
        sizes = [tensor[..., 0].numel() for tensor in tensors]
        if func in _SPLITS and sum(sizes) == len(ids):  # as where each expert is given its own rows
            self._ids.update(zip(tensors, torch.split(ids, sizes), strict=True))
            return
        self._ids.update((tensor, ids) for tensor, size in zip(tensors, sizes, strict=True) if size == len(ids))

    def _join(self, tensors: Sequence[Any], result: Tensor) -> None:
        """Keeps track of the tokens of activations that are put together, row below row."""
        ids = [self._ids.get(tensor) for tensor in tensors if _has_rows(tensor)]
        known = [each for each in ids if each is not None]
        if known and len(known) == len(tensors) and result[..., 0].numel() == sum(map(len, known)):
            self._ids[result] = torch.cat(known)

    def _picked(self, args: tuple[Any, ...], ids: Tensor | None, result: Tensor) -> Tensor | None:
        """What ``source[index]`` gives where the source holds tokens: the same index, put to their numbers."""
        source, index = args[0], args[-1]
        if not source.is_floating_point() or source.dim() < 2 or result.shape[-1:] != source.shape[-1:]:
            return ids
        if ids is None:
            if source[..., 0].numel() != len(self._all):
                return None
            ids = self._all
        try:
            picked = ids.view(source.shape[:-1])[index]
        except (IndexError, RuntimeError):
            return None
        return picked.flatten() if picked.shape == result.shape[:-1] else None


def _has_rows(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dim() > 1


def _axis_met(parameter: Tensor, weight: Tensor, axis: int) -> int | None:
    """The axis of a parameter's matrices, -1 or -2, that ``axis`` of a view of it is; None if strides do not tell."""
    if parameter.dim() < 2 or weight.dim() < 2 or parameter.stride(-1) == parameter.stride(-2):
        return None
    return next((own for own in (-1, -2) if parameter.stride(own) == weight.stride(axis)), None)
