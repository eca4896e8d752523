"""One model under two sets of names: the tensors of a checkpoint as those that its base stores.

transformers loads the same parameters from tensors of other names and packings: `experts.0.gate_proj` and its fellows,
or `experts.gate_up_proj`; with `model.` before a name, or without. Two checkpoints are matched through the parameters
that transformers makes of both. Where rows of stored tensors lie in the parameters is found by running its own
conversions on the numbers of the rows.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

from merger._lazy import torch
from merger.checkpoint.tensor_info import ITEM_SIZE, Info, Piece
from merger.errors import CheckpointError, checkpoint_faults

if TYPE_CHECKING:
    from torch import Tensor

    from merger.checkpoint.checkpoint import Checkpoint
    from merger.checkpoint.parameter_names import WeightGroup


class _Span(NamedTuple):
    """Elements of a stored tensor, in row order."""

    source: str
    start: int
    stop: int


def as_stored_by(base: Checkpoint, tensors: Mapping[str, Info]) -> dict[str, Info]:
    """Returns the tensors of a checkpoint under the names, and in the packings, of those of the base.

    Tensors without a counterpart stay as they are. transformers is asked, and imported, only where each of the two
    checkpoints has names that the other lacks.
    """
    if tensors.keys() <= base.tensors.keys() or base.tensors.keys() <= tensors.keys():
        return dict(tensors)
    model = _empty_model(base)
    if model is None:
        return dict(tensors)
    from merger.checkpoint.parameter_names import locate

    groups = locate(model, tensors)
    arranged: dict[str, Info] = {}
    used: Counter[str] = Counter()  # elements, by stored tensor
    base_groups = locate(model, base.tensors, base.original_names).values()
    for base_group in {id(group): group for group in base_groups}.values():
        spans = _spans_by_name(base_group, base.tensors, groups, tensors, model)
        for name in spans.keys() - tensors.keys():
            if (info := _assembled(spans[name], tensors, base.tensors[name])) is not None:
                arranged[name] = info
                for span in spans[name]:
                    used[span.source] += span.stop - span.start
    return {name: info for name, info in tensors.items() if not 0 < info.elements == used[name]} | arranged


def _empty_model(base: Checkpoint) -> Any | None:
    """The base's model on the meta device; None where transformers has no class for it."""
    import accelerate
    import transformers

    from merger.checkpoint.model_class import model_constructor

    try:
        with checkpoint_faults("base"):
            config = transformers.AutoConfig.from_pretrained(base.directory, trust_remote_code=False)
            with accelerate.init_empty_weights(include_buffers=False):
                return model_constructor(config, "base", trust_remote_code=False)()
    except CheckpointError:
        return None


def _spans_by_name(
    base_group: WeightGroup,
    base_tensors: Mapping[str, Info],
    groups: Mapping[str, WeightGroup],
    tensors: Mapping[str, Info],
    model: Any,
) -> dict[str, list[_Span]]:
    """Returns the elements of a checkpoint that stand for each of the base's tensors behind one group of parameters.

    Empty where the checkpoint lacks a parameter, or where a conversion takes rows apart.
    """
    counterparts = {id(group): group for target in base_group.targets if (group := groups.get(target)) is not None}
    base_infos = {name: base_tensors[name] for _, name in base_group.names}
    infos = {name: tensors[name] for group in counterparts.values() for _, name in group.names}
    if not infos or infos.keys() == base_infos.keys():
        return {}
    if len(infos) == len(base_infos) == 1 and all(g.converter is None for g in (base_group, *counterparts.values())):
        (source, info), (name, _) = *infos.items(), *base_infos.items()
        return {name: [_Span(source, 0, info.elements)]}
    return _matched_spans([base_group], base_infos, list(counterparts.values()), infos, model)


def _matched_spans(
    base_groups: list[WeightGroup],
    base_infos: Mapping[str, Info],
    groups: list[WeightGroup],
    infos: Mapping[str, Info],
    model: Any,
) -> dict[str, list[_Span]]:
    """The spans of a checkpoint's tensors that meet those of the base's in the same places of the same parameters."""
    vectors = any(len(info.shape) < 2 for info in (*base_infos.values(), *infos.values()))
    widths = {1 if vectors else info.shape[-1] for info in (*base_infos.values(), *infos.values())}
    if len(widths) > 1:
        return {}
    width = widths.pop()
    base_rows, rows = _Rows(base_infos, width), _Rows(infos, width)
    base_parameters, parameters = base_rows.in_parameters(base_groups, model), rows.in_parameters(groups, model)
    counterpart = torch.full((base_rows.count,), -1)
    for target, base_numbers in base_parameters.items():
        numbers = parameters.get(target)
        if numbers is None or numbers.shape != base_numbers.shape:
            return {}
        counterpart[base_numbers] = numbers
    if not base_parameters or bool((counterpart < 0).any()):
        return {}
    return {name: rows.spans(counterpart[start:stop]) for name, start, stop in base_rows.ranges()}


class _Rows:
    """The rows of stored tensors of one width, numbered through; single elements, with a width of one."""

    def __init__(self, infos: Mapping[str, Info], width: int) -> None:
        self._infos, self._width = infos, width
        self._starts = [0, *accumulate(info.elements // max(1, width) for info in infos.values())]

    @property
    def count(self) -> int:
        """How many rows there are."""
        return self._starts[-1]

    def ranges(self) -> Iterator[tuple[str, int, int]]:
        """Every tensor's name, with the number of its first row and the one behind its last."""
        for name, (start, stop) in zip(self._infos, pairwise(self._starts), strict=True):
            yield name, start, stop

    def in_parameters(self, groups: list[WeightGroup], model: Any) -> dict[str, Tensor]:
        """The numbers of the rows of each parameter that transformers makes; none where it takes rows apart."""
        numbers = {name: torch.arange(start, stop).view(self._shape(name)) for name, start, stop in self.ranges()}
        parameters: dict[str, Tensor] = {}
        for group in groups:
            try:
                converted = group.convert({name: numbers[name] for _, name in group.names}, model)
            except Exception:  # whatever a conversion of transformers makes of a matrix with one column
                return {}
            for target, tensor in converted.items():
                if self._width != 1 and tensor.shape[-1:] != (1,):
                    return {}
                parameters[target] = tensor.flatten()
        return parameters

    def _shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape with one column, or unchanged where elements are numbered."""
        shape = self._infos[name].shape
        return shape if self._width == 1 else (*shape[:-1], 1)

    def spans(self, numbers: Tensor) -> list[_Span]:
        """The runs of rows with these numbers, in this order, as elements of their tensors."""
        breaks = (numbers.diff() != 1) | (self._owners(numbers).diff() != 0)
        ends = [*(breaks.nonzero().flatten() + 1).tolist(), len(numbers)]
        names = list(self._infos)
        spans = []
        for first, last in pairwise([0, *ends]):
            number = int(numbers[first])
            owner = bisect_right(self._starts, number) - 1
            start = (number - self._starts[owner]) * self._width
            spans.append(_Span(names[owner], start, start + (last - first) * self._width))
        return spans

    def _owners(self, numbers: Tensor) -> Tensor:
        """For each row the place of its tensor among the tensors."""
        return torch.bucketize(numbers, torch.tensor(self._starts), right=True)


def _assembled(spans: list[_Span], tensors: Mapping[str, Info], base_info: Info) -> Info | None:
    """A tensor that is made of parts of others; None where these have several dtypes."""
    infos = [tensors[span.source] for span in spans]
    first, start = infos[0], spans[0].start
    if len({info.dtype for info in infos}) > 1:
        return None
    if len(spans) == 1 and spans[0].stop - start == first.elements:
        return first._replace(shape=base_info.shape) if first.elements == base_info.elements else first
    if len(spans) == 1 and first.is_plain:
        return Info(first.dtype, base_info.shape, first.file, first.offset + start * ITEM_SIZE[first.dtype])
    width = first.matrix[1]
    if any(len(infos[i].shape) < 2 or span.start % width or span.stop % width for i, span in enumerate(spans)):
        width = 1
    pieces = (
        Piece(_with_columns(info, width), span.start // width, span.stop // width)
        for span, info in zip(spans, infos, strict=True)
    )
    return Info(first.dtype, base_info.shape, first.file, pieces=tuple(pieces))


def _with_columns(info: Info, width: int) -> Info:
    """The same tensor as a matrix of so many columns; of a vector that a pickle spreads out, of one."""
    if info.matrix[1] == width and len(info.shape) > 1:
        return info
    return info._replace(shape=(info.elements // width, width), strides=info.strides and (*info.strides, 1))
