"""Findings against the paper's rivals, as toy stand-ins, and composition from images (§ 4.1, § 4.3, Fig. 5)."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from findings.finding import Finding, Row, Series, World, said
from findings.metrics import measure, paired
from findings.quality import by_shot, columns, mean
from findings.ways import Weights, image, keyframes_then_animation, on_identity_images, one_by_one, requests, together
from lct.data.readout import character_distance, colour_error, read_shot
from lct.data.scenes import SceneSample, shot_prompt
from lct.data.toy import ESTABLISHING, ShotTruth, render
from lct.evaluate import Mean95
from lct.sample import SceneRequest, ShotRequest

SIZE = (16, 16)


def comparison(lct: Weights, causal: Weights, world: World) -> tuple[Finding, Finding, dict[str, dict[str, float]]]:
    """Table 1 and Fig. 5: ours, keyframes then animation, and identity images; framing and reappearance."""
    cast = (0, 0, None, 0, None, 0)
    returns = 5  # comes in during this shot: a keyframe of its beginning shows nobody
    samples = world.draw(len(cast), cast=cast, entering=(returns,))
    scenes = requests(lct, samples)
    portraits = [_portraits(s, lct.patch) for s in samples]
    made = {
        "ours, auto-regressive": one_by_one(causal, requests(causal, samples)),
        "ours, joint": together(lct, scenes),
        "keyframes, then each animated": keyframes_then_animation(lct, scenes, entering=(returns,)),
        "identity images": on_identity_images(lct, scenes, portraits, cast),
    }
    found = {way: measure(frames, samples) for way, frames in made.items()}
    n = len(samples)
    rows = [
        Row(name, way, mean(m, name), n)
        for name in ("text", "framing", "identity", "colour", "background", "misfit")
        for way, m in found.items()
    ]
    ours, _, keyframes, portrait = found.values()
    diversity = {way: _diversity(frames) for way, frames in made.items()}
    rows += [Row("framings in use, of 3", way, value, n) for way, value in diversity.items()]
    alignment = {
        name: paired(ours.per_scene("text"), other.per_scene("text"))
        for name, other in (("keyframes", keyframes), ("identity images", portrait))
    }
    rows += [Row("text, ours − theirs", name, value, n) for name, value in alignment.items()]
    framing = Finding(
        "Framing and prompt alignment",
        "§ 4.1, Fig. 5, Table 1",
        "Rivals repeat framings and follow prompts less; LCT is ahead in text, behind in nothing but polish.",
        "Text accuracy "
        + ", ".join(f"{said(mean(m, 'text'))} ({way})" for way, m in found.items())
        + "; background error "
        + ", ".join(f"{said(mean(m, 'background'))} ({way})" for way, m in found.items())
        + "; framings in use "
        + ", ".join(f"{value.mean:.2f}" for value in diversity.values())
        + ".",
        all(v.mean - v.half > 0 for v in alignment.values()),
        rows,
        ("shot", "identity error"),
        [by_shot(way, m, "identity") for way, m in found.items()],
    )
    error = {way: m["colour"][:, returns] for way, m in found.items()}
    before = {way: m["colour"][:, 3] for way, m in found.items()}
    theirs = "keyframes, then each animated"
    gap = paired(error[theirs], error["ours, auto-regressive"])
    reappearance = Finding(
        "Reappearance",
        "§ 4.1, Fig. 5",
        "A character absent from the keyframe that enters later loses its identity with keyframes; LCT holds it.",
        "Colour error of a character that comes in during shot 6, shown before in shots 1, 2 and 4: "
        + ", ".join(f"{said(Mean95.of(e.tolist()))} ({way})" for way, e in error.items())
        + f"; keyframes against ours {said(gap)}. In shot 4, where it is there from the start, keyframes have "
        f"{said(Mean95.of(before[theirs].tolist()))}.",
        gap.mean - gap.half > 0 and Mean95.of(error[theirs].tolist()).mean > 0.5,
        [
            *(Row("colour, there from the start", way, Mean95.of(e.tolist()), n) for way, e in before.items()),
            *(Row("colour, comes in", way, Mean95.of(e.tolist()), n) for way, e in error.items()),
            Row("colour, comes in, keyframes − ours", "", gap, n),
        ],
        ("shot", "colour error"),
        [by_shot(way, m, "colour") for way, m in found.items()],
    )
    return framing, reappearance, {way: columns(m) for way, m in found.items()}


def _diversity(frames) -> Mean95:
    """How many framings a scene uses: exp of the entropy of what is read, 3 where each is used as often."""
    counts = [np.unique([read_shot(shot).framing for shot in scene], return_counts=True)[1] for scene in frames]
    shares = [c / c.sum() for c in counts]
    return Mean95.of([float(np.exp(-(p * np.log(p)).sum())) for p in shares])


def _portraits(sample: SceneSample, patch: tuple[int, int, int]) -> dict[int, ShotRequest]:
    """A close-up of every character, in front of a background that is not the scene's."""
    return {
        who: image(_picture(sample, who, _other_background(sample)), _portrait_prompt(who), patch)
        for who in range(len(sample.truth.characters))
    }


def _portrait_prompt(who: int) -> str:
    return shot_prompt(f"close-up of Character {who + 1}, top left, moving right in the meadow", True)


def _other_background(sample: SceneSample) -> tuple[float, float, float]:
    hue = colorsys.rgb_to_hsv(*sample.truth.background_rgb)[0]
    return colorsys.hsv_to_rgb((hue + 0.5) % 1, 0.35, 0.5)


def _picture(sample: SceneSample, who: int | None, background: Sequence[float]) -> np.ndarray:
    """float32 [H, W, 3] latents of one frame in a meadow: a character in its middle, or nobody."""
    truth = replace(sample.truth, background_rgb=tuple(background))
    middle = np.array([[SIZE[0] / 2 + 1, SIZE[1] / 2]])
    framing = "close-up" if who is not None else ESTABLISHING
    shot = ShotTruth(who, None if who is None else "right", framing, "meadow", None, None)
    return 2 * render(truth, shot, middle, *SIZE)[0] - 1


GREY = (0.5, 0.5, 0.5)


def composition(lct: Weights, causal: Weights, world: World) -> Finding:
    """§ 4.3: a shot from a picture of a character and one of a place, which no training scene had side by side."""
    samples = world.draw(1, cast=(0,))
    settings = {"grey behind the portrait": lambda s: GREY, "another background behind it": _other_background}
    rows, lines, errors = [], [], {}
    n = len(samples)
    for name, w in (("bidirectional", lct), ("context-causal", causal)):
        for words, backdrop in settings.items():
            scenes = []
            for i, sample in enumerate(samples):
                portrait = image(_picture(sample, 0, backdrop(sample)), _portrait_prompt(0), w.patch, 2 * i)
                place = image(
                    _picture(sample, None, sample.truth.background_rgb),
                    shot_prompt(f"{ESTABLISHING} of the meadow", True),
                    w.patch,
                    2 * i + 1,
                )
                new = requests(w, [sample])[0].shots[0]
                scenes.append(SceneRequest(sample.global_prompt, (portrait, place, replace(new, seed=i))))
            frames = one_by_one(w, scenes) if w.causal else together(w, scenes)
            readings = [read_shot(scene[2]) for scene in frames]
            colour = [
                character_distance(r.character_rgb, s.truth.characters[0].rgb)
                for r, s in zip(readings, samples, strict=True)
            ]
            behind = [
                colour_error(r.background_rgb, s.truth.background_rgb) for r, s in zip(readings, samples, strict=True)
            ]
            wrong = [colour_error(r.background_rgb, backdrop(s)) for r, s in zip(readings, samples, strict=True)]
            key = f"{name}, {words}"
            errors[key] = Mean95.of(colour), Mean95.of(behind), Mean95.of(wrong)
            rows += [
                Row("colour, from the identity image", key, errors[key][0], n),
                Row("background, from the environment image", key, errors[key][1], n),
                Row("background, distance from the portrait's", key, errors[key][2], n),
            ]
    best = min(errors, key=lambda key: errors[key][0].mean + errors[key][1].mean)
    colour, behind, wrong = errors[best]
    lines = [
        Series(what, range(len(errors)), [e[i] for e in errors.values()])
        for i, what in enumerate(("colour", "background", "distance from the portrait's background"))
    ]
    return Finding(
        "Composition from identity and environment images",
        "§ 4.3, Fig. 1",
        "Given a picture of a character and one of a place, the model puts one into the other, never trained for it.",
        f"{best}: the character's colour is off by {said(colour)} (0.85 by chance), the background by {said(behind)} "
        f"from the environment image and by {said(wrong)} from the portrait's own; "
        + "; ".join(f"{key}: {said(c)} and {said(b)}" for key, (c, b, _) in errors.items() if key != best)
        + ".",
        colour.mean + colour.half < 0.4 and behind.mean + behind.half < wrong.mean,
        rows,
        (", ".join(errors), "error"),
        lines,
    )
