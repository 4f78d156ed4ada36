"""Findings about what training leaves and gives: single shots, inference modes, the causal stage, ablations (§ 4.2)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np

from findings.finding import (
    ELSEWHERE,
    Finding,
    Row,
    Series,
    World,
    above,
    below,
    by_shot,
    columns,
    mean,
    rows_of,
    said,
    tried,
)
from findings.metrics import TEXT, Measured, measure, paired
from findings.ways import GUIDANCE, Weights, one_by_one, requests, still, together
from lct.evaluate import Frames, Mean95
from lct.sample import SceneRequest

Table = dict[str, dict[str, float]]  # of the paper, by way


def single_shots(before: Weights, after: Weights, control: Weights | None, world: World) -> tuple[Finding, Table]:
    """Table 2, upper half: what tuning on scenes does to single shots; and the rows of the table.

    control  tuned on as many single shots and no scenes
    """
    samples = world.singles()
    ways = {"pre-trained": before, "after LCT": after} | ({"single shots alone": control} if control else {})
    found = {way: measure(together(w, requests(w, samples)), samples) for way, w in ways.items()}
    errors = ("misfit", "saturation", "detail")
    gains = _gains(found["pre-trained"], found["after LCT"], errors)
    rows = rows_of(found, list(gains)) + [Row(f"{name}, gain", "after LCT", gain) for name, gain in gains.items()]
    better = [name for name, gain in gains.items() if above(gain)]
    worse = [name for name, gain in gains.items() if below(gain, 0)]
    outcome = (
        "Text accuracy "
        + ", ".join(f"{said(mean(m, 'text'))} ({way})" for way, m in found.items())
        + ", misfit "
        + ", ".join(f"{said(mean(m, 'misfit'), 4)}" for m in found.values())
        + f"; clearly better: {', '.join(better) or 'nothing'}; clearly worse: {', '.join(worse) or 'nothing'}."
    )

    def least(**options) -> Mean95:
        old, new = (measure(together(w, requests(w, samples), **options), samples) for w in (before, after))
        return min(_gains(old, new, errors).values(), key=lambda gain: gain.mean)

    holds = all(value.mean >= 0 for value in gains.values()) and {"text", "misfit"} <= set(better)
    finding = Finding(
        "Single shots after LCT",
        "Table 2, upper half",
        "Every single-shot metric is better after LCT than before it.",
        outcome,
        holds,
        rows,
        ("what prompts name", "share right"),
        [Series(way, TEXT, [mean(m, name) for name in TEXT]) for way, m in found.items()],
        "" if holds else tried("the least gain of a metric", {k: partial(least, **o) for k, o in ELSEWHERE.items()}),
    )
    tuned = {"pre-trained": "pre-trained", "after LCT": "post-LCT"}
    return finding, {f"single-shot, {tuned[way]}, -": columns(found[way]) for way in tuned}


def _gains(old: Measured, new: Measured, errors: Sequence[str]) -> dict[str, Mean95]:
    """By how much each metric is better, errors by how much smaller."""
    gains = {name: paired(new.per_scene(name), old.per_scene(name)) for name in (*TEXT, "text")}
    sizes = {name: [np.abs(m.per_scene(name)) for m in (old, new)] for name in errors}
    return gains | {name: paired(*pair) for name, pair in sizes.items()}


def modes(lct: Weights, causal: Weights, world: World) -> tuple[list[Finding], Table]:
    """Table 2, lower half: joint, auto-regressive, causal; context against isolation; and the rows of the table."""
    samples = world.draw(6)
    scenes = requests(lct, samples)
    joint, auto, last = (
        "bidirectional, joint",
        "bidirectional, auto-regressive",
        "context-causal, auto-regressive",
    )
    make: dict[str, Callable[..., Frames]] = {
        joint: partial(together, lct, scenes),
        auto: partial(one_by_one, lct, scenes),
        last: partial(one_by_one, causal, scenes),
        "isolated": partial(together, lct, scenes, "isolated"),
    }
    modes = (joint, auto, last)

    def at(ways: Sequence[str], **options) -> dict[str, Measured]:
        return {way: measure(make[way](**options), samples) for way in ways}

    def less(name: str, of: Mapping[str, Measured], way: str, other: str) -> Mean95:
        return paired(of[way].per_scene(name), of[other].per_scene(name))

    def differing(name: str, way: str, other: str, **options) -> Mean95:
        return less(name, at((way, other), **options), way, other)

    found = at(list(make))
    # With guidance hardly a word goes wrong in any mode, and nothing tells them apart.
    free = at(modes, guidance=1.0)
    gain, guided = less("text", free, auto, joint), less("text", found, auto, joint)
    text = Finding(
        "Text accuracy by inference mode",
        "Table 2, lower half",
        "Text accuracy rises from joint denoising to auto-regressive generation.",
        "Without guidance, text accuracy is "
        + ", ".join(f"{said(mean(m, 'text'))} ({way})" for way, m in free.items())
        + f"; from joint to auto-regressive it rises by {said(gain)}. With guidance {GUIDANCE} it is "
        + ", ".join(said(mean(found[way], "text")) for way in modes)
        + f", a rise of {said(guided)}.",
        above(gain),
        [
            *rows_of(free, ("text", *TEXT), of=", without guidance"),
            *rows_of(found, ("text", *TEXT)),
            Row("text, auto-regressive − joint", "without guidance", gain),
            Row("text, auto-regressive − joint", "", guided),
        ],
        ("shot", "text accuracy without guidance"),
        [by_shot(way, m, "text") for way, m in free.items()],
        ""
        if above(gain)
        else tried(
            "auto-regressive less joint",
            {
                "with guidance 3": partial(differing, "text", auto, joint, guidance=3.0),
                "without guidance in 8 steps": partial(differing, "text", auto, joint, guidance=1.0, steps=8),
                "without guidance in 40 steps": partial(differing, "text", auto, joint, guidance=1.0, steps=40),
            },
        ),
    )
    loss = {way: less("misfit", found, last, way) for way in (joint, auto)}
    lowest = all(map(above, loss.values()))
    quality = Finding(
        "Image quality by inference mode",
        "Table 2, lower half",
        "Image quality is lowest with the context-causal model.",
        "Misfit (rms from the cleanest drawing) "
        + ", ".join(f"{said(mean(found[way], 'misfit'), 4)} ({way})" for way in modes)
        + "; the context-causal model's less the others' "
        + ", ".join(said(value, 4) for value in loss.values())
        + ".",
        lowest,
        [
            *rows_of(found, ("misfit", "saturation", "detail")),
            *(Row("misfit, context-causal − this", way, value) for way, value in loss.items()),
        ],
        ("shot", "misfit"),
        [by_shot(way, m, "misfit") for way, m in found.items()],
        ""
        if lowest
        else tried(
            "misfit, context-causal less joint",
            {k: partial(differing, "misfit", last, joint, **o) for k, o in ELSEWHERE.items()},
        ),
    )
    # Four times as good: a fourth of the error without context is still more than the error with it, scene by scene.
    without = found["isolated"].per_scene("identity") / 4
    spare = {way: paired(without, found[way].per_scene("identity")) for way in modes}
    context = Finding(
        "Context against isolation",
        "§ 1, § 4.1",
        "Shots that see each other keep identity and setting; the error is to be at least 4 times smaller.",
        "Identity error (colour and background) is "
        + ", ".join(f"{said(mean(m, 'identity'))} ({way})" for way, m in found.items())
        + "; a fourth of the isolated error less the others' "
        + ", ".join(said(value) for value in spare.values())
        + ".",
        all(map(above, spare.values())),
        [
            *rows_of(found, ("identity", "colour", "background", "weave")),
            *(Row("identity, isolated / 4 − this", way, value) for way, value in spare.items()),
        ],
        ("shot", "identity error"),
        [by_shot(way, m, "identity") for way, m in found.items()],
    )
    table = {f"multi-shot, {way}": columns(found[way]) for way in modes}
    return [text, quality, context], table


def causal_adaptation(lct: Weights, steps: Mapping[int, Weights], world: World) -> Finding:
    """Fig. 9: bidirectional weights under the causal mask, and how soon tuning makes up for it.

    steps  of the causal stage to its weights, without 0, which is `lct` under the causal mask
    """
    samples = world.draw(9)
    given = (0, 1)
    stages = {0: Weights(lct.model, next(iter(steps.values())).config), **steps}
    found = {step: measure(one_by_one(w, requests(w, samples, given)), samples, given) for step, w in stages.items()}
    full = max(stages)
    ninth = max(step for step in stages if step and step <= full / 9)
    first, early, last = (found[s].per_scene("identity") for s in (0, ninth, full))
    harm, left = paired(first, last), paired(early, last)
    named = {f"step {step}": m for step, m in found.items()}

    def harm_at(given=given, **options) -> Mean95:
        a, b = (
            measure(one_by_one(stages[s], requests(stages[s], samples, given), **options), samples, given)
            for s in (0, full)
        )
        return paired(a.per_scene("identity"), b.per_scene("identity"))

    other = {
        "with history at t_c 0.5": partial(harm_at, history_time=0.5),
        "with nothing given": partial(harm_at, given=()),
        "without guidance": partial(harm_at, guidance=1.0),
    }
    holds = above(harm) and left.mean <= 0.2 * harm.mean and below(left, 0.5 * harm.mean)
    recovered = f", of which {100 * (1 - left.mean / harm.mean):.0f} % is made up for by then" if above(harm) else ""
    return Finding(
        "Adapting to causal attention",
        "§ 4.2, Fig. 9",
        "With bidirectional weights the causal model keeps identity poorly; a ninth of the steps makes up for it.",
        f"Identity error {said(mean(found[0], 'identity'))} at step 0, {said(mean(found[ninth], 'identity'))} at step "
        f"{ninth}, {said(mean(found[full], 'identity'))} at step {full}: switching costs {said(harm)}{recovered}.",
        holds,
        [
            *rows_of(named, ("identity", "colour", "background", "weave", "text", "misfit")),
            Row("identity", "step 0 − last", harm),
            Row("identity", f"step {ninth} − last", left),
        ],
        ("step of the causal stage", "error"),
        [Series(n, list(found), [mean(m, n) for m in found.values()]) for n in ("identity", "colour", "background")],
        "" if holds else tried("what switching costs", other),
    )


ABLATIONS = {
    "one_place": ("all shots at the same positions", "identity on given shots"),
    "video_rope": ("text without positions", "wrong in joint text"),
    "shared_time": ("one time for all shots of a scene", "identity on given shots"),
    "no_images": ("no image substitution", "wrong in images"),
    "no_single": ("no single shots", "wrong in single shots"),
}
"""What is left out of training, in words, and the error that it is judged by; named before anything was measured."""


def ablations(whole: Weights, without: Mapping[str, Weights], world: World) -> Finding:
    """§ 3.2: each part left out of training, at the same number of steps."""
    samples, singles = world.draw(4), world.singles()
    base = _errors(whole, samples, singles)
    rows = [Row(name, "everything", Mean95.of(value.tolist())) for name, value in base.items()]
    judged = {}
    values = {"everything": base}

    def elsewhere(part: str, **options) -> Mean95:
        judge = ABLATIONS[part][1]
        return paired(*(_errors(w, samples, singles, **options)[judge] for w in (without[part], whole)))

    for part, weights in without.items():
        words, judge = ABLATIONS[part]
        values[words] = _errors(weights, samples, singles)
        rows += [Row(name, words, Mean95.of(value.tolist())) for name, value in values[words].items()]
        loss = {name: paired(value, base[name]) for name, value in values[words].items()}
        rows += [Row(f"{name}, loss", words, value) for name, value in loss.items()]
        judged[part] = loss[judge]
    named = {part: f"{words}: {judge} worse by" for part, (words, judge) in ABLATIONS.items()}
    other = [
        tried(named[part], {k: partial(elsewhere, part, **o) for k, o in ELSEWHERE.items()})
        for part, value in judged.items()
        if not above(value)
    ]
    return Finding(
        "What each part of the recipe gives",
        "§ 3.2, § 3.4",
        "Positions of their own, text positions, times of their own, images and single shots in training each serve.",
        "; ".join(f"{named[part]} {said(value)}" for part, value in judged.items()) + ".",
        not other,
        rows,
        ("left out of training", "error"),
        [Series(name, list(values), [Mean95.of(v[name].tolist()) for v in values.values()]) for name in base],
        " ".join(other),
    )


def _errors(w: Weights, samples, singles, **options) -> dict[str, np.ndarray]:
    scenes, given = requests(w, samples), (0, 1)
    joint = measure(together(w, scenes, **options), samples)
    on_given = measure(together(w, requests(w, samples, given), **options), samples, given)
    stills = [SceneRequest(s.global_prompt, tuple(map(still, s.shots))) for s in requests(w, singles)]
    images = measure(together(w, stills, **options), singles)
    alone = measure(together(w, requests(w, singles), **options), singles)
    settled = [i for i, sample in enumerate(singles) if not sample.truth.shots[0].enters]
    pictures = np.mean([images.per_scene(k)[settled] for k in ("framing", "place", "light", "corner")], axis=0)
    return {
        "wrong in joint text": 1 - joint.per_scene("text"),
        "identity in joint scenes": joint.per_scene("identity"),
        "identity on given shots": on_given.per_scene("identity"),
        "wrong in images": 1 - pictures,
        "wrong in single shots": 1 - alone.per_scene("text"),
    }
