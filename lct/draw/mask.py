"""Who sees whom, as a picture of the visibility mask (paper § 3.2.2, § 3.3).

It is drawn from shots and intervals, never from pairs: a layout of 170,000 rows costs as much as one of 170.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise, product

import numpy as np
from PIL import Image, ImageDraw

from lct.draw.ink import GLOBAL, INK, MUTED, PAPER, RGB, RULE, font, mix, shot_colour, shot_names
from lct.layout import SceneLayout

UNSEEN = (241, 243, 246)
TITLES = {"isolated": "Isolated", "bidirectional": "Bidirectional", "context_causal": "Context-causal"}
THINNEST = 4  # pixels that the smallest part of a shot gets in a mask, so that a short prompt does not vanish


def pair_colour(key_colour: RGB, own: bool, texts: int) -> RGB:
    """Colour of visible pairs: the key's shot; paler where another shot sees it, darker for each text side (0 to 2)."""
    dark = mix(key_colour, (0, 0, 0), (0.0, 0.2, 0.4)[texts])
    return dark if own else mix(dark, PAPER, 0.45)


@dataclass(frozen=True)
class MaskGrid:
    """Where the pairs of a layout lie in its mask picture, in pixels.

    left, top  corner of the square of pairs
    edges      of every part (text, video, text, …), counted from that corner along either axis
    """

    left: int
    top: int
    edges: tuple[int, ...]

    @classmethod
    def of(cls, layout: SceneLayout, size: int = 720) -> MaskGrid:
        """The grid of `mask_picture(layout, size)`. Parts thinner than `THINNEST` pixels are widened to it."""
        parts = np.array([n for shot in layout.shots for n in (shot.text, shot.video_rows)], np.float64)
        widths = size * parts / max(layout.rows, 1)
        least = min(THINNEST, size / (2 * len(parts)))
        thin = (parts > 0) & (widths < least)
        widths[~thin] *= (size - least * thin.sum()) / max(widths[~thin].sum(), 1e-9)
        widths[thin] = least
        edges = np.rint(np.cumsum([0.0, *widths])).astype(int)
        left, top = (216, 188) if len(layout.scenes) > 1 else (140, 160)
        return cls(round(size * left / 720), round(size * top / 720), tuple(edges.tolist()))

    @property
    def side(self) -> int:
        return self.edges[-1]


def mask_picture(layout: SceneLayout, size: int = 720) -> Image.Image:
    """Draw the visibility mask: rows are queries, columns keys, each visible pair in the colour of the key's shot.

    size  pixels of the square of pairs; the picture is larger by its title, labels and legend
    """
    grid, u = MaskGrid.of(layout, size), size / 720
    width, height = grid.left + grid.side + round(36 * u), grid.top + grid.side + round(72 * u)
    image = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(image)
    _draw_pairs(draw, grid, layout)
    _draw_separators(draw, grid, layout, u)
    for vertical in (False, True):
        _draw_axis(draw, grid, layout, u, vertical)
    pairs = sum(s.rows * sum(b - a for a, b in layout.visible_intervals(i)) for i, s in enumerate(layout.shots))
    title = TITLES.get(layout.visibility, "") if isinstance(layout.visibility, str) else "Selected shots"
    share = f"{layout.rows:,} rows   ·   {100 * pairs / max(layout.rows, 1) ** 2:.1f} % of all pairs visible"
    draw.text((24 * u, 18 * u), title, INK, font(round(30 * u)))
    draw.text((24 * u, 58 * u), share, MUTED, font(round(17 * u)))
    axes = (grid.left + grid.side, 58 * u)
    draw.text(axes, "rows: queries   ·   columns: keys", MUTED, font(round(17 * u)), "ra")
    _draw_legend(draw, grid, u)
    return image


def _draw_pairs(draw: ImageDraw.ImageDraw, grid: MaskGrid, layout: SceneLayout) -> None:
    _fill(draw, grid.left, grid.top, grid.left + grid.side, grid.top + grid.side, UNSEEN)
    for scene, shots in enumerate(layout.scenes):
        first, names = layout.first_shots[scene], shot_names(shots)
        for query in range(len(shots)):
            for key, q_video, k_video in product(layout.visible_shots(scene, query), (0, 1), (0, 1)):
                q, k = 2 * (first + query) + q_video, 2 * (first + key) + k_video
                colour = pair_colour(shot_colour(names[key]), query == key, 2 - q_video - k_video)
                _fill(draw, grid.left + grid.edges[k], grid.top + grid.edges[q],
                      grid.left + grid.edges[k + 1], grid.top + grid.edges[q + 1], colour)  # fmt: skip


def _fill(draw: ImageDraw.ImageDraw, x0: float, y0: float, x1: float, y1: float, colour: RGB) -> None:
    """Fill the half-open rectangle [x0, x1) x [y0, y1); nothing where it is empty."""
    if x1 > x0 and y1 > y0:
        draw.rectangle((round(x0), round(y0), round(x1) - 1, round(y1) - 1), colour)


def _draw_separators(draw: ImageDraw.ImageDraw, grid: MaskGrid, layout: SceneLayout, u: float) -> None:
    scenes, shots = layout.first_shots[1:], grid.edges[::2]
    whole = [*(shots[first] for first in layout.first_shots), shots[-1]]
    light, heavy = _thickness(shots, 1), _thickness(whole, max(2, round(3 * u)))
    for shot in sorted(range(1, len(layout.shots)), key=lambda shot: shot in scenes):  # heavy lines over light ones
        thick, colour = (heavy, INK) if shot in scenes else (light, PAPER)
        at = grid.edges[2 * shot] - thick // 2
        for x, y, w, h in ((at, 0, thick, grid.side), (0, at, grid.side, thick)):
            _fill(draw, grid.left + x, grid.top + y, grid.left + x + w, grid.top + y + h, colour)


def _thickness(edges: Sequence[float], most: int) -> int:
    """Of lines between the parts of an axis: at most this, and none where lines would hide what they part."""
    usual = np.median(np.diff(edges))
    return most if usual >= 4 * most else int(usual >= 8)


def _draw_axis(draw: ImageDraw.ImageDraw, grid: MaskGrid, layout: SceneLayout, u: float, vertical: bool) -> None:
    """One ribbon of shots with its labels, above the pairs or left of them."""

    def page(along: float, away: float) -> tuple[float, float]:
        """A point `along` the axis and `away` from the pairs."""
        return (grid.left - away, grid.top + along) if vertical else (grid.left + along, grid.top - away)

    def box(start: float, end: float, near: float, far: float, colour: RGB) -> None:
        (x0, y0), (x1, y1) = page(start, near), page(end, far)
        _fill(draw, min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1), colour)

    anchor, small, normal = "rm" if vertical else "ms", font(round(13 * u)), font(round(17 * u))
    names = [name for scene in layout.scenes for name in shot_names(scene)]
    for part, (start, end) in enumerate(zip(grid.edges, grid.edges[1:], strict=False)):
        box(start, end, 5 * u, 13 * u, pair_colour(shot_colour(names[part // 2]), True, 2 * (1 - part % 2)))
        word = ("text", "video")[part % 2]
        if end - start > (15 * u if vertical else small.getlength(word) + 6 * u):
            draw.text(page((start + end) / 2, 20 * u), word, MUTED, small, anchor)
    starts, ends = grid.edges[:-1:2], grid.edges[2::2]
    centres = [(a + b) / 2 for a, b in zip(starts, ends, strict=True)]
    width = (lambda _: 22 * u) if vertical else (lambda name: normal.getlength(name) + 8 * u)
    for i, label, at in _placed(names, centres, grid.side, width, u):
        colour = mix(shot_colour(names[i]), INK, 0.35)
        if not starts[i] <= at <= ends[i]:
            draw.line((*page(centres[i], 14 * u), *page(at, (58 if vertical else 36) * u)), RULE, max(1, round(u)))
        draw.text(page(at, (62 if vertical else 40) * u), label, colour, normal, anchor)
    if len(layout.scenes) > 1:
        far = (124 if vertical else 66) * u
        ends = [*(grid.edges[2 * first] for first in layout.first_shots), grid.edges[-1]]
        centres = [(a + b) / 2 for a, b in pairwise(ends)]
        for start, end in pairwise(ends):
            box(start + 2 * u, end - 2 * u, far, far + 2 * u, INK)
        names = [f"scene {scene + 1}" for scene in range(len(centres))]
        for _, label, at in _placed(names, centres, grid.side, width, u):
            draw.text(page(at, far + 9 * u), label, INK, normal, anchor)


def _placed(
    names: Sequence[str], centres: Sequence[float], side: float, width: Callable[[str], float], u: float
) -> list[tuple[int, str, float]]:
    """(index, label, place) of the labels that fit, near what they name and beside one another."""
    labels = _fitting(names, side, width)
    placed = _spread([centres[i] for i, _, _ in labels], [wide for _, _, wide in labels], -20 * u, side + 30 * u)
    return [(i, label, at) for (i, label, _), at in zip(labels, placed, strict=True)]


def _fitting(names: Sequence[str], side: float, width: Callable[[str], float]) -> list[tuple[int, str, float]]:
    """(index, label, width) of the labels that fit `side` pixels: whole names, else their numbers, else every k-th."""
    short = [name.removeprefix("shot ").removeprefix("scene ") for name in names]
    labels = list(names) if sum(map(width, names)) <= side else short
    every = max(1, -int(-sum(map(width, labels)) // max(side, 1)))
    return [(i, labels[i], width(labels[i])) for i in range(0, len(names), every)]


def _draw_legend(draw: ImageDraw.ImageDraw, grid: MaskGrid, u: float) -> None:
    letters, x, y = font(round(15 * u)), float(grid.left), grid.top + grid.side + 34 * u
    for label, tones in (
        ("own shot", [pair_colour(GLOBAL, True, n) for n in (2, 1, 0)]),
        ("context", [pair_colour(GLOBAL, False, n) for n in (2, 1, 0)]),
        ("not visible", [UNSEEN]),
    ):
        for tone in tones:
            _fill(draw, x, y - 8 * u, x + 16 * u, y + 8 * u, tone)
            x += 16 * u
        draw.text((x + 8 * u, y), label, INK, letters, "lm")
        x += letters.getlength(label) + 34 * u
    draw.text((x, y), "darker: text,  lighter: video", MUTED, letters, "lm")


def _spread(centres: Sequence[float], widths: Sequence[float], low: float, high: float) -> list[float]:
    """Centres moved apart, in order, so that labels of these widths do not overlap within [low, high]."""
    placed: list[float] = []
    for centre, width in zip(centres, widths, strict=True):
        placed.append(max(centre, low + width / 2))
        low = placed[-1] + width / 2
    for i in reversed(range(len(placed))):
        placed[i] = min(placed[i], high - widths[i] / 2)
        high = placed[i] - widths[i] / 2
    return placed
