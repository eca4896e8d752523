"""Methods that look at the task vectors alone and are no average of them, each against its formula written slowly."""

import math

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import merge, sparse, tensor

from merger.pipeline.registry import checked


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def deltas_of(k, *shape, seed=0):
    return dict(zip("abcde", randn(k, *shape, seed=seed), strict=False))


def alike(k, *shape, seed=0):
    """Task vectors that have something in common."""
    return {expert: delta + randn(*shape, seed=99) for expert, delta in deltas_of(k, *shape, seed=seed).items()}


# --- disentangle, awd -----------------------------------------------------------------------------


def awd_loss(deltas, redundant, alpha):
    rests = torch.stack([(delta.double() - redundant).flatten() for delta in deltas.values()])
    cosines = torch.nn.functional.cosine_similarity(rests[:, None], rests[None], dim=2)
    pairs = len(rests) * (len(rests) - 1)
    return (cosines.abs().sum() - cosines.diagonal().abs().sum()) / pairs + alpha * redundant.norm()


def descended(deltas, alpha, rate, steps):
    """The vector that plain gradient descent on all of its elements ends at."""
    redundant = torch.zeros_like(next(iter(deltas.values())).double(), requires_grad=True)
    with torch.enable_grad():
        for step in range(steps):
            loss = awd_loss(deltas, redundant, alpha if step else 0)  # the length has no gradient at zero
            (gradient,) = torch.autograd.grad(loss, redundant)
            redundant = (redundant - rate * gradient).detach().requires_grad_()
    return redundant.detach()


@pytest.mark.parametrize("k", [2, 3, 5])
def test_disentangle_is_gradient_descent_on_all_elements(k):
    deltas = alike(k, 6, 8)
    settings = {"alpha": 0.02, "rate": 0.5, "steps": 40}
    result = sparse(checked("disentangle", settings), deltas)
    redundant = descended(deltas, 0.02, 0.5, 40)
    assert float(awd_loss(deltas, redundant, 0.02)) < float(awd_loss(deltas, torch.zeros(6, 8).double(), 0.02))
    for expert, delta in deltas.items():
        torch.testing.assert_close(result[expert], (delta.double() - redundant).float(), rtol=0, atol=1e-5)


@given(seed=st.integers(0, 50), rate=st.sampled_from([0.01, 1.0, 30.0]))
def test_disentangle_never_raises_the_loss(seed, rate):
    deltas = alike(3, 4, 5, seed=seed)
    result = sparse(checked("disentangle", {"rate": rate}), deltas)
    redundant = (deltas["a"] - result["a"]).double()
    before = float(awd_loss(deltas, torch.zeros(4, 5).double(), 0.1))
    assert float(awd_loss(deltas, redundant, 0.1)) <= before + 1e-6


def test_disentangle_leaves_orthogonal_task_vectors():
    deltas = {"a": tensor([[1, 0], [0, 0]]), "b": tensor([[0, 0], [2, 0]])}
    assert torch.equal(sparse(checked("disentangle", {}), deltas)["b"], deltas["b"])


@pytest.mark.parametrize("deltas", [{"a": [[1.0, 2]]}, {"a": [[1.0, 2]], "b": [[0.0, 0]]}])
def test_disentangle_leaves_one_expert_alone_and_those_that_changed_nothing(deltas):
    for expert, result in sparse(checked("disentangle", {}), deltas).items():
        assert torch.equal(result, tensor(deltas[expert]))


def test_awd_adds_what_is_left():
    deltas = alike(3, 4, 6)
    settings = {"alpha": 0.01, "rate": 1, "steps": 5}
    rests = sparse(checked("disentangle", settings), deltas)
    expected = 0.5 * sum(rests.values())
    torch.testing.assert_close(merge(checked("awd", {**settings, "lambda": 0.5}), deltas), expected)


# --- high_pass, magnitude_mean, fr ----------------------------------------------------------------


def passed(delta, radius):
    """The inverse transform of what is outside of the circle, summed frequency by frequency."""
    rows, columns = delta.shape
    spectrum, result = numpy.fft.fft2(delta.double().numpy()), 0
    for u in range(rows):
        for v in range(columns):
            vertical, horizontal = min(u, rows - u), min(v, columns - v)
            if math.hypot(vertical, horizontal) >= radius:
                waves = numpy.exp(
                    2j * numpy.pi * (u * numpy.arange(rows)[:, None] / rows + v * numpy.arange(columns) / columns)
                )
                result = result + spectrum[u, v] * waves / (rows * columns)
    return tensor(numpy.real(result)) if numpy.ndim(result) else torch.zeros(rows, columns)


@pytest.mark.parametrize(("share", "radius"), [(0, 0), ("1/6", 1), (0.3, 2), (1, 6)])
@pytest.mark.parametrize("shape", [(6, 9), (9, 6)])
def test_high_pass_is_the_rest_of_the_spectrum(shape, share, radius):
    delta = randn(*shape)
    result = sparse(checked("high_pass", {"radius": share}), {"a": delta})["a"]
    torch.testing.assert_close(result, passed(delta, radius), rtol=0, atol=1e-5)


def test_high_pass_takes_one_radius_for_each_expert():
    deltas = deltas_of(2, 6, 6)
    result = sparse(checked("high_pass", {"radius": {"a": 0, "b": "1/6"}}), deltas)
    torch.testing.assert_close(result["a"], deltas["a"])
    torch.testing.assert_close(result["b"], deltas["b"] - deltas["b"].mean())


def test_the_example_of_high_pass():
    result = sparse(checked("high_pass", {}), {"a": [[4.0, 0], [0, 0]]})["a"]
    torch.testing.assert_close(result, tensor([[3, -1], [-1, -1]]))


@pytest.mark.parametrize("kind", ["vector", "embedding", "tied", "other"])
def test_high_pass_leaves_what_is_no_matrix(kind):
    deltas = deltas_of(2, 6, 6)
    assert torch.equal(sparse(checked("high_pass", {"radius": 1}), deltas, kind=kind)["b"], deltas["b"])


def test_magnitude_mean_weighs_by_the_size_of_the_change():
    assert torch.equal(merge(checked("magnitude_mean", {}), {"a": [[4.0, -2]], "b": [[0.0, 2]]}), tensor([[3, -1]]))
    assert torch.equal(merge(checked("magnitude_mean", {}), {"a": [[0.0]], "b": [[0.0]]}), tensor([[0]]))


def test_fr_weighs_by_the_task_vectors_and_not_by_what_passed():
    deltas = {"a": torch.full((6, 6), 3.0), "b": randn(6, 6)}
    sizes = [float(delta.abs().sum()) for delta in deltas.values()]
    expected = passed(deltas["b"], 1) * sizes[1] / sum(sizes)
    torch.testing.assert_close(merge(checked("fr", {}), deltas), expected, rtol=0, atol=1e-5)


# --- doge -----------------------------------------------------------------------------------------


def slow_doge(deltas, eta, span, density, steps, rate):
    vectors = torch.stack(list(deltas.values()))
    count, full = len(vectors), min(vectors.shape[1:])
    factors = [eta / delta.norm() for delta in vectors]
    left_vectors = [torch.linalg.svd(delta, full_matrices=False)[0][:, : full // count] for delta in vectors]
    together = torch.linalg.svd(torch.cat(left_vectors, 1), full_matrices=False)[0][:, : int(full * span)]
    projector = together @ together.T
    change = torch.zeros_like(vectors[0], requires_grad=True)
    optimizer = torch.optim.Adam([change], lr=rate)
    with torch.enable_grad():
        for _ in range(steps):
            merged_vector = sum(factor * (delta + change) for factor, delta in zip(factors, vectors, strict=True))
            loss = sum(((delta * (delta - merged_vector)).sum(1) ** 2).sum() for delta in vectors)
            (gradient,) = torch.autograd.grad(loss, change)
            change.grad = gradient - projector @ gradient
            optimizer.step()
    result = torch.zeros_like(vectors[0])
    for factor, delta in zip(factors, vectors, strict=True):
        largest = delta.abs().flatten().argsort(descending=True)[: int(density * delta.numel())]
        mask = torch.zeros(delta.numel()).scatter(0, largest, 1).view_as(delta)
        result += factor * (delta + change.detach()) * mask
    return result


@pytest.mark.parametrize("k", [2, 3])
def test_doge_is_adam_on_the_projected_gradient(k):
    deltas = deltas_of(k, 12, 14)
    settings = {"eta": 0.5, "span": 0.25, "density": 0.5, "steps": 30, "rate": 0.01}
    expected = slow_doge(deltas, **settings)
    torch.testing.assert_close(merge(checked("doge", settings), deltas), expected, rtol=0, atol=2e-4)
    assert float((expected - slow_doge(deltas, **{**settings, "steps": 0})).abs().max()) > 0.01


def test_doge_without_steps_adds_trimmed_task_vectors_of_equal_norm():
    deltas = {"a": tensor([[3, 0], [0, 4]]), "b": tensor([[0, 0], [8, 6]])}
    result = merge(checked("doge", {"steps": 0, "eta": 1, "density": 0.5}), deltas)
    torch.testing.assert_close(result, tensor([[0.6, 0], [0.8, 1.4]]))


def test_doge_leaves_out_an_expert_that_changed_nothing():
    delta = randn(6, 6)
    settings = {"steps": 5, "density": 1}
    result = merge(checked("doge", settings), {"a": delta, "b": torch.zeros(6, 6)})
    assert torch.isfinite(result).all()
    torch.testing.assert_close(result, 0.07 * delta / delta.norm(), rtol=0, atol=0.07 * 5e-3)


@pytest.mark.parametrize("kind", ["vector", "embedding", "head"])
def test_doge_leaves_at_the_base_what_is_no_matrix(kind):
    assert not merge(checked("doge", {}), deltas_of(2, 6, 6), kind=kind).any()
