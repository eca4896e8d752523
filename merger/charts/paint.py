"""The colours of charts, by their role, in light and dark.

A heat is one hue that only gains lightness or loses it, which no kind of colour blindness hides. The colours of series
are those of Okabe and Ito, darker on white where they would be hard to read.
"""

from __future__ import annotations

LIGHT = {
    "paper": "#ffffff",
    "ink": "#1b1b1f",
    "faint": "#5c5c66",
    "rule": "#d9d9e0",
    "low": "#f3f6fb",
    "high": "#08306b",
    "on-low": "#1b1b1f",
    "on-high": "#ffffff",
    "series0": "#0072b2",
    "series1": "#c44e00",
    "series2": "#00795a",
    "series3": "#a0467a",
    "series4": "#8a6d00",
    "series5": "#1b1b1f",
}
DARK = {
    "paper": "#16161a",
    "ink": "#ececf1",
    "faint": "#a3a3ad",
    "rule": "#3a3a44",
    "low": "#1f1f25",
    "high": "#e5ae45",
    "on-low": "#ececf1",
    "on-high": "#16161a",
    "series0": "#56b4e9",
    "series1": "#f08a3c",
    "series2": "#3fc79a",
    "series3": "#e08fbf",
    "series4": "#e8d44d",
    "series5": "#ececf1",
}
SERIES = 6
"""Colours of series: more cannot be told apart."""

HEAT = "high"
"""The role of the strongest heat of charts that are about no expert in particular."""

DEEP = 0.6
"""The share of the strongest heat from which on the ink on it is `on-high`, the more legible there."""

TINT = 0.4
"""How much of a series' colour is in the strongest heat of a chart in it: ink stays legible on all of that chart."""


def series_paint(number: int) -> str:
    """The role of a series' colour."""
    return f"series{number % SERIES}"


def strength(heat: float, paint: str = HEAT) -> float:
    """How much of the paint a heat in [0, 1] mixes into the ground."""
    return heat if paint == HEAT else heat * TINT


def ink_on(heat: float, paint: str = HEAT) -> str:
    """The role of the ink on a heat in [0, 1]."""
    return "on-high" if paint == HEAT and heat > DEEP else "on-low"


def css_variables(palette: dict[str, str]) -> str:
    """The palette as CSS variables."""
    return " ".join(f"--{role}: {colour};" for role, colour in palette.items())


def heat_colour(heat: float, paint: str = HEAT) -> str:
    """The light palette's colour of a heat in [0, 1], as #rrggbb."""
    low, high = (bytes.fromhex(LIGHT[role][1:]) for role in ("low", paint))
    share = strength(heat, paint)
    return "#" + bytes(round(a + (b - a) * share) for a, b in zip(low, high, strict=True)).hex()
