"""The mean of the high frequencies of task vectors. FR-Merging, https://arxiv.org/abs/2411.16815.

See docs/methods/weighting.md.
"""

from __future__ import annotations

from merger.methods.high_pass import high_pass
from merger.methods.magnitude_mean import magnitude_mean
from merger.methods.scale import scale
from merger.ops.questions import Whole
from merger.pipeline.parameters import Number, Shares
from merger.pipeline.registry import Stage, method, stage


@method()
def fr(*, radius: Shares = 0.01, scope: Whole = "global", lambda_: Number = 1, head: bool = False) -> list[Stage]:
    """Leaves out the low frequencies of each task vector, then averages by how much each expert changed."""
    return [
        stage(high_pass, radius=radius, head=head),
        stage(magnitude_mean, scope=scope),
        stage(scale, lambda_=lambda_),
    ]
