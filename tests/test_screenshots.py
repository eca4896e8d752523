"""The pictures of commands and pages in the docs, which scripts/screenshots.py makes: small, and of no machine."""

import getpass
import importlib.util
import re
import sys
import xml.etree.ElementTree
from pathlib import Path

import pytest
import yaml
from tasks import demo_folder, text_of  # noqa: F401 a fixture

ROOT = Path(__file__).parents[1]
PICTURES = ROOT / "docs" / "pictures"


@pytest.fixture(scope="module")
def script():
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("screenshots", ROOT / "scripts" / "screenshots.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["screenshots"] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


def test_a_screen_shows_what_is_left_when_bars_are_erased(script):
    output = (
        "\x1b[?25lmerging 10%\r\x1b[2Kmerging 90%\r\nmore\r\x1b[2K\x1b[1A\x1b[2K\x1b[1mdone\x1b[0m: 3 MB\r\n\x1b[?25h"
    )
    assert script.screen(output) == ["\x1b[1mdone\x1b[0m: 3 MB"]


def test_a_command_is_run_on_a_terminal_of_80_columns(script, demo_folder, tmp_path):  # noqa: F811
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(text_of(demo_folder)))
    lines = script.screen(script.terminal_output("merger plan recipe.yaml", tmp_path))
    plain = [re.sub(r"\x1b\[[\d;]*m", "", line).rstrip() for line in lines]
    assert " model.layers.*" in plain
    assert 70 < max(map(len, plain)) <= 80
    svg = script.picture("merger plan recipe.yaml", lines)
    assert "layers.*" in "".join(xml.etree.ElementTree.fromstring(svg).itertext())
    assert "url(http" not in svg


def test_a_command_that_fails_is_no_picture(script, tmp_path):
    with pytest.raises(script.subprocess.CalledProcessError):
        script.terminal_output("merger plan nowhere.yaml", tmp_path)


def test_a_long_output_is_cut_and_the_picture_says_so(script):
    svg = script.picture("merger inspect", ["line"] * (script.FIRST + script.LAST + 5))
    assert "[5 lines more]" in "".join(xml.etree.ElementTree.fromstring(svg).itertext()).replace("\xa0", " ")


def test_every_picture_is_there_is_small_and_is_shown(script):
    names = {f"{shot.name}.svg" for shot in script.SHOTS if shot.name} | {f"{name}.png" for name in script.PAGES}
    sizes = {path.name: path.stat().st_size for path in PICTURES.iterdir()}
    assert names <= sizes.keys()
    assert max(sizes.values()) < 150_000
    assert sum(sizes.values()) < 800_000
    docs = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "docs").glob("*.md"))
    assert {name for name in sizes if f"pictures/{name}" not in docs} == set()


@pytest.mark.parametrize("path", sorted(PICTURES.glob("*.svg")), ids=lambda path: path.stem)
def test_a_picture_names_no_machine_and_needs_no_network(path):
    text = path.read_text(encoding="utf-8")
    words = "".join(xml.etree.ElementTree.fromstring(text).itertext())
    assert not re.search(r"(?<![\w~.])/(home|root|tmp|work|Users|var)\b", words)
    assert f"/{getpass.getuser()}/" not in words
    assert "http" not in text.replace("http://www.w3.org/2000/svg", "")
