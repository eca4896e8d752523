"""What goes to a device and comes back; the device is pretended."""

import torch
from pretended import Pretence

from merger.calibration.block_runner import HiddenStates
from merger.ops.transfer import buffer, buffer_bytes, fetched, sent, sent_together


def test_what_comes_back_from_a_device_is_what_was_sent():
    with Pretence():
        there = buffer((2, 3), torch.bfloat16, "cuda:1").fill_(1.5)
        away = sent(there, "cuda:1")
        back = fetched(away)
    assert (str(away.device), str(back.device)) == ("cuda:1", "cpu")
    assert torch.equal(back, torch.full((2, 3), 1.5, dtype=torch.bfloat16))


def test_on_the_cpu_nothing_is_copied():
    here = buffer((2,), torch.float32, "cpu")
    assert fetched(sent(here, "cpu")) is here


def test_host_memory_that_is_not_pinned_is_sent_too():
    with Pretence():
        away = sent(torch.arange(3), "cuda:0")
        stacked = sent_together([torch.zeros(2), torch.ones(2)], torch.device("cuda:0"))
        assert {str(values.device) for values in (away, stacked)} == {"cuda:0"}
        assert fetched(stacked).tolist() == [[0, 0], [1, 1]]
        assert sent(away, "cuda:0") is away


def test_a_buffer_for_a_gpu_is_counted_as_torch_rounds_it():
    assert [buffer_bytes(size, "cuda:1") for size in (0, 1, 1000, 1024)] == [0, 1, 1024, 1024]
    assert buffer_bytes(1000, "cpu") == 1000


def test_hidden_states_come_back_to_the_device_from_memory_and_from_files(tmp_path):
    with Pretence():
        carried = HiddenStates(100, tmp_path)  # bytes: room for one batch
        for batch in range(2):
            carried.put(batch, torch.full((2, 8), float(batch)).to("cuda:0"))
        there = [carried.get(batch, torch.device("cuda:0")) for batch in range(2)]
        assert [str(states.device) for states in there] == ["cuda:0", "cuda:0"]
        assert [fetched(states).unique().tolist() for states in there] == [[0], [1]]
    assert [path.name for path in tmp_path.iterdir()] == ["1.bin"]
