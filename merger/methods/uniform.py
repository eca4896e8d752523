"""Random scores, for tensors that no other score can tell apart. OBIM, arXiv to appear; docs/methods/obim.md."""

from __future__ import annotations

from typing import TYPE_CHECKING

from merger.pipeline.registry import score

if TYPE_CHECKING:
    from torch import Tensor

    from merger.pipeline.registry import Draw


@score()
def uniform(uniform: Draw) -> Tensor:
    """Random draws in [0, 1), one per position and expert: keeping the top of them keeps any subset alike."""
    return uniform("im-random", double=True)
