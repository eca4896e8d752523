"""Make a Llama-shaped checkpoint of random weights and fine-tunes of it, to measure with.

    python scripts/synthesize.py OUT [--size 1.1B] [--experts 3] [--shard-size 5GB]

OUT/base and OUT/expert1 ... are bf16 checkpoints with the shapes of TinyLlama-1.1B (22 layers, hidden 2048,
vocabulary 32000) or another size of the table below. An expert's deltas are normal, a twentieth of the
weights in size, so that after rounding to bf16 many are equal and some are zero, as in real fine-tunes.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from merger.checkpoint.layout import layout
from merger.checkpoint.tensor_info import Info
from merger.checkpoint.writer import Writer
from merger.recipe.sections import byte_size

# hidden, intermediate, layers, attention heads, key-value heads, vocabulary
SIZES = {
    "tiny": (64, 128, 2, 4, 4, 256),
    "0.1B": (768, 2048, 12, 12, 4, 32000),
    "0.2B": (1024, 2816, 12, 16, 4, 32000),
    "0.4B": (1280, 3584, 19, 20, 4, 32000),
    "0.8B": (2048, 5632, 15, 32, 4, 32000),
    "1.1B": (2048, 5632, 22, 32, 4, 32000),
    "3B": (3072, 8192, 28, 24, 8, 32000),
    "7B": (4096, 11008, 32, 32, 32, 32000),
    "13B": (5120, 13824, 40, 40, 40, 32000),
}


def shapes(size: str) -> dict[str, tuple[int, ...]]:
    """Every tensor of the model, by name."""
    hidden, inner, layers, heads, key_heads, vocabulary = SIZES[size]
    narrow = hidden // heads * key_heads
    block = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (narrow, hidden),
        "self_attn.v_proj": (narrow, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
    }
    blocks = {f"model.layers.{i}.{part}.weight": shape for i in range(layers) for part, shape in block.items()}
    ends = {"model.embed_tokens.weight": (vocabulary, hidden), "lm_head.weight": (vocabulary, hidden)}
    return {**ends, **blocks, "model.norm.weight": (hidden,)}


def config(size: str) -> dict[str, object]:
    """config.json of the model."""
    hidden, inner, layers, heads, key_heads, vocabulary = SIZES[size]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_heads,
        "vocab_size": vocabulary,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }


def write(path: Path, size: str, expert: int, shard_size: int) -> None:
    """One checkpoint: the base for expert 0. Noise is cut from one pool, which is faster than drawing it all."""
    generator = torch.Generator().manual_seed(0)
    pool = torch.randn(1 << 24, generator=generator)
    tensors = {name: Info("BF16", shape) for name, shape in shapes(size).items()}
    writer = Writer(path, layout(list(tensors.items()), shard_size), tensors, {})
    writer.open()
    for i, (name, info) in enumerate(tensors.items()):
        for start in range(0, info.elements, 1 << 22):
            count = min(1 << 22, info.elements - start)
            weights = _cut(pool, i * 7919 + start * 31, count) * 0.02
            if expert:
                weights = weights.bfloat16() + _cut(pool, i * 104729 + start * 17 + expert * 1299709, count) * 0.001
            writer.write(name, start * 2, memoryview(weights.bfloat16().view(torch.uint8).numpy()))
        writer.finish_tensor(name)
    (writer.folder / "config.json").write_text(json.dumps(config(size), indent=2))
    writer.digests()
    writer.finish(force=True)


def _cut(pool: torch.Tensor, start: int, count: int) -> torch.Tensor:
    start %= len(pool) - count
    return pool[start : start + count]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--size", choices=SIZES, default="1.1B")
    parser.add_argument("--experts", type=int, default=3)
    parser.add_argument("--shard-size", type=byte_size, default=5_000_000_000)
    args = parser.parse_args()
    for expert in range(args.experts + 1):
        path = args.out / (f"expert{expert}" if expert else "base")
        write(path, args.size, expert, args.shard_size)
        print(path, flush=True)


if __name__ == "__main__":
    main()
