"""Findings beyond the trained length: twenty shots, a minute without a cut, cuts as marked (Fig. 1, § 4.3)."""

from __future__ import annotations

import numpy as np

from findings.finding import Finding, Row, World, above, below, by_shot, mean, rows_of, said
from findings.metrics import by_gap, cut_accuracy, measure, paired
from findings.ways import Weights, one_by_one, requests
from lct.evaluate import Mean95

SHOTS = 20
FPS = 3.0  # a toy shot of three frames is a second
MINUTE = 60
NAMES = ("identity", "colour", "background", "weave", "text", "misfit", "saturation", "detail")
LIMIT = 0.15  # identity error up to which a look is said to be kept; without context it is 0.5
RETURNS = (0, 1, 3, 7, 15, 16, 17, 18, 19)  # shots that show the character, so that it returns after 1, 2, 4 and 8


def positions(causal: Weights, world: World) -> Finding:
    """DESIGN § 3: shots that see the first two of twenty, at compact and at absolute positions."""
    samples = world.draw(SHOTS)
    scenes = requests(causal, samples, (0, 1))
    chosen = [[], [0]] + [[0, 1]] * (SHOTS - 2)
    found = {
        name: measure(one_by_one(causal, scenes, chosen, absolute), samples, (0, 1))
        for name, absolute in (("compact", False), ("absolute", True))
    }
    end = slice(-5, None)
    lost = paired(found["absolute"].per_scene("identity", end), found["compact"].per_scene("identity", end))
    drift = paired(found["compact"].per_scene("identity", end), found["compact"].per_scene("identity", slice(2, 7)))
    return Finding(
        "Positions of chosen shots beyond the trained length",
        "§ 3.2.2, § 3.4",
        "Chosen shots at compact positions keep identity at any distance, at absolute ones beyond training not.",
        f"In shots {SHOTS - 4} to {SHOTS} identity error is {said(mean(found['compact'], 'identity', end))} at compact "
        f"and {said(mean(found['absolute'], 'identity', end))} at absolute positions (trained to nine shots); compact "
        f"ones drift by {said(drift)} from shots 3–7.",
        above(lost) and below(mean(found["compact"], "identity", end), LIMIT) and below(drift, 0.03),
        [
            *rows_of(found, NAMES, end, ", last five shots"),
            Row("identity, absolute − compact", "last five shots", lost),
            Row("identity, last five − shots 3 to 7", "compact", drift),
        ],
        ("shot", "identity error"),
        [by_shot(way, m, "identity") for way, m in found.items()],
    )


def twenty_shots(causal: Weights, world: World) -> Finding:
    """Fig. 1, top: a scene of twenty shots with history selected to fit; identity by how long ago it was seen."""
    samples = world.draw(SHOTS, cast=[0 if i in RETURNS else None for i in range(SHOTS)])
    # Scenes of a batch choose alike: the first two shots, which settle what the scene looks like, and the newest six.
    chosen = [list(range(i)) if i < 9 else [0, 1, *range(i - 6, i)] for i in range(SHOTS)]
    m = measure(one_by_one(causal, requests(causal, samples), chosen), samples)
    start, end = slice(1, 8), slice(-5, None)
    drift = paired(m.per_scene("identity", end), m.per_scene("identity", start))
    gaps = ((1, 1), (2, 2), (4, 4), (8, 8))
    colours = by_gap(m, "colour", gaps)
    return Finding(
        "Twenty shots",
        "Fig. 1",
        "A scene of about twenty shots keeps its look to the end.",
        f"Identity error {said(mean(m, 'identity', start))} in shots 2 to 8 and {said(mean(m, 'identity', end))} in "
        f"the last five (drift {said(drift)}), text accuracy {said(mean(m, 'text', end))} there. Its character's "
        "colour, by shots since it was last seen: "
        + ", ".join(f"{said(value)} after {a}" for (a, _), value in zip(gaps, colours, strict=True))
        + ".",
        below(mean(m, "identity", end), LIMIT) and below(drift, 0.05),
        [
            *rows_of({"shots 2 to 8": m}, NAMES, start),
            *rows_of({"last five shots": m}, NAMES, end),
            Row("identity, last five − shots 2 to 8", "", drift),
            *(Row("colour", f"last seen {a} ago", value) for (a, _), value in zip(gaps, colours, strict=True)),
        ],
        ("shot", "error"),
        [by_shot(name, m, name) for name in ("identity", "background", "colour")],
    )


def without_a_cut(causal: Weights, world: World) -> Finding:
    """Fig. 1, third example; § 4.3: one shot extended to a minute, segment by segment."""
    samples = world.draw(MINUTE, kind="no_cut")
    chosen = [list(range(max(0, i - 6), i)) for i in range(MINUTE)]
    frames = one_by_one(causal, requests(causal, samples, (0,)), chosen)
    m = measure(frames, samples, (0,))
    start, end = slice(1, 6), slice(-5, None)
    drift = paired(m.per_scene("identity", end), m.per_scene("identity", start))
    jump = Mean95.of([float(np.mean([_jump(a, b) for a, b in zip(s, s[1:], strict=False)])) for s in frames])
    return Finding(
        "A minute without a cut",
        "§ 4.3, Fig. 1",
        "A single shot is extended to a minute, segment by segment, with its look kept.",
        f"After {MINUTE} segments of {FPS:g} frames, a minute at {FPS:g} frames a second, identity error is "
        f"{said(mean(m, 'identity', end))}, at the start {said(mean(m, 'identity', start))} (drift {said(drift)}), "
        f"text accuracy {said(mean(m, 'text', end))}; a seam changes {said(jump, 2)} times as much as other frames.",
        below(mean(m, "identity", end), LIMIT) and below(drift, 0.1) and below(jump, 1.5),
        [
            *rows_of({"first five segments": m}, NAMES, start),
            *rows_of({"last five segments": m}, NAMES, end),
            Row("identity, last five − first five", "", drift),
            Row("change over a seam by change within a segment", "", jump),
        ],
        ("segment", "error"),
        [by_shot(name, m, name) for name in ("identity", "background", "colour")],
    )


def _jump(before: np.ndarray, after: np.ndarray) -> float:
    """Change from one segment's last frame to the next one's first, by the mean change of neighbouring frames."""
    within = np.mean([np.abs(np.diff(x, axis=0)).mean() for x in (before, after)])
    return float(np.abs(after[0] - before[-1]).mean() / max(within, 1e-6))


def cuts(causal: Weights, world: World, shots: int = 8) -> Finding:
    """§ 3.2.1, § 4.3: `[SHOT CUT]` makes a cut, its absence none."""
    made, counts = {}, {}
    for words, kind in (("with the mark", "cut"), ("without", "no_cut")):
        samples = world.draw(shots, kind=kind)
        frames = one_by_one(causal, requests(causal, samples, (0,)))
        made[words] = measure(frames, samples, (0,))
        counts[words] = cut_accuracy(frames, [[shot.cut for shot in sample.shots] for sample in samples])
    f1 = (counts["with the mark"] + counts["without"]).f1()
    found, false = (
        Mean95.of((x / (shots - 1)).tolist()) for x in (counts["with the mark"].found, counts["without"].false)
    )
    return Finding(
        "Cuts where they are marked, and only there",
        "§ 3.2.1, § 4.3, Fig. 1",
        "Shots after “[SHOT CUT]” cut, segments without it go on.",
        f"A cut at {said(found)} of the marked seams and at {said(false)} of the others, F1 {said(f1)}; true scenes "
        "have an F1 of 1.",
        above(f1, 0.9),
        [
            Row("cuts found by seam", "with the mark", found),
            Row("cuts found by seam", "without", false),
            Row("F1", "", f1),
            *rows_of(made, ("identity", "text")),
        ],
        ("shot", "identity error"),
        [by_shot(words, m, "identity") for words, m in made.items()],
    )
