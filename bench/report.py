"""The README's results, written from the records in bench/results: `python bench/report.py` renews them.

A test fails when they are stale: nothing is quoted that was not measured.
"""

from __future__ import annotations

import json
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS, README = ROOT / "bench" / "results", ROOT / "README.md"
BEGIN, END = "<!-- results: written by bench/report.py -->", "<!-- end of results -->"


def record(name: str) -> dict:
    return json.loads((RESULTS / f"{name}.json").read_text())


def results() -> str:
    """The section between the markers."""
    demo, cache, film = record("demo-cpu"), record("generation-cpu"), record("film-cpu")
    lines = [
        f"`make demo` on {demo['threads']} CPU cores took {demo['seconds']:.0f} s, of which "
        f"{sum(demo['stages'].values()):.0f} s were training. Over {demo['scenes']} held-out scenes of {demo['shots']} "
        "shots, mean ± 95 % interval:",
        "",
        "| measure | value | target |",
        "|---|---|---|",
        *(
            f"| {row['name']} | {row['value']} | {row['target']}{', **missed**' if row['met'] is False else ''} |"
            for row in demo["rows"]
            if row["target"]
        ),
        "",
        *_reported(demo),
        "",
        f"Colour and background are distances in RGB: two random identities are {demo['chance']} apart. Prompts "
        "name a shot's framing, corner, motion and place; colour and shape stand in none. Shape is not carried from "
        "shot to shot yet: it is right about as often without context.",
        "",
        f"Over {cache['shots']} shots the KV cache is {cache['measured_ratio']:.2f} times faster than recomputing all "
        f"history; the FLOP count predicts {cache['predicted_ratio']:.2f}. Tuning on a real film of "
        f"{len(film['cuts']) + 1} shots takes the loss on fixed draws to {film['ratio']:.2f} of its start. The loss of "
        f"the film's last shot is {_gain(film['before']):.2f} times better with context than without before tuning, "
        f"{_gain(film['after']):.2f} times after.",
    ]
    return "\n".join(lines)


def _reported(demo: dict) -> list[str]:
    """A table of what has no target, a column for each way of generating."""
    table: dict[str, dict[str, str]] = {}
    for row in demo["rows"]:
        if not row["target"]:
            mode, name = row["name"].split(": ")
            table.setdefault(name, {})[mode] = row["value"]
    modes = list(demo["scores"])
    return [
        f"| without target | {' | '.join(modes)} |",
        "|---|" + "---|" * len(modes),
        *(f"| {name} | {' | '.join(values[mode] for mode in modes)} |" for name, values in table.items()),
    ]


def _gain(losses: dict) -> float:
    return losses["last_isolated"] / losses["last_with_context"]


def renewed(readme: str) -> str:
    before, _, rest = readme.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{results()}\n{END}{after}"


if __name__ == "__main__":
    README.write_text(renewed(README.read_text(encoding="utf-8")), encoding="utf-8")
