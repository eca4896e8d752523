"""The embedded demo's tasks: three small text puzzles, their example splits and their scores.

Each example is a prompt and the one right answer, such as ``shift: dbca -> `` and ``ecdb``. The
demo's experts are each trained on one of these tasks (``scripts/train_demo.py``), so that merging
them can be judged by what the merged model still does right.

Importing this module does not load torch.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Example = tuple[str, str]
Split = Literal["train", "calibration", "heldout"]

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def _word(rng: random.Random) -> str:
    return "".join(rng.choices(LETTERS, k=rng.randint(3, 6)))


def upper(rng: random.Random) -> Example:
    """Write a word in capitals: ``upper: dbca -> DBCA``."""
    word = _word(rng)
    return f"upper: {word} -> ", word.upper()


def shift(rng: random.Random) -> Example:
    """Replace every letter by the next one: ``shift: dbca -> ecdb``."""
    word = _word(rng)
    return f"shift: {word} -> ", "".join(LETTERS[(LETTERS.index(c) + 1) % 26] for c in word)


def double(rng: random.Random) -> Example:
    """Write every letter twice: ``double: dbca -> ddbbccaa``."""
    word = _word(rng)
    return f"double: {word} -> ", "".join(c + c for c in word)


TASKS: dict[str, Callable[[random.Random], Example]] = {"upper": upper, "shift": shift, "double": double}


def split_of(prompt: str) -> Split:
    """The one split a prompt belongs to, for ever: 10% held out, 10% calibration, 80% training.

    The prompt's own hash decides, so no seed or sample size can leak a prompt between splits.
    """
    bucket = zlib.crc32(prompt.encode()) % 10
    return "heldout" if bucket == 0 else "calibration" if bucket == 1 else "train"


def stream(task: str, split: Split, seed: int = 0) -> Iterator[Example]:
    """Endless random examples of one task from one split; prompts may come more than once."""
    rng = random.Random(f"{task}/{split}/{seed}")
    while True:
        example = TASKS[task](rng)
        if split_of(example[0]) == split:
            yield example


def examples(task: str, split: Split, count: int, seed: int = 0) -> list[Example]:
    """The first `count` examples of `stream`."""
    return list(islice(stream(task, split, seed), count))


def encode(tokenizer: PreTrainedTokenizerBase, batch: Sequence[Example]) -> dict[str, Tensor]:
    """A model's inputs for prompt, answer and end-of-text, with labels on the last two only."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    prompts = tokenizer([prompt for prompt, _ in batch])["input_ids"]
    answers = tokenizer([answer + tokenizer.eos_token for _, answer in batch])["input_ids"]
    pairs = list(zip(prompts, answers, strict=True))

    def pad(rows: list[list[int]], value: int) -> Tensor:
        return pad_sequence([torch.tensor(row) for row in rows], True, value)

    return {
        "input_ids": pad([p + a for p, a in pairs], tokenizer.pad_token_id),
        "attention_mask": pad([[1] * len(p + a) for p, a in pairs], 0),
        "labels": pad([[-100] * len(p) + a for p, a in pairs], -100),
    }


def replies(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example]) -> list[str]:
    """What greedy decoding makes of the prompts of examples, cut a token behind the longest answer."""
    # Padding goes on the left, so that every prompt ends where its answer has to begin.
    prompts = [prompt for prompt, _ in examples]
    inputs = tokenizer(prompts, padding=True, padding_side="left", return_tensors="pt")
    longest = max(len(answer) for _, answer in examples) + 1  # and the end-of-text token
    output: Tensor = model.generate(**inputs.to(model.device), max_new_tokens=longest, do_sample=False)
    texts: list[str] = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return texts


def count_right(replies: Sequence[str], examples: Sequence[Example]) -> int:
    """The number of replies that are exactly the answers."""
    return sum(reply == answer for reply, (_, answer) in zip(replies, examples, strict=True))


def accuracy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example]) -> float:
    """The share of prompts that greedy decoding answers exactly right."""
    return count_right(replies(model, tokenizer, examples), examples) / len(examples)
