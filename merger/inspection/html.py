"""An inspection as one HTML page."""

from __future__ import annotations

from dataclasses import replace

from merger.charts.paint import series_paint
from merger.display.page import Charts, Fold, Part, Section
from merger.display.page import page as html_page
from merger.inspection.figures import by_layer, curve_charts, pair_charts, picture_charts, series_charts
from merger.inspection.findings import findings, opening
from merger.inspection.presentation import readings
from merger.inspection.report import Inspection, View
from merger.inspection.tables import display_table, expert_table

TITLES = {"recipe": "What a merge would do", "merge": "What a merge did", "model": "Where a fine-tune changed"}
SCALES = (
    "Each expert has one colour on the page. Heats and axes begin at 0, or at the least number where one is negative; "
    "the bar below a chart has both ends of its scale."
)
SWEEP = "Against density"
"""The heading of what does not belong to the recipe: overlap and balance at densities that it does not name."""


def page(inspection: Inspection) -> str:
    """The page: the recipe's own stages in their order, then the curves over densities that it does not name."""
    sections = [_view(view, inspection) for view in inspection.views]
    if inspection.curves is not None:
        sections.append(Section(SWEEP, [Charts(curve_charts(inspection.curves))]))
    if inspection.notes:
        sections.append(Section("Notes", inspection.notes))
    note = SCALES if inspection.views else ""
    return html_page(TITLES[inspection.subject], opening(inspection), findings(inspection), sections, note)


def _view(view: View, inspection: Inspection) -> Section:
    heading = "expert" if view.about == "experts" else "input"
    table = replace(expert_table(view, inspection.experts), heading=heading)
    parts: list[Part] = [_subject(view), display_table(table, swatches(inspection)), *readings(view)]
    parts.append(Charts([*pair_charts(view), *series_charts(view)]))
    parts += [Fold(f"{name} by layer", charts, i == 0) for i, (name, charts) in enumerate(by_layer(view).items())]
    parts += [Charts(picture_charts(picture)) for picture in inspection.pictures if picture.view == view.name]
    return Section(view.name, parts)


def _subject(view: View) -> str:
    """What a view is of, in a sentence."""
    if view.name == "task_vectors":
        return "The task vectors: the experts minus the base. A position is an expert's where its task vector is not 0."
    if view.name == "result":
        return "The merge: at which input's value each position ends, and the merge minus the base."
    if view.about == "merged":
        return f"The merge after the stage {view.name}."
    return f"What the stage {view.name} leaves of the task vectors."


def swatches(inspection: Inspection) -> dict[str, str]:
    """The colour of each expert."""
    return {name: series_paint(i) for i, name in enumerate(inspection.experts)}
