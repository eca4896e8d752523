"""Checkpoints small enough to think about, written as the world writes them."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 8, "tie_word_embeddings": False}
ITEM = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip


def llama(seed=0, *, rows=8, hidden=4, layers=2, dtype=torch.float32):
    """The tensors of a Llama with random weights."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    tensors = {"model.embed_tokens.weight": drawn(rows, hidden)}
    for i in range(layers):
        block = f"model.layers.{i}"
        for projection in "qkvo":
            tensors[f"{block}.self_attn.{projection}_proj.weight"] = drawn(hidden, hidden)
        tensors |= {
            f"{block}.mlp.gate_proj.weight": drawn(2 * hidden, hidden),
            f"{block}.mlp.up_proj.weight": drawn(2 * hidden, hidden),
            f"{block}.mlp.down_proj.weight": drawn(hidden, 2 * hidden),
            f"{block}.input_layernorm.weight": drawn(hidden),
            f"{block}.post_attention_layernorm.weight": drawn(hidden),
        }
    return tensors | {"model.norm.weight": drawn(hidden), "lm_head.weight": drawn(rows, hidden)}


def save(folder, tensors, config=CONFIG, *, shards=1):
    """Writes a checkpoint folder; with several shards as transformers does, with an index."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return folder
    names = sorted(tensors)
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        shard = {name: tensors[name] for name in names[i::shards]}
        save_file(shard, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    index = {"metadata": {"total_size": 0}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def load(folder):
    """All tensors of a checkpoint folder, through safetensors' own reader."""
    tensors = {}
    for file in sorted(Path(folder).glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def save_headers(folder, shapes, config=CONFIG, *, dtype="BF16", distinct=()):
    """A checkpoint whose files have their full size and no data: enough for a plan, and no disk.

    ``shapes`` maps a name to its shape, or to (dtype, shape). All values are zero but the first ones of ``distinct``.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    header, end = {}, 0
    for name, entry in shapes.items():
        kind, shape = entry if entry and isinstance(entry[0], str) else (dtype, entry)
        start, end = end, end + ITEM[kind] * torch.Size(shape).numel()
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [start, end]}
    write_raw(folder / "model.safetensors", header, size=end)
    with open(folder / "model.safetensors", "r+b") as file:
        data = 8 + int.from_bytes(file.read(8), "little")
        for number, name in enumerate(distinct, 1):
            if name in header:
                file.seek(data + header[name]["data_offsets"][0])
                file.write(bytes([number]))
    return folder


def write_raw(path, header, *, size=0, data=b"", length=None):
    """A safetensors file with this header, right or wrong, over ``data`` or over ``size`` bytes of nothing."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write((len(text) if length is None else length).to_bytes(8, "little") + text + data)
        if size:
            file.truncate(8 + len(text) + size)


def trio(folder, *, experts=("code", "math"), **options):
    """A base and experts of it in folders of these names, and their tensors."""
    models = {label: llama(seed, **options) for seed, label in enumerate(("base", *experts))}
    for label, tensors in models.items():
        save(Path(folder) / label, tensors)
    return models


def bits(tensor):
    """Equal bits are equal numbers with the same sign of zero, and NaN equals itself."""
    flat = tensor.contiguous().flatten()
    return (flat if tensor.dim() else flat.clone()).view(torch.uint8)


def same_bits(a, b):
    """Whether two tensors, or two dictionaries of them, hold the same bytes in the same shapes."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_bits(a[name], b[name]) for name in a)
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))
