"""Read from pixels what a toy shot shows, and score generated shots against the truth.

Meant for generated frames too: blurry, noisy, values beyond [0, 1]. Nothing is assumed of the text.
"""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import ArrayLike

from lct.data.toy import (
    ESTABLISHING,
    LIGHTS,
    MOTIONS,
    PLACES,
    RADIUS,
    SHAPES,
    TEXTURES,
    ToyTruth,
    corner_of,
    coverage,
    paint,
    place_pattern,
    sky_rows,
    unit,
    weave_rows,
)

# A character stands out from its background by at least 0.55 in RGB distance; noise of 0.05 by less than 0.2.
VISIBLE = 0.3
# A weaker weave is none: it is what noise makes of a plain background.
FAINT = 0.02
# A frame shows a character whole where it covers at least this part of what it covers at most.
WHOLE = 0.8
# A character's colour is read from the pixels within this part of its radius.
CORE = 0.6
# The mean distance of two random characters' colours; a missing character is as far as that from any.
CHANCE = 0.85
# How far below its centre a shape's centroid lies, in radii.
CENTROIDS = {"circle": 0.0, "square": 0.0, "triangle": 1 / 3, "cross": 0.0}


@dataclass(frozen=True)
class ShotReading:
    """What a shot shows. Where no character is visible, its colour, shape, texture, motion and corner
    are None; motion also if T = 1.

    frames                         T
    character_rgb, background_rgb  float [3] in [0, 1]
    centres                        float [T, 2], (y, x) of the character in pixels, of the frames that show it
    enters                         nobody is in the first frame, and somebody in the last; corner and motion are then
                                   those of the frames that show the character
    misfit                         rms difference of the pixels from the cleanest drawing of what is read, in [0, 1]
    """

    frames: int
    visible: bool
    character_rgb: np.ndarray | None
    shape: str | None
    texture: str | None
    motion: str | None
    corner: str | None
    framing: str
    light: str
    place: str
    background_rgb: np.ndarray
    weave: float
    centres: np.ndarray | None
    enters: bool
    misfit: float


def read_shot(frames: np.ndarray) -> ShotReading:
    """Read a shot from its pixels.

    frames  [T, H, W, 3] in [0, 1]; values outside are clipped
    Raises ValueError on another shape and on values that are not finite.
    """
    frames = np.asarray(frames, np.float32)
    if frames.ndim != 4 or frames.shape[-1] != 3 or not np.isfinite(frames).all():
        raise ValueError(f"frames: expected finite values of shape [T, H, W, 3], got shape {list(frames.shape)}")
    frames = np.clip(frames, 0, 1)
    _, height, width, _ = frames.shape
    luminance = frames[:, : sky_rows(height)].mean()
    light = min(LIGHTS, key=lambda name: abs(LIGHTS[name] - luminance))

    # The row below the sky is left out: a soft horizon is no character.
    top = sky_rows(height) + 1
    rows = weave_rows(height)[top:]
    woven = frames[:, top:]
    weave = _weave(woven, rows)
    ground = woven - weave * rows[:, None, None]
    border = np.ones((height - top, width), bool)
    border[:-1, 1:-1] = False
    place, rgb = _background(ground, np.broadcast_to(border, ground.shape[:3]), top, height)
    distance = _distance(ground, place, rgb, top, height)
    strength = float(_strengths(distance).mean())
    # The border alone sees little of a place's pattern: look again at everything but the character.
    near = max(0.4 * strength, np.quantile(distance, 0.3)) if strength >= VISIBLE else np.inf
    place, rgb = _background(ground, distance <= near, top, height)

    distance = _distance(ground, place, rgb, top, height)
    strengths = _strengths(distance)
    enters = bool(strengths[0] < VISIBLE <= strengths[-1])
    shown = strengths >= VISIBLE if enters else np.ones(len(frames), bool)
    strength = float(strengths[shown].mean())
    empty = rgb + place_pattern(place, height, width)[top:, :, None] + weave * rows[:, None, None]
    nobody = ShotReading(
        len(frames),
        False,
        None,
        None,
        None,
        None,
        None,
        ESTABLISHING,
        light,
        place,
        rgb,
        weave,
        None,
        False,
        _rms(woven - empty),
    )
    if strength < VISIBLE:
        return nobody
    cover = np.clip((distance[shown] / strength - 0.25) / 0.5, 0, 1)
    centroids, mass = _centroids(cover), cover.sum((1, 2))
    whole = mass >= WHOLE * mass.max() if enters else np.ones(len(cover), bool)
    framing, shape, texture, colour, misfit = _fit(woven[shown][whole], empty, centroids[whole], unit(height, width))
    if colour_error(colour, rgb) < VISIBLE:
        return nobody
    centres = centroids - _centre(shape, framing, unit(height, width)) + (top, 0)
    corner = corner_of(float(centres[0, 0]), float(centres[0, 1]), height, width)
    motion = _motion(centroids)
    return ShotReading(
        len(frames),
        True,
        colour,
        shape,
        texture,
        motion,
        corner,
        framing,
        light,
        place,
        rgb,
        weave,
        centres,
        enters,
        misfit,
    )


def _weave(ground: np.ndarray, rows: np.ndarray) -> float:
    """Strength of the weave of the ground [T, h, W, 3], 0 where it is faint: the median over pixels and channels of how
    far a row is from the mean of the two beside it, halved."""
    beside = (ground[:, :-2] + ground[:, 2:]) / 2
    weave = np.median((ground[:, 1:-1] - beside) * rows[1:-1, None, None]) / 2
    return float(weave) if abs(weave) >= FAINT else 0.0


def _background(ground: np.ndarray, where: np.ndarray, top: int, height: int) -> tuple[str, np.ndarray]:
    """The place whose pattern explains the pixels `where` [T, h, W] best, and the colour beneath the pattern [3]."""
    best: tuple = (np.inf,)
    for place in PLACES:
        pattern = place_pattern(place, height, ground.shape[2])[top:]
        plain = (ground - pattern[..., None])[where]
        rgb = np.median(plain, axis=0)
        misfit = np.abs(plain - rgb).mean()
        if misfit < best[0]:
            best = misfit, place, rgb
    return best[1:]


def _distance(ground: np.ndarray, place: str, rgb: np.ndarray, top: int, height: int) -> np.ndarray:
    """RGB distance of every pixel from the background; [T, h, W]."""
    pattern = place_pattern(place, height, ground.shape[2])[top:]
    return np.linalg.norm(ground - pattern[..., None] - rgb, axis=-1)


def _strengths(distance: np.ndarray) -> np.ndarray:
    """How far the most distinct pixels of each frame stand out from the background: the mean of the top six; [T]."""
    flat = distance.reshape(len(distance), -1)
    return np.partition(flat, -6, axis=1)[:, -6:].mean(1)


def _rms(difference: np.ndarray) -> float:
    return float(np.sqrt(np.square(difference).mean()))


def _centroids(cover: np.ndarray) -> np.ndarray:
    """Centroid (y, x) of each frame, in pixels from the corner of the free area; [T, 2]."""
    mass = cover.sum((1, 2)) + 1e-6
    y = (cover.sum(2) * (np.arange(cover.shape[1]) + 0.5)).sum(1) / mass
    x = (cover.sum(1) * (np.arange(cover.shape[2]) + 0.5)).sum(1) / mass
    return np.stack([y, x], axis=1)


def _motion(centroids: np.ndarray) -> str | None:
    if len(centroids) < 2:
        return None
    moved = centroids[-1] - centroids[0]
    return max(MOTIONS, key=lambda name: float(moved @ np.asarray(MOTIONS[name])))


def _fit(ground: np.ndarray, empty: np.ndarray, centroids: np.ndarray, pixels: float):
    """Framing, shape, texture and colour [3] of the template, sharp or soft, that explains the pixels best, and the rms
    of what the best sharp one leaves unexplained.

    ground     [T, h, W, 3]
    empty      [h, W, 3], the background
    centroids  [T, 2]
    pixels     of this frame size to one of a 16 x 16 frame
    """
    best: tuple = (np.inf,)
    unexplained = np.inf
    for framing, shape in product(RADIUS, SHAPES):
        centres, radius = centroids - _centre(shape, framing, pixels), RADIUS[framing] * pixels
        sharp = np.stack(coverage(shape, centres, radius, *ground.shape[1:3]))
        for soft, texture in product((False, True), TEXTURES):
            cover, stripe = _soften(sharp) if soft else sharp
            painted = ground - empty * (1 - cover)[..., None]
            shown = paint(cover, stripe, texture)
            misfit = np.square(painted - shown[..., None] * _colour(painted, shown, shown)).sum()
            if not soft:
                unexplained = min(unexplained, misfit)
            if misfit < best[0]:
                # Edges are where generated frames are least sure, so the colour is taken from the pixels well inside.
                inner, _ = coverage(shape, centres, CORE * radius, *ground.shape[1:3])
                best = misfit, framing, shape, texture, _colour(painted, shown, shown * inner)
    return *best[1:], float(np.sqrt(unexplained / ground.size))


def _centre(shape: str, framing: str, pixels: float) -> np.ndarray:
    """(y, x) from a shape's centre to its centroid, in pixels."""
    return np.array([CENTROIDS[shape] * RADIUS[framing] * pixels, 0])


def _soften(cover: np.ndarray) -> np.ndarray:
    """Blur [..., h, W] over three pixels in y and x, as generated frames often are."""
    padded = np.pad(cover, [(0, 0)] * (cover.ndim - 2) + [(1, 1), (1, 1)], mode="edge")
    rows = padded[..., :-2, :] + 2 * padded[..., 1:-1, :] + padded[..., 2:, :]
    return (rows[..., :-2] + 2 * rows[..., 1:-1] + rows[..., 2:]) / 16


def _colour(painted: np.ndarray, shown: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """The colour c [3] for which shown·c [T, h, W] is nearest to painted [T, h, W, 3], in weighted least squares."""
    return np.einsum("thw,thwc->c", weight, painted) / (weight * shown).sum()


def colour_error(a: ArrayLike, b: ArrayLike) -> float:
    """Euclidean distance of two colours [3] in RGB: 0 for the same, CHANCE on average for two random characters."""
    return float(np.linalg.norm(np.asarray(a, float) - np.asarray(b, float)))


def character_distance(a: ArrayLike | None, b: ArrayLike | None) -> float:
    """`colour_error` of two characters; CHANCE where one of them is missing (None)."""
    return CHANCE if a is None or b is None else colour_error(a, b)


def hue(rgb: ArrayLike) -> float:
    """Hue of a colour [3], in [0, 1)."""
    return colorsys.rgb_to_hsv(*np.asarray(rgb, float).tolist())[0]


def hue_spread(rgbs: Sequence[ArrayLike]) -> float:
    """1 − |mean of exp(2πi·hue)|: 0 where all hues are the same (collapse), near 1 where they fill the circle."""
    return 1 - float(np.abs(np.exp(2j * np.pi * np.array([hue(rgb) for rgb in rgbs])).mean()))


def score_shots(shots: Sequence[np.ndarray], truth: ToyTruth) -> list[dict[str, float]]:
    """Compare shots (frames [T, H, W, 3] in [0, 1]) with what they ought to show, one dict per shot.

    colour_error, background_error  RGB distances to the truth; a missing character's is CHANCE
    visible, enters, shape, texture, motion, corner, light, framing, place  1.0 where right, else 0.0
    weave_error  difference of the strengths of the background's weave
    misfit  rms difference of the pixels from the cleanest drawing of what they show: blur, noise, artefacts
    NaN where the truth defines none: all that is a character's in an establishing shot, motion where T = 1.
    """
    if len(shots) > len(truth.shots):
        raise ValueError(f"shots: expected at most {len(truth.shots)}, as in the truth, got {len(shots)}")
    return [score_reading(read_shot(frames), truth, i) for i, frames in enumerate(shots)]


def score_reading(got: ShotReading, truth: ToyTruth, index: int) -> dict[str, float]:
    """`score_shots` of one shot that has been read already."""
    want = truth.shots[index]
    scores = {
        "background_error": colour_error(got.background_rgb, truth.background_rgb),
        "visible": float(got.visible == (want.who is not None)),
        "light": float(got.light == truth.light),
        "framing": float(got.framing == want.framing),
        "place": float(got.place == want.place),
        "misfit": got.misfit,
        "weave_error": abs(got.weave - truth.weave),
        "colour_error": np.nan,
        "enters": np.nan,
        "shape": np.nan,
        "texture": np.nan,
        "motion": np.nan,
        "corner": np.nan,
    }
    if want.who is not None:
        who = truth.characters[want.who]
        scores["colour_error"] = character_distance(got.character_rgb, who.rgb)
        scores["shape"] = float(got.shape == who.shape)
        scores["texture"] = float(got.texture == who.texture)
        scores["corner"] = float(got.corner == want.corner)
        scores["enters"] = float(got.enters == want.enters)
        if got.frames > 1:
            scores["motion"] = float(got.motion == want.motion)
    return scores
