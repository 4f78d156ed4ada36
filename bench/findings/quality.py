"""Findings about what training leaves and gives: single shots, inference modes, the causal stage, ablations (§ 4.2)."""

from __future__ import annotations

from collections.abc import Mapping
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
from findings.metrics import TEXT, measure, paired
from findings.ways import Weights, one_by_one, requests, still, together
from lct.evaluate import Mean95
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
    rows, gains = rows_of(found, (*TEXT, "text", *errors)), {}
    for name in (*TEXT, "text", *errors):
        old, new = (found[way].per_scene(name) for way in ("pre-trained", "after LCT"))
        gains[name] = paired(np.abs(old), np.abs(new)) if name in errors else paired(new, old)
        rows.append(Row(f"{name}, gain", "after LCT", gains[name]))
    better = [name for name, gain in gains.items() if above(gain)]
    worse = [name for name, gain in gains.items() if below(gain, 0)]
    outcome = (
        "Text accuracy "
        + ", ".join(f"{said(mean(m, 'text'))} ({way})" for way, m in found.items())
        + ", misfit "
        + ", ".join(f"{said(mean(m, 'misfit'), 4)}" for m in found.values())
        + f"; clearly better: {', '.join(better) or 'nothing'}; clearly worse: {', '.join(worse) or 'nothing'}."
    )

    def gain(**options) -> Mean95:
        old, new = (measure(together(w, requests(w, samples), **options), samples) for w in (before, after))
        return paired(new.per_scene("text"), old.per_scene("text"))

    holds = all(value.mean >= 0 for value in gains.values()) and {"text", "misfit"} <= set(better)
    finding = Finding(
        "Single shots after LCT",
        "Table 2, upper half",
        "Every single-shot metric is better after LCT than before it.",
        outcome,
        holds,
        rows,
        (", ".join(TEXT), "share right"),
        [Series(way, range(len(TEXT)), [mean(m, name) for name in TEXT]) for way, m in found.items()],
        "" if holds else tried("gain in text accuracy", {k: partial(gain, **o) for k, o in ELSEWHERE.items()}),
    )
    tuned = {"pre-trained": "pre-trained", "after LCT": "post-LCT"}
    return finding, {f"single-shot, {tuned[way]}, -": columns(found[way]) for way in tuned}


def modes(lct: Weights, causal: Weights, world: World) -> tuple[list[Finding], Table]:
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
    names = ("text", "misfit", "colour", "background", "weave", "identity", "saturation", "detail")
    rows = rows_of(found, names)
    gain = paired(auto.per_scene("text"), joint.per_scene("text"))

    def at(name: str, way: str, other: str, **options) -> Mean95:
        made = {
            "joint": lambda: together(lct, scenes, **options),
            "AR": lambda: one_by_one(lct, scenes, **options),
            "causal": lambda: one_by_one(causal, scenes, **options),
        }
        a, b = (measure(made[key](), samples).per_scene(name) for key in (way, other))
        return paired(a, b)

    text = Finding(
        "Text accuracy by inference mode",
        "Table 2, lower half",
        "Text accuracy rises from joint denoising to auto-regressive generation.",
        f"Text accuracy {said(mean(joint, 'text'))} jointly, {said(mean(auto, 'text'))} auto-regressively "
        f"(difference {said(gain)}), {said(mean(last, 'text'))} context-causally.",
        above(gain),
        [*rows, Row("text", "auto-regressive − joint", gain)],
        ("shot", "text accuracy"),
        [by_shot(way, m, "text") for way, m in found.items()],
        ""
        if above(gain)
        else tried(
            "auto-regressive less joint", {k: partial(at, "text", "AR", "joint", **o) for k, o in ELSEWHERE.items()}
        ),
    )
    loss = {way: paired(last.per_scene("misfit"), m.per_scene("misfit")) for way, m in (("joint", joint), ("AR", auto))}
    quality = Finding(
        "Image quality by inference mode",
        "Table 2, lower half",
        "Image quality is lowest with the context-causal model.",
        "Misfit (rms from the cleanest drawing) "
        + ", ".join(f"{said(mean(found[way], 'misfit'), 4)} ({way})" for way in list(found)[:3])
        + f"; context-causal less joint {said(loss['joint'], 4)}, less auto-regressive {said(loss['AR'], 4)}.",
        all(map(above, loss.values())),
        [*rows, *(Row("misfit", f"context-causal − {way}", value) for way, value in loss.items())],
        ("shot", "misfit"),
        [by_shot(way, m, "misfit") for way, m in found.items()],
        ""
        if all(map(above, loss.values()))
        else tried(
            "misfit, context-causal less joint",
            {k: partial(at, "misfit", "causal", "joint", **o) for k, o in ELSEWHERE.items()},
        ),
    )
    # Four times as good: a fourth of the error without context is still more than the error with it, scene by scene.
    spare = {
        way: paired(alone.per_scene("identity") / 4, m.per_scene("identity")) for way, m in list(found.items())[:3]
    }
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
        [*rows, *(Row("identity, isolated / 4 − this", way, value) for way, value in spare.items())],
        ("shot", "identity error"),
        [by_shot(way, m, "identity") for way, m in found.items()],
    )
    table = {f"multi-shot, {way}": columns(m) for way, m in list(found.items())[:3]}
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
    for part, weights in without.items():
        words, judge = ABLATIONS[part]
        values[words] = _errors(weights, samples, singles)
        rows += [Row(name, words, Mean95.of(value.tolist())) for name, value in values[words].items()]
        loss = {name: paired(value, base[name]) for name, value in values[words].items()}
        rows += [Row(f"{name}, loss", words, value) for name, value in loss.items()]
        judged[part] = loss[judge]
    return Finding(
        "What each part of the recipe gives",
        "§ 3.2, § 3.4",
        "Positions of their own, text positions, times of their own, images and single shots in training each serve.",
        "; ".join(f"{ABLATIONS[p][0]}: {ABLATIONS[p][1]} worse by {said(value)}" for p, value in judged.items()) + ".",
        all(map(above, judged.values())),
        rows,
        (f"0 everything, without: {', '.join(f'{i + 1} {ABLATIONS[p][0]}' for i, p in enumerate(without))}", "error"),
        [Series(name, range(len(values)), [Mean95.of(v[name].tolist()) for v in values.values()]) for name in base],
    )


def _errors(w: Weights, samples, singles) -> dict[str, np.ndarray]:
    scenes, given = requests(w, samples), (0, 1)
    joint = measure(together(w, scenes), samples)
    on_given = measure(together(w, requests(w, samples, given)), samples, given)
    stills = [SceneRequest(s.global_prompt, tuple(map(still, s.shots))) for s in requests(w, singles)]
    images = measure(together(w, stills), singles)
    alone = measure(together(w, requests(w, singles)), singles)
    settled = [i for i, sample in enumerate(singles) if not sample.truth.shots[0].enters]
    pictures = np.mean([images.per_scene(k)[settled] for k in ("framing", "place", "light", "corner")], axis=0)
    return {
        "wrong in joint text": 1 - joint.per_scene("text"),
        "identity in joint scenes": joint.per_scene("identity"),
        "identity on given shots": on_given.per_scene("identity"),
        "wrong in images": 1 - pictures,
        "wrong in single shots": 1 - alone.per_scene("text"),
    }
