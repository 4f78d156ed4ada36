"""Findings about what training leaves and gives: single shots, inference modes, the causal stage, ablations (§ 4.2)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from findings.finding import Finding, Row, Series, World, said
from findings.metrics import TEXT, Measured, measure, paired
from findings.ways import Weights, one_by_one, requests, together
from lct.evaluate import Mean95
from lct.sample import SceneRequest, ShotRequest


def mean(measured: Measured, name: str, shots: slice = slice(None)) -> Mean95:
    """Over scenes."""
    return Mean95.of(measured.per_scene(name, shots).tolist())


def single_shots(before: Weights, after: Weights, world: World) -> tuple[Finding, dict[str, dict[str, float]]]:
    """Table 2, upper half: what tuning on scenes does to single shots; and the rows of the table."""
    samples = world.singles()
    old, new = (measure(together(w, requests(w, samples)), samples) for w in (before, after))
    names = (*TEXT, "misfit", "saturation", "detail")
    worse_when_larger = ("misfit", "saturation", "detail")
    rows, better, worse = [], [], []
    for name in names:
        a, b = old.per_scene(name), new.per_scene(name)
        if name in worse_when_larger:
            a, b = np.abs(a), np.abs(b)
        rows += [Row(name, "pre-trained", Mean95.of(a.tolist()), len(samples))]
        rows += [Row(name, "after LCT", Mean95.of(b.tolist()), len(samples))]
        change = paired(a, b) if name in worse_when_larger else paired(b, a)
        rows += [Row(name, "gain", change, len(samples))]
        if change.mean - change.half > 0:
            better.append(name)
        if change.mean + change.half < 0:
            worse.append(name)
    text = [mean(m, "text") for m in (old, new)]
    outcome = (
        f"Over {len(samples)} single shots, text accuracy {said(text[0])} before and {said(text[1])} after; "
        f"clearly better: {', '.join(better) or 'nothing'}; clearly worse: {', '.join(worse) or 'nothing'}."
    )
    lines = [
        Series(label, range(len(TEXT)), [mean(m, name) for name in TEXT])
        for label, m in (("pre-trained", old), ("after LCT", new))
    ]
    finding = Finding(
        "Single shots after LCT",
        "Table 2, upper half",
        "Every single-shot metric is better after LCT than before it.",
        outcome,
        not worse and bool(better),
        rows,
        (", ".join(TEXT), "share right"),
        lines,
    )
    return finding, {
        "single-shot, pre-trained, -": columns(old),
        "single-shot, post-LCT, -": columns(new),
    }


def modes(lct: Weights, causal: Weights, world: World) -> tuple[Finding, Finding, dict[str, dict[str, float]]]:
    """Table 2, lower half: joint, auto-regressive, causal; context against isolation; and the rows of the table."""
    samples = world.draw(6)
    scenes = requests(lct, samples)
    made = {
        "bidirectional, joint": together(lct, scenes),
        "bidirectional, auto-regressive": one_by_one(lct, scenes),
        "context-causal, auto-regressive": one_by_one(causal, scenes),
        "isolated": together(lct, scenes, "isolated"),
    }
    found = {way: measure(frames, samples) for way, frames in made.items()}
    joint, auto, last, alone = found.values()
    n = len(samples)
    rows = [
        Row(name, way, mean(m, name), n)
        for name in ("text", "misfit", "colour", "background", "weave", "identity", "saturation", "detail")
        for way, m in found.items()
    ]
    gain = paired(auto.per_scene("text"), joint.per_scene("text"))
    worst = max(list(found)[:3], key=lambda way: mean(found[way], "misfit").mean)
    text = Finding(
        "Text accuracy and image quality by inference mode",
        "Table 2, lower half",
        "Text accuracy rises from joint to auto-regressive; image quality is lowest with the context-causal model.",
        f"Text accuracy {said(mean(joint, 'text'))} jointly, {said(mean(auto, 'text'))} auto-regressively "
        f"(difference {said(gain)}), {said(mean(last, 'text'))} context-causally; misfit is largest in {worst}: "
        + ", ".join(f"{said(mean(found[way], 'misfit'), 4)} {way}" for way in list(found)[:3])
        + ".",
        gain.mean - gain.half > 0 and worst.startswith("context-causal"),
        [*rows, Row("text", "auto-regressive − joint", gain, n)],
        ("shot", "text accuracy"),
        [by_shot(way, m, "text") for way, m in found.items()],
    )
    ratios = {
        way: mean(alone, "identity").mean / mean(m, "identity").mean for way, m in found.items() if m is not alone
    }
    context = Finding(
        "Context against isolation",
        "§ 1, § 4.1",
        "Shots that see each other keep identity and setting; the project asks for an error at least 4 times smaller.",
        "Identity error (colour and background) without context is "
        + ", ".join(f"{ratio:.1f} times that of {way}" for way, ratio in ratios.items())
        + f"; {said(mean(alone, 'identity'))} against {said(mean(last, 'identity'))} context-causally.",
        min(ratios.values()) >= 4,
        rows,
        ("shot", "identity error"),
        [by_shot(way, m, "identity") for way, m in found.items()],
    )
    return text, context, {f"multi-shot, {way}": columns(m) for way, m in list(found.items())[:3]}


def columns(m: Measured) -> dict[str, float]:
    """What stands in the paper's tables, as toy stand-ins for its columns, from 0 to 1."""
    found = {"quality": 1 - mean(m, "misfit").mean, "text": mean(m, "text").mean}
    consistency = 1 - mean(m, "identity").mean
    return found | ({"consistency": consistency} if np.isfinite(consistency) else {})


def by_shot(name: str, measured: Measured, score: str) -> Series:
    """A score of every shot that has one, counted from 1."""
    values = measured[score]
    numbers = [i for i in range(values.shape[1]) if np.isfinite(values[:, i]).any()]
    return Series(name, [i + 1 for i in numbers], [Mean95.of(values[:, i].tolist()) for i in numbers])


def causal_adaptation(lct: Weights, steps: Mapping[int, Weights], world: World) -> Finding:
    """Fig. 9: bidirectional weights under the causal mask, and how soon tuning makes up for it.

    steps  of the causal stage to its weights, without 0, which is `lct` under the causal mask
    """
    samples = world.draw(6)
    given = (0, 1)
    stages = {0: Weights(lct.model, next(iter(steps.values())).config), **steps}
    found = {step: measure(one_by_one(w, requests(w, samples, given)), samples, given) for step, w in stages.items()}
    full = max(stages)
    ninth = min((s for s in stages if s), key=lambda s: abs(s - full / 9))
    first, early, last = (found[s].per_scene("identity") for s in (0, ninth, full))
    harm, left = paired(first, last), paired(early, last)
    rows = [
        Row(name, f"step {step}", mean(m, name), len(samples))
        for name in ("identity", "colour", "background", "weave", "text")
        for step, m in found.items()
    ]
    recovered = 1 - left.mean / harm.mean if harm.mean > 0 else float("nan")
    return Finding(
        "Adapting to causal attention",
        "§ 4.2, Fig. 9",
        "With bidirectional weights the causal model keeps identity poorly; a ninth of the steps makes up for it.",
        f"Identity error {said(mean(found[0], 'identity'))} at step 0, {said(mean(found[ninth], 'identity'))} at step "
        f"{ninth}, {said(mean(found[full], 'identity'))} at step {full}: switching costs {said(harm)}, of which "
        f"{100 * recovered:.0f} % is made up for after a ninth of the steps.",
        harm.mean - harm.half > 0 and recovered >= 0.8,
        [
            *rows,
            Row("identity", "step 0 − last", harm, len(samples)),
            Row("identity", "ninth − last", left, len(samples)),
        ],
        ("step of the causal stage", "error"),
        [Series(n, list(found), [mean(m, n) for m in found.values()]) for n in ("identity", "colour", "background")],
    )


ABLATIONS = {
    "one_place": ("all shots at the same positions", "identity"),
    "video_rope": ("text without positions, video positions alone", "text"),
    "shared_time": ("one time for all shots of a scene in training", "identity"),
    "no_images": ("no image substitution", "images"),
    "no_single": ("no single-shot data", "single"),
}


def ablations(whole: Weights, without: Mapping[str, Weights], world: World) -> Finding:
    """§ 3.2: each part left out of training, at the same number of steps."""
    samples, singles = world.draw(4), world.singles()[: world.scenes]
    given = (0, 1)
    rows, lost = [], []
    n = world.scenes
    base = _ablated(whole, samples, singles, given)
    for name, value in base.items():
        rows.append(Row(name, "everything", Mean95.of(value.tolist()), n))
    for part, (words, _) in ABLATIONS.items():
        if part not in without:
            continue
        scores = _ablated(without[part], samples, singles, given)
        for name, value in scores.items():
            rows.append(Row(name, words, Mean95.of(value.tolist()), n))
            change = paired(base[name], value) if name in RIGHT else paired(value, base[name])
            rows.append(Row(f"{name}, lost", words, change, n))
            if change.mean - change.half > 0:
                lost.append((part, name, change))
    worse = {part for part, _, _ in lost}
    outcome = "; ".join(
        f"{ABLATIONS[part][0]}: "
        + (", ".join(f"{name} worse by {said(c)}" for p, name, c in lost if p == part) or "nothing clearly worse")
        for part in without
    )
    lines = [
        Series(name, range(len(without) + 1), [r.value for r in rows if r.what == name])
        for name in ("identity, given", "identity, joint", "wrong in images", "wrong in single shots")
    ]
    return Finding(
        "What each part of the recipe gives",
        "§ 3.2, § 3.4",
        "Positions of their own for every shot, times of their own, images and single shots in training: each serves.",
        outcome + ".",
        worse == set(without),
        rows,
        ("0 everything, then left out: " + ", ".join(ABLATIONS[p][0] for p in without), "error"),
        lines,
    )


RIGHT = ("text",)


def _ablated(w: Weights, samples, singles, given) -> dict[str, np.ndarray]:
    scenes = requests(w, samples)
    joint = measure(together(w, scenes), samples)
    on_given = measure(together(w, requests(w, samples, given)), samples, given)
    stills = [SceneRequest(s.global_prompt, tuple(_still(x) for x in s.shots)) for s in requests(w, singles)]
    images = measure(together(w, stills), singles)
    alone = measure(together(w, requests(w, singles)), singles)
    return {
        "text": joint.per_scene("text"),
        "identity, joint": joint.per_scene("identity"),
        "identity, given": on_given.per_scene("identity"),
        "wrong in images": 1 - np.nanmean([images.per_scene(k) for k in ("framing", "place", "light")], axis=0),
        "wrong in single shots": 1 - alone.per_scene("text"),
        "misfit of single shots": alone.per_scene("misfit"),
    }


def _still(shot: ShotRequest) -> ShotRequest:
    return replace(shot, video=(1, *shot.video[1:]))
