"""The paper's Tables 1 and 2 with our own rows under the published ones, in Markdown and for a terminal (§ 4)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal

import rich.table
from rich.box import SIMPLE_HEAD
from rich.text import Text

from lct.evaluate import Mean95

COLUMNS = {
    "aesthetic": "Aesthetic ↑",
    "quality": "Quality ↑",
    "consistency": "Consistency (avg.) ↑",
    "text": "Text ↑",
    "user_study": "User study ↑",
}
"""A row's fields and their headings. All but the last are VBench's scores in percent."""
PUBLISHED_NOTE = (
    "published: as printed in the paper (arXiv 2503.10589), not measured here; “Ours” there is the paper's own model. "
    "Scores are VBench's in percent; Consistency (avg.) is the mean of subject and background consistency"
)
USER_STUDY_NOTE = "; User study is the average human ranking, of 4 methods here, where more is better"
MEASURED_NOTE = "measured: by this project, on scenes of its own; ± is half of a 95 % interval"
ABSENT = "–"

Score = float | Mean95 | None
Source = Literal["published", "measured", "toy"]


@dataclass(frozen=True)
class Row:
    """One line of a table; a score is a number, a mean with its interval, or None where there is none.

    labels  what stands in the first columns: the method, or task, model and settings
    source  "published" by the paper, "measured" as the paper did, or a "toy" stand-in for that
    """

    labels: tuple[str, ...]
    aesthetic: Score = None
    quality: Score = None
    consistency: Score = None
    text: Score = None
    user_study: Score = None
    source: Source = "measured"


@dataclass(frozen=True)
class PaperTable:
    """A table of the paper: its title, the names of a row's labels, its columns as fields of `Row`, and its rows."""

    title: str
    labels: tuple[str, ...]
    columns: tuple[str, ...]
    rows: tuple[Row, ...]


def _published(*cells: str | float, labels: int = 1) -> Row:
    return Row(tuple(map(str, cells[:labels])), *map(float, cells[labels:]), source="published")


TABLE_1 = PaperTable(
    "Table 1. Quantitative evaluation",
    ("Method",),
    tuple(COLUMNS),
    (
        _published("VideoStudio", 61.68, 73.13, 95.25, 28.00, 2.14),
        _published("StoryDiffusion + Kling", 60.40, 74.04, 96.57, 27.33, 2.50),
        _published("IC-LoRA + Kling", 57.88, 69.07, 96.27, 27.90, 1.57),
        _published("Ours", 60.79, 67.44, 95.65, 30.14, 3.79),
    ),
)
TABLE_2 = PaperTable(
    "Table 2. Ablation studies",
    ("Task", "Model", "Settings"),
    tuple(COLUMNS)[:4],
    (
        _published("single-shot", "pre-trained", "-", 52.09, 63.37, 94.98, 30.81, labels=3),
        _published("single-shot", "post-LCT", "-", 55.91, 64.23, 95.06, 32.22, labels=3),
        _published("multi-shot", "bidirectional", "joint denoise", 56.14, 57.68, 95.34, 29.33, labels=3),
        _published("multi-shot", "bidirectional", "auto-regressive", 55.46, 56.62, 94.87, 30.24, labels=3),
        _published("multi-shot", "context-causal", "auto-regressive", 55.49, 50.31, 94.96, 30.15, labels=3),
    ),
)


def our_row(labels: str | Sequence[str], scores: Mapping[str, Score], toy: bool = False) -> Row:
    """A row of our own from scores by column (keys of `COLUMNS`, any of which may be missing).

    Raises ValueError for an unknown column and for a score that is no number; NaN says that there is none.
    """
    labels = (labels,) if isinstance(labels, str) else tuple(labels)
    for name, score in scores.items():
        if name not in COLUMNS:
            raise ValueError(f"scores: expected columns among {', '.join(COLUMNS)}, got {name!r}; rename or drop it")
        value = score.mean if isinstance(score, Mean95) else score
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if value is not None and not (number and not math.isinf(value)):
            raise ValueError(f"{name}: expected a finite number, a Mean95 or None, got {score!r}; drop it from scores")
    return Row(labels, **scores, source="toy" if toy else "measured")


def markdown(table: PaperTable, rows: Sequence[Row] = (), toy: Mapping[str, str] | None = None) -> str:
    """The published rows, ours under them, and notes, as Markdown.

    toy  by column, what a toy row's number there is: none of them is VBench's

    Raises ValueError where a row has other labels than the table or a score in a column that the table lacks, and where
    a toy row's score is not explained.
    """
    heads, aligned = _headings(table)
    lines = [
        f"**{table.title}**",
        "",
        f"| {' | '.join(heads)} |",
        f"|{'|'.join('--:' if right else '---' for right in aligned)}|",
        *(f"| {' | '.join(map(_markdown_text, cells))} |" for cells in _cells(table, rows)),
    ]
    for note in _notes(table, rows, toy or {}):
        lines += ["", _markdown_text(note)]
    return "\n".join(lines) + "\n"


def terminal(table: PaperTable, rows: Sequence[Row] = (), toy: Mapping[str, str] | None = None) -> rich.table.Table:
    """What `markdown` shows, for `rich.console.Console.print`."""
    shown = rich.table.Table(
        title=table.title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, padding=(0, 1, 0, 0),
        caption=Text("\n".join(_notes(table, rows, toy or {}))), caption_justify="left",
    )  # fmt: skip
    labels = len(table.labels)
    # of a narrow terminal the labels, joined in one column, take what the numbers leave
    shown.add_column(" · ".join(table.labels))
    for head in _headings(table)[0][labels:]:
        shown.add_column(head.replace(" ", "\n", 1), justify="left" if head == "Source" else "right", no_wrap=True)
    for i, cells in enumerate(_cells(table, rows), 1):
        joined = " · ".join(cells[:labels])
        shown.add_row(*map(Text, (joined, *cells[labels:])), end_section=i == len(table.rows))
    return shown


def _headings(table: PaperTable) -> tuple[list[str], list[bool]]:
    """The heading of every column, and whether it holds numbers."""
    heads = [*table.labels, "Source", *(COLUMNS[name] for name in table.columns)]
    return heads, [False] * (len(table.labels) + 1) + [True] * len(table.columns)


def _cells(table: PaperTable, rows: Sequence[Row]) -> list[list[str]]:
    for row in rows:
        if len(row.labels) != len(table.labels):
            raise ValueError(f"labels: expected {', '.join(table.labels)}, got {row.labels}; pass them to our_row")
        for name in COLUMNS:
            if name not in table.columns and _known(getattr(row, name)):
                raise ValueError(f"{name}: expected no score, {table.title} has no such column, got one; drop it")
    return [
        [*row.labels, row.source, *(_number(getattr(row, name)) for name in table.columns)]
        for row in (*table.rows, *rows)
    ]


def _known(score: Score) -> bool:
    return score is not None and not math.isnan(score.mean if isinstance(score, Mean95) else score)


def _number(score: Score) -> str:
    """Two decimals, as the paper has."""
    if not _known(score):
        return ABSENT
    if isinstance(score, Mean95):
        return f"{score.mean:.2f}" if math.isnan(score.half) else f"{score.mean:.2f} ± {score.half:.2f}"
    return f"{score:.2f}"


def _notes(table: PaperTable, rows: Sequence[Row], toy: Mapping[str, str]) -> list[str]:
    notes = [PUBLISHED_NOTE + (USER_STUDY_NOTE if "user_study" in table.columns else "") + "."]
    if any(row.source == "measured" for row in rows):
        notes.append(f"{MEASURED_NOTE}.")
    shown = [row for row in rows if row.source == "toy"]
    used = [name for name in table.columns if any(_known(getattr(row, name)) for row in shown)]
    for name in used:
        if not toy.get(name):
            raise ValueError(f"toy: expected what a toy row's {name} is, got nothing; pass toy={{{name!r}: '…'}}")
    if shown:
        meanings = "; ".join(f"{COLUMNS[name].removesuffix(' ↑')}: {toy[name]}" for name in used)
        notes.append(f"toy: stand-ins measured on toy scenes, not VBench's scores{f'. {meanings}' if used else ''}.")
    if any(ABSENT in cells for cells in _cells(table, rows)):
        notes.append(f"{ABSENT}: not measured.")
    return notes


def _markdown_text(text: str) -> str:
    """Text that stays within its cell and is not taken for markup."""
    text = escape(" ".join(text.split()), quote=False)
    return "".join(f"\\{c}" if c in "\\|*_`[]" else c for c in text)
