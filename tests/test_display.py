"""Tables and sentences on terminals of any width, and pages: no word or number is broken, and names are plain text."""

import io
import re

import pytest
from rich.console import Console

from merger.charts import Bar, BarChart
from merger.display import Cell, Column, Row, Table, text_row
from merger.display.page import Charts, Commands, Fold, Section, html_table, page
from merger.display.table import unbroken
from merger.display.terminal import broken, print_columns, print_table, print_text

FIGURES = Table(
    [Column("model"), *(Column(f"{task} accuracy", "right") for task in ("code", "french", "wordnet")), Column("kept")],
    [
        text_row("base", "8.0 % (0.00)", "0.0 % (0.00)", "2.0 % (0.00)", "0.000 [0.000, 0.000]"),
        text_row("[b]merge[/b]", "100.0 % (1.00)", "98.0 % (0.98)", "86.0 % (0.87)", "0.949 [0.923, 0.973]"),
    ],
)


def printed(show, width, *, is_terminal=True):
    """The lines that a function prints on a console of a width."""
    text = io.StringIO()
    show(Console(file=text, width=width, force_terminal=is_terminal, color_system=None))
    return [line.rstrip() for line in text.getvalue().splitlines()]


@pytest.mark.parametrize("width", [40, 60, 80, 120])
def test_a_table_fits_any_width_with_every_cell_in_one_piece(width):
    lines = printed(lambda console: print_table(FIGURES, console), width)
    assert max(map(len, lines)) <= width
    for row in FIGURES.rows:
        for cell in row.cells:
            assert any(cell.text in line for line in lines), cell.text


def test_a_table_that_fits_has_its_headings_in_one_line():
    lines = printed(lambda console: print_table(FIGURES, console), 120)
    assert lines[1].split("   ")[0].strip() == "model"
    assert "french accuracy" in lines[1]
    assert len([line for line in lines if "base" in line]) == 1


def test_the_parts_of_a_table_repeat_the_names_of_its_rows():
    lines = printed(lambda console: print_table(FIGURES, console), 60)
    assert [line.split()[0] for line in lines if line.startswith(" base")] == ["base", "base"]


def test_a_heading_row_is_in_every_part_and_rows_without_cells_there_are_not():
    table = Table([Column("a"), Column("x" * 20), Column("y" * 20)], [text_row("block"), text_row("r", "1", "")])
    lines = printed(lambda console: print_table(table, console), 30)
    assert [line.strip() for line in lines].count("block") == 2
    assert len([line for line in lines if line.strip().startswith("r")]) == 1


def test_as_many_columns_as_fit_are_printed_and_the_others_named():
    absent = []
    lines = printed(lambda console: absent.extend(print_columns(FIGURES, console)), 60)
    assert absent == ["kept"]
    assert "wordnet" in " ".join(lines)
    assert "kept" not in " ".join(lines)


def test_prose_is_broken_between_words_and_only_there():
    table = Table([Column("method"), Column("what it does", is_prose=True)], [text_row("ties", "keeps " * 30)])
    lines = printed(lambda console: print_table(table, console), 50)
    assert max(map(len, lines)) <= 50
    assert set(" ".join(lines[3:]).split()) == {"ties", "keeps"}


def test_a_name_that_leaves_no_room_is_broken_behind_dots():
    name = "language_model.model.layers.*.block_sparse_moe.experts.*.w1.weight"
    table = Table([Column("tensor"), Column("shape")], [text_row(name, "4096x14336")])
    lines = printed(lambda console: print_table(table, console), 50)
    assert max(map(len, lines)) <= 50
    assert "".join(line.removesuffix("4096x14336").strip() for line in lines[3:]) == name
    assert any(line.endswith(".") for line in lines[3:])


@pytest.mark.parametrize(
    ("name", "width", "lines"),
    [("a.b", 10, ["a.b"]), ("aaaa.bbbb.cc", 6, ["aaaa.", "  bbbb.", "  cc"]), ("aaaaaaaa", 4, ["aaaaaaaa"])],
)
def test_names_are_broken_where_they_can_be(name, width, lines):
    assert broken(name, width).split("\n") == lines


def test_a_bar_stands_beside_its_number():
    table = Table([Column("expert"), Column("density")], [Row([Cell("code"), Cell("0.500", 0.5)])])
    assert " code     0.500 ██" in printed(lambda console: print_table(table, console), 80)


def test_a_sentence_is_broken_between_words_but_not_within_a_figure():
    text = "out: 29 tensors; wrote 12 MB in 8.1 s, below by 3 % [0.1, 0.2] and :key: [b]x[/b]"
    for width in range(14, 60):
        lines = printed(lambda console: print_text(text, console), width)
        assert max(map(len, lines)) <= width
        assert " ".join(lines) == text
        for figure in ("12 MB", "8.1 s", "3 %", "[0.1, 0.2]"):
            assert any(figure in line for line in lines)


def test_a_path_longer_than_the_line_stays_one_word():
    path = "/" + "folder/" * 20
    assert path in printed(lambda console: print_text(f"written to {path} at last", console), 40)


@pytest.mark.parametrize(
    ("width", "lines"),
    [
        (40, ["see what it kept: merger eval a.yaml"]),
        (30, ["see what it kept:", "  merger eval a.yaml"]),
        (10, ["see what", "it kept:", "  merger eval a.yaml"]),
    ],
)
def test_a_command_at_the_end_of_a_sentence_is_never_broken(width, lines):
    assert (
        printed(lambda console: print_text("see what it kept:", console, command="merger eval a.yaml"), width) == lines
    )


def test_indented_lines_stay_indented():
    lines = printed(lambda console: print_text("  - top: " + "word " * 20, console), 40)
    assert all(line.startswith("  ") for line in lines)


def test_what_goes_to_a_file_is_one_line():
    text = "word " * 60 + "end"
    assert printed(lambda console: print_text(text, console), 40, is_terminal=False) == [text]


def test_a_space_within_a_figure_is_told_from_one_between_words():
    assert unbroken("3 % of 4 models in 2 s [1, 2]", "_") == "3_% of 4 models in 2_s [1,_2]"


# --- pages ------------------------------------------------------------------------------------------

BARS = BarChart("kept", "by method", "share", ["ties"], {"code": [Bar(0.5, 0.4, 0.6)]})


@pytest.fixture(scope="module")
def text():
    """A page with a part of every kind."""
    table = Table(
        [Column("model"), Column("kept", "right", "The share <kept>.")],
        [Row([Cell("<i>"), Cell("0.5")], is_bold=True, ends_section=True, swatch="series1")],
        "figures & more",
    )
    sections = [
        Section("First <b>", ["a & b is 5 % better", table]),
        Section("Second", [Charts([BARS]), Fold("more", [BARS]), Commands(["merger run 'a & b'"])]),
    ]
    return page("A <title>", "opening", ["finding 1", "finding 2"], sections, "note")


def test_all_texts_of_a_page_are_escaped(text):
    assert "<b>x" not in text
    assert "<i>" not in text
    assert "A &lt;title&gt;" in text
    assert "a &amp; b is 5\u00a0% better" in text
    assert "merger run &#x27;a &amp; b&#x27;" in text


def test_the_contents_of_a_page_lead_to_its_sections(text):
    links = re.findall(r"<nav.*?</nav>", text)[0]
    anchors = re.findall(r'href="#([\w-]+)"', links)
    assert anchors == ["first-b", "second"]
    assert all(f'<section aria-labelledby="{anchor}"><h2 id="{anchor}">' in text for anchor in anchors)


def test_tables_say_what_heads_what_and_explain_their_columns_twice(text):
    assert '<th scope="col" class="right" title="The share &lt;kept&gt;.">kept</th>' in text
    assert "<dt>kept</dt><dd>The share &lt;kept&gt;.</dd>" in text
    assert '<tr class="bold end"><th scope="row"><span class="swatch" style="background:var(--series1)"></span>' in text


def test_the_keyboard_can_scroll_what_is_wide_and_a_screen_reader_gets_a_charts_figures(text):
    assert text.count('<div class="scroll" tabindex="0" role="group"') == 3
    label = "kept: by method. ties: code 0.500."
    assert text.count(f'role="img" aria-label="{label}"><title>{label}</title>') == 2


def test_a_page_has_styles_for_dark_rooms_and_for_paper(text):
    assert "@media screen and (prefers-color-scheme: dark)" in text
    assert "@media print" in text


def test_a_page_of_one_section_has_no_contents():
    assert "<nav" not in page("t", "", [], [Section("only", ["x"])])


def test_a_table_without_rows_is_a_table_still():
    assert html_table(Table([Column("a")], [])).endswith("<tbody></tbody></table>")
