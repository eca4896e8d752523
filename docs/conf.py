"""How Sphinx builds the site, by `bash scripts/docs.sh`: its source is the repository, so that links work in both."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]

project = "merger"
extensions = ["myst_parser"]
root_doc = "docs/index"
include_patterns = ["docs/*.md", "docs/methods/*.md", "benchmarks/*.md", "CONTRIBUTING.md", "CHANGELOG.md"]
html_theme = "furo"
html_title = "merger"
html_show_sourcelink = False
html_show_copyright = False
smartquotes = False  # text stays as it is written
myst_heading_anchors = 4  # the anchors that GitHub gives to headings
suppress_warnings = ["misc.highlighting_failure"]  # recipes with `...` and the like are shown as they are

INDEXES = (root_doc, "docs/methods/README")
"""The pages whose links are the site's contents, under the headings that they have there."""


def add_contents(app: Any, docname: str, source: list[str]) -> None:
    """Adds the contents to an index: a tree for each of its sections that links to pages."""
    if docname not in INDEXES:
        return
    folder, trees = (ROOT / docname).parent, []
    for section in re.split(r"^## ", source[0], flags=re.MULTILINE):
        links = re.findall(r"\]\(([\w./-]+\.md)\)", section)
        pages = dict.fromkeys((folder / link).resolve().relative_to(ROOT).with_suffix("") for link in links)
        caption = section.partition("\n")[0].removeprefix("# ")
        trees.append(_tree(caption, [f"/{page}" for page in pages if f"{page}" != docname]))
    if docname == root_doc:
        trees.append(_tree("Benchmarks", ["/benchmarks/*"]))
    source[0] += "".join(trees)


def _tree(caption: str, pages: list[str]) -> str:
    return "\n".join(["\n\n```{toctree}", ":hidden:", ":glob:", f":caption: {caption}", "", *pages, "```", ""])


def unlink_folders(app: Any, docname: str, source: list[str]) -> None:
    """Shows a link to a folder of the repository, which is no page of the site, as its text."""

    def shown(link: re.Match[str]) -> str:
        return link[1] if ((ROOT / docname).parent / link[2]).is_dir() else link[0]

    source[0] = re.sub(r"\[([^\]]+)\]\(([\w./-]+)\)", shown, source[0])


def setup(app: Any) -> None:
    """Connects the functions above to Sphinx."""
    app.connect("source-read", add_contents)
    app.connect("source-read", unlink_folders)
