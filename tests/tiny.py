"""Tensors small enough to think about, and short ways to send them through stages."""

import torch

import merger.methods  # noqa: F401 registers every method
from merger.pipeline.in_memory import merge_stages
from merger.pipeline.parameters import Place
from merger.pipeline.passes import Sizes, run_slices, run_tensors
from merger.pipeline.registry import checked

NAME = "layers.0.w"


def tensor(values):
    return torch.as_tensor(values, dtype=torch.float32)


class Inputs(dict):
    """Inputs of stages for one matrix, as calibration makes them of its statistics."""

    def __init__(self, second_moment=None, mean=None, gram=None, token_share=None, fisher=None):
        self.second_moment, self.mean, self.gram = second_moment, mean, gram
        reached = None if second_moment is None else (second_moment != 0).any(1, keepdim=True)
        inputs = {
            "second_moment": _ones_for_zeros(second_moment),
            "mean_input": _ones_for_zeros(mean),
            "reached": reached,
            "gram": gram,
            "merged_gram": gram,
            "token_share": token_share,
            "fisher": fisher,
        }
        super().__init__({name: values for name, values in inputs.items() if values is not None})


class Rows:
    """An input of as many elements as the task vectors [k r c], in memory, read as a provider reads files."""

    def __init__(self, values):
        self._values = values

    def read(self, rows):
        return self._values[:, rows]


def _ones_for_zeros(values):
    return None if values is None else values.masked_fill(~(values != 0).any(1, keepdim=True), 1)


def bits(values):
    """Equal bits are equal numbers with the same sign of zero."""
    return values.contiguous().view(torch.int32)


def merge(stages, deltas, *, base=None, place=None, inputs=None, kind=None, **options):
    """The one tensor that comes of base + each expert's delta; ``deltas`` maps experts to task vectors."""
    deltas = {expert: tensor(delta) for expert, delta in deltas.items()}
    base = torch.zeros_like(next(iter(deltas.values()))) if base is None else tensor(base)
    return merge_stages(
        stages,
        {NAME: base},
        {expert: {NAME: base + delta} for expert, delta in deltas.items()},
        places={NAME: place or Place(tuple(deltas))},
        inputs={NAME: inputs or Inputs()},
        kinds=None if kind is None else {NAME: kind},
        **options,
    )[NAME]


def sparse(stage, deltas, **options):
    """What a sparsifier leaves of each expert's task vector."""
    only = {name: {expert: int(expert == name) for expert in deltas} for name in deltas}
    return {name: merge([stage, checked("sum", {"weight": only[name]})], deltas, **options) for name in deltas}


def kept(stage, deltas, **options):
    """Where a sparsifier leaves something."""
    return {expert: delta != 0 for expert, delta in sparse(stage, deltas, **options).items()}


def sliced(begin, tensors, rows=1):
    """Runs the flow ``begin(i, part)`` on every ``rows`` rows of each tensor i [.. r c], ranked together."""
    model = sum(tensor[0].numel() for tensor in tensors)
    outputs = [{} for _ in tensors]

    def visit(i, model_totals, earlier_sums):
        starts = range(0, tensors[i].shape[-2], rows)

        def carry(j):
            outputs[i][j] = yield from begin(i, slice(starts[j], starts[j] + rows))

        return run_slices(
            len(starts),
            carry,
            sizes=Sizes(tensors[i][0].numel(), model),
            model_totals=model_totals,
            earlier_sums=earlier_sums,
        )

    run_tensors([0] * len(tensors), visit)
    return [torch.cat([parts[j] for j in sorted(parts)], -2) for parts in outputs]


def inputs_of(tokens):
    """What calibration knows of experts whose tokens [t c] are given."""
    return Inputs(
        second_moment=torch.stack([tensor(x).square().mean(0) for x in tokens]),
        mean=torch.stack([tensor(x).mean(0) for x in tokens]),
    )
