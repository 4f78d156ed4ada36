"""The findings as a page of docs/: a sentence, a plot and the numbers of each, and the paper's tables with our rows."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from textwrap import fill
from typing import Any

from findings.notes import note, tables, training, verdict
from findings.tables import TABLE_1, TABLE_2, PaperTable, markdown, our_row

FOLDER = "findings"  # of the plots, beside the page
TOY = {
    "quality": "100 · (1 − rms difference from the cleanest drawing of what a shot shows)",
    "consistency": "100 · (1 − error of the character's colour, and of the background's, in RGB), averaged",
    "text": "share of what prompts say that is read from the pixels",
}


def page(record: dict[str, Any]) -> str:
    """Markdown of a record of `findings.ask.ask`."""
    verdicts = [verdict(record, f) for f in record["findings"]]
    lines = [
        "# The paper's findings at small scale",
        "",
        f"Written by `python bench/report.py` from `bench/results/findings-cpu.json`: {_count(verdicts)} here. "
        "A model of a million parameters is trained on toy scenes: their truth is known, their characters and places "
        f"stand in no prompt. {record['scenes']} held-out scenes (four times as many single shots), the same "
        "prompts and seeds for everything that is compared, means with 95 % intervals. "
        "`make findings` trains and measures all of it; `lct bench findings --quick` asks the weights in "
        "`bench/findings/weights`.",
        "",
        training(),
        "",
        "| finding | paper | here |",
        "|---|---|---|",
        *(
            f"| [{f['name']}](#{anchor(f['name'])}) | {f['paper']} | {words if f['holds'] else f'**{words}**'} |"
            for f, words in zip(record["findings"], verdicts, strict=True)
        ),
        "",
        "## The paper's tables",
        "",
        tables(),
        "",
        _table(TABLE_1, record["table 1"]),
        "",
        _table(TABLE_2, record["table 2"]),
    ]
    for finding, words in zip(record["findings"], verdicts, strict=True):
        lines += ["", *_section(finding, words, note(record, finding["name"]))]
    return "\n".join(lines) + "\n"


def summary(record: dict[str, Any]) -> str:
    """The README's section: a line a finding."""
    found = [(f, verdict(record, f)) for f in record["findings"]]
    lines = [
        "`make findings` trains a model of a million parameters on toy scenes and asks what the paper found: "
        f"{_count([words for _, words in found])} at this scale ({record['scenes']} scenes each; "
        "[numbers, intervals and plots](docs/findings.md)).",
        "",
    ]
    for f, words in found:
        scope = f"; {words}" if words.endswith("only") else ""
        lines.append(f"- {'✓' if f['holds'] else '✗'} **{f['name']}** ({f['paper']}{scope}). {f['outcome']}")
    return "\n".join(lines)


def _count(verdicts: list[str]) -> str:
    held, partly = sum(v.startswith("holds") for v in verdicts), sum(v.endswith("only") for v in verdicts)
    return f"{held} of {len(verdicts)} findings hold" + (f", {partly} of them in part," if partly else "")


def anchor(name: str) -> str:
    """What a heading of this name is called in a link."""
    return "".join(c for c in name.lower().replace(" ", "-") if c.isalnum() or c == "-")


def _table(table: PaperTable, rows: dict[str, dict[str, float]]) -> str:
    ours = [
        our_row(
            way if len(table.labels) == 1 else way.split(", "),
            {column: 100 * score for column, score in scores.items()},
            toy=True,
        )
        for way, scores in rows.items()
    ]
    return markdown(table, ours, TOY)


def _section(finding: dict[str, Any], words: str, beside: str) -> list[str]:
    name = anchor(finding["name"])
    lines = [
        f"## {finding['name']}",
        "",
        f"*{finding['paper']}: {finding['claim']}*",
        "",
        f"**{words.capitalize()}.** {finding['outcome']}",
        "",
        *([finding["tried"], ""] if finding["tried"] else []),
        *([beside, ""] if beside else []),
        f"![{finding['name']}]({FOLDER}/{name}.svg)",
        "",
        "<details><summary>Numbers</summary>",
        "",
        "| what | of | mean | ± | n |",
        "|---|---|---|---|---|",
    ]
    for row in finding["rows"]:
        mean, half = row["value"]["mean"], row["value"]["half"]
        lines.append(
            f"| {row['what']} | {row['condition']} | {_number(mean)} | {_number(half)} | {row['value']['n']} |"
        )
    return [*lines, "", "</details>"]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def digest(finding: dict[str, Any]) -> str:
    """Of what a plot shows."""
    return hashlib.sha256(json.dumps([finding["plot"], finding["axes"]]).encode()).hexdigest()[:16]


def draw(record: dict[str, Any], folder: Path) -> None:
    """One SVG a finding: lines, or marks over names, with their 95 % intervals."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    pyplot.rcParams.update({"svg.hashsalt": "lct", "svg.fonttype": "none", "font.size": 9})
    folder.mkdir(parents=True, exist_ok=True)
    for finding in record["findings"]:
        panels = list(dict.fromkeys(series["panel"] for series in finding["plot"]))
        size = (6.4, 3.4) if len(panels) == 1 else (3.1 * len(panels), 2.9)
        figure, axes = pyplot.subplots(1, len(panels), figsize=size, layout="constrained", squeeze=False)
        for panel, axis in zip(panels, axes[0], strict=True):
            inside = [series for series in finding["plot"] if series["panel"] == panel]
            for i, series in enumerate(inside):
                _line(axis, series, 0.12 * (i - (len(inside) - 1) / 2))
            axis.set(xlabel=finding["axes"][0], title=panel or None)
            axis.spines[["top", "right"]].set_visible(False)
            axis.grid(True, axis="y", alpha=0.3)
            low, high = axis.get_ylim()
            if low < high / 2:
                axis.set_ylim(bottom=min(0, low))
        axes[0, 0].set_ylabel(finding["axes"][1])
        axes[0, 0].legend(fontsize=8, frameon=False)
        path = folder / f"{anchor(finding['name'])}.svg"
        figure.savefig(path, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
        pyplot.close(figure)
        text = path.read_text(encoding="utf-8")
        path.write_text(text.replace("</svg>", f"<!-- {digest(finding)} --></svg>"), encoding="utf-8")


def _line(axis: Any, series: dict[str, Any], aside: float) -> None:
    """A series with its intervals, where x are names so far aside of them; what has no mean is left out."""
    x, y = series["x"], series["y"]
    named = isinstance(x[0], str)
    if named:
        axis.set_xticks(range(len(x)), [fill(name, 15) for name in x])
        x = [i + aside for i in range(len(x))]
    known = [
        (at, value["mean"], value["half"] or 0) for at, value in zip(x, y, strict=True) if value["mean"] is not None
    ]
    if known:
        at, mean, half = zip(*known, strict=True)
        axis.errorbar(at, mean, half, fmt="o" if named else "o-", ms=3.5, lw=1.3, capsize=2, label=series["name"])
