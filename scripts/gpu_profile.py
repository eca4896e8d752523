"""Where the slowest merge of scripts/gpu_check.py spends its time: a sample of its threads, and its kernels."""

from __future__ import annotations

import os
import shutil
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from gpu_parts import MERGES, ROOT, Setting, recipe_file


def profile(setting: Setting) -> dict[str, Any]:
    import torch
    from torch.profiler import ProfilerActivity

    from merger.engine.merge import merge
    from merger.options import RunOptions
    from merger.recipe.recipe import Recipe

    merges = {name: setting.answer(name) for name in MERGES if name != "linear first"}
    seconds = {name: merge["seconds"] / merge["bytes moved"] for name, merge in merges.items() if merge is not None}
    slowest = max(seconds, key=lambda name: seconds[name], default="linear")
    os.environ["MERGER_CACHE"] = str(setting.work / "cache")
    on_gpu = setting.device != "cpu" and torch.cuda.is_available()
    profiler = torch.profiler.profile(activities=[ProfilerActivity.CUDA]) if on_gpu else None
    with sampled() as places, profiler or nullcontext():
        merge(Recipe.load(recipe_file(setting, slowest)), RunOptions(device=setting.device), force=True)
    shutil.rmtree(setting.work / "merged", ignore_errors=True)
    total = sum(places.values())
    result = {"merge": slowest, "threads were in": [f"{n / total:.1%} {place}" for place, n in places.most_common(15)]}
    if profiler is not None:
        events = sorted(profiler.key_averages(), key=lambda event: -event.self_device_time_total)[:15]
        result["kernels"] = [f"{e.self_device_time_total / 1e3:,.0f} ms in {e.count:,} of {e.key[:90]}" for e in events]
    return result


@contextmanager
def sampled(interval: float = 0.005) -> Iterator[Counter[str]]:
    """Counts what the threads that work on slices, and the main one, are doing: the innermost line of merger's own."""
    places: Counter[str] = Counter()
    ended = threading.Event()
    main = threading.main_thread().ident

    def sample() -> None:
        while not ended.wait(interval):
            workers = {thread.ident for thread in threading.enumerate() if thread.name.startswith("merger-")}
            for ident, frame in sys._current_frames().items():
                if ident in workers or ident == main:
                    places[_place(frame)] += 1

    sampler = threading.Thread(target=sample)
    sampler.start()
    try:
        yield places
    finally:
        ended.set()
        sampler.join()


def _place(frame: Any) -> str:
    """Where a thread is: file, function and line of merger's innermost frame, and what that has called."""
    inner = frame.f_code.co_name
    while frame is not None:
        file = Path(frame.f_code.co_filename)
        if file.is_relative_to(ROOT / "merger"):
            return f"{file.relative_to(ROOT)}:{frame.f_lineno} {frame.f_code.co_name} > {inner}"
        frame = frame.f_back
    return f"waiting in {inner}"
