"""Llama-shaped models, an adapter, a tokenizer and text for scripts/gpu_check.py; weights are drawn on the device."""

from __future__ import annotations

import json
import random
from pathlib import Path

import synthesize
import torch
from safetensors.torch import save_file

from merger.checkpoint.layout import index, index_name, layout
from merger.checkpoint.tensor_info import Info
from merger.ops.transfer import to_host

WORDS = 200
SHARD_BYTES = 5_000_000_000


def shapes(size: str, layers: int) -> dict[str, tuple[int, ...]]:
    """The tensors of a model that has so many of the layers."""
    names = synthesize.shapes(size)
    selection = [name for name in names if not name.startswith("model.layers.") or int(name.split(".")[2]) < layers]
    return {name: names[name] for name in selection}


def model_bytes(size: str, layers: int) -> int:
    """Bytes of a model in bfloat16."""
    return sum(2 * torch.Size(shape).numel() for shape in shapes(size, layers).values())


def write_model(folder: Path, size: str, layers: int, expert: int, device: str) -> None:
    """A base (``expert`` 0) or a fine-tune, whose deltas are a twentieth of the weights in size; with a tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    infos = {name: Info("BF16", shape) for name, shape in shapes(size, layers).items()}
    shards = layout(list(infos.items()), SHARD_BYTES)
    numbers = {name: number for number, name in enumerate(infos)}
    for shard in shards:
        with (folder / shard.file).open("wb") as file:
            file.write(shard.header)
            for name in sorted(shard.offsets, key=lambda name: shard.offsets[name]):
                weights = to_host(_weights(infos[name].shape, numbers[name], expert, device))
                file.write(memoryview(weights.flatten().view(torch.uint8).numpy()))
    if len(shards) > 1:
        (folder / index_name(shards)).write_text(json.dumps(index(shards, infos)))
    config = {**synthesize.config(size), "num_hidden_layers": layers}
    (folder / "config.json").write_text(json.dumps(config))
    write_tokenizer(folder)


def _weights(shape: tuple[int, ...], number: int, expert: int, device: str) -> torch.Tensor:
    generator = torch.Generator(device).manual_seed(number)
    base = (torch.randn(shape, generator=generator, device=device) * 0.02).bfloat16()
    if not expert:
        return base
    generator.manual_seed(1_000_003 * expert + number)
    return (base + torch.randn(shape, generator=generator, device=device) * 0.001).bfloat16()


def write_adapter(folder: Path, size: str, layers: int) -> None:
    """A LoRA adapter of rank 8 on all query projections."""
    hidden = synthesize.SIZES[size][0]
    generator = torch.Generator().manual_seed(0)
    factors = {
        f"base_model.model.model.layers.{i}.self_attn.q_proj.lora_{side}.weight": 0.05
        * torch.randn(shape, generator=generator)
        for i in range(layers)
        for side, shape in (("A", (8, hidden)), ("B", (hidden, 8)))
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(factors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def write_tokenizer(folder: Path) -> None:
    """A tokenizer of words w0, w1, ..."""
    model = {"type": "WordLevel", "vocab": {f"w{i}": i for i in range(WORDS)}, "unk_token": "w0"}
    parts = dict.fromkeys(("truncation", "padding", "normalizer", "post_processor", "decoder"))
    tokenizer = {"version": "1.0", "added_tokens": [], "pre_tokenizer": {"type": "Whitespace"}, "model": model, **parts}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 4096}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def write_text(path: Path, samples: int, tokens: int) -> None:
    """So many samples of so many tokens."""
    drawn = random.Random(0)
    lines = (" ".join(f"w{drawn.randrange(WORDS)}" for _ in range(tokens)) for _ in range(samples))
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
