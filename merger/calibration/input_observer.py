"""Seeing every product of activations with a stored weight, whichever module computes it.

A layer is not asked what it is. ``torch`` is asked, function by function, what a forward pass does: where
the second factor of a product lies in the memory of a loaded parameter, the first factor is that
parameter's input. So linear layers, GPT-2's Conv1D, routers that hold a bare parameter and packed
experts (whose products take a slice of one) are all seen by the same few lines.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, MutableMapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from merger.calibration.moments import Sums

if TYPE_CHECKING:
    from torch import Tensor

    from merger.calibration.samples import Batch
    from merger.calibration.settings import Settings

# where the activations stand among the arguments; the weight follows them
_PRODUCTS: dict[Any, int] = {
    torch.nn.functional.linear: 0,
    torch.addmm: 1,
    **dict.fromkeys((torch.mm, torch.matmul, torch.bmm), 0),
    **dict.fromkeys((torch.Tensor.mm, torch.Tensor.matmul, torch.Tensor.bmm, torch.Tensor.__matmul__), 0),
}
_CASTS = (torch.Tensor.to, torch.Tensor.type, torch.Tensor.float)  # what a router may do to its weight before
_PICKS = (torch.Tensor.__getitem__, torch.Tensor.index_select, torch.index_select)


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
            inputs, weight = (*args, *kwargs.values())[_PRODUCTS[func] :][:2]
            self._see(inputs, weight)
        result = func(*args, **kwargs)
        if func in _CASTS and result is not args[0] and (found := self._find(args[0])):
            self._cast[result] = found
        if args and isinstance(args[0], torch.Tensor):
            self._follow(func, args, result)
        return result

    # --- products ---------------------------------------------------------------------------------

    def _see(self, inputs: Tensor, weight: Any) -> None:
        if not isinstance(weight, torch.Tensor):
            return
        found = self._cast.get(weight) or self._find(weight)
        if found is None:
            return
        name, parameter = found
        if parameter.dim() < 3:
            self.record(Key(name), inputs)
        elif weight.dim() < 3:
            self.record(Key(name, weight.storage_offset() // parameter.stride(0)), inputs)
        else:
            for slot, part in enumerate(inputs):  # all experts at once: zeros are sent to those not chosen
                self.record(Key(name, slot), part, part.any(-1))

    def record(self, key: Key, inputs: Tensor, sent: Tensor | None = None) -> None:
        """Adds the rows of ``inputs``, or those that are ``sent``, to what entered a matrix."""
        if self._last is None or self._last[0] is not inputs:  # q, k and v share one, which is reduced once
            self._last = inputs, *self._reduce(inputs, sent)
        _, sums, are_tokens = self._last
        total = self._sums if are_tokens else self._others
        if key not in total:
            total[key] = Sums.zero(inputs.shape[-1], gram=self.gram, device=inputs.device)
        total[key].add(sums)

    def _reduce(self, inputs: Tensor, sent: Tensor | None) -> tuple[Sums, bool]:
        rows, kept, ids = inputs.reshape(-1, inputs.shape[-1]), sent, self._tokens(inputs)
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
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor) and tensor.dim() > 1 and tensor[..., 0].numel() == len(ids):
                self._ids[tensor] = ids

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
