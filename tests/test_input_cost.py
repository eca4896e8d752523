"""What a plan says that calibration will take, on the shapes of a 7B model; no file here holds any weights."""

import pytest
from checkpoints import save_headers
from test_plan import CAUSAL, blocks, vocabulary

from merger.calibration.provider import Cost, cost
from merger.engine.machine import Machine
from merger.engine.memory import INTERPRETER, MemoryNeed
from merger.engine.preflight import preview
from merger.errors import ResourceError
from merger.planning.planner import plan
from merger.recipe.recipe import Recipe

HIDDEN, INNER, ROWS = 4096, 11008, 32000
BLOCK = 4 * HIDDEN * HIDDEN + 3 * HIDDEN * INNER + 2 * HIDDEN  # numbers of one block
SQUARES = 6 * HIDDEN**2 + INNER**2  # numbers of the Gram matrices of its seven matrices' inputs
GB = 10**9


@pytest.fixture
def planned(tmp_path):
    def make(method, samples=10):
        config = {**CAUSAL, "hidden_size": HIDDEN}
        for name in ("base", "lm", "math"):
            save_headers(tmp_path / name, blocks(HIDDEN, INNER, 2) | vocabulary(ROWS, HIDDEN), config)
        content = {"base": "base", "experts": {"lm": "lm", "math": "math"}, "method": method, "output": {"path": "out"}}
        (tmp_path / "text.jsonl").touch()
        text = {"data": "text.jsonl", "samples": samples, "max_tokens": 512}
        merge_plan = plan(Recipe.parse({**content, "calibration": text}, tmp_path))
        merge_plan.close()
        return merge_plan

    return make


def test_without_calibration_nothing_is_taken(planned):
    merge_plan = planned("linear")
    assert cost(merge_plan) == Cost()


def test_a_saliency_takes_the_embedding_or_a_block_whichever_is_larger(planned):
    assert cost(planned("obim")).making == 4 * max(BLOCK, ROWS * HIDDEN)


def test_gram_matrices_take_float64_for_the_expert_that_runs_and_float32_for_all(planned):
    merge_plan = planned("regmean")
    assert cost(merge_plan).making == 4 * BLOCK + (8 + 4 * 2) * SQUARES
    assert cost(merge_plan).merging == 4 * 2 * SQUARES
    assert cost(merge_plan).files == 2 * 2 * 4 * (6 * HIDDEN * (HIDDEN + 1) // 2 + INNER * (INNER + 1) // 2 + 0) + (
        2 * 4 * HIDDEN * (HIDDEN + 1) // 2  # of the head
    )


def test_two_matrices_at_once_are_two_of_one_block_where_blocks_are_merged_one_by_one(planned):
    down_and_gate = 2 * INNER * HIDDEN * (12 + 2 * 18 + 8 * (2 + 8)) + (3 * 8 + 16 + 4 * 2) * (INNER**2 + HIDDEN**2)
    assert MemoryNeed.of(planned("regmean")).bytes(2) == INTERPRETER + 4 * 2 * SQUARES + down_and_gate


def test_a_draft_takes_a_second_models_block_and_the_draft_beside_twice_as_many_matrices(planned):
    block = max(BLOCK, ROWS * HIDDEN)
    assert cost(planned("featcal")).making == 4 * BLOCK + 2 * (8 + 4 * 2) * SQUARES + 2 * 4 * block


@pytest.mark.parametrize(("method", "at_once"), [("obim", 1), ("regmean", 2), ("featcal", 4)])
def test_hidden_states_of_all_experts_wait_only_for_gram_matrices(planned, method, at_once):
    assert cost(planned(method)).hidden_states == at_once * 10 * 512 * HIDDEN * 4


def test_a_preview_counts_hidden_states_unless_memory_is_capped(planned, tmp_path):
    small, large = planned("regmean"), planned("regmean", samples=1000)
    grown = preview(large, tmp_path / "out", None).memory - preview(small, tmp_path / "out", None).memory
    assert grown == 2 * 990 * 512 * HIDDEN * 4
    assert preview(large, tmp_path / "out", 24 * GB).memory <= 24 * GB


def test_a_cap_below_a_block_is_refused_and_one_above_leaves_room_for_hidden_states(planned):
    merge_plan = planned("regmean")
    minimum = INTERPRETER + cost(merge_plan).making
    with pytest.raises(ResourceError, match="too little"):
        Machine.of("cpu", minimum - 1, merge_plan)
    assert Machine.of("cpu", 24 * GB, merge_plan).hidden_memory > GB
