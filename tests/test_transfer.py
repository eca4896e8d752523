"""What goes to a device and comes back; the device is pretended."""

import torch
from pretended import Pretence

from merger.ops.transfer import buffer, fetched, sent


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
