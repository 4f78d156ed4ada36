"""Where what happens in a film changes: the measure, the events found in it, and what the film shows (§ 3.2.1)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from PIL import Image, ImageDraw

from lct.data.events import EVENT, SHORTEST, change, peaks
from lct.draw.ink import INK, MUTED, PALETTE, PAPER, RULE, font, mix

CURVE, MARK = PALETTE[0], PALETTE[5]
SMOOTH = 3  # the curve is drawn this much larger, then reduced
MARGIN, TOP, HEIGHT, RIBBON, STRIP = 36, 118, 170, 10, 76  # pixels of a picture 1200 wide
MOST_TICKS = 14


def change_picture(
    frames: np.ndarray, fps: float, cuts: Sequence[int] = (), shortest: float = SHORTEST, width: int = 1200
) -> Image.Image:
    """Draw `change` along a film with the events found in it, its segments, and a strip of its frames.

    frames    uint8 [N, H, W, 3] in RGB
    cuts      first frame of every shot but the first; each shot is measured on its own
    shortest  seconds of the windows, and the least length of a segment
    width     of the picture, in pixels

    Raises what `change` raises, and ValueError for no frames and for cuts that are not in order within the film.
    """
    bounds = [0, *cuts, len(frames)]
    if any(start >= end for start, end in pairwise(bounds)):
        raise ValueError(f"cuts: expected 1 to {len(frames) - 1}, in order, got {list(cuts)}; sort them")
    shots = [change(frames[start:end], fps, shortest) for start, end in pairwise(bounds)]
    apart, measure = max(round(shortest * fps), 1), np.concatenate(shots)
    events = [start + i for start, shot in zip(bounds, shots, strict=False) for i in peaks(shot, apart)]
    u, count = width / 1200, len(frames)
    left, plot = round(MARGIN * u), width - 2 * round(MARGIN * u)
    top, floor = round(TOP * u), round((TOP + HEIGHT) * u)
    strip = floor + round((RIBBON + 14) * u)
    tiles = _tiles(frames, plot, STRIP * u)
    image = Image.new("RGB", (width, strip + tiles[0].height + round(52 * u)), PAPER)

    def x(frame: float) -> float:
        return left + plot * frame / count

    curve = _curve(measure, bounds, (plot, floor - top), u)
    image.paste(curve, (left, top))
    draw = ImageDraw.Draw(image)
    line = max(1, round(u))
    draw.line((left, floor, left + plot, floor), RULE, line)
    for i, (start, end) in enumerate(pairwise(sorted({*bounds, *events}))):
        box = (x(start), floor + 6 * u, x(end) - 2 * u, floor + (6 + RIBBON) * u)
        draw.rectangle(tuple(map(round, box)), mix(PALETTE[i % len(PALETTE)], PAPER, 0.25))
    for cut in cuts:
        draw.line((x(cut), top - 4 * u, x(cut), floor), mix(INK, PAPER, 0.45), line)
        draw.text((x(cut), top - 8 * u), "cut", MUTED, font(round(13 * u)), "ms")
    for event in events:
        height = floor - (floor - top) * float(measure[event])
        draw.line((x(event), height, x(event), strip - 8 * u), MARK, max(2, round(2 * u)))
        dot = (x(event) - 5 * u, height - 5 * u, x(event) + 5 * u, height + 5 * u)
        draw.ellipse(dot, MARK, PAPER, line)
        draw.text((x(event), height - 10 * u), f"{event / fps:.1f} s", mix(MARK, INK, 0.3), font(round(15 * u)), "ms")
    for i, tile in enumerate(tiles):
        image.paste(tile, (left + round(i * plot / len(tiles)), strip))
    step = _step(count / fps)
    axis = strip + tiles[0].height
    for tick in np.arange(0, count / fps + step / 100, step):
        at = x(tick * fps)
        draw.line((at, axis + 4 * u, at, axis + 9 * u), RULE, line)
        draw.text((at, axis + 27 * u), f"{tick:g} s", MUTED, font(round(14 * u)), "ms")
    draw.text((left, 18 * u), "Change along the film", INK, font(round(30 * u)))
    parts = [
        f"{count / fps:.1f} s",
        _many(len(shots), "shot"),
        _many(len(events), "event"),
        f"windows of {shortest:g} s",
    ]
    draw.text((left, 60 * u), "   ·   ".join(parts), MUTED, font(round(17 * u)))
    return image


def _curve(measure: np.ndarray, bounds: Sequence[int], size: tuple[int, int], u: float) -> Image.Image:
    """The curve of every shot over its filled area, and the height of an event as a broken line."""
    width, height = size[0] * SMOOTH, size[1] * SMOOTH
    image = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(image)
    for start, end in pairwise(bounds):
        at = np.arange(start, end) / len(measure) * width
        points = list(zip(at.tolist(), (height * (1 - measure[start:end])).tolist(), strict=True))
        draw.polygon([(points[0][0], height), *points, (points[-1][0], height)], mix(CURVE, PAPER, 0.82))
        draw.line(points, CURVE, round(2.5 * SMOOTH * u), joint="curve")
    level, dash = height * (1 - EVENT), 8 * SMOOTH * u
    for i in range(round(width / dash / 2)):
        draw.line((2 * i * dash, level, (2 * i + 1) * dash, level), RULE, round(SMOOTH * u))
    return image.resize(size, Image.Resampling.LANCZOS)


def _tiles(frames: np.ndarray, width: int, height: float) -> list[Image.Image]:
    """Frames from the middles of equal parts of the film, as many as stand side by side in `width` pixels."""
    rows, columns = frames.shape[1:3]
    count = max(round(width / (height * columns / rows)), 1)
    one = max(round(width / count) - 2, 1)
    size = (one, max(round(one * rows / columns), 1))
    middles = [(2 * i + 1) * len(frames) // (2 * count) for i in range(count)]
    return [Image.fromarray(frames[i]).resize(size, Image.Resampling.LANCZOS) for i in middles]


def _many(count: int, name: str) -> str:
    return f"{count} {name}{'' if count == 1 else 's'}"


def _step(seconds: float) -> float:
    """The smallest of 0.5, 1, 2, 5, 10, … that makes few enough ticks."""
    steps = (0.5 * factor * 10**power for power in range(8) for factor in (1, 2, 4, 10))
    return next((step for step in steps if seconds / step <= MOST_TICKS), seconds)
