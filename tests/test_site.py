"""The site of docs/ is built without a warning, and every page of it is in its contents."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from markdown import ROOT

pytest.importorskip("furo", reason="the site needs merger[docs]")
pytest.importorskip("myst_parser", reason="the site needs merger[docs]")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder of the site, which `scripts/docs.sh` builds by the same command."""
    folder = tmp_path_factory.mktemp("site")
    (line,) = re.findall(r"sphinx .*", (ROOT / "scripts" / "docs.sh").read_text())
    arguments = [f"{folder}" if word == "build/site" else word for word in line.split()[1:]]
    ran = subprocess.run([sys.executable, "-m", "sphinx", *arguments], cwd=ROOT, capture_output=True, text=True)
    assert (ran.returncode, ran.stderr) == (0, "")
    return folder


def test_every_page_is_in_the_contents_of_the_first(site):
    pages = {f"{path.relative_to(ROOT)}" for path in ROOT.glob("docs/**/*.md")}
    contents = (site / "docs" / "index.html").read_text().partition('class="sidebar-tree"')[2].partition("</aside>")[0]
    links = re.findall(r'href="([\w./-]+)\.html"', contents)
    linked = {f"{(Path('docs') / link).as_posix()}.md" for link in links}
    assert pages - linked == {"docs/index.md"}


def test_pictures_and_notebooks_are_part_of_the_site(site):
    files = {path.name for path in site.rglob("*") if path.is_file()}
    assert {"share-kept.svg", "merge-and-look.ipynb", "write-a-method.ipynb"} <= files
