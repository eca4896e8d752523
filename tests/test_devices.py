"""Inputs of every form on several pretended devices: the same bytes as on the CPU, and no tensors that meet."""

import json
import shutil
from threading import Lock

import pytest
import torch
from checkpoints import CONFIG, llama, save
from safetensors.torch import save_file

from merger.engine.merge import merge
from merger.engine.reader import Reader
from merger.options import RunOptions
from merger.recipe.recipe import Recipe

PACKS = ["emr", "factors"]
METHODS = ["linear", "ties", "dare_ties", "iso_c", *PACKS]
Q, UP = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj"
GPT2 = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "vocab_size": 8, "tie_word_embeddings": False}


def written(folder, seed, dtype=torch.bfloat16, **options):
    return save(folder, llama(seed, layers=1, dtype=dtype, **options))


def adapter(folder, seed):
    """A LoRA adapter of rank 2 on two matrices."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(seed)
    shapes = {Q: (4, 4), UP: (8, 4)}
    factors = {
        f"base_model.model.{name}.lora_{side}.weight": torch.randn(shape, generator=generator)
        for name, (rows, columns) in shapes.items()
        for side, shape in (("A", (2, columns)), ("B", (rows, 2)))
    }
    save_file(factors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "target_modules": ["q_proj", "up_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def adapters(folder):
    """Two adapters on the base itself, and one on a fine-tune."""
    written(folder / "fine-tune", 1)
    for seed, name in enumerate(("code", "math", "wiki")):
        adapter(folder / name, seed)
    models = {"code": "base", "math": "base", "wiki": "fine-tune"}
    return {name: {"model": model, "adapter": name} for name, model in models.items()}


def dtypes(folder):
    """Experts in dtypes of their own."""
    written(folder / "code", 1, torch.float32)
    written(folder / "math", 2, torch.float16)
    return {"code": "code", "math": "math"}


def pickles(folder):
    """An expert in a pickle, with a matrix whose rows lie scattered over the file."""
    tensors = llama(1, layers=1, dtype=torch.bfloat16)
    tensors[UP + ".weight"] = tensors[UP + ".weight"].T.contiguous().T
    (folder / "code").mkdir()
    (folder / "code" / "config.json").write_text(json.dumps(CONFIG))
    torch.save(tensors, folder / "code" / "pytorch_model.bin")
    written(folder / "math", 2)
    return {"code": "code", "math": "math"}


def vocabularies(folder):
    """An expert with more tokens than the base."""
    save(folder / "code", llama(1, rows=11, layers=1, dtype=torch.bfloat16), {**CONFIG, "vocab_size": 11})
    written(folder / "math", 2)
    return {"code": "code", "math": "math"}


def conv1d(folder):
    """Matrices that are stored [in, out]."""
    shutil.rmtree(folder / "base")
    for seed, name in enumerate(("base", "code", "math")):
        generator = torch.Generator().manual_seed(seed)
        shapes = {"h.0.attn.c_attn.weight": (4, 12), "h.0.mlp.c_fc.weight": (4, 10), "ln_f.weight": (4,)}
        save(folder / name, {key: torch.randn(shape, generator=generator) for key, shape in shapes.items()}, GPT2)
    return {"code": "code", "math": "math"}


FORMS = [adapters, dtypes, pickles, vocabularies, conv1d]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("inputs", FORMS)
def test_every_form_of_input_is_merged_on_devices_as_on_the_cpu(tmp_path, devices, inputs, method):
    recipe = recipe_of(tmp_path, inputs, method)
    weights = []
    for place in (("cpu",), ("cuda:0", "cuda:1")):
        devices(*place)
        weights.append(merged(recipe, "auto"))
    assert weights[0] == weights[1]


def recipe_of(folder, inputs, method):
    written(folder / "base", 0)
    content = {"base": "base", "experts": inputs(folder), "method": method, "output": {"path": "out"}}
    content |= {"extra_rows": "drop"} if method in PACKS else {}  # which hold no rows that only some experts have
    return Recipe.parse(content, folder)


def merged(recipe, device):
    """The weight files of a merge."""
    merge(recipe, RunOptions(device=device), force=True)
    return {path.name: path.read_bytes() for path in (recipe.folder / "out").glob("*.safetensors")}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("method", ["linear", "ties", "dare_ties"])
@pytest.mark.parametrize("inputs", FORMS)
def test_a_gpu_merges_every_form_of_input_as_the_cpu_does(tmp_path, inputs, method):
    recipe = recipe_of(tmp_path, inputs, method)
    assert merged(recipe, "cuda") == merged(recipe, "cpu")


def test_matrices_are_merged_one_at_a_time_where_a_device_has_room_for_one(tmp_path, devices, monkeypatch):
    for seed, name in enumerate(("base", "code")):
        written(tmp_path / name, seed)
    running, counts, lock, read_rows = [], [], Lock(), Reader.read_rows

    def observed(reader, tensor, part, rows, device):
        if len(rows) < part.rows:  # a slice, which needs no leave
            return read_rows(reader, tensor, part, rows, device)
        with lock:
            running.append(part)
            counts.append(len(running))
        stored = read_rows(reader, tensor, part, rows, device)
        with lock:
            running.remove(part)
        return stored

    monkeypatch.setattr(Reader, "read_rows", observed)
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    devices("cuda:0", memory=1)
    content = {"base": "base", "experts": {"code": "code"}, "method": "iso_c", "output": {"path": "out"}}
    merge(Recipe.parse(content, tmp_path))
    assert max(counts) == 1
