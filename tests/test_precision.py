"""TF32: off while merger multiplies matrices, and as it was afterwards, by either of torch's two names for it."""

from pathlib import Path

import pytest
import torch
from torch.overrides import TorchFunctionMode

import merger.demo
from merger.calibration import Settings, batches, collect_all
from merger.calibration.model import build
from merger.calibration.weights import Loader
from merger.checkpoint.opening import open_checkpoint
from merger.engine.machine import tuned
from merger.evaluation.measures import log_likelihoods
from merger.ops.precision import full_float32

BASE = Path(merger.demo.__file__).parent / "models" / "base"
MATMUL, CUDNN = torch.backends.cuda.matmul, torch.backends.cudnn
newer = pytest.mark.skipif(not hasattr(MATMUL, "fp32_precision"), reason="torch 2.9 brought fp32_precision")


@pytest.fixture(autouse=True)
def _as_before():
    yield
    MATMUL.allow_tf32, CUDNN.allow_tf32 = False, True  # torch's own defaults


@pytest.mark.parametrize("is_allowed", [True, False])
def test_the_older_choice_is_off_within_and_restored(is_allowed):
    MATMUL.allow_tf32 = CUDNN.allow_tf32 = is_allowed
    with full_float32():
        assert (MATMUL.allow_tf32, CUDNN.allow_tf32) == (False, False)
    assert (MATMUL.allow_tf32, CUDNN.allow_tf32) == (is_allowed, is_allowed)


@newer
def test_the_newer_choice_is_off_within_and_restored():
    MATMUL.fp32_precision = CUDNN.conv.fp32_precision = CUDNN.rnn.fp32_precision = "tf32"
    with full_float32():
        assert (MATMUL.fp32_precision, CUDNN.conv.fp32_precision, CUDNN.rnn.fp32_precision) == ("ieee",) * 3
    assert (MATMUL.fp32_precision, CUDNN.conv.fp32_precision, CUDNN.rnn.fp32_precision) == ("tf32",) * 3


def test_it_is_restored_after_an_error():
    MATMUL.allow_tf32 = True
    with pytest.raises(ZeroDivisionError), full_float32():
        1 / 0  # noqa: B018
    assert MATMUL.allow_tf32


class Products(TorchFunctionMode):
    """Records whether TF32 was allowed at each product of matrices."""

    def __init__(self):
        super().__init__()
        self.allowed = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__name__", "") in ("linear", "matmul", "__matmul__", "mm"):
            self.allowed.append(MATMUL.allow_tf32)
        return function(*args, **(kwargs or {}))


def test_a_calibration_multiplies_without_it():
    MATMUL.allow_tf32 = True
    with Products() as products, open_checkpoint(str(BASE), None, label="base", folder=BASE) as model:
        collect_all(model, batches([[3, 4, 5, 6]]), Settings(), gram=True)
    assert products.allowed
    assert not any(products.allowed)


def test_slices_are_merged_without_it():
    MATMUL.allow_tf32 = True
    with tuned():
        assert not MATMUL.allow_tf32


def test_models_are_judged_without_it():
    MATMUL.allow_tf32 = True
    with Products() as products, open_checkpoint(str(BASE), None, label="base", folder=BASE) as model:
        loaded = build(model, trust_remote_code=False)
        Loader(loaded, model, torch.device("cpu"), torch.float32).load("", model)
        log_likelihoods(loaded, [[3, 4, 5]], [1])
    assert products.allowed
    assert not any(products.allowed)
