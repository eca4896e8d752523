"""`merger eval`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from merger.cli._app import JUDGE, command
from merger.cli._options import RUN_FLAGS, AsJson, Overrides, RunFlags, load, run_flags
from merger.cli._terminal import make_console
from merger.errors import RecipeError

if TYPE_CHECKING:
    from merger.evaluation.harness import HarnessTasks
    from merger.recipe.recipe import Recipe

AllowCalibrationText = Annotated[
    bool, typer.Option("--allow-calibration-text", help="Judge by text that calibration has seen too.")
]


@command(JUDGE)
@run_flags(*RUN_FLAGS)
def eval_(
    models: Annotated[
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
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the same as one page for a browser.")] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw it; all formats but .svg need matplotlib.")
    ] = None,
    overrides: Overrides = [],  # noqa: B006
    flags: RunFlags = RunFlags(),
    as_json: AsJson = False,
) -> None:
    """Say what merges kept: base, experts and merges on the same held-out examples."""
    from merger.checkpoint.files import check_replaceable, replace_bytes
    from merger.evaluation import EvaluationSettings, evaluate
    from merger.evaluation.pages import comparison_page
    from merger.evaluation.plots import check_plot, plot_comparison
    from merger.evaluation.tables import print_comparison, print_shortfalls

    check_plot(plot)
    if html is not None:
        check_replaceable(html, f"--html {html}")
    harness = _harness(lm_eval, include_path, limit, num_fewshot)
    settings = EvaluationSettings(_by_task(data), samples, max_tokens, inputs, allow_calibration_text, harness)
    with flags.options() as options:
        comparison = evaluate(_subjects(models, overrides), options, settings=settings)
    if plot is not None:
        plot_comparison(comparison, plot)
    if html is not None:
        replace_bytes(html, comparison_page(comparison).encode())
    if as_json:
        print(json.dumps(comparison.as_json()))
    else:
        console = make_console()
        print_comparison(comparison, console)
        print_shortfalls(comparison, console)


def _subjects(models: list[Path], overrides: list[str]) -> dict[str, Recipe | Path]:
    """The recipes and folders by name, or by path where several have the same name."""
    from merger.checkpoint.near_paths import missing_path

    names = [path.resolve().name if path.is_dir() else path.stem for path in models]
    labels = [name if names.count(name) == 1 else str(path) for name, path in zip(names, models, strict=True)]
    if overrides and all(path.is_dir() for path in models):
        raise RecipeError(f"--set changes a recipe, and {models[0]} is none")
    missing = [missing_path(path, "recipe or folder", Path.exists) for path in models if not path.exists()]
    if missing:
        raise RecipeError(missing)
    return {label: path if path.is_dir() else load(path, overrides) for label, path in zip(labels, models, strict=True)}


def _harness(
    tasks: list[str], include_path: Path | None, limit: int | None, num_fewshot: int | None
) -> HarnessTasks | None:
    """The tasks of ``--lm-eval`` with their options; None where there are none."""
    from merger.evaluation.harness import HarnessTasks

    names = tuple(name.strip() for group in tasks for name in group.split(",") if name.strip())
    settings = {"--include-path": include_path, "--limit": limit, "--num-fewshot": num_fewshot}
    options = [option for option, value in settings.items() if value is not None]
    if options and not names:
        raise RecipeError(f"{', '.join(options)}: how tasks of lm-evaluation-harness are run; name them with --lm-eval")
    return HarnessTasks(names, include_path, limit, num_fewshot) if names else None


def _by_task(data: list[str]) -> dict[str, str] | None:
    """The files of ``--data`` by task: TASK=FILE, or a file whose name up to the first dot is the task's."""
    sources: dict[str, str] = {}
    for text in data:
        name, equals, source = text.rpartition("=")
        task = name if equals else Path(source).name.partition(".")[0]
        if not task or task in sources:
            raise RecipeError(f"--data {text}: expected TASK=FILE, with another task each time")
        sources[task] = source
    return sources or None
