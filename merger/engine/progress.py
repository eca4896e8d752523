"""The remarks and the progress that a schedule reports, from many threads."""

from __future__ import annotations

from functools import partial
from threading import Lock

from merger.options import Notice, Progress
from merger.planning.plan import TensorPlan


class Notes:
    """Remarks on tensors; each is reported once, however often a tensor is visited."""

    def __init__(self, notice: Notice) -> None:
        self._notice = notice
        self._by_tensor: dict[str, dict[str, None]] = {}
        self._messages: set[str] = set()
        self._lock = Lock()

    def add(self, tensor: TensorPlan, message: str) -> None:
        """Adds a remark on a tensor."""
        with self._lock:
            self._by_tensor.setdefault(tensor.name, {})[message] = None
            is_new = message not in self._messages
            self._messages.add(message)
        if is_new:
            self._notice(message)

    def on(self, tensor: TensorPlan) -> list[str]:
        """The remarks on one tensor."""
        with self._lock:
            return list(self._by_tensor.get(tensor.name, ()))

    def all(self) -> list[str]:
        """The remarks on all tensors."""
        return list(dict.fromkeys(message for remarks in self._by_tensor.values() for message in remarks))


class ByteProgress:
    """Reports bytes of input that were read, out of all that will be read as far as is known."""

    def __init__(self, step: str, total: int, progress: Progress) -> None:
        self.done, self.total = 0, total
        self._report = partial(progress, step)
        self._lock = Lock()

    def add(self, size: int, *, is_reread: bool = False) -> None:
        """Counts bytes that were read; with ``is_reread`` they will be read again and add to the total."""
        with self._lock:
            self.done += size
            self.total += size if is_reread else 0
            self._report(self.done, self.total)
