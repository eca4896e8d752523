"""A model whose inputs are observed: loaded except for its blocks, with a head that computes nothing."""

from __future__ import annotations

import functools
from dataclasses import replace
from itertools import takewhile
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from merger.calibration.input_observer import InputObserver, MatrixKey
from merger.calibration.model import block_list, build, outer_lists
from merger.calibration.moments import InputSums, Moments, token_share
from merger.calibration.settings import default_dtype
from merger.calibration.weights import Loader
from merger.errors import CheckpointError
from merger.ops.precision import full_float32

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor

    from merger.calibration.samples import Batch
    from merger.calibration.settings import Settings
    from merger.calibration.weights import TensorSource
    from merger.checkpoint.checkpoint import Checkpoint


class EndOfPass(Exception):
    """Ends a forward pass early, when its purpose is fulfilled."""


class ObservedModel:
    """A checkpoint's model with its weights and its input observer; whoever runs a block loads it.

    What is outside the blocks comes from ``merged_weights``, the model that hidden states go through. ``make_observer``
    makes the input observer of the function that finds parameters, the settings and ``notice``.
    """

    def __init__(
        self,
        weights: Checkpoint,
        merged_weights: TensorSource,
        batches: Sequence[Batch],
        settings: Settings,
        device: str | torch.device,
        dtype: torch.dtype | None,
        trust_remote_code: bool,
        notice: Callable[[str], None],
        make_observer: Callable[..., InputObserver],
    ) -> None:
        self.label, self._settings = weights.label, settings
        self.weights, self.merged_weights = weights, merged_weights
        self.model = build(weights, trust_remote_code=trust_remote_code)
        self.batches = self._cut_batches(batches, notice)
        torch_device = torch.device(device)
        self.loader = Loader(self.model, weights, torch_device, dtype or default_dtype(weights, torch_device))
        self.observer = make_observer(self.loader.find, settings, notice=lambda text: notice(f"{self.label}: {text}"))
        self._block_list = block_list(self.model)
        self._module_names = {module: name for name, module in self.model.named_modules()}
        self._embedding = self._input_embedding()
        self._embedding_stays = False
        self._check_tokens()
        self._skip_head()
        self._load_outer_modules()
        self._wait_for_outer_lists()

    @property
    def blocks(self) -> list[nn.Module]:
        """The transformer blocks."""
        return [] if self._block_list is None else list(self.model.get_submodule(self._block_list))

    @property
    def block_names(self) -> list[str]:
        """The names of the blocks in the model."""
        return [f"{self._block_list}.{index}" for index in range(len(self.blocks))]

    def forward(self, batch: Batch) -> None:
        """Runs the model on a batch, to its end or until something raises EndOfPass."""
        device = self.loader.device
        self.observer.begin(batch, device)
        try:
            with torch.no_grad(), full_float32(), self.observer:
                self.model(input_ids=batch.ids.to(device), attention_mask=batch.mask.long().to(device))
        except EndOfPass:
            pass

    def counted_tokens(self, batch: Batch) -> Tensor:
        """Which tokens [samples length] of a batch count, on the model's device."""
        return batch.counted_tokens(self._settings.skip_first_tokens).to(self.loader.device)

    def take(self, prefix: str) -> dict[str, Moments]:
        """Removes and returns the moments of the parameters below ``prefix``, by the checkpoint's names."""
        sums = self.observer.take(f"{prefix}." if prefix else "")
        for key, key_sums in sums.items():  # in the order of the forward pass, so the first is the cause
            if not torch.isfinite(key_sums.squares).all():
                name = next((source for source, _ in self.loader.stored(key.name)), key.name)
                raise CheckpointError(f"{self.label}: what enters {name} is not finite: NaN or infinite activations")
        return self.loader.moments_by_name(self._unreached_sums(prefix) | sums, self.observer.axes)

    def outer_moments(self) -> dict[str, Moments]:
        """Returns the moments of the modules outside the blocks, and how often each token occurs."""
        moments = self.take("")
        if self._embedding is not None:
            share = token_share(self.batches, self._vocabulary_size(), self._settings)
            count = sum(int(batch.counted_tokens(self._settings.skip_first_tokens).sum()) for batch in self.batches)
            for name, _ in self.loader.stored(self._embedding):
                embedding_moments = moments.get(name, Moments(torch.tensor(count)))
                moments[name] = replace(embedding_moments, token_share=share)
        return moments

    def _unreached_sums(self, prefix: str) -> dict[MatrixKey, InputSums]:
        """Returns empty sums for the linear layers of a block that no token reached, such as an unused expert."""
        if not prefix:
            return {}
        modules = self.model.get_submodule(prefix).named_modules(prefix=prefix)
        return {
            MatrixKey(self.loader.first_name(f"{name}.weight")): InputSums.zero(
                module.in_features, gram=self.observer.gram, device=self.loader.device
            )
            for name, module in modules
            if isinstance(module, nn.Linear)
        }

    def unit_name(self, name: str) -> str:
        """Returns the checkpoint's name of a block: the prefix that its tensors' names have in common."""
        parameters = self.model.get_submodule(name).named_parameters(prefix=name)
        stored = [source.split(".") for parameter, _ in parameters for source, _ in self.loader.stored(parameter)]
        common_parts = takewhile(lambda column: len(set(column)) == 1, zip(*stored, strict=False))
        return ".".join(column[0] for column in common_parts)

    # --- what is outside the blocks -----------------------------------------------------------------

    def _outer_modules(self) -> Iterator[tuple[str, nn.Module, str | None]]:
        """All modules with their names, and the list of layers that each is in, if any."""
        lists = outer_lists(self.model)
        for name, module in self.model.named_modules():
            yield name, module, next((item for item in lists if f"{name}.".startswith(f"{item}.")), None)

    def _load_outer_modules(self) -> None:
        """Loads all but blocks and head, and other lists of layers."""
        for name, module, outer_list in self._outer_modules():
            if outer_list is None and module is not self.model.get_output_embeddings():
                self.loader.load(name, self.merged_weights, recurse=False)

    def _wait_for_outer_lists(self) -> None:
        """Lets other lists of layers, such as an image tower's, be loaded at their first call."""
        for name, module, outer_list in self._outer_modules():
            if outer_list is not None and outer_list != self._block_list:
                module.register_forward_pre_hook(functools.partial(self._enter, set(), name))

    def reload_outer_modules(self) -> None:
        """Loads what is outside the blocks again, with the head, where the merged weights have changed."""
        self._load_outer_modules()
        self._load_head()

    def _enter(self, entered: set[str], name: str, *_: Any) -> None:
        if name not in entered:
            entered.add(name)
            self.loader.load(name, self.merged_weights, recurse=False)

    def _skip_head(self) -> None:
        """Records the head's input without computing logits: a product with the vocabulary costs more than a block."""
        head = self.model.get_output_embeddings()
        if head is None:
            return
        key = MatrixKey(self.loader.first_name(f"{self._module_names[head]}.weight"))
        rows = head.weight.shape[0]

        def forward(hidden: Tensor, *_: Any, **__: Any) -> Tensor:
            if self.observer.on:
                self.observer.record(key, hidden, axis=-1)
            return torch.empty(*hidden.shape[:-1], rows, dtype=hidden.dtype, device="meta")

        head.forward = forward

    def restore_head(self) -> None:
        """Puts the true head back for good, behind the true embedding, which it may be."""
        head = self.model.get_output_embeddings()
        if head is not None and "forward" in vars(head):
            del head.forward
            self._load_head()

    def _load_head(self) -> None:
        head = self.model.get_output_embeddings()
        if head is None:
            return
        name = self._module_names[head]
        self.loader.load(name, self.merged_weights, recurse=False)
        if self._embedding is not None and self.loader.first_name(f"{name}.weight") == self._embedding:
            self.loader.place(f"{name}.weight", self.model.get_parameter(self._embedding))

    # --- the embedding, which would otherwise stay in memory all the while ----------------------------

    def _input_embedding(self) -> str | None:
        try:
            module = self.model.get_input_embeddings()
        except NotImplementedError:
            return None
        return f"{self._module_names[module]}.weight" if isinstance(module, nn.Embedding) else None

    def _cut_batches(self, batches: Sequence[Batch], notice: Callable[[str], None]) -> list[Batch]:
        """The batches, with samples cut to the number of positions that the model has."""
        positions = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if not positions or all(batch.ids.shape[1] <= positions for batch in batches):
            return list(batches)
        notice(f"{self.label}: samples are cut to {positions:,} tokens, the positions that the model has")
        return [batch.cut(positions) for batch in batches]

    def _check_tokens(self) -> None:
        if self._embedding is None:
            return
        rows, top = self._vocabulary_size(), max(int(batch.ids.max()) for batch in self.batches)
        if top >= rows:
            raise CheckpointError(
                f"{self.label}: its tokenizer gives token {top:,}, but {self._embedding} has {rows:,} rows"
            )

    def _vocabulary_size(self) -> int:
        assert self._embedding is not None
        return len(self.model.get_parameter(self._embedding))

    def randomise_embedding(self, *, seed: int) -> None:
        """Gives every token the same random vector: a table of the same shape that takes a single row of memory."""
        if self._embedding is None or self._embedding_stays:
            return
        rows, columns = self.model.get_parameter(self._embedding).shape
        row = torch.randn(columns, generator=torch.Generator().manual_seed(seed))
        table = row.to(self.loader.device, self.loader.dtype).expand(rows, columns)
        self.loader.place(self._embedding, nn.Parameter(table, requires_grad=False))

    def restore_embedding(self) -> bool:
        """Puts the true embedding back for good; False if it was not forgotten."""
        if self._embedding is None or self._embedding_stays:
            return False
        self._embedding_stays = True
        self.loader.load(self._embedding.rpartition(".")[0], self.merged_weights, recurse=False)
        return True
