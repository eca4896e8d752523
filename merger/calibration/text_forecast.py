"""What calibration will do for a plan, told before any forward pass: texts, tokens, statistics that are there."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from merger.calibration.provider import block_providers, model_providers, providers
from merger.calibration.statistics import expert_text, statistics_key
from merger.checkpoint.hashes import recorded_sha256
from merger.errors import CheckpointError
from merger.options import RunOptions
from merger.planning.plan import Plan

CACHED = "in the cache"


@dataclass(frozen=True)
class TextForecast:
    """The text of one expert, and the statistics that it makes."""

    sources: list[str]
    samples: int | None  # None for a data set of the Hub, which is not read
    tokens: int | None
    statistics: str  # `CACHED`, or when they are made


def forecast_texts(plan: Plan, options: RunOptions) -> dict[str, TextForecast]:
    """Reads the text of each expert whose model will run; runs none. Raises CheckpointError with the faults of all.

    Weights are not read for it: where no hash of them is on record, the cache is taken to have no statistics of them.
    """
    if not plan.runs_models:
        return {}
    calibration = plan.recipe.calibration
    assert calibration is not None, "the plan runs models on its text"
    stats = {} if plan.follows_merge else calibration.stats
    forecasts, faults = {}, []
    for name in plan.recipe.experts:
        if name in stats:
            continue
        try:
            forecasts[name] = _forecast(plan, name, options)
        except CheckpointError as error:
            faults.append(str(error))
    if faults:
        raise CheckpointError("\n".join(dict.fromkeys(faults)))
    return forecasts


def _forecast(plan: Plan, expert: str, options: RunOptions) -> TextForecast:
    calibration = plan.recipe.calibration
    assert calibration is not None, "the plan runs models on its text"
    sources = [source.file for source in calibration.sources(expert)]
    times = [time for time, makers in (("before", model_providers(plan)), ("during", block_providers(plan))) if makers]
    statistics = f"made {' and '.join(times)} the merge"
    if not all((plan.recipe.folder / Path(source).expanduser()).is_file() for source in sources):
        return TextForecast(sources, None, None, statistics)
    settings, samples = expert_text(plan, expert, options)
    if not plan.follows_merge and all(recorded_sha256(file) for file in plan.models[expert].files):
        key = statistics_key(plan, expert, settings, samples, options)
        if all(provider.is_cached(key) for provider in providers(plan)):
            statistics = CACHED
    return TextForecast(sources, len(samples.tokens), sum(map(len, samples.tokens)), statistics)
