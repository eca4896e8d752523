"""Refusing codes that `merger.checkpoint.codes` does not decode: the mean of two codes stands for nothing.

What is stored decides, not what config.json says: many tools write codes and scales and no `quantization_config`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from merger.checkpoint.tensor_info import Info
from merger.errors import CheckpointError

QUANTISATION_KEYS = ("quantization_config", "compression_config")
"""The keys of config.json that describe how weights are quantised."""

_SMALL = ("I8", "U8", "I16", "U16")
_INTEGERS = (*_SMALL, "I32", "U32", "I64", "U64")
# Stored by a quantiser alone: GPTQ and AWQ, bitsandbytes, compressed-tensors, FP8, torchao, HQQ, QuIP#, ExLlama.
_COMPANION = re.compile(
    r"(?:^|[._])(?:qweight|qzeros|g_idx|SCB|absmax|quant_map|quant_state|weight_scales?|scale_inv|qscale_weight|"
    r"weight_packed|weight_zero_point|qdata|W_q|Qidxs|trellis)(?:\.|$)"
)
_PLAIN = (".weight", ".bias")  # as nearly all tensors are called
_SCALE = re.compile(r"(?:^|_)(?:scales?|zeros?|zero_points?|centroids|codebooks?)$")
_WEIGHT = re.compile(r"(?:^|[._])weight(?:[._]|$)")
_TABLE = re.compile(r"(?:^|[._])(?:ids|index|mask|bias|tracked)$")  # buffers of numbers that are meant as numbers

_DEQUANTISE = {  # how transformers loads such a checkpoint with weights in place of codes
    "fp8": "quantization_config=transformers.FineGrainedFP8Config(dequantize=True)",
    "mxfp4": "quantization_config=transformers.Mxfp4Config(dequantize=True)",
    "compressed-tensors": "quantization_config=transformers.CompressedTensorsConfig(dequantize=True)",
}


def refuse_quantised_config(label: str, source: str, config: Mapping[str, Any]) -> None:
    """Raises CheckpointError if the config declares quantisation."""
    section = next((section for key in QUANTISATION_KEYS if (section := config.get(key))), None)
    if section:
        method = str(section.get("quant_method", "")) if isinstance(section, dict) else ""
        raise _refusal(
            label, f"config.json names quantization_config {method}".strip(), _dequantise_remedy(source, method)
        )


def refuse_quantised_tensors(label: str, tensors: Mapping[str, Info]) -> None:
    """Raises CheckpointError if a tensor holds codes, or a quantiser's companions of codes."""
    for name, info in tensors.items():
        if info.dtype.startswith("F8"):
            raise _refusal(label, f"{name} is {info.dtype}")
        if not name.endswith(_PLAIN) and _COMPANION.search(name):
            raise _refusal(label, f"it has {name}")
    integers = {name: info for name, info in tensors.items() if info.dtype in _INTEGERS}
    scaled = _modules_with_scales(tensors) if integers else set()
    for name, info in integers.items():
        if _holds_codes(name, info, scaled):
            raise _refusal(label, f"{name} is {info.dtype}")


def _modules_with_scales(names: Iterable[str]) -> set[str]:
    """The modules that hold a tensor named as a scale or a zero point."""
    return {module for module, _, leaf in (name.rpartition(".") for name in names) if _SCALE.search(leaf)}


def _holds_codes(name: str, info: Info, scaled: set[str]) -> bool:
    """Whether integers stand for weights: by their name, by scales beside them, or as a matrix of small ones."""
    if _WEIGHT.search(name):
        return True
    if _TABLE.search(name) or info.elements < 2:
        return False
    is_matrix = len(info.shape) > 1 and min(info.shape[-2:]) > 1
    return name.rpartition(".")[0] in scaled or (info.dtype in _SMALL and is_matrix)


def _refusal(label: str, evidence: str, remedy: str = "with the library that quantised it") -> CheckpointError:
    return CheckpointError(
        f"{label}: is quantised ({evidence}); merge the 16- or 32-bit checkpoint it was made from and quantise the "
        f"result, or dequantise it first {remedy}"
    )


def _dequantise_remedy(source: str, method: str) -> str:
    """How to dequantise a checkpoint whose config.json names the method."""
    if method not in _DEQUANTISE:
        return "with the library that quantised it"
    model = f"transformers.AutoModelForCausalLM.from_pretrained('{source}', dtype='bfloat16', {_DEQUANTISE[method]})"
    return (
        f"with: python -c \"import transformers; {model}.save_pretrained('{source}-bf16', save_original_format=False)\""
    )
