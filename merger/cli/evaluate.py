"""`merger eval`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from merger.cli._options import RUN_FLAGS, AsJson, Overrides, RunFlags, load, run_flags
from merger.cli._terminal import make_console
from merger.errors import RecipeError

if TYPE_CHECKING:
    from merger.evaluation.harness import Wanted
    from merger.recipe.recipe import Recipe

AllowCalibrationText = Annotated[
    bool, typer.Option("--allow-calibration-text", help="Judge by text that calibration has seen too.")
]


@run_flags(*RUN_FLAGS)
def eval_(
    what: Annotated[
        list[Path],
        typer.Argument(metavar="RECIPE|DIR...", help="Recipes, merged in memory, and folders.", show_default=False),
    ],
    data: Annotated[
        list[str],
        typer.Option(
            "--data", metavar="[TASK=]FILE", help="Held-out examples; the task is the file's name, if not given."
        ),
    ] = [],  # noqa: B006
    samples: Annotated[int | None, typer.Option(min=1, metavar="N", help="Of each task at most.")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=2, metavar="N", help="Of each text.")] = None,
    inputs: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where the relative paths of a finished merge start.")
    ] = None,
    allow_calibration_text: AllowCalibrationText = False,
    lm_eval: Annotated[
        list[str],
        typer.Option(
            "--lm-eval",
            metavar="TASK[,TASK...]",
            help="Judge by tasks of lm-evaluation-harness too (needs merger[lm-eval]).",
        ),
    ] = [],  # noqa: B006
    include_path: Annotated[
        Path | None, typer.Option(metavar="DIR", help="With --lm-eval: a folder of further tasks, as YAML.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="With --lm-eval: the first N examples of each task.")
    ] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(min=0, metavar="N", help="With --lm-eval: worked examples before each question.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw it (needs matplotlib).")] = None,
    overrides: Overrides = [],  # noqa: B006
    flags: RunFlags = RunFlags(),
    as_json: AsJson = False,
) -> None:
    """Say what merges kept: base, experts and merges on the same held-out examples."""
    from merger.evaluation import EvaluationSettings, evaluate
    from merger.evaluation.plots import check_plot, plot_comparison
    from merger.evaluation.tables import print_comparison

    check_plot(plot)
    harness = _harness(lm_eval, include_path, limit, num_fewshot)
    settings = EvaluationSettings(_by_task(data), samples, max_tokens, inputs, allow_calibration_text, harness)
    with flags.options() as options:
        found = evaluate(_subjects(what, overrides), options, settings=settings)
    if plot is not None:
        plot_comparison(found, plot)
    if as_json:
        print(json.dumps(found.as_json()))
    else:
        print_comparison(found, make_console())


def _subjects(what: list[Path], overrides: list[str]) -> dict[str, Recipe | Path]:
    """Each recipe and folder under its name, or its whole path where names are alike."""
    names = [path.resolve().name if path.is_dir() else path.stem for path in what]
    labels = [name if names.count(name) == 1 else str(path) for name, path in zip(names, what, strict=True)]
    if overrides and all(path.is_dir() for path in what):
        raise RecipeError(f"--set changes a recipe, and {what[0]} is none")
    return {label: path if path.is_dir() else load(path, overrides) for label, path in zip(labels, what, strict=True)}


def _harness(tasks: list[str], include_path: Path | None, limit: int | None, num_fewshot: int | None) -> Wanted | None:
    """What ``--lm-eval`` and the options beside it say."""
    from merger.evaluation.harness import Wanted

    names = tuple(name.strip() for each in tasks for name in each.split(",") if name.strip())
    beside = {"--include-path": include_path, "--limit": limit, "--num-fewshot": num_fewshot}
    given = [option for option, value in beside.items() if value is not None]
    if given and not names:
        raise RecipeError(f"{', '.join(given)}: how tasks of lm-evaluation-harness are run; name them with --lm-eval")
    return Wanted(names, include_path, limit, num_fewshot) if names else None


def _by_task(data: list[str]) -> dict[str, str] | None:
    """What ``--data`` says: TASK=FILE, or a file whose name up to the first dot is the task's."""
    found: dict[str, str] = {}
    for each in data:
        name, equals, source = each.rpartition("=")
        task = name if equals else Path(source).name.partition(".")[0]
        if not task or task in found:
            raise RecipeError(f"--data {each}: expected TASK=FILE, with another task each time")
        found[task] = source
    return found or None
