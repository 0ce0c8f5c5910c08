import io
from pathlib import Path

from rich.console import Console

from segfit.engine.findings import Column, Findings, Table
from segfit.report.text import grid, print_findings
from tests.unit.report import events


def printed(show, **options) -> str:
    file = io.StringIO()
    show(Console(file=file, highlight=False, _environ={}, **options))
    return file.getvalue()


def rows(text):
    cells = [[cell.strip() for cell in line.strip("│┃ ").split("│")] for line in text.splitlines()]
    return {row[0].removeprefix("■ "): row[1:] for row in cells if len(row) > 1}


def test_numbers_are_formatted_and_what_is_absent_is_a_dash():
    (table,) = events.result(0.5).tables
    text = printed(lambda console: console.print(grid(table)), width=100)
    assert rows(text) == {
        "[liver]": ["0.5000", "1,234,567"],
        "kidney": ["–", "0"],
        "mean": ["0.5000"],
    }
    assert "pixel accuracy 0.9500" in text


def test_totals_stand_below_a_line_and_rows_have_squares_in_their_colours():
    (table,) = events.result().tables
    text = printed(
        lambda console: console.print(grid(table)),
        width=100,
        force_terminal=True,
        color_system="truecolor",
    )
    assert "\x1b[38;2;255;0;0m■ \x1b[0m[liver]" in text
    lines = text.splitlines()
    last = next(index for index, line in enumerate(lines) if "kidney" in line)
    assert set(lines[last + 1]) <= set("├─┼┤")


def test_true_and_nan_and_the_headline():
    columns = [Column("fits"), Column("GiB", ".2f")]
    table = Table("t", "A [title]", columns, [[True, 1.234], [False, float("nan")]])
    found = Findings("The [answer].", tables=[table])
    text = printed(lambda console: print_findings(found, [Path("out/x")], console), width=60)
    assert rows(text) == {"yes": ["1.23"], "no": ["–"]}
    assert text.splitlines()[-2:] == ["Written to out/x", "The [answer]."]
