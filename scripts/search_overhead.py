"""What a trial of `merger search` costs: seconds of its merge in memory, beside those of judging it.

    python scripts/search_overhead.py recipes/search/methods.yaml --variants linear ties obim --samples 40 --trials 2

For each variant of the recipe it merges points drawn at random, one after the other as a search would; the first
merge of all makes the model too, and that of a variant what its method needs and no run before has kept. Judging
takes the same passes whatever was merged, so it is timed after the merges of the first variant only. A line is
printed as soon as it is known.
"""

import argparse
import random
import time
from pathlib import Path
from statistics import median

from merger.evaluation import tasks
from merger.evaluation.evaluator import Evaluator
from merger.evaluation.model_host import ModelHost
from merger.evaluation.references import family_of
from merger.evaluation.search.space import Space, example, spaces
from merger.options import RunOptions
from merger.recipe.document import read
from merger.recipe.recipe import overridden, search_of


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--variants", nargs="+", required=True)
    parser.add_argument("--samples", type=int, default=40, help="texts of each task that a trial is judged by")
    parser.add_argument("--trials", type=int, default=2, help="merges of each variant")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides")
    args = parser.parse_args()

    document = overridden(read(args.recipe), args.overrides)
    variants = spaces(document, search_of(document).variants, args.overrides)
    family = family_of({name: example(space) for name, space in variants.items()})
    section = family.evaluation
    assert section is not None
    held_out = tasks.load(section.data, family.folder, args.samples)
    judging_seconds: list[float] = []
    print("| variant | merges, s | median | judging, s | merge / judging |\n|---|---|---|---|---|")
    with ModelHost(RunOptions()) as model_host:
        evaluator = Evaluator(model_host, family, held_out, section.max_tokens)
        for name in args.variants:
            merged = []
            for seconds, model in merges(model_host, variants[name], args.trials):
                merged.append(seconds)
                if name == args.variants[0]:
                    began = time.monotonic()
                    evaluator.outcomes(model, name)
                    judging_seconds.append(time.monotonic() - began)
            seconds_text = ", ".join(f"{seconds:.1f}" for seconds in merged)
            cost, judging = median(merged), median(judging_seconds)
            print(f"| {name} | {seconds_text} | {cost:.1f} | {judging:.1f} | {cost / judging:.2f} |", flush=True)


def merges(model_host: ModelHost, space: Space, trials: int):
    """The seconds of each merge, and its model, which the next one overwrites."""
    rng = random.Random(0)
    for _ in range(trials):
        recipe = space.recipe({dimension.name: dimension.draw(rng) for dimension in space.dimensions})
        began = time.monotonic()
        model, _ = model_host.merged(recipe)
        yield time.monotonic() - began, model


if __name__ == "__main__":
    main()
