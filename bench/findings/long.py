"""Findings beyond the trained length: twenty shots, a minute without a cut, cuts as marked (Fig. 1, § 4.3)."""

from __future__ import annotations

import numpy as np

from findings.finding import Finding, Row, World, said
from findings.metrics import by_gap, cut_accuracy, measure, paired
from findings.quality import by_shot, mean
from findings.ways import Weights, one_by_one, requests
from lct.evaluate import Mean95

SHOTS = 20
FPS = 3.0  # a toy shot of three frames is a second
MINUTE = 60
GAPS = ((1, 2), (3, 5), (6, 9), (10, 19))


def positions(causal: Weights, world: World) -> Finding:
    """DESIGN § 3: shots that see the first two of twenty, at compact and at absolute positions."""
    samples = world.draw(SHOTS)
    scenes = requests(causal, samples, (0, 1))
    chosen = [[], [0]] + [[0, 1]] * (SHOTS - 2)
    found = {
        name: measure(one_by_one(causal, scenes, chosen, absolute), samples, (0, 1))
        for name, absolute in (("compact", False), ("absolute", True))
    }
    n, end = len(samples), slice(-5, None)
    rows = [
        Row(name, f"{way}, last five shots", mean(m, name, end), n)
        for name in ("identity", "colour", "background", "text", "misfit")
        for way, m in found.items()
    ]
    lost = paired(found["absolute"].per_scene("identity", end), found["compact"].per_scene("identity", end))
    drift = paired(found["compact"].per_scene("identity", end), found["compact"].per_scene("identity", slice(2, 7)))
    rows += [Row("identity, absolute − compact", "last five shots", lost, n)]
    rows += [Row("identity, last five − first five", "compact", drift, n)]
    return Finding(
        "Positions of chosen shots beyond the trained length",
        "§ 3.2.2, § 3.4",
        "Chosen shots at compact positions keep identity at any distance; at absolute ones beyond training not.",
        f"In shots {SHOTS - 4} to {SHOTS} identity error is {said(mean(found['compact'], 'identity', end))} at compact "
        f"and {said(mean(found['absolute'], 'identity', end))} at absolute positions (trained to nine shots).",
        lost.mean - lost.half > 0 and abs(drift.mean) - drift.half < 0.05,
        rows,
        ("shot", "identity error"),
        [by_shot(way, m, "identity") for way, m in found.items()],
    )


def twenty_shots(causal: Weights, world: World) -> Finding:
    """Fig. 1, top: a scene of twenty shots, history selected to fit, and cuts where they are marked."""
    samples = world.draw(SHOTS)
    scenes = requests(causal, samples)
    # Scenes of a batch choose alike: the first two shots, which settle what the scene looks like, and the newest six.
    chosen = [list(range(i)) if i < 9 else [0, 1, *range(i - 6, i)] for i in range(SHOTS)]
    frames = one_by_one(causal, scenes, chosen)
    m = measure(frames, samples)
    cuts = cut_accuracy(frames, [[shot.cut for shot in sample.shots] for sample in samples])
    truth = cut_accuracy(
        [[(shot.latents + 1) / 2 for shot in sample.shots] for sample in samples],
        [[shot.cut for shot in sample.shots] for sample in samples],
    )
    n, start, end = len(samples), slice(2, 7), slice(-5, None)
    names = ("identity", "colour", "background", "text", "misfit", "saturation", "detail")
    rows = [
        Row(name, words, mean(m, name, part), n)
        for name in names
        for words, part in (("shots 3 to 7", start), ("last five shots", end))
    ]
    drift = paired(m.per_scene("identity", end), m.per_scene("identity", start))
    rows += [Row("identity, last five − shots 3 to 7", "", drift, n)]
    rows += [
        Row("colour", f"last seen {a} to {b} shots ago", v, n)
        for (a, b), v in zip(GAPS, by_gap(m, "colour", GAPS), strict=True)
    ]
    rows += [
        Row("F1 of cuts", "generated", Mean95(cuts.f1, float("nan")), n),
        Row("F1 of cuts", "truth", Mean95(truth.f1, float("nan")), n),
    ]
    return Finding(
        "Twenty shots",
        "Fig. 1",
        "A scene of about twenty shots keeps its look to the end, with cuts where they are marked.",
        f"Identity error {said(mean(m, 'identity', start))} in shots 3 to 7 and {said(mean(m, 'identity', end))} in "
        f"the last five (drift {said(drift)}), text accuracy {said(mean(m, 'text', end))} there; cuts are found at the "
        f"marked seams with F1 {cuts.f1:.3f} (true scenes {truth.f1:.3f}).",
        drift.mean - drift.half < 0.03 and cuts.f1 > 0.9 * truth.f1,
        rows,
        ("shot", "identity error"),
        [by_shot("identity", m, "identity"), by_shot("background", m, "background"), by_shot("colour", m, "colour")],
    )


def without_a_cut(causal: Weights, world: World) -> Finding:
    """Fig. 1, third example; § 4.3: one shot extended to a minute, segment by segment."""
    samples = world.draw(MINUTE, kind="no_cut")
    scenes = requests(causal, samples, (0,))
    chosen = [[0, *range(max(1, i - 4), i)] if i else [] for i in range(MINUTE)]
    frames = one_by_one(causal, scenes, chosen)
    m = measure(frames, samples, (0,))
    cuts = cut_accuracy(frames, [[False] * MINUTE for _ in samples])
    n, start, end = len(samples), slice(1, 6), slice(-5, None)
    names = ("identity", "colour", "background", "text", "misfit", "saturation", "detail")
    rows = [
        Row(name, words, mean(m, name, part), n)
        for name in names
        for words, part in (("first five segments", start), ("last five segments", end))
    ]
    drift = paired(m.per_scene("identity", end), m.per_scene("identity", start))
    seams = n * (MINUTE - 1)
    jump = Mean95.of([float(np.mean([_jump(a, b) for a, b in zip(s, s[1:], strict=False)])) for s in frames])
    rows += [
        Row("identity, last five − first five", "", drift, n),
        Row("cuts found per seam, none is marked", "", Mean95(cuts.false / seams, float("nan")), n),
        Row("change over a seam by change within a segment", "", jump, n),
    ]
    return Finding(
        "A minute without a cut",
        "§ 4.3, Fig. 1",
        "A single shot is extended to a minute, segment by segment, without visible seams or loss of its look.",
        f"After {MINUTE} segments of {FPS:g} frames, a minute at {FPS:g} frames a second, identity error is "
        f"{said(mean(m, 'identity', end))}, at the start {said(mean(m, 'identity', start))}; a detector finds "
        f"{cuts.false} cuts at {seams} seams, none of them marked; a seam changes {said(jump, 2)} times as much as two "
        "neighbouring frames.",
        mean(m, "identity", end).mean < 0.15 and cuts.false / seams < 0.02,
        rows,
        ("segment", "identity error"),
        [by_shot("identity", m, "identity"), by_shot("background", m, "background"), by_shot("misfit", m, "misfit")],
    )


def _jump(before: np.ndarray, after: np.ndarray) -> float:
    """Change from one segment's last frame to the next one's first, by the mean change of neighbouring frames."""
    within = np.mean([np.abs(np.diff(x, axis=0)).mean() for x in (before, after)])
    return float(np.abs(after[0] - before[-1]).mean() / max(within, 1e-6))
