"""The laws that hold for every registered merger, sparsifier and method, with any valid parameters.

A function is found in the registry and its parameters are drawn from its own signature, so a new one
is tested here as soon as it is registered. Where a law holds only with some of a function's
parameters fixed, they stand in a table beside the law.
"""

import math
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any

import pytest
import torch
from drawing import parameters_of
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pretended import CudaRounding, Pretence
from tiny import Inputs, Rows, bits

from merger.methods._spectral import runs, whole
from merger.ops.questions import MatrixSums, Sum
from merger.pipeline.flow import Slice, Subject, flow
from merger.pipeline.in_memory import merge_stages
from merger.pipeline.parameters import Place
from merger.pipeline.passes import Sizes, run_slices, run_tensors
from merger.pipeline.registry import ENTRIES, SCORES, checked, parameters
from merger.pipeline.stages import bind, expand

every = pytest.mark.parametrize("name", [*ENTRIES, *SCORES])
EXPERTS = "abcde"


# --- a model and a merge of it, both drawn --------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """What `merge_stages` is called with."""

    stages: list[Any]
    base: dict[str, torch.Tensor]
    experts: dict[str, dict[str, torch.Tensor]]
    keywords: dict[str, Any] = field(default_factory=dict)

    def merged(self, **options):
        return merge_stages(self.stages, self.base, self.experts, **self.keywords, **options)

    def only(self, name):
        """The same merge of one of its tensors."""
        experts = {expert: {name: tensors[name]} for expert, tensors in self.experts.items()}
        return replace(self, base={name: self.base[name]}, experts=experts)

    def bound(self, name):
        """The stages as they are settled for one tensor."""
        kind, place = self.keywords["kinds"][name], self.keywords["places"][name]
        return [bind(expansion, place) for stage in self.stages for expansion in expand(stage, kind, place.experts)]


SHAPES = [(), (1,), (7,), (1, 1), (1, 5), (4, 1), (2, 4), (3, 5), (2, 3, 4)]
FEW = [(0.0,), (0.0, 0.25), (-1.0, 1.0), (-1.0, -0.25, 0.0, 0.25, 0.5, 1.0, 2.5)]  # equal scores abound
ODD = (0.0, -0.0, 1.0, -3.14159, 1e-40, 1e30, 0.1)


def drawn(generator, shape, values):
    """A tensor whose every element is one of ``values``."""
    return torch.tensor(values)[torch.randint(len(values), shape, generator=generator)]


def staged(name, parameters):
    """A merge with the function ``name`` in it: whatever it is, the K deltas become one."""
    stage, kind = checked(name, parameters), ENTRIES[name].kind if name in ENTRIES else "sparsifier"
    if kind in ("scale", "filter"):
        return [checked("sum", {}), stage]
    return [stage, checked("sum", {})] if kind == "sparsifier" else [stage]


@st.composite
def cases(draw, name, parameters=None, base=FEW[-1]):
    """A merge by the function ``name``, with these ``parameters`` and all others drawn."""
    entry = (ENTRIES | SCORES)[name]
    counts = [k for k in (1, 2, 3, 5) if k >= entry.fewest]
    experts = tuple(EXPERTS[: entry.experts or draw(st.sampled_from(counts))])
    parameters = draw(parameters_of(name, experts)) | (parameters or {})
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    names = draw(st.sampled_from([("norm",), ("layers.10.w", "layers.2.w")]))
    shapes = {key: draw(st.sampled_from(SHAPES)) for key in names}
    start = {key: drawn(generator, shape, base) for key, shape in shapes.items()}
    values = draw(st.sampled_from(FEW))
    tuned = {
        expert: {key: start[key] + drawn(generator, shape, values) for key, shape in shapes.items()}
        for expert in experts
    }
    depth = draw(st.sampled_from([Fraction(0), Fraction(1, 3), Fraction(1)]))
    kinds = {
        key: draw(st.sampled_from(["linear", "head", "embedding"] if len(shape) > 1 else ["vector", "other"]))
        for key, shape in shapes.items()
    }
    keywords = {
        "kinds": kinds,
        "places": {
            key: Place(experts, depth=depth, block=draw(st.integers(0, 4)), linear=i) for i, key in enumerate(shapes)
        },
        "inputs": {key: _inputs(generator, kinds[key], len(experts), shape) for key, shape in shapes.items()},
        "seed": draw(st.integers(0, 3)),
    }
    try:
        case = Case(staged(name, parameters), start, tuned, keywords)
        assert all(case.bound(key) for key in start)
    except ValueError:
        assume(False)  # a combination of parameters that is refused
    return case


def _inputs(generator, kind, k, shape):
    *rows, columns = shape or (1,)
    fisher = Rows(drawn(generator, (k, math.prod(rows), columns), (0.0, 0.25, 1.0, 4.0)))
    if kind == "embedding":
        share = drawn(generator, (k, math.prod(shape[:-1])), (0.0, 0.25, 0.5))
        return Inputs(token_share=share, fisher=fisher)
    if kind in ("vector", "other"):
        return Inputs(fisher=fisher)
    return Inputs(
        second_moment=drawn(generator, (k, shape[-1]), (0.0, 0.25, 1.0, 4.0)),
        mean=drawn(generator, (k, shape[-1]), (-1.0, 0.0, 0.5)),
        fisher=fisher,
    )


def sums_floats(case):
    """Whether some answer or product is a sum of floating-point numbers, so that it depends on where slices end."""
    return any(
        _sums_floats(case.only(name), name) or any(stage.takes == "runs" for stage in case.bound(name))
        for name in case.base
    )


def _sums_floats_of_slices(question):
    return isinstance(question, MatrixSums) or (isinstance(question, Sum) and question.value.is_floating_point())


def _sums_floats(case, name):
    base = case.base[name].reshape(-1, case.base[name].shape[-1] if case.base[name].dim() else 1)
    expert_weights = torch.stack([tensors[name].reshape(base.shape) for tensors in case.experts.values()])
    subject = Subject(
        name,
        case.keywords["kinds"][name],
        case.keywords["places"][name],
        *base.shape,
        inputs=case.keywords["inputs"][name],
    )
    float_sums = []

    def record_float_sums():
        running = flow(case.bound(name), Slice(0, base, expert_weights - base), subject)
        question = next(running, None)
        while question is not None:
            float_sums.append(_sums_floats_of_slices(question))
            try:
                question = running.send((yield question))
            except StopIteration:
                return

    def visit(_, model_totals, earlier_sums):
        sizes = Sizes(base.numel(), base.numel())
        return run_slices(
            1, lambda _: record_float_sums(), sizes=sizes, model_totals=model_totals, earlier_sums=earlier_sums
        )

    run_tensors([0], visit)
    return any(float_sums)


def assert_same(result, expected, *, exactly=True):
    assert result.keys() == expected.keys()
    for name, values in result.items():
        if exactly:
            assert torch.equal(bits(values), bits(expected[name])), name
        else:
            torch.testing.assert_close(values, expected[name], rtol=1e-6, atol=1e-6)


# --- the laws -------------------------------------------------------------------------------------

WEIGHTED_MEAN = {
    "linear": {"normalize": True},
    "multislerp": {"normalize": True},
}  # else the output is the base times the sum of the weights


@every
@given(st.data())
def test_experts_equal_to_the_base_give_the_base(name, data):
    case = data.draw(cases(name, WEIGHTED_MEAN.get(name), base=ODD))
    untrained = replace(case, experts=dict.fromkeys(case.experts, case.base))
    assert_same(untrained.merged(), case.base)


OF_A_PART = {"cart", "byom"}  # whose lambda scales what is added to the mean, or what all experts share
WITH_LAMBDA = [n for n, e in ENTRIES.items() if "lambda_" in parameters(e.function) and n not in OF_A_PART]


@pytest.mark.parametrize("name", WITH_LAMBDA)
@given(st.data())
def test_a_lambda_of_zero_gives_the_base(name, data):
    case = data.draw(cases(name, {"lambda": 0}, base=ODD))
    assert_same(case.merged(), case.base)


@every
@given(st.data())
def test_names_and_shapes_are_those_of_the_base(name, data):
    case = data.draw(cases(name))
    merged = case.merged()
    assert {key: values.shape for key, values in merged.items()} == {
        key: values.shape for key, values in case.base.items()
    }
    assert all(values.dtype == torch.float32 and values.isfinite().all() for values in merged.values())


@every
@given(st.data(), st.sampled_from([1, 10]))
def test_the_size_of_slices_does_not_matter(name, data, elements):
    case = data.draw(cases(name))
    assert_same(case.merged(slice_elements=elements), case.merged(), exactly=not sums_floats(case))


def matrix(name, parameters, rows, columns):
    """A merge of one matrix of normal deviates."""
    generator = torch.Generator().manual_seed(0)
    experts = experts_of(name)
    base = {"w": torch.randn(rows, columns, generator=generator)}
    tuned = {expert: {"w": torch.randn(rows, columns, generator=generator)} for expert in experts}
    keywords = {
        "kinds": {"w": "linear"},
        "places": {"w": Place(tuple(experts))},
        "inputs": {"w": _inputs(generator, "linear", len(experts), (rows, columns))},
    }
    return Case(staged(name, parameters), base, tuned, keywords)


def experts_of(name):
    return EXPERTS[: ENTRIES[name].experts or 5] if name in ENTRIES else EXPERTS


@every
def test_the_size_of_slices_does_not_matter_to_long_rows(name):
    case = matrix(name, {}, 40, 67)  # no power of two of elements
    assert_same(case.merged(slice_elements=400), case.merged(), exactly=not sums_floats(case))


@every
def test_the_size_of_slices_does_not_matter_to_tall_matrices(name):
    case = matrix(name, {}, 64, 3)  # as a head is: runs of 10 rows for stages that sum over rows
    assert_same(case.merged(slice_elements=2), case.merged(), exactly=not sums_floats(case))


@every
@given(st.data())
def test_a_second_merge_gives_the_same_bits_whatever_the_order_of_tensors(name, data):
    case = data.draw(cases(name))
    turned = replace(case, base=dict(reversed(case.base.items())))
    assert_same(turned.merged(), case.merged())


@every
@given(st.data())
def test_a_tensor_that_is_not_ranked_with_others_does_not_depend_on_them(name, data):
    case = data.draw(cases(name))
    assume(not any(bound.values.get("scope") == "global" for bound in case.bound(next(iter(case.base)))))
    merged = case.merged()
    assert_same({key: case.only(key).merged()[key] for key in case.base}, merged)


@every
@given(st.data())
def test_inputs_are_left_as_they_were(name, data):
    case = data.draw(cases(name))
    base = {key: values.clone() for key, values in case.base.items()}
    tuned = {
        e: {key: values.clone() for key, values in expert_weights.items()} for e, expert_weights in case.experts.items()
    }
    case.merged()
    assert_same(case.base, base)
    for expert, tensors in case.experts.items():
        assert_same(tensors, tuned[expert])


DELTA_SPACE = {name: {"space": "delta"} for name in ("slerp", "nuslerp", "multislerp", "karcher")}
HOMOGENEOUS = {
    **WEIGHTED_MEAN,
    **DELTA_SPACE,
    "nan": {"norm_of": "delta"},
    "pcb": {"variant": "paper"},
    "ram": {"epsilon": 0},
    "sce": {"even_below": 0},
    "wudi": {"ridge": "relative"},  # an absolute one has the unit of squared weights
}
# A tanh of raw products, a divergence of softmaxes, a distance in the weights' own unit, and steps of a fixed length.
NEVER_HOMOGENEOUS = ["pcb_official", "arcee_fusion", "nearswap", "disentangle", "awd", "doge"]


@pytest.mark.parametrize("name", [n for n in [*ENTRIES, *SCORES] if n not in NEVER_HOMOGENEOUS])
@given(st.data(), st.sampled_from([0.5, 2.0, 8.0]))
def test_scaling_the_task_vectors_scales_what_is_merged(name, data, factor):
    case = data.draw(cases(name, HOMOGENEOUS.get(name), base=(0.0,)))
    scaled = {
        e: {key: values * factor for key, values in expert_weights.items()}
        for e, expert_weights in case.experts.items()
    }
    once = {key: values * factor for key, values in case.merged().items()}
    assert_same(replace(case, experts=scaled).merged(), once, exactly=False)


@every
@settings(max_examples=4)
@given(st.data())
def test_tensors_on_a_device_never_meet_those_of_the_cpu(name, data):
    case = data.draw(cases(name, {"weight": 1} if name == "regmean" else None))  # no factor of a negative matrix
    inputs = {key: _with_gram(tensor_inputs) for key, tensor_inputs in case.keywords["inputs"].items()}
    case = replace(case, keywords={**case.keywords, "inputs": inputs})
    assert_same(merged_elsewhere(case, Pretence, slice_elements=4), case.merged(slice_elements=4))


def merged_elsewhere(case, pretence, **options):
    """What a merge of tensors on a pretended device gives, brought back."""
    with pretence():
        base, *tuned = (
            {key: values.to("cuda:0") for key, values in tensors.items()}
            for tensors in (case.base, *case.experts.values())
        )
        merged = replace(case, base=base, experts=dict(zip(case.experts, tuned, strict=True))).merged(**options)
        assert {str(values.device) for values in merged.values()} == {"cuda:0"}
        return {key: values.cpu() for key, values in merged.items()}


def is_exact(case):
    """Whether every stage, with its score and what runs inside it, is said to give the same bits on every device."""
    return all(part.entry.exact for name in case.base for stage in case.bound(name) for part in stage.parts)


@pytest.mark.parametrize("name", [name for name in [*ENTRIES, *SCORES] if is_exact(matrix(name, {}, 40, 67))])
@given(st.data())
def test_what_is_said_to_be_exact_has_the_same_bits_where_cuda_rounds(name, data):
    try:
        case = matrix(name, data.draw(parameters_of(name, tuple(experts_of(name)))), 40, 67)
        assume(is_exact(case))
    except ValueError:
        assume(False)  # a combination of parameters that is refused
    assert_same(merged_elsewhere(case, CudaRounding), case.merged())


def _with_gram(inputs):
    """The inputs of a matrix with Gram matrices beside the second moments."""
    if inputs.second_moment is None:
        return inputs
    gram = torch.diag_embed(inputs.second_moment)
    return Inputs(second_moment=inputs.second_moment, mean=inputs.mean, gram=gram)


def test_what_decomposes_matrices_is_not_said_to_be_exact():
    names = {name for name, entry in ENTRIES.items() if entry.kind != "method" and entry.takes in (runs, whole)}
    assert names >= {"tsv_m", "wudi", "svc", "regmean", "truncate"}
    assert not any(ENTRIES[name].exact for name in names)


@pytest.mark.parametrize("name", [n for n, e in ENTRIES.items() if e.exact and e.kind != "method"] + [*SCORES])
@given(st.data())
def test_what_is_said_to_be_exact_sums_no_floats_over_a_tensor(name, data):
    case = data.draw(cases(name, {"zero_sign": "zero"} if name == "sign_elect" else None))  # the other sums signs
    assert not sums_floats(case)
