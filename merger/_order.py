"""The order of tensors' names that people expect."""

from __future__ import annotations

import re
from typing import Any


def natural(name: str) -> list[Any]:
    """Sorts names with their numbers as numbers: layers.2 before layers.10."""
    parts: list[Any] = re.split(r"(\d+)", name)  # text and digits in turn, so numbers only meet numbers
    parts[1::2] = map(int, parts[1::2])
    return parts
