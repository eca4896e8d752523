"""What goes to a device and comes back; the device is pretended."""

import torch
from pretended import Pretence

from merger.calibration.block_runner import HiddenStates
from merger.ops.transfer import buffer, buffer_bytes, stack_on_device, to_device, to_host


def test_what_comes_back_from_a_device_is_what_was_sent():
    with Pretence():
        source = buffer((2, 3), torch.bfloat16, "cuda:1").fill_(1.5)
        remote = to_device(source, "cuda:1")
        host_values = to_host(remote)
    assert (str(remote.device), str(host_values.device)) == ("cuda:1", "cpu")
    assert torch.equal(host_values, torch.full((2, 3), 1.5, dtype=torch.bfloat16))


def test_on_the_cpu_nothing_is_copied():
    values = buffer((2,), torch.float32, "cpu")
    assert to_host(to_device(values, "cpu")) is values


def test_host_memory_that_is_not_pinned_is_sent_too():
    with Pretence():
        remote = to_device(torch.arange(3), "cuda:0")
        stack = stack_on_device([torch.zeros(2), torch.ones(2)], torch.device("cuda:0"))
        assert {str(values.device) for values in (remote, stack)} == {"cuda:0"}
        assert to_host(stack).tolist() == [[0, 0], [1, 1]]
        assert to_device(remote, "cuda:0") is remote


def test_a_buffer_for_a_gpu_is_counted_as_torch_rounds_it():
    assert [buffer_bytes(size, "cuda:1") for size in (0, 1, 1000, 1024)] == [0, 1, 1024, 1024]
    assert buffer_bytes(1000, "cpu") == 1000


def test_hidden_states_come_back_to_the_device_from_memory_and_from_files(tmp_path):
    with Pretence():
        hidden_states = HiddenStates(100, tmp_path)  # bytes: room for one batch
        for batch in range(2):
            hidden_states.put(batch, torch.full((2, 8), float(batch)).to("cuda:0"))
        states_by_batch = [hidden_states.get(batch, torch.device("cuda:0")) for batch in range(2)]
        assert [str(states.device) for states in states_by_batch] == ["cuda:0", "cuda:0"]
        assert [to_host(states).unique().tolist() for states in states_by_batch] == [[0], [1]]
    assert [path.name for path in tmp_path.iterdir()] == ["1.bin"]
