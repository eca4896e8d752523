"""What the demo's models answer to the held-out prompts, and how many of the answers are right."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from merger.demo import tasks as demo_tasks

Z = 1.96
"""Standard errors on either side of a 95 % interval."""


@dataclass(frozen=True)
class Share:
    """A share of right answers, and the interval that holds the share over all such prompts 95 times of 100."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, hits: int, count: int) -> Share:
        """The share of ``hits`` among ``count`` answers, with its interval (Wilson, 1927, JASA 22)."""
        share, weight = hits / count, Z**2 / count
        middle = (share + weight / 2) / (1 + weight)
        half = Z / (1 + weight) * math.sqrt(share * (1 - share) / count + weight / (4 * count))
        return cls(share, max(0.0, middle - half), min(1.0, middle + half))


def percent(share: Share) -> str:
    """The share as people write it: 95 %."""
    return f"{100 * share.value:.0f} %"


@dataclass(frozen=True)
class Score:
    """How often one model answers exactly right, by task."""

    model: str
    kind: str  # base, expert or merge
    hits: Mapping[str, int]  # right answers by task
    examples: int  # of each task
    replies: Mapping[str, str]  # to the first held-out prompt of each task

    @property
    def tasks(self) -> dict[str, Share]:
        """The share of each task."""
        return {task: Share.of(hits, self.examples) for task, hits in self.hits.items()}

    @property
    def total(self) -> Share:
        """The share over all tasks; its interval, of all prompts as one sample, is rather too wide than too narrow."""
        return Share.of(sum(self.hits.values()), self.examples * len(self.hits))


def score(name: str, kind: str, path: Path, held_out: Mapping[str, Sequence[demo_tasks.Example]]) -> Score:
    """The score of one checkpoint; every task has the same number of examples."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(path, dtype="float32").eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    hits, first_replies = {}, {}
    for task, examples in held_out.items():
        replies = demo_tasks.replies(model, tokenizer, examples)
        hits[task] = demo_tasks.count_right(replies, examples)
        first_replies[task] = replies[0]
    return Score(name, kind, hits, len(next(iter(held_out.values()))), first_replies)
