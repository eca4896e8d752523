"""Pictures: of a comparison, and of a search. They need matplotlib, which is asked for before anything is computed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from merger.checkpoint.files import MARK, check_replaceable, replacing
from merger.errors import RecipeError
from merger.evaluation.scores import Comparison


def check_plot(path: Path | None) -> None:
    """RecipeError if a picture was asked for that cannot be drawn there."""
    if path is None:
        return
    check_replaceable(path, f"--plot {path}")
    figure = _figure(1, 1)
    formats = sorted(figure.canvas.get_supported_filetypes())
    if path.suffix.lstrip(".").lower() not in formats:
        raise RecipeError(f"--plot {path}: expected a name that ends in one of {', '.join(formats)}")


def plot_comparison(found: Comparison, path: Path) -> None:
    """What each merge kept of each expert's gain, and of all, as bars with their intervals."""
    merges = [row for row in found.rows if row.kind == "merge"]
    figure = _figure(7, 1 + 0.5 * max(1, len(merges)) * (1 + len(found.tasks)) / 2)
    axes = figure.subplots()
    shown = {name: [row.kept_of.get(name) for row in merges] for name in found.tasks}
    shown["mean"] = [row.kept for row in merges]
    series = {name: each for name, each in shown.items() if any(each)}
    for number, (name, estimates) in enumerate(series.items()):
        for place, each in enumerate(estimates):
            if each is not None:
                at = place + 0.8 * (number + 0.5) / len(series) - 0.4
                error = [[max(0, each.value - each.low)], [max(0, each.high - each.value)]]
                label = name if place == 0 else None
                axes.barh(at, each.value, 0.75 / len(series), xerr=error, color=f"C{number}", label=label)
    axes.set_yticks(range(len(merges)), [row.model for row in merges])
    axes.invert_yaxis()
    axes.set_xlabel("share of the experts' gains that is kept, with 95 % intervals")
    axes.legend()
    _save(figure, path)


def plot_trials(values: Mapping[str, Sequence[float | None]], objective: str, path: Path) -> None:
    """The objective over the trials of each variant: points, and the best so far as a line."""
    figure = _figure(7, 4)
    axes = figure.subplots()
    for number, (variant, each) in enumerate(values.items()):
        found = [(place, value) for place, value in enumerate(each, 1) if value is not None]
        if found:
            places, heights = zip(*found, strict=True)
            best = [max(heights[: i + 1]) for i in range(len(heights))]
            axes.plot(places, heights, ".", color=f"C{number % 10}", alpha=0.5)
            axes.step(places, best, where="post", color=f"C{number % 10}", label=variant)
    axes.set_xlabel("trial")
    axes.set_ylabel(objective)
    axes.legend(fontsize="small")
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    """Writes the picture; one in a format that can hold no mark is never replaced later."""
    markable = path.suffix.lower() in (".eps", ".pdf", ".png", ".ps", ".svg")
    with replacing(path) as new:
        figure.savefig(new, metadata={"Creator": MARK} if markable else None)


def _figure(width: float, height: float) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise RecipeError("--plot needs matplotlib: pip install 'merger[plot]'") from None
    return Figure(figsize=(width, height), layout="constrained")
