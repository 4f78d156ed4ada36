"""Where the rows sit: interleaved 3D RoPE coordinates along the space diagonal (paper § 3.2.2, Fig. 3b)."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import numpy as np
from PIL import Image, ImageDraw

from lct.draw.ink import INK, MUTED, PAPER, RGB, RULE, font, mix, shot_colour, shot_names
from lct.layout import SceneLayout, Shot

# One step along t, y and x on the page: the space diagonal falls gently to the right, and y points down as in a frame.
AXES = np.array([[0.82, -0.30], [0.0, 0.60], [0.82, 0.36]])
MOST_DOTS = 4000  # of a shot's text
SMOOTH = 3  # slanted lines are drawn this much larger, then reduced


def positions_picture(layout: SceneLayout, text_scale: float = 1.0, width: int = 1200) -> Image.Image:
    """Draw the RoPE coordinates of every shot along the space diagonal, a scene under the other (Fig. 3b).

    text_scale  λ of `SceneLayout.positions`: the step from one text token to the next
    width       of the picture, in pixels
    """
    panels = []
    for scene in range(len(layout.scenes)):
        title = "Interleaved 3D positions" + (f": scene {scene + 1}" if len(layout.scenes) > 1 else "")
        panels.append(_panel(_View.of(layout, scene, text_scale, width), text_scale, width, title))
    image = Image.new("RGB", (width, sum(panel.height for panel in panels)), PAPER)
    for panel, top in zip(panels, accumulate((p.height for p in panels), initial=0), strict=False):
        image.paste(panel, (0, top))
    return image


@dataclass(frozen=True)
class _View:
    """How the coordinates of one scene lie on its panel.

    shots    (shot, its origin p on the diagonal, its first video coordinate, its name)
    end      coordinate where the scene ends
    corner   pixel of coordinate 0
    scale    pixels to one step along an axis, before `AXES` foreshorten it
    height   of the panel, in pixels
    u        pixels to one pixel of a picture 1200 wide
    """

    shots: tuple[tuple[Shot, float, float, str], ...]
    end: float
    corner: np.ndarray
    scale: float
    height: int
    u: float

    @classmethod
    def of(cls, layout: SceneLayout, scene: int, text_scale: float, width: int) -> _View:
        u, shots, first = width / 1200, layout.scenes[scene], layout.first_shots[scene]
        origins = layout.origins(text_scale)[first : first + len(shots)]
        starts = [origin + text_scale * shot.text for shot, origin in zip(shots, origins, strict=True)]
        end = max(origins[-1] + shots[-1].extent(text_scale), 1.0)
        scale = (width - 150 * u) / (end * AXES.sum(0)[0])
        clips = list(zip(starts, (shot.video for shot in shots), strict=True))
        top = min((start - 0.5 + np.array([t, 0, 0])) @ AXES[:, 1] for start, (t, _, _) in clips)
        bottom = max((start - 0.5 + np.array([0, h, w])) @ AXES[:, 1] for start, (_, h, w) in clips)
        corner = np.array([60 * u, 122 * u - scale * min(0.0, top)])
        height = round(corner[1] + scale * bottom + 66 * u)
        named = tuple(zip(shots, origins, starts, shot_names(shots), strict=True))
        return cls(named, end, corner, scale, height, u)

    def page(self, points: object) -> np.ndarray:
        """Pixels [..., 2] of coordinates [..., 3] = (t, y, x)."""
        return self.corner + self.scale * np.asarray(points, np.float64) @ AXES


def _panel(view: _View, text_scale: float, width: int, title: str) -> Image.Image:
    u = view.u
    fine = Image.new("RGB", (width * SMOOTH, view.height * SMOOTH), PAPER)
    draw = ImageDraw.Draw(fine)
    _lines(draw, view.page([[[0.0] * 3, [view.end] * 3]]), RULE, 2 * u)
    for shot, origin, start, name in view.shots:
        if shot.video_rows:
            _draw_video(draw, view, shot.video, start, shot_colour(name))
        _draw_text(draw, view, origin + text_scale * np.arange(shot.text), text_scale, shot_colour(name))
    compass = np.array([90 * u, view.height - 92 * u])
    _lines(draw, np.stack([np.broadcast_to(compass, (3, 2)), compass + 52 * u * AXES], axis=1), INK, 2 * u)
    image = fine.reduce(SMOOTH)
    draw = ImageDraw.Draw(image)
    for axis, letter in enumerate("tyx"):
        draw.text(tuple(compass + 66 * u * AXES[axis]), letter, INK, font(round(16 * u)), "mm")
    _draw_labels(draw, view)
    draw.text((24 * u, 18 * u), title, INK, font(round(30 * u)))
    draw.text((24 * u, 58 * u), "dots: text tokens   ·   boxes: video tokens (t, y, x)", MUTED, font(round(17 * u)))
    return image


def _lines(draw: ImageDraw.ImageDraw, lines: np.ndarray, colour: RGB, thick: float) -> None:
    """Lines [n, 2 ends, 2] in pixels of the picture, on its enlarged canvas."""
    for line in lines * SMOOTH:
        draw.line([tuple(point) for point in line], colour, max(1, round(thick * SMOOTH)))


def _draw_video(draw: ImageDraw.ImageDraw, view: _View, video: tuple[int, int, int], start: float, colour: RGB) -> None:
    """A box of one unit per token, centred on it; only the faces towards the reader: top, first frame, right side."""
    edges = np.diag(np.array(video, np.float64))
    for hidden, far, shade in ((1, 0, mix(colour, PAPER, 0.35)), (0, 0, colour), (2, 1, mix(colour, INK, 0.3))):
        a, b = (axis for axis in range(3) if axis != hidden)
        corner = start - 0.5 + far * edges[hidden]
        face = view.page(corner + np.array([0 * edges[a], edges[a], edges[a] + edges[b], edges[b]]))
        draw.polygon([tuple(point) for point in face * SMOOTH], shade)
        if view.scale < 6 * view.u:
            continue
        grid = [(i * np.eye(3)[a], edges[b]) for i in range(video[a] + 1)]
        grid += [(i * np.eye(3)[b], edges[a]) for i in range(video[b] + 1)]
        lines = np.array([(corner + foot, corner + foot + along) for foot, along in grid])
        _lines(draw, view.page(lines), mix(shade, PAPER, 0.55), 0.8 * view.u)


def _draw_text(draw: ImageDraw.ImageDraw, view: _View, places: np.ndarray, step: float, colour: RGB) -> None:
    radius = float(np.clip(0.5 * view.scale * max(step, 0.3), 1.5 * view.u, 5 * view.u)) * SMOOTH
    places = places[:: -(-len(places) // MOST_DOTS)] if len(places) else places  # they lie on one another by then
    for x, y in view.page(np.repeat(places[:, None], 3, axis=1)) * SMOOTH:
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), mix(colour, INK, 0.4))


def _draw_labels(draw: ImageDraw.ImageDraw, view: _View) -> None:
    """Each shot's origin above its first token, its name and sizes below its video."""
    u, small, right, bottom = view.u, font(round(14 * view.u)), -np.inf, -np.inf
    for shot, origin, start, name in view.shots:
        x, y = view.page([origin] * 3)
        sizes = f"{shot.text} + {shot.video}"
        below, under = view.page(start - 0.5 + np.array([0, *shot.video[1:]]))
        half = small.getlength(sizes) / 2 + 4 * u
        if below - half < right and under + 10 * u < bottom:  # it would lie on the label before
            continue
        right, bottom = below + half, under + 46 * u
        draw.text((x, y - 12 * u), f"{origin:g}", MUTED, small, "ms", stroke_width=round(2 * u), stroke_fill=PAPER)
        draw.text((below, under + 10 * u), name, mix(shot_colour(name), INK, 0.35), font(round(18 * u)), "ma")
        draw.text((below, under + 32 * u), sizes, MUTED, small, "ma")
