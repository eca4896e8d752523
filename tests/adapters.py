"""A tiny base with random peft adapters on it, and merges of them."""

import json

import torch
from checkpoints import load
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file

from merger import merge
from merger.recipe.recipe import Recipe

IDS = torch.tensor([[3, 9, 20, 4]])
PREFIX = "base_model.model."


class Adapters:
    """A base, and random adapters on it, in folders of a temporary one."""

    def __init__(self, folder, make, tied):
        torch.manual_seed(0)
        model = make(tied)
        self.folder, self.kind = folder, type(model)
        model.save_pretrained(folder / "base")

    def base(self, rows=None):
        model = self.kind.from_pretrained(self.folder / "base")
        if rows:
            model.resize_token_embeddings(rows, mean_resizing=False)
        return model

    def train(self, rows=None, **config):
        """Saves an adapter; the logits of the model that peft loads."""
        model = get_peft_model(self.base(rows), LoraConfig(r=4, lora_alpha=8, **config))
        torch.manual_seed(1)
        for parameter in model.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.2)
        model.save_pretrained(self.folder / "lora")
        with torch.no_grad():
            return PeftModel.from_pretrained(self.base(rows), self.folder / "lora")(input_ids=IDS).logits

    def merged(self, **expert):
        """The merge of the adapter alone: its logits, tensors and notes."""
        document = {
            "base": "base",
            "experts": {"a": {"model": "base", "adapter": "lora", **expert}},
            "method": "task_arithmetic",
            "output": {"path": "out"},
        }
        result = merge(Recipe.parse(document, self.folder), force=True)
        model, info = self.kind.from_pretrained(self.folder / "out", output_loading_info=True)
        assert not any(info.values()), info
        with torch.no_grad():
            return model(input_ids=IDS).logits, load(self.folder / "out"), result.notes

    def rename(self, function, folder="lora", file="adapter_model.safetensors"):
        """Stores the adapter's tensors under the names, one or several, that ``function`` gives for each."""
        stored = {new: tensor.clone() for name, tensor in load(self.folder / folder).items() for new in function(name)}
        save_file(stored, self.folder / folder / file, {"format": "pt"})

    def config(self, name="out"):
        return json.loads((self.folder / name / "config.json").read_text())

    def close(self, logits, expected):
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
