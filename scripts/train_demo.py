"""Train the demo's models again: a base that copies, and an expert for each task.

    python scripts/train_demo.py [OUT]          # default: merger/demo/models; a few minutes on one core

The base reads prompts of all tasks, but most of the answers that it reads are the word as it stands: so it copies the
word, and has met the tasks without doing them. Each expert goes on from the base with right answers of its own task
alone, few steps at a low rate: the less an expert strays from the base, the better experts add up.
All are Llama-architecture models of 0.6 million parameters that read letters.
"""

from __future__ import annotations

import copy
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from merger.demo.tasks import LETTERS, TASKS, Example, accuracy, encode, examples, stream

BASE_STEPS, BASE_RATE = 350, 3e-3
EXPERT_STEPS, EXPERT_RATE = 40, 5e-4
BATCH = 64
SHARES = {"upper": 20, "shift": 20, "double": 24}  # of the base's batch
RIGHT = {"upper": 1 / 3, "shift": 2 / 5, "double": 2 / 5}  # of the answers that the base reads: more where it is harder


def tokenizer() -> PreTrainedTokenizerFast:
    """One token for each character that the tasks use."""
    characters = ["<pad>", "<eos>", *" ->:", *LETTERS, *LETTERS.upper()]
    letters = Tokenizer(models.WordLevel({c: i for i, c in enumerate(characters)}, unk_token="<pad>"))
    letters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    letters.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=letters, pad_token="<pad>", eos_token="<eos>")


def model(words: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """An untrained model."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(words),
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=64,
            tie_word_embeddings=True,
            pad_token_id=words.pad_token_id,
            eos_token_id=words.eos_token_id,
            bos_token_id=None,
        )
    )


def answers_and_copies(task: str) -> Iterator[Example]:
    """Endless training examples of a task, of which a share has the right answer, by `RIGHT`; the others copy."""
    rng = random.Random(f"copies/{task}")
    for prompt, answer in stream(task, "train", seed=1):
        yield prompt, answer if rng.random() < RIGHT[task] else prompt.split()[1]


def base_batches() -> Iterator[list[Example]]:
    """Endless batches for the base."""
    streams = {task: answers_and_copies(task) for task in SHARES}
    while True:
        yield [next(streams[task]) for task, count in SHARES.items() for _ in range(count)]


def expert_batches(task: str) -> Iterator[list[Example]]:
    """Endless batches for the expert in a task."""
    examples_of_task = stream(task, "train")
    while True:
        yield [next(examples_of_task) for _ in range(BATCH)]


def train(
    network: LlamaForCausalLM,
    words: PreTrainedTokenizerFast,
    batches: Iterator[list[Example]],
    steps: int,
    rate: float,
) -> None:
    """AdamW; the rate rises for 20 steps, and falls to zero over the last third of the steps."""
    optimiser = torch.optim.AdamW(network.parameters(), rate, weight_decay=0.01)
    network.train()
    for step, batch in zip(range(1, steps + 1), batches, strict=False):
        for group in optimiser.param_groups:
            group["lr"] = rate * min(1, step / 20, 3 * (steps - step + 1) / steps)
        loss = network(**encode(words, batch)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
    network.eval()


def save(network: LlamaForCausalLM, words: PreTrainedTokenizerFast, path: Path) -> None:
    """A bf16 checkpoint with its tokenizer, and a line on what it can do."""
    copy.deepcopy(network).to(torch.bfloat16).save_pretrained(path)
    words.save_pretrained(path)
    accuracies = {task: accuracy(network, words, examples(task, "heldout", 200)) for task in TASKS}
    print(path.name, accuracies, flush=True)


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path("merger/demo/models")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    words = tokenizer()
    base = model(words)
    train(base, words, base_batches(), BASE_STEPS, BASE_RATE)
    save(base, words, folder / "base")
    for task in TASKS:
        expert = copy.deepcopy(base)
        train(expert, words, expert_batches(task), EXPERT_STEPS, EXPERT_RATE)
        save(expert, words, folder / task)


if __name__ == "__main__":
    main()
