"""Questions about the whole: how often slices are visited, and what they are told, side by side too."""

from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

import pytest
import torch

from merger.ops.questions import PrefixSum, Size, Sum
from merger.ops.radix import SampleHint, SampleNote, Tally
from merger.ops.selection import select
from merger.pipeline.passes import Sizes, rehearse, run_slices, run_tensors

SLICES = 6


@pytest.fixture
def threads():
    with ThreadPoolExecutor(3) as pool:
        yield pool.map


def told(ask, *, count=SLICES, mapper=map, **options):
    """What each slice's flow is told when it asks ``ask(i)``, and how many flows were started."""
    answers, started = {}, []

    def start(i):
        started.append(i)
        answers[i] = yield ask(i)

    assert run_slices(count, start, sizes=Sizes(60, 600), mapper=mapper, **options) is None
    return [answers[i] for i in range(count)], len(started)


def test_a_sum_takes_a_pass_and_is_the_same_for_all():
    answers, started = told(lambda i: Sum(torch.tensor([i])))
    assert [int(answer) for answer in answers] == [15] * SLICES
    assert started == 2 * SLICES


def test_held_flows_are_not_started_again():
    assert told(lambda i: Sum(torch.tensor([i])), hold=True)[1] == SLICES


def test_what_comes_before_takes_no_pass(threads):
    answers, started = told(lambda i: PrefixSum(lambda: torch.tensor([i])), mapper=threads)
    assert [int(answer) for answer in answers] == [0, 0, 1, 3, 6, 10]
    assert started == SLICES


def test_counts_of_all_slices_come_together(threads):
    def count(i, into):
        into[0, i] += 1

    answers, _ = told(
        lambda i: Tally(lambda into: count(i, into), (1, SLICES), "tensor", torch.Tensor.clone), mapper=threads
    )
    assert all(answer.tolist() == [[1] * SLICES] for answer in answers)


def test_a_size_is_told_at_once():
    assert told(lambda i: Size("global")) == ([600] * SLICES, SLICES)


def test_a_guess_is_what_a_sample_found_after_it(threads):
    def ask(number):
        yield Sum(torch.tensor([number]))
        guess = yield SampleHint("tensor")
        total = yield Sum(torch.tensor([number]), finish=int)
        yield SampleNote([total], "tensor")
        return guess, total

    answers, rehearsals = {}, []

    def start(i):
        answers[i] = yield from ask(i)

    def rehearse_sample():
        rehearsals.append(rehearse(lambda: ask(7), 1))
        return rehearsals[-1]

    assert run_slices(SLICES, start, sizes=Sizes(60, 600), mapper=threads, rehearse=rehearse_sample) is None
    assert rehearsals == [{0: [7]}]
    assert list(answers.values()) == [([7], 15)] * SLICES


def test_nobody_rehearses_what_asks_for_no_guess_at_a_tensor():
    def rehearse_sample():
        raise AssertionError("it was asked")

    assert told(lambda i: Sum(torch.tensor([i])), rehearse=rehearse_sample)[1] == 2 * SLICES
    assert told(lambda i: SampleHint("global"), rehearse=rehearse_sample) == ([None] * SLICES, SLICES)


@pytest.mark.parametrize(
    ("sample", "passes"),
    [(slice(None), 2), (slice(0, 1), 4)],
    ids=["one that is like the whole saves a pass", "one that is not costs one"],
)
def test_a_sample_decides_how_often_slices_are_read_and_nothing_else(sample, passes):
    scores = torch.randn(SLICES, 2, 1, 500, generator=torch.Generator().manual_seed(0))
    scores[0] *= 1e6
    visits, masks = [], torch.zeros(scores.shape, dtype=torch.bool)

    def start(i):
        visits.append(i)
        masks[i] = yield from select(scores[i], [Fraction(1, 2), Fraction(1, 10)])

    def rehearse_sample():
        sample_scores = scores[sample].transpose(0, 1).reshape(2, 1, -1)
        return rehearse(lambda: select(sample_scores, [Fraction(1, 2), Fraction(1, 10)]), sample_scores[0].numel())

    sizes = Sizes(SLICES * 500, SLICES * 500)
    assert run_slices(SLICES, start, sizes=sizes, rehearse=rehearse_sample) is None
    assert len(visits) == passes * SLICES
    for expert, count in enumerate((1500, 300)):
        highest = scores[:, expert].flatten().abs().sort(stable=True, descending=True).indices[:count]
        assert masks[:, expert].flatten().nonzero().flatten().tolist() == highest.sort().values.tolist()


def test_who_waits_for_a_slice_that_failed_is_let_go(threads):
    def start(i):
        if i == 2:
            raise ValueError("slice 2 cannot be read")
        yield PrefixSum(lambda: torch.tensor([1]))

    with pytest.raises(ValueError, match="slice 2 cannot be read"):
        run_slices(SLICES, start, sizes=Sizes(6, 6), mapper=threads)


def test_a_ranking_over_the_model_reads_every_slice_three_times():
    scores = torch.arange(24.0).view(2, 4, 1, 1, 3) % 5  # two tensors of four slices; with ties
    visits, masks = [0, 0], torch.zeros(2, 4, 1, 1, 3, dtype=torch.bool)

    def visit(i, model_totals, earlier_sums):
        def start(j):
            visits[i] += 1
            masks[i, j] = yield from select(scores[i, j], [Fraction(1, 4)], scope="global")

        return run_slices(4, start, sizes=Sizes(12, 24), model_totals=model_totals, earlier_sums=earlier_sums)

    run_tensors([0, 0], visit)
    highest = scores.flatten().sort(stable=True, descending=True).indices[:6]
    assert masks.flatten().nonzero().flatten().tolist() == highest.sort().values.tolist()
    assert visits == [12, 12]
