"""Findings about the history: noise level, fidelity, which keys are kept, which shots are chosen (§ 3.4, § 4.2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from findings.finding import Finding, Row, Series, World, said
from findings.metrics import Measured, measure, paired
from findings.quality import by_shot, mean
from findings.ways import Weights, one_by_one, requests, shot_by_shot, to_scenes
from lct.evaluate import Mean95
from lct.sample import SceneRequest

TIMES = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9)
HISTORY_TIME = 0.1
WINDOW = 2  # shots seen where errors are to accumulate


def on_noisy_media(causal: Weights, world: World) -> Finding:
    """Fig. 7: what the next shot keeps of given media at t_c: coarse colour, background, and the fine weave."""
    samples = world.draw(2, cast=(0, 0))
    scenes = requests(causal, samples, (0,))
    found = {}
    for time in TIMES:
        noisy = [replace(s, shots=(replace(s.shots[0], history_time=time), *s.shots[1:])) for s in scenes]
        found[time] = measure(one_by_one(causal, noisy), samples, (0,))
    n = len(samples)
    # What there is to lose: the error of a shot that knows nothing of the given one.
    chance = {"background": _chance(samples, "background"), "weave": _chance(samples, "weave"), "colour": 0.85}
    kept = {
        name: [1 - mean(found[t], name).mean / chance[name] for t in TIMES]
        for name in ("colour", "background", "weave")
    }
    rows = [Row(name, f"t_c {t:g}", mean(found[t], name), n) for name in kept for t in TIMES]
    fine, coarse, middle = kept["weave"], kept["background"], TIMES.index(0.5)
    last = len(TIMES) - 1
    holds = coarse[middle] > 0.6 and fine[last] < coarse[last] and fine[last] < fine[middle]
    return Finding(
        "What noisy history still says",
        "§ 4.2, Fig. 7",
        "At t_c = 0.5 much detail of the history is kept; at 0.9 its structure is, its high frequencies are lost.",
        "Kept of what the given shot shows, at t_c 0.1, 0.5 and 0.9: "
        + "; ".join(
            f"{words} {100 * kept[name][1]:.0f}, {100 * kept[name][middle]:.0f}, {100 * kept[name][last]:.0f} %"
            for name, words in (
                ("background", "the background's hue"),
                ("weave", "its fine weave"),
                ("colour", "the character's colour"),
            )
        )
        + ".",
        holds,
        rows,
        ("t_c of the given shot", "error, as a part of chance"),
        [
            Series(name, TIMES, [_scaled(mean(found[t], name), 1 / chance[name]) for t in TIMES])
            for name in ("colour", "background", "weave")
        ],
    )


def _scaled(value: Mean95, factor: float) -> Mean95:
    return Mean95(value.mean * factor, value.half * factor)


def _chance(samples, name: str) -> float:
    """The mean error of taking another scene's value for one's own."""
    truths = [s.truth for s in samples]
    pairs = list(zip(truths, truths[1:] + truths[:1], strict=True))
    if name == "weave":
        return float(np.mean([abs(a.weave - b.weave) for a, b in pairs]))
    return float(np.mean([np.linalg.norm(np.subtract(a.background_rgb, b.background_rgb)) for a, b in pairs]))


def accumulation(causal: Weights, world: World, shots: int = 12) -> Finding:
    """Fig. 8: errors over a chain of shots that each see the last two, by t_c."""
    samples = world.draw(shots)
    scenes = requests(causal, samples, (0, 1))
    chosen = [list(range(max(0, i - WINDOW), i)) for i in range(shots)]
    times = (0.0, 0.1, 0.3, 0.5, 0.9)
    found = {t: measure(one_by_one(causal, scenes, chosen, history_time=t), samples, (0, 1)) for t in times}
    n = len(samples)
    names = ("identity", "background", "colour", "weave", "misfit", "saturation", "detail")
    rows = []
    for t, m in found.items():
        for name in names:
            rows += [Row(name, f"t_c {t:g}, shots 3 and 4", mean(m, name, slice(2, 4)), n)]
            rows += [Row(name, f"t_c {t:g}, last two shots", mean(m, name, slice(-2, None)), n)]

    def growth(t: float, name: str = "identity") -> Mean95:
        m = found[t]
        return paired(m.per_scene(name, slice(-2, None)), m.per_scene(name, slice(2, 4)))

    rows += [Row("identity, growth", f"t_c {t:g}", growth(t), n) for t in times]
    clean = growth(0.0)
    held = {t: paired(_grown(found[0.0]), _grown(found[t])) for t in (0.1, 0.3, 0.5)}
    best = max(held, key=lambda t: held[t].mean)
    rows += [Row("identity, growth at 0 − growth", f"t_c {t:g}", d, n) for t, d in held.items()]
    lost = paired(found[0.9].per_scene("identity", slice(2, 4)), found[0.1].per_scene("identity", slice(2, 4)))
    holds = clean.mean - clean.half > 0 and held[best].mean - held[best].half > 0 and lost.mean - lost.half > 0
    return Finding(
        "History time and error accumulation",
        "§ 4.2, Fig. 8",
        "Clean history (t_c = 0) lets errors accumulate, 0.1 to 0.5 holds them, large times cost fidelity.",
        f"From shots 3–4 to shots {shots - 1}–{shots}, each seeing the last {WINDOW}, identity error grows by "
        + ", ".join(f"{said(growth(t))} at {t:g}" for t in times)
        + f"; at 0.9 it starts {said(lost)} higher than at 0.1.",
        holds,
        rows,
        ("shot", "identity error"),
        [by_shot(f"t_c {t:g}", m, "identity") for t, m in found.items()],
    )


def _grown(m: Measured) -> np.ndarray:
    return m.per_scene("identity", slice(-2, None)) - m.per_scene("identity", slice(2, 4))


def fidelity(lct: Weights, causal: Weights, world: World) -> Finding:
    """Fig. 6: which model is more faithful to given media."""
    samples = world.draw(4, cast=(0, 0, 0, 0))
    found = {
        name: measure(one_by_one(w, requests(w, samples, (0,))), samples, (0,))
        for name, w in (("context-causal", causal), ("bidirectional", lct))
    }
    names = ("background", "weave", "colour", "identity")
    n = len(samples)
    rows = [Row(name, way, mean(m, name), n) for name in names for way, m in found.items()]
    gain = {
        name: paired(found["bidirectional"].per_scene(name), found["context-causal"].per_scene(name)) for name in names
    }
    rows += [Row(f"{name}, gain", "context-causal", value, n) for name, value in gain.items()]
    return Finding(
        "Fidelity to the history",
        "§ 4.2, Fig. 6",
        "The context-causal model keeps the background of given media more faithfully than the bidirectional one.",
        "Background error "
        + " and ".join(f"{said(mean(m, 'background'))} ({way})" for way, m in found.items())
        + f", difference {said(gain['background'])}; colour difference {said(gain['colour'])}, weave "
        f"{said(gain['weave'])}.",
        gain["background"].mean - gain["background"].half > 0,
        rows,
        ("shot", "background error"),
        [by_shot(way, m, "background") for way, m in found.items()],
    )


def kept_keys(causal: Weights, world: World) -> Finding:
    """§ 3.3: keys and values of the denoising step nearest t_c, against a pass of their own."""
    samples = world.draw(6)
    scenes = requests(causal, samples, (0, 1))
    times = (0.1, 0.3, 0.5)
    found = {
        (keep, t): measure(one_by_one(causal, scenes, keep=keep, history_time=t), samples, (0, 1))
        for t in times
        for keep in ("pass", "step")
    }
    n = len(samples)
    rows = [
        Row(name, f"{k}, t_c {t:g}", mean(m, name), n) for name in ("identity", "text") for (k, t), m in found.items()
    ]
    loss = {
        t: paired(found["step", t].per_scene("identity"), found["pass", t].per_scene("identity"))
        for t in (0.1, 0.3, 0.5)
    }
    rows += [Row("identity, step − pass", f"t_c {t:g}", value, n) for t, value in loss.items()]
    return Finding(
        "Keys of a denoising step instead of a pass of their own",
        "§ 3.3, Fig. 4b",
        "“K, V features cached from history sample generation”: no separate pass is needed.",
        "Identity error with a step's keys less that with a pass's: "
        + ", ".join(f"{said(value)} at t_c {t:g}" for t, value in loss.items())
        + "; it spares one forward pass a shot.",
        all(value.mean - value.half <= 0.01 for value in loss.values()),
        rows,
        ("t_c", "identity error"),
        [
            Series(k, (0.1, 0.3, 0.5), [mean(found[k, t], "identity") for t in (0.1, 0.3, 0.5)])
            for k in ("pass", "step")
        ],
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
    n = len(samples)
    rms = [
        float(torch.stack([(a - b).square().mean() for a, b in zip(x[2:], y[2:], strict=True)]).mean().sqrt())
        for x, y in zip(pooled, anew, strict=True)
    ]
    rows = [Row(name, way, mean(m, name), n) for name in ("identity", "text", "misfit") for way, m in found.items()]
    loss = paired(found["kept"].per_scene("identity"), found["recomputed"].per_scene("identity"))
    rows += [
        Row("identity, kept − recomputed", "", loss, n),
        Row("rms of latents, kept − recomputed", "", Mean95.of(rms), n),
    ]
    return Finding(
        "A pool of finished shots",
        "§ 3.4",
        "New shots draw on a pool of finished ones, in any order, without computing them again.",
        f"Identity error {said(mean(found['kept'], 'identity'))} with keys kept from the context they were made in, "
        f"{said(mean(found['recomputed'], 'identity'))} with keys recomputed in the new one (difference {said(loss)}); "
        f"latents differ by {said(Mean95.of(rms))} rms.",
        loss.mean - loss.half <= 0.01,
        rows,
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
    """§ 3.4: choosing the shot that shows a character against taking the newest ones, as a character returns."""
    gaps = (1, 2, 4, 6)
    rows, recent, picked = [], [], []
    differences = {}
    for gap in gaps:
        cast = (0, *[None] * (gap - 1), 0)
        samples = world.draw(len(cast), cast=cast)
        last = len(cast) - 1
        scenes = requests(causal, samples, range(last))
        found = {}
        for name, seen in (("recency", [last - 1]), ("selection", [0])):
            chosen = [[] for _ in range(last)] + [seen]
            found[name] = measure(one_by_one(causal, scenes, chosen), samples, range(last))
        n = len(samples)
        rows += [Row("colour", f"{name}, gap {gap}", mean(m, "colour"), n) for name, m in found.items()]
        differences[gap] = paired(found["recency"].per_scene("colour"), found["selection"].per_scene("colour"))
        rows.append(Row("colour, recency − selection", f"gap {gap}", differences[gap], n))
        recent.append(mean(found["recency"], "colour"))
        picked.append(mean(found["selection"], "colour"))
    return Finding(
        "Selection against recency",
        "§ 3.4",
        "A character that returns after several shots needs the shot that showed it, not the newest ones.",
        "With one shot of history, the colour of a character that returns is off by "
        + ", ".join(
            f"{said(r)} by recency and {said(s)} by selection at gap {g}"
            for g, r, s in zip(gaps, recent, picked, strict=True)
        )
        + ".",
        all(differences[g].mean - differences[g].half > 0 for g in gaps[1:]),
        rows,
        ("shots since the character was seen", "colour error"),
        [Series("recency", gaps, recent), Series("selection", gaps, picked)],
    )
