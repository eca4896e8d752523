"""Low-rank experts: each task vector as a product. TSV-Compress, https://arxiv.org/abs/2412.00081, section 3.2."""

from __future__ import annotations

from fractions import Fraction
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from merger._lazy import torch
from merger.methods._spectral import has_matrix, whole
from merger.methods.separate import separate
from merger.ops.arithmetic import count
from merger.ops.linalg import Factors, svd
from merger.pipeline.parameters import Share
from merger.pipeline.registry import Form, Stage, pack, stage

if TYPE_CHECKING:
    from torch import Tensor


def _rank(rows: int, columns: int, rank_share: Fraction, rank: int | None) -> int:
    """How many directions are kept of a matrix, at least one."""
    full = min(rows, columns)
    return max(1, count(rank_share, full)) if rank is None else min(rank, full)


def _forms(*, rows: int, columns: int, rank_share: Fraction, rank: int | None, **_: object) -> dict[str, Form]:
    directions = _rank(rows, columns, rank_share, rank)
    return {
        "left": Form("factors", shape=(rows, directions)),
        "values": Form("floats", shape=(directions,)),
        "right": Form("factors", shape=(columns, directions)),
    }


def _rebuilt(left: Tensor, values: Tensor, right: Tensor) -> Tensor:
    return Factors(left, values, right).product()


def _separate(kind: str, *, head: bool, **_: Any) -> list[Stage] | None:
    return None if has_matrix(kind, head=head) else [stage(separate)]


@pack(forms=_forms, unpack=_rebuilt, takes=whole, exact=False, elsewhere=_separate)
def factors(
    deltas: Tensor,
    *,
    rank_share: Share = 0.1,
    rank: Annotated[int, Field(ge=1)] | None = None,
    head: bool = False,
) -> dict[str, Tensor]:
    """Keeps each expert's strongest singular directions, as factors; what is no matrix stays the expert's own.

    It keeps the `rank_share` of min(rows, columns), at least one, or `rank` of them (BYOM's low-rank form).
    At 0.5, diag(4, 3, 2, 1) is rebuilt as diag(4, 3, 0, 0).
    """
    _, rows, columns = deltas.shape
    directions = _rank(rows, columns, rank_share, rank)
    by_expert = [_padded(svd(delta, rank=directions), directions) for delta in deltas]
    left, values, right = (torch.stack(parts).float() for parts in zip(*by_expert, strict=True))
    return {"left": left, "values": values, "right": right}


def _padded(factors: Factors, rank: int) -> Factors:
    """The directions of a matrix that has fewer, with zeros for the rest."""
    lack = rank - len(factors.values)
    pad = torch.nn.functional.pad
    return Factors(pad(factors.left, (0, lack)), pad(factors.values, (0, lack)), pad(factors.right, (0, lack)))
