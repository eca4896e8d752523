"""torch, imported when first used, so that `merger --help` and `merger plan` never wait for it."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
else:

    class _Lazy:
        def __getattr__(self, name: str) -> Any:
            value = getattr(_loaded(), name)
            setattr(self, name, value)
            return value

    def _loaded() -> Any:
        """The module. Looking for garbage among what it makes, all of which stays, takes a tenth of its import."""
        collecting = gc.isenabled()
        gc.disable()
        try:
            import torch as module
        finally:
            if collecting:
                gc.enable()
        return module

    torch = _Lazy()

__all__ = ["torch"]
