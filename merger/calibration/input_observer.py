"""Observes every product of activations with a stored weight, whichever module computes the product.

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

from merger.calibration.moments import InputSums

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


class MatrixKey(NamedTuple):
    """A matrix: a parameter's name, and which of its slices if it packs several."""

    name: str
    slot: int | None = None


class InputObserver(TorchFunctionMode):
    """Sums the inputs of each matrix while the observer is active and ``on``.

    ``find`` returns the name and the parameter that a tensor is, or is a view of. With a ``teacher``, the observer of
    another model that has run on the same batch before, products with the teacher's inputs are summed too.
    """

    def __init__(
        self,
        find: Callable[[Tensor], tuple[str, Tensor] | None],
        settings: Settings,
        *,
        gram: bool,
        teacher: RowObserver | None = None,
        notice: Callable[[str], None],
    ) -> None:
        super().__init__()
        self.on = False
        self.axes: dict[str, int | None] = {}  # of each parameter, the one that its inputs met: -1, -2, or 0 for both
        self._sums: dict[MatrixKey, InputSums] = {}
        self._other_sums: dict[MatrixKey, InputSums] = {}  # of what is no token, such as a table of relative positions
        self.gram, self.teacher = gram, teacher
        self._find, self._settings, self._notice = find, settings, notice
        self._last_reduction: tuple[Tensor, InputSums, bool] | None = None
        self._casts: MutableMapping[Tensor, tuple[str, Tensor]] = WeakTensorKeyDictionary()

    def begin(self, batch: Batch, device: torch.device) -> None:
        """Sets the tokens of the next forward pass."""
        token_mask = batch.counted_tokens(self._settings.skip_first_tokens)
        self._samples, self._length = token_mask.shape
        self._token_mask = token_mask.flatten().to(device)
        self._all = torch.arange(len(self._token_mask), device=device)
        self._all_rows_count = self._settings.weighting == "token" and bool(token_mask.all())
        self._lengths = batch.mask.sum(1).to(device)
        # of an activation: which token each of its rows is
        self._ids: MutableMapping[Tensor, Tensor] = WeakTensorKeyDictionary()
        self._last_reduction = None

    def take(self, prefix: str) -> dict[MatrixKey, InputSums]:
        """Removes and returns the sums of the parameters whose names begin with ``prefix``.

        Sums over rows that are no tokens stand in where a parameter met no tokens.
        """
        sums_by_key = {}
        for key in [key for key in self._sums | self._other_sums if key.name.startswith(prefix)]:
            tokens, other_rows = self._sums.pop(key, None), self._other_sums.pop(key, None)
            if tokens is None:
                self._notice(
                    f"what enters {key.name} is not tokens; each row counts once, and padding is not told apart"
                )
            if key_sums := tokens or other_rows:
                sums_by_key[key] = key_sums
        return sums_by_key

    def __torch_function__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not self.on:
            return func(*args, **kwargs)
        if func in _PRODUCTS:
            place, axis = _PRODUCTS[func]
            inputs, weight = (*args, *kwargs.values())[place:][:2]
            self._observe_product(inputs, weight, axis)
        result = func(*args, **kwargs)
        if func in _CASTS and result is not args[0] and (parameter := self._find(args[0])):
            self._casts[result] = parameter
        if args and isinstance(args[0], torch.Tensor):
            self._track_rows(func, args, result)
        elif func in _JOINS:
            self._track_joined_rows(args[0], result)
        return result

    # --- products ---------------------------------------------------------------------------------

    def _observe_product(self, inputs: Tensor, weight: Any, axis: int) -> None:
        if not isinstance(weight, torch.Tensor):
            return
        parameter_entry = self._casts.get(weight) or self._find(weight)
        if parameter_entry is None:
            return
        name, parameter = parameter_entry
        axis_met = _parameter_axis(parameter, weight, axis)
        if parameter.dim() < 3:
            self.record(MatrixKey(name), inputs, axis_met)
        elif weight.dim() < 3:
            self.record(MatrixKey(name, int(weight.storage_offset()) // int(parameter.stride(0))), inputs, axis_met)
        else:
            for slot, part in enumerate(inputs):  # all experts at once: zeros are sent to those not chosen
                self.record(MatrixKey(name, slot), part, axis_met, part.any(-1))

    def record(self, key: MatrixKey, inputs: Tensor, axis: int | None, row_mask: Tensor | None = None) -> None:
        """Adds the rows of ``inputs``, or those in ``row_mask``, to the sums of a matrix that they meet by ``axis``."""
        recorded_axis = self.axes.get(key.name)
        if axis is not None and recorded_axis not in (None, axis):
            self.axes[key.name] = 0
            return
        self.axes[key.name] = recorded_axis if axis is None else axis
        # q, k and v share one input, which is reduced once
        if self._last_reduction is None or self._last_reduction[0] is not inputs:
            # the rows of one packed expert are some of the tokens, in any order
            rows_are_all_tokens = key.slot is None or row_mask is not None
            self._last_reduction = inputs, *self._reduce(key, inputs, row_mask, rows_are_all_tokens)
        _, sums, are_tokens = self._last_reduction
        total = self._sums if are_tokens else self._other_sums
        if key not in total:
            total[key] = InputSums.zero(inputs.shape[-1], gram=self.gram, device=inputs.device)
        total[key].add(sums)

    def _reduce(
        self, key: MatrixKey, inputs: Tensor, row_mask: Tensor | None, rows_are_all_tokens: bool
    ) -> tuple[InputSums, bool]:
        rows, ids = self._counted_rows(inputs, row_mask, rows_are_all_tokens)
        teacher_rows = None if self.teacher is None else self.teacher.rows_beside(key, rows, ids)
        weights = None if ids is None else self._weights(ids)
        return InputSums.of(rows, weights, gram=self.gram, teacher_rows=teacher_rows), ids is not None

    def _counted_rows(
        self, inputs: Tensor, row_mask: Tensor | None, rows_are_all_tokens: bool
    ) -> tuple[Tensor, Tensor | None]:
        """The rows [n i] that count, and their token numbers [n]; all rows and None where they are no tokens."""
        ids = self._tokens(inputs) if rows_are_all_tokens else self._ids.get(inputs)
        rows, mask = inputs.reshape(-1, inputs.shape[-1]), row_mask
        if ids is None:
            return rows, None
        if not self._all_rows_count:
            mask = self._token_mask[ids] if row_mask is None else self._token_mask[ids] & row_mask
        if mask is not None and not mask.all():
            rows, ids = rows[mask], ids[mask]
        return rows, ids

    def _weights(self, ids: Tensor) -> Tensor | None:
        """Returns the weights of tokens when samples count alike, or None when tokens do."""
        if self._settings.weighting == "token":
            return None
        samples = ids // self._length
        return 1 / torch.bincount(samples, minlength=self._samples)[samples]

    # --- rows: which token is which -----------------------------------------------------------------

    def _tokens(self, inputs: Tensor) -> Tensor | None:
        """Returns the token numbers of an activation's rows, or None if the rows are no tokens."""
        ids = self._ids.get(inputs)
        rows = inputs[..., 0].numel()
        if ids is not None:
            return ids
        if rows == len(self._all):
            return self._all
        if rows == self._samples:  # one vector per sample, such as a pooler's: let it stand for its last token
            return self._all[:: self._length] + self._lengths - 1
        return None

    def _track_rows(self, func: Any, args: tuple[Any, ...], result: Any) -> None:
        """Tracks the tokens that a router selects from a batch through the results of ``func``."""
        ids = self._ids.get(args[0])
        if func in _PICKS:
            ids = self._selected_tokens(args, ids, result)
        if ids is None:
            return
        tensors = [value for value in (result if isinstance(result, (tuple, list)) else (result,)) if _has_rows(value)]
        sizes = [tensor[..., 0].numel() for tensor in tensors]
        if func in _SPLITS and sum(sizes) == len(ids):  # as where each expert is given its own rows
            self._ids.update(zip(tensors, torch.split(ids, sizes), strict=True))
            return
        self._ids.update((tensor, ids) for tensor, size in zip(tensors, sizes, strict=True) if size == len(ids))

    def _track_joined_rows(self, tensors: Sequence[Any], result: Tensor) -> None:
        """Tracks the tokens of activations that are concatenated along their rows."""
        ids = [self._ids.get(tensor) for tensor in tensors if _has_rows(tensor)]
        row_ids = [tensor_ids for tensor_ids in ids if tensor_ids is not None]
        if row_ids and len(row_ids) == len(tensors) and result[..., 0].numel() == sum(map(len, row_ids)):
            self._ids[result] = torch.cat(row_ids)

    def _selected_tokens(self, args: tuple[Any, ...], ids: Tensor | None, result: Tensor) -> Tensor | None:
        """Applies the index of ``source[index]`` to the token numbers of the source's rows."""
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


class RowObserver(InputObserver):
    """Keeps the inputs of each matrix in one batch, for the observer of a model that is its student."""

    def __init__(
        self, find: Callable[[Tensor], tuple[str, Tensor] | None], settings: Settings, notice: Callable[[str], None]
    ) -> None:
        super().__init__(find, settings, gram=False, notice=notice)
        self.rows: dict[MatrixKey, tuple[Tensor, Tensor | None]] = {}

    def begin(self, batch: Batch, device: torch.device) -> None:
        """Sets the tokens of the next forward pass, and drops the rows of the last."""
        super().begin(batch, device)
        self.rows.clear()

    def rows_beside(self, key: MatrixKey, rows: Tensor, ids: Tensor | None) -> Tensor:
        """Returns the inputs [n i] of the same tokens, with the student's ``rows`` of tokens that did not come here."""
        own_rows, own_ids = self.rows.get(key, (None, None))
        if own_rows is None:
            return rows
        if ids is None or own_ids is None:
            return own_rows if own_rows.shape == rows.shape else rows
        places = torch.full_like(self._all, -1)
        places[own_ids] = torch.arange(len(own_ids), device=places.device)
        place = places[ids]
        return torch.where((place >= 0)[:, None], own_rows[place.clamp(min=0)], rows)

    def _reduce(
        self, key: MatrixKey, inputs: Tensor, row_mask: Tensor | None, rows_are_all_tokens: bool
    ) -> tuple[InputSums, bool]:
        self.rows[key] = self._counted_rows(inputs, row_mask, rows_are_all_tokens)
        return InputSums.zero(inputs.shape[-1], gram=False, device=inputs.device), True


def _has_rows(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dim() > 1


def _parameter_axis(parameter: Tensor, weight: Tensor, axis: int) -> int | None:
    """Returns the axis of a parameter, -1 or -2, behind ``axis`` of its view; None if the strides are ambiguous."""
    if parameter.dim() < 2 or weight.dim() < 2 or parameter.stride(-1) == parameter.stride(-2):
        return None
    return next((candidate for candidate in (-1, -2) if parameter.stride(candidate) == weight.stride(axis)), None)
