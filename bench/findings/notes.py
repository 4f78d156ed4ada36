"""What a reader should know beside a finding, and how far its verdict reaches: from the record and the runs.

Kept apart from the studies: words here ask for nothing to be measured anew.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from math import log
from pathlib import Path
from statistics import NormalDist
from typing import Any

from findings.finding import above, said
from lct.evaluate import Mean95
from lct.train.runs import micro_causal, micro_lct, micro_text_rope, paper_lct

MODES, NOISY, HISTORY = (
    "Text accuracy by inference mode",
    "What noisy history still says",
    "History time and error accumulation",
)
SINGLE, ABLATIONS = "Single shots after LCT", "What each part of the recipe gives"
STAND_INS = "The rivals are stand-ins on our own LCT weights, not the published systems."
COVERS = {
    MODES: ("text, auto-regressive − joint", {"without guidance": "without guidance", "": "with guidance"}),
    HISTORY: ("identity, growth at 0 − growth", {f"t_c {t}": f"at {t}" for t in (0.1, 0.3, 0.5)}),
}
"""Findings that are judged in one of several settings, or times: the row that each is judged by, and words for it."""
ANNEAL = Path(__file__).parents[1] / "results" / "anneal-cpu.json"

Record = dict[str, Any]


def value(record: Record, finding: str, what: str, condition: str) -> Mean95:
    """A number of a record; LookupError where it is not there."""
    rows = (row for f in record["findings"] if f["name"] == finding for row in f["rows"])
    found = [row["value"] for row in rows if (row["what"], row["condition"]) == (what, condition)]
    if not found:
        raise LookupError(f"{finding}: no row {what!r}, {condition!r}")
    return Mean95(**found[0])


def verdict(record: Record, finding: dict[str, Any]) -> str:
    """ "holds", "differs", or where alone it holds."""
    if not finding["holds"] or finding["name"] not in COVERS:
        return "holds" if finding["holds"] else "differs"
    what, places = COVERS[finding["name"]]
    true = [words for place, words in places.items() if above(value(record, finding["name"], what, place))]
    return "holds" if len(true) == len(places) else f"holds {' and '.join(true)} only"


def note(record: Record, name: str) -> str:
    """What stands under a finding's outcome; nothing under most."""
    return NOTES[name](record) if name in NOTES else ""


def training() -> str:
    """Where the training of the findings' model leaves the paper's, or fills what the paper leaves open."""
    lct, paper = micro_lct(), paper_lct()
    data = lct.data
    return (
        f"Training here is {lct.steps:,} steps of LCT and {micro_causal().steps:,} causal ones; the paper's is of 3 B "
        f"parameters, 135 K and 9 K. Times are logit-normal with a deviation of {lct.time_std:g}, "
        f"{_share(data.single)} of the draws are single shots, and scenes with cuts stand to long shots as "
        f"{10 * data.cut:g} : {10 * data.no_cut:g}. The paper has about 1 : 2 of these and publishes neither the "
        f"deviation nor the share (`paper_lct` assumes {paper.time_std:g} and {_share(paper.data.single)}). "
        "Each model was trained once: intervals are over scenes, not over trainings."
    )


def tables() -> str:
    return f"{STAND_INS} There was no user study here: everything is read from pixels."


def _share(part: float) -> str:
    return "half" if part == 0.5 else f"{100 * part:.0f} %"


def _percent(x: Mean95) -> str:
    return f"{100 * x.mean:.0f} ± {100 * x.half:.0f}"


def _before_positions() -> str:
    """Text accuracy of single shots before text had positions."""
    rows = json.loads(ANNEAL.read_text(encoding="utf-8"))["rows"]
    return said(Mean95(**next(r["text, before"] for r in rows if "text, before" in r)))


def _single(_: Record) -> str:
    return (
        f"“Pre-trained” is the model {micro_text_rope().steps} steps after its text was given positions (§ 3.2.2). "
        f"Before that its text accuracy is {_before_positions()} (`bench/results/{ANNEAL.name}`), which LCT does not "
        "bring back."
    )


def _consistency(record: Record) -> str:
    name = "Consistency against the rivals"
    theirs, ours = (value(record, name, "colour", way) for way in ("identity images", "ours, auto-regressive"))
    return (
        f"{STAND_INS} The background is half of the identity error, and portraits show another than the scene's: by "
        f"the character's colour alone identity images have {said(theirs)}, ours {said(ours)}."
    )


def _noisy(record: Record) -> str:
    kept = (value(record, NOISY, f"{x}, kept", "t_c 0") for x in ("colour", "texture", "background", "weave"))
    return (
        f"At t_c 0, measured as well, {', '.join(f'{100 * x.mean:.0f}' for x in kept)} % are kept. t_c is the given "
        "shot's own here (`history_time` of the shot); in all other findings given shots stand at 0, and t_c is that "
        "of generated ones."
    )


def _history(record: Record) -> str:
    what, _ = COVERS[HISTORY]
    others = {t: value(record, HISTORY, what, f"t_c {t}") for t in (0.3, 0.5)}
    told = ", ".join(
        f"than at {t} by {said(x)}{'' if above(x) else ', which does not tell them apart'}" for t, x in others.items()
    )
    config = micro_causal()
    rare = NormalDist(config.time_mean, config.time_std).cdf(log(0.01 / 0.99))
    clean, noisy = (value(record, NOISY, "background, kept", f"t_c {t}") for t in (0, 0.1))
    return (
        f"At 0 it grows more {told}. Not all of that need be accumulation: training draws no shot at t = 0, and "
        f"{1000 * rare:.0f} in 1,000 below 0.01, and even of true media less is read at 0 than at 0.1 (of the "
        f"background's hue {_percent(clean)} % against {_percent(noisy)} %, [above](#what-noisy-history-still-says)). "
        "The two given shots stand at t = 0 throughout, so shot 3 is the same at every t_c, and what differs at the "
        "start is shot 4."
    )


def _ablations(record: Record) -> str:
    after = value(record, SINGLE, "text", "pre-trained")
    return (
        "All at 1,500 steps of LCT. “Text without positions” (λ = 0), judged in joint scenes of four shots, starts "
        f"from the model before its text was given positions; the others start {micro_text_rope().steps} steps after, "
        f"when single shots have text accuracy {said(after)} instead of {_before_positions()}. Image substitution "
        "draws any of a toy shot's three frames."
    )


NOTES: dict[str, Callable[[Record], str]] = {
    SINGLE: _single,
    MODES: lambda _: (
        "It is judged without guidance, a setting that was chosen for it on other scenes: with guidance hardly a word "
        "goes wrong in any mode."
    ),
    "Prompt alignment": lambda _: STAND_INS,
    "Framing diversity": lambda _: STAND_INS,
    "Consistency against the rivals": _consistency,
    "Reappearance": lambda _: f"{STAND_INS} The keyframe of shot 6 was asked for the place alone.",
    NOISY: _noisy,
    HISTORY: _history,
    ABLATIONS: _ablations,
}
