"""Strategies: generators that propose points and are sent what each is worth, the higher the better.

A strategy depends on the space, the seed and what it was sent, and on nothing else. So a search that was stopped
goes on by starting its strategy anew and telling it what is on record.
"""

from __future__ import annotations

import importlib
import itertools
import random
import warnings
from collections.abc import Callable, Generator
from typing import Any

from merger.errors import RecipeError
from merger.evaluation.search.space import Choices, Dimension, Point, Range, Space

Strategy = Generator[Point, float | None, None]
"""Yields a point, and is sent its objective, or None where the point makes no merge or an infinite loss."""


STARTUP = 6
"""Points that tpe draws before it models anything: of budgets of a few dozen merges, optuna's ten are too many."""


def grid(space: Space, seed: int) -> Strategy:
    """Every combination."""
    _need_values(space, "grid")
    yield from space.grid


def two_step(space: Space, seed: int) -> Strategy:
    """Every combination, then a finer grid of the numbers around the best one."""
    _need_values(space, "two-step")
    best: tuple[float, Point] | None = None
    for point in space.grid:
        value = yield point
        if value is not None and (best is None or value > best[0]):
            best = value, point
    if best is None:
        return
    yield from _finer_grid(space, best[1])


def _finer_grid(space: Space, best: Point) -> Strategy:
    candidates = [
        dimension.around(best[dimension.name]) if isinstance(dimension, Range) else (best[dimension.name],)
        for dimension in space.dimensions
    ]
    for values in itertools.product(*candidates):
        yield dict(zip(best, values, strict=True))


def at_random(space: Space, seed: int) -> Strategy:
    """Points drawn evenly."""
    rng = random.Random(f"search/{seed}")
    while True:
        yield {dimension.name: dimension.draw(rng) for dimension in space.dimensions}


def tpe(space: Space, seed: int) -> Strategy:
    """Optuna's tree of Parzen estimators, the dimensions taken together, after a few points drawn at random."""
    optuna = _optuna("tpe")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=STARTUP, multivariate=True)
    yield from _optuna_points(optuna, sampler, space)


def cmaes(space: Space, seed: int) -> Strategy:
    """Optuna's CMA-ES over numbers."""
    optuna = _optuna("cmaes", "cmaes")
    unordered = [
        dimension.name for dimension in space.dimensions if isinstance(dimension, Choices) and not dimension.ordered
    ]
    if unordered or len(space.dimensions) < 2:
        raise RecipeError(
            "search.strategy: cmaes moves several numbers at once"
            + (f", and {unordered[0]} is none; take tpe" if unordered else "; take tpe for one")
        )
    yield from _optuna_points(optuna, optuna.samplers.CmaEsSampler(seed=seed), space)


def _optuna_points(optuna: Any, sampler: Any, space: Space) -> Strategy:
    """Optuna's proposals one by one; its study lives in memory, and the record of the search is what is kept."""
    study = optuna.create_study(direction="maximize", sampler=sampler)
    distributions = {dimension.name: _distribution(optuna, dimension) for dimension in space.dimensions}
    while True:
        trial = study.ask(distributions)
        value = yield {
            dimension.name: _value(dimension, trial.params[dimension.name]) for dimension in space.dimensions
        }
        if value is None:
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
        else:
            study.tell(trial, value)


def _distribution(optuna: Any, dimension: Dimension) -> Any:
    """Numbers as a place in their order; anything else as a category."""
    count = len(dimension.values)
    if isinstance(dimension, Range) and not count:
        return optuna.distributions.FloatDistribution(0, 1)
    if isinstance(dimension, Range) or (dimension.ordered and count > 1):
        return optuna.distributions.IntDistribution(0, count - 1)
    return optuna.distributions.CategoricalDistribution(tuple(range(count)))


def _value(dimension: Dimension, proposed: Any) -> Any:
    return dimension.values[proposed] if dimension.values else dimension.at(proposed)  # type: ignore[union-attr]


def _optuna(strategy: str, *modules: str) -> Any:
    try:
        for name in modules:
            importlib.import_module(name)
        import optuna
    except ImportError:
        raise RecipeError(f"search.strategy: {strategy} needs optuna: pip install 'merger[search]'") from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna


def _need_values(space: Space, strategy: str) -> None:
    unlisted_names = [dimension.name for dimension in space.dimensions if not dimension.values]
    if unlisted_names:
        raise RecipeError(
            f"{unlisted_names[0]}: search: {strategy} needs a step: between low and high, or a list of values"
        )


STRATEGIES: dict[str, Callable[[Space, int], Strategy]] = {
    "grid": grid,
    "two-step": two_step,
    "random": at_random,
    "tpe": tpe,
    "cmaes": cmaes,
}
ENDLESS = ("random", "tpe", "cmaes")
"""Strategies that propose for ever, so that only a number of trials ends them."""
