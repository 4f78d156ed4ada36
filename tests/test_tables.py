"""The paper's tables: what was published stands there to the digit, ours stands under it, none passes for more."""

import re
import sys
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "bench"))  # behind tests/, which has a film.py too

from findings.tables import COLUMNS, TABLE_1, TABLE_2, markdown, our_row, terminal  # noqa: E402

from lct.evaluate import Mean95  # noqa: E402

# Typed from the paper's page, apart from findings/tables.py.
PAPER = {
    1: """
VideoStudio | 61.68 73.13 95.25 28.00 2.14
StoryDiffusion + Kling | 60.40 74.04 96.57 27.33 2.50
IC-LoRA + Kling | 57.88 69.07 96.27 27.90 1.57
Ours | 60.79 67.44 95.65 30.14 3.79""",
    2: """
single-shot | pre-trained | - | 52.09 63.37 94.98 30.81
single-shot | post-LCT | - | 55.91 64.23 95.06 32.22
multi-shot | bidirectional | joint denoise | 56.14 57.68 95.34 29.33
multi-shot | bidirectional | auto-regressive | 55.46 56.62 94.87 30.24
multi-shot | context-causal | auto-regressive | 55.49 50.31 94.96 30.15""",
}
TABLES = {1: TABLE_1, 2: TABLE_2}
both = pytest.mark.parametrize("number", [1, 2])
NAN = float("nan")


def body(text):
    """Cells of a Markdown table's rows."""
    rows = [line for line in text.splitlines() if line.startswith("| ")][1:]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]] for row in rows]


def printed(table, *arguments, width=120):
    out = StringIO()
    Console(file=out, width=width, color_system=None).print(terminal(table, *arguments))
    return out.getvalue()


@both
def test_published_rows_are_the_papers_to_the_digit(number):
    expected = []
    for line in PAPER[number].strip().splitlines():
        *labels, numbers = line.split(" | ")
        expected.append([*labels, "published", *numbers.split()])
    assert body(markdown(TABLES[number])) == expected
    shown = printed(TABLES[number])
    assert all(cell in shown for row in expected for cell in row[-len(TABLES[number].columns) :])
    assert {row.source for row in TABLES[number].rows} == {"published"}


def test_the_papers_user_study_is_n_plus_1_less_the_rank():
    """Ranks 1 to 4 in any order add up to 10, as do the four averages."""
    assert sum(row.user_study for row in TABLE_1.rows) == pytest.approx(10)


def test_our_rows_stand_under_the_published_ones_with_what_they_have():
    rows = [our_row("LCT | [link](x) <b>", {"text": Mean95(30.126, 0.5), "user_study": 3, "quality": Mean95(NAN, NAN)})]
    text = markdown(TABLE_1, rows)
    assert body(text)[4] == ["LCT \\| \\[link\\](x) &lt;b&gt;", "measured", "–", "–", "–", "30.13 ± 0.50", "3.00"]
    assert "by this project" in text and "–: not measured" in text and "toy" not in text
    shown = printed(TABLE_1, rows)
    assert "LCT | [link](x) <b>" in shown and "30.13 ± 0.50" in shown
    assert shown.index("3.79") < shown.index("30.13")


def test_an_interval_that_is_not_known_is_left_out():
    assert body(markdown(TABLE_2, [our_row(["a", "b", "c"], {"text": Mean95(30.0, NAN)})]))[5][-1] == "30.00"


def test_a_toy_row_is_marked_and_its_numbers_are_explained():
    rows = [our_row("cache", {"consistency": 91.0}, toy=True)]
    with pytest.raises(ValueError, match=r"consistency.*pass toy="):
        markdown(TABLE_1, rows)
    with pytest.raises(ValueError, match="consistency"):
        terminal(TABLE_1, rows)
    meaning = {"consistency": "share of colours kept", "text": "not used here"}
    text = markdown(TABLE_1, rows, meaning)
    assert body(text)[4][:2] == ["cache", "toy"]
    assert "not VBench's scores. Consistency (avg.): share of colours kept." in text and "not used here" not in text
    assert "share of colours kept" in " ".join(printed(TABLE_1, rows, meaning).split())


def test_without_rows_of_ours_nothing_is_said_of_them():
    text = markdown(TABLE_2)
    assert "arXiv 2503.10589" in text and "measured:" not in text and "toy" not in text and "ranking" not in text
    assert "average human ranking" in markdown(TABLE_1)


@both
def test_a_narrow_terminal_keeps_the_numbers_whole(number):
    shown = printed(TABLES[number], width=80)
    assert all(f"{getattr(row, name):.2f}" in shown for row in TABLES[number].rows for name in TABLES[number].columns)
    assert max(map(len, shown.splitlines())) <= 80


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ({"motion": 1.0}, "columns among aesthetic"),
        ({"text": "30"}, "text: expected a finite number"),
        ({"text": float("inf")}, "text: expected a finite number"),
        ({"text": Mean95(float("-inf"), 0)}, "text: expected a finite number"),
        ({"text": True}, "text: expected a finite number"),
    ],
)
def test_what_is_no_score_is_refused(scores, message):
    with pytest.raises(ValueError, match=message):
        our_row("ours", scores)


def test_a_row_must_fit_its_table():
    with pytest.raises(ValueError, match="labels: expected Task, Model, Settings"):
        markdown(TABLE_2, [our_row("ours", {})])
    with pytest.raises(ValueError, match="user_study: expected no score"):
        markdown(TABLE_2, [our_row(["a", "b", "c"], {"user_study": 2.0})])
    assert tuple(COLUMNS) == TABLE_1.columns and TABLE_2.columns == TABLE_1.columns[:4]
