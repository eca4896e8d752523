"""Moments of a matrix's inputs: summed over tokens in float64, averaged and stored in float32."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from merger._lazy import torch
from merger.ops.linalg import gram
from merger.ops.transfer import to_host

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

    from merger.calibration.samples import Batch
    from merger.calibration.settings import Settings

# Rows are squared in pieces, to bound the memory of the squares. Pieces that fit a cache are no faster, and far
# slower where two threads wait for each other on busy cores. vector_norm, and products with ones, are less exact.
PIECE = 1 << 23
# As many rows as a batch has. A Gram matrix over more of them is less exact in float32 (2.4e-8 of its norm over 1024
# rows, 2.8e-8 over 2048, 4.2e-8 over 4096); over fewer, time goes into adding them up in float64.
GRAM_ROWS = 2048


@dataclass(frozen=True)
class Moments:
    """Moments of the inputs of one stored tensor: i in-features, for each of e packed experts if the tensor is 3-D."""

    count: Tensor  # [] or [e], the tokens that reached it
    second_moment: Tensor | None = None  # [i] or [e i], E[x^2]
    mean: Tensor | None = None  # [i] or [e i], E[x]
    gram: Tensor | None = None  # [i i] or [e i i], E[x x^T], where it was asked for
    token_share: Tensor | None = None  # [v], how often each token occurs, where it is the embedding
    cross: Tensor | None = None  # like gram, E[y x^T] with the inputs y of the same matrix in a teacher of the model
    axis: int | None = None  # of the stored tensor, that met the inputs: -1, -2, 0 for both; None where it is not known


Statistics = Mapping[str, Moments]
"""The moments of each matrix's inputs of one expert, by the expert's own tensor names."""


@dataclass
class InputSums:
    """Running sums over the inputs of one matrix; a mean is a sum divided by ``weight``."""

    count: int
    weight: float
    totals: Tensor  # [i]
    squares: Tensor  # [i]
    gram: Tensor | None = None  # [i i], float32 where a single product made it
    cross: Tensor | None = None  # [i i], likewise, where a model has a teacher

    @classmethod
    def zero(cls, features: int, *, gram: bool, device: torch.device) -> InputSums:
        """Returns the sums over no token."""
        totals, squares = torch.zeros(2, features, dtype=torch.float64, device=device)
        square = torch.zeros(features, features, dtype=torch.float64, device=device) if gram else None
        return cls(0, 0.0, totals, squares, square)

    @classmethod
    def of(cls, rows: Tensor, weights: Tensor | None, *, gram: bool, teacher_rows: Tensor | None = None) -> InputSums:
        """Returns the sums over ``rows`` [n i], each counted once or with its weight [n]."""
        sums = cls.zero(rows.shape[1], gram=False, device=rows.device)
        for values, weighted in _pieces(rows, weights, PIECE // rows.shape[1]):
            sums.totals += weighted.sum(0)
            sums.squares += (weighted * values).sum(0)
        sums.gram = _squares(rows, weights) if gram else None
        sums.cross = None if teacher_rows is None else _products(teacher_rows, rows, weights)
        sums.count = len(rows)
        sums.weight = float(len(rows)) if weights is None else float(weights.sum())
        return sums

    def add(self, summand: InputSums) -> None:
        """Adds the sums over further rows."""
        self.count += summand.count
        self.weight += summand.weight
        self.totals += summand.totals
        self.squares += summand.squares
        if self.gram is not None and summand.gram is not None:
            self.gram += summand.gram
        if summand.cross is not None:
            self.cross = summand.cross.double() if self.cross is None else self.cross.add_(summand.cross)

    def moments(self) -> Moments:
        """The averages, on the CPU in float32; zero where no token came by."""
        share = 1 / self.weight if self.weight else 0.0
        mean, second_moment = (self.totals * share).float().cpu(), (self.squares * share).float().cpu()
        gram = None if self.gram is None else to_host((self.gram * share).float())
        cross = None if self.cross is None else to_host((self.cross * share).float())
        return Moments(torch.tensor(self.count), second_moment, mean, gram, cross=cross)


def _products(teacher_rows: Tensor, rows: Tensor, weights: Tensor | None) -> Tensor:
    """The sum of y x^T [i i] over the rows y of the teacher and x of the model [n i], with the weights [n]."""
    weighted = rows.float() if weights is None else rows.float() * weights[:, None]
    pieces = zip(torch.split(teacher_rows.float(), GRAM_ROWS), torch.split(weighted, GRAM_ROWS), strict=True)
    products = [teacher_piece.T @ piece for teacher_piece, piece in pieces]
    return products[0] if len(products) == 1 else torch.stack(products).double().sum(0)


def _squares(rows: Tensor, weights: Tensor | None) -> Tensor:
    """The Gram matrix [i i] of some rows [n i], each counted once or with its weight [n]."""
    rooted = rows.float() if weights is None else rows.float() * weights.sqrt()[:, None]
    head, *pieces = torch.split(rooted, GRAM_ROWS)
    squares = gram(head.T)
    for piece in pieces:
        squares = squares.double().add_(gram(piece.T))
    return squares


def _pieces(rows: Tensor, weights: Tensor | None, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The rows in float32, ``size`` at a time, as they are and times their weights."""
    size = max(1, size)
    for start in range(0, len(rows), size):
        values = rows[start : start + size].float()
        yield values, values if weights is None else values * weights[start : start + size, None]


def stack_moments(slices: Sequence[Moments]) -> Moments:
    """The moments of a packed tensor from those of its experts."""

    def stack(parts: Sequence[Tensor | None]) -> Tensor | None:
        tensors = [part for part in parts if part is not None]
        return torch.stack(tensors) if tensors else None

    return Moments(
        torch.stack([moments.count for moments in slices]),
        stack([moments.second_moment for moments in slices]),
        stack([moments.mean for moments in slices]),
        stack([moments.gram for moments in slices]),
        cross=stack([moments.cross for moments in slices]),
    )


def token_share(batches: Sequence[Batch], rows: int, settings: Settings) -> Tensor:
    """How often each of ``rows`` tokens occurs among those that count, which is E[x^2] of a one-hot input."""
    total = torch.zeros(rows, dtype=torch.float64)
    for batch in batches:
        weights = batch.counted_tokens(settings.skip_first_tokens).double()
        if settings.weighting == "sample":
            weights /= weights.sum(1, keepdim=True).clamp(min=1)
        total += torch.bincount(batch.ids.flatten(), weights.flatten(), minlength=rows)
    return (total / (float(total.sum()) or 1.0)).float()
