"""The findings as a page of docs/: a sentence, a plot and the numbers of each, and the paper's tables with our rows."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from textwrap import fill
from typing import Any

from findings.tables import TABLE_1, TABLE_2, PaperTable, markdown, our_row

FOLDER = "findings"  # of the plots, beside the page
TOY = {
    "quality": "100 · (1 − rms difference from the cleanest drawing of what a shot shows)",
    "consistency": "100 · (1 − error of the character's colour, and of the background's, in RGB), averaged",
    "text": "share of what prompts say that is read from the pixels",
}


def page(record: dict[str, Any]) -> str:
    """Markdown of a record of `findings.ask.ask`."""
    held = [f for f in record["findings"] if f["holds"]]
    lines = [
        "# The paper's findings at small scale",
        "",
        f"Written by `python bench/report.py` from `bench/results/findings-cpu.json`: {len(held)} of "
        f"{len(record['findings'])} hold. A model of a million parameters is trained on toy scenes: their truth is "
        f"known, their characters and places stand in no prompt. {record['scenes']} held-out scenes (four times as "
        "many single shots), the same prompts and seeds for everything that is compared, means with 95 % intervals. "
        "`make findings` trains and measures all of it; `lct bench findings --quick` asks the weights in "
        "`bench/findings/weights`.",
        "",
        "| finding | paper | here |",
        "|---|---|---|",
        *(f"| [{f['name']}](#{anchor(f['name'])}) | {f['paper']} | {_verdict(f)} |" for f in record["findings"]),
        "",
        "## The paper's tables",
        "",
        _table(TABLE_1, record["table 1"]),
        "",
        _table(TABLE_2, record["table 2"]),
    ]
    for finding in record["findings"]:
        lines += ["", *_section(finding)]
    return "\n".join(lines) + "\n"


def summary(record: dict[str, Any]) -> str:
    """The README's section: a line a finding."""
    held = sum(f["holds"] for f in record["findings"])
    lines = [
        f"`make findings` trains a model of a million parameters on toy scenes and asks what the paper found: "
        f"{held} of {len(record['findings'])} findings hold at this scale ({record['scenes']} scenes each; "
        "[numbers, intervals and plots](docs/findings.md)).",
        "",
        *(f"- {'✓' if f['holds'] else '✗'} **{f['name']}** ({f['paper']}). {f['outcome']}" for f in record["findings"]),
    ]
    return "\n".join(lines)


def _verdict(finding: dict[str, Any]) -> str:
    return "holds" if finding["holds"] else "**differs**"


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


def _section(finding: dict[str, Any]) -> list[str]:
    name = anchor(finding["name"])
    lines = [
        f"## {finding['name']}",
        "",
        f"*{finding['paper']}: {finding['claim']}*",
        "",
        f"**{'Holds' if finding['holds'] else 'Differs'}.** {finding['outcome']}",
        "",
        *([finding["tried"], ""] if finding["tried"] else []),
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
