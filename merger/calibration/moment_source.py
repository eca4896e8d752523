"""From statistics of experts to the inputs of a stage."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from merger._lazy import torch
from merger.calibration.moments import Moments, Statistics
from merger.planning.plan import Part, TensorPlan
from merger.planning.row_map import RowMap

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class MomentSource:
    """Statistics of all experts as inputs of stages, which take Gram and cross moments under these names."""

    statistics: Mapping[str, Statistics]
    gram: str = "gram"
    cross: str | None = None

    def of_part(self, tensor: TensorPlan, part: Part, note: Callable[[str], None]) -> Mapping[str, Tensor]:
        """The inputs of one matrix, [k ...]; none where an expert has none."""
        if not tensor.inputs or not (tensor.is_layer or tensor.kind == "embedding"):
            return {}
        by_expert = [self.statistics[name].get(tensor.reads[name] or "") for name in tensor.place.experts]
        experts = [_of_part(moments, tensor, part) for moments in by_expert if moments is not None]
        if len(experts) < len(by_expert) or (
            tensor.is_layer and any(expert_moments.second_moment is None for expert_moments in experts)
        ):
            _note_unseen(tensor, note)
            return {}
        shares = [
            _aligned_share(moments.token_share, tensor.row_maps.get(expert), part)
            for expert, moments in zip(tensor.place.experts, experts, strict=True)
            if moments.token_share is not None
        ]
        if tensor.kind == "embedding":  # an expert that ties its own has the moments of its head as well
            complete = len(shares) == len(experts)
            return {"token_share": torch.stack(shares)} if complete else {}
        second_moments = [moments.second_moment for moments in experts if moments.second_moment is not None]
        means = [moments.mean for moments in experts if moments.mean is not None]
        if not len(second_moments) == len(means) == len(experts):
            return {}
        _note_unreached(second_moments, tensor, part, note)
        second_moment = torch.stack(second_moments)
        return {
            "second_moment": _replace_zeros(second_moment),
            "mean_input": _replace_zeros(torch.stack(means)),
            "reached": (second_moment != 0).any(1, keepdim=True),
            **self._matrices(experts),
        }

    def _matrices(self, experts: Sequence[Moments]) -> Mapping[str, Tensor]:
        """The moments of pairs of features [k c c] by name; where there was no teacher, the Gram matrices alone."""
        grams = [moments.gram for moments in experts if moments.gram is not None]
        if len(grams) < len(experts):
            return {}
        crosses = [moments.cross for moments in experts if moments.cross is not None]
        gram = torch.stack(grams)
        if self.cross is None or len(crosses) < len(experts):
            return {self.gram: gram}
        return {self.gram: gram, self.cross: torch.stack(crosses)}

    def only(self, tensors: Sequence[TensorPlan]) -> MomentSource:
        """The statistics of these tensors alone."""
        statistics = {
            expert: {name: moments[name] for tensor in tensors if (name := tensor.reads.get(expert) or "") in moments}
            for expert, moments in self.statistics.items()
        }
        return MomentSource(statistics, self.gram, self.cross)

    @property
    def nbytes(self) -> int:
        """Bytes of the Gram matrices; layers that share an input share one matrix."""
        moments = (layer for expert in self.statistics.values() for layer in expert.values())
        grams = [layer.gram for layer in moments if layer.gram is not None]
        return sum({gram.untyped_storage().data_ptr(): gram.nbytes for gram in grams}.values())


def _aligned_share(share: Tensor, row_map: RowMap | None, part: Part) -> Tensor:
    """How often the token of each row of the output occurs in an expert's text: [r]."""
    return share[: part.rows] if row_map is None else row_map.gather(share, part.rows)


def _of_part(moments: Moments, tensor: TensorPlan, part: Part) -> Moments:
    """The moments of the matrix of one packed expert, or of the whole tensor where it is a single matrix."""
    if tensor.kind != "expert3d" or moments.second_moment is None or moments.mean is None:
        return moments
    e = tensor.parts.index(part)
    gram = None if moments.gram is None else moments.gram[e]
    cross = None if moments.cross is None else moments.cross[e]
    return Moments(moments.count[e], moments.second_moment[e], moments.mean[e], gram, cross=cross)


def _replace_zeros(values: Tensor) -> Tensor:
    """The values [k c], with ones for an expert that has only zeros: its text never reached the matrix."""
    return values.masked_fill(~(values != 0).any(1, keepdim=True), 1)


def _note_unseen(tensor: TensorPlan, note: Callable[[str], None]) -> None:
    """Notes layers that no forward pass reached, such as an image tower's, once for each list of blocks."""
    if tensor.is_layer:
        label = tensor.name if tensor.unit == tensor.name else f"some layers of {tensor.unit.rpartition('.')[0]}"
        note(f"{label}: calibration saw no input; their changes are judged without it")


def _note_unreached(
    second_moments: Sequence[Tensor], tensor: TensorPlan, part: Part, note: Callable[[str], None]
) -> None:
    """Notes the experts whose text sent no token to a matrix; a stage sees them by its input `reached`."""
    expert_moments = zip(tensor.place.experts, second_moments, strict=True)
    experts = [name for name, moments in expert_moments if not moments.any()]
    if experts:
        note(f"{part.name}: no input ever reached it in {', '.join(experts)}; its changes are judged without it")
