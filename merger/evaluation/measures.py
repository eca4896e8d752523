"""Outcomes of a model on held-out examples: losses of texts, likelihoods of choices, generated answers."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from merger.calibration.samples import group_by_length, pad_samples
from merger.evaluation.tasks import Example, Task
from merger.ops.precision import full_float32

if TYPE_CHECKING:
    from torch import Tensor

BATCH_TOKENS = 1024
"""Tokens of a batch, padding counted. On two cores 1024 and 2048 tokens of a 135M model took the same time each, and
the logits of a batch, tokens x vocabulary, are the largest thing in memory."""

ROWS = 128
"""Positions whose logits are turned to float32 at once: with 50,000 tokens of vocabulary that is 25 MB."""

SLACK = 4
"""Tokens that a reply may take beyond its answer's own: a model may spell it otherwise, and must then end it."""


@dataclass(frozen=True)
class Outcome:
    """The outcomes of one model on the n examples of a task; sum(total) / sum(weight) is the measure of any subset."""

    total: np.ndarray  # [n] summed loss of the tokens, or 1 where the answer is right
    weight: np.ndarray  # [n] how many tokens, or 1

    @property
    def value(self) -> float:
        """The task's measure: the mean loss of a token, or the share of right answers."""
        return float(self.total.sum() / self.weight.sum())


Outcomes = Mapping[str, Outcome]
"""By task."""


@dataclass(frozen=True)
class TokenizedTask:
    """A task as tokens, shared by all models."""

    task: Task
    sequences: tuple[tuple[int, ...], ...]  # texts, prompts, or each choice after its prompt
    starts: tuple[int, ...]  # the first token of each that is scored
    owners: tuple[int, ...]  # which example each belongs to


def tokenize_task(task: Task, tokenizer: Any, limit: int) -> TokenizedTask:
    """Tokenises a task's examples, each cut to ``limit`` tokens: a text at its end, a prompt at its beginning."""
    if task.kind == "text":
        texts = [example.replies[0] for example in task.examples]
        ids = tokenizer(texts, truncation=True, max_length=limit)["input_ids"]
        return TokenizedTask(task, tuple(map(tuple, ids)), (1,) * len(ids), tuple(range(len(ids))))
    sequences, starts, owners = [], [], []
    for number, example in enumerate(task.examples):
        for reply in example.replies if task.kind == "choices" else ("",):
            context, tokens = _with_reply(example, reply, tokenizer)
            cut = max(0, len(tokens) - limit)
            sequences.append(tokens[cut:])
            starts.append(max(1, context - cut))
            owners.append(number)
    return TokenizedTask(task, tuple(sequences), tuple(starts), tuple(owners))


def _with_reply(example: Example, reply: str, tokenizer: Any) -> tuple[int, tuple[int, ...]]:
    """How many tokens the prompt has, and all tokens of prompt and reply; spaces between belong to the reply."""
    prompt = example.prompt.rstrip() if reply else example.prompt
    gap = example.prompt[len(prompt) :]
    context = tokenizer(prompt)["input_ids"]
    return len(context), tuple(tokenizer(prompt + gap + reply)["input_ids"])


def ends_of(directory: Path, tokenizer: Any) -> tuple[int, ...]:
    """The tokens that end a reply, by the model's generation config and by its tokenizer."""
    path = directory / "generation_config.json"
    end_ids = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id") if path.is_file() else None
    candidates = [*(end_ids if isinstance(end_ids, list) else [end_ids]), tokenizer.eos_token_id]
    return tuple(dict.fromkeys(token_id for token_id in candidates if isinstance(token_id, int)))


@dataclass(frozen=True)
class TaskEvaluator:
    """Evaluates models on the same tasks, which are tokenised once."""

    tasks: tuple[TokenizedTask, ...]
    tokenizer: Any
    ends: tuple[int, ...] = ()  # tokens that end a reply

    def outcomes(self, model: Any, tell: Callable[[int, int], None] = lambda count, total: None) -> dict[str, Outcome]:
        """The outcomes of a loaded transformers model by task; ``tell`` gets the finished and the total tasks."""
        outcomes = {}
        for number, tokenized in enumerate(self.tasks, 1):
            outcomes[tokenized.task.name] = self._outcome(model, tokenized)
            tell(number, len(self.tasks))
        return outcomes

    def _outcome(self, model: Any, tokenized: TokenizedTask) -> Outcome:
        task = tokenized.task
        if task.kind == "text":
            losses = -log_likelihoods(model, tokenized.sequences, tokenized.starts)
            return Outcome(losses, np.array([max(0, len(ids) - 1) for ids in tokenized.sequences], dtype=float))
        if task.kind == "choices":
            is_right = _likeliest_is_right(tokenized, log_likelihoods(model, tokenized.sequences, tokenized.starts))
        else:
            is_right = self._answers_match(model, tokenized)
        return Outcome(is_right.astype(float), np.ones(len(task.examples)))

    def _answers_match(self, model: Any, tokenized: TokenizedTask) -> np.ndarray:
        """Whether the first generated line, stripped, equals the answer: [n], bool."""
        examples = tokenized.task.examples
        answers = [example.replies[0].strip() for example in examples]
        longest = max(len(ids) for ids in self.tokenizer(answers, add_special_tokens=False)["input_ids"]) + SLACK
        is_right = np.zeros(len(examples), dtype=bool)
        for group in group_by_length(list(map(len, tokenized.sequences)), BATCH_TOKENS):
            replies = generate(model, [tokenized.sequences[i] for i in group], longest, self.ends)
            for i, text in zip(group, self.tokenizer.batch_decode(replies, skip_special_tokens=True), strict=True):
                reply = text if "\n" in answers[i] else text.lstrip().partition("\n")[0]
                is_right[i] = reply.strip() == answers[i]
        return is_right


def _likeliest_is_right(tokenized: TokenizedTask, likelihoods: np.ndarray) -> np.ndarray:
    """Whether the correct choice is the likeliest one, the first of equals: [n], bool."""
    by_example: dict[int, list[float]] = {}
    for owner, value in zip(tokenized.owners, likelihoods, strict=True):
        by_example.setdefault(owner, []).append(value)
    examples = enumerate(tokenized.task.examples)
    return np.array([int(np.argmax(by_example[number])) == example.correct for number, example in examples])


# --- forward passes -------------------------------------------------------------------------------


@torch.inference_mode()
@full_float32()
def log_likelihoods(model: Any, sequences: Sequence[Sequence[int]], starts: Sequence[int]) -> np.ndarray:
    """The summed log-probability of each sequence's tokens from its start on, given those before: [n], float64."""
    likelihoods = np.zeros(len(sequences))
    for group in group_by_length(list(map(len, sequences)), BATCH_TOKENS):
        batch = pad_samples([sequences[i] for i in group])
        ids, mask = batch.ids.to(model.device), batch.mask.to(model.device)
        logits = model(input_ids=ids, attention_mask=mask.long(), use_cache=False).logits
        first = torch.tensor([[starts[i]] for i in group], device=ids.device)
        scored = mask & (torch.arange(ids.shape[1], device=ids.device) >= first)
        likelihoods[group] = -_losses(logits, ids, scored).cpu().numpy()
    return likelihoods


def _losses(logits_BTV: Tensor, ids_BT: Tensor, scored_BT: Tensor) -> Tensor:
    """The summed cross-entropy of each row's scored tokens: [b], float64."""
    target_BT = torch.full_like(ids_BT, -100)
    target_BT[:, :-1] = ids_BT[:, 1:].masked_fill(~scored_BT[:, 1:], -100)  # what follows each position
    pieces = zip(torch.split(logits_BTV.flatten(0, 1), ROWS), torch.split(target_BT.flatten(), ROWS), strict=True)
    losses = [
        torch.nn.functional.cross_entropy(logits.float(), target, reduction="none", ignore_index=-100)
        for logits, target in pieces
    ]
    return torch.cat(losses).view(ids_BT.shape).double().sum(1)


@torch.inference_mode()
@full_float32()
def generate(model: Any, prompts: Sequence[Sequence[int]], longest: int, ends: Iterable[int]) -> Tensor:
    """Greedy replies to prompts of similar length, up to ``longest`` tokens each: [b t], filled up with an end."""
    stop = list(ends)
    turned = pad_samples([ids[::-1] for ids in prompts])  # so that padding comes first, and each prompt ends at the end
    ids, mask = turned.ids.flip(1).to(model.device), turned.mask.flip(1).long().to(model.device)
    output: Tensor = model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=longest,
        do_sample=False,
        use_cache=True,
        eos_token_id=stop or None,
        pad_token_id=stop[0] if stop else 0,
    )
    return output[:, ids.shape[1] :]
