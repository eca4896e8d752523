"""The order in which a model's forward pass meets its tensors, told from their names alone.

A header says nothing of it: writers sort names, which puts `down_proj` before `gate_proj`, and `lm_head` before all
blocks. Blocks of an encoder come before those of a decoder. Within a block attention comes first, then
cross-attention, the router, and the feed-forward network or one expert after another; within each of these q, k, v, or
gate and up, and at last o, or down. Layers that no pattern names come before o and down, in alphabetical order.
"""

from __future__ import annotations

import re

LAYERS = ("linear", "conv1d", "expert3d", "head")
"""The kinds of tensor that are a linear layer of the forward pass."""

_ENCODER = re.compile(r"enc|vis|image|audio|speech")
_CROSS = re.compile(r"cross|encdec|encoder_att")
_MIXER = re.compile(r"att|mixer|mamba|ssm|conv")
_ROUTER = re.compile(r"(?:^|\.)(?:router|gate)(?:\.|$)")
_ROLES = re.compile(
    r"(?:^|\.)(?:"
    r"(w?q|w?qkv\w*|q_\w+|query\w*|c_attn|in_proj\w*)|"
    r"(w?k|k_\w+|key|kv_\w+)|"
    r"(w?v|v_\w+|value|x_proj)|"
    r"(gate\w*|w1|w13|fc1|c_fc|fc_in|wi|wi_0|input\w*|intermediate\.dense|dense_h_to_4h)|"
    r"(up\w*|w3|v1|wi_1)|"
    r"(o|o_\w+|out|out_\w+|output\w*|dense|down\w*|w2|wo|fc2|fc_out|c_proj|dense_4h_to_h)"
    r")$"
)
UNNAMED, LAST = 5.5, 6
"""The roles of layers that no pattern names, and of those that leave a sublayer."""


def forward_key(name: str, kind: str, unit: str, rotation: int) -> tuple[object, ...]:
    """Sorts tensors by their place in the forward pass, given the kind, unit and rotation index of each.

    A bias comes after the weight of its layer; other tensors that are no layer come first in their block.
    """
    if unit == name:
        return 0 if rotation == 0 else 3 if kind == "head" else 2, name
    blocks = unit.rpartition(".")[0].lower()
    return 1, _ENCODER.search(blocks) is None, blocks, rotation, *_key_in_block(name[len(unit) + 1 :], kind)


def _key_in_block(path: str, kind: str) -> tuple[object, ...]:
    is_layer = kind in LAYERS
    layer = _layer(path)
    sublayer = 1 if _CROSS.search(layer) else 0 if _MIXER.search(layer) else 2
    numbers = [int(part) for part in layer.split(".") if part.isdigit()]
    follows = is_layer or path.endswith("bias")
    return follows, sublayer, not _ROUTER.search(layer), numbers, role(path), layer, not is_layer


def role(name: str) -> float:
    """The place of a layer within its sublayer: from 1 for q to 5 for up, `LAST` for o and down, `UNNAMED` between."""
    match = _ROLES.search(_layer(name))
    return UNNAMED if match is None or match.lastindex is None else match.lastindex


def _layer(path: str) -> str:
    return re.sub(r"[._](?:weight|bias)$", "", path).lower()
