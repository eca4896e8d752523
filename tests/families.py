"""Families of toy checkpoints whose tables have a row for each token of tokenizers with a few words."""

import json

import pytest
import torch
from checkpoints import CONFIG, load, save
from vocabularies import WORDS, save_tokenizer

from merger.engine.merge import merge
from merger.errors import CheckpointError
from merger.planning.planner import plan
from merger.recipe.recipe import Recipe

EMBEDDING, HEAD, BIAS, NORM = "model.embed_tokens.weight", "lm_head.weight", "lm_head.bias", "model.norm.weight"
N = len(WORDS)


class Family:
    """A base and experts in folders of their names, each with rows and a tokenizer of its own."""

    def __init__(self, folder):
        self.folder, self.experts, self.tensors = folder, {}, {}

    def add(
        self, name, rows=N, added=(), *, words=WORDS, config=None, bias=False, tied=False, tokenizer=True, **settings
    ):
        generator = torch.Generator().manual_seed(len(self.tensors))
        shapes = {EMBEDDING: (rows, 8), HEAD: (rows, 8), NORM: (8,)} | ({BIAS: (rows,)} if bias else {})
        shapes = {key: shape for key, shape in shapes.items() if not (tied and key == HEAD)}
        config = {"tie_word_embeddings": True} if tied else config
        self.tensors[name] = {key: torch.randn(shape, generator=generator) for key, shape in shapes.items()}
        save(self.folder / name, self.tensors[name], {**CONFIG, "vocab_size": rows, **(config or {})})
        if tokenizer:
            save_tokenizer(self.folder / name, words, added, **settings)
        if name != "base":
            self.experts[name] = name
        return self

    def recipe(self, **options):
        choice = {} if options.keys() & {"method", "pipeline"} else {"method": "task_arithmetic"}
        content = {"base": "base", "experts": self.experts, "output": {"path": "out"}, **choice}
        return Recipe.parse({**content, **options}, self.folder)

    def plan(self, **options):
        merge_plan = plan(self.recipe(**options))
        merge_plan.close()
        return merge_plan

    def merge(self, folder="out", **options):
        merge(self.recipe(**options))
        return load(self.folder / folder)

    def refusal(self, **options):
        with pytest.raises(CheckpointError) as caught:
            self.plan(**options)
        return str(caught.value)

    def output(self, name):
        return json.loads((self.folder / "out" / name).read_text())
