"""Pictures of layouts: who sees whom, and where the rows sit (paper § 3.2.2, § 3.3, Fig. 3).

Everything is drawn from shots and intervals, so a layout of 170,000 rows costs as much as one of 170.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, product

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from lct.layout import SceneLayout, Shot

RGB = tuple[int, int, int]

INK, MUTED, RULE, PAPER = (27, 36, 48), (104, 114, 128), (203, 209, 217), (255, 255, 255)
UNSEEN = (241, 243, 246)
GLOBAL = (108, 117, 132)
# Okabe and Ito's colours, which stay apart for colour-blind readers; neighbours differ most. Shot 7 is blue again.
PALETTE = ((0, 114, 178), (230, 159, 0), (0, 158, 115), (204, 121, 167), (86, 180, 233), (213, 94, 0))

TITLES = {"isolated": "Isolated", "bidirectional": "Bidirectional", "context_causal": "Context-causal"}
THINNEST = 3  # pixels that the smallest part of a shot gets in a mask, so that a short prompt does not vanish

# One step along t, y and x on the page: the space diagonal falls gently to the right, and y points down as in a frame.
AXES = np.array([[0.82, -0.30], [0.0, 0.60], [0.82, 0.36]])
SMOOTH = 3  # slanted lines are drawn this much larger, then reduced


def shot_names(scene: Sequence[Shot]) -> list[str]:
    """"global" and "shot 1", "shot 2", … as the pictures name the shots of one scene."""
    first = 0 if scene[0].role == "global" else 1
    return ["global" if shot.role == "global" else f"shot {first + i}" for i, shot in enumerate(scene)]


def shot_colour(name: str) -> RGB:
    """The colour of a shot by its name in `shot_names`."""
    return GLOBAL if name == "global" else PALETTE[(int(name.split()[1]) - 1) % len(PALETTE)]


def mix(colour: RGB, other: RGB, share: float) -> RGB:
    """`colour` with `share` of `other` in it."""
    return tuple(round(a + (b - a) * share) for a, b in zip(colour, other, strict=True))  # type: ignore[return-value]


def pair_colour(key_colour: RGB, own: bool, texts: int) -> RGB:
    """Colour of visible pairs: the key's shot, paler where it is another shot's context, darker per text side (0 to 2)."""
    dark = mix(key_colour, (0, 0, 0), (0.0, 0.2, 0.4)[texts])
    return dark if own else mix(dark, PAPER, 0.45)


@lru_cache(maxsize=32)
def font(pixels: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=pixels)


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


# ---- who sees whom


@dataclass(frozen=True)
class MaskGrid:
    """Where the pairs of a layout lie in its mask picture, in pixels.

    left, top  corner of the square of pairs
    rows       first row of every part (text, video, text, …), then S
    edges      their distance from that corner, along either axis
    """

    left: int
    top: int
    rows: tuple[int, ...]
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
        rows = tuple(accumulate((int(n) for n in parts), initial=0))
        left, top = (216, 188) if len(layout.scenes) > 1 else (140, 160)
        return cls(round(size * left / 720), round(size * top / 720), rows, tuple(edges.tolist()))

    @property
    def side(self) -> int:
        return self.edges[-1]

    def pixel(self, query: int, key: int) -> tuple[int, int]:
        """(x, y) in the middle of one pair, or of the pixel that it shares."""
        x, y = (np.interp(row + 0.5, self.rows, self.edges) for row in (key, query))
        return self.left + int(x), self.top + int(y)


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
    draw.rectangle((grid.left, grid.top, grid.left + grid.side - 1, grid.top + grid.side - 1), UNSEEN)
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
    scenes = layout.first_shots[1:]
    for shot in sorted(range(1, len(layout.shots)), key=lambda shot: shot in scenes):  # heavy lines over light ones
        thick, colour = (max(2, round(3 * u)), INK) if shot in scenes else (1, PAPER)
        at = grid.edges[2 * shot] - thick // 2
        for x, y, w, h in ((at, 0, thick, grid.side), (0, at, grid.side, thick)):
            _fill(draw, grid.left + x, grid.top + y, grid.left + x + w, grid.top + y + h, colour)


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
    labels = _fitting(names, grid.side, (lambda _: 22 * u) if vertical else (lambda name: normal.getlength(name) + 8 * u))
    placed = _spread([centres[i] for i, _, _ in labels], [width for _, _, width in labels], -20 * u, grid.side + 30 * u)
    for (i, label, _), at in zip(labels, placed, strict=True):
        colour = mix(shot_colour(names[i]), INK, 0.35)
        if not starts[i] <= at <= ends[i]:
            draw.line((*page(centres[i], 14 * u), *page(at, (58 if vertical else 36) * u)), RULE, max(1, round(u)))
        draw.text(page(at, (62 if vertical else 40) * u), label, colour, normal, anchor)
    if len(layout.scenes) > 1:
        far = (124 if vertical else 66) * u
        for scene, first in enumerate(layout.first_shots):
            start, end = grid.edges[2 * first], grid.edges[2 * (first + len(layout.scenes[scene]))]
            box(start + 2 * u, end - 2 * u, far, far + 2 * u, INK)
            draw.text(page((start + end) / 2, far + 9 * u), f"scene {scene + 1}", INK, normal, anchor)


def _fitting(names: Sequence[str], side: float, width: Callable[[str], float]) -> list[tuple[int, str, float]]:
    """(index, label, width) of the labels that fit `side` pixels: whole names, else their numbers, else every k-th."""
    short = [name.removeprefix("shot ") for name in names]
    labels = list(names) if sum(map(width, names)) <= side else short
    every = max(1, -int(-sum(map(width, labels)) // max(side, 1)))
    return [(i, labels[i], width(labels[i])) for i in range(0, len(names), every)]


def _draw_legend(draw: ImageDraw.ImageDraw, grid: MaskGrid, u: float) -> None:
    font, x, y = font(round(15 * u)), float(grid.left), grid.top + grid.side + 34 * u
    for label, tones in (
        ("own shot", [pair_colour(GLOBAL, True, n) for n in (2, 1, 0)]),
        ("context", [pair_colour(GLOBAL, False, n) for n in (2, 1, 0)]),
        ("not visible", [UNSEEN]),
    ):
        for tone in tones:
            _fill(draw, x, y - 8 * u, x + 16 * u, y + 8 * u, tone)
            x += 16 * u
        draw.text((x + 8 * u, y), label, INK, font, "lm")
        x += font.getlength(label) + 34 * u
    draw.text((x, y), "darker: text,  lighter: video", MUTED, font, "lm")


# ---- where the rows sit


def positions_picture(layout: SceneLayout, text_scale: float = 1.0, width: int = 1200) -> Image.Image:
    """Draw the RoPE coordinates of every shot along the space diagonal, a scene under the other (Fig. 3b).

    text_scale  λ of `SceneLayout.positions`: the step from one text token to the next
    width       of the picture, in pixels
    """
    panels = [_positions_panel(layout, scene, text_scale, width) for scene in range(len(layout.scenes))]
    image = Image.new("RGB", (width, sum(panel.height for panel in panels)), PAPER)
    for panel, top in zip(panels, accumulate((p.height for p in panels), initial=0), strict=False):
        image.paste(panel, (0, top))
    return image


def _positions_panel(layout: SceneLayout, scene: int, text_scale: float, width: int) -> Image.Image:
    u, shots, first = width / 1200, layout.scenes[scene], layout.first_shots[scene]
    origins = layout.origins(text_scale)[first : first + len(shots)]
    end = max(origins[-1] + shots[-1].extent(text_scale), 1.0)
    scale = (width - 150 * u) / (end * AXES.sum(0)[0])
    starts = [origin + text_scale * shot.text - 0.5 for shot, origin in zip(shots, origins, strict=True)]
    tops = [((start + np.array([shot.video[0], 0, 0])) @ AXES)[1] for start, shot in zip(starts, shots, strict=True)]
    lows = [((start + np.array([0, *shot.video[1:]])) @ AXES)[1] for start, shot in zip(starts, shots, strict=True)]
    corner = np.array([60 * u, 122 * u - scale * min(0.0, *tops)])
    height = round(corner[1] + scale * max(lows) + 66 * u)

    def page(points: object) -> np.ndarray:
        """Pixels [..., 2] of coordinates [..., 3] = (t, y, x)."""
        return corner + scale * np.asarray(points, np.float64) @ AXES

    fine = Image.new("RGB", (width * SMOOTH, height * SMOOTH), PAPER)
    draw = ImageDraw.Draw(fine)
    _lines(draw, page(np.array([[[0.0] * 3, [end] * 3]])), RULE, 2 * u)
    for shot, origin, name in zip(shots, origins, shot_names(shots), strict=True):
        _draw_tokens(draw, page, shot, origin, text_scale, shot_colour(name), u, scale)
    axes = np.array([90 * u, height - 92 * u])
    _lines(draw, np.stack([np.broadcast_to(axes, (3, 2)), axes + 52 * u * AXES], axis=1), INK, 2 * u)
    image = fine.reduce(SMOOTH)
    draw = ImageDraw.Draw(image)
    for axis, name in enumerate("tyx"):
        draw.text(tuple(axes + 66 * u * AXES[axis]), name, INK, font(round(16 * u)), "mm")
    for shot, origin, name in zip(shots, origins, shot_names(shots), strict=True):
        _label_shot(draw, page, shot, origin, text_scale, name, u)
    title = "Interleaved 3D positions" + (f": scene {scene + 1}" if len(layout.scenes) > 1 else "")
    draw.text((24 * u, 18 * u), title, INK, font(round(30 * u)))
    draw.text((24 * u, 58 * u), "dots: text tokens   ·   boxes: video tokens (t, y, x)", MUTED, font(round(17 * u)))
    return image


def _lines(draw: ImageDraw.ImageDraw, lines: np.ndarray, colour: RGB, thick: float) -> None:
    """Lines [n, 2 ends, 2] in pixels of the picture, on its enlarged canvas."""
    for line in lines * SMOOTH:
        draw.line([tuple(point) for point in line], colour, max(1, round(thick * SMOOTH)))


def _draw_tokens(draw, page: Callable, shot: Shot, origin: float, step: float, colour: RGB, u: float, scale: float) -> None:
    start, sizes = origin + step * shot.text, np.array(shot.video)
    if shot.video_rows:
        # The faces that are seen: top (y least), front (t least: the first frame), side (x greatest).
        for hidden, side, shade in ((1, 0, mix(colour, PAPER, 0.35)), (0, 0, colour), (2, 1, mix(colour, INK, 0.3))):
            base, (a, b) = np.zeros(3), (i for i in range(3) if i != hidden)
            base[hidden] = side * sizes[hidden]
            along, across = np.eye(3)[a] * sizes[a], np.eye(3)[b] * sizes[b]
            face = page(start - 0.5 + base + np.array([0 * along, along, along + across, across]))
            draw.polygon([tuple(point) for point in face * SMOOTH], shade)
            grid = [[base + i * np.eye(3)[a], base + i * np.eye(3)[a] + across] for i in range(sizes[a] + 1)]
            grid += [[base + i * np.eye(3)[b], base + i * np.eye(3)[b] + along] for i in range(sizes[b] + 1)]
            if scale > 6 * u:
                _lines(draw, page(start - 0.5 + np.array(grid)), mix(shade, PAPER, 0.55), 0.8 * u)
    radius = float(np.clip(0.5 * scale * max(step, 0.3), 1.5 * u, 5 * u)) * SMOOTH
    for x, y in page(np.repeat(origin + step * np.arange(shot.text)[:, None], 3, 1)) * SMOOTH:
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), mix(colour, INK, 0.4))


def _label_shot(draw, page: Callable, shot: Shot, origin: float, step: float, name: str, u: float) -> None:
    start, small = origin + step * shot.text, font(round(14 * u))
    x, y = page(np.full(3, origin))
    draw.text((x, y - 12 * u), f"{origin:g}", MUTED, small, "ms", stroke_width=round(2 * u), stroke_fill=PAPER)
    x, y = page(start - 0.5 + np.array([0, *shot.video[1:]]))
    draw.text((x, y + 10 * u), name, mix(shot_colour(name), INK, 0.35), font(round(18 * u)), "ma")
    draw.text((x, y + 32 * u), f"{shot.text} + {shot.video}", MUTED, small, "ma")
