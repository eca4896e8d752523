"""What a search may set: the marks of a recipe as dimensions, and the recipe that each point of them makes."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from merger.errors import RecipeError
from merger.pipeline.parameters import plain
from merger.recipe.document import Document, KeyPath
from merger.recipe.open_values import marks
from merger.recipe.recipe import Recipe

EXAMPLES = 100
"""Points that are tried until one makes a recipe."""

Point = dict[str, Any]
"""A value for every dimension, by its key path in the recipe."""


@dataclass(frozen=True)
class Choices:
    """Values to choose from, in the order written."""

    path: KeyPath
    values: tuple[Any, ...]

    @property
    def name(self) -> str:
        """``parameters.density``."""
        return ".".join(map(str, self.path))

    @property
    def ordered(self) -> bool:
        """Whether the values are numbers that rise, so that neighbours are alike."""
        numbers = [_number(value) for value in self.values]
        parsed_numbers = [number for number in numbers if number is not None]
        return len(parsed_numbers) == len(numbers) and all(a < b for a, b in itertools.pairwise(parsed_numbers))

    def draw(self, rng: random.Random) -> Any:
        """One of them."""
        return rng.choice(self.values)


@dataclass(frozen=True)
class Range:
    """Numbers from low to high: all of them, or every ``step``."""

    path: KeyPath
    low: Fraction
    high: Fraction
    step: Fraction | None = None
    fine: Fraction | None = None  # the step of a second, finer grid
    log: bool = False

    @property
    def name(self) -> str:
        """``parameters.lambda``."""
        return ".".join(map(str, self.path))

    @property
    def values(self) -> tuple[Any, ...]:
        """Those of its step; none where it has no step."""
        return () if self.step is None else tuple(map(plain, _steps(self.low, self.high, self.step)))

    def around(self, value: Any) -> tuple[Any, ...]:
        """The finer grid around a value, from one coarse neighbour to the other, both excluded."""
        assert self.step is not None
        middle, fine = Fraction(str(value)), self.fine or self.step / 5
        count = math.ceil(self.step / fine) - 1
        neighbours = (middle + i * fine for i in range(-count, count + 1))
        return tuple(plain(number) for number in neighbours if self.low <= number <= self.high)

    def at(self, share: float) -> Any:
        """The number at ``share`` of the way from low to high, as a recipe writes it."""
        low, high = float(self.low), float(self.high)
        value = low * (high / low) ** share if self.log else low + (high - low) * share
        return float(f"{value:.5g}")

    def draw(self, rng: random.Random) -> Any:
        """A number of it, each as likely as any other."""
        return self.at(rng.random()) if self.step is None else rng.choice(self.values)


Dimension = Choices | Range


def _steps(low: Fraction, high: Fraction, step: Fraction) -> Iterator[Fraction]:
    for i in itertools.count():
        if (value := low + i * step) > high:
            return
        yield value


def _number(value: Any) -> Fraction | None:
    """The number that a recipe writes so, if it is one."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        return Fraction(str(value))
    except (ValueError, ZeroDivisionError):
        return None


# --- spaces ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Space:
    """One variant of a recipe: its text, and its open values."""

    document: Document
    dimensions: tuple[Dimension, ...]
    overrides: tuple[str, ...] = ()

    @property
    def grid(self) -> Iterator[Point]:
        """Every combination of the values, the last dimension changing first."""
        names = [dimension.name for dimension in self.dimensions]
        for values in itertools.product(*(dimension.values for dimension in self.dimensions)):
            yield dict(zip(names, values, strict=True))

    def document_at(self, point: Mapping[str, Any]) -> Document:
        """The text with a value in each open place."""
        document = self.document
        for dimension in self.dimensions:
            document = document.changed(dimension.path, point[dimension.name])
        return document

    def recipe(self, point: Mapping[str, Any]) -> Recipe:
        """The recipe of a point; RecipeError where its values do not go together."""
        return Recipe.of(self.document_at(point), self.overrides)


def spaces(document: Document, variants: Mapping[str, Mapping[str, Any]], overrides: Sequence[str]) -> dict[str, Space]:
    """The variants of a recipe by name, or the recipe itself under no name; RecipeError for marks that say nothing."""
    plain_text = Document(document.label, document.folder, _without(document.value, "search"), document.lines)
    if not variants:
        return {"": _space(plain_text, (), overrides)}
    spaces_by_name = {}
    for name, changes in variants.items():
        value = plain_text.value
        if {"method", "pipeline"} & changes.keys():  # a variant's own method leaves nothing of the recipe's
            value = _without(value, "method", "parameters", "pipeline")
        text = Document(document.label, document.folder, {**value, **changes}, document.lines)
        spaces_by_name[name] = _space(text, ("search", "variants", name), overrides)
    return spaces_by_name


def example(space: Space) -> Recipe:
    """Any recipe of a space; RecipeError, that of the first point, where no point that is tried makes one."""
    rng = random.Random(0)
    first: RecipeError | None = None
    for _ in range(EXAMPLES):
        try:
            return space.recipe({dimension.name: dimension.draw(rng) for dimension in space.dimensions})
        except RecipeError as error:
            first = first or error
    assert first is not None
    raise first


def _without(value: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    return {key: entry for key, entry in value.items() if key not in keys}


def _space(document: Document, variant_path: KeyPath, overrides: Sequence[str]) -> Space:
    dimensions: list[Dimension] = []
    faults = []
    for path, mark in marks(document.value):
        try:
            dimensions.append(_dimension(path, mark))
        except ValueError as error:
            faults.append(document.fault((*variant_path, *path), str(error)))
    if faults:
        raise RecipeError(faults)
    return Space(document, tuple(dimensions), tuple(overrides))


def _dimension(path: KeyPath, mark: Any) -> Dimension:
    """Returns the dimension of a mark; raises ValueError for an invalid mark."""
    if isinstance(mark, list) and mark:
        return Choices(path, tuple(mark))
    if not isinstance(mark, dict) or not {"low", "high"} <= mark.keys():
        raise ValueError("search: expected a list of values, or {low:, high:} with step:, fine: or log: if wanted")
    if unknown := mark.keys() - {"low", "high", "step", "fine", "log"}:
        raise ValueError(
            f"search: unknown key {', '.join(sorted(map(str, unknown)))}; it takes low, high, step, fine, log"
        )
    numbers: dict[str, Any] = {key: _number(number) for key, number in mark.items() if key != "log"}
    if invalid_keys := [key for key, number in numbers.items() if number is None]:
        raise ValueError(f"search: {invalid_keys[0]} is {mark[invalid_keys[0]]!r}, expected a number")
    low, high, log = numbers["low"], numbers["high"], mark.get("log", False)
    if not isinstance(log, bool):
        raise ValueError(f"search: log is {log!r}, expected true or false")
    if low >= high or (log and low <= 0) or any(numbers[key] <= 0 for key in ("step", "fine") if key in numbers):
        raise ValueError("search: expected low < high, steps above 0, and for log: a low above 0")
    return Range(path, low, high, numbers.get("step"), numbers.get("fine"), log)
