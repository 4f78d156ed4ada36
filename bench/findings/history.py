"""Findings about the history: noise level, fidelity, which keys are kept, which shots are chosen (§ 3.4, § 4.2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from findings.finding import ELSEWHERE, Finding, Row, Series, World, above, below, by_shot, mean, rows_of, said, tried
from findings.metrics import Measured, measure, paired
from findings.ways import Weights, one_by_one, requests, shot_by_shot, to_scenes
from lct.evaluate import Mean95
from lct.sample import SceneRequest
from lct.sample.select import recent, relevant

TIMES = (0.0, 0.1, 0.3, 0.5, 0.7, 0.8, 0.9)
HISTORY_TIME = 0.1
WINDOW = 2  # shots seen where errors are to accumulate
NO_LOSS = 0.02  # of identity error, where something is said to cost nothing


def on_noisy_media(causal: Weights, world: World) -> Finding:
    """Fig. 7: what the next shot keeps of given media at t_c: colours, which are coarse, texture and weave, which are
    fine; judged by the character, its colour against its texture.

    Kept is 1 − error / chance, where chance is the error of the same shots made without the given one.
    """
    samples = world.draw(2, cast=(0, 0))
    scenes = requests(causal, samples, (0,))

    def seeing(time: float, **options) -> Measured:
        noisy = [replace(s, shots=(replace(s.shots[0], history_time=time), *s.shots[1:])) for s in scenes]
        return measure(one_by_one(causal, noisy, **options), samples, (0,))

    found = {f"t_c {time:g}": seeing(time) for time in TIMES}
    shown = to_scenes(causal, [[s.shots[0].given] for s in scenes], [replace(s, shots=s.shots[:1]) for s in scenes])
    unseen = one_by_one(causal, [replace(s, shots=s.shots[1:]) for s in scenes])
    blind = measure([a + b for a, b in zip(shown, unseen, strict=True)], samples, (0,))
    names = ("colour", "texture", "background", "weave")
    chance = {name: mean(blind, name).mean for name in names}
    parts = {name: {t: 1 - m.per_scene(name) / chance[name] for t, m in found.items()} for name in names}
    kept = {name: {t: Mean95.of(part.tolist()) for t, part in times.items()} for name, times in parts.items()}
    finer = {t: paired(parts["colour"][t], parts["texture"][t]) for t in ("t_c 0.8", "t_c 0.9")}
    told = ("t_c 0.1", "t_c 0.5", "t_c 0.8", "t_c 0.9")
    percent = {name: ", ".join(f"{100 * kept[name][t].mean:.0f}" for t in told) for name in names}
    holds = all(above(kept[name]["t_c 0.5"], 0.5) for name in names)
    holds = holds and above(kept["colour"]["t_c 0.9"]) and above(finer["t_c 0.9"])

    def finer_at(time: float = 0.9, **options) -> Mean95:
        m = seeing(time, **options)
        texture, colour = (m.per_scene(name) / chance[name] for name in ("texture", "colour"))
        return paired(texture, colour)

    other = {k: partial(finer_at, **o) for k, o in ELSEWHERE.items()} | {"at 0.7": partial(finer_at, 0.7)}
    return Finding(
        "What noisy history still says",
        "§ 4.2, Fig. 7",
        "At t_c = 0.5 much detail of the history is kept; at 0.9 its structure is, its high frequencies are lost.",
        "Kept of what the given shot shows, at t_c 0.1, 0.5, 0.8 and 0.9: "
        f"the character's colour {percent['colour']} %, its texture {percent['texture']} %, the background's hue "
        f"{percent['background']} %, its weave {percent['weave']} %. Of the colour more is kept than of the texture by "
        f"{said(finer['t_c 0.8'], 2)} at 0.8 and {said(finer['t_c 0.9'], 2)} at 0.9.",
        holds,
        [
            *rows_of(found | {"without the given shot": blind}, names),
            *(Row(f"{name}, kept", t, value) for name in names for t, value in kept[name].items()),
            *(Row("kept of the colour − of the texture", t, value) for t, value in finer.items()),
        ],
        ("t_c of the given shot", "kept"),
        [Series(name, TIMES, list(kept[name].values())) for name in names],
        "" if holds else tried("kept of the colour less of the texture at 0.9", other),
    )


def accumulation(causal: Weights, world: World, shots: int = 12) -> Finding:
    """Fig. 8: errors over a chain of shots that each see the last two, by t_c; judged at 0 against 0.1."""
    samples = world.draw(shots)
    scenes = requests(causal, samples, (0, 1))
    start, end = slice(2, 4), slice(-2, None)
    times = (0.0, 0.1, 0.3, 0.5, 0.9)

    def chain(time: float, window: int = WINDOW, **options) -> Measured:
        chosen = [list(range(max(0, i - window), i)) for i in range(shots)]
        return measure(one_by_one(causal, scenes, chosen, history_time=time, **options), samples, (0, 1))

    def more_at_zero(**options) -> Mean95:
        a, b = (chain(t, **options) for t in (0.0, 0.1))
        return paired(*(m.per_scene("identity", end) - m.per_scene("identity", start) for m in (a, b)))

    found = {f"t_c {t:g}": chain(t) for t in times}
    names = ("identity", "background", "colour", "weave", "misfit", "saturation", "detail")
    grown = {t: m.per_scene("identity", end) - m.per_scene("identity", start) for t, m in found.items()}
    growth = {t: Mean95.of(value.tolist()) for t, value in grown.items()}
    held = {t: paired(grown["t_c 0"], grown[t]) for t in list(grown)[1:]}
    lost = paired(found["t_c 0.9"].per_scene("identity", start), found["t_c 0.1"].per_scene("identity", start))
    holds = above(growth["t_c 0"]) and above(held["t_c 0.1"]) and above(lost)
    other = {
        "with each shot over the last one alone": partial(more_at_zero, window=1),
        "without guidance": partial(more_at_zero, guidance=1.0),
        "in 8 steps": partial(more_at_zero, steps=8),
    }
    return Finding(
        "History time and error accumulation",
        "§ 4.2, Fig. 8",
        "Clean history (t_c = 0) lets errors accumulate, 0.1 to 0.5 holds them, large times cost fidelity.",
        f"From shots 3–4 to shots {shots - 1}–{shots}, each seeing the last {WINDOW}, identity error grows by "
        + ", ".join(f"{said(value)} at {t[4:]}" for t, value in growth.items())
        + f"; at 0 by {said(held['t_c 0.1'])} more than at 0.1. At 0.9 it starts {said(lost)} higher than at 0.1.",
        holds,
        [
            *rows_of(found, names, start, ", shots 3 and 4"),
            *rows_of(found, names, end, ", last two shots"),
            *(Row("identity, growth", t, value) for t, value in growth.items()),
            *(Row("identity, growth at 0 − growth", t, value) for t, value in held.items()),
            Row("identity, shots 3 and 4, at 0.9 − at 0.1", "", lost),
        ],
        ("shot", "error"),
        [
            by_shot(t, m, name, panel)
            for name, panel in (("identity", "identity"), ("background", "coarse: hue"), ("weave", "fine: weave"))
            for t, m in found.items()
        ],
        "" if holds else tried("how much more errors grow at 0 than at 0.1", other),
    )


def fidelity(lct: Weights, causal: Weights, world: World) -> Finding:
    """Fig. 6: which model is more faithful to given media."""
    samples = world.draw(4, cast=(0, 0, 0, 0))
    found = {
        name: measure(one_by_one(w, requests(w, samples, (0,))), samples, (0,))
        for name, w in (("context-causal", causal), ("bidirectional", lct))
    }
    names = ("background", "weave", "colour", "identity")

    def gain_at(**options) -> Mean95:
        pair = (
            measure(one_by_one(w, requests(w, samples, (0,)), **options), samples, (0,)).per_scene("background")
            for w in (lct, causal)
        )
        return paired(*pair)

    gain = {
        name: paired(found["bidirectional"].per_scene(name), found["context-causal"].per_scene(name)) for name in names
    }
    return Finding(
        "Fidelity to the history",
        "§ 4.2, Fig. 6",
        "The context-causal model keeps the background of given media more faithfully than the bidirectional one.",
        "Background error "
        + " and ".join(f"{said(mean(m, 'background'))} ({way})" for way, m in found.items())
        + f", difference {said(gain['background'])}; colour difference {said(gain['colour'])}, weave "
        f"{said(gain['weave'])}.",
        above(gain["background"]),
        [*rows_of(found, names), *(Row(f"{name}, gain", "context-causal", value) for name, value in gain.items())],
        ("shot", "background error"),
        [by_shot(way, m, "background") for way, m in found.items()],
        ""
        if above(gain["background"])
        else tried("gain in background", {k: partial(gain_at, **o) for k, o in ELSEWHERE.items()}),
    )


def kept_keys(causal: Weights, world: World) -> Finding:
    """§ 3.3: keys and values of the denoising step nearest t_c, against a pass of their own."""
    samples = world.draw(6)
    scenes = requests(causal, samples, (0, 1))
    times = (0.1, 0.3, 0.5)
    found = {
        f"{keep}, t_c {t:g}": measure(one_by_one(causal, scenes, keep=keep, history_time=t), samples, (0, 1))
        for t in times
        for keep in ("pass", "step")
    }
    error = {key: m.per_scene("identity") for key, m in found.items()}
    loss = {t: paired(error[f"step, t_c {t:g}"], error[f"pass, t_c {t:g}"]) for t in times}
    return Finding(
        "Keys of a denoising step instead of a pass of their own",
        "§ 3.3, Fig. 4b",
        "“K, V features cached from history sample generation”: no separate pass is needed.",
        f"Identity error {said(mean(found['pass, t_c 0.1'], 'identity'))} with a pass; with a step's keys more by "
        + ", ".join(f"{said(value)} at t_c {t:g}" for t, value in loss.items())
        + ". It spares one forward pass a shot.",
        all(below(value, NO_LOSS) for value in loss.values()) and below(mean(found["pass, t_c 0.1"], "identity"), 0.2),
        [
            *rows_of(found, ("identity", "text")),
            *(Row("identity, step − pass", f"t_c {t:g}", value) for t, value in loss.items()),
        ],
        ("t_c", "identity error"),
        [Series(k, times, [mean(found[f"{k}, t_c {t:g}"], "identity") for t in times]) for k in ("pass", "step")],
    )


def pooled_keys(causal: Weights, world: World) -> Finding:
    """§ 3.4: keys kept in the context they were made in, against those recomputed in the new one."""
    samples = world.draw(6)
    chosen = [[], [0], [0, 1], [1, 2], [3, 0], [4, 1]]
    scenes = requests(causal, samples, (0, 1))
    pooled = shot_by_shot(causal, scenes, chosen)
    anew = recomputed(causal, scenes, chosen, pooled)
    found = {
        "kept": measure(to_scenes(causal, pooled, scenes), samples, (0, 1)),
        "recomputed": measure(to_scenes(causal, anew, scenes), samples, (0, 1)),
    }
    rms = [
        float(torch.stack([(a - b).square().mean() for a, b in zip(x[2:], y[2:], strict=True)]).mean().sqrt())
        for x, y in zip(pooled, anew, strict=True)
    ]
    loss = paired(found["kept"].per_scene("identity"), found["recomputed"].per_scene("identity"))
    return Finding(
        "A pool of finished shots",
        "§ 3.4",
        "New shots draw on a pool of finished ones, in any order, without computing them again.",
        f"Identity error {said(mean(found['kept'], 'identity'))} with keys kept from the context they were made in, "
        f"{said(mean(found['recomputed'], 'identity'))} with keys recomputed in the new one (difference {said(loss)}); "
        f"latents differ by {said(Mean95.of(rms))} rms.",
        below(loss, NO_LOSS) and below(mean(found["recomputed"], "identity"), 0.2),
        [
            *rows_of(found, ("identity", "text", "misfit")),
            Row("identity, kept − recomputed", "", loss),
            Row("rms of latents, kept − recomputed", "", Mean95.of(rms)),
        ],
        ("shot", "identity error"),
        [by_shot(way, m, "identity") for way, m in found.items()],
    )


def recomputed(
    causal: Weights,
    scenes: Sequence[SceneRequest],
    chosen: Sequence[Sequence[int]],
    like: Sequence[Sequence[Tensor]],
    **options,
) -> list[list[Tensor]]:
    """Every shot over its chosen ones as if they were a scene of their own; those are taken from `like`."""
    made: list[list[Tensor]] = [[] for _ in scenes]
    for index, seen in enumerate(chosen):
        alone = []
        for scene, finished in zip(scenes, like, strict=True):
            history = tuple(
                replace(
                    scene.shots[i],
                    given=finished[i],
                    history_time=0.0 if scene.shots[i].given is not None else HISTORY_TIME,
                )
                for i in seen
            )
            alone.append(SceneRequest(scene.global_prompt, (*history, scene.shots[index])))
        for scene, shots in zip(made, shot_by_shot(causal, alone, **options), strict=True):
            scene.append(shots[-1])
    return made


def selection(causal: Weights, world: World) -> Finding:
    """§ 3.4: the shot that the prompt speaks of against the newest one, as a character returns after a gap."""
    gaps = (1, 2, 4, 6)
    rows: list[Row] = []
    found: dict[str, list[Mean95]] = {"recency": [], "relevance": []}
    differences = []
    for gap in gaps:
        samples = world.draw(gap + 1, cast=(0, *[None] * (gap - 1), 0))
        scenes = requests(causal, samples, range(gap))
        prompts = [shot.prompt for shot in samples[0].shots]  # who is in a shot is the same in all scenes
        seen = {"recency": recent(gap, 1), "relevance": relevant(prompts[gap], prompts[:gap], 1)}
        made = {}
        for name, choice in seen.items():
            chosen = [[] for _ in range(gap)] + [choice]
            made[name] = measure(one_by_one(causal, scenes, chosen), samples, range(gap))
            found[name].append(mean(made[name], "colour"))
            rows.append(Row("colour", f"{name}, gap {gap}", found[name][-1]))
        differences.append(paired(made["recency"].per_scene("colour"), made["relevance"].per_scene("colour")))
        rows.append(Row("colour, recency − relevance", f"gap {gap}", differences[-1]))
    return Finding(
        "Selection against recency",
        "§ 3.4",
        "A character that returns after several shots needs the shot that showed it, not the newest ones.",
        "With one shot of history, the colour of a character that returns is off by "
        + ", ".join(
            f"{said(found['recency'][i])} by recency and {said(found['relevance'][i])} by relevance at gap {gap}"
            for i, gap in enumerate(gaps)
        )
        + ".",
        all(map(above, differences[1:])) and all(below(value, 0.3) for value in found["relevance"]),
        rows,
        ("shots since the character was seen", "colour error"),
        [Series(name, gaps, values) for name, values in found.items()],
    )
