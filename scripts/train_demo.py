"""Train the demo's models again: a base that knows every task a little, and an expert for each.

    python scripts/train_demo.py [OUT]          # default: merger/demo/models; a few minutes on one core

The base sees all tasks, until it gets about a third of the examples right. Each expert goes on from it with
its own task alone, few steps at a low rate: the less an expert strays from the base, the better experts add up.
All are Llama-architecture models of 0.6 million parameters that read letters.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from merger.demo.tasks import LETTERS, TASKS, Example, accuracy, encode, examples, stream

BATCH = 96
BASE_STEPS, BASE_RATE = 115, 3e-3
EXPERT_STEPS, EXPERT_RATE = 40, 5e-4
SHARES = {"upper": 34, "shift": 20, "double": 42}  # of the base's batch: the harder the task, the more of it


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


def mixture(shares: Mapping[str, int]) -> Iterator[list[Example]]:
    """Endless batches of training examples, so many of each task."""
    streams = {task: stream(task, "train") for task in shares}
    while True:
        yield [next(streams[task]) for task, count in shares.items() for _ in range(count)]


def train(
    network: LlamaForCausalLM, words: PreTrainedTokenizerFast, shares: Mapping[str, int], steps: int, rate: float
) -> None:
    """AdamW, with a short warm-up."""
    optimiser = torch.optim.AdamW(network.parameters(), rate, weight_decay=0.01)
    network.train()
    for step, batch in zip(range(1, steps + 1), mixture(shares), strict=False):
        for group in optimiser.param_groups:
            group["lr"] = rate * min(1, step / 20)
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
    train(base, words, SHARES, BASE_STEPS, BASE_RATE)
    save(base, words, folder / "base")
    for task in TASKS:
        expert = copy.deepcopy(base)
        train(expert, words, {task: BATCH}, EXPERT_STEPS, EXPERT_RATE)
        save(expert, words, folder / task)


if __name__ == "__main__":
    main()
